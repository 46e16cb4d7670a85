"""The Pareto front of a search: tables, picture, report and a file of flags for each point.

Only validation accuracy and cost decide; test accuracy is shown for information.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections import Counter

import yaml

from cli.config import typed_out
from reporting.figures import BLUE, GREY, ORANGE, draw, percent_axis
from reporting.page import write_bytes
from reporting.runs import load_run
from reporting.words import md_table, percent
from search.space import in_words
from utils import RunError, format_table, write_csv, write_text

AXES = {"macs": ("MMACs", 1e6), "params": ("parameters, millions", 1e6), "latency": ("milliseconds of one image", 1.0)}


def write(study) -> str:
    """trials.csv, pareto.csv, pareto.png, pareto/001.yaml and on, by cost, and report.md; returns a table of the front.

    Args:
        study: a `trials.Study`.
    """
    trials, folder = study.trials(), study.folder
    rows = [_row(study, trial) for trial in trials]
    write_csv(folder / "trials.csv", rows)
    best = {trial.number: trial for trial in (study.study.best_trials if study.trials(study.complete) else [])}
    front = sorted((row for row in rows if row["trial"] in best), key=lambda row: (row["cost"], row["trial"]))
    for old in (folder / "pareto").glob("*.yaml"):
        old.unlink()
    (folder / "pareto").mkdir(exist_ok=True)
    for point, row in enumerate(front, 1):
        row["point"] = f"{point:03}"
        _write_flags(study, best[row["trial"]], row)
    write_csv(folder / "pareto.csv", [{"point": row["point"], **row} for row in front])
    columns = {
        "point": lambda row: row["point"],
        "trial": lambda row: row["trial"],
        "validation": lambda row: percent(row["val_accuracy"]),
        "test": lambda row: percent(row["test_accuracy"]),
        "cost": lambda row: study.in_words(row["cost"]),
        **{name: lambda row, name=name: row.get(name, "-") for name in study.space.values},
    }
    write_text(folder / "report.md", _report(study, rows, front, columns))
    write_bytes(folder / "pareto.png", draw(7.4, 4.6, lambda figure: _paint(figure, study, rows, front)))
    title = f"{len(rows)} trials, {len(front)} on the front"
    if left := len(study.trials(study.running)):
        title += f"\n{left} of them still run in other processes; the last one writes the front again"
    return f"{title}\n\n{format_table(front, columns)}\n\n{folder}"


def _row(study, trial) -> dict:
    """A trial's row of trials.csv; a complete one has the results of its last state, unless its run was deleted."""
    words = {study.complete: "complete", study.weak: "stopped", study.failed: "failed", study.running: "running"}
    row = {"trial": trial.number, "state": words[trial.state], "cost": math.nan, "val_accuracy": math.nan}
    row |= {"test_accuracy": math.nan, "macs": "", "parameters": ""}
    if trial.state == study.complete:
        row["val_accuracy"], row["cost"] = trial.values
        with contextlib.suppress(RunError):  # its folder may be deleted
            last = load_run(study.folder_of(trial)).states[-1]
            row["test_accuracy"] = last["test_accuracy"]
            row |= {name: int(last[name]) for name in ("macs", "parameters")}
    return {**row, **trial.user_attrs["plan"]["flags"]}


def _write_flags(study, trial, row: dict) -> None:
    """The `--config` file of this point."""
    head = (
        f"# trial {trial.number}, validation {percent(row['val_accuracy'])}, {study.in_words(row['cost'])}, by\n"
        f"# python main_imp_fillback.py --config {study.folder / 'pareto' / row['point']}.yaml\n"
    )
    flags = yaml.safe_dump(study.flags_of(trial), sort_keys=False, allow_unicode=True)
    write_text(study.folder / "pareto" / f"{row['point']}.yaml", head + flags)


def _paint(figure, study, rows: list[dict], front: list[dict]) -> None:
    title, unit = AXES[study.args.search_objective]
    ax = figure.add_subplot()

    def points(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
        return [row["cost"] / unit for row in rows], [100 * row[key] for row in rows]

    faint = {"color": GREY, "alpha": 0.45, "linestyle": "none"}
    ax.plot(*points(rows, "val_accuracy"), marker="o", markersize=4, label="complete trials, validation", **faint)
    ax.plot(*points(rows, "test_accuracy"), marker="x", markersize=4, label="complete trials, test", **faint)
    steps = {"color": BLUE, "drawstyle": "steps-post", "linewidth": 1.4}
    ax.plot(*points(front, "val_accuracy"), marker="o", markersize=7, label="front, validation", **steps)
    ax.plot(*points(front, "test_accuracy"), "D", color=ORANGE, markersize=5.5, label="front, test")
    for row in front:
        place = (row["cost"] / unit, 100 * row["val_accuracy"])
        ax.annotate(row["point"], place, xytext=(0, 7), textcoords="offset points", fontsize=8.5, ha="center")
    ax.margins(x=0.06, y=0.12)
    percent_axis(ax.yaxis)
    ax.set_xlabel(title)
    ax.set_ylabel("accuracy")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)


def _report(study, rows: list[dict], front: list[dict], columns: dict) -> str:
    args = study.args
    counts = Counter(row["state"] for row in rows)
    searched = [{"flag": f"--{name}", "in": in_words(values)} for name, values in study.space.values.items()]
    columns_of_space = {"flag": lambda row: row["flag"], "in": lambda row: row["in"]}
    given = shlex.join(typed_out({**study.own, **study.base}, "--search"))
    again = f"python main_imp_fillback.py --config {study.folder / 'pareto' / '001.yaml'}"
    return (
        f"# Search: validation accuracy and {args.search_objective} of {args.arch} on {args.dataset}\n\n"
        f"{len(rows)} trials ({', '.join(f'{count} {state}' for state, count in counts.items())}), drawn by "
        f"multi-objective TPE with seed {args.seed}; given: `{given}`.\n\n## The front\n\n"
        f"{md_table(front, columns)}\n\nNo other trial is better in one of validation accuracy and cost and at least "
        "as good in the other. Test accuracy chose nothing. The validation accuracy of the best of many trials is too "
        "optimistic; quote test accuracy, of several seeds.\n\n![front](pareto.png)\n\nRepeat a point with "
        f"`{again}`; its run is in the folder of its trial.\n\n## What was searched\n\n"
        f"{md_table(searched, columns_of_space, 2)}\n"
    )
