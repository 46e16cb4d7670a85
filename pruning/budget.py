"""Budgets: how many units each layer keeps so that the cost of all of them stays below a limit.

    levels = levels_of(units, scores, min_units, round_to)       # what each layer may keep, from what it has downwards
    counts = global_counts(scores, levels, cost, limit)          # all layers ranked together
    counts = uniform_counts(scores, levels, cost, limit)         # one share for all layers
    kept = best_units(scores, counts)

A cost is any function of {units key: units left}, keys absent: all stay. It is only asked, never taken apart: MACs and
parameters of filters, whose cost depends on the layers around them, and measured milliseconds serve alike. Scores are
float64 [count] per units key, -inf for units that are gone; ties go by the rule of `pruning.ranking`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from pruning.ranking import best_first, keep_count, scheduled_ratio
from pruning.rounding import ROUNDED, lowest_multiple
from pruning.units import Units

Counts = dict[str, int]  # units key -> how many stay
Cost = Callable[[Mapping[str, int]], float]
Levels = Mapping[str, Sequence[int]]  # units key -> what the layer may keep, descending

CLOSE = 0.01  # share of a limit that may stay free
SLACK = 1e-9  # share of a limit by which rounding errors may pass it


def levels_of(
    units: Mapping[str, Units], scores: Mapping[str, Tensor], min_units: int = 1, round_to: int = 1
) -> dict[str, list[int]]:
    """What each layer may keep, descending: what it has now, then every count, or multiple of `round_to`, down to
    `min_units`. Heads are not rounded, and a convolution keeps a filter in any case."""
    levels = {}
    for key, group in units.items():
        left, step = len(best_first(scores[key])), round_to if group.kind in ROUNDED else 1
        lowest = lowest_multiple(max(1, min_units) if group.kind == "filter" else min_units, step)
        levels[key] = [left, *range((left - 1) // step * step, lowest - 1, -step)]
    return levels


def emptied_levels(
    levels: Levels, units: Mapping[str, Units], scores: Mapping[str, Tensor], worth: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """The levels of layers that may also go whole: below the last one comes 0, but for the most valuable layer of each
    kind. `worth` as in `step_values`."""
    keeps = {}
    for key, group in units.items():
        value = float(worth[key]) if key in worth else float(scores[key].max())
        if value > keeps.get(group.kind, (-math.inf, ""))[0]:
            keeps[group.kind] = value, key
    spared = {key for _, key in keeps.values()}
    return {key: [*steps, 0] if steps[-1] and key not in spared else [*steps] for key, steps in levels.items()}


def lowest_cost(levels: Levels, cost: Cost) -> float:
    """What is left where every layer keeps as few units as it may."""
    return cost({key: steps[-1] for key, steps in levels.items()})


def best_units(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, list[int]]:
    """The ids of each layer's `counts` best units, ascending; all that are left in layers without a count."""
    return {key: sorted(best_first(value)[: counts.get(key)].tolist()) for key, value in scores.items()}


def step_values(
    scores: Mapping[str, Tensor], levels: Levels, cost: Cost, worth: Mapping[str, Tensor] | None = None
) -> dict[str, list[float]]:
    """What each step down a layer's levels gives away: the mean score of its units over the mean cost of the layer's.

    `worth` [1] per key is what is known of all units of a layer together, which may be less than they are worth one by
    one: where such a layer may empty, no step gives away more than that over the cost of all.

    Layers that cost the same whatever is left of them, such as filters that cannot be removed, are absent: what they
    give away buys nothing.
    """
    whole, values = {key: steps[0] for key, steps in levels.items()}, {}
    before = cost(whole)
    for key, steps in levels.items():
        saved = before - cost(whole | {key: steps[-1]})
        if saved > 0:
            ranked, unit = scores[key][best_first(scores[key])].tolist(), saved / (steps[0] - steps[-1])
            values[key] = [sum(ranked[low:high]) / (high - low) / unit for high, low in pairwise(steps)]
            if worth and steps[-1] == 0:
                together = float(worth[key]) / saved
                values[key] = [min(value, together) for value in values[key]]
    return values


def global_counts(
    scores: Mapping[str, Tensor],
    levels: Levels,
    cost: Cost,
    limit: float,
    worth: Mapping[str, Tensor] | None = None,
) -> Counts:
    """One ranking of all units of all kinds: they go in ascending order of score per cost until the limit is met."""
    return counts_by_value(step_values(scores, levels, cost, worth), levels, cost, limit)


