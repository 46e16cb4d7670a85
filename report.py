#!/usr/bin/env python
"""What runs did, from the CSV and JSON files that they left: plots, a report, a comparison of several.

    python report.py results/NAME                          writes report.md, report.html and plots/ into the run
    python report.py results/A results/B [--out DIR]       compares them: compare.csv, .png, .md and .html

No weights are loaded. Runs that differ only in their seed are one group: its mean and sample standard deviation are
shown, and methods are held against each other where they reach the same density. Each HTML file carries its pictures.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import html
import io
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

import utils
from utils import RunError

SAME_DENSITY = 0.01  # densities this close count as equal
METHODS = {
    "rsst": ("RSST", "what is chosen shrinks under a growing penalty while the state trains, then it is cut"),
    "refill": ("Refill", "what is chosen is cut before the state trains, and surviving units are whole"),
    "imp": ("IMP", "iterative magnitude pruning, the lottery-ticket baseline: cut before the state trains"),
    "oneshot": ("One-shot", "all units go at once after the dense state"),
    "dense": ("Dense", "nothing is pruned"),
}
STARTS = {
    "lt": "from the initial weights",
    "rewind_lt": "from the weights after epoch {rewind_epoch} of state 0",
    "pt": "from the pretrained weights",
    "finetune": "from the trained weights of the state before",
}
TARGETS = {"head": "heads", "mlp": "neurons", "both": "heads+neurons"}
COUNTS = ("heads", "neurons", "filters")  # a ViT has the first two, a CNN the last

# ------------------------------------------------------------------------------------------------------ what a run left


@dataclass
class Run:
    """The files of one run as plain values; accuracies, densities and residuals are fractions, absent cells NaN."""

    folder: Path
    args: dict
    environment: dict
    history: list[dict]  # a row an epoch
    states: list[dict]  # a row a state
    units: list[dict]  # a row per state and layer; empty for older runs
    config: dict  # of model/, empty when not exported
    proof: dict
    latency: str

    @property
    def name(self) -> str:
        return " ".join(self.folder.resolve().name.split())

    @property
    def method(self) -> str:
        """Key of METHODS, or whatever --struct was; a single state of any method is dense training."""
        return "dense" if self.args["pruning_times"] == 1 else str(self.args["struct"])

    @property
    def length(self) -> tuple[int, int]:
        """States, and epochs of each."""
        states, epochs = self.args["pruning_times"], self.args["epochs"]
        return (1, states * epochs) if self.args["struct"] == "dense" else (states, epochs)

    @property
    def finished(self) -> bool:
        return len(self.states) >= self.length[0]

    @property
    def seconds(self) -> float:
        """Of training, over all states begun."""
        done = {row["state"] for row in self.states}
        rows = [*self.states, *(row for row in self.history if row["state"] not in done)]
        return sum(row["seconds"] for row in rows if math.isfinite(row.get("seconds", math.nan)))

    @property
    def counts(self) -> list[str]:
        """Kinds of units that its tables count."""
        return [name for name in COUNTS if any(name in row for row in [*self.states, *self.history])]


def load_run(folder: Path) -> Run:
    """Read the files of a run; only args.yaml must be there.

    Raises:
        RunError: no run, or a file of it is damaged; names the file.
    """
    folder = Path(folder)
    if not (folder / "args.yaml").is_file():
        raise RunError(f"{folder}: not the folder of a run (no args.yaml in it); give what --save_dir named")
    return Run(
        folder,
        _read(folder / "args.yaml", _parse_args_file),
        _read(folder / "environment.json", _parse_object, {}),
        _read(folder / "metrics.jsonl", _parse_history, []),
        _read(folder / "states.csv", partial(_parse_rows, whole=("state",), words=()), []),
        _read(folder / "units.csv", partial(_parse_rows, whole=("state",), words=("layer", "kind")), []),
        _read(folder / "model" / "config.json", _parse_object, {}),
        _read(folder / "model" / "parity.json", _parse_object, {}),
        _read(folder / "model" / "latency.txt", str.rstrip, ""),
    )


def _read(path: Path, parse: Callable[[str], object], absent=None):
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return absent
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError, csv.Error, yaml.YAMLError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{path} is damaged ({reason[:200]}); restore the file, or run again") from error


def _parse_args_file(text: str) -> dict:
    args = yaml.safe_load(text)
    if not isinstance(args, dict):
        raise ValueError("no flags in it")
    missing = [name for name in ("arch", "dataset", "epochs", "pruning_times", "seed", "struct") if name not in args]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    for name in ("epochs", "pruning_times"):
        if not isinstance(args[name], int) or args[name] < 1:
            raise ValueError(f"{name} is {args[name]!r}")
    for name in ("fillback_rate", "lr", "mlp_prune_ratio", "rate", "reg_finish"):
        if not isinstance(args.get(name, 0.0), int | float | None):
            raise ValueError(f"{name} is {args[name]!r}")
    return args


def _parse_object(text: str) -> dict:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _parse_history(text: str) -> list[dict]:
    rows = [_parse_object(line) for line in text.splitlines() if line.strip()]
    return [_numbers(row, whole=("state", "epoch"), words=()) for row in rows]


def _parse_rows(text: str, whole: Sequence[str], words: Sequence[str]) -> list[dict]:
    rows = list(csv.DictReader(io.StringIO(text), strict=True))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has another number of cells than the header")
    return [_numbers(row, whole, words) for row in rows]


def _numbers(row: Mapping, whole: Sequence[str], words: Sequence[str]) -> dict:
    """Cells as numbers, NaN where empty; `whole` columns must be there as integers and `words` as text."""
    parsed = {
        name: math.nan if value in (None, "") else float(value) for name, value in row.items() if name not in words
    }
    return parsed | {name: int(parsed[name]) for name in whole} | {name: str(row[name]) for name in words}


# ------------------------------------------------------------------------------------------------ flags that matter

# where and how a run was made, not what was computed
_CIRCUMSTANCES = {
    "save_dir", "exp_name", "device", "gpu", "workers", "print_freq", "verbose", "resume", "checkpoint", "overwrite",
    "checkpoint_every", "config", "data", "dry_run", "export", "notes", "pretrained_note",
}  # fmt: skip
_STRUCTURED = {
    "vit_prune_target", "mlp_prune_ratio", "sorting_mode", "ratio_schedule", "rank_by", "min_units", "refill",
    "compact_training",
}  # fmt: skip
_PENALTY = {
    "RST_schedule", "reg_granularity_prune", "exponents", "reg_form", "reg_clock", "reg_finish", "block_loss_grad",
}  # fmt: skip
_PRUNING = {
    "rate", "prune_type", "rewind_epoch", "criteria", "score_batches", "fillback_rate", "prune_patch_embed", "fc",
    "vit_structured",
}  # fmt: skip
_NEGATED = {"export", "refill"}  # true unless --no-NAME is given
_TWO_WAY = {"compact_training"}  # --NAME and --no-NAME


def idle_flags(run: Run) -> set[str]:
    """Flags that this run's other flags leave without effect, and `units` of `identity` where none go."""
    args, idle = run.args, set()
    structured = bool(args.get("vit_structured"))
    if run.method == "dense":
        idle |= _PRUNING | _STRUCTURED | _PENALTY | {"units"}
    if not structured:
        idle |= _STRUCTURED
    elif args.get("vit_prune_target") == "head":
        idle.add("mlp_prune_ratio")
    if args["struct"] != "rsst":
        idle |= _PENALTY
    if args.get("RST_schedule") != "exp_custom_exponents":
        idle.add("exponents")
    if args.get("prune_type") != "rewind_lt":
        idle.add("rewind_epoch")
    if structured or args["struct"] not in ("refill", "rsst"):
        idle.add("fillback_rate")
    if not structured and (args["struct"] == "imp" or not (args.get("fillback_rate") or _has_filters(run))):
        idle |= {"criteria", "score_batches"}
    if structured:
        idle.add("prune_patch_embed")
    if args.get("sched") == "cosine":
        idle.add("decreasing_lr")
    if args.get("opt") == "adamw":
        idle.add("momentum")
    return idle


