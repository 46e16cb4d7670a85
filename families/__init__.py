"""Families of models: the interface that the rest of the program uses for any model, and the table of families.

    family = family_of(model)
    units, cost = family.units(model), family.cost(model, kept)

A new family is one file beside vit.py and resnet.py that implements `Family`, and one line in `FAMILIES`. Nothing
outside this package checks which family a model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Protocol

import torch
from torch import Tensor, nn

from families.resnet import CNN
from families.swin import SWIN
from families.vit import VIT
from pruning.units import Kept, LayoutError, Units


class Family(Protocol):
    """What is different from one kind of model to the next; values without state."""

    title: str  # heads the sparsity report
    kinds: tuple[str, ...]  # of its units
    # "ratio": structured runs prune a ratio of all units; "density": a layer keeps as many units as its density in the
    # element-wise masks says
    counts_by: str
    classifier: str  # what the names of the classifier's parameters start with
    timm_files: tuple[str, ...]  # of timm.models, with wildcards: where its architectures are defined
    config_keys: tuple[str, ...]  # an exported config.json with one of them describes a model of this family

    def problem(self, model: nn.Module) -> str | None:
        """Why this is no model of the family; None when it is."""

    def prunable_layers(self, model: nn.Module, first: bool = False) -> dict[str, nn.Module]:
        """Layers whose weights count as prunable, in order; `first` adds patch embedding or first convolution."""

    def units(self, model: nn.Module, kinds: Iterable[str] | None = None, first: bool = True) -> dict[str, Units]:
        """The units of these kinds, all when None; `first` as above, where the first layer has units."""

    def branches_as_units(self, model: nn.Module) -> dict[str, Units]:
        """Each branch of the residual stream as one unit, by the key that its units have in `units`.

        Raises:
            LayoutError: attention and MLP of this model cannot be pruned separately.
        """

    def cost(self, model: nn.Module, kept: Kept) -> dict[str, int]:
        """Units of each kind ("heads", "filters", ...), "parameters" and "macs" once only the kept units are left."""

    def working_units_(self, model: nn.Module) -> dict[str, list[int]]:
        """The units that still work where single weights were pruned; what dead ones emit is folded away, in place."""

    def drop_empty_blocks_(self, model: nn.Module) -> None:
        """Take blocks that have no unit left out of a removed model, in place, where that changes nothing it gives."""

    def bypass_empty_(self, model: nn.Module) -> None:
        """Take layers of width zero out of a removed model, in place, by what they add; for exporters, not for disk."""

    def fold_(self, model: nn.Module) -> list[str]:
        """Fold, in place, what inference can do without into the weights before it; the removed modules' names."""

    def image_size(self, model: nn.Module) -> int:
        """Pixels a side of the images that the model is built for."""

    def tokens(self, features: Tensor) -> Tensor:
        """The output of a model's `forward_features`, after its last block, as tokens [B, N, D]."""

    def memory_format(self, removed: bool, precision: torch.dtype | None) -> torch.memory_format | None:
        """The faster layout of weights to train in, None as they are; `removed`: units are cut out of the model."""

    def describe(self, model: nn.Module, kept: Kept) -> dict:
        """A removed model's architecture and kept units as plain values, for config.json."""

    def rebuild(self, config: Mapping) -> tuple[nn.Module, Kept]:
        """The inverse of `describe`: the dense model and what to keep of it."""

    def card(self, config: Mapping) -> tuple[str, str]:
        """Two paragraphs of the model card: what is left, and how to load it."""


FAMILIES: tuple[Family, ...] = (
    VIT,
    CNN,
    SWIN,
)


def family_of(model: nn.Module) -> Family:
    """The family that a model belongs to.

    Raises:
        LayoutError: none; the message gives the reason of the family that timm's file of the model stands for, or else
            the first one's.
    """
    for family in FAMILIES:
        if family.problem(model) is None:
            return family
    file = type(model).__module__.rpartition(".")[2]
    near = (family for family in FAMILIES if any(fnmatch(file, pattern) for pattern in family.timm_files))
    raise LayoutError(next(near, FAMILIES[0]).problem(model))


def family_of_config(config: Mapping) -> Family:
    """The family of the model that an exported config.json describes.

    Raises:
        LayoutError: none.
    """
    for family in FAMILIES:
        if config.keys() & set(family.config_keys):
            return family
    known = ", ".join(key for family in FAMILIES for key in family.config_keys)
    raise LayoutError(f"config.json describes no known model: it has none of {known}")
