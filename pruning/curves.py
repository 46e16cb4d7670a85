"""Allocation by sensitivity: from the loss after pruning each layer alone to how many units each layer keeps.

    counts = probed_counts(levels)                            # where a layer's curve is to be measured
    values = loss_values(curves, levels, cost)                # what each step down adds to the loss over what it saves
    counts = least_loss_counts(curves, levels, cost, limit)   # as little loss as the limit allows

A curve is a list of (units left, loss), units descending. The sum of the layers' curves stands for the loss of all
together; what layers do to one another is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from pruning.budget import Cost, Counts, Levels, counts_by_value

Curve = Sequence[tuple[int, float]]  # (units left, loss), units descending

PROBES = 8  # of a layer that has more units than that


def probed_counts(levels: Sequence[int]) -> list[int]:
    """The counts, descending, at which a layer is measured that may keep `levels` units, all that it has first.

    All levels where they are few; else the nearest ones to 7/8, 6/8, .. 1/8 of what it has, and the lowest.
    """
    if len(levels) <= PROBES + 1:
        return list(levels)
    shares = [levels[0] * (PROBES - step) / PROBES for step in range(PROBES)]
    nearest = {min(levels, key=lambda count, share=share: abs(count - share)) for share in shares}
    return sorted({*nearest, levels[-1]}, reverse=True)


def lower_hull(curve: Curve) -> list[tuple[int, float]]:
    """The corners of the largest convex function of the units left that nowhere lies above the curve.

    Andrew, "Another efficient algorithm for convex hulls in two dimensions", Information Processing Letters 1979.
    """
    hull: list[tuple[int, float]] = []
    for count, loss in curve:
        # a corner goes that lies on or above the line from the one before it to the new point
        while len(hull) > 1:
            (first, high), (second, low) = hull[-2:]
            if (low - high) * (first - count) < (loss - high) * (first - second):
                break
            hull.pop()
        hull.append((count, loss))
    return hull


def loss_values(curves: Mapping[str, Curve], levels: Levels, cost: Cost) -> dict[str, list[float]]:
    """What each step down a layer's levels adds to the loss, on the lower hull of its curve, over what it saves.

    A step saves its units times what a unit of its layer costs in the mean. Along a layer values ascend. Layers that
    cost the same whatever is left of them are absent: what they give away buys nothing.
    """
    whole, values = {key: steps[0] for key, steps in levels.items()}, {}
    for key, steps in levels.items():
        saved = cost(whole) - cost(whole | {key: steps[-1]})
        if saved > 0:
            corners, losses = zip(*reversed(lower_hull(curves[key])), strict=True)
            heights, unit = np.interp(steps, corners, losses).tolist(), saved / (steps[0] - steps[-1])
            pairs = zip(pairwise(heights), pairwise(steps), strict=True)
            values[key] = [(after - before) / ((high - low) * unit) for (before, after), (high, low) in pairs]
    return values


def least_loss_counts(curves: Mapping[str, Curve], levels: Levels, cost: Cost, limit: float) -> Counts:
    """What each layer keeps so that the sum of the curves, as far as they are convex, is the least within the limit."""
    return counts_by_value(loss_values(curves, levels, cost), levels, cost, limit)
