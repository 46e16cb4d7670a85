"""`--repair`: at a run's cut the weights that stay take over what the removed ones did; see pruning/repair.py.

A repair is a function of the weights before the cut and of the first `--repair_images` of the training split, shown
without augmentation, whose order holds the classes in their proportions; so a killed run repairs again as it did.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataset import first_images, make_batches
from families.resnet import shifts
from pruning.masks import Masks, full_masks, structured_masks
from pruning.moments import Moments
from pruning.repair import Repair, repaired_tensors
from pruning.units import Kept, Units
from utils import weights_of

if TYPE_CHECKING:
    from engine.checkpoint import Target
    from engine.run import Run

log = logging.getLogger(__name__)

_BATCH = 64  # images that each process shows the network at a time


class _Images:
    """A process's share of the first `--repair_images`, in batches that can be gone through again."""

    def __init__(self, run: Run):
        split, size = first_images(run.splits.train, run.args.repair_images), _BATCH * run.processes.size
        share, workers = run.processes.share, run.args.workers
        self.data = make_batches(split, run.facts, size, run.device, workers=workers, share=share)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.sequential(whole=False)


def repairs(run: Run) -> bool:
    return run.args.repair in ("mean", "ls")


class Repairer:
    """Repairs of the network that `run.dense` holds now.

    Statistics of what layers read are collected when they are first needed, and kept.
    """

    def __init__(self, run: Run):
        self.run, self.images = run, _Images(run)
        self.known: dict[str, Moments] = {}

    def repair(self, units: Mapping[str, Units], kept: Kept, masks: Masks) -> Repair:
        """As `pruning.repair.repaired_tensors`; of several processes all get the first one's tensors."""
        run = self.run
        total = run.processes.sum_ if run.processes.several else None
        found = repaired_tensors(
            run.dense, units, kept, self.images, how=run.args.repair, masks=masks, shifts=shifts(run.dense),
            total=total, known=self.known,
        )  # fmt: skip
        run.processes.spread_(found.tensors.values())
        return found


def repaired_at_start(run: Run, target: Target) -> dict[str, Tensor]:
    """Before a cut at the start of a state: the tensors of `run.dense`, by name, that are other ones once it is cut and
    repaired; none where the run does not repair, or nothing goes that is still there."""
    progress, (masks, kept) = run.progress, target
    if run.args.struct == "refill" and not run.units:
        masks = progress.elementwise  # what refill gives back starts at zero
    same = kept == progress.kept and all(torch.equal(mask, progress.masks[name]) for name, mask in masks.items())
    return {} if same else _repaired(run, masks, kept)


def repair_in_state(run: Run) -> float | None:
    """RSST's cut: `run.dense`, and the average of its weights, are cut and repaired.

    Returns:
        validation accuracy of what the state selects from, cut without repair; None where the run does not repair.
    """
    masks, kept = run.progress.target, run.progress.target_kept
    new = _repaired(run, masks, kept)
    if not new:
        return None
    last, average = weights_of(run.dense), {}
    if run.average:
        run.dense.load_state_dict(run.average)
        average = _repaired(run, masks, kept)
        run.dense.load_state_dict(last)
    with torch.no_grad():
        for name, mask in run.parameter_masks(masks, kept).items():
            run.dense.get_parameter(name).mul_(mask)
    accuracy = run.selected_accuracy(run.parameter_masks(masks, kept))
    run.dense.load_state_dict(new, strict=False)
    run.average = {**run.average, **average}
    return accuracy


def _repaired(run: Run, masks: Masks, kept: Kept) -> dict[str, Tensor]:
    if not repairs(run):
        return {}
    units, weights = run.units, run.prunable()
    whole = structured_masks(weights, units, kept) if units else full_masks(weights)
    single = {name: mask for name, mask in masks.items() if not torch.equal(mask.bool(), whole[name].bool())}
    if single:  # behind a norm over units their removal cannot be solved together with that of single weights
        units = {key: replace(g, reader=None) if g.reader and g.reader.norm else g for key, g in units.items()}
    found = Repairer(run).repair(units, kept, single)
    for line in found.lines():
        log.info("%s", line)
    return found.tensors
