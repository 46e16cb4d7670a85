"""Heads and neurons together: which of them a state keeps, ranked in two pools or in one by cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from vit_pruning_utils import (
    Masks,
    check_masks,
    count_kept,
    density,
    load_and_mask,
    prunable_weights,
    structured_masks,
)
from vit_structured_pruning import (
    Kept,
    Units,
    best_first,
    keep_count,
    score_units,
    select_units,
    unit_macs,
    vit_cost,
    vit_units,
)

KINDS = {"head": ("head",), "mlp": ("neuron",), "both": ("head", "neuron")}


def target_ratios(vit_prune_target: str, head_ratio: float, mlp_ratio: float | None) -> dict[str, float]:
    """{"head": fraction, "neuron": fraction} of a prune target; neurons go by `mlp_ratio` or else `head_ratio`."""
    ratios = {"head": head_ratio, "neuron": head_ratio if mlp_ratio is None else mlp_ratio}
    return {kind: ratios[kind] for kind in KINDS[vit_prune_target]}


def rank_units(
    model: nn.Module,
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    sorting_mode: str = "layer-wise",
    min_units: int = 1,
    rank_by: str = "score",
) -> dict[str, list[int]]:
    """Which units stay: {units key: ids}, for every kind that `ratios` names.

    Heads and neurons are two pools, each pruned to its own ratio of all its units. With `rank_by` "score_per_mac"
    and global sorting they merge: units go in ascending order of score / MACs until the MACs of both quotas are gone.
    Layer by layer it changes nothing: there all units of a kind cost the same.

    Args:
        model: the dense model, for what a unit costs.
        scores: float64 [count] per key; -inf marks units that are gone.
    """
    pools = {kind: {key: scores[key] for key in units if units[key].kind == kind} for kind in ratios}
    if rank_by == "score_per_mac" and sorting_mode == "global":
        return _rank_by_cost(model, units, pools, ratios, min_units)
    kept = {}
    for kind, pool in pools.items():
        kept.update(select_units(pool, ratios[kind], sorting_mode, min_units))
    return kept


def _rank_by_cost(model, units, pools, ratios, min_units) -> dict[str, list[int]]:
    quota, entries, kept = 0, [], {}
    for kind, pool in pools.items():
        count = sum(map(len, pool.values()))
        gone = count - keep_count(count, ratios[kind], len(pool) * min_units)
        quota += gone * unit_macs(model, units[next(iter(pool))])  # a kind costs the same in every layer
    for key, group in units.items():
        if group.kind in pools:
            scores, cost = pools[group.kind][key], unit_macs(model, group)
            order = best_first(scores).tolist()
            quota -= (len(scores) - len(order)) * cost  # units of earlier states have paid already
            kept[key] = set(order)
            if ratios[group.kind] > 0:  # 0 leaves a kind alone
                entries += [(float(scores[unit]) / cost, cost, key, unit) for unit in sorted(order[min_units:])]
    # of equal values the first one stays, hence the later one goes first
    for _, (_, cost, key, unit) in sorted(enumerate(entries), key=lambda entry: (entry[1][0], -entry[0])):
        if quota <= 0:
            break
        kept[key].remove(unit)
        quota -= cost
    return {key: sorted(ids) for key, ids in kept.items()}


def mark_removed(scores: Mapping[str, Tensor], kept: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """Scores in which units that are not in `kept` are -inf, so that a removed unit stays removed."""
    marked = {}
    for key, value in scores.items():
        marked[key] = value.clone()
        if key in kept:
            alive = set(kept[key])
            marked[key][[unit for unit in range(len(value)) if unit not in alive]] = -math.inf
    return marked


def units_report(
    model: nn.Module,
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    kept_before: Mapping[str, list[int]],
    kept_after: Mapping[str, list[int]],
    masks_before: Masks,
    masks_after: Masks,
    cost: Callable[[nn.Module, Kept], dict[str, int]] = vit_cost,
) -> str:
    """What a step does to the units, as text: a line per layer, then totals.

    Args:
        model: the dense one.
        cost: counts the units of each kind and the parameters, as `vit_cost` does.
    """
    lines = []
    for key, group in units.items():
        before, after = kept_before[key], kept_after[key]
        layers = {name.rpartition(".")[0] for name in group.parts} & masks_after.keys()
        sparsity = [
            100 * (1 - density({name: masks[name] for name in layers})) for masks in (masks_before, masks_after)
        ]
        values = scores[key].tolist()
        if group.kind == "head":
            detail = f"kept {after}, scores {' '.join(f'{value:.4g}' for value in values)}"
        else:
            stay = [values[unit] for unit in after]
            gone = [values[unit] for unit in set(before) - set(after)]
            detail = f"lowest kept score {min(stay):.4g}" if stay else "none kept"
            detail += f", highest removed {max(gone):.4g}" if gone else ""
        lines.append(
            f"  {key:<15} {group.kind + 's':>7} {len(before):>4} -> {len(after):<4} "
            f"sparsity {sparsity[0]:6.2f}% -> {sparsity[1]:6.2f}%  {detail}"
        )
    old, new = cost(model, kept_before), cost(model, kept_after)
    attention = [name for name in masks_after if ".attn." in name]
    totals = f"  {len(masks_after)} masks"
    if attention:
        totals += f": {len(attention)} attention, {len(masks_after) - len(attention)} MLP"
    for kind in ("heads", "neurons", "filters"):
        if kind in old:
            totals += f"; {kind} {old[kind]:,} -> {new[kind]:,}"
    lines.append(totals)
    for title, layers in (("attention", attention), ("prunable", list(masks_after))):
        if layers:
            counts = [count_kept({name: masks[name] for name in layers}) for masks in (masks_before, masks_after)]
            lines.append(f"  {title} weights {counts[0]:,} -> {counts[1]:,}")
    lines.append(f"  parameters {old['parameters']:,} -> {new['parameters']:,}")
    return "\n".join(lines)


def prune_model_custom_fillback_vit_head_and_mlp(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    train_loader: Iterable | None,
    trained_weight: Mapping[str, Tensor],
    init_weight: Mapping[str, Tensor],
    criteria: str = "l1",
    head_prune_ratio: float = 0.2,
    mlp_prune_ratio: float = 0.2,
    return_mask_only: bool = False,
    sorting_mode: str = "layer-wise",
):
    """Refill by head and neuron: the best units are whole, the others zero.

    Args:
        model: a plain ViT, ours or timm's; its own device is used.
        mask_dict: element-wise masks (`X` or `X.weight_mask`); criterion `remain` counts in them, and a unit all zero
            in them stays away.
        train_loader: any iterable of (images, labels); None where the criterion scores weights.
        trained_weight: state dict that is scored; may carry weight_orig and weight_mask.
        init_weight: state dict that the returned model's weights come from.
        head_prune_ratio, mlp_prune_ratio: fractions of all heads and neurons that go, in [0, 1); 0 leaves a kind alone.

    Returns:
        {layer: mask} when `return_mask_only` (the model stays as it was), else the model with `init_weight` under
        the masks, by `torch.nn.utils.prune`.
    """
    ratios = target_ratios("both", head_prune_ratio, mlp_prune_ratio)
    for kind, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise ValueError(f"{kind} ratio must lie in [0, 1), got {ratio}")
    units = vit_units(model)
    weights = prunable_weights(model)
    masks = check_masks(mask_dict, weights)
    scores = score_units(model, units, criteria, mask=masks, trained_weight=trained_weight, batches=train_loader)
    target = structured_masks(weights, units, rank_units(model, units, scores, ratios, sorting_mode))
    return target if return_mask_only else load_and_mask(model, init_weight, target)
