"""Least squares at the cut: the weights that stay take over, in closed form, what the removed ones did.

    small = remove_units(repair(model, units, kept, images), units, kept)

A layer y = W h + b reads inputs h; S of them stay, P go. With mu = E h and C = Cov(h) over calibration images and the
tokens, windows or positions of each,

    B = C_PS (C_SS + lambda I)^-1,   W_S += W_P B,   b += W_P (mu_P - B mu_S),   lambda = ridge x mean diagonal of C_SS

For this S, ridge 0 is the least squared error on these images that any weights and bias of the layer reach: it is the
linear regression of what the layer gave on what it still reads. `how="mean"` sets B = 0. Nothing is trained, and no
label is read. Single weights are the same row by row, each with a support S of its own.

Sources: the closed form for single weights and their groups, and that rows of a layer are independent: Hassibi and
Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NeurIPS 1992; Frantar and Alistarh,
"Optimal Brain Compression", NeurIPS 2022 (arXiv 2208.11580). Ridge regression of removed units on those that stay,
folded into a ViT's weights: arXiv 2602.05243. The mean alone: Berisha, Mehnert and Condurache, "Variance-Based
Pruning", ICCV 2025 (arXiv 2507.12988).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pruning.masks import normalise_names
from pruning.moments import Behind, Moments, reading
from pruning.scores import RIDGE, evaluating
from pruning.units import Kept, Reader, Units, unit_masks

log = logging.getLogger(__name__)

HOW = ("none", "mean", "ls")
_BATCH = 64  # images of a tensor that go through the model at a time
_MOMENTS_BYTES = 4 << 30  # of moments collected in one pass over the images
_SOLVE_BYTES = 256 << 20  # of the systems that are solved at a time where each row has its own


@dataclass(frozen=True)
class LayerError:
    """Mean squared error of what one layer gives, and the variance of what it gave, summed over its outputs."""

    before: float
    after: float
    variance: float

    def shares(self) -> tuple[float, float]:
        """Before and after repair as shares of the variance; 0 or infinite where that is zero."""
        shares = [e / self.variance if self.variance > 0 else math.inf if e > 0 else 0.0 for e in self._errors()]
        return shares[0], shares[1]

    def _errors(self) -> tuple[float, float]:
        return self.before, self.after


@dataclass
class Repair:
    """New tensors by name, shaped as the model's, the error of each layer that was cut, and what to tell about it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, tuple[int, float, float]]:
        """{kind of layer, the end of its name: (layers, mean share of the error before repair, and after)}."""
        found: dict[str, list[tuple[float, float]]] = {}
        for name, error in self.errors.items():
            found.setdefault(name.rpartition(".")[2], []).append(error.shares())
        return {
            kind: (len(shares), *(sum(column) / len(shares) for column in zip(*shares, strict=True)))
            for kind, shares in found.items()
        }

    def lines(self) -> list[str]:
        """A line for each kind of layer, then the notes."""
        lines = [
            f"repair of {kind} ({count} layers): error {before:.2%} of the output's variance before, {after:.2%} after"
            for kind, (count, before, after) in self.kinds().items()
        ]
        return lines + self.notes


# ------------------------------------------------------------------------------------------ the solve


