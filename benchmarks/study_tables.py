#!/usr/bin/env python
"""Tables and pictures of a study: study.md and study*.png from the study.csv of study.py.

    python benchmarks/study_tables.py results/study_cpu/study.csv --out results/study_cpu

Means have 95% intervals of Student's t over the seeds. Methods are compared by the differences of runs with the same
seed, that keep the same share; the corrected intervals of one table hold together at 95%, and only where
one of them excludes zero is a method called better or worse (reporting/paired.py).
"""

from __future__ import annotations

import csv
import functools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting.figures import COLORS, GREEN, GREY, LINES, MARKERS, VERMILLION, draw, percent_axis
from reporting.page import publish, write_bytes
from reporting.paired import Difference, corrected, difference_columns, paired
from reporting.words import md_table, percent, plural, thousands
from utils import OneLineParser, RunError, write_text

# cells whose methods share a table and a picture; the first names them
TOGETHER = {
    "both": ("both", "small", "peer", "more", "dense"),
    "counts": ("counts", "counts_peer", "counts_small"),
    "vit_small_both": ("vit_small_both", "vit_small_dense"),
}
# the reference of a cell's methods, (cell, method): one for all, or one for each; by default the cell's first method
REFERENCES = {
    "both": ("both", "refill"),
    "factor": ("both", "rsst"),
    "best": {"rsst": ("both", "rsst"), "refill": ("both", "refill")},
    "refill_factor": ("both", "refill"),
    "fillback": ("fillback", "none"),
    "allocation": ("allocation", "uniform"),
    "early": ("small", "small"),
    "mlp": {"refill": ("head", "refill"), "rsst": ("mlp", "refill")},  # the same share of neurons as of heads
    "nm": {f"{method}_2-4": ("nm", method) for method in ("imp", "rsst")},
    "rewind": {
        f"{rewinding}_{method}": ("rewind", f"finetune_{method}")
        for method in ("refill", "rsst", "imp")
        for rewinding in ("rewind_lt", "lt")
    },
}
# cells and methods of study.png
MODELS = ("both", "vit_small_both")
HEADLINE = ("dense", "small", "refill", "rsst", "imp", "refill_sensitivity", "tp_magnitude", "tp_growing")
# questions that also show some lines of other tables, with the same corrections: cells, and the methods of each
_CRITERIA, _WHEN = ("magnitude", "l2", "saliency", "remain", "random"), ("states_2", "states_6", "linear", "constant")
_HOW_LONG = ("epochs_1", "epochs_4", "finish_6", "lr_0.001", "lr_0.002")
QUESTIONS = {
    "criterion": {"both": ("random",), "refill_factor": _CRITERIA, "factor": _CRITERIA},
    "when": {"both": ("oneshot",), "refill_factor": _WHEN, "factor": _WHEN},
    "how_long": {"refill_factor": _HOW_LONG, "factor": _HOW_LONG},
}
LINES_FROM = 3  # shares, from which a picture has a line for each method; with fewer it has differences


@dataclass(frozen=True)
class Entry:
    """The runs of one method of a cell at one share, by seed; `asked` is the share to keep, "" for dense networks."""

    cell: str
    method: str
    asked: str
    runs: Mapping[str, Mapping[str, str]]

    def values(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.runs.values() if row.get(name) not in ("", None)]

    def mean(self, name: str) -> float:
        values = self.values(name)
        return statistics.fmean(values) if values else math.nan

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """Of the mean test accuracy, 95%."""
        return paired(self.values("test")).interval


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


