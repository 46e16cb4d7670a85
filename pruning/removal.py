"""Units cut out of tensors and models, and put back: what is dense comes in, what is smaller goes out, and the inverse.

    small = slice_tensors(tensors, units, kept)      # by name, without the units that are not kept
    dense = scatter_tensors(small, units, kept)      # zero where they were
    remove_units(model, units, kept)                 # the same to a model, in place

Which rows and columns go is said by the units' parts and followers; nothing is scored or chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruning.units import Kept, Units


def slice_tensors(tensors: Mapping[str, Tensor], units: Mapping[str, Units], kept: Kept) -> dict[str, Tensor]:
    """The tensors of the smaller model: units that are not kept are cut out, everything else is cloned."""
    small = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for key, group in units.items():
        if key in kept:
            for name, layout in group.cut_out:
                if name in small:
                    index = torch.as_tensor(kept[key], dtype=torch.long, device=small[name].device)
                    small[name] = layout.select(small[name], index)
    return small


def scatter_tensors(small: Mapping[str, Tensor], units: Mapping[str, Units], kept: Kept) -> dict[str, Tensor]:
    """The inverse of `slice_tensors`: tensors of the dense shapes, zero where units were cut out."""
    dense = {name: tensor.detach().clone() for name, tensor in small.items()}
    for key, group in units.items():
        if key in kept:
            for name, layout in group.cut_out:
                if name in dense:
                    index = torch.as_tensor(kept[key], dtype=torch.long, device=dense[name].device)
                    dense[name] = layout.scatter(dense[name], index)
    return dense


def remove_units(model: nn.Module, units: Mapping[str, Units], kept: Kept) -> nn.Module:
    """Cut the units that are not kept out of `model`, in place; `units` describes the model as it is before.

    The function stays the same wherever what the removed units give to others is zero, such as their columns in
    `attn.proj` and `mlp.fc2`: head_dim, the scale head_dim ** -0.5, the output biases, the norms and the residual
    width are untouched.

    Raises:
        ValueError: the model is under `torch.nn.utils.prune`; make that permanent first (`remove_prune_vit`).
    """
    if prune.is_pruned(model):
        raise ValueError("the model is under torch.nn.utils.prune; call remove_prune_vit or remove_prune first")
    for key, group in units.items():
        if key not in kept:
            continue
        for name, layout in group.cut_out:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            tensor = getattr(module, leaf)
            index = torch.as_tensor(kept[key], dtype=torch.long, device=tensor.device)
            small = layout.select(tensor.detach(), index)
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, requires_grad=tensor.requires_grad)
            setattr(module, leaf, small)
            if leaf == "weight":
                _tell_size(module)
        if group.resize:
            group.resize(model.get_submodule(key if group.module is None else group.module), len(kept[key]))
        if group.place and len(kept[key]) < group.count:
            path, _, leaf = group.place.rpartition(".")
            block = model.get_submodule(path)
            earlier = getattr(block, leaf)  # where what is left of an earlier removal went
            setattr(block, leaf, index if earlier is None else earlier[index])
    return model


def _tell_size(module: nn.Module) -> None:
    """Bring a layer's own record of its size in line with its weight."""
    shape = module.weight.shape
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = shape[:2]
    elif isinstance(module, nn.BatchNorm2d):
        (module.num_features,) = shape
    elif not isinstance(module, nn.LayerNorm):  # which goes on normalising over its whole width
        module.out_features, module.in_features = shape