def least_squares(second: Tensor, wanted: Tensor, support: Tensor, ridge: float = RIDGE) -> Tensor:
    """The weights [rows, in], zero outside of `support`, that give `wanted` x with the least mean squared error.

    Args:
        second: E[x x^T], or the covariance where a bias takes the means; float64 [in, in].
        wanted: [rows, in]; where rows differ, zero on their support.
        support: bool [rows, in], or [1, in] where all rows read the same inputs.
        ridge: added to the diagonal, as a share of its mean; over the support that all rows share, or over all inputs
            where rows differ, so that one inverse serves all of them.

    Inputs that are constant, or depend on others, get finite weights for any ridge: where the system is singular its
    solution of least norm is taken.
    """
    if len(support) > 1 and bool((support == support[0]).all()):
        support = support[:1]
    result = torch.zeros_like(wanted)
    if len(support) == 1:
        inputs = support[0].nonzero().flatten()
        if len(inputs) == 0:
            return result
        system = second[inputs][:, inputs]
        system.diagonal().add_(ridge * system.diagonal().mean())
        target = wanted @ second[:, inputs]
        result[:, inputs] = _solve(system[None], target.T[None], ridge)[0].T
        return result
    shift = ridge * float(second.diagonal().mean())
    target, left = wanted @ second, support.sum(1)
    # w' = w - w_P ([C^-1]_PP)^-1 [C^-1]_P: is the same with systems of the size of what goes
    few = left > support.shape[1] // 2
    factor, failed = torch.linalg.cholesky_ex(second + shift * torch.eye(len(second)).to(second))
    if ridge == 0 or bool(failed) or not bool(few.any()):
        few = torch.zeros_like(few)
    else:
        inverse = torch.cholesky_inverse(factor)
        for rows in _blocks(few.nonzero().flatten(), len(second) - left):
            given = _solve_rows(inverse, wanted[rows], ~support[rows], 0.0, ridge)
            result[rows] = -(given @ inverse) * support[rows]
    for rows in _blocks((~few).nonzero().flatten(), left):
        result[rows] = _solve_rows(second, target[rows], support[rows], shift, ridge)
    return result


def _blocks(rows: Tensor, sizes: Tensor) -> Iterable[Tensor]:
    """These rows in ascending order of their systems' sizes, as many together as memory allows."""
    rows = rows[sizes[rows].argsort(stable=True)]
    start, lengths = 0, sizes[rows].tolist()
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (end + 1 - start) * lengths[end] ** 2 * 8 * 3 <= _SOLVE_BYTES:
            end += 1
        yield rows[start:end]
        start = end


def _solve_rows(second: Tensor, target: Tensor, support: Tensor, shift: float, ridge: float) -> Tensor:
    size = int(support.sum(1).max())
    result = torch.zeros_like(target)
    if size == 0:
        return result
    inputs = (~support).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]  # a row's inputs first, others after
    real = support.gather(1, inputs)
    system = second[inputs[:, :, None], inputs[:, None, :]] * (real[:, :, None] & real[:, None, :])
    # others are equations of their own, whose solution is zero
    system.diagonal(dim1=1, dim2=2).add_(torch.where(real, shift, 1.0 if ridge else 0.0).to(system))
    found = _solve(system, (target.gather(1, inputs) * real)[:, :, None], ridge)[:, :, 0]
    return result.scatter_(1, inputs, found * real)


