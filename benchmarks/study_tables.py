#!/usr/bin/env python
"""Tables and the picture of a study: the rows that study.py wrote in, study.md and study.png out.

    python benchmarks/study_tables.py results/study_cpu/study.csv --out results/study_cpu

Means have 95% intervals of Student's t over the seeds. Methods are compared by the differences of runs with the same
seed, at the same share that was asked for; the corrected intervals of one table hold together at 95%, and only where
one of them excludes zero is a method called better or worse (reporting/paired.py).
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting.figures import BLUE, GREEN, GREY, LINES, MARKERS, ORANGE, PURPLE, SKY, VERMILLION, draw, percent_axis
from reporting.page import publish, write_bytes
from reporting.paired import Difference, corrected, paired
from reporting.words import md_table, percent, plural, thousands
from utils import OneLineParser, RunError, write_text

# cells whose methods stand in one table and in the picture
TOGETHER = {"both": ("both", "small", "peer", "more", "dense"), "vit_small_both": ("vit_small_both", "vit_small_dense")}
# what the methods of a cell are compared with; of others, their first method
REFERENCES = {
    "both": ("both", "refill"),
    "factor": ("both", "rsst"),
    "refill_factor": ("both", "refill"),
    "fillback": ("fillback", "none"),
    "rewind": ("rewind", "finetune_rsst"),
}


@dataclass(frozen=True)
class Entry:
    """The runs of one method of a cell at one share, by seed; `asked` is "" for networks that nothing is cut from."""

    cell: str
    method: str
    asked: str
    runs: Mapping[str, Mapping[str, str]]

    def values(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.runs.values() if row.get(name) not in ("", None)]

    def mean(self, name: str) -> float:
        values = self.values(name)
        return statistics.fmean(values) if values else math.nan


def read_entries(path: Path) -> tuple[list[Entry], list[str]]:
    """The runs of a study.csv by cell, method and share, and the names of those that failed.

    Raises:
        RunError: the file is no study.csv.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        failed = [row["name"] for row in rows if row["failure"]]
        found: dict[tuple[str, str, str], dict] = {}
        for row in rows:
            if not row["failure"]:
                found.setdefault((row["cell"], row["method"], row["asked"]), {})[row["seed"]] = row
    except (OSError, KeyError) as error:
        raise RunError(f"{path}: not the study.csv of a study ({error})") from error
    if not found:
        raise RunError(f"{path}: no run is complete yet")
    return [Entry(*key, runs) for key, runs in found.items()], failed


def differences(entries: Sequence[Entry], references: Sequence[Entry]) -> list[tuple[Entry, Entry, Difference]]:
    """Each entry minus the reference of its share, in test accuracy over the seeds of both; corrected for all."""
    by_share = {entry.asked: entry for entry in references}
    pairs = []
    for entry in entries:
        # a dense network stands beside every share
        shares = [entry.asked] if entry.asked else list(by_share)
        pairs += [(entry, by_share[share]) for share in shares if share in by_share and entry is not by_share[share]]
    pairs = [(entry, other) for entry, other in pairs if entry.runs.keys() & other.runs.keys()]
    found = [
        paired([float(entry.runs[seed]["test"]) - float(other.runs[seed]["test"]) for seed in _shared(entry, other)])
        for entry, other in pairs
    ]
    return [(*pair, difference) for pair, difference in zip(pairs, corrected(found), strict=True)]


def _shared(entry: Entry, other: Entry) -> list[str]:
    return sorted(entry.runs.keys() & other.runs.keys(), key=int)


# ------------------------------------------------------------------------------------------------ tables


def study_text(entries: Sequence[Entry], failed: Sequence[str]) -> str:
    """study.md."""
    runs = sum(len(entry.runs) for entry in entries)
    parts = ["# Study", f"{plural(runs, 'run')}; test accuracy in percent, differences in points, 95% intervals."]
    if failed:
        parts.append(f"Failed: {', '.join(failed)}.")
    parts += ["![Test accuracy over MACs](study.png)", "## Accuracy at RSST's cut", cut_table(entries)]
    taken = {cell for cells in TOGETHER.values() for cell in cells}
    cells = list(dict.fromkeys(entry.cell for entry in entries))
    for cell in cells:
        if cell in TOGETHER or cell not in taken:
            together = [entry for entry in entries if entry.cell in TOGETHER.get(cell, (cell,))]
            together.sort(key=lambda entry: -float(entry.asked or 2))
            parts += [f"## {cell}", accuracy_table(together), *_difference_parts(cell, together, entries)]
    return "\n\n".join(parts) + "\n"


def accuracy_table(entries: Sequence[Entry]) -> str:
    """Means over seeds, a line a method and share."""
    columns = {
        "method": lambda entry: entry.method,
        "asked": lambda entry: percent(float(entry.asked), 0) if entry.asked else "-",
        "n": lambda entry: len(entry.runs),
        "test": lambda entry: _interval(entry.mean("test"), paired(entry.values("test")).interval),
        "density": lambda entry: percent(entry.mean("density"), 1),
        "parameters": lambda entry: thousands(entry.mean("parameters")),
        "MACs": lambda entry: f"{entry.mean('macs') / 1e6:,.2f} M",
        "seconds": lambda entry: thousands(entry.mean("seconds")),
    }
    return md_table(entries, columns, left=1)


