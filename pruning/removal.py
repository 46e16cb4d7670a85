"""Removes units physically from tensors and models, and puts tensors back into their dense shapes.

    small = slice_tensors(tensors, units, kept)      # by name, without the units that are not kept
    dense = scatter_tensors(small, units, kept)      # zero where they were
    remove_units(model, units, kept)                 # the same to a model, in place

Which rows and columns that means, the units' parts and followers say; nothing is scored or chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pruning.units import Kept, Units


def slice_tensors(tensors: Mapping[str, Tensor], units: Mapping[str, Units], kept: Kept) -> dict[str, Tensor]:
    """The tensors of the smaller model: units that are not kept are cut out, everything else is cloned."""
    return _changed(tensors, units, kept, lambda layout, tensor, ids: layout.select(tensor, ids))


def scatter_tensors(small: Mapping[str, Tensor], units: Mapping[str, Units], kept: Kept) -> dict[str, Tensor]:
    """The inverse of `slice_tensors`: tensors of the dense shapes, zero where units were cut out."""
    return _changed(small, units, kept, lambda layout, tensor, ids: layout.scatter(tensor, ids))


def _changed(tensors: Mapping[str, Tensor], units: Mapping[str, Units], kept: Kept, change: Callable) -> dict:
    found = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for key, group in units.items():
        for name, layout in group.cut_out if key in kept else ():
            if name in found:
                found[name] = change(layout, found[name], _index(kept[key], found[name]))
    return found


def _index(ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.long, device=like.device)


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
            small = layout.select(tensor.detach(), _index(kept[key], tensor))
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, requires_grad=tensor.requires_grad)
            setattr(module, leaf, small)
            if leaf == "weight":
                _update_size(module)
        if group.resize:
            group.resize(model.get_submodule(key if group.module is None else group.module), len(kept[key]))
        if group.place and len(kept[key]) < group.count:
            path, _, leaf = group.place.rpartition(".")
            block = model.get_submodule(path)
            earlier = getattr(block, leaf)  # the places of the filters that an earlier removal left
            index = _index(kept[key], model.get_submodule(key).weight)
            setattr(block, leaf, index if earlier is None else earlier[index])
    return model


def _update_size(module: nn.Module) -> None:
    """Bring a layer's own record of its size in line with its weight."""
    shape = module.weight.shape
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = shape[:2]
    elif isinstance(module, nn.BatchNorm2d):
        (module.num_features,) = shape
    elif not isinstance(module, nn.LayerNorm):  # which keeps normalising over its dense width
        module.out_features, module.in_features = shape