@dataclass(frozen=True)
class Section:
    """The methods of one table, and their differences from their references, corrected for all of them.

    The section of a question only has `found`, lines of other sections.
    """

    name: str
    entries: Sequence[Entry]
    found: Sequence[tuple[Entry, Entry, Difference]]

    @property
    def shares(self) -> list[str]:
        return sorted({entry.asked for entry in self.entries if entry.asked}, key=float)

    @property
    def picture(self) -> str:
        return f"study_{self.name}.png"

    @property
    def has_lines(self) -> bool:
        """Whether to draw accuracy over cost, not differences: with enough shares and references of one cell."""
        return not self.found or (len(self.shares) >= LINES_FROM and len(self._cells) == 1)

    @property
    def _cells(self) -> set[str]:
        """The cells of the references."""
        return {other.cell for _, other, _ in self.found}

    def reference(self, other: Entry) -> str:
        """The name of a reference in its lines."""
        return other.method if len(self._cells) == 1 else f"{other.method} of {other.cell}"

    @property
    def asked(self) -> set[str]:
        """Shares at which something is compared."""
        return {other.asked for _, other, _ in self.found}

    @property
    def drawable(self) -> bool:
        return bool(self.found or self.shares)

    @property
    def headline(self) -> Section:
        """The same with the methods of HEADLINE only."""
        return replace(self, entries=[entry for entry in self.entries if entry.method in HEADLINE])


def sections(entries: Sequence[Entry]) -> list[Section]:
    """The tables of a study in the order of its cells."""
    taken = {cell for name, cells in TOGETHER.items() for cell in cells if any(e.cell == name for e in entries)}
    found = []
    for cell in dict.fromkeys(entry.cell for entry in entries):
        if cell in TOGETHER or cell not in taken:
            own = [entry for entry in entries if entry.cell in TOGETHER.get(cell, (cell,))]
            own.sort(key=lambda entry: -float(entry.asked or 2))
            first = next((entry.method for entry in own if entry.asked), own[0].method)
            to = REFERENCES.get(cell, (cell, first))
            lines = differences(own, entries, to)
            lines.sort(key=lambda line: (-float(line[1].asked or 2), -line[2].mean))  # the best first
            found.append(Section(cell, own, lines))
    return found + _questions(found)


def _questions(found: Sequence[Section]) -> list[Section]:
    """The sections of QUESTIONS that have lines."""
    lines = [line for section in found for line in section.found]
    asked = [
        Section(name, [], [line for line in lines if line[0].method in methods.get(line[0].cell, ())])
        for name, methods in QUESTIONS.items()
    ]
    return [section for section in asked if section.found]


def differences(
    entries: Sequence[Entry], all_entries: Sequence[Entry], to: tuple[str, str] | Mapping[str, tuple[str, str]]
) -> list[tuple[Entry, Entry, Difference]]:
    """Each entry minus its reference at the same share, in test accuracy over the seeds of both; corrected for all.

    Args:
        to: (cell, method) of the reference, or that of each method that has one; it is looked for in `all_entries`.
    """
    pairs = []
    for entry in entries:
        name = to.get(entry.method) if isinstance(to, Mapping) else to
        others = [other for other in all_entries if (other.cell, other.method) == name and other is not entry]
        # a dense network is compared at every share
        pairs += [(entry, other) for other in others if not entry.asked or entry.asked == other.asked]
    pairs = [(entry, other) for entry, other in pairs if _shared(entry, other)]
    found = [
        paired([float(entry.runs[seed]["test"]) - float(other.runs[seed]["test"]) for seed in _shared(entry, other)])
        for entry, other in pairs
    ]
    return [(*pair, difference) for pair, difference in zip(pairs, corrected(found), strict=True)]


def _shared(entry: Entry, other: Entry) -> list[str]:
    return sorted(entry.runs.keys() & other.runs.keys(), key=int)


# ------------------------------------------------------------------------------------------------ tables


def study_text(entries: Sequence[Entry], failed: Sequence[str], found: Sequence[Section]) -> str:
    """study.md."""
    runs = sum(len(entry.runs) for entry in entries)
    parts = ["# Study", f"{plural(runs, 'run')}; test accuracy in percent, differences in points, 95% intervals."]
    if failed:
        parts.append(f"Failed: {', '.join(failed)}.")
    parts += ["## Accuracy at RSST's cut", cut_table(entries)]
    for section in found:
        drawn = [f"![{section.name}]({section.picture})"] if section.drawable else []
        parts += [f"## {section.name}", *drawn]
        if section.shares and section.has_lines:
            parts.append(wide_table(section))
        if section.entries:
            parts.append(accuracy_table(section.entries))
        if section.found:
            parts += [_said(section), difference_table(section)]
    return "\n\n".join(parts) + "\n"


