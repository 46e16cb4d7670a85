"""Sensitivity: the trained network in, the loss that each layer alone costs by the share of its units that goes, out.

For every layer and some counts of its units, the lowest-scored units of that layer alone are cut, and repaired where
the run repairs. The loss of a fixed set of training images is measured in the run's precision, as Li et al., "Pruning
Filters for Efficient ConvNets", ICLR 2017, do for filters. The images are the first ones of the training split, whose
order holds the classes in their proportions: `--score_batches` batches without augmentation. They train, and none of
them validates.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from engine.repairing import Repairer, repairs
from pruning.budget import Levels
from pruning.curves import Curve, probed_counts
from pruning.ranking import best_first
from pruning.scores import evaluating
from pruning.units import unit_masks
from utils import RunError, autocast, write_text

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
        run.write(_add, path, found)
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
    sums, tensors = torch.zeros(len(probes), 3, dtype=torch.float64), _probe_tensors(run, ranked, probes)
    total = len(probes) * min(run.args.score_batches, run.train_data.steps_per_epoch)
    begun, said = time.perf_counter(), False
    quiet = not sys.stdout.isatty()
    bar = tqdm(total=total, desc="sensitivity", unit=" probes", leave=False, disable=quiet)
    with evaluating(run.dense), bar:
        for images, labels in run.train_data.sequential(run.args.score_batches, whole=False):
            images, labels = images.to(run.dtype), labels.cpu()
            whole = None  # with nothing removed all layers' probes are the same
            for index, (key, count) in enumerate(probes):
                bar.update()
                nothing_goes = count == len(ranked[key])
                if nothing_goes and whole is not None:
                    sums[index] += whole
                    continue
                # autocast keeps its copies of the weights to its end, and these are others in every probe
                with _holding(run.dense, tensors(key, count)), autocast(run.device, run.precision):
                    logits = run.dense(images).cpu().double()
                loss, right = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
                seen = torch.stack([torch.tensor(float(len(labels))), loss, right.double()]).double()
                sums[index] += seen
                whole = seen if nothing_goes else whole
                if not said:
                    seconds, said = total * (time.perf_counter() - begun), True
                    log.info(f"sensitivity: {total} probes, one batch of images each, about {seconds:.0f} s")
    return run.processes.sum_(sums)


def _probe_tensors(
    run: Run, ranked: Mapping[str, Sequence[int]], probes: Sequence[tuple[str, int]]
) -> Callable[[str, int], dict[str, Tensor]]:
    """What gives the tensors of `run.dense` that are other ones when a layer keeps so many of its units.

    Repaired ones are solved once for all batches of images: of each probe the layer that reads its units is held.
    """
    parameters = dict(run.dense.named_parameters())

    def cut(key: str, count: int) -> dict[str, Tensor]:
        masks = unit_masks({key: run.units[key]}, {key: ranked[key][:count]}, parameters)
        return {name: parameters[name].detach() * mask for name, mask in masks.items()}

    if not repairs(run):
        return cut
    repairer, solved = Repairer(run), {}
    for key, count in probes:
        if count < len(ranked[key]):
            found = repairer.repair({key: run.units[key]}, {key: sorted(ranked[key][:count])}, {}).tensors
            solved[key, count] = {name: value for name, value in found.items() if name not in cut(key, count)}
            reader = run.units[key].reader
            if reader is not None:
                solved[key, count] |= {n: v for n, v in found.items() if n == f"{reader.layer}.weight"}
    return lambda key, count: cut(key, count) | solved.get((key, count), {})


@contextlib.contextmanager
def _holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these tensors inside the block; the very same ones as before afterwards."""
    own = model.state_dict()
    saved = {name: own[name].clone() for name in tensors}
    try:
        for name, value in tensors.items():
            own[name].copy_(value)
        yield
    finally:
        for name, value in saved.items():
            own[name].copy_(value)


def _fingerprint(run: Run, ranked: Mapping[str, Sequence[int]], probes: Sequence[tuple[str, int]]) -> str:
    """Of all that decides the curves: weights, which units are probed, how many images are seen, and how."""
    decides = [run.args.score_batches, run.images_a_step, ranked, probes]
    decides += [run.args.repair, run.args.repair_images] if repairs(run) else []
    decides += [str(run.precision)] if run.precision else []
    digest = hashlib.sha256(json.dumps(decides).encode())
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
