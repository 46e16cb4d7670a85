"""What layers read, as moments: how many rows, their sum and the sum of their outer products.

    with torch.no_grad(), reading(model, {"blocks.0.mlp.fc2": None}) as moments:
        model(images)
    moments["blocks.0.mlp.fc2"].covariance()                    # float64 [in, in]

A row is what one output of a layer reads: a token of a linear layer, of a convolution a patch the size of its kernel,
[channels x height x width], zeros of its padding included. Sums are plain, so that those of several batches or
processes add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

_PATCH_VALUES = 1 << 24  # of the patches of a convolution that are taken out at a time


class Moments:
    """Sums over rows of one width, in float64.

    The products of a batch are taken around its own mean and in its own precision, float32 at least, so that neither a
    large mean nor a long sum costs digits.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Rows [n, width] more."""
        rows = rows.detach().to(self.total.device)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if len(rows) == 0:
            return
        middle = rows.mean(0)
        around = rows - middle
        rest, middle = around.sum(0).double(), middle.double()
        self.count += len(rows)
        self.total += rest + len(rows) * middle
        with torch.autocast(rows.device.type, enabled=False):  # which would take these products in half precision
            self.outer += (around.T @ around).double()
        self.outer += torch.outer(rest + len(rows) * middle, middle) + torch.outer(middle, rest)

    def merge(self, other: Moments) -> None:
        """Add what was seen elsewhere."""
        self.count += other.count
        self.total += other.total.to(self.total.device)
        self.outer += other.outer.to(self.outer.device)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add up over processes: `total` gives the sum of a float64 tensor over all of them."""
        self.count = int(total(torch.tensor([self.count], dtype=torch.float64)))
        self.total, self.outer = total(self.total), total(self.outer)

    def mean(self) -> Tensor:
        """[width]; zero where nothing was seen."""
        return self.total / max(1, self.count)

    def covariance(self) -> Tensor:
        """[width, width], divided by the number of rows."""
        mean = self.mean()
        return self.outer / max(1, self.count) - torch.outer(mean, mean)

    def second(self) -> Tensor:
        """E[row row^T], [width, width]."""
        return self.outer / max(1, self.count)


@dataclass(frozen=True)
class Behind:
    """A norm that stands in front of a layer and counts all its inputs.

    What the layer reads once some inputs are gone is then no part of what it reads before. Rows are twice as wide: in
    front as the layer reads now, behind as it reads when only inputs `stay`, bool [in], reach the norm.
    """

    norm: str
    gate: str | None  # a layer whose sigmoid multiplies what the norm gives
    stay: Tensor


class _Calls(TorchFunctionMode):
    """Sees by which weights F.linear and F.conv2d multiply: some attentions use a weight without a call."""

    _NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def __init__(self, names: Mapping[int, str], see: Callable[[str, Tensor], None]):
        super().__init__()
        self.names, self.see = names, see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear or func is F.conv2d:
            given = dict(zip(self._NAMES, args, strict=False)) | kwargs
            name = self.names.get(id(given["weight"]))
            if name is not None:
                for rows in _rows(given):
                    self.see(name, rows)
        return func(*args, **kwargs)


def _rows(given: Mapping) -> Iterator[Tensor]:
    """What each output of a linear layer or a convolution reads: [n, in], for images in a row."""
    x, weight = given["input"].detach(), given["weight"]
    if weight.ndim == 2:
        yield x.reshape(-1, x.shape[-1])
        return
    if given.get("groups", 1) != 1 or isinstance(given.get("padding", 0), str):
        raise ValueError("a convolution in groups, or padded by name, has no plain patches; it cannot be repaired")
    options = {name: given[name] for name in ("stride", "padding", "dilation") if name in given}
    images = max(1, _PATCH_VALUES // (weight[0].numel() * x.shape[-1] * x.shape[-2]))
    for part in x.split(images):
        yield F.unfold(part, weight.shape[2:], **options).transpose(1, 2).flatten(0, 1)


@contextmanager
def reading(model: nn.Module, layers: Mapping[str, Behind | None]) -> Iterator[dict[str, Moments]]:
    """Collect the moments of what these layers read in each forward pass inside the block; then all hooks are gone.

    Raises:
        ValueError: the model is under `torch.nn.utils.prune`, which hides which weights it multiplies by.
    """
    if prune.is_pruned(model):
        raise ValueError("the model is under torch.nn.utils.prune; call remove_prune_vit or remove_prune first")
    names, moments, seen, handles = {}, {}, {}, []
    for name, behind in layers.items():
        weight = model.get_submodule(name).weight
        names[id(weight)] = name
        moments[name] = Moments(weight[0].numel() * (1 if behind is None else 2), weight.device)
        for path, key in () if behind is None else ((behind.norm, "norm"), (behind.gate, "gate")):
            if path is not None:
                handles.append(model.get_submodule(path).register_forward_hook(_keep(seen, (name, key))))

    def see(name: str, rows: Tensor) -> None:
        behind = layers[name]
        if behind is not None:
            norm, given = model.get_submodule(behind.norm), seen.pop((name, "norm"))[0]
            alone = norm.forward(given * behind.stay.to(given))  # not by a call, which the hook would take for another
            if behind.gate is not None:
                alone = alone * seen.pop((name, "gate"))[1].sigmoid()
            rows = torch.cat([rows, alone.detach().reshape(rows.shape)], dim=1)
        moments[name].add(rows)

    try:
        with _Calls(names, see):
            yield moments
    finally:
        for handle in handles:
            handle.remove()


def _keep(seen: dict, key: tuple[str, str]) -> Callable:
    def hook(module, args, output) -> None:
        seen[key] = (args[0], output)

    return hook