def _has_filters(run: Run) -> bool:
    """A CNN, whose units are filters."""
    return str(run.args["arch"]).startswith("res")


def identity(run: Run) -> dict:
    """What makes two runs the same experiment: all flags with effect but the seed, and the units that go."""
    args, idle = dict(run.args), idle_flags(run)
    if run.method != "dense":
        whole = TARGETS.get(args.get("vit_prune_target"), "units") if args.get("vit_structured") else None
        args["units"] = whole or ("filters" if _has_filters(run) and run.method != "imp" else "weights")
    if args.get("mlp_prune_ratio") is None:
        args["mlp_prune_ratio"] = args.get("rate")
    if args["struct"] == "dense":  # one schedule over all epochs, milestones and all
        args["epochs"] *= args["pruning_times"]
        milestones = re.findall(r"\d+", str(args.get("decreasing_lr") or ""))
        args["decreasing_lr"] = ",".join(str(int(epoch) * args["pruning_times"]) for epoch in milestones)
        args["pruning_times"] = 1
    args["struct"] = run.method
    left_out = idle | _CIRCUMSTANCES | {"seed", "vit_structured", "vit_prune_target"}
    flags = {name: value for name, value in args.items() if name not in left_out and not name.startswith("wandb_")}
    return flags | ({"pretrained_note": True} if run.args.get("pretrained_note") else {})


def _same(value) -> str:
    """A flag's value for comparing; off, none, zero and a flag that an older run did not know are one."""
    return json.dumps(value or None, sort_keys=True, default=str)


def command(run: Run) -> str:
    """The command line that repeats a run, into a new folder: every flag with effect, as args.yaml has it."""
    left_out = idle_flags(run) | {"save_dir", "resume", "checkpoint", "overwrite", "dry_run", "config", "notes"}
    left_out.add("pretrained_note")
    words = ["python main_imp_fillback.py"]
    for name, value in run.args.items():
        if name in left_out or name.startswith("wandb_") or value is None:
            continue
        if value is False and name in _NEGATED | _TWO_WAY:
            words.append(f"--no-{name}")
        elif value is True and name not in _NEGATED:
            words.append(f"--{name}")
        elif not isinstance(value, bool):
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < 96:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