def wide_table(section: Section) -> str:
    """A line a method, a column a share: accuracy, and in brackets the difference to the reference and its verdict."""
    accuracy = {(e.method, e.asked): _interval(e.mean("test"), e.interval) for e in section.entries}
    against = {(e.method, other.asked): _difference(found) for e, other, found in section.found}

    def cell(method: str, share: str) -> str:
        said = accuracy.get((method, share)) or accuracy.get((method, ""), "")
        return f"{said} {against.get((method, share), '')}".strip()

    columns = {"method": lambda method: method}
    for share in reversed(section.shares):
        columns[percent(float(share), 0)] = functools.partial(cell, share=share)
    return md_table(list(dict.fromkeys(entry.method for entry in section.entries)), columns, left=1)


def _difference(found: Difference) -> str:
    return f"({100 * found.mean:+.2f}{', ' if found.claim else ''}{found.claim})"


def accuracy_table(entries: Sequence[Entry]) -> str:
    """Means over seeds, a line a method and share."""
    columns = {
        "method": lambda entry: entry.method,
        "kept": lambda entry: percent(float(entry.asked), 0) if entry.asked else "-",
        "n": lambda entry: len(entry.runs),
        "test": lambda entry: _interval(entry.mean("test"), entry.interval),
        "density": lambda entry: percent(entry.mean("density"), 1),
        "parameters": lambda entry: thousands(entry.mean("parameters")),
        "MACs": lambda entry: f"{entry.mean('macs') / 1e6:,.2f} M",
        "seconds": lambda entry: thousands(entry.mean("seconds")),
    }
    return md_table(entries, columns, left=1)


def _said(section: Section) -> str:
    names = list(dict.fromkeys(f"{other.method} of {other.cell}" for _, other, _ in section.found))
    counts = [plural(section.found[0][2].comparisons, "comparison")]
    if not section.entries:  # lines of several tables
        tables = {entry.cell: difference.comparisons for entry, _, difference in section.found}
        counts = [f"{plural(count, 'comparison')} of {cell}" for cell, count in tables.items()]
    return f"Minus {', '.join(names)}, paired by seed; corrected for {', '.join(counts)}:"


def difference_table(section: Section) -> str:
    """Differences with their intervals, a line a method and share."""
    columns = {
        "method": lambda row: row[0].method,
        "kept": lambda row: percent(float(row[1].asked), 0) if row[1].asked else "-",
        "test": lambda row: f"{100 * row[0].mean('test'):.2f}",
        "minus": lambda row: section.reference(row[1]),
        "verdict": lambda row: row[2].verdict,
        **difference_columns(lambda row: row[2]),
    }
    return md_table(section.found, columns, left=1)


def cut_table(entries: Sequence[Entry]) -> str:
    """The fall of validation accuracy at the cuts of RSST: the mean over all cuts, and the largest."""
    kinds: dict[tuple[str, str, str], list[Mapping]] = {}
    for entry in entries:
        for row in entry.runs.values():
            if "--struct rsst" in row["command"] and row["cuts"] not in ("", "0"):
                form = "gradient" if "--reg_form gradient" in row["command"] else "decay"
                kinds.setdefault((entry.cell, row["target"], form), []).append(row)
    rows = [
        {
            "key": key,
            "cuts": sum(int(row["cuts"]) for row in rows),
            "mean": statistics.fmean(float(row["before_cut_mean"]) - float(row["after_cut_mean"]) for row in rows),
            "worst": max(float(row["before_cut_worst"]) - float(row["after_cut_worst"]) for row in rows),
        }
        for key, rows in kinds.items()
    ]
    columns = {
        "cell": lambda row: row["key"][0],
        "target": lambda row: row["key"][1],
        "form": lambda row: row["key"][2],
        "cuts": lambda row: row["cuts"],
        "mean fall": lambda row: f"{100 * row['mean']:.2f}",
        "largest fall": lambda row: f"{100 * row['worst']:.2f}",
    }
    return md_table(rows, columns, left=3) if rows else "No run of RSST is complete yet."


