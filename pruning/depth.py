"""Depth pruning: which attentions, MLPs or blocks are kept, by the scores of whole branches.

    kept = rank_branches(branches, scores, "block", 0.5, kept)      # every key's ids as they were, or none of them

A pruned branch loses all its heads or neurons at once; masks, penalty, cut and removal are those of any unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pruning.ranking import best_first, keep_count
from pruning.units import Kept, Units

DEPTH = {"block": "blocks", "branch": "branches"}  # targets of --vit_prune_target, and what they are called
WHOLE = (*DEPTH, "all")  # targets that prune whole branches


def block_of(key: str) -> str:
    """The block that a branch belongs to: "blocks.3" of "blocks.3.attns.0.attn"."""
    path, _, number = key.partition("blocks.")
    return f"{path}blocks.{number.partition('.')[0]}"


def is_attention(key: str) -> bool:
    return key.endswith("attn")


def candidates(branches: Iterable[str], target: str) -> dict[str, list[str]]:
    """What is ranked: the units keys of each block, or of each branch."""
    found: dict[str, list[str]] = {}
    for key in branches:
        found.setdefault(block_of(key) if target == "block" else key, []).append(key)
    return found


def depth_count(count: int, target: str, ratio: float) -> int:
    """How many of `count` blocks or branches are kept: at least one block, one attention and one MLP."""
    return keep_count(count, ratio, 1 if target == "block" else 2)


def rank_branches(
    branches: Mapping[str, Units], scores: Mapping[str, Tensor], target: str, ratio: float, kept: Kept
) -> dict[str, list[int]]:
    """Which heads and neurons are kept when whole blocks or branches are pruned: {units key: ids}.

    All blocks, or all branches, of the model are one pool, the best of which are kept; the first of equal ones. The
    score of a block is the sum of its branches'. Of branches the best attention and the best MLP are always kept.

    Args:
        branches: {units key: the branch as one unit}, as `Family.branches_as_units` gives.
        scores: float64 [1] per key, larger is more important; -inf for those that have nothing that works.
        ratio: the share of all blocks or branches that is pruned, in [0, 1].
        kept: the ids that are there; a branch without any does not come back.
    """
    groups = candidates(branches, target)
    values = {name: _worth(keys, scores, kept) for name, keys in groups.items()}
    ranked = best_first(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
    order = [list(groups)[index] for index in ranked]
    if target == "branch":
        first = {is_attention(name): name for name in reversed(order)}
        order = sorted(order, key=lambda name: name not in first.values())
    stays = {key for name in order[: depth_count(len(groups), target, ratio)] for key in groups[name]}
    return {key: list(kept[key]) if key in stays else [] for key in branches}


def _worth(keys: list[str], scores: Mapping[str, Tensor], kept: Kept) -> float:
    """The sum of what is there of the scores; -inf where nothing is."""
    there = [float(scores[key]) for key in keys if kept[key] and scores[key] > -math.inf]
    return sum(there) if there else -math.inf


def depth_note(branches: Iterable[str], target: str, kept: Kept) -> str:
    """What is left, in a line: "3 of 6 blocks stay: 0 1 5"."""
    groups = candidates(branches, target)
    left = [name for name, keys in groups.items() if any(kept[key] for key in keys)]
    return (
        f"{len(left)} of {len(groups)} {DEPTH[target]} stay: {' '.join(name.replace('blocks.', '') for name in left)}"
    )
