"""Heads and neurons of a Vision Transformer for scripts: scored, removed, counted, planned.

    scores = compute_vit_head_importance(model, "magnitude")     # {layer index: float64 [num_heads]}
    kept   = structured_prune_vit_heads(model, scores, 0.33)     # {layer index: kept ids}, in place
    check_vit_structure(model)

What a unit is, is written in `pruning/units.py` and, for ViTs, in `families/vit.py`; criteria and scorer in
`pruning/scores.py`, the ranking rule in `pruning/ranking.py`, removal in `pruning/removal.py`. To have a criterion of
your own, in the command line too, add a line to `CRITERIA`: CRITERIA["largest"] = lambda weights: weights.abs().amax(1)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from families.parts import BRANCHES, HEADS, NEURONS, PLAIN_MODULES, Branch, class_name, unit_macs
from families.vit import (
    PRUNABLE_SUFFIXES,
    find_working_units,
    fold_dead_units_,
    layout_problem,
    vit_cost,
    vit_macs,
    vit_units,
)
from pruning.masks import normalise_names
from pruning.ranking import best_first, keep_count, scheduled_ratio, select_units
from pruning.removal import remove_units, scatter_tensors, slice_tensors
from pruning.scores import CRITERIA, SCORE_BATCHES, Criterion, captured, evaluating, score_units, trained_weights
from pruning.units import (
    Kept,
    Layout,
    LayoutError,
    Tap,
    Units,
    count_parameters,
    follower_masks,
    row_units,
    unit_masks,
    unit_parameters,
    unit_weights,
)
from utils import plain_weights

__all__ = [
    "CRITERIA",
    "PLAIN_MODULES",
    "PRUNABLE_SUFFIXES",
    "SCORE_BATCHES",
    "Criterion",
    "Kept",
    "Layout",
    "LayoutError",
    "Tap",
    "Units",
    "best_first",
    "captured",
    "check_vit_structure",
    "compute_mlp_neuron_importance",
    "compute_vit_head_importance",
    "count_vit_parameters",
    "evaluating",
    "find_working_units",
    "fold_dead_units_",
    "follower_masks",
    "keep_count",
    "layout_problem",
    "normalise_names",
    "plain_weights",
    "prune_attention_heads_hard",
    "prune_mlp_neurons_hard",
    "remove_units",
    "row_units",
    "scatter_tensors",
    "scheduled_ratio",
    "score_units",
    "select_units",
    "slice_tensors",
    "structured_prune_mlp_neurons",
    "structured_prune_vit_heads",
    "trained_weights",
    "unit_macs",
    "unit_masks",
    "unit_parameters",
    "unit_weights",
    "vit_cost",
    "vit_macs",
    "vit_units",
]


# ------------------------------------------------------------------------------------------ how it is scored


def compute_vit_head_importance(
    model, criteria, current_mask=None, trained_weight=None, train_loader=None, criterion=None, seed=0
) -> dict[int, Tensor]:
    """Scores of all heads, {layer index: float64 [num_heads]}; see `score_units` for what is raised."""
    return _importance(model, "head", criteria, current_mask, trained_weight, train_loader, criterion, seed)


def compute_mlp_neuron_importance(
    model, criteria, current_mask=None, trained_weight=None, train_loader=None, criterion=None, seed=0
) -> dict[int, Tensor]:
    """Scores of all MLP neurons, {layer index: float64 [hidden]}; see `score_units` for what is raised."""
    return _importance(model, "neuron", criteria, current_mask, trained_weight, train_loader, criterion, seed)


def _importance(model, kind, criteria, mask, trained_weight, batches, loss, seed) -> dict[int, Tensor]:
    units = vit_units(model, kinds=(kind,))
    scores = score_units(
        model,
        units,
        criteria,
        mask=mask,
        trained_weight=trained_weight,
        batches=batches,
        loss=loss,
        seed=seed,
    )
    return {units[key].layer: value for key, value in scores.items()}


# ------------------------------------------------------------------------------------------ how it is removed


def prune_attention_heads_hard(attn_module: nn.Module, heads_to_prune: Iterable[int]) -> None:
    """Physically remove heads, by id, from an attention module with `qkv`, `proj`, `num_heads`, `head_dim`."""
    _remove_by_id(attn_module, HEADS, heads_to_prune)


def prune_mlp_neurons_hard(mlp_module: nn.Module, neurons_to_prune: Iterable[int]) -> None:
    """Physically remove neurons, by id, from an MLP with `fc1` and `fc2`."""
    _remove_by_id(mlp_module, NEURONS, neurons_to_prune)


def _remove_by_id(module: nn.Module, plain: Branch, ids: Iterable[int]) -> None:
    group = BRANCHES.get(class_name(module), plain).units(module, "", 0)
    doomed = set(map(int, ids))
    if not doomed <= set(range(group.count)):
        raise ValueError(f"{group.kind} ids must lie in 0..{group.count - 1}, got {sorted(doomed)}")
    remove_units(module, {"": group}, {"": [unit for unit in range(group.count) if unit not in doomed]})


def structured_prune_vit_heads(
    model: nn.Module, head_importance: Mapping[int, Tensor], prune_ratio: float | Mapping[int, float]
) -> dict[int, list[int]]:
    """Physically remove the least important heads, once, in place.

    Args:
        head_importance: {layer index: scores [num_heads]} of the layers to prune.
        prune_ratio: fraction of the heads that are there, for all layers or {layer index: fraction}; the nearest
            whole number is pruned (ties down), at least one head is kept.

    Returns:
        {layer index: kept ids}, counted in the model as it was.
    """
    return _prune_once(model, "head", head_importance, prune_ratio)


def structured_prune_mlp_neurons(
    model: nn.Module, neuron_importance: Mapping[int, Tensor], prune_ratio: float | Mapping[int, float]
) -> dict[int, list[int]]:
    """The same for MLP neurons; `neuron_importance` is {layer index: scores [hidden]}."""
    return _prune_once(model, "neuron", neuron_importance, prune_ratio)


def _prune_once(model, kind, importance, prune_ratio) -> dict[int, list[int]]:
    kept = {}
    units = {key: group for key, group in vit_units(model, (kind,)).items() if group.layer in importance}
    for key, group in units.items():
        scores = torch.as_tensor(importance[group.layer], dtype=torch.float64)
        if len(scores) != group.count:
            raise ValueError(f"layer {group.layer} has {group.count} {kind}s, but {len(scores)} scores were given")
        ratio = prune_ratio[group.layer] if isinstance(prune_ratio, Mapping) else prune_ratio
        if not 0 <= ratio < 1:
            raise ValueError(f"prune_ratio must lie in [0, 1), got {ratio}")
        stay = max(1, group.count - math.ceil(group.count * ratio - 0.5 - 1e-9))
        kept[key] = sorted(best_first(scores)[:stay].tolist())
    remove_units(model, units, kept)
    return {units[key].layer: ids for key, ids in kept.items()}


# ------------------------------------------------------------------------------------- what it counts and costs


def count_vit_parameters(model: nn.Module) -> int:
    """Number of parameters of the model as it is."""
    return count_parameters(model)


def check_vit_structure(model: nn.Module) -> list[dict[str, int]]:
    """Print heads, head width and neurons of each block and return them as rows.

    Raises:
        LayoutError: the layers of a block disagree with each other, or the model is no ViT that can be pruned.
    """
    units = list(vit_units(model).values())
    heads, neurons = ([group for group in units if group.kind == kind] for kind in ("head", "neuron"))
    rows = [
        {"layer": layer, "heads": head.count, "head_dim": head.contribution.layout.width, "neurons": neuron.count}
        for layer, (head, neuron) in enumerate(zip(heads, neurons, strict=True))
    ]
    print("[ViT Structure]")
    for row in rows:
        print("blocks.{layer:<3} | {heads:>3} heads of {head_dim} | {neurons:>5} neurons".format(**row))
    heads, neurons = (sum(row[name] for row in rows) for name in ("heads", "neurons"))
    print(f"total      | {heads:>3} heads | {neurons:,} neurons | {count_vit_parameters(model):,} parameters")
    return rows
