"""Sensitivity: the trained network in, the loss that each layer alone costs by the share of its units that goes, out.

For every layer and some counts of its units, the lowest-scored units of that layer alone are set to zero and the loss
of a fixed set of training images is measured, as Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, do for
filters. The images are the first ones of the training split, whose order holds the classes in their proportions:
`--score_batches` batches without augmentation. They train, and none of them validates.

The curves of every state stand in sensitivity.json. What stands there for the same weights and ranking is read, not
measured, so that a killed run chooses what it chose before, whatever the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pruning.budget import Levels
from pruning.curves import Curve, probed_counts
from pruning.ranking import best_first
from pruning.scores import evaluating
from pruning.units import Units, unit_masks
from utils import RunError, write_text

if TYPE_CHECKING:
    from engine.run import Run

log = logging.getLogger(__name__)

FILE = "sensitivity.json"


def sensitivity_curves(run: Run, scores: Mapping[str, Tensor], levels: Levels) -> dict[str, Curve]:
    """{units key: (units left, loss), descending} of the network that the state before has trained.

    Args:
        scores: float64 [count] per units key, -inf for units that are gone.
        levels: what each layer may keep, descending, from what it has.

    Raises:
        RunError: a loss that is not finite.
    """
    ranked = {key: best_first(value).tolist() for key, value in scores.items()}
    probes = [(key, count) for key, steps in levels.items() for count in probed_counts(steps)]
    path, state, key = run.save_dir / FILE, run.progress.state, ""
    found = None
    if run.processes.first:
        key = _fingerprint(run, ranked, probes)
        found = next((row for row in _read(path) if (row["state"], row["of"]) == (state, key)), None)
    found = run.processes.from_first(found)
    if found is None:
        found = {"state": state, "of": key, **_measure(run, ranked, probes)}
        run.processes.on_first(_add, path, found)
    else:
        log.info(f"sensitivity: the curves of state {state} are those in {FILE}")
    return {row["layer"]: list(zip(row["left"], row["loss"], strict=True)) for row in found["layers"]}


def _measure(run: Run, ranked: Mapping[str, Sequence[int]], probes: Sequence[tuple[str, int]]) -> dict:
    """What sensitivity.json holds of a state: images, and by layer units left, loss and accuracy."""
    begun = time.perf_counter()
    sums = _sums(run, ranked, probes)
    images = int(sums[0, 0])
    if not sums.isfinite().all():
        raise RunError(
            f"state {run.progress.state}: the trained network is not finite where units go; start anew with a "
            "lower --lr or with --clip_grad 1",
            code=1,
        )
    layers = {
        key: {"layer": key, "kind": group.kind, "units": group.count, "left": [], "loss": [], "accuracy": []}
        for key, group in run.units.items()
    }
    for (key, count), (_, loss, right) in zip(probes, sums.tolist(), strict=True):
        row = layers[key]
        row["left"].append(count)
        row["loss"].append(loss / images)
        row["accuracy"].append(right / images)
    seconds = time.perf_counter() - begun
    log.info(f"sensitivity: {len(probes)} probes of {len(layers)} layers, {images:,} images each, {seconds:.1f} s")
    return {"images": images, "layers": list(layers.values())}


@torch.no_grad()
def _sums(run: Run, ranked: Mapping[str, Sequence[int]], probes: Sequence[tuple[str, int]]) -> Tensor:
    """float64 [probes, 3]: images, summed loss and images classified right, of all processes."""
    sums = torch.zeros(len(probes), 3, dtype=torch.float64)
    total = len(probes) * min(run.args.score_batches, run.round.steps_per_epoch)
    begun, said = time.perf_counter(), False
    quiet = not sys.stdout.isatty()
    bar = tqdm(total=total, desc="sensitivity", unit=" probes", leave=False, disable=quiet)
    with evaluating(run.dense), bar:
        for images, labels in run.round.data.sequential(run.args.score_batches, whole=False):
            images, labels = images.to(run.dtype), labels.cpu()
            whole = None  # with nothing removed all layers' probes are the same
            for index, (key, count) in enumerate(probes):
                bar.update()
                nothing_goes = count == len(ranked[key])
                if nothing_goes and whole is not None:
                    sums[index] += whole
                    continue
                with _without(run.dense, {key: run.units[key]}, {key: ranked[key][:count]}):
                    logits = run.dense(images).cpu().double()
                loss, right = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
                seen = torch.stack([torch.tensor(float(len(labels))), loss, right.double()]).double()
                sums[index] += seen
                whole = seen if nothing_goes else whole
                if not said:
                    seconds, said = total * (time.perf_counter() - begun), True
                    log.info(f"sensitivity: {total} probes, one batch of images each, about {seconds:.0f} s")
    return run.processes.sum_(sums)


@contextlib.contextmanager
def _without(model: nn.Module, units: Mapping[str, Units], kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """The model with the other units at zero inside the block; the very same weights afterwards."""
    parameters = dict(model.named_parameters())
    masks = unit_masks(units, kept, parameters)
    saved = {name: parameters[name].detach().clone() for name in masks}
    try:
        for name, mask in masks.items():
            parameters[name].mul_(mask)
        yield
    finally:
        for name, value in saved.items():
            parameters[name].copy_(value)


def _fingerprint(run: Run, ranked: Mapping[str, Sequence[int]], probes: Sequence[tuple[str, int]]) -> str:
    """Of all that decides the curves: weights, which units are probed, how many images are seen."""
    digest = hashlib.sha256(json.dumps([run.args.score_batches, run.round.images_per_step, ranked, probes]).encode())
    for name, value in run.dense.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> list[dict]:
    """The states that the file holds; none where there is no file, or no whole one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["states"]
    except (OSError, KeyError, TypeError, ValueError):
        return []


def _add(path: Path, row: dict) -> None:
    """Write this state's curves behind those of the states before it."""
    states = [other for other in _read(path) if other["state"] < row["state"]] + [row]
    write_text(path, json.dumps({"states": states}, indent=1) + "\n")
