"""Masks of Vision Transformers for scripts: prune, check, extract, apply, refill; element-wise and by head.

These functions take a model in hand and put masks onto it by `torch.nn.utils.prune`. They are thin: the masks come from
pure functions (`pruning/masks.py`, `pruning/ranking.py`), and training uses those alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from families.vit import VIT, layout_problem, vit_units
from pruning.masks import (
    Masks,
    apply_masks,
    check_masks,
    count_kept,
    density,
    elementwise_step,
    full_masks,
    load_and_mask,
    make_permanent,
    normalise_names,
    prune_globally,
    refill_rows,
    structured_masks,
)
from pruning.ranking import select_units
from pruning.reports import print_sparsity, sparsity_report
from pruning.scores import score_units
from pruning.threshold import magnitude_step
from pruning.units import row_units

__all__ = [
    "Masks",
    "apply_masks",
    "check_masks",
    "check_sparsity_vit",
    "count_kept",
    "density",
    "elementwise_step",
    "extract_mask_vit",
    "full_masks",
    "is_vit_model",
    "load_and_mask",
    "magnitude_step",
    "make_permanent",
    "print_sparsity",
    "prunable_layers",
    "prunable_weights",
    "prune_globally",
    "prune_model_custom_fillback_vit",
    "prune_model_custom_fillback_vit_by_head",
    "prune_model_custom_vit",
    "pruning_model_vit",
    "refill_rows",
    "remove_prune_vit",
    "sparsity_report",
    "structured_masks",
]


def is_vit_model(model: nn.Module) -> bool:
    """Whether this is a plain ViT, ours or timm's, that can be pruned here."""
    return layout_problem(model) is None


def prunable_layers(model: nn.Module, prune_patch_embed: bool = False) -> dict[str, nn.Module]:
    """Layers whose weights count as prunable, by name and in the model's order."""
    return VIT.prunable_layers(model, first=prune_patch_embed)


def prunable_weights(model: nn.Module, prune_patch_embed: bool = False) -> dict[str, Tensor]:
    """The prunable weights by layer name, detached; pruned models give the pruned values."""
    return {name: module.weight.detach() for name, module in prunable_layers(model, prune_patch_embed).items()}


def pruning_model_vit(model: nn.Module, px: float, prune_patch_embed: bool = False) -> None:
    """Prune the fraction `px` of what is left, in place, by one global threshold on absolute weights.

    Exactly round(left * (1 - px)) weights survive this call.

    Raises:
        ValueError: `px` outside [0, 1).
    """
    prune_globally(model, prunable_layers(model, prune_patch_embed), px)


def check_sparsity_vit(model: nn.Module, prune_patch_embed: bool = False) -> float:
    """Print the sparsity report and return the percentage of prunable weights that remains.

    Layers under `torch.nn.utils.prune` are judged by their mask, others by which of their weights are zero.
    """
    return print_sparsity(prunable_layers(model, prune_patch_embed), "ViT")


def extract_mask_vit(state_dict: Mapping[str, Tensor]) -> Masks:
    """The masks that a pruned model's state dict holds, keyed X.weight_mask."""
    return {name: mask.clone() for name, mask in state_dict.items() if name.endswith("weight_mask")}


def prune_model_custom_vit(model: nn.Module, mask_dict: Mapping[str, Tensor], prune_patch_embed: bool = False) -> None:
    """Apply masks (`X` or `X.weight_mask`) to the model in place by `torch.nn.utils.prune`."""
    apply_masks(model, check_masks(mask_dict, prunable_weights(model, prune_patch_embed)))


def remove_prune_vit(model: nn.Module, prune_patch_embed: bool = False) -> None:
    """Make pruning permanent, in place: pruned weights become plain zeros and the masks are removed."""
    make_permanent(prunable_layers(model, prune_patch_embed))


def prune_model_custom_fillback_vit(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    train_loader: Iterable | None,
    trained_weight: Mapping[str, Tensor],
    init_weight: Mapping[str, Tensor],
    criteria: str = "l1",
    fillback_rate: float = 0.0,
    return_mask_only: bool = False,
):
    """Element-wise Refill: each layer gets `fillback_rate` of its pruned weights back, best rows first.

    Args:
        mask_dict: element-wise masks by layer name (`X` or `X.weight_mask`).
        train_loader: any iterable of (images, labels); None where the criterion scores weights.
        trained_weight: state dict that is scored; may carry weight_orig and weight_mask.
        init_weight: state dict that the returned model's weights come from.

    Returns:
        {layer: mask} when `return_mask_only` (the model is unchanged), else the model.
    """
    if not 0 <= fillback_rate <= 1:
        raise ValueError(f"fillback_rate must lie in [0, 1], got {fillback_rate}")
    layers = prunable_layers(model, prune_patch_embed="patch_embed.proj" in normalise_names(mask_dict))
    masks = check_masks(mask_dict, {name: module.weight for name, module in layers.items()})
    scores = score_units(
        model,
        row_units({name: layers[name] for name in masks}),
        criteria,
        mask=masks,
        trained_weight=trained_weight,
        batches=train_loader,
    )
    refilled = refill_rows(masks, scores, fillback_rate)
    return refilled if return_mask_only else load_and_mask(model, init_weight, refilled)


def prune_model_custom_fillback_vit_by_head(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    train_loader: Iterable | None,
    trained_weight: Mapping[str, Tensor],
    init_weight: Mapping[str, Tensor],
    criteria: str = "l1",
    prune_ratio: float = 0.2,
    return_mask_only: bool = False,
):
    """Refill by head: the best heads of each layer are whole, the others zero, the MLPs untouched.

    Args:
        mask_dict: element-wise masks; criterion `remain` counts in them, and a head all zero in them stays pruned.
        prune_ratio: fraction of all heads of a layer to prune, in [0, 1).

    The rest is as in `prune_model_custom_fillback_vit`.
    """
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"prune_ratio must lie in [0, 1), got {prune_ratio}")
    units = vit_units(model, ("head",))
    weights = prunable_weights(model)
    masks = check_masks(mask_dict, weights)
    scores = score_units(model, units, criteria, mask=masks, trained_weight=trained_weight, batches=train_loader)
    target = structured_masks(weights, units, select_units(scores, prune_ratio))
    return target if return_mask_only else load_and_mask(model, init_weight, target)
