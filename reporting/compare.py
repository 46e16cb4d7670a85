"""The comparison of several runs: compare.csv, .md, .html and .png, and compare_paired.csv."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import utils
from reporting import need
from reporting.compare_paired import Comparison, Unpaired, blank_nan, paired_comparisons, paired_rows, paired_text
from reporting.compare_plot import plot_compare
from reporting.groups import SAME_DENSITY, Group, data_of, equal_density, group_runs
from reporting.page import publish, to_html, write_bytes
from reporting.runs import COUNTS, RunFiles, load_run
from reporting.words import duration, escaped, giga, md_table, percent, plural, thousands
from utils import RunError

PAIRED = "compare_paired.csv"


@dataclass
class Block:
    """The runs of one data set, whose accuracies can be compared."""

    data: str
    groups: list[Group]
    comparisons: list[Comparison]
    unpaired: list[Unpaired]


def compare(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write compare.csv, compare.png, compare.md and compare.html about several runs; returns their folder.

    Where two groups share two seeds or more, compare_paired.csv has their differences.

    Args:
        out: the folder to write to; by default `compare` in the folder that the runs share, else results/compare.

    Raises:
        RunError: a folder is no run, a file is damaged, or no run is finished; then nothing is written.
    """
    need("markdown")
    places = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    runs, notes = _finished([load_run(folder) for folder in places])
    blocks = [_block(data, runs, notes) for data in dict.fromkeys(map(data_of, runs))]
    out = _common_out(places) if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: is a file; give a folder")
    rows = [row for block in blocks for group in block.groups for row in compare_rows(block.data, group)]
    differences = [row for block in blocks for row in paired_rows(block.data, block.comparisons)]
    png = plot_compare([(block.data, block.groups) for block in blocks])
    text = comparison_text(blocks, notes)
    page = to_html("Comparison of runs", text, {"compare.png": png})
    files = {
        "compare.csv": partial(utils.write_csv, rows=rows),
        "compare.png": partial(write_bytes, content=png),
        "compare.md": partial(utils.write_text, text=text),
        "compare.html": partial(utils.write_text, text=page),
    }
    if any(row["n"] > 1 for row in differences):
        files[PAIRED] = partial(utils.write_csv, rows=differences)
    publish(out, files, stale={PAIRED} - set(files))
    for note in notes:
        print(f"left out: {note}", file=sys.stderr)
    return out


def _finished(runs: Sequence[RunFiles]) -> tuple[list[RunFiles], list[str]]:
    """The finished runs, and notes on the others.

    Raises:
        RunError: none is finished.
    """
    notes = [
        f"{run.name}: not finished ({len(run.states)} of {run.length[0]} states"
        f"{', then a finish' if run.finish_epochs else ''})"
        for run in runs
        if not run.finished
    ]
    finished = [run for run in runs if run.finished]
    if not finished:
        raise RunError(f"no finished run to compare: {'; '.join(notes)}")
    return finished, notes


def _block(data: str, runs: Sequence[RunFiles], notes: list[str]) -> Block:
    """The runs of a data set in groups, one run a seed; notes the repeated ones."""
    groups = group_runs([run for run in runs if data_of(run) == data])
    for group in groups:
        seeds: dict[str, RunFiles] = {}
        for run in group.runs:
            first = seeds.setdefault(str(run.args["seed"]), run)
            if first is not run:  # the same random numbers are no further sample
                notes.append(f"{run.name}: same flags and seed as {first.name}")
        group.runs = list(seeds.values())
    return Block(data, groups, *paired_comparisons(groups))


def _common_out(places: Sequence[Path]) -> Path:
    shared = Path(os.path.commonpath([place.parent for place in places]))
    own = shared.parent != shared and os.access(shared, os.W_OK)
    return (shared if own else Path("results")) / "compare"


def compare_rows(data: str, group: Group) -> list[dict]:
    """Rows of compare.csv; missing values are empty."""
    rows = []
    for point in group.points:
        accuracies = zip(("val_mean", "val_sd", "test_mean", "test_sd"), (*point.val, *point.test), strict=True)
        row = {"dataset": data, "label": group.label, "n": point.n, "state": point.title, "density": point.density}
        row |= {**point.counts, **dict(accuracies)}
        if math.isfinite(point.top5[0]):
            row |= {"test_top5_mean": point.top5[0], "test_top5_sd": point.top5[1]}
        rows.append(blank_nan(row))
    return rows


def _points_sd(value: float) -> str:
    return f"{100 * value:.2f}" if math.isfinite(value) else "-"


