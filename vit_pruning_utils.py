"""Masks of Vision Transformers: make, check, apply, extract, refill; element-wise and by head.

A mask set (`Masks`) is a value: layer name -> weight-shaped tensor of exactly 0 and 1. Pruning steps are pure, weights
and masks in, masks out; putting masks onto a model is a separate, named act. `torch.nn.utils.prune` appears only in
the functions of the second half, which scripts call with a model in hand; training never uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from vit_structured_pruning import (
    PRUNABLE_SUFFIXES,
    Kept,
    Units,
    layout_problem,
    normalise_names,
    plain_weights,
    row_units,
    score_units,
    select_units,
    unit_masks,
    vit_units,
)

Masks = dict[str, Tensor]


# ----------------------------------------------------------------------------------------- masks as values


def is_vit_model(model: nn.Module) -> bool:
    """Whether this is a plain ViT, ours or timm's, that can be pruned here."""
    return layout_problem(model) is None


def prunable_layers(model: nn.Module, prune_patch_embed: bool = False) -> dict[str, nn.Module]:
    """Layers whose weights count as prunable, by name and in the model's order."""
    suffixes = PRUNABLE_SUFFIXES + (("patch_embed.proj",) if prune_patch_embed else ())
    return {name: module for name, module in model.named_modules() if name.endswith(suffixes)}


