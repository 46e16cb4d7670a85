"""The journal: what a run has done in; rows for its files, lines for its log and the closing tables out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.checkpoint import RunState
from pruning.masks import count_kept, density
from pruning.units import Units
from utils import format_table, write_csv, write_text


def write(save_dir: Path, progress: RunState) -> None:
    """metrics.jsonl and metrics.csv, each epoch exactly once, and penalty.csv where something was doomed."""
    write_text(save_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in progress.history))
    write_csv(save_dir / "metrics.csv", progress.history)
    if progress.penalty:
        write_csv(save_dir / "penalty.csv", progress.penalty)


def write_states(save_dir: Path, progress: RunState) -> None:
    """states.csv and units.csv."""
    write_csv(save_dir / "states.csv", progress.states)
    write_csv(save_dir / "units.csv", progress.units)


def check_rows(progress: RunState, steps_per_epoch: int, unvalidated: int | None = None) -> None:
    """A sound checkpoint has all numbers that later lines and tables need.

    Args:
        unvalidated: the state whose epochs have no validation accuracy, where there is one.

    Raises:
        KeyError, TypeError, ValueError: it has not.
    """
    if bool(progress.step % steps_per_epoch) != bool(progress.sums):
        raise ValueError("the sums of a broken-off epoch")
    if progress.states:
        states_table(progress.states)
    for row in progress.history:
        float(row["state"] + row["epoch"] + (0 if row["state"] == unvalidated else row["val_accuracy"]))


def epoch_line(row: Mapping, title: str, epochs: int, penalty_note: str) -> str:
    top5 = f" (top-5 {100 * row['val_top5']:.2f}%)" if "val_top5" in row else ""
    val = f"  val {100 * row['val_accuracy']:.2f}%{top5}" if "val_accuracy" in row else ""
    return (
        f"{title} epoch {row['epoch'] + 1}/{epochs}  loss {row['train_loss']:.4f}"
        f"  train {100 * row['train_accuracy']:.2f}%{val}  lr {row['lr']:.3g}{penalty_note}  {row['seconds']:.1f} s"
    )


def epoch_values(row: Mapping, cost: Mapping, fading: Mapping) -> dict:
    """An epoch's numbers as tracking names them."""
    values = {f"train/{name}": row[f"train_{name}"] for name in ("loss", "accuracy")}
    values |= {f"train/{name}": row[name] for name in ("lr", "images_per_second")}
    values |= {f"val/{name}": row[f"val_{name}"] for name in ("accuracy", "top5") if f"val_{name}" in row}
    return {**values, **fading, **{f"prune/{name}": row[name] for name in ("density", *cost)}}


def state_row(progress: RunState, cost: Mapping, units: Mapping[str, Units], test: Mapping) -> dict:
    """A state's line of states.csv; `test` as `evaluation.accuracies` returns it.

    Where nothing validates, cells of validation accuracy are empty.
    """
    row = {"state": progress.state, "density": density(progress.masks), **cost}
    if not units:
        row["parameters"] -= sum(mask.numel() for mask in progress.masks.values()) - count_kept(progress.masks)
    row |= {
        "accuracy_before_cut": progress.cut.get("before", ""),
        "accuracy_after_cut": progress.cut.get("after", ""),
        "residual": progress.cut.get("residual", ""),
        "accuracy_trained": _accuracy_trained(progress),
        "best_epoch": progress.best["epoch"],
        "best_accuracy": progress.best.get("accuracy", ""),
    }
    row |= {f"test_{name}": share for name, share in test.items()} | {"seconds": progress.seconds}
    row["accuracy_at_start"] = accuracy_at_start(progress) if progress.cut else ""
    return row | {"accuracy_after_repair": progress.cut.get("repaired", "")}


def _accuracy_trained(progress: RunState) -> float | str:
    """Validation accuracy of the last epoch; of a state that does not train, of what it starts from."""
    last = progress.history[-1] if progress.history else {}
    if last.get("state") == progress.state:
        return last.get("val_accuracy", "")
    return progress.best.get("accuracy", "")


def accuracy_at_start(progress: RunState) -> float:
    """Validation accuracy that the state before ended with, before any weight faded or was cut."""
    return progress.states[-1]["accuracy_trained"]


def state_line(row: Mapping, title: str) -> str:
    top5 = f" (top-5 {100 * row['test_top5']:.2f}%)" if "test_top5" in row else ""
    selected = "not selected on validation (it trains too)"
    if row["best_accuracy"] != "":
        selected = f"best val {100 * row['best_accuracy']:.2f}% (epoch {row['best_epoch'] + 1})"
    return (
        f"{title} done: density {100 * row['density']:.2f}%, {selected}, test {100 * row['test_accuracy']:.2f}%{top5}, "
        f"{row['seconds']:.0f} s"
    )


def unit_rows(progress: RunState, units: Mapping[str, Units]) -> list[dict]:
    """What is left of each layer: units in a run that removes units, single weights otherwise."""
    if units:
        rows = [(key, group.kind, len(progress.kept[key]), group.count) for key, group in units.items()]
    else:
        rows = [(name, "weight", int(mask.count_nonzero()), mask.numel()) for name, mask in progress.masks.items()]
    return [dict(zip(("state", "layer", "kind", "kept", "total"), (progress.state, *row), strict=True)) for row in rows]


def states_table(rows: Sequence[Mapping], finish: int | None = None) -> str:
    """The table that a run ends with; `finish` is the state as which a finish counts."""

    def percent(key: str):
        return lambda row: f"{100 * row[key]:.2f}%" if row.get(key, "") != "" else "-"

    repaired = any(row.get("accuracy_after_repair", "") != "" for row in rows)
    columns = {
        "state": lambda row: "finish" if row["state"] == finish else row["state"],
        "density": percent("density"),
        **cost_columns(rows[0]),
        "before cut": percent("accuracy_before_cut"),
        "after cut": percent("accuracy_after_cut"),
        **({"repaired": percent("accuracy_after_repair")} if repaired else {}),
        "trained": percent("accuracy_trained"),
        "best": percent("best_accuracy"),
        "test": percent("test_accuracy"),
    }
    if "test_top5" in rows[0]:
        columns["top-5"] = percent("test_top5")
    return format_table(rows, {**columns, "seconds": lambda row: f"{row['seconds']:.0f}"})


def cost_columns(row: Mapping) -> dict:
    """Columns of a table for what a family's `cost` counts in this row."""
    units = [kind for kind in ("blocks", "branches", "heads", "neurons", "filters") if kind in row]
    columns = {kind: lambda row, kind=kind: f"{row[kind]:,}" for kind in units}
    columns["parameters"] = lambda row: f"{row['parameters']:,}"
    columns["MACs"] = lambda row: f"{row['macs'] / 1e9:.4f} G"
    return columns
