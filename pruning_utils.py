"""Masks of convolutional networks for scripts: prune, check, apply, refill; element-wise and by filter.

The same as `vit_pruning_utils` has for Vision Transformers. What a filter is, is written in `families/resnet.py`;
masks, scores and ranking are those of every model (`pruning/`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from families.resnet import cnn_cost, filter_units, find_working_filters, prunable_convolutions
from pruning.masks import apply_masks, check_masks, load_and_mask, make_permanent, prune_globally, structured_masks
from pruning.ranking import filter_count, select_filters
from pruning.reports import print_sparsity
from pruning.scores import score_units
from vit_pruning_utils import extract_mask_vit as extract_mask

__all__ = [
    "check_sparsity",
    "cnn_cost",
    "extract_mask",
    "filter_count",
    "filter_units",
    "find_working_filters",
    "prunable_convolutions",
    "prune_model_custom",
    "prune_model_custom_fillback",
    "pruning_model",
    "remove_prune",
    "select_filters",
]


def pruning_model(model: nn.Module, px: float, conv1: bool = False) -> None:
    """Prune the fraction `px` of what is left of the convolutions, in place, by one global threshold.

    Exactly round(left * (1 - px)) weights survive this call. The first convolution takes part only with `conv1`.

    Raises:
        ValueError: `px` outside [0, 1).
    """
    prune_globally(model, prunable_convolutions(model, conv1), px)


def check_sparsity(model: nn.Module, conv1: bool = False) -> float:
    """Print the sparsity report of the convolutions and return the percentage of their weights that remains."""
    return print_sparsity(prunable_convolutions(model, conv1), "CNN")


def prune_model_custom(model: nn.Module, mask_dict: Mapping[str, Tensor], conv1: bool = False) -> None:
    """Apply masks (`X` or `X.weight_mask`) to the model in place by `torch.nn.utils.prune`."""
    weights = {name: module.weight for name, module in prunable_convolutions(model, conv1).items()}
    apply_masks(model, check_masks(mask_dict, weights))


def remove_prune(model: nn.Module, conv1: bool = False) -> None:
    """Make pruning permanent, in place: pruned weights become plain zeros and the masks are removed."""
    make_permanent(prunable_convolutions(model, conv1))


def prune_model_custom_fillback(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    train_loader: Iterable | None,
    trained_weight: Mapping[str, Tensor],
    init_weight: Mapping[str, Tensor],
    criteria: str = "l1",
    fillback_rate: float = 0.0,
    return_mask_only: bool = False,
):
    """Refill by filter: a layer keeps as many whole filters as its density asks for, and `fillback_rate` of the rest.

    Args:
        mask_dict: element-wise masks by layer name (`X` or `X.weight_mask`); see `select_filters`.
        train_loader: any iterable of (images, labels); None where the criterion scores weights.
        trained_weight: state dict that is scored; may carry weight_orig and weight_mask.
        init_weight: state dict that the returned model's weights come from.

    Returns:
        {layer: mask} when `return_mask_only` (the model is unchanged), else the model. Its masks are of kernels
        alone; gain and bias of the batch norm after a removed filter are zero in it.
    """
    if not 0 <= fillback_rate <= 1:
        raise ValueError(f"fillback_rate must lie in [0, 1], got {fillback_rate}")
    layers = prunable_convolutions(model, conv1=True)
    masks = check_masks(mask_dict, {name: module.weight for name, module in layers.items()})
    units = {name: group for name, group in filter_units(model, conv1=True).items() if name in masks}
    scores = score_units(model, units, criteria, mask=masks, trained_weight=trained_weight, batches=train_loader)
    kept = select_filters(masks, scores, fillback_rate)
    target = structured_masks(masks, units, kept)
    if return_mask_only:
        return target
    load_and_mask(model, init_weight, target)
    with torch.no_grad():
        for name, group in units.items():
            for part, layout in group.parts.items():
                if part != f"{name}.weight":
                    parameter = model.get_parameter(part)
                    parameter.mul_(layout.mask(parameter, kept[name]))
    return model
