"""What a unit is: the share of each tensor that belongs to a head, a neuron, a filter or any row, as data.

    Layout    how one dimension of one tensor is divided among units
    Units     all units of one kind in one layer: their parts, their followers, where they show as activations

Masks, penalty, removal and scores all take the rows and columns of a unit from its `parts`. A unit of another kind is
one more list of parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

Kept = Mapping[str, Sequence[int]]  # units key -> kept ids, ascending


class LayoutError(ValueError):
    """A model whose blocks cannot be pruned by unit; the message gives the reason."""


@dataclass(frozen=True)
class Layout:
    """How one tensor dimension is divided among units: `dim` has length lead * count * width, in that order.

    The rows of `attn.qkv` are (3, heads, head_dim), its consumer's columns (1, heads, head_dim), the neurons of
    an MLP (1, hidden, 1). Where a tensor holds units of two kinds along `dim`, such as a parallel block's `in_proj`,
    `side` says whose the front and whose the back is.
    """

    dim: int
    lead: int
    count: int
    width: int
    side: str = ""  # "front", "back", or all of it

    def own(self, tensor: Tensor, count: int | None = None) -> Tensor:
        """The units' part of `dim`, as a view; `count` units where it is no longer all of them."""
        if not self.side:
            return tensor
        length = self.lead * (self.count if count is None else count) * self.width
        return tensor.narrow(self.dim, 0 if self.side == "front" else tensor.shape[self.dim] - length, length)

    def split(self, tensor: Tensor) -> Tensor:
        """[..., lead * count * width, ...] -> [..., lead, count, width, ...]."""
        return self.own(tensor).unflatten(self.dim, (self.lead, self.count, self.width))

    def per_unit(self, tensor: Tensor) -> Tensor:
        """A weight tensor as [count, elements of each unit]."""
        return self.split(tensor).movedim(self.dim + 1, 0).flatten(1)

    def per_image(self, activation: Tensor) -> Tensor:
        """An activation [images, ...] as [images, count, values of each unit]; `dim` counts from the end."""
        dim = self.dim % activation.ndim
        split = self.own(activation).unflatten(dim, (self.lead, self.count, self.width))
        return split.movedim(dim + 1, 1).flatten(2)

    def select(self, tensor: Tensor, kept: Tensor) -> Tensor:
        """Only the kept units' share of `tensor`, in the same order of dimensions."""
        share = self.split(tensor).index_select(self.dim + 1, kept).flatten(self.dim, self.dim + 2)
        return torch.cat(self._beside(share, tensor, self.count), self.dim) if self.side else share

    def scatter(self, small: Tensor, kept: Tensor) -> Tensor:
        """The inverse of `select`: zero where units were left out."""
        share = self.own(small, len(kept)).unflatten(self.dim, (self.lead, len(kept), self.width))
        shape = list(share.shape)
        shape[self.dim + 1] = self.count
        whole = share.new_zeros(shape).index_copy_(self.dim + 1, kept, share).flatten(self.dim, self.dim + 2)
        return torch.cat(self._beside(whole, small, len(kept)), self.dim) if self.side else whole

    def _beside(self, share: Tensor, tensor: Tensor, count: int) -> list[Tensor]:
        """The units' new share and, before or behind it, the others' of a tensor that holds `count` of these units."""
        length = tensor.shape[self.dim] - self.lead * count * self.width
        if self.side == "front":
            return [share, tensor.narrow(self.dim, tensor.shape[self.dim] - length, length)]
        return [tensor.narrow(self.dim, 0, length), share]

    def mask(self, like: Tensor, kept: Sequence[int]) -> Tensor:
        """0/1 tensor of `like`'s shape, 0 on the elements of the units that are not kept."""
        mask = torch.ones_like(like)
        self.own(mask).zero_()
        index = torch.as_tensor(kept, dtype=torch.long, device=like.device)
        self.split(mask).index_fill_(self.dim + 1, index, 1)
        return mask


@dataclass(frozen=True)
class Stack:
    """How a tensor of all layers' units, [..., layers, units, ...], follows the units of one layer.

    As layers may keep different numbers, its shape is unchanged: the kept units of a layer come first, then zeros.
    """

    dim: int  # of the layers; that of the units is the next
    layer: int
    count: int

    def select(self, tensor: Tensor, kept: Tensor) -> Tensor:
        return self._moved(tensor, kept, torch.arange(len(kept), device=kept.device))

    def scatter(self, small: Tensor, kept: Tensor) -> Tensor:
        return self._moved(small, torch.arange(len(kept), device=kept.device), kept)

    def _moved(self, tensor: Tensor, source: Tensor, target: Tensor) -> Tensor:
        result, values = tensor.clone(), tensor.select(self.dim, self.layer).index_select(self.dim, source)
        result.select(self.dim, self.layer).zero_().index_copy_(self.dim, target, values)
        return result

    def mask(self, like: Tensor, kept: Sequence[int]) -> Tensor:
        """0/1 tensor of `like`'s shape, 0 on what follows units that are not kept."""
        mask = torch.ones_like(like)
        gone = [unit for unit in range(self.count) if unit not in set(kept)]
        index = torch.as_tensor(gone, dtype=torch.long, device=like.device)
        mask.select(self.dim, self.layer).index_fill_(self.dim, index, 0)
        return mask


