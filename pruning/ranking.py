"""Which units are kept: the quotas of a state, and one ranking rule, layer by layer or over all layers.

Scores are float64 [count] per units key, -inf for units that are pruned already; kept ids are ascending. Selection
happens once, by a stable sort, and masks, plan and removal all use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pruning.masks import Masks, density
from pruning.rounding import ROUNDED, fit_counts, fitting_count
from pruning.units import Units

BOTH = ("head", "neuron")
# of --vit_prune_target: the kinds of units that go, one by one or all of a branch at once
KINDS = {"head": ("head",), "mlp": ("neuron",), "both": BOTH, "block": BOTH, "branch": BOTH, "all": BOTH}


# ------------------------------------------------------------------------------------------ how many


def target_ratios(vit_prune_target: str, head_ratio: float, mlp_ratio: float | None) -> dict[str, float]:
    """{"head": fraction, "neuron": fraction} of a prune target; neurons go by `mlp_ratio` or else `head_ratio`."""
    ratios = {"head": head_ratio, "neuron": head_ratio if mlp_ratio is None else mlp_ratio}
    return {kind: ratios[kind] for kind in KINDS[vit_prune_target]}


def scheduled_ratio(schedule: str, ratio: float, state: int, states: int) -> float:
    """The fraction of all units that must be gone before `state` of `states` trains (1 <= state < states)."""
    progress = state / (states - 1)
    if schedule == "geometric":
        return 1 - (1 - ratio) ** progress
    if schedule == "linear":
        return ratio * progress
    if schedule == "constant":
        return ratio
    raise ValueError(f"unknown ratio schedule {schedule!r}; choose geometric, linear or constant")


def keep_count(count: int, ratio: float, minimum: int = 1) -> int:
    """How many of `count` units stay at `ratio`: max(minimum, floor(count (1 - ratio) + 1e-9))."""
    return max(minimum, math.floor(count * (1 - ratio) + 1e-9))


def filter_count(filters: int, density: float, fillback_rate: float) -> int:
    """Whole filters that a layer keeps: int(left + (filters - left) * fillback_rate + 1e-9), left = density * filters;
    at least one."""
    left = filters * density
    return max(1, int(left + (filters - left) * fillback_rate + 1e-9))


# ------------------------------------------------------------------------------------------ which


def best_first(scores: Tensor) -> Tensor:
    """Ids of the units that can be chosen, best first; of equal scores the lower id comes first."""
    values, order = torch.sort(scores, descending=True, stable=True)
    return order[values > -math.inf]


def select_units(
    scores: Mapping[str, Tensor],
    ratio: float,
    sorting_mode: str = "layer-wise",
    min_units: int = 1,
    round_to: int = 1,
) -> dict[str, list[int]]:
    """Which units stay, per layer and ascending: the one ranking rule for every kind of unit.

    Args:
        scores: float64 [count] per layer, all of one pool; -inf marks units that are gone already.
        ratio: fraction of all units of the pool that goes, in [0, 1].
        sorting_mode: "layer-wise" ranks each layer by itself, "global" the whole pool.
        min_units: how many a layer keeps at least, as far as it has them.
        round_to: what a layer keeps is a multiple of it, see `pruning.rounding`; globally, quota moves between layers
            so that the pool keeps as nearly as many as without rounding.
    """
    if sorting_mode not in ("layer-wise", "global"):
        raise ValueError(f"unknown sorting mode {sorting_mode!r}; choose layer-wise or global")
    ranked = {key: best_first(value) for key, value in scores.items()}
    counts, available = ({key: len(of[key]) for key in scores} for of in (scores, ranked))
    if sorting_mode == "layer-wise":
        wanted = {key: keep_count(count, ratio, min_units) for key, count in counts.items()}
        shares = {key: fitting_count(wanted[key], counts[key], available[key], min_units, round_to) for key in scores}
    else:
        wanted = _kept_globally(scores, ranked, ratio, min_units)
        shares = fit_counts(wanted, counts, available, min_units, round_to)
    return {key: sorted(ranked[key][:share].tolist()) for key, share in shares.items()}


def _kept_globally(scores, ranked, ratio, min_units) -> dict[str, int]:
    """How many units of each layer are among the best of all, beside the `min_units` best of each."""
    total = keep_count(sum(map(len, scores.values())), ratio, len(scores) * min_units)
    kept = {key: min(min_units, len(order)) for key, order in ranked.items()}
    rest = [(float(scores[key][unit]), key) for key in scores for unit in sorted(ranked[key][min_units:].tolist())]
    rest.sort(key=lambda entry: -entry[0])  # stable: ties stay in (layer, unit) order
    for _, key in rest[: max(0, total - sum(kept.values()))]:
        kept[key] += 1
    return kept


def rank_units(
    model: nn.Module,
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    sorting_mode: str = "layer-wise",
    min_units: int = 1,
    rank_by: str = "score",
    round_to: int = 1,
) -> dict[str, list[int]]:
    """Which units stay: {units key: ids}, for every kind that `ratios` names.

    Each kind is a pool of its own, pruned to its own ratio of all its units. With `rank_by` "score_per_mac"
    and global sorting they merge: units go in ascending order of score / MACs until the MACs of both quotas are gone.
    Layer by layer it changes nothing: there all units of a kind cost the same.

    Args:
        model: the dense model, for what a unit costs.
        scores: float64 [count] per key; -inf marks units that are gone.
        round_to: neurons and filters that a layer keeps are a multiple of it, see `select_units`; heads are left alone.
            Where kinds merge, the MACs of all that stays are as nearly those of the ranking without rounding.
    """
    pools = {kind: {key: scores[key] for key in units if units[key].kind == kind} for kind in ratios}
    if rank_by == "score_per_mac" and sorting_mode == "global":
        return _rank_by_cost(model, units, pools, ratios, min_units, round_to)
    kept = {}
    for kind, pool in pools.items():
        kept.update(select_units(pool, ratios[kind], sorting_mode, min_units, round_to if kind in ROUNDED else 1))
    return kept


def _rank_by_cost(model, units, pools, ratios, min_units, round_to) -> dict[str, list[int]]:
    quota, entries, kept = 0, [], {}
    for kind, pool in pools.items():
        count = sum(map(len, pool.values()))
        gone = count - keep_count(count, ratios[kind], len(pool) * min_units)
        # layers of different width cost different MACs; what the ratio asks for is then that of the mean unit
        quota += gone * sum(len(pool[key]) * units[key].macs(model, units[key]) for key in pool) // max(1, count)
    for key, group in units.items():
        if group.kind in pools:
            scores, cost = pools[group.kind][key], group.macs(model, group)
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
    ranked = {key: best_first(pools[units[key].kind][key]) for key in kept if units[key].kind in ROUNDED}
    shares = fit_counts(
        {key: len(kept[key]) for key in ranked},
        {key: units[key].count for key in ranked},
        {key: len(order) for key, order in ranked.items()},
        min_units,
        round_to,
        {key: units[key].macs(model, units[key]) for key in ranked},
    )
    kept |= {key: ranked[key][:share].tolist() for key, share in shares.items()}
    return {key: sorted(ids) for key, ids in kept.items()}


def mark_removed(scores: Mapping[str, Tensor], kept: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """Scores in which units that are not in `kept` are -inf, so that a pruned unit stays pruned."""
    marked = {}
    for key, value in scores.items():
        marked[key] = value.clone()
        if key in kept:
            alive = set(kept[key])
            marked[key][[unit for unit in range(len(value)) if unit not in alive]] = -math.inf
    return marked


def select_filters(
    masks: Masks, scores: Mapping[str, Tensor], fillback_rate: float, round_to: int = 1
) -> dict[str, list[int]]:
    """Which filters of each layer are kept: {layer: ids, ascending}.

    How many follows from the layer's density in the element-wise masks, see `filter_count`, and is a multiple of
    `round_to`. A filter whose kernel is all zero there (scored -inf) is not chosen, unless the layer has nothing else.
    """
    kept = {}
    for name, values in scores.items():
        order, wanted = best_first(values), filter_count(len(values), density({name: masks[name]}), fillback_rate)
        keep = fitting_count(wanted, len(values), len(order), round_to=round_to)
        kept[name] = sorted(order[:keep].tolist()) or [0]
    return kept
