"""N:M sparsity: of every M consecutive weights of a row at most N are kept.

    masks = nm_step(weights, masks, 2, 4)                       # each contained in the old one

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021; Mishra et al.,
"Accelerating Sparse Deep Neural Networks", 2021, for the 2:4 that sparse tensor cores multiply. A group lies along the
dimension that a product sums over: the inputs of a linear layer; the input channels of a convolution, kernel position
by kernel position, so that channels which are a multiple of M make groups of their own at each position. Where M does
not divide a row, the R weights left at its end are a smaller group, of which ceil(R N / M) are kept.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pruning.ranking import scheduled_ratio

_SHORT = 32  # groups up to here are ranked by comparing their members: sorting millions of short rows takes seconds


def parse_pattern(text: str) -> tuple[int, int]:
    """(N, M) of "N:M".

    Raises:
        ValueError: it is something else, or not 0 < N < M < 10,000.
    """
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    keep, group = map(int, found.groups()) if found else (0, 0)
    if not 0 < keep < group:
        raise ValueError("give N:M, N of every M weights stay, 0 < N < M < 10000; in YAML in quotes, '2:4'")
    return keep, group


def scheduled_keep(keep: int, group: int, schedule: str, state: int, states: int) -> int:
    """How many weights of a group are kept in `state` of `states`: `group` in state 0, `keep` in the last one.

    Between them the share that is gone grows as that of units does, see `ranking.scheduled_ratio`; what it leaves of a
    group is rounded to the nearest whole number, halves up.
    """
    if state == 0:
        return group
    gone = scheduled_ratio(schedule, 1 - keep / group, state, states)
    return max(keep, math.floor(group * (1 - gone) + 0.5 + 1e-9))


def _of_rest(rest: int, keep: int, group: int) -> int:
    return -(-rest * keep // group)


def weights_left(shapes: Iterable[torch.Size], keep: int, group: int) -> int:
    """How many weights of whole layers of these shapes [out, in, ...] stay."""
    total = 0
    for rows, *reduced in shapes:
        groups, rest = divmod(math.prod(reduced), group)
        total += rows * (groups * keep + _of_rest(rest, keep, group))
    return total


def _rows(weight: Tensor) -> Tensor:
    """[out, in, ...] as [out, reduction], input channels running fastest."""
    return weight.movedim(1, -1).flatten(1)


def _grouped(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Whole groups [out, groups, group] of rows [out, reduction], and what is left at their ends [out, rest]."""
    groups, rest = divmod(rows.shape[1], group)
    whole, end = rows.split([groups * group, rest], dim=1)
    return whole.unflatten(1, (groups, group)), end


def _largest(values: Tensor, count: int) -> Tensor:
    """bool [..., length]: the `count` largest of the last dimension, of equal ones the first."""
    length = values.shape[-1]
    if length > _SHORT:
        order = torch.sort(values, dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order[..., :count], True)
    places = values.movedim(-1, 0).contiguous()
    ahead = torch.zeros_like(places, dtype=torch.uint8)  # how many of its group go before it
    for first, second in itertools.combinations(range(length), 2):
        first_wins = places[first] >= places[second]
        ahead[second] += first_wins
        ahead[first] += ~first_wins
    return (ahead < count).movedim(0, -1)


def nm_step(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int, group: int) -> dict[str, Tensor]:
    """Of every group the `keep` largest absolute values that survive in `masks`, or all where fewer survive.

    Of equal values the one that comes first is kept; NaN counts as infinite.

    Args:
        weights: floating point [out, in] or [out, in, height, width], by layer name; `masks` has the same names.

    Returns:
        New masks, each contained in the old one.
    """
    result = {}
    for name, mask in masks.items():
        # a removed weight ranks below each survivor, and the product takes it away where a group is short of them
        values = weights[name].detach().abs().nan_to_num(nan=math.inf, posinf=math.inf)
        values = _rows(values.masked_fill(mask == 0, -1))
        whole, end = _grouped(values, group)
        best, best_of_rest = _largest(whole, keep), _largest(end, _of_rest(end.shape[1], keep, group))
        stays = torch.cat([best.flatten(1), best_of_rest], dim=1)
        result[name] = mask * stays.view(mask.movedim(1, -1).shape).movedim(-1, 1).to(mask)
    return result


def holds_pattern(weight: Tensor, keep: int, group: int) -> bool:
    """Whether no group of a weight, or mask, has more elements that are not zero than the pattern allows."""
    whole, end = _grouped(_rows(weight.detach()) != 0, group)
    most_of_rest = _of_rest(end.shape[1], keep, group)
    return bool((whole.sum(-1) <= keep).all() and (end.sum(-1) <= most_of_rest).all())
