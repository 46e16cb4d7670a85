"""Choosing: the trained network and the masks enforced now in, the target of the coming state out.

The target is what the state ends with: masks by layer name, and the ids of the units that are kept. Three kinds of runs
choose in three ways: single weights by magnitude, whole units by score and ratio, filters by score and density. A
budget stands in for ratio and density alike.
"""

from __future__ import annotations

import logging

from torch import Tensor

from engine.allocation import allocates, choose_by_budget, takes_all
from engine.checkpoint import Target
from engine.run import Run
from engine.sensitivity import SENSITIVITY, choose_by_sensitivity
from pruning.depth import DEPTH, depth_note, rank_branches
from pruning.masks import Masks, density, elementwise_step, refill_rows, structured_masks
from pruning.nm import nm_step, parse_pattern, scheduled_keep
from pruning.ranking import mark_removed, rank_units, scheduled_ratio, select_filters, target_ratios
from pruning.reports import units_report
from pruning.scores import CRITERIA, NotFiniteError, score_units
from pruning.units import row_units
from utils import RunError

log = logging.getLogger(__name__)


def choose_target(run: Run) -> Target:
    """Choose by the trained weights that `run.dense` holds; also moves the element-wise masks on by a step.

    Of several processes the first one's choice counts.
    """
    if run.args.struct == "oneshot" and run.progress.state > 1:
        return run.progress.target, run.progress.target_kept
    masks, kept = _choose(run)
    run.processes.spread_([*masks.values(), *run.progress.elementwise.values()])
    return masks, run.processes.from_first(kept)


def _choose(run: Run) -> Target:
    if run.args.nm:
        return _choose_of_groups(run)
    if not run.units:
        return _choose_weights(run)
    if run.family.counts_by == "density" and not allocates(run.args):
        return _choose_filters(run)
    return _choose_units(run)


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


def _choose_filters(run: Run) -> Target:
    args, progress, weights = run.args, run.progress, run.prunable()
    progress.elementwise = elementwise_step(weights, progress.elementwise, args.rate, progress.state)
    scores = _score(run, run.units)
    kept = select_filters(progress.elementwise, scores, args.fillback_rate, args.round_to)
    target = structured_masks(weights, run.units, kept)
    mask_density, trained_density = 100 * density(progress.elementwise), 100 * density(target)
    log.info(f"state {progress.state} prunes by {args.criteria}: density {mask_density:.2f}% of single weights,")
    log.info(f"  {trained_density:.2f}% in whole filters")
    _log_units(run, scores, kept, target)
    return target, kept


def _choose_units(run: Run) -> Target:
    args, progress, weights = run.args, run.progress, run.prunable()
    single = args.vit_structured and not args.refill  # weights go inside the units that stay
    if args.criteria == "remain" or single:
        alive = structured_masks(weights, run.units, progress.kept)
        progress.elementwise = elementwise_step(weights, progress.elementwise, args.rate, progress.state, alive)
    scores, kept = _choose_branches(run) if args.vit_prune_target in DEPTH else _choose_single(run)
    target = structured_masks(weights, run.units, kept)
    if single:
        pruned = {name.rpartition(".")[0] for group in run.units.values() for name in group.parts}
        target = {name: mask * progress.elementwise[name] if name in pruned else mask for name, mask in target.items()}
    log.info(f"state {progress.state} prunes by {args.criteria}:")
    _log_units(run, scores, kept, target)
    return target, kept


def _choose_single(run: Run) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    scores = mark_removed(_score(run, run.units), run.progress.kept)
    if takes_all(run.args):
        kept = choose_by_budget(run, scores, _worth_of_branches(run))
        log.info(f"state {run.progress.state}: {depth_note(kept, 'branch', kept)}")
        return scores, kept
    return scores, choose_by_budget(run, scores) if allocates(run.args) else _choose_by_ratios(run, scores)


def _worth_of_branches(run: Run) -> dict[str, Tensor]:
    """Saliency tells what all heads or neurons of a branch are worth together; the other criteria tell it of each."""
    if getattr(CRITERIA[run.args.criteria], "needs", "weights") != "gradient":
        return {}
    return _score(run, run.family.branches_as_units(run.dense))


def _choose_branches(run: Run) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    args, progress = run.args, run.progress
    schedule = "constant" if args.struct == "oneshot" else args.ratio_schedule
    ratio = scheduled_ratio(schedule, args.rate, progress.state, run.states)
    branches = run.family.branches_as_units(run.dense)
    scores = _score(run, branches)
    kept = rank_branches(branches, scores, args.vit_prune_target, ratio, progress.kept)
    log.info(f"state {progress.state}: {depth_note(branches, args.vit_prune_target, kept)}")
    return scores, kept


def _choose_by_ratios(run: Run, scores: dict[str, Tensor]) -> dict[str, list[int]]:
    args = run.args
    schedule = "constant" if args.struct == "oneshot" else args.ratio_schedule
    ratios = {
        kind: scheduled_ratio(schedule, ratio, run.progress.state, run.states)
        for kind, ratio in target_ratios(args.vit_prune_target, args.rate, args.mlp_prune_ratio).items()
    }
    if args.ratio_allocation == SENSITIVITY:
        return choose_by_sensitivity(run, scores, ratios)
    options = (args.sorting_mode, args.min_units, args.rank_by, args.round_to)
    return rank_units(run.dense, run.units, scores, ratios, *options)


def _log_units(run: Run, scores: dict[str, Tensor], kept: dict[str, list[int]], target: Masks) -> None:
    before = run.progress
    log.info(units_report(run.dense, run.units, scores, before.kept, kept, before.masks, target, run.family.cost))


def _score(run: Run, units: dict) -> dict[str, Tensor]:
    args, progress = run.args, run.progress
    images = run.train_data.sequential(args.score_batches, whole=False)
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