def prunable_weights(model: nn.Module, prune_patch_embed: bool = False) -> dict[str, Tensor]:
    """The prunable weights by layer name, detached; pruned models give the pruned values."""
    return {name: module.weight.detach() for name, module in prunable_layers(model, prune_patch_embed).items()}


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


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of the float
_SAMPLE = 2**14
_BIN_BITS = 13


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Keys:
    """One layer as integers that order like the absolute values of its survivors; what the mask removed is -1.

    Without their sign the bits of floats order like integers, every NaN above infinity. Keys are made piece by piece
    whenever they are asked for: NumPy arrays on the host, where torch would wake its threads for each small piece and
    searches slowly, tensors elsewhere.
    """

    def __init__(self, weight: Tensor, mask: Tensor, dtype: torch.dtype):
        integer = _INTEGERS[dtype.itemsize]
        self.magnitude = torch.iinfo(integer).max
        # flatten, not view: convolutions may be stored channels last
        self.bits = weight.detach().to(dtype).flatten().view(integer)
        removed = (~mask.flatten().to(weight.device).bool()).to(torch.int8).neg_()
        self.library, self.piece = torch, 2**24
        if _on_host(weight):
            self.library, self.piece = np, 2**17  # a piece and what is made of it stay in a core's cache
            self.bits, removed = self.bits.numpy(), removed.numpy()
        self.surviving = len(removed) - int(self.library.count_nonzero(removed))
        self.removed = None if self.surviving == len(removed) else removed

    def __len__(self) -> int:
        return len(self.bits)

    def part(self, where: slice):
        keys = self.bits[where] & self.magnitude
        return keys if self.removed is None else keys | self.removed[where]

    def pieces(self):
        """(slice, keys) from the first to the last."""
        for start in range(0, len(self), self.piece):
            where = slice(start, start + self.piece)
            yield where, self.part(where)

    def sample(self, stride: int) -> np.ndarray:
        return np.asarray(torch.as_tensor(self.part(slice(stride // 2, None, stride))).cpu(), np.int64)


def _bracket(layers: list[_Keys], rank: int) -> tuple[int, int]:
    """Where the key of that rank most likely lies, both ends included: four standard errors of a sample around it."""
    total = sum(map(len, layers))
    sample = np.sort(np.concatenate([layer.sample(max(1, total // _SAMPLE)) for layer in layers]))[::-1]
    centre, margin = rank / total * len(sample), 2 * len(sample) ** 0.5
    first, last = int(centre - margin), int(centre + margin)
    high = int(sample[first]) if first >= 0 else layers[0].magnitude
    return max(0, int(sample[last]) if last < len(sample) else 0), max(0, high)


def _select(layers: list[_Keys], rank: int) -> tuple[int, int]:
    """The key that is number `rank` (from 1) in descending order, and how many of its equals are within that rank.

    Radix selection that starts from a sampled bracket: a pass counts what lies above the bracket and, in equal bins,
    what lies inside; the bin of that rank is the next bracket. A sample that misled costs a pass, never the result.
    """
    low, high = _bracket(layers, rank)
    while True:
        shift = max(0, (high - low).bit_length() - _BIN_BITS)
        above, bins = 0, np.zeros(2**_BIN_BITS, np.int64)
        for layer in layers:
            for _, keys in layer.pieces():
                above += int(layer.library.count_nonzero(keys > high))
                inside = keys[(keys >= low) & (keys <= high)] - low
                bins += np.asarray(torch.as_tensor(layer.library.bincount(inside >> shift, minlength=len(bins))).cpu())
        at_least = above + bins[::-1].cumsum()  # keys in the highest bin or above, in the two highest, ...
        if rank <= above:
            low, high = high + 1, layers[0].magnitude
        elif rank > at_least[-1]:
            low, high = 0, low - 1
        else:
            position = int(np.searchsorted(at_least, rank))
            found = len(bins) - 1 - position
            low += found << shift
            if shift == 0:
                return low, rank - int(at_least[position] - bins[found])
            high = min(high, low + (1 << shift) - 1)


def magnitude_step(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int) -> Masks:
    """The `keep` largest absolute values among all weights that survive in `masks` (one global threshold).

    Of equal values the one that comes first in (layer, index) order is kept, so exactly min(keep, surviving) weights
    stay; NaN counts as larger than infinity. The threshold is found on the device that holds the weights, without
    a copy of them: besides the result this takes a byte for each weight of a layer that is already pruned.

    Args:
        weights: floating point, by layer name; `masks` has the same names, shapes and order.

    Returns:
        New masks, each contained in the old one.
    """
    if not masks or keep <= 0:
        return {name: torch.zeros_like(mask) for name, mask in masks.items()}
    dtype = functools.reduce(torch.promote_types, {weights[name].dtype for name in masks})
    layers = [_Keys(weights[name], mask, dtype) for name, mask in masks.items()]
    if keep >= sum(layer.surviving for layer in layers):
        return {name: mask.clone() for name, mask in masks.items()}
    threshold, ties_kept = _select(layers, keep)
    result = {}
    for layer, (name, mask) in zip(layers, masks.items(), strict=True):
        kept = layer.library.empty_like(layer.bits, dtype=bool)
        for where, keys in layer.pieces():
            kept[where] = keys > threshold
            if ties_kept:
                ties = layer.library.where(keys == threshold)[0][:ties_kept]
                kept[where][ties] = True
                ties_kept -= len(ties)
        result[name] = torch.as_tensor(kept).reshape(mask.shape).to(mask)
    return result


def elementwise_step(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rate: float,
    step: int,
    unit_masks: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Iterative magnitude pruning: after step k, round(n (1 - rate)^k) of n prunable weights survive.

    Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, with one threshold over all layers. n counts all
    weights, or those inside `unit_masks` where whole units are gone: a removed unit's weights count as pruned.
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


def sparsity_report(masks: Mapping[str, Tensor], family: str = "ViT") -> str:
    """The [ViT Sparsity Report]: one line a layer, then overall sparsity and what remains."""
    lines = [f"[{family} Sparsity Report]"]
    for name, mask in masks.items():
        zero = 100 * (1 - density({name: mask}))
        lines.append(f"{name + '.weight_mask':<38} | Sparsity: {zero:.2f}%")
    remaining = 100 * density(masks)
    lines += [f"Overall sparsity: {100 - remaining:.2f}%", f"Remaining weights: {remaining:.2f}%"]
    return "\n".join(lines)


# ------------------------------------------------------------------- models under torch.nn.utils.prune


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks on the model's layers by `torch.nn.utils.prune`, in place of those that are there."""
    for name, mask in masks.items():
        module = model.get_submodule(name)
        make_permanent({name: module})
        prune.custom_from_mask(module, "weight", mask.to(module.weight))


def make_permanent(layers: Mapping[str, nn.Module]) -> None:
    """Pruned weights become plain zeros, in place, and the masks of `torch.nn.utils.prune` go."""
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


def print_sparsity(layers: Mapping[str, nn.Module], family: str) -> float:
    """Print the sparsity report and return the percentage that remains; see `check_sparsity_vit`."""
    masks = {name: getattr(module, "weight_mask", module.weight).detach() != 0 for name, module in layers.items()}
    print(sparsity_report(masks, family))
    return 100 * density(masks)


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
    """Make pruning permanent, in place: pruned weights become plain zeros and the masks go."""
    make_permanent(prunable_layers(model, prune_patch_embed))


def load_and_mask(model: nn.Module, init_weight: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
    """The model with weights copied from `init_weight` and `masks` applied by `torch.nn.utils.prune`."""
    make_permanent(dict(model.named_modules()))
    model.load_state_dict(plain_weights(init_weight))
    apply_masks(model, masks)
    return model


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
        {layer: mask} when `return_mask_only` (the model stays as it was), else the model.
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
        mask_dict: element-wise masks; criterion `remain` counts in them, and a head all zero in them stays away.
        prune_ratio: fraction of all heads of a layer that goes, in [0, 1).

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