def _accuracy_columns(groups: Sequence[Group]) -> dict[str, Callable[[Sequence], object]]:
    """The last columns of all tables of points; each is a function of (group, point)."""
    top5 = {}
    if any(math.isfinite(point.top5[0]) for group in groups for point in group.points):
        top5["top-5"] = lambda row: percent(row[1].top5[0])
        top5["top-5 sd"] = lambda row: _points_sd(row[1].top5[1])
    return {
        "n": lambda row: row[1].n,
        "test": lambda row: percent(row[1].test[0]),
        "test sd": lambda row: _points_sd(row[1].test[1]),
        **top5,
        "val": lambda row: percent(row[1].val[0]),
        "val sd": lambda row: _points_sd(row[1].val[1]),
        "parameters": lambda row: thousands(row[1].counts.get("parameters")),
        "MACs": lambda row: giga(row[1].counts.get("macs")),
    }


def comparison_text(blocks: Sequence[Block], notes: Sequence[str]) -> str:
    """compare.md."""
    groups = [group for block in blocks for group in block.groups]
    runs = [run for group in groups for run in group.runs]
    parts = [
        "# Comparison of runs",
        f"{plural(len(runs), 'run')} in {plural(len(groups), 'group')}; the runs of a group differ only in their "
        "seeds. Accuracies are of the model that validation selects in each state. sd is the "
        'sample standard deviation over seeds, in percentage points; with n = 1 there is none, shown as "-".',
    ]
    if any(run.args.get("finish_on_all") for run in runs):
        parts.append("> A finish on all images has no validation accuracy: the model after its last step is tested.")
    if any(len(group.runs) == 1 for group in groups):
        parts.append("> Groups with n = 1 show one seed: no ranking of methods follows from them.")
    if len(blocks) > 1:
        parts.append("> Several data sets: each has its own tables and plot, as accuracies do not compare.")
    if notes:
        parts.append("Left out:\n\n" + "\n".join(f"- {escaped(note)}" for note in notes))
    parts.append("![Test accuracy over density](compare.png)")
    for block in blocks:
        if len(blocks) > 1:
            parts.append(f"## Data set: {escaped(block.data)}")
        parts += _data_set_text(block)
    return "\n\n".join(parts) + "\n"


def _data_set_text(block: Block) -> list[str]:
    """Groups, methods at equal density, paired differences, and all states of a data set."""
    data, groups = block.data, block.groups
    columns = {
        "group": lambda group: group.label,
        "runs": lambda group: ", ".join(run.name for run in group.runs),
        "n": lambda group: len(group.runs),
        "seeds": lambda group: ", ".join(str(run.args["seed"]) for run in group.runs),
        "time": lambda group: duration(sum(run.seconds for run in group.runs)),
    }
    parts = [f"### Groups: {escaped(data)}", md_table(groups, columns, left=2)]
    noted = [run for group in groups for run in group.runs if run.args.get("pretrained_note")]
    parts += [f"> **Note:** {escaped(run.name)}: {escaped(run.args['pretrained_note'])}" for run in noted]
    parts += [f"### At equal density: {escaped(data)}", *_equal_density_text(groups)]
    parts += paired_text(data, groups, block.comparisons, block.unpaired)
    counts = [name for name in COUNTS if any(name in point.counts for group in groups for point in group.points)]
    columns = {
        "group": lambda row: row[0].label,
        "state": lambda row: row[1].title,
        "density": lambda row: percent(row[1].density),
        **{name: lambda row, name=name: thousands(row[1].counts.get(name)) for name in counts},
        **_accuracy_columns(groups),
    }
    rows = [(group, point) for group in groups for point in group.points]
    return [*parts, f"### All states: {escaped(data)}", md_table(rows, columns, left=1)]


def _equal_density_text(groups: Sequence[Group]) -> list[str]:
    """The table of methods at equal density; every level also shows the dense runs."""
    dense = [(group, group.points[-1]) for group in groups if group.method == "dense"]
    pruned = [group for group in groups if group.method != "dense"]
    levels = equal_density(pruned)
    rows = []
    for members in levels:
        density = statistics.fmean(point.density for _, point in members)
        for position, (group, point) in enumerate([*members, *dense]):
            rows.append((group, point, "" if position else percent(density)))
    parts, within = [], f"within {100 * SAME_DENSITY:g} percentage point"
    if rows:
        columns = {
            "density level": lambda row: row[2],
            "method": lambda row: row[0].label,
            "state": lambda row: row[1].title,
            "its density": lambda row: percent(row[1].density),
            **_accuracy_columns(groups),
        }
        spent = "the epochs of all states" if any(point.finish for _, point in dense) else "all its epochs"
        reference = f" A dense run trains for {spent} on one schedule; every level shows it for comparison."
        parts += [f"Densities {within} count as equal.{reference if dense else ''}", md_table(rows, columns, left=2)]
    if not any(point.density < 1 for members in levels for _, point in members):
        what = "No two groups reach the same density below 100%" if rows else "No two groups reach the same density"
        reached = [
            f"- {escaped(group.label)}: {', '.join(percent(point.density) for point in group.points)}"
            for group in groups
        ]
        parts += [f"{what} ({within}). The densities reached:", "\n".join(reached)]
    return parts
