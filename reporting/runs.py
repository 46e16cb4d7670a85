"""What a run left in its folder: from the path of a folder to a `Run` of plain values, or a line naming the damage."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from utils import RunError

METHODS = {
    "rsst": ("RSST", "what is chosen shrinks under a growing penalty while the state trains, then it is cut"),
    "refill": ("Refill", "what is chosen is cut before the state trains, and surviving units are whole"),
    "imp": ("IMP", "iterative magnitude pruning, the lottery-ticket baseline: cut before the state trains"),
    "oneshot": ("One-shot", "all units go at once after the dense state"),
    "dense": ("Dense", "nothing is pruned"),
}
COUNTS = ("heads", "neurons", "filters")  # a ViT has the first two, a CNN the last


@dataclass
class Run:
    """The files of one run as plain values; accuracies, densities and residuals are fractions, absent cells NaN."""

    folder: Path
    args: dict
    environment: dict
    history: list[dict]  # a row an epoch
    states: list[dict]  # a row a state
    units: list[dict]  # a row per state and layer; empty for older runs
    penalty: list[dict]  # many rows per state in which something is doomed, up to its cut; empty for older runs
    sensitivity: list[dict]  # of sensitivity.json, a state each; empty where nothing was probed
    config: dict  # of model/, empty when not exported
    proof: dict
    latency: str
    onnx: list[dict]  # of model/onnx.csv, a row a file; empty when none was quantised
    timed: dict[str, float]  # what a run by milliseconds ended with, of latency.json; empty before and without

    @property
    def name(self) -> str:
        return " ".join(self.folder.resolve().name.split())

    @property
    def method(self) -> str:
        return method_of(self.args)

    @property
    def length(self) -> tuple[int, int]:
        """States, and epochs of each."""
        states, epochs = self.args["pruning_times"], self.args["epochs"]
        return (1, states * epochs) if self.args["struct"] == "dense" else (states, epochs)

    @property
    def finish_epochs(self) -> int:
        """Of the finish behind the last state; 0 without one."""
        return self.args.get("finish_epochs") or 0

    @property
    def finish(self) -> int | None:
        """The number as which the finish counts among the states; None without one."""
        return self.length[0] if self.finish_epochs else None

    @property
    def finished(self) -> bool:
        return len(self.states) >= self.length[0] + bool(self.finish_epochs)

    @property
    def seconds(self) -> float:
        """Of training, over all states begun."""
        done = {row["state"] for row in self.states}
        rows = [*self.states, *(row for row in self.history if row["state"] not in done)]
        return sum(row["seconds"] for row in rows if math.isfinite(row.get("seconds", math.nan)))

    @property
    def has_top5(self) -> bool:
        """Whether its top-5 accuracy was measured, as it is for data sets of many classes."""
        return any(math.isfinite(row.get("test_top5", math.nan)) for row in self.states)

    @property
    def counts(self) -> list[str]:
        """Kinds of units that its tables count."""
        return [name for name in COUNTS if any(name in row for row in [*self.states, *self.history])]


def method_of(args: Mapping) -> str:
    """Key of METHODS, or whatever --struct was; a single state of any method is dense training."""
    return "dense" if args["pruning_times"] == 1 else str(args["struct"])


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
        _read(folder / "penalty.csv", _parse_penalty, []),
        _read(folder / "sensitivity.json", _parse_sensitivity, []),
        _read(folder / "model" / "config.json", _parse_object, {}),
        _read(folder / "model" / "parity.json", _parse_object, {}),
        _read(folder / "model" / "latency.txt", str.rstrip, ""),
        _read(folder / "model" / "onnx.csv", _parse_onnx, []),
        _read(folder / "latency.json", _parse_timed, {}),
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
        if not isinstance(args[name], int) or args[name] < (name != "epochs"):
            raise ValueError(f"{name} is {args[name]!r}")
    if not isinstance(args.get("finish_epochs"), int | None):
        raise ValueError(f"finish_epochs is {args['finish_epochs']!r}")
    numbers = ("fillback_rate", "finish_lr", "lr", "mlp_prune_ratio", "rate", "reg_finish")
    for name in (*numbers, "target_macs", "target_params", "target_latency_ms"):
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


def _parse_penalty(text: str) -> list[dict]:
    rows = _parse_rows(text, whole=("state", "step"), words=())
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("epoch", "lambda", "residual") if name not in row]
        if missing or not math.isfinite(row["epoch"]):
            raise ValueError(f"row {number} has no {' and no '.join(missing or ['epoch'])}")
    return rows


def _parse_sensitivity(text: str) -> list[dict]:
    states = _parse_object(text)["states"]
    for layer in (layer for state in states for layer in state["layers"]):
        lengths = {len(layer[name]) for name in ("left", "loss", "accuracy")}
        if len(lengths) > 1 or 0 in lengths or not layer["units"] >= layer["left"][0]:
            raise ValueError(f"the curve of {layer['layer']} has gaps")
    return states


def _parse_timed(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in _parse_object(text).get("model", {}).items()}


def _parse_onnx(text: str) -> list[dict]:
    rows = _parse_rows(text, whole=(), words=("model",))
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("megabytes", "test_accuracy") if name not in row]
        if missing:
            raise ValueError(f"row {number} has no {' and no '.join(missing)}")
    return rows


def _numbers(row: Mapping, whole: Sequence[str], words: Sequence[str]) -> dict:
    """Cells as numbers, NaN where empty; `whole` columns must be there as integers and `words` as text."""
    parsed = {
        name: math.nan if value in (None, "") else float(value) for name, value in row.items() if name not in words
    }
    return parsed | {name: int(parsed[name]) for name in whole} | {name: str(row[name]) for name in words}