def _difference_parts(cell: str, together: Sequence[Entry], entries: Sequence[Entry]) -> list[str]:
    first = next((entry.method for entry in together if entry.asked), together[0].method)
    reference = REFERENCES.get(cell, (cell, first))
    found = differences(together, [entry for entry in entries if (entry.cell, entry.method) == reference])
    if not found:
        return []
    columns = {
        "method": lambda row: row[0].method,
        "asked": lambda row: percent(float(row[1].asked), 0) if row[1].asked else "-",
        "n": lambda row: row[2].n,
        "difference": lambda row: f"{100 * row[2].mean:+.2f}",
        "t": lambda row: _span(row[2].interval),
        "bootstrap": lambda row: _span(row[2].bootstrap),
        "corrected": lambda row: _span(row[2].corrected),
        "verdict": lambda row: row[2].verdict,
    }
    said = (
        f"Minus {reference[1]} of {reference[0]}, paired by seed; corrected for {found[0][2].comparisons} comparisons:"
    )
    return [said, md_table(found, columns, left=1)]


def cut_table(entries: Sequence[Entry]) -> str:
    """How far validation accuracy fell at the cuts of RSST's runs: the mean over all cuts, the largest fall of one."""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for entry in entries:
        for row in entry.runs.values():
            if "--struct rsst" in row["command"] and row["cuts"] not in ("", "0"):
                form = "gradient" if "--reg_form gradient" in row["command"] else "decay"
                groups.setdefault((row["target"], form), []).append(row)
    rows = [
        {
            "key": key,
            "cuts": sum(int(row["cuts"]) for row in rows),
            "mean": statistics.fmean(float(row["before_cut_mean"]) - float(row["after_cut_mean"]) for row in rows),
            "worst": max(float(row["before_cut_worst"]) - float(row["after_cut_worst"]) for row in rows),
        }
        for key, rows in groups.items()
    ]
    columns = {
        "target": lambda row: row["key"][0],
        "form": lambda row: row["key"][1],
        "cuts": lambda row: row["cuts"],
        "mean fall": lambda row: f"{100 * row['mean']:.2f}",
        "largest fall": lambda row: f"{100 * row['worst']:.2f}",
    }
    return md_table(rows, columns, left=2) if rows else "No run of RSST is complete yet."


def _interval(mean: float, interval: tuple[float, float]) -> str:
    reach = f" ± {50 * (interval[1] - interval[0]):.2f}" if math.isfinite(interval[0]) else ""
    return f"{100 * mean:.2f}{reach}"


def _span(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}" if math.isfinite(interval[0]) else "-"


# ------------------------------------------------------------------------------------------------ picture


def picture(entries: Sequence[Entry]) -> bytes:
    """Test accuracy over MACs with 95% intervals, a line a method, dense networks as points; a panel a model."""
    panels = [cells for cells in TOGETHER.values() if any(entry.cell == cells[0] for entry in entries)]
    panels = panels or [tuple(dict.fromkeys(entry.cell for entry in entries))]

    def paint(figure) -> None:
        for panel, cells in zip(figure.subfigures(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _paint(panel, [entry for entry in entries if entry.cell in cells])

    return draw(7.4, 4.6 * len(panels), paint)


def _paint(panel, entries: Sequence[Entry]) -> None:
    ax, colors = panel.add_subplot(), [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY]
    for index, method in enumerate(dict.fromkeys(entry.method for entry in entries)):
        points = sorted((entry for entry in entries if entry.method == method), key=lambda entry: entry.mean("macs"))
        intervals = [paired(entry.values("test")).interval for entry in points]
        reach = [50 * (high - low) if math.isfinite(low) else 0.0 for low, high in intervals]
        seeds = sorted({len(entry.runs) for entry in points})
        ax.errorbar(
            [entry.mean("macs") / 1e6 for entry in points],
            [100 * entry.mean("test") for entry in points],
            reach,
            color=colors[index % len(colors)],
            linestyle=LINES[index // len(colors) % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
            capsize=3,
            label=f"{method}, n = {'-'.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}",
        )
    percent_axis(ax.yaxis)
    ax.set_xlabel("million MACs per image")
    ax.set_ylabel("test accuracy, mean and 95% interval")
    panel.legend(loc="outside lower center", ncols=3, fontsize=9)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", help="study.csv, as benchmarks/study.py writes it")
    parser.add_argument("--out", help="folder for study.md and study.png; that of the file when not given")
    args = parser.parse_args(argv)
    path = Path(args.csv)
    try:
        entries, failed = read_entries(path)
        text, png = study_text(entries, failed), picture(entries)
        out = Path(args.out) if args.out else path.parent
        publish(
            out,
            {
                "study.md": lambda path: write_text(path, text),
                "study.png": lambda path: write_bytes(path, content=png),
            },
        )
    except RunError as error:
        parser.error(str(error))
    print(f"{out / 'study.md'}, {out / 'study.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
