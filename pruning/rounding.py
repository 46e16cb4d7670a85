"""Rounds the numbers of units that layers keep to multiples of `round_to`, which fit the hardware.

Kernels of linear layers and convolutions work on 8, 16 or 32 channels at once, and a rest costs as much as a full
share. A head is head_dim channels wide already, so heads are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

ROUNDED = ("neuron", "filter")  # the kinds of units whose counts are rounded


def lowest_multiple(minimum: int, round_to: int) -> int:
    """The smallest multiple of `round_to` that is not below `minimum`."""
    return -(-minimum // round_to) * round_to


def fitting_count(wanted: int, count: int, available: int, minimum: int = 1, round_to: int = 1) -> int:
    """What a layer of `count` units keeps when `wanted` of them should stay: the nearest multiple, ties up.

    It is never below the multiple that `minimum` asks for nor above the `available` units, those that are not gone
    already. A layer that should stay whole does, and one that holds no such multiple keeps what it can.
    """
    if round_to == 1 or wanted >= count == available:
        return min(max(wanted, 0), available)
    lowest, highest = lowest_multiple(minimum, round_to), available // round_to * round_to
    if lowest > highest:
        return available
    return min(max((wanted + round_to // 2) // round_to * round_to, lowest), highest)


def fit_counts(
    wanted: Mapping[str, int],
    counts: Mapping[str, int],
    available: Mapping[str, int],
    minimum: int = 1,
    round_to: int = 1,
    costs: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """What each layer of a pool keeps, in multiples, while all together cost what was wanted, to half a step.

    Each layer gets the multiple nearest to what it should keep. While the sum is off by more than half a step of the
    costliest layer (by half a step: while there is too little), a layer moves by a step towards it: the one that is
    farthest from its own wish, of equal ones the first.

    Args:
        wanted: units that each layer would keep without rounding.
        costs: what one unit of each layer costs, 1 when None.
    """
    shares = {key: fitting_count(wanted[key], counts[key], available[key], minimum, round_to) for key in wanted}
    if round_to == 1 or not shares:
        return shares
    costs = dict.fromkeys(wanted, 1) if costs is None else costs
    lowest, step = lowest_multiple(minimum, round_to), round_to * max(costs.values())
    over = sum(costs[key] * (wanted[key] - shares[key]) for key in wanted)
    while 2 * over >= step or 2 * over < -step:
        towards, moves = (1 if over > 0 else -1), {}
        for key, share in shares.items():
            move = round_to - share % round_to if over > 0 else -(share % round_to or round_to)
            nearer = abs(over - costs[key] * move) <= abs(over)
            if lowest <= share + move <= available[key] and nearer:
                moves[key] = move
        if not moves:
            break
        farthest = max(moves, key=lambda key: towards * costs[key] * (wanted[key] - shares[key]))
        shares[farthest] += moves[farthest]
        over -= costs[farthest] * moves[farthest]
    return shares