def _solve(systems: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Solutions of symmetric positive semidefinite systems [b, n, n] with right sides [b, n, m]."""
    if ridge:
        factors, failed = torch.linalg.cholesky_ex(systems)
        if not bool(failed.any()):
            return torch.cholesky_solve(targets, factors)
    values, vectors = torch.linalg.eigh(systems)
    smallest = values[:, -1:].clamp_min(0) * systems.shape[-1] * torch.finfo(systems.dtype).eps
    inverse = torch.where(values > smallest, 1 / values.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    return vectors @ (inverse[:, :, None] * (vectors.mT @ targets))


# ------------------------------------------------------------------------------------------ layers of a model


@dataclass
class _Cut:
    """What is cut from one layer: `support`, bool [rows or 1, in], says what stays."""

    support: Tensor
    reader: Reader | None
    shift: str | None

    def behind(self) -> Behind | None:
        if self.reader is None or self.reader.norm is None:
            return None
        return Behind(self.reader.norm, self.reader.gate, self.support[0])


def _cuts(model, units, kept, masks, shifts) -> dict[str, _Cut]:
    cuts: dict[str, _Cut] = {}
    for key, group in units.items():
        reader = group.reader
        if key not in kept or reader is None or len(kept[key]) == group.count:
            continue
        weight = model.get_submodule(reader.layer).weight.detach()
        one_row = torch.ones_like(weight[:1])
        stay = reader.columns.mask(one_row, kept[key]).flatten(1).bool()
        if reader.layer in cuts:
            stay = stay & cuts[reader.layer].support  # heads and neurons of a parallel block, read by one layer
        cuts[reader.layer] = _Cut(stay, reader, reader.shift)
    for name, mask in masks.items():
        stay = mask.flatten(1).bool()
        if name in cuts:
            if cuts[name].behind() is not None and not bool(stay.all()):
                raise ValueError(f"{name} reads a norm over its units: cut single weights and units in two steps")
            cuts[name].support = cuts[name].support & stay.to(cuts[name].support.device)
        elif not bool(stay.all()):
            cuts[name] = _Cut(stay, None, shifts.get(name))
    return cuts


def repaired_tensors(
    model: nn.Module,
    units: Mapping[str, Units],
    kept: Kept,
    images: Tensor | Iterable,
    *,
    how: str = "ls",
    masks: Mapping[str, Tensor] | None = None,
    shifts: Mapping[str, str] | None = None,
    ridge: float = RIDGE,
    total: Callable[[Tensor], Tensor] | None = None,
    known: dict[str, Moments] | None = None,
) -> Repair:
    """What `repair` changes, without changing it: new tensors by name, errors by layer, notes.

    Args:
        model: as it is before the cut; put into eval mode meanwhile.
        units, kept: what is cut, as for `remove_units`; units that no single layer reads are cut without repair.
        images: [N, C, H, W], or batches of such, alone or with labels, which are not read.
        how: "ls", "mean" (biases alone) or "none" (errors alone).
        masks: element-wise masks by layer name (`X` or `X.weight_mask`); each of these layers is repaired row by row.
        shifts: {layer without a bias: the running mean of the batch norm behind it}, see `families.resnet.shifts`.
        ridge: lambda as a share of the mean diagonal of C_SS; 0 takes the solution of least norm.
        total: where several processes see images of their own, the sum of a float64 tensor over all of them.
        known: moments by layer of these images and this model, of calls before; what is collected now is added, where
            it does not go by what is cut.

    A layer without a bias or batch norm behind it keeps what it has: B is then E[h_P h_S^T] (E[h_S h_S^T] + lambda)^-1.
    Where a norm counts units before a layer reads them, what it reads changes for the units that stay, too; B is then
    the regression of all that the layer read on all that it will read, both taken from the same images. LayerScale
    multiplies each output by a number and so changes nothing. Statistics are those of the whole model, once: layers
    that are cut earlier on the way do not show in them.

    Raises:
        ValueError: unknown `how`, no images, or masks in `torch.nn.utils.prune`.
    """
    if how not in HOW:
        raise ValueError(f"unknown repair {how!r}; choose {', '.join(HOW)}")
    masks = normalise_names(masks or {})
    cuts = _cuts(model, units, kept, masks, shifts or {})
    repair, few = Repair(), []
    batches = _batches(images)
    for names in _passes(model, cuts):
        new = {name: cuts[name].behind() for name in names if name not in (known or {})}
        moments = collect(model, new, batches, total) if new else {}
        if known is not None:
            known |= {name: moments[name] for name, behind in new.items() if behind is None}
        for name in names:
            seen = moments.pop(name) if name in moments else known[name]
            if not bool(seen.outer.isfinite().all()):
                repair.notes.append(f"repair: {name} reads values that are not finite; cut without repair")
                continue
            if seen.count <= int(cuts[name].support.sum(1).max()):
                few.append(name)
            tensors, repair.errors[name] = _repair_layer(model, name, cuts[name], seen, how, ridge)
            repair.tensors |= tensors
    if few:
        where = few[0] if len(few) == 1 else f"{few[0]} and {len(few) - 1} more"
        repair.notes.append(f"repair: {where}: no more calibration rows than inputs; give more images for a better one")
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        weight = parameters[f"{name}.weight"].detach()
        repair.tensors.setdefault(f"{name}.weight", weight * mask.to(weight))
    for name, mask in unit_masks(units, kept, parameters).items():
        repair.tensors[name] = repair.tensors.get(name, parameters[name].detach()) * mask
    return repair


def repair(model: nn.Module, units: Mapping[str, Units], kept: Kept, images: Tensor | Iterable, **options) -> nn.Module:
    """A copy of `model` in which the units that are not kept are zero and what reads them is repaired.

    Its shapes are those of `model`; `pruning.removal.remove_units` makes it small without changing what it computes.
    Errors before and after the repair are logged for each kind of layer. See `repaired_tensors` for the arguments and
    this module for formula and sources.
    """
    found = repaired_tensors(model, units, kept, images, **options)
    for line in found.lines():
        log.info("%s", line)
    result = copy.deepcopy(model)
    result.load_state_dict(found.tensors, strict=False)
    return result


def collect(
    model: nn.Module,
    layers: Mapping[str, Behind | None],
    batches: Iterable,
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Moments]:
    """The moments of what each layer reads of all images, over all processes where `total` sums them.

    Raises:
        ValueError: there is no image.
    """
    parameter, images_seen = next(model.parameters()), 0
    with torch.no_grad(), evaluating(model), reading(model, layers) as moments:
        for batch in batches:
            images = batch[0] if isinstance(batch, tuple | list) else batch
            model(images.to(parameter.device, parameter.dtype))
            images_seen += len(images)
    if total is not None:
        images_seen = int(total(torch.tensor([images_seen], dtype=torch.float64)))
        for seen in moments.values():
            seen.reduce(total)
    if images_seen == 0:
        raise ValueError("no calibration images were given; repair needs at least one")
    return moments


def _batches(images: Tensor | Iterable) -> Iterable:
    """What can be gone through once for each pass."""
    if isinstance(images, Tensor):
        return images.split(_BATCH)
    return list(images) if isinstance(images, Iterator) else images


def _passes(model: nn.Module, cuts: Mapping[str, _Cut]) -> list[list[str]]:
    """The layers whose moments are collected together, in order, such that they fit into `_MOMENTS_BYTES`."""
    passes, used = [[]], 0
    for name, cut in cuts.items():
        width = model.get_submodule(name).weight[0].numel() * (1 if cut.behind() is None else 2)
        if passes[-1] and used + 8 * width**2 > _MOMENTS_BYTES:
            passes.append([])
            used = 0
        used += 8 * width**2
        passes[-1].append(name)
    return [names for names in passes if names]


def _repair_layer(model, name, cut, seen: Moments, how, ridge) -> tuple[dict[str, Tensor], LayerError]:
    layer = model.get_submodule(name)
    weight = layer.weight.detach().flatten(1).to(seen.outer)
    support = cut.support.to(weight.device)
    # rows of what the layer read and, behind a norm, of what it reads when units are gone: `dense` makes its output of
    # them, `new` what is left of it
    dense, new = weight, weight * support
    if cut.behind() is not None:
        dense, new = torch.cat([weight, torch.zeros_like(weight)], 1), torch.cat([torch.zeros_like(weight), new], 1)
        support = torch.cat([torch.zeros_like(support), support], 1)
    takes_means = layer.bias is not None or cut.shift is not None
    covariance, mean = seen.covariance(), seen.mean()
    second = covariance if takes_means else seen.second()
    lost, offset = dense - new, torch.zeros(len(weight)).to(weight)
    before = _squares(lost, seen.second())
    if how == "ls":
        change = least_squares(second, lost, support, ridge)
        new, lost = new + change, lost - change
    if how != "none" and takes_means:
        offset = lost @ mean
    after = _squares(lost, second if how != "none" else seen.second())
    tensors = {f"{name}.weight": new[:, -weight.shape[1] :].reshape(layer.weight.shape).to(layer.weight)}
    if how != "none" and takes_means:
        key, sign = (f"{name}.bias", 1) if layer.bias is not None else (cut.shift, -1)
        path, _, leaf = key.rpartition(".")
        old = getattr(model.get_submodule(path), leaf).detach()
        tensors[key] = (old.to(offset) + sign * offset).to(old)
    return tensors, LayerError(before, after, _squares(dense, covariance))


def _squares(weights: Tensor, second: Tensor) -> float:
    """E |weights x|^2 for E[x x^T]."""
    return max(0.0, float(((weights @ second) * weights).sum()))