# ------------------------------------------------------------------------------------------------- numbers as words


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def thousands(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{round(value):,}"


def giga(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value / 1e9:.4f} G"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _text(value) -> str:
    """Any value as one line of Markdown that shows it literally, HTML included."""
    words = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|#])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda found: f"\\{found[0]}", words)


def _md_table(rows: Sequence[Mapping], columns: Mapping[str, Callable[[Mapping], object]], left: int = 0) -> str:
    """`left` columns are words; the others are numbers, aligned right."""
    lines = [list(columns), ["---" if i < left else "---:" for i in range(len(columns))]]
    lines += [[_text(get(row)) for get in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def state_columns(run: Run) -> dict[str, Callable[[Mapping], object]]:
    """Columns of the table of states: title to a function of a row of states.csv."""
    counts = {name: lambda row, name=name: thousands(row.get(name)) for name in run.counts}
    return {
        "state": lambda row: row["state"],
        "density": lambda row: percent(row.get("density")),
        **counts,
        "parameters": lambda row: thousands(row.get("parameters")),
        "MACs": lambda row: giga(row.get("macs")),
        "before cut": lambda row: percent(row.get("accuracy_before_cut")),
        "after cut": lambda row: percent(row.get("accuracy_after_cut")),
        "trained": lambda row: percent(row.get("accuracy_trained")),
        "selected": lambda row: percent(row.get("best_accuracy")),
        "test": lambda row: percent(row.get("test_accuracy")),
        "time": lambda row: duration(row.get("seconds", math.nan)),
    }


# ------------------------------------------------------------------------------------------------------------- plots

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#767676"
LINES, MARKERS = ["-", "--", "-.", ":"], ["o", "s", "^", "D", "v", "P", "X", "*"]
_LOOK = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,  # names are shown as they are
}


def _need(name: str):
    """Import a package that only reports use."""
    try:
        return __import__(name, fromlist=["x"])
    except ImportError as error:
        package = name.partition(".")[0]
        raise RunError(f"reports need {package} ({error}): pip install matplotlib markdown") from error


def _draw(width: float, height: float, paint: Callable) -> bytes:
    """The PNG of a figure of so many inches that `paint(figure)` fills."""
    matplotlib, figures = _need("matplotlib"), _need("matplotlib.figure")
    agg = _need("matplotlib.backends.backend_agg")
    with matplotlib.rc_context(_LOOK):
        figure = figures.Figure(figsize=(width, height), dpi=180, layout="constrained", facecolor="white")
        agg.FigureCanvasAgg(figure)
        paint(figure)
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()


def _percent_axis(axis) -> None:
    """Tick labels of an axis that holds percent."""
    axis.set_major_formatter(lambda value, _: f"{value:g}%")


def _density_axis(ax, lowest: float) -> None:
    """Density in percent, falling to the right; logarithmic when it gets below a tenth."""
    if 0 < lowest < 0.1:
        ax.set_xscale("log")
        ticks = [tick for tick in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if tick >= 100 * lowest]
        ax.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
        ax.minorticks_off()
    else:
        _percent_axis(ax.xaxis)
    ax.invert_xaxis()
    ax.set_xlabel("density: share of the prunable weights that is left (dense at the left)")


def _spans(run: Run) -> list[tuple[int, int, list[dict]]]:
    """(state, epochs before it, its rows of metrics.jsonl), in order."""
    spans, before = [], 0
    for state in sorted({row["state"] for row in run.history}):
        rows = [row for row in run.history if row["state"] == state]
        spans.append((state, before, rows))
        before += len(rows)
    return spans


def cut_epochs(run: Run) -> dict[int, float]:
    """{state: epochs before its cut}, counted over the run; states in which density never falls have none."""
    cuts, density = {}, math.inf
    total = run.length[1]
    for state, before, rows in _spans(run):
        for index, row in enumerate(rows):
            if row.get("density", math.nan) < density and state > 0:
                place = 0.0
                if run.args["struct"] == "rsst":
                    # where --reg_finish says, or the epoch border next to it, within the epoch whose density fell
                    place = float(run.args.get("reg_finish") or 0.0) * total
                    border = max(1, math.floor(place + 0.5))
                    place = border if abs(border - place) < total / 10 else place
                    place = min(max(place, index), index + 1)
                cuts[state] = before + place
            density = row.get("density", math.nan) if math.isfinite(row.get("density", math.nan)) else density
    return cuts


def _band_states(ax, run: Run, labels: bool = True) -> None:
    """Bands and borders of the states; above them their numbers and densities, as many as have room."""
    spans, total = _spans(run), len(run.history)
    tested = {row["state"]: row.get("density", math.nan) for row in run.states}
    for position, (_, before, rows) in enumerate(spans):
        if position % 2:
            ax.axvspan(before, before + len(rows), color="#f2f2f2", linewidth=0, zorder=0)
        if before:
            ax.axvline(before, color="#bdbdbd", linewidth=0.8, zorder=1)
    ax.set_xlim(0, total)
    ax.xaxis.set_major_locator(_need("matplotlib.ticker").MaxNLocator(integer=True))
    if labels:
        step = math.ceil(len(spans) / 10)
        middles, names = [], []
        for state, before, rows in spans[::step]:
            density = tested.get(state, rows[-1].get("density", math.nan))
            middles.append(before + len(rows) / 2)
            names.append(f"state {state}\n{100 * density:.3g}%" if math.isfinite(density) else f"state {state}")
        top = ax.secondary_xaxis("top")
        top.set_xticks(middles, names, fontsize=8.5)
        top.tick_params(length=0)
        top.spines["top"].set_visible(False)


def _width(run: Run) -> float:
    return min(10.0, max(6.6, 0.7 * len(_spans(run)), len(run.history) / 40))


def _plot_accuracy(run: Run) -> bytes:
    def paint(figure) -> None:
        ax = figure.add_subplot()
        _band_states(ax, run)
        marker = {"marker": "o", "markersize": 3} if len(run.history) <= 60 else {}
        for index, (_, before, rows) in enumerate(_spans(run)):
            epochs = [before + number for number in range(1, len(rows) + 1)]
            for key, label, color, line in (
                ("train_accuracy", "train", ORANGE, "--"),
                ("val_accuracy", "validation", BLUE, "-"),
            ):
                values = [100 * row.get(key, math.nan) for row in rows]
                ax.plot(
                    epochs,
                    values,
                    line,
                    color=color,
                    label=None if index else label,
                    linewidth=1.5,
                    clip_on=False,
                    **marker,
                )
        cells = {row["state"]: row for row in run.states}
        marks: dict[str, tuple[list[float], list[float]]] = {"before_cut": ([], []), "after_cut": ([], [])}
        for state, place in cut_epochs(run).items():
            ax.axvline(place, color=VERMILLION, linestyle=":", linewidth=1.3, zorder=2)
            for key, (places, values) in marks.items():
                places.append(place)
                values.append(100 * cells.get(state, {}).get(f"accuracy_{key}", math.nan))
        if marks["before_cut"][0]:
            ax.vlines(marks["before_cut"][0], marks["before_cut"][1], marks["after_cut"][1], VERMILLION, linewidth=1.8)
            look = {"color": VERMILLION, "linestyle": "none", "zorder": 4, "clip_on": False}
            ax.plot(
                *marks["before_cut"], marker="o", mfc="white", markersize=8, label="before the cut (dotted)", **look
            )
            ax.plot(*marks["after_cut"], marker="v", markersize=4.5, label="after the cut", **look)
        _percent_axis(ax.yaxis)
        ax.set_xlabel("epochs trained, all states in a row")
        ax.set_ylabel("accuracy")
        figure.legend(loc="outside lower center", ncols=4)

    return _draw(_width(run), 4.0, paint)


def _plot_density(run: Run) -> bytes:
    def paint(figure) -> None:
        ax = figure.add_subplot()
        rows = [row for row in run.states if math.isfinite(row.get("density", math.nan))]
        densities = [row["density"] for row in rows]
        for key, label, color, line, marker in (
            ("best_accuracy", "validation, selected model", BLUE, "-", "o"),
            ("test_accuracy", "test, the same model", GREEN, "--", "s"),
        ):
            values = [100 * row.get(key, math.nan) for row in rows]
            ax.plot([100 * d for d in densities], values, line, color=color, marker=marker, label=label, linewidth=1.5)
        _density_axis(ax, min(densities, default=1.0))
        _percent_axis(ax.yaxis)
        ax.margins(x=0.06, y=0.12)
        ax.set_ylabel("accuracy")
        figure.legend(loc="outside lower center", ncols=2)

    return _draw(6.6, 3.8, paint)


def _plot_penalty(run: Run) -> bytes:
    cuts = cut_epochs(run)
    at_cut = {row["state"]: row.get("residual", math.nan) for row in run.states}

    def paint(figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        marker = {"marker": "o", "markersize": 4, "clip_on": False} if len(run.history) <= 60 else {}
        lowest = 0.1
        for ax in (upper, lower):
            _band_states(ax, run, labels=ax is upper)
            for place in cuts.values():
                ax.axvline(place, color=VERMILLION, linestyle=":", linewidth=1.3, zorder=2)
        for state, before, rows in _spans(run):
            doomed = [(before + i, row) for i, row in enumerate(rows, 1) if row.get("lambda", 0.0) > 0]
            if not doomed:
                continue
            strengths = [(before, 0.0), *((epoch, row["lambda"]) for epoch, row in doomed)]
            upper.plot(*zip(*strengths, strict=True), color=PURPLE, linewidth=1.5, **marker)
            # a cut within an epoch leaves nothing to measure at its end
            left = [(before, 1.0), *((epoch, row.get("residual", math.nan)) for epoch, row in doomed)]
            left += [(cuts.get(state, math.nan), at_cut.get(state, math.nan))]
            left = sorted((epoch, value) for epoch, value in left if 0 < value < math.inf and math.isfinite(epoch))
            lowest = min(lowest, *(value for _, value in left))
            lower.plot(*zip(*left, strict=True), color=BLUE, linewidth=1.5, **marker)
        lower.set_yscale("log")
        lower.set_ylim(10.0 ** math.floor(math.log10(lowest)), 2.0)
        lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        lower.minorticks_off()
        upper.set_ylabel("penalty lambda")
        lower.set_ylabel("residual: norm of\ndoomed weights over\nthat at the start")
        lower.set_xlabel("epochs trained, all states in a row; dotted: the cut")

    return _draw(_width(run), 4.8, paint)


def _unit_panels(run: Run) -> dict[str, dict[str, list[dict]]]:
    """{title: {layer: rows of units.csv}}: a panel per kind, for weights of blocks one per layer in the block."""
    panels: dict[str, dict[str, list[dict]]] = {}
    for row in run.units:
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", row["layer"])
        kind = f"{row['kind']}s kept"
        if block and row["kind"] == "weight":
            kind = f"{block[2]}: {kind}"
        panels.setdefault(kind, {}).setdefault(block[1] if block else row["layer"], []).append(row)
    return panels


def _plot_units(run: Run) -> bytes:
    panels = _unit_panels(run)
    states = sorted({row["state"] for row in run.units})
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = max(map(len, panels.values()))
    names_width = 0.1 + 0.075 * max(len(layer) for layers in panels.values() for layer in layers)
    cell_width = min(1.0, max(0.32, 2.6 / len(states)))
    cell_height = min(0.32, max(0.16, 5.0 / tallest))
    width = max(5.0, 0.9 + columns * (0.3 + names_width + cell_width * len(states)))
    height = lines * (0.9 + cell_height * tallest)

    def paint(figure) -> None:
        colors = _need("matplotlib").colormaps["viridis"].with_extremes(bad="#dddddd")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax, (title, layers) in zip(axes, panels.items(), strict=False):
            grid = [[math.nan] * len(states) for _ in layers]
            for y, rows in enumerate(layers.values()):
                for row in rows:
                    if row["total"] > 0 and math.isfinite(row["kept"]):
                        x, share = states.index(row["state"]), row["kept"] / row["total"]
                        grid[y][x] = share
                        color = "black" if share > 0.55 else "white"
                        look = {"ha": "center", "va": "center", "fontsize": min(8.0, 22 * cell_width)}
                        ax.text(x, y, f"{100 * share:.0f}", color=color, **look)
            image = ax.imshow(grid, aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks(range(len(states)), states, fontsize=8)
            ax.set_yticks(range(len(layers)), list(layers), fontsize=8)
            ax.set_title(title, fontsize=10)
            ax.set_xlabel("state", fontsize=9)
            ax.set_ylabel("block" if all(layer.isdigit() for layer in layers) else "layer", fontsize=9)
            ax.grid(False)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        bar = figure.colorbar(image, ax=list(axes[: len(panels)]), fraction=0.04, pad=0.02, aspect=6 * height)
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0%", "25%", "50%", "75%", "100%"])
        bar.outline.set_visible(False)

    return _draw(width, height, paint)


# ---------------------------------------------------------------------------------------------------- report of one run


def write(save_dir: Path) -> None:
    """Write report.md, report.html and plots/*.png of a run, finished or not, into its folder.

    Raises:
        RunError: no run, a damaged file, a missing package or a full disk; what was there before stays.
    """
    _write(load_run(Path(save_dir)))


def _write(run: Run) -> None:
    _need("markdown")  # before any picture is drawn
    plots: dict[str, bytes] = {}
    if run.history:
        plots["plots/accuracy.png"] = _plot_accuracy(run)
    if run.states:
        plots["plots/density.png"] = _plot_density(run)
    if any(row.get("lambda", 0.0) > 0 for row in run.history):
        plots["plots/penalty.png"] = _plot_penalty(run)
    if run.units:
        plots["plots/units.png"] = _plot_units(run)
    text = _report(run, plots)
    page = to_html(run.name, text, plots)
    files = {name: partial(_write_bytes, content=png) for name, png in plots.items()}
    files["report.md"] = partial(utils.write_text, text=text)
    files["report.html"] = partial(utils.write_text, text=page)
    stale = {f"plots/{name}.png" for name in ("accuracy", "density", "penalty", "units")} - set(plots)
    _publish(run.folder, files, stale)


def _write_bytes(path: Path, content: bytes) -> None:
    utils.write_atomic(path, lambda file: file.write(content))


def _publish(folder: Path, files: Mapping[str, Callable[[Path], None]], stale: Iterable[str] = ()) -> None:
    """Let every writer fill its file beside the old ones, then move all of them in: all old or all new, no mixture.

    `stale` files of an earlier report go.
    """
    made = not folder.exists()
    staging = folder / ".report.tmp"
    try:
        for name, write_file in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(staging / name)
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(staging / name, folder / name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror or error}); free the disk or choose another", 1
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # still empty: nothing could be written


def _report(run: Run, plots: Mapping[str, bytes]) -> str:
    """report.md."""
    parts = [f"# {_text(run.name)}"]
    if run.args.get("pretrained_note"):
        parts.append(f"> **Note:** {_text(run.args['pretrained_note'])}")
    states = run.length[0]
    where = _shown_path(run)
    resume = f"python main_imp_fillback.py --save_dir {shlex.quote(where)} --resume"
    if not run.finished:
        epochs = _plural(len(run.history), "epoch")
        parts.append(
            f"> **This run is not finished:** {len(run.states)} of {_plural(states, 'state')} done, {epochs} trained. "
            "What follows is what there is so far."
        )
    parts.append(describe(run))
    if run.states:
        parts += ["## States", _md_table(run.states, state_columns(run)), _legend(run)]
        parts += ["## Key results", *_key_results(run)]
    elif not run.history:
        parts.append("No epoch has been trained yet.")
    if run.latency:
        parts += ["Speed of the small model, measured by `export.py --latency`:", _code(run.latency)]
    captions = {
        "plots/accuracy.png": ("Accuracy over epochs", "Every state trains anew; above it stands its density."),
        "plots/density.png": ("Accuracy over density", "The model selected on validation in each state."),
        "plots/penalty.png": ("Penalty", "Its strength, and how much of the doomed weights it leaves."),
        "plots/units.png": ("Units kept per layer", "Percent of each layer that every state ends with."),
    }
    if plots:
        parts.append("## Plots")
        parts += [f"### {captions[name][0]}\n\n{captions[name][1]}\n\n![{captions[name][0]}]({name})" for name in plots]
    parts += ["## Going on", "All commands run in the folder of the program."]
    if not run.finished:
        parts += ["Go on where the last checkpoint stands:", _code(resume, "bash")]
    else:
        export = f"python export.py {shlex.quote(where)} --onnx --latency --evaluate"
        again = " again" if run.config else ""
        parts += [f"Write the small model{again}, with ONNX, speeds and its test accuracy:", _code(export, "bash")]
        loading = f"import export\n\nmodel = export.load({os.path.join(where, 'model')!r})"
        parts += ["Load it (model/README.md says more):", _code(loading, "python")]
    parts += ["Repeat this run in a new folder:", _code(command(run), "bash")]
    return "\n\n".join(parts) + "\n"


def _shown_path(run: Run) -> str:
    """The run's folder as its command named it, absolute when it has moved since."""
    recorded = str(run.args.get("save_dir") or "")
    here = run.folder.resolve()
    return recorded if Path(recorded).name == here.name else str(here)


def describe(run: Run) -> str:
    """One paragraph in words: method, network, data, pruning, training, machine, time."""
    args, (states, epochs) = run.args, run.length
    name, words = METHODS.get(run.method, (str(args["struct"]), ""))
    shape = f"{_plural(states, 'state')} of {_plural(epochs, 'epoch')}{' each' if states > 1 else ''}"
    start = "pretrained weights" if args.get("pretrained") else "weights of a file" if args.get("init") else "scratch"
    sentences = [
        f"**{_text(name)}**{f' ({words})' if words else ''} on {_text(args['arch'])} and {_text(args['dataset'])}: "
        f"{shape}, from {start}, seed {_text(args['seed'])}."
    ]
    if run.method != "dense":
        sentences.append(_pruning_words(run))
    rate = args.get("lr")
    training = [str(args.get("opt", "")).upper().replace("ADAMW", "AdamW")]
    training += [f"learning rate {rate:g}"] if isinstance(rate, int | float) else []
    training += [f"{args['sched']} schedule"] if args.get("sched") else []
    training += [f"batches of {args['batch_size']} images"] if args.get("batch_size") else []
    training += [f"augmentation {args['aug']}"] if args.get("aug") else []
    training += [str(run.environment["precision"])] if run.environment.get("precision") else []
    training += [f"{args['train_limit']:,} training images"] if isinstance(args.get("train_limit"), int) else []
    sentences.append(f"Training: {_text(', '.join(filter(None, training)))}.")
    machine = run.environment
    if machine:
        versions = machine.get("versions") if isinstance(machine.get("versions"), dict) else {}
        versions = {"Python": machine.get("python"), **versions}
        shown = ", ".join(f"{key} {versions[key]}" for key in ("Python", "torch", "timm", "numpy") if versions.get(key))
        device = " ".join(dict.fromkeys(str(machine.get(key, "")) for key in ("device", "device_name"))).strip()
        threads = f" ({_plural(machine['threads'], 'thread')})" if isinstance(machine.get("threads"), int) else ""
        commit = f", commit {str(machine['commit'])[:10]}" if machine.get("commit") else ""
        sentences.append(
            f"Machine: {_text(device)}{threads}, {_text(machine.get('platform', ''))}; {_text(shown + commit)}."
        )
    sentences.append(f"Training took {duration(run.seconds)}{'' if run.finished else ' so far'}.")
    return " ".join(sentences)


def _pruning_words(run: Run) -> str:
    args = run.args
    rate = args.get("rate", math.nan)
    if not args.get("vit_structured"):
        prunings = f"Each of {run.length[0] - 1} prunings" if run.length[0] > 2 else "The pruning"
        cut = f"{prunings} takes {percent(rate)} of the prunable weights that are left"
        if "criteria" not in idle_flags(run):
            back = f", and refill gives back {percent(args.get('fillback_rate'))}" if args.get("fillback_rate") else ""
            cut += f"{back}, chosen by criterion {_text(args.get('criteria'))}"
    else:
        neurons = rate if args.get("mlp_prune_ratio") is None else args["mlp_prune_ratio"]
        target = args.get("vit_prune_target")
        goals = [f"{percent(rate)} of all heads"] if target in ("head", "both") else []
        goals += [f"{percent(neurons)} of all neurons"] if target in ("mlp", "both") else []
        cut = (
            f"{' and '.join(goals)} are gone in the end, chosen {_text(args.get('sorting_mode', 'layer-wise'))} by "
            f"criterion {_text(args.get('criteria'))}, on a {_text(args.get('ratio_schedule', ''))} schedule"
        )
    start = STARTS.get(args.get("prune_type"), "").format(rewind_epoch=args.get("rewind_epoch"))
    return f"{cut}. Every state starts {start}." if start else f"{cut}."


def _legend(run: Run) -> str:
    """What the columns of the table of states mean, as far as that is not plain."""
    soft = run.method == "rsst"
    before = "just before the cut" if soft else "at the end of the state before"
    after = "just after it" if soft else "of the same weights once they are cut, before they are rewound"
    cut = f"Before cut: {before}; after cut: {after}. " if run.method != "dense" else ""
    counts = ""
    if run.method != "dense" and not run.args.get("vit_structured") and (run.method == "imp" or not _has_filters(run)):
        counts = " Parameters are those not zero; single zeros do not make the model faster, so MACs count whole units."
    return (
        f"Accuracy is on validation images, but for the test column. {cut}Trained: after the last epoch; selected: "
        f"after the epoch that is best on validation, the model whose test accuracy is shown.{counts}"
    )


def _key_results(run: Run) -> list[str]:
    first, last = run.states[0], run.states[-1]
    parts = []
    if len(run.states) > 1:
        rows = [("test accuracy", "test_accuracy", percent), ("validation accuracy", "best_accuracy", percent)]
        rows += [("density", "density", percent)] + [(name, name, thousands) for name in run.counts]
        rows += [("parameters", "parameters", thousands), ("MACs per image", "macs", giga)]

        def change(key: str) -> str:
            a, b = first.get(key, math.nan), last.get(key, math.nan)
            if not (math.isfinite(a) and math.isfinite(b)):
                return "-"
            if key.endswith("accuracy"):
                return f"{100 * (b - a):+.2f} points"
            return (
                "same" if a == b else f"{a / b:.2f}x {'less' if key == 'density' else 'fewer'}" if b > 0 else "all gone"
            )

        columns = {
            "measure": lambda row: row[0],
            f"dense (state {first['state']})": lambda row: row[2](first.get(row[1])),
            f"{'final' if run.finished else 'so far'} (state {last['state']})": lambda row: row[2](last.get(row[1])),
            "change": lambda row: change(row[1]),
        }
        parts.append(_md_table(rows, columns, left=1))
    else:
        parts.append(
            f"Dense, {percent(last.get('density'))} of the weights: validation {percent(last.get('best_accuracy'))}, "
            f"test {percent(last.get('test_accuracy'))}, {thousands(last.get('parameters'))} parameters, "
            f"{giga(last.get('macs'))} MACs per image."
        )
    cuts = []
    for row in run.states:
        before, after = row.get("accuracy_before_cut", math.nan), row.get("accuracy_after_cut", math.nan)
        if math.isfinite(before) and math.isfinite(after):
            residual = row.get("residual", math.nan)
            left = f", residual {residual:.2g}" if math.isfinite(residual) else ""
            cuts.append(
                (after - before, f"state {row['state']}: {percent(before)} before, {percent(after)} after{left}")
            )
    if cuts:
        worst = min(cuts)
        most = f"changed accuracy by {100 * worst[0]:+.2f} points at worst" if worst[0] < 0 else "lost no accuracy"
        cut = "The cut" if len(cuts) == 1 else f"The {len(cuts)} cuts"
        parts.append(f"{cut}{'' if run.method == 'rsst' else ', before any retraining,'} {most} ({worst[1]}).")
    if run.proof:
        parts.append(_proof(run))
    return parts


def _proof(run: Run) -> str:
    """What parity.json and config.json of model/ say."""

    def value(source: Mapping, *keys: str) -> float:
        for key in keys:
            source = source.get(key, {}) if isinstance(source, dict) else {}
        return float(source) if isinstance(source, int | float) else math.nan

    proof = partial(value, run.proof)
    text = (
        f"**Proof:** the small model in model/ computes what the masked one does: its logits differ by at most "
        f"{proof('max_difference_float32'):.2g} in float32 (allowed: {proof('bound_float32'):.2g}) and "
        f"{proof('max_difference_float64'):.2g} in float64, and it gives the same class for "
        f"{percent(proof('top1_agreement'))} of {thousands(proof('images'))} validation images."
    )
    sizes = [value(run.config, key, part) for key in ("parameters", "macs") for part in ("dense", "removed")]
    if all(math.isfinite(size) and size > 0 for size in sizes):
        text += (
            f" It has {thousands(sizes[1])} of {thousands(sizes[0])} parameters ({sizes[0] / sizes[1]:.2f}x fewer) and "
            f"takes {giga(sizes[3])} of {giga(sizes[2])} MACs per image ({sizes[2] / sizes[3]:.2f}x fewer)."
        )
    return text


# --------------------------------------------------------------------------------------------------------------- HTML

_STYLE = """\
:root { color-scheme: light dark; --text: #1d2329; --soft: #57606a; --page: #ffffff; --box: #f5f7f9; --line: #d5dae0;
  --link: #0b5cad; --note: #fff4d6; --mark: #d99a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #a3adb8; --page: #14181d; --box: #1e242b;
  --line: #39424d; --link: #7ab8ff; --note: #3a2f10; --mark: #e0b040; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; color: var(--text); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
h3 + p { margin-top: 0; color: var(--soft); }
a { color: var(--link); }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: 6px; padding: 6px; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: left; }
td.words { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
th { background: var(--box); font-weight: 600; }
tbody tr:hover { background: var(--box); }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--box); border: 1px solid var(--line);
  border-radius: 6px; font-size: .85rem; line-height: 1.45; }
blockquote { margin: 1rem 0; padding: .1rem 1rem; background: var(--note); border-left: 4px solid var(--mark);
  border-radius: 4px; }
"""


def to_html(title: str, text: str, pictures: Mapping[str, bytes]) -> str:
    """Markdown as one page that needs nothing else: style inside, each picture of `pictures` (by its path) too."""
    body = _need("markdown").markdown(text, extensions=["tables", "fenced_code"])
    for name, png in pictures.items():
        data = base64.b64encode(png).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    body = body.replace("<table>", '<div class="table" tabindex="0">\n<table>').replace("</table>", "</table>\n</div>")
    body = re.sub(r"<td>(?=[^<]{60})", '<td class="words">', body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


# --------------------------------------------------------------------------------------------------- several runs


@dataclass
class Point:
    """What a group of runs reached in one state; means over its seeds, standard deviations NaN below two."""

    state: int
    n: int
    density: float
    counts: dict[str, float]  # heads, neurons or filters, parameters, macs
    val: tuple[float, float]
    test: tuple[float, float]


@dataclass
class Group:
    """Runs that differ in nothing but the seed."""

    flags: dict
    runs: list[Run]
    label: str = ""

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def points(self) -> list[Point]:
        points = []
        for rows in zip(*(run.states for run in self.runs), strict=False):
            names = [name for name in (*COUNTS, "parameters", "macs") if any(name in row for row in rows)]
            values = {name: [row.get(name, math.nan) for row in rows] for name in names}
            points.append(
                Point(
                    rows[0]["state"],
                    len(rows),
                    mean_and_sd(row.get("density", math.nan) for row in rows)[0],
                    {name: mean_and_sd(cells)[0] for name, cells in values.items()},
                    mean_and_sd(row.get("best_accuracy", math.nan) for row in rows),
                    mean_and_sd(row.get("test_accuracy", math.nan) for row in rows),
                )
            )
        return points


def mean_and_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of the finite values; NaN where there are too few."""
    values = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def data_of(run: Run) -> str:
    """The data whose test images a run reports; own folders of images are told apart by their place."""
    name = str(run.args["dataset"])
    return f"{name} {run.args.get('data')}" if name == "folder" else name


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first run; labels tell them apart by the method and the flags that differ."""
    found: dict[str, Group] = {}
    for run in runs:
        flags = identity(run)
        key = json.dumps({name: _same(value) for name, value in flags.items() if value or None}, sort_keys=True)
        found.setdefault(key, Group(flags, [])).runs.append(run)
    groups = list(found.values())
    taken: dict[str, int] = {}
    for group in groups:
        # a dense run has one long schedule by nature: its length tells it apart from other dense runs only
        alike = [other for other in groups if (other.method == "dense") == (group.method == "dense")]
        words = []
        for name, value in group.flags.items():
            others = alike if name in ("epochs", "pruning_times", "decreasing_lr") else groups
            values = {_same(other.flags.get(name)) for other in others if name not in idle_flags(other.runs[0])}
            if name != "struct" and len(values) > 1:
                words.append(_flag_words(name, value))
        label = METHODS.get(group.method, (group.method,))[0] + (f" ({', '.join(words)})" if words else "")
        taken[label] = taken.get(label, 0) + 1
        group.label = label if taken[label] == 1 else f"{label} #{taken[label]}"
    return groups


def _flag_words(name: str, value) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if name in ("arch", "criteria", "opt", "sched", "units"):  # the value says what it is of
        return str(value)
    if isinstance(value, str) and os.sep in value:
        value = Path(value).name
    return f"{name} {'none' if value is None else f'{value:g}' if isinstance(value, float) else value}"


def equal_density(groups: Sequence[Group]) -> list[list[tuple[Group, Point]]]:
    """Levels of density that two groups or more reach within SAME_DENSITY of each other, dense first.

    A level holds a group once. The closest points find each other first; a point left over still gets a level with
    whatever lies close enough.
    """
    points = [
        (index, point) for index, group in enumerate(groups) for point in group.points if math.isfinite(point.density)
    ]

    def near(members: Sequence[tuple[int, Point]]) -> bool:
        densities = [point.density for _, point in members]
        once = len({index for index, _ in members}) == len(members)
        return once and max(densities) - min(densities) <= SAME_DENSITY + 1e-9

    level = {id(point): [(index, point)] for index, point in points}
    pairs = [
        (abs(a.density - b.density), -a.density, i, a.state, j, b.state, a, b)
        for position, (i, a) in enumerate(points)
        for j, b in points[position + 1 :]
        if i != j and abs(a.density - b.density) <= SAME_DENSITY + 1e-9
    ]
    for *_, a, b in sorted(pairs, key=lambda pair: pair[:6]):
        if level[id(a)] is not level[id(b)] and near(level[id(a)] + level[id(b)]):
            merged = level[id(a)] + level[id(b)]
            for _, point in merged:
                level[id(point)] = merged
    levels = list({id(members): members for members in level.values() if len(members) > 1}.values())
    for index, point in points:
        if len(level[id(point)]) == 1:
            members = [(index, point)]
            for other in sorted(points, key=lambda entry: abs(entry[1].density - point.density)):
                if near([*members, other]):
                    members.append(other)
            if len(members) > 1:
                levels.append(members)
    levels.sort(key=lambda members: -statistics.fmean(point.density for _, point in members))
    return [[(groups[index], point) for index, point in sorted(members, key=lambda m: m[0])] for members in levels]


def compare(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write compare.csv, compare.png, compare.md and compare.html about several runs; returns their folder.

    Args:
        out: where to; `compare` in the folder that the runs share when None, else results/compare.

    Raises:
        RunError: a folder is no run, a file is damaged, or no run is finished; then nothing is written.
    """
    _need("markdown")
    places = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    runs = [load_run(folder) for folder in places]
    notes = [
        f"{run.name}: not finished ({len(run.states)} of {run.length[0]} states)" for run in runs if not run.finished
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
    rows = [row for data, groups in blocks for group in groups for row in _compare_rows(data, group)]
    png = _plot_compare(blocks)
    text = _compare_report(blocks, notes)
    page = to_html("Comparison of runs", text, {"compare.png": png})
    _publish(
        out,
        {
            "compare.csv": partial(utils.write_csv, rows=rows),
            "compare.png": partial(_write_bytes, content=png),
            "compare.md": partial(utils.write_text, text=text),
            "compare.html": partial(utils.write_text, text=page),
        },
    )
    for note in notes:
        print(f"left out: {note}", file=sys.stderr)
    return out


def _common_out(places: Sequence[Path]) -> Path:
    shared = Path(os.path.commonpath([place.parent for place in places]))
    own = shared.parent != shared and os.access(shared, os.W_OK)
    return (shared if own else Path("results")) / "compare"


def _compare_rows(data: str, group: Group) -> list[dict]:
    """Rows of compare.csv; cells that do not exist are empty."""
    rows = []
    for point in group.points:
        accuracies = zip(("val_mean", "val_sd", "test_mean", "test_sd"), (*point.val, *point.test), strict=True)
        row = {"dataset": data, "label": group.label, "n": point.n, "state": point.state, "density": point.density}
        row |= {**point.counts, **dict(accuracies)}
        rows.append(
            {name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        )
    return rows


def _points_sd(value: float) -> str:
    return f"{100 * value:.2f}" if math.isfinite(value) else "-"


_ACCURACY_COLUMNS = {
    "n": lambda row: row[1].n,
    "test": lambda row: percent(row[1].test[0]),
    "test sd": lambda row: _points_sd(row[1].test[1]),
    "val": lambda row: percent(row[1].val[0]),
    "val sd": lambda row: _points_sd(row[1].val[1]),
    "parameters": lambda row: thousands(row[1].counts.get("parameters")),
    "MACs": lambda row: giga(row[1].counts.get("macs")),
}


def _compare_report(blocks: Sequence[tuple[str, list[Group]]], notes: Sequence[str]) -> str:
    """compare.md."""
    runs = sum(len(group.runs) for _, groups in blocks for group in groups)
    parts = [
        "# Comparison of runs",
        f"{_plural(runs, 'run')} in {_plural(sum(len(groups) for _, groups in blocks), 'group')}; the runs of a group "
        "differ in their seeds only. Accuracies are of the model that validation selects in each state. sd is the "
        'sample standard deviation over seeds, in percentage points; with n = 1 there is none, shown as "-".',
    ]
    if any(len(group.runs) == 1 for _, groups in blocks for group in groups):
        parts.append("> Groups with n = 1 show one seed: no ranking of methods follows from them.")
    if len(blocks) > 1:
        parts.append("> Several data sets: each has its own tables and plot, since their accuracies do not compare.")
    if notes:
        parts.append("Left out:\n\n" + "\n".join(f"- {_text(note)}" for note in notes))
    parts.append("![Test accuracy over density](compare.png)")
    for data, groups in blocks:
        if len(blocks) > 1:
            parts.append(f"## Data set: {_text(data)}")
        columns = {
            "group": lambda group: group.label,
            "runs": lambda group: ", ".join(run.name for run in group.runs),
            "n": lambda group: len(group.runs),
            "seeds": lambda group: ", ".join(str(run.args["seed"]) for run in group.runs),
            "time": lambda group: duration(sum(run.seconds for run in group.runs)),
        }
        parts += [f"### Groups: {_text(data)}", _md_table(groups, columns, left=2)]
        noted = [run for group in groups for run in group.runs if run.args.get("pretrained_note")]
        parts += [f"> **Note:** {_text(run.name)}: {_text(run.args['pretrained_note'])}" for run in noted]
        parts += [f"### At equal density: {_text(data)}", *_equal_report(groups)]
        counts = [name for name in COUNTS if any(name in point.counts for group in groups for point in group.points)]
        columns = {
            "group": lambda row: row[0].label,
            "state": lambda row: row[1].state,
            "density": lambda row: percent(row[1].density),
            **{name: lambda row, name=name: thousands(row[1].counts.get(name)) for name in counts},
            **_ACCURACY_COLUMNS,
        }
        rows = [(group, point) for group in groups for point in group.points]
        parts += [f"### All states: {_text(data)}", _md_table(rows, columns, left=1)]
    return "\n\n".join(parts) + "\n"


def _equal_report(groups: Sequence[Group]) -> list[str]:
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
            "state": lambda row: row[1].state,
            "its density": lambda row: percent(row[1].density),
            **_ACCURACY_COLUMNS,
        }
        reference = (
            " A dense run spends all its epochs on one schedule; it stands in every block to compare with."
            if dense
            else ""
        )
        parts += [f"Densities within {100 * SAME_DENSITY:g} percentage point count as equal.{reference}"]
        parts += [_md_table(rows, columns, left=2)]
    if not any(point.density < 1 for members in levels for _, point in members):
        what = "No two groups reach the same density below 100%" if rows else "No two groups reach the same density"
        reached = [
            f"- {_text(group.label)}: {', '.join(percent(point.density) for point in group.points)}" for group in groups
        ]
        parts += [f"{what} (within {100 * SAME_DENSITY:g} percentage point). Reached are:", "\n".join(reached)]
    return parts


def _plot_compare(blocks: Sequence[tuple[str, list[Group]]]) -> bytes:
    longest = max(len(group.label) for _, groups in blocks for group in groups)
    columns = 1 if longest > 36 else 2 if longest > 16 else 3
    heights = []
    for _, groups in blocks:
        lines = sum(_legend_label(group).count("\n") + 1 for group in groups)
        heights.append(4.0 + 0.22 * math.ceil(lines / columns))

    def paint(figure) -> None:
        panels = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)
        for (data, groups), panel in zip(blocks, panels[:, 0], strict=True):
            _paint_compare(panel, data, groups, columns)

    return _draw(7.4, sum(heights), paint)


def _legend_label(group: Group) -> str:
    return textwrap.fill(f"{group.label}, n = {len(group.runs)}", 80)


def _paint_compare(panel, data: str, groups: Sequence[Group], columns: int) -> None:
    ax = panel.add_subplot()
    colors = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY]
    pruned = [group for group in groups if group.method != "dense"]
    lowest = min((point.density for group in pruned for point in group.points), default=1.0)
    for index, group in enumerate(pruned):
        points = [point for point in group.points if math.isfinite(point.density) and math.isfinite(point.test[0])]
        ax.errorbar(
            [100 * point.density for point in points],
            [100 * point.test[0] for point in points],
            [100 * point.test[1] for point in points],
            color=colors[index % len(colors)],
            linestyle=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markerfacecolor="white" if index % 2 else colors[index % len(colors)],
            markersize=6,
            linewidth=1.6,
            capsize=3.5,
            elinewidth=1.1,
            label=_legend_label(group),
        )
    for index, group in enumerate(group for group in groups if group.method == "dense"):
        mean, sd = group.points[-1].test
        style = (0, (6, 2, 1, 2)) if index == 0 else (0, (1 + index, 1.5))
        ax.axhline(100 * mean, color="black", linewidth=1.3, linestyle=style, label=_legend_label(group))
        if math.isfinite(sd):
            ax.axhspan(100 * (mean - sd), 100 * (mean + sd), color="black", alpha=0.08, linewidth=0)
    ax.margins(x=0.06, y=0.1)
    _density_axis(ax, lowest)
    _percent_axis(ax.yaxis)
    ax.set_ylabel("test accuracy, mean and sd over seeds")
    ax.set_title(data, fontsize=11)
    panel.legend(loc="outside lower center", ncols=columns, fontsize=9)


# -------------------------------------------------------------------------------------------------------- the command


def build_parser() -> utils.OneLineParser:
    parser = utils.OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run; several are compared")
    parser.add_argument("--out", help="folder of the comparison; `compare` beside the runs when not given")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.out is not None and len(args.run_dirs) == 1:
        parser.error(f"--out {args.out}: belongs to a comparison; the report of one run stands in its folder")
    try:
        if len(args.run_dirs) > 1:
            out = compare(args.run_dirs, args.out)
            print(f"comparison in {out}: compare.md, compare.html, compare.png, compare.csv")
            return 0
        run = load_run(Path(args.run_dirs[0]))
        _write(run)
        if run.states:
            print(utils.format_table(run.states, state_columns(run)))
        print(f"report in {run.folder / 'report.md'} and {run.folder / 'report.html'}")
    except RunError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
