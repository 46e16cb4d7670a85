"""The threshold of the element-wise step: the largest absolute values of all layers together, found by radix selection.

The masks hold exactly as many ones as asked. Nothing is sorted or copied, so that models of hundreds of millions of
weights take little time and hardly any memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

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


def magnitude_step(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
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
