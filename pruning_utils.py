"""Masks and units of convolutional networks: what a filter is, and what Refill and RSST keep of a layer.

Masks are the same values as a Vision Transformer's (`vit_pruning_utils`), filters the same `Units`, scored by the same
scorer and ranked by the same rule (`vit_structured_pruning`). The last part asks of any model, ViT or ResNet, what the
loop over states and the export need to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from models.resnet import ResNet
from vit_pruning_utils import (
    Masks,
    apply_masks,
    check_masks,
    density,
    load_and_mask,
    make_permanent,
    print_sparsity,
    prune_globally,
    structured_masks,
)
from vit_pruning_utils import extract_mask_vit as extract_mask
from vit_pruning_utils import prunable_layers as prunable_vit_layers
from vit_structured_pruning import (
    Kept,
    Layout,
    Tap,
    Units,
    best_first,
    find_working_units,
    fold_dead_units_,
    score_units,
    vit_cost,
    vit_units,
)

__all__ = ["extract_mask"]  # the same for every model, and public here too

# ----------------------------------------------------------------------------------------------- filters as units


def prunable_convolutions(model: nn.Module, conv1: bool = False) -> dict[str, nn.Conv2d]:
    """All convolutions by name, in the model's order, without the first one unless `conv1`."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return dict(list(found.items())[0 if conv1 else 1 :])


def filter_units(model: nn.Module, conv1: bool = False) -> dict[str, Units]:
    """The filters of each prunable convolution as units, keyed by its name.

    A filter is its kernel with the gain and bias of the batch norm behind it: batch norm divides a kernel's scale out
    again, so that a kernel alone cannot fade. Physically removable are the filters of a residual block: those of its
    first convolution together with what reads them, those of its second one because the block places what is left in
    the residual stream, whose width stays. Stem and projections keep theirs.
    """
    modules = dict(model.named_modules())
    units = {}
    for layer, (name, convolution) in enumerate(prunable_convolutions(model, conv1).items()):
        count, block = convolution.out_channels, name.rpartition(".")[0]
        rows = Layout(0, 1, count, 1)
        norm = _norm_behind(name)
        parts, followers, place = {f"{name}.weight": rows}, {}, None
        if isinstance(modules.get(norm), nn.BatchNorm2d):
            parts |= {f"{norm}.weight": rows, f"{norm}.bias": rows}
            followers = {f"{norm}.running_mean": rows, f"{norm}.running_var": rows}
        if convolution.bias is not None:
            parts[f"{name}.bias"] = rows
        in_block = hasattr(modules[block], "out_index")
        if in_block and name.endswith("conv1"):
            followers[f"{block}.conv2.weight"] = Layout(1, 1, count, 1)
        elif in_block and name.endswith("conv2"):
            place = f"{block}.out_index"
        output = Tap(name, "output", Layout(1, 1, count, 1))
        units[name] = Units("filter", layer, count, parts, output, output, followers, place, removable=in_block)
    return units


def _norm_behind(name: str) -> str:
    """The batch norm's name: bn2 behind conv2, downsample.1 behind downsample.0."""
    path, _, leaf = name.rpartition(".")
    sibling = str(int(leaf) + 1) if leaf.isdigit() else leaf.replace("conv", "bn")
    return f"{path}.{sibling}" if path else sibling


def filter_count(filters: int, density: float, fillback_rate: float) -> int:
    """Whole filters that a layer keeps: int(left + (filters - left) * fillback_rate + 1e-9), left = density * filters;
    at least one."""
    left = filters * density
    return max(1, int(left + (filters - left) * fillback_rate + 1e-9))


def select_filters(masks: Masks, scores: Mapping[str, Tensor], fillback_rate: float) -> dict[str, list[int]]:
    """Which filters of each layer stay whole: {layer: ids, ascending}.

    How many follows from the layer's density in the element-wise masks, see `filter_count`. A filter whose kernel is
    all zero there (scored -inf) is not chosen, unless the layer has nothing else.
    """
    kept = {}
    for name, values in scores.items():
        keep = filter_count(len(values), density({name: masks[name]}), fillback_rate)
        kept[name] = sorted(best_first(values)[:keep].tolist()) or [0]
    return kept