@dataclass(frozen=True)
class Tap:
    """A place in the network where units show as activations: a module's input or output.

    `compute(module, activation)` makes what `layout` divides of it, where no module gives that by itself: the queries,
    keys and values of several layers, or of a layer whose bias is kept apart. Where the module sees `windows`, the
    first dimension is images x windows, those of one image in a row.
    """

    module: str
    side: str  # "input" or "output"
    layout: Layout
    compute: Callable[[nn.Module, Tensor], Tensor] | None = None
    windows: bool = False

    def values(self, module: nn.Module, activation: Tensor) -> Tensor:
        return activation if self.compute is None else self.compute(module, activation)

    def per_image(self, activation: Tensor, images: int) -> Tensor:
        """What was seen of that many images as [images, count, values of each unit]."""
        return self.layout.per_image(activation.unflatten(0, (images, -1)) if self.windows else activation)


@dataclass(frozen=True)
class Reader:
    """The one layer that reads units: what least squares repairs when some of them go (`pruning.repair`).

    Attributes:
        layer: its name, a linear layer or a convolution.
        columns: how dimension 1 of its weight is divided among the units.
        norm: a norm between units and layer that counts all of them.
        gate: a layer whose sigmoid multiplies what the norm gives.
        scale: the factors, a parameter [out], by which what the layer gives is multiplied before others hear it.
        shift: the running mean of the batch norm behind a layer that has no bias; taking x from it adds x.
    """

    layer: str
    columns: Layout
    norm: str | None = None
    gate: str | None = None
    scale: str | None = None
    shift: str | None = None


@dataclass(frozen=True)
class Units:
    """All units of one kind in one layer.

    `parts` maps parameter names to the layout of the units in them. Weight criteria score those that `weights` names,
    or the first one. `output` is where l1 and l2 look, `contribution` where saliency looks.

    `followers` are tensors that do not belong to a unit but shrink with it when it is physically removed: weights that
    read it, and statistics of it. `place` names a buffer with the positions of the kept units' outputs in a wider
    tensor. Units that are not `removable` stay in the smaller network, at zero.

    `resize(module, count)` stores how many units are left in the module that `module`, or else the units' key, names.
    `macs(model, units)` counts what one unit costs; None where that depends on what else is left. Units that are
    `listed` are few enough for reports to name each of them. Parts that are `unranked` are no prunable weights, though
    weights of a layer. `reader` is None where no layer or more than one reads them.
    """

    kind: str  # "head", "neuron", "filter", "row"
    layer: int
    count: int
    parts: Mapping[str, Layout]
    output: Tap
    contribution: Tap
    followers: Mapping[str, Layout | Stack] = field(default_factory=dict)
    place: str | None = None
    removable: bool = True
    resize: Callable[[nn.Module, int], None] | None = None
    macs: Callable[[nn.Module, Units], int] | None = None
    listed: bool = False
    weights: tuple[str, ...] = ()
    module: str | None = None
    unranked: tuple[str, ...] = ()
    reader: Reader | None = None

    @property
    def scored(self) -> dict[str, Layout]:
        """The weights whose elements weight criteria score."""
        return {name: self.parts[name] for name in self.weights or [next(iter(self.parts))]}

    @property
    def cut_out(self) -> Iterator[tuple[str, Layout | Stack]]:
        """All tensors that get shorter when units are physically removed."""
        return chain(self.parts.items(), self.followers.items()) if self.removable else iter(())


def row_units(layers: Mapping[str, nn.Module]) -> dict[str, Units]:
    """The output rows of each layer as units, keyed by the layer's name; what element-wise refill ranks."""
    units = {}
    for index, (name, module) in enumerate(layers.items()):
        rows = module.weight.shape[0]
        tap = Tap(name, "output", Layout(-1 if isinstance(module, nn.Linear) else 1, 1, rows, 1))
        units[name] = Units("row", index, rows, {f"{name}.weight": Layout(0, 1, rows, 1)}, tap, tap)
    return units


def unit_masks(units: Mapping[str, Units], kept: Kept, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0/1 masks by parameter name, 1 on the kept units, for those parameters of theirs that `tensors` holds."""
    masks: dict[str, Tensor] = {}
    for key, group in units.items():
        for name, layout in group.parts.items() if key in kept else ():
            if name in tensors:
                mask = layout.mask(tensors[name], kept[key])
                masks[name] = masks[name] * mask if name in masks else mask
    return masks


def follower_masks(units: Mapping[str, Units], kept: Kept, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0/1 masks of followers by name, 1 on what belongs to kept units; only of those with units that are not kept."""
    masks: dict[str, Tensor] = {}
    for key, group in units.items():
        if group.removable and len(kept.get(key, range(group.count))) < group.count:
            for name in group.followers.keys() & tensors.keys():
                mask = group.followers[name].mask(tensors[name], kept[key])
                masks[name] = masks[name] * mask if name in masks else mask
    return masks


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of the model as it is."""
    return sum(parameter.numel() for parameter in model.parameters())


def unit_weights(model: nn.Module, group: Units) -> int:
    """Prunable weights that one unit of the group holds (biases not counted)."""
    names = [name for name in group.parts if name.endswith(".weight") and name not in group.unranked]
    return _elements(model, group, names, least_dimensions=2)


def unit_parameters(model: nn.Module, group: Units) -> int:
    """Parameters that one unit of the group holds, biases included."""
    return _elements(model, group, list(group.parts))


def _elements(model: nn.Module, group: Units, names: list[str], least_dimensions: int = 1) -> int:
    total = 0
    for name in names:
        shape, layout = _tensor(model, name).shape, group.parts[name]
        if len(shape) >= least_dimensions:
            others = math.prod(shape[: layout.dim]) * math.prod(shape[layout.dim + 1 :])
            total += layout.lead * layout.width * others
    return total


def _tensor(model: nn.Module, name: str) -> Tensor:
    # under torch.nn.utils.prune a weight is no parameter but an attribute
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)