def counts_by_value(values: Mapping[str, Sequence[float]], levels: Levels, cost: Cost, limit: float) -> Counts:
    """Layers step down in ascending order of `values`, what each step gives away over what it saves, until the limit
    is met.

    Where values ascend along each layer, as those of convex curves do, the counts on the way are the Lagrangian
    solution of bit allocation: none that cost as much give away less (Shoham and Gersho, "Efficient bit allocation for
    an arbitrary set of quantizers", IEEE Trans. ASSP 1988).
    """
    entries = [(value, key) for key, of_layer in values.items() for value in of_layer]
    # of equal values the first one stays, hence the later one goes first
    order = [key for _, (_, key) in sorted(enumerate(entries), key=lambda entry: (entry[1][0], -entry[0]))]
    return _first_steps(order, levels, cost, limit)


def uniform_counts(scores: Mapping[str, Tensor], levels: Levels, cost: Cost, limit: float) -> Counts:
    """One share for all layers of all kinds, the largest that meets the limit; scores only decide who fills the rest.

    A layer keeps the level that is nearest to the share, ties up.
    """
    steps = []
    for index, (key, of_layer) in enumerate(step_values(scores, levels, cost).items()):
        borders = [(high + low) / 2 / len(scores[key]) for high, low in pairwise(levels[key])]
        steps += [(-border, value, -index, key) for border, value in zip(borders, of_layer, strict=True)]
    return _first_steps([key for *_, key in sorted(steps)], levels, cost, limit)


def _first_steps(order: Sequence[str], levels: Levels, cost: Cost, limit: float) -> Counts:
    """What layers keep after as few of these steps down, in this order, as the limit allows.

    How many is found by bisection. A coarse step that went last may leave room below the limit, which those before it
    take back, the last one first; where more than `CLOSE` stays free, the coarse step is left out and finer ones go.
    """

    def left(down: Mapping[str, int]) -> float:
        return cost(_after(levels, down))

    def fits(down: Mapping[str, int]) -> bool:
        return left(down) <= limit * (1 + SLACK)

    best, most, order = Counter(order), -math.inf, list(order)  # nothing else may fit
    while True:
        gone = bisect_left(range(len(order) + 1), True, key=lambda count: fits(Counter(order[:count])))
        if gone > len(order):
            break
        down = _fill(Counter(order[:gone]), order[:gone][::-1], fits)
        if left(down) > most:
            best, most = down, left(down)
        if gone == 0 or most >= (1 - CLOSE) * limit:
            break
        coarse = order[gone - 1]
        order = order[: gone - 1] + [key for key in order[gone:] if key != coarse]
    return _after(levels, best)


def _after(levels: Levels, down: Mapping[str, int]) -> Counts:
    """What layers keep so many steps down their levels."""
    return {key: steps[down.get(key, 0)] for key, steps in levels.items()}


def _fill(down: Counter, order: Sequence[str], fits: Callable[[Counter], bool]) -> Counter:
    """Steps that layers take back in this order; one whose next step does not fit is passed over from then on.

    Costs are asked for few of them: of the steps up to the next that does not fit, the number is found by bisection.
    """
    while order:
        taken = 0
        if fits(down - Counter(order[:1])):
            taken = bisect_left(
                range(1, len(order) + 1), True, key=lambda count: not fits(down - Counter(order[:count]))
            )
        down = down - Counter(order[:taken])
        order = [key for key in order[taken:] if key != order[taken]]
    return down


def scheduled_counts(
    wanted: Mapping[str, int], totals: Mapping[str, int], schedule: str, state: int, states: int
) -> Counts:
    """What layers keep in `state` of `states` on the way to `wanted`, each on the schedule by itself."""
    return {
        key: keep_count(totals[key], scheduled_ratio(schedule, 1 - count / totals[key], state, states), count)
        for key, count in wanted.items()
    }


def scheduled_limit(whole: float, limit: float, schedule: str, state: int, states: int) -> float:
    """What may be left in `state` of `states` on the way from `whole` to `limit`."""
    return whole * (1 - scheduled_ratio(schedule, 1 - limit / whole, state, states))
