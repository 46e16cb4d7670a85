"""The comparison of several runs: from their folders to compare.csv, .md, .html, .png and compare_paired.csv."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import utils
from reporting import need
from reporting.compare_paired import Comparison, Unpaired, paired_comparisons, paired_rows, paired_text
from reporting.compare_plot import plot_compare
from reporting.groups import SAME_DENSITY, Group, data_of, equal_density, group_runs
from reporting.page import publish, to_html, write_bytes
from reporting.runs import COUNTS, Run, load_run
from reporting.words import duration, escaped, giga, md_table, percent, plural, thousands
from utils import RunError

PAIRED = "compare_paired.csv"


def compare(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write compare.csv, compare.png, compare.md and compare.html about several runs; returns their folder.

    Where two groups share two seeds or more, compare_paired.csv has their differences.

    Args:
        out: where to; `compare` in the folder that the runs share when None, else results/compare.

    Raises:
        RunError: a folder is no run, a file is damaged, or no run is finished; then nothing is written.
    """
    need("markdown")
    places = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    runs = [load_run(folder) for folder in places]
    notes = [
        f"{run.name}: not finished ({len(run.states)} of {run.length[0]} states"
        f"{', then a finish' if run.finish_epochs else ''})"
        for run in runs
        if not run.finished
    ]
    runs = [run for run in runs if run.finished]
    if not runs:
        raise RunError(f"no finished run to compare: {'; '.join(notes)}")
    blocks: list[tuple[str, list[Group]]] = []
    for data in dict.fromkeys(map(data_of, runs)):
        groups = group_runs([run for run in runs if data_of(run) == data])
        for group in groups:
            seeds: dict[str, Run] = {}
            for run in group.runs:
                first = seeds.setdefault(str(run.args["seed"]), run)
                if first is not run:  # the same random numbers once more are no further sample
                    notes.append(f"{run.name}: same flags and seed as {first.name}")
            group.runs = list(seeds.values())
        blocks.append((data, groups))
    out = _common_out(places) if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: is a file; give a folder")
    rows = [row for data, groups in blocks for group in groups for row in compare_rows(data, group)]
    pairs = [paired_comparisons(groups) for _, groups in blocks]
    differences = [row for (data, _), (found, _) in zip(blocks, pairs, strict=True) for row in paired_rows(data, found)]
    png = plot_compare(blocks)
    text = comparison_text(blocks, notes, pairs)
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


def _common_out(places: Sequence[Path]) -> Path:
    shared = Path(os.path.commonpath([place.parent for place in places]))
    own = shared.parent != shared and os.access(shared, os.W_OK)
    return (shared if own else Path("results")) / "compare"


def compare_rows(data: str, group: Group) -> list[dict]:
    """Rows of compare.csv; cells that do not exist are empty."""
    rows = []
    for point in group.points:
        accuracies = zip(("val_mean", "val_sd", "test_mean", "test_sd"), (*point.val, *point.test), strict=True)
        row = {"dataset": data, "label": group.label, "n": point.n, "state": point.title, "density": point.density}
        row |= {**point.counts, **dict(accuracies)}
        if math.isfinite(point.top5[0]):
            row |= {"test_top5_mean": point.top5[0], "test_top5_sd": point.top5[1]}
        rows.append(
            {name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        )
    return rows


def _points_sd(value: float) -> str:
    return f"{100 * value:.2f}" if math.isfinite(value) else "-"


def _accuracy_columns(groups: Sequence[Group]) -> dict[str, Callable[[Sequence], object]]:
    """Title to a function of (group, point): what all tables of points end with."""
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


def comparison_text(
    blocks: Sequence[tuple[str, list[Group]]],
    notes: Sequence[str],
    pairs: Sequence[tuple[list[Comparison], list[Unpaired]]],
) -> str:
    """compare.md; `pairs` has for each block its comparisons and the unpaired seeds."""
    runs = sum(len(group.runs) for _, groups in blocks for group in groups)
    parts = [
        "# Comparison of runs",
        f"{plural(runs, 'run')} in {plural(sum(len(groups) for _, groups in blocks), 'group')}; the runs of a group "
        "differ in their seeds only. Accuracies are of the model that validation selects in each state. sd is the "
        'sample standard deviation over seeds, in percentage points; with n = 1 there is none, shown as "-".',
    ]
    if any(run.args.get("finish_on_all") for _, groups in blocks for group in groups for run in group.runs):
        parts.append("> A finish on all images has no validation accuracy: what its last step leaves is tested.")
    if any(len(group.runs) == 1 for _, groups in blocks for group in groups):
        parts.append("> Groups with n = 1 show one seed: no ranking of methods follows from them.")
    if len(blocks) > 1:
        parts.append("> Several data sets: each has its own tables and plot, since their accuracies do not compare.")
    if notes:
        parts.append("Left out:\n\n" + "\n".join(f"- {escaped(note)}" for note in notes))
    parts.append("![Test accuracy over density](compare.png)")
    for (data, groups), (comparisons, unpaired) in zip(blocks, pairs, strict=True):
        if len(blocks) > 1:
            parts.append(f"## Data set: {escaped(data)}")
        parts += _data_set_text(data, groups, paired_text(data, groups, comparisons, unpaired))
    return "\n\n".join(parts) + "\n"


def _data_set_text(data: str, groups: Sequence[Group], differences: Sequence[str]) -> list[str]:
    """Its groups, who reaches which density, the paragraphs about differences, and all states."""
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
    parts += [f"### At equal density: {escaped(data)}", *_equal_density_text(groups), *differences]
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
    """The table of methods at equal density, with every dense run in each of its blocks."""
    dense = [(group, group.points[-1]) for group in groups if group.method == "dense"]
    pruned = [group for group in groups if group.method != "dense"]
    levels = equal_density(pruned)
    rows = []
    for members in levels:
        density = statistics.fmean(point.density for _, point in members)
        for position, (group, point) in enumerate([*members, *dense]):
            rows.append((group, point, "" if position else percent(density)))
    parts = []
    if rows:
        columns = {
            "density level": lambda row: row[2],
            "method": lambda row: row[0].label,
            "state": lambda row: row[1].title,
            "its density": lambda row: percent(row[1].density),
            **_accuracy_columns(groups),
        }
        spent = "the epochs of all states" if any(point.finish for _, point in dense) else "all its epochs"
        reference = f" A dense run spends {spent} on one schedule; it stands in every block to compare with."
        reference *= bool(dense)
        parts += [f"Densities within {100 * SAME_DENSITY:g} percentage point count as equal.{reference}"]
        parts += [md_table(rows, columns, left=2)]
    if not any(point.density < 1 for members in levels for _, point in members):
        what = "No two groups reach the same density below 100%" if rows else "No two groups reach the same density"
        reached = [
            f"- {escaped(group.label)}: {', '.join(percent(point.density) for point in group.points)}"
            for group in groups
        ]
        parts += [f"{what} (within {100 * SAME_DENSITY:g} percentage point). Reached are:", "\n".join(reached)]
    return parts
