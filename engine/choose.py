"""Choosing: the trained network and the masks enforced now in, the target of the coming state out.

The target is what the state ends with: masks by layer name, and the ids of the units that are kept. Single weights are
chosen by magnitude, in N:M runs in their groups; whole units by score, as many as `allocation.Allocation` says.
"""

from __future__ import annotations

import logging

from torch import Tensor

from engine.checkpoint import Target
from engine.run import Run
from pruning.masks import density, elementwise_step, refill_rows, structured_masks
from pruning.nm import nm_step, parse_pattern, scheduled_keep
from pruning.ranking import mark_removed
from pruning.reports import units_report
from pruning.scores import CRITERIA, NotFiniteError, score_units
from pruning.units import row_units
from settings.effect import takes_all
from utils import RunError

log = logging.getLogger(__name__)


def choose_target(run: Run) -> Target:
    """Choose by the trained weights that `run.dense` holds; also moves the element-wise masks on by a step.

    Of several processes the first one's choice counts.
    """
    if run.args.struct == "oneshot" and run.progress.state > 1:
        return run.progress.target, run.progress.target_kept
    masks, kept = _choose(run)
    run.processes.broadcast_([*masks.values(), *run.progress.elementwise.values()])
    return masks, run.processes.from_first(kept)


def _choose(run: Run) -> Target:
    if run.args.nm:
        return _choose_of_groups(run)
    return _choose_units(run) if run.units else _choose_weights(run)


def _choose_weights(run: Run) -> Target:
    args, progress, weights = run.args, run.progress, run.prunable()
    progress.elementwise = target = elementwise_step(weights, progress.elementwise, args.rate, progress.state)
    if args.fillback_rate and args.struct in ("refill", "rsst"):
        rows = row_units({name: run.dense.get_submodule(name) for name in weights})
        target = refill_rows(target, _score(run, rows), args.fillback_rate)
    mask_density, trained_density = 100 * density(progress.elementwise), 100 * density(target)
    log.info(f"state {progress.state} prunes to density {mask_density:.2f}%, trains {trained_density:.2f}%")
    return target, {}


def _choose_of_groups(run: Run) -> Target:
    args, progress = run.args, run.progress
    keep, group = parse_pattern(args.nm)
    keep = scheduled_keep(keep, group, args.ratio_schedule, progress.state, run.states)
    progress.elementwise = target = nm_step(run.prunable(), progress.elementwise, keep, group)
    log.info(f"state {progress.state} prunes to {keep}:{group}, density {100 * density(target):.2f}%")
    return target, {}


def _choose_units(run: Run) -> Target:
    args, progress, weights, allocation = run.args, run.progress, run.prunable(), run.allocation
    single = args.vit_structured and not args.refill  # weights are pruned inside the units that are kept
    if allocation.by_density or args.criteria == "remain" or single:
        alive = None if allocation.by_density else structured_masks(weights, run.units, progress.kept)
        progress.elementwise = elementwise_step(weights, progress.elementwise, args.rate, progress.state, alive)
    scores = _score(run, run.family.branches_as_units(run.dense) if allocation.by_branch else run.units)
    if not (allocation.by_branch or allocation.by_density):
        scores = mark_removed(scores, progress.kept)
    kept = allocation.choose(progress.state, scores, progress.kept, run, _worth_of_branches(run))
    target = structured_masks(weights, run.units, kept)
    if single:
        pruned = {name.rpartition(".")[0] for group in run.units.values() for name in group.parts}
        target = {name: mask * progress.elementwise[name] if name in pruned else mask for name, mask in target.items()}
    log.info(f"state {progress.state} prunes by {args.criteria}: density {100 * density(target):.2f}%")
    if said := allocation.said(progress.state, kept):
        log.info(said)
    before = progress
    log.info(units_report(run.dense, run.units, scores, before.kept, kept, before.masks, target, run.family.cost))
    return target, kept


def _worth_of_branches(run: Run) -> dict[str, Tensor] | None:
    """Saliency tells what all heads or neurons of a branch are worth together; the other criteria tell it of each."""
    gradient = getattr(CRITERIA[run.args.criteria], "needs", "weights") == "gradient"
    return _score(run, run.family.branches_as_units(run.dense)) if takes_all(vars(run.args)) and gradient else None


def _score(run: Run, units: dict) -> dict[str, Tensor]:
    args, progress = run.args, run.progress
    images = run.round.data.sequential(args.score_batches, whole=False)
    options = {"batches": images, "max_batches": args.score_batches, "seed": args.seed}
    if run.processes.several:
        options["total"] = run.processes.sum_
    try:
        return score_units(run.dense, units, args.criteria, mask=progress.elementwise, **options)
    except NotFiniteError as error:  # activations that overflow
        raise RunError(
            f"state {progress.state}: the trained network is not finite ({error}); start anew with a lower --lr or "
            "with --clip_grad 1",
            code=1,
        ) from error