def _interval(mean: float, interval: tuple[float, float]) -> str:
    reach = f" ± {50 * (interval[1] - interval[0]):.2f}" if math.isfinite(interval[0]) else ""
    return f"{100 * mean:.2f}{reach}"


# ------------------------------------------------------------------------------------------------ pictures


def pictures(found: Sequence[Section]) -> dict[str, bytes]:
    """PNG files by name: study.png with a panel for each model, and one for each table."""
    models = [section.headline for section in found if section.name in MODELS]
    drawn = {section.picture: _picture([section]) for section in found if section.drawable}
    return {**({"study.png": _picture(models)} if models else {}), **drawn}


def _picture(found: Sequence[Section]) -> bytes:
    heights = [4.6 if section.has_lines else 1.3 + 0.27 * len(section.found) for section in found]

    def paint(figure) -> None:
        panels = figure.subfigures(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, section in zip(panels, found, strict=True):
            (_paint_lines if section.has_lines else _paint_differences)(panel, section)

    return draw(7.4, sum(heights), paint)


def _paint_lines(panel, section: Section) -> None:
    """Test accuracy with 95% intervals over MACs, over the weights left where MACs are the same; dense as points."""
    ax, colors = panel.add_subplot(), [*COLORS, GREY]
    costs = [entry.mean("macs") for entry in section.entries if entry.asked]
    cost, unit = ("macs", 1e6) if costs and max(costs) > 1.01 * min(costs) else ("density", 0.01)
    methods = list(dict.fromkeys(entry.method for entry in section.entries))
    apart = 0.006 * max(entry.mean(cost) for entry in section.entries) / unit  # so that bars do not overlap
    for index, method in enumerate(methods):
        points = sorted((entry for entry in section.entries if entry.method == method), key=lambda e: e.mean(cost))
        reach = [50 * (high - low) if math.isfinite(low) else 0.0 for low, high in (entry.interval for entry in points)]
        seeds = sorted({len(entry.runs) for entry in points})
        ax.errorbar(
            [entry.mean(cost) / unit + apart * (index - (len(methods) - 1) / 2) for entry in points],
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
    ax.set_xlabel("million MACs per image" if cost == "macs" else "weights left, %")
    ax.set_ylabel("test accuracy, mean and 95% interval")
    panel.legend(loc="outside lower center", ncols=3, fontsize=9)


def _paint_differences(panel, section: Section) -> None:
    """A line a method: the mean difference, its 95% interval, and the wider one that is corrected for all lines."""
    ax = panel.add_subplot()
    to = list(dict.fromkeys(section.reference(other) for _, other, _ in section.found))
    names = []
    for index, (entry, other, difference) in enumerate(section.found):
        color = {"better": GREEN, "worse": VERMILLION}.get(difference.claim, GREY)
        for (low, high), width in ((difference.corrected, 1.2), (difference.interval, 3.5)):
            ax.plot([100 * low, 100 * high], [index, index], color=color, linewidth=width, solid_capstyle="butt")
        ax.plot(100 * difference.mean, index, color=color, marker="o", markersize=5)
        minus = f" - {section.reference(other)}" if len(to) > 1 else ""
        share = f", {percent(float(other.asked), 0)}" if len(section.asked) > 1 else ""
        names.append(f"{entry.method}{minus}{share}")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    minus = f" minus {to[0]}" if len(to) == 1 else ", difference"
    ax.set_xlabel(f"test accuracy{minus}, points; thick: 95%, thin: corrected for all lines", fontsize=9)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", help="study.csv, as benchmarks/study.py writes it")
    parser.add_argument("--out", help="folder for study.md and study.png; that of the file when not given")
    args = parser.parse_args(argv)
    path = Path(args.csv)
    try:
        entries, failed = read_entries(path)
        found = sections(entries)
        text, drawn = study_text(entries, failed, found), pictures(found)
        out = Path(args.out) if args.out else path.parent
        writers = {name: functools.partial(write_bytes, content=png) for name, png in drawn.items()}
        publish(out, {"study.md": lambda path: write_text(path, text), **writers})
    except RunError as error:
        parser.error(str(error))
    print(f"{out / 'study.md'}, {plural(len(drawn), 'picture')} next to it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
