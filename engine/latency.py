"""Milliseconds: networks in, what they take and which layers take it out; measured on the run's own device.

    table = measure_table(model, units, batch, lowest)   # base and layers by counts of units: plain values, for a file
    cost = table_cost(table)                             # a cost of counts, as pruning/budget.py asks for it
    record = meet(wanted, allocate, cost, measure)       # counts whose real network takes that long

Layers are timed alone, with the inputs that they see in the network, at a few counts of units each; in between the cost
is taken as linear. What that gets wrong is corrected by the time of the whole small network.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from families import family_of
from pruning.budget import Cost, Counts
from pruning.removal import remove_units
from pruning.scores import evaluating
from pruning.units import Units
from utils import RunError, cause, write_text

FILE = "latency.json"
REPEATS, SECONDS = 15, 5.0
WITHIN = 0.05  # of a target in milliseconds
ROUNDS = 6


def medians(
    calls: Mapping[Hashable, Callable[[], object]],
    device: torch.device,
    repeats: int = REPEATS,
    seconds: float = SECONDS,
) -> dict[Hashable, float]:
    """Median seconds of each call, which take turns, after a warm-up of each.

    Repeats stop early once `seconds` have passed, but each call is timed at least once.
    """

    def timed(call: Callable[[], object]) -> float:
        _synchronise(device)
        started = time.perf_counter()
        call()
        _synchronise(device)
        return time.perf_counter() - started

    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timed(call)
    begun = time.perf_counter()
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(timed(call))
        if time.perf_counter() - begun > seconds:
            break
    return {name: statistics.median(spent) for name, spent in times.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _images(model: nn.Module, batch: int) -> Tensor:
    like, size = next(model.parameters()), family_of(model).image_size(model)
    # of a generator of its own: the run draws what it would draw without
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(like)


@torch.no_grad()
def small_ms(
    model: nn.Module, units: Mapping[str, Units], counts: Mapping[str, int], batch: int
) -> tuple[float, float]:
    """Milliseconds for `batch` images of the physically small network with so many units left, and of `model`."""
    kept = {key: range(count) for key, count in counts.items()}
    small, images = remove_units(copy.deepcopy(model), units, kept), _images(model, batch)
    with evaluating(model), evaluating(small):
        found = medians({"small": partial(small, images), "dense": partial(model, images)}, images.device)
    return 1000 * found["small"], 1000 * found["dense"]


# ------------------------------------------------------------------------------------------------- layer by layer


@torch.no_grad()
def measure_table(model: nn.Module, units: Mapping[str, Units], batch: int, lowest: Mapping[str, int]) -> dict:
    """What a forward pass of `batch` images takes: the dense network, and each layer at five counts of its units from
    `lowest` to all; layers of equal shape are measured once."""
    images, paths = _images(model, batch), {key: _path(key, group) for key, group in units.items()}
    layers, measured = {}, {}
    with evaluating(model):
        inputs = _inputs_of(model, set(paths.values()), images)
        dense = 1000 * medians({"": partial(model, images)}, images.device)[""]
        for key, group in units.items():
            path, (arguments, named) = paths[key], inputs[paths[key]]
            span = group.count - lowest[key]
            counts = sorted({lowest[key] + span * quarter // 4 for quarter in range(5)})
            module = model.get_submodule(path)
            shapes = [tuple(tensor.shape) for tensor in (*module.state_dict().values(), *_tensors(arguments, named))]
            like = type(module), key.removeprefix(path), str(shapes), str(counts)
            if like not in measured:
                measured[like] = _layer_ms(model, {key: group}, counts, path, arguments, named)
            layers[key] = {"counts": counts, "ms": measured[like]}
    return {
        "batch": batch,
        "device": str(images.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dense_ms": dense,
        "base_ms": dense - sum(layer["ms"][-1] for layer in layers.values()),
        "layers": layers,
        "states": {},
    }


def _path(key: str, group: Units) -> str:
    """The module whose time depends on these units: their own, or the one that holds all that is cut out with them."""
    names = [name.split(".") for name, _ in group.cut_out]
    return key if not names else group.module or ".".join(os.path.commonprefix(names))


def _inputs_of(model: nn.Module, paths: set[str], images: Tensor) -> dict[str, tuple[tuple, dict]]:
    """The arguments that the modules are called with, of one forward pass."""
    found = {}
    with contextlib.ExitStack() as hooks:
        for path in paths:

            def see(_, arguments: tuple, named: dict, path: str = path) -> None:
                found[path] = arguments, named

            handle = model.get_submodule(path).register_forward_pre_hook(see, with_kwargs=True)
            hooks.callback(handle.remove)
        model(images)
    return found


def _tensors(arguments: tuple, named: dict) -> list[Tensor]:
    return [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]


def _layer_ms(model, units, counts, path, arguments, named) -> list[float]:
    """Milliseconds of a module at each count of these units, none less than at a smaller count."""
    ((key, _),) = units.items()
    calls = {}
    for count in counts:
        small = remove_units(copy.deepcopy(model), units, {key: range(count)})
        calls[count] = partial(small.get_submodule(path), *arguments, **named)
    found = medians(calls, next(model.parameters()).device)
    return np.maximum.accumulate([1000 * found[count] for count in counts]).tolist()


def table_cost(table: Mapping) -> Cost:
    """Milliseconds of a network by counts of units that are left, as the table has them."""

    def cost(counts: Mapping[str, int]) -> float:
        layers = table["layers"].items()
        whole = {key: layer["counts"][-1] for key, layer in layers}
        return table["base_ms"] + sum(
            float(np.interp((whole | counts)[key], layer["counts"], layer["ms"])) for key, layer in layers
        )

    return cost


# ------------------------------------------------------------------------------------------------ until it is met


def meet(
    wanted: float,
    allocate: Callable[[float], Counts],
    cost: Cost,
    measure: Callable[[Counts], float],
    rounds: int = ROUNDS,
) -> dict:
    """Counts whose real network takes `wanted` milliseconds, to `WITHIN`, as the limit that `allocate` has to be given.

    Each round measures what the limit leads to; while that is off, the table's scale is corrected by it and the choice
    made again. After the last round the nearest one counts.

    Returns:
        "limit_ms" and "measured_ms" of the choice, "asked_ms", and all that was "tried".
    """
    tried, limit = [], wanted
    for _ in range(rounds):
        counts = allocate(limit)
        found = measure(counts)
        tried.append({"limit_ms": limit, "measured_ms": found})
        if abs(found - wanted) <= WITHIN * wanted:
            break
        limit = wanted * cost(counts) / found
    return {"asked_ms": wanted, **min(tried, key=lambda one: abs(one["measured_ms"] - wanted)), "tried": tried}


# ------------------------------------------------------------------------------------------------------- the file


def read_table(folder: Path) -> dict | None:
    """What was measured in this run; None where nothing was.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        table_cost(table)({})
        table["states"].keys()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({cause(error)})", code=1) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = f"damaged ({cause(error)})"
        raise RunError(f"{path}: {reason}; delete it, and it is measured again", code=1) from error
    return table


def write_table(folder: Path, table: Mapping) -> None:
    write_text(folder / FILE, json.dumps(table, indent=1) + "\n")