def cnn_cost(model: ResNet, kept: Kept) -> dict[str, int]:
    """Filters, parameters and MACs per image of `model` once the other filters are removed (keys absent: all stay).

    MACs are those of convolutions and classifier: output pixels x weights. Filters that cannot be removed count as
    gone among the filters, and in full among parameters and MACs.
    """
    units = filter_units(model, conv1=True)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for key, ids in kept.items():
        for name, layout in units[key].cut_out:
            if name in shapes:
                shapes[name][layout.dim] = len(ids)
    macs = math.prod(shapes["fc.weight"])
    for name, convolution in prunable_convolutions(model, conv1=True).items():
        side = model.img_size
        for _ in range(int(name[len("layer")]) - 1 if name.startswith("layer") else 0):
            side = (side + 1) // 2  # the first block of each stage after the first has stride 2
        macs += math.prod(shapes[f"{name}.weight"]) * side**2 // convolution.groups
    return {
        "filters": sum(len(kept.get(key, range(group.count))) for key, group in units.items()),
        "parameters": sum(map(math.prod, shapes.values())),
        "macs": macs,
    }


@torch.no_grad()
def find_working_filters(model: nn.Module) -> dict[str, list[int]]:
    """Which filters still work: {layer: ids}; dead is one whose kernel, gain and bias are all zero.

    A bias left alone emits a constant that zero padding cuts off at the border, so such a filter cannot be folded away.
    """
    alive = {}
    for name, group in filter_units(model, conv1=True).items():
        tensors = [layout.per_unit(model.get_parameter(part)) for part, layout in group.parts.items()]
        alive[name] = torch.cat(tensors, dim=1).any(1).nonzero().flatten().tolist() or [0]
    return alive


# ------------------------------------------------------------------- models under torch.nn.utils.prune


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
    """Make pruning permanent, in place: pruned weights become plain zeros and the masks go."""
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
        {layer: mask} when `return_mask_only` (the model stays as it was), else the model. Its masks are of kernels
        alone; gain and bias of the batch norm behind a removed filter are zero in it.
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


# ------------------------------------------------------------------------------------------------ any model


def is_cnn(model: nn.Module) -> bool:
    return isinstance(model, ResNet)


def family(model: nn.Module) -> str:
    return "CNN" if is_cnn(model) else "ViT"


def units_of(model: nn.Module) -> dict[str, Units]:
    """Every unit that can be removed: heads and neurons, or filters."""
    return filter_units(model, conv1=True) if is_cnn(model) else vit_units(model)


def prunable_layers(model: nn.Module, first: bool = False) -> dict[str, nn.Module]:
    """Layers whose weights count as prunable; `first` adds the patch embedding or the first convolution."""
    return prunable_convolutions(model, first) if is_cnn(model) else prunable_vit_layers(model, first)


def cost_of(model: nn.Module, kept: Kept) -> dict[str, int]:
    """Heads and neurons, or filters; parameters and MACs, once only the kept units are left."""
    return cnn_cost(model, kept) if is_cnn(model) else vit_cost(model, kept)


def working_units_(model: nn.Module) -> dict[str, list[int]]:
    """The units that still work where single weights were pruned; what dead ones emit is folded away, in place."""
    if is_cnn(model):
        return find_working_filters(model)
    kept = find_working_units(model)
    fold_dead_units_(model, kept)
    return kept


def classifier_prefix(model: nn.Module) -> str:
    """What the names of the classifier's parameters start with; distilled models have `head` and `head_dist`."""
    return "fc." if is_cnn(model) else "head"


def image_size(model: nn.Module) -> int:
    """Pixels a side of the images that the model is built for."""
    return model.img_size if is_cnn(model) else model.patch_embed.img_size[0]
