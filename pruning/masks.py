"""Masks: make, check, step, refill, apply; by weight and by whole unit.

A mask set (`Masks`) is a value: layer name -> weight-shaped tensor of exactly 0 and 1. Pruning steps are pure, weights
and masks in, masks out; putting masks onto a model is a separate, named act. `torch.nn.utils.prune` appears only in
the functions of the second half, which scripts call with a model in hand; training never uses it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruning.threshold import magnitude_step
from pruning.units import Kept, Units, unit_masks
from utils import plain_weights

Masks = dict[str, Tensor]


# ----------------------------------------------------------------------------------------- masks as values


def normalise_names(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks keyed by layer name, whether they came as `X` or as `X.weight_mask`."""
    return {name.removesuffix(".weight_mask"): mask for name, mask in masks.items()}


def full_masks(weights: Mapping[str, Tensor]) -> Masks:
    """Masks that keep everything."""
    return {name: torch.ones_like(weight) for name, weight in weights.items()}


def check_masks(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Masks:
    """Masks from outside, normalised to layer names and compared with the weights they are for.

    Raises:
        ValueError: a layer the model does not have, a wrong shape, or a value other than 0 and 1.
    """
    checked = {}
    for name, mask in normalise_names(masks).items():
        if name not in weights:
            raise ValueError(f"mask {name}: the model has no such prunable layer")
        if mask.shape != weights[name].shape:
            raise ValueError(f"mask {name}: shape {tuple(mask.shape)}, weight {tuple(weights[name].shape)}")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"mask {name}: holds values other than 0 and 1")
        checked[name] = mask.to(weights[name])
    return checked


def density(masks: Mapping[str, Tensor]) -> float:
    """Fraction of the masks' elements that is 1."""
    return count_kept(masks) / max(1, sum(mask.numel() for mask in masks.values()))


def count_kept(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def elementwise_step(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rate: float,
    step: int,
    unit_masks: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Iterative magnitude pruning: after step k, round(n (1 - rate)^k) of n prunable weights survive.

    Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, with one threshold over all layers. n counts all
    weights, or those inside `unit_masks` where whole units are pruned: a removed unit's weights count as pruned.
    """
    if unit_masks is not None:
        masks = {name: mask * unit_masks[name] for name, mask in masks.items()}
        total = count_kept(unit_masks)
    else:
        total = sum(mask.numel() for mask in masks.values())
    return magnitude_step(weights, masks, round(total * (1 - rate) ** step))


def refill_rows(masks: Mapping[str, Tensor], row_scores: Mapping[str, Tensor], fillback_rate: float) -> Masks:
    """Give each layer `fillback_rate` of its pruned weights back, row by row in order of the row's score.

    A layer with P pruned weights gets int(P * fillback_rate + 1e-9) of them; rows of equal score come in their own
    order, and the weights of a row from its first column on.

    Args:
        row_scores: {layer: [rows]}, larger first. A row that is wholly pruned may be marked -inf; it comes last.
    """
    result = {}
    for name, mask in masks.items():
        rows = mask.flatten(1)
        pruned = rows == 0
        budget = int(int(pruned.sum()) * fillback_rate + 1e-9)
        order = torch.sort(row_scores[name], descending=True, stable=True).indices.to(mask.device)
        candidates = pruned[order]  # rows best first
        filled = candidates & (candidates.flatten().cumsum(0).view_as(candidates) <= budget)
        refilled = rows.clone()
        refilled[order] += filled.to(mask)
        result[name] = refilled.reshape(mask.shape)
    return result


def structured_masks(weights: Mapping[str, Tensor], units: Mapping[str, Units], kept: Kept) -> Masks:
    """Weight masks of whole units: layers that hold units keep the kept ones, all others are whole."""
    masks = full_masks(weights)
    tensors = {f"{name}.weight": weight for name, weight in weights.items()}
    for name, mask in unit_masks(units, kept, tensors).items():
        masks[name.removesuffix(".weight")] = mask
    return masks


# ------------------------------------------------------------------- models under torch.nn.utils.prune


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks on the model's layers by `torch.nn.utils.prune`, in place of those that are there."""
    for name, mask in masks.items():
        module = model.get_submodule(name)
        make_permanent({name: module})
        prune.custom_from_mask(module, "weight", mask.to(module.weight))


def make_permanent(layers: Mapping[str, nn.Module]) -> None:
    """Pruned weights become plain zeros, in place, and the masks of `torch.nn.utils.prune` are removed."""
    for module in layers.values():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")


def prune_globally(model: nn.Module, layers: Mapping[str, nn.Module], px: float) -> None:
    """Prune the fraction `px` of what is left in `layers` by one threshold; see `pruning_model_vit`."""
    if not 0 <= px < 1:
        raise ValueError(f"px must lie in [0, 1), got {px}")
    weights = {name: module.weight.detach() for name, module in layers.items()}
    masks = {
        name: getattr(module, "weight_mask", torch.ones_like(module.weight)).detach().clone()
        for name, module in layers.items()
    }
    apply_masks(model, magnitude_step(weights, masks, round(count_kept(masks) * (1 - px))))


def load_and_mask(model: nn.Module, init_weight: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
    """The model with weights copied from `init_weight` and `masks` applied by `torch.nn.utils.prune`."""
    make_permanent(dict(model.named_modules()))
    model.load_state_dict(plain_weights(init_weight))
    apply_masks(model, masks)
    return model
