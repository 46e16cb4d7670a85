"""Heads and neurons together for scripts: Refill in one call, and the ranking in two pools or in one by cost.

The ranking rule is written in `pruning/ranking.py`; its effect is reported by `pruning/reports.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from families.vit import vit_units
from pruning.masks import check_masks, load_and_mask, structured_masks
from pruning.ranking import KINDS, mark_removed, rank_units, target_ratios
from pruning.scores import score_units
from vit_pruning_utils import prunable_weights

__all__ = [
    "KINDS",
    "mark_removed",
    "prune_model_custom_fillback_vit_head_and_mlp",
    "rank_units",
    "target_ratios",
]


def prune_model_custom_fillback_vit_head_and_mlp(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    train_loader: Iterable | None,
    trained_weight: Mapping[str, Tensor],
    init_weight: Mapping[str, Tensor],
    criteria: str = "l1",
    head_prune_ratio: float = 0.2,
    mlp_prune_ratio: float = 0.2,
    return_mask_only: bool = False,
    sorting_mode: str = "layer-wise",
):
    """Refill by head and neuron: the best units are whole, the others zero.

    Args:
        model: a plain ViT, ours or timm's; its own device is used.
        mask_dict: element-wise masks (`X` or `X.weight_mask`); criterion `remain` counts in them, and a unit all zero
            in them stays pruned.
        train_loader: any iterable of (images, labels); None where the criterion scores weights.
        trained_weight: state dict that is scored; may carry weight_orig and weight_mask.
        init_weight: state dict that the returned model's weights come from.
        head_prune_ratio, mlp_prune_ratio: fractions of heads and neurons to prune, in [0, 1); 0 prunes none.

    Returns:
        {layer: mask} when `return_mask_only` (the model is unchanged), else the model with `init_weight` under
        the masks, by `torch.nn.utils.prune`.
    """
    ratios = target_ratios("both", head_prune_ratio, mlp_prune_ratio)
    for kind, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise ValueError(f"{kind} ratio must lie in [0, 1), got {ratio}")
    units = vit_units(model)
    weights = prunable_weights(model)
    masks = check_masks(mask_dict, weights)
    scores = score_units(model, units, criteria, mask=masks, trained_weight=trained_weight, batches=train_loader)
    target = structured_masks(weights, units, rank_units(model, units, scores, ratios, sorting_mode))
    return target if return_mask_only else load_and_mask(model, init_weight, target)
