"""How much each unit matters: the criteria, and the one scorer that every kind of unit, step and baseline shares.

A score is one float64 number per unit; larger is more important. Scoring leaves the model as it was.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from pruning.masks import normalise_names
from pruning.moments import reading
from pruning.units import Tap, Units
from utils import plain_weights

log = logging.getLogger(__name__)

SCORE_BATCHES = 10
RIDGE = 1e-3  # of "obs" and of `pruning.repair`: what is added to a covariance's diagonal, as a share of its mean


class NotFiniteError(ValueError):
    """A score is not a number: weights, activations or gradients have overflowed."""


@dataclass(frozen=True)
class Criterion:
    """How much each unit matters.

    `score` gets, in float64:
        needs "weights":  the scored weights [units, elements]                 -> [units]
        needs "mask":     the element-wise mask of the same shape              -> [units]
        needs "output":   output activations [images, units, values]           -> [images, units]
        needs "gradient": activations and dL/da, both [images, units, values]  -> [images, units]
        needs "seed":     the number of units and a torch.Generator            -> [units]
        needs "reader":   the columns [units, rows, columns] of what reads units, and their blocks [units, columns,
                          columns] of the inverse covariance of all that it reads  -> [units]
    Values per image are averaged over all images; `finish` is applied to that mean. `without_data` scores
    weights in place of missing activations.
    """

    needs: str
    score: Callable[..., Tensor]
    finish: Callable[[Tensor], Tensor] | None = None
    without_data: Callable[[Tensor], Tensor] | None = None


def _abs_sum(weights: Tensor) -> Tensor:
    return weights.abs().sum(1)


def _traces(columns: Tensor, inverse: Tensor) -> Tensor:
    """trace(W_P ([C^-1]_PP)^-1 W_P^T) of each unit, which is |w|^2 / [C^-1]_jj of a single column."""
    return (torch.linalg.solve(inverse, columns.mT) * columns.mT).flatten(1).sum(1)


CRITERIA: dict[str, Criterion | Callable[[Tensor], Tensor]] = {
    # A plain function scores the weights: CRITERIA["largest"] = lambda weights: weights.abs().amax(1)
    "remain": Criterion("mask", lambda mask: mask.sum(1)),
    "magnitude": Criterion("weights", _abs_sum),
    "l1": Criterion("output", lambda a: a.abs().mean(2), without_data=_abs_sum),
    "l2": Criterion(
        "output", lambda a: a.square().mean(2), finish=torch.sqrt, without_data=lambda w: w.square().sum(1)
    ),
    # First-order Taylor expansion of the loss in the unit's output: Molchanov et al., "Pruning Convolutional
    # Neural Networks for Resource Efficient Inference", ICLR 2017, eq. 5-7; Michel et al., "Are Sixteen Heads
    # Really Better than One?", NeurIPS 2019, eq. 2.
    "saliency": Criterion("gradient", lambda a, gradient: (a * gradient).sum(2).abs()),
    # The squared error that is left on a layer's output when a unit goes and least squares lets all other inputs of
    # that layer take over (`pruning.repair`): Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal
    # Brain Surgeon", NeurIPS 1992; for groups of weights Frantar and Alistarh, "Optimal Brain Compression",
    # NeurIPS 2022.
    "obs": Criterion("reader", _traces),
    "random": Criterion("seed", lambda count, generator: torch.rand(count, generator=generator)),
}


def score_units(
    model: nn.Module,
    units: Mapping[str, Units],
    criteria: str,
    *,
    mask: Mapping[str, Tensor] | None = None,
    trained_weight: Mapping[str, Tensor] | None = None,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    max_batches: int = SCORE_BATCHES,
    seed: int = 0,
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Score every unit by one criterion; the only scorer there is.

    Args:
        units: what to score, such as `vit_units(model)`.
        criteria: a key of `CRITERIA`. By "obs", units that no single layer reads, such as the filters that end a block
            of a ResNet, have the mean square of what they give: nothing takes over for them.
        mask: element-wise masks by layer name (`X` or `X.weight_mask`). A unit whose scored weights are all zero
            in it gets -inf, so that it is never chosen again.
        trained_weight: state dict to score in place of the model's own weights.
        batches: (images, labels); the first `max_batches` are read once, in eval mode.
        loss: for saliency; cross entropy by default, summed over images.
        seed: of criterion "random".
        total: where several processes read `batches` of their own, the sum of a float64 tensor over all of them.

    Returns:
        {units key: float64 scores [count] on the CPU}, larger is more important.

    Raises:
        ValueError: unknown criterion, a missing input, or a score that is not a number.
    """
    criterion = _what_can_be_scored(criteria, mask is not None, batches is not None)
    masks = normalise_names(mask) if mask is not None else {}
    if criterion.needs in ("output", "gradient"):
        with trained_weights(model, trained_weight):
            scores = _score_activations(model, units, criterion, batches, loss, max_batches, total)
    elif criterion.needs == "reader":
        with trained_weights(model, trained_weight):
            scores = _score_readers(model, units, criterion, batches, max_batches, total)
    elif criterion.needs == "seed":
        scores = _score_by_seed(units, criterion, seed)
    else:
        weights = plain_weights(trained_weight if trained_weight is not None else model.state_dict())
        source = {f"{name}.weight": m for name, m in masks.items()} if criterion.needs == "mask" else weights
        for name in (name for group in units.values() for name in group.scored):
            if name not in source:
                raise ValueError(f"criterion {criteria!r}: {name} is missing in what was given")
        scores = _score_tensors(units, criterion, source)

    for key, group in units.items():
        scored = {name.removesuffix(".weight"): layout for name, layout in group.scored.items()}
        if scored.keys() <= masks.keys():
            alive = [layout.per_unit(masks[name]).bool().any(1).cpu() for name, layout in scored.items()]
            dead = ~torch.stack(alive).any(0)
            scores[key] = scores[key].masked_fill(dead, -math.inf)
        if scores[key].isnan().any():
            raise NotFiniteError(f"criterion {criteria!r}: a score of {key} is not a number")
    return scores


def _what_can_be_scored(criteria: str, has_mask: bool, has_data: bool) -> Criterion:
    """The criterion of that name, or what it does without data; raises where its input is missing."""
    if criteria not in CRITERIA:
        raise ValueError(f"unknown criterion {criteria!r}; choose from {', '.join(CRITERIA)}")
    criterion = CRITERIA[criteria]
    if not isinstance(criterion, Criterion):
        criterion = Criterion("weights", criterion)
    if criterion.needs == "output" and not has_data and criterion.without_data is not None:
        log.info("criterion %s: no data given, scoring weights instead of activations", criteria)
        criterion = replace(criterion, needs="weights", score=criterion.without_data)
    if criterion.needs == "mask" and not has_mask:
        raise ValueError(f"criterion {criteria!r} needs the element-wise mask (current_mask)")
    if criterion.needs in ("output", "gradient", "reader") and not has_data:
        raise ValueError(f"criterion {criteria!r} needs training data (train_loader)")
    return criterion


def _score_tensors(units: Mapping[str, Units], criterion: Criterion, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scores = {}
    for key, group in units.items():
        weights = [layout.per_unit(_float64(source[name])) for name, layout in group.scored.items()]
        scores[key] = criterion.score(torch.cat(weights, 1) if len(weights) > 1 else weights[0]).cpu()
    return scores


def _score_by_seed(units: Mapping[str, Units], criterion: Criterion, seed: int) -> dict[str, Tensor]:
    scores = {}
    for key, group in units.items():
        # by name, so that a unit's score does not depend on what else is scored
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        scores[key] = criterion.score(group.count, generator).double()
    return scores


def _score_activations(model, units, criterion, batches, loss, max_batches, total) -> dict[str, Tensor]:
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    needs_gradient = criterion.needs == "gradient"
    taps = {key: group.contribution if needs_gradient else group.output for key, group in units.items()}
    totals = {key: torch.zeros(group.count, dtype=torch.float64) for key, group in units.items()}
    images_seen = 0
    with evaluating(model), captured(model, taps) as activations, torch.set_grad_enabled(needs_gradient):
        for images, labels in islice(batches, max_batches):
            activations.clear()
            images = images.detach().to(device, dtype).requires_grad_(needs_gradient)
            logits = model(images)
            present = [key for key in units if key in activations]  # an emptied branch shows no activation
            if needs_gradient:
                gradients = torch.autograd.grad(
                    _summed_loss(logits, labels.to(device), loss), [activations[key] for key in present]
                )
            for index, key in enumerate(present):
                tap = taps[key]
                inputs = [tap.per_image(_float64(activations[key]), len(images))]
                if needs_gradient:
                    inputs.append(tap.per_image(_float64(gradients[index]), len(images)))
                totals[key] += criterion.score(*inputs).sum(0).detach().cpu()
            images_seen += len(images)
    if total:
        seen = torch.tensor([images_seen], dtype=torch.float64)
        *sums, seen = total(torch.cat([*totals.values(), seen])).split([*map(len, totals.values()), 1])
        totals, images_seen = dict(zip(totals, sums, strict=True)), int(seen)
    if images_seen == 0:
        raise ValueError("the training data given for scoring is empty")
    finish = criterion.finish or (lambda mean: mean)
    return {key: finish(sums / images_seen) for key, sums in totals.items()}


def _score_readers(model, units, criterion, batches, max_batches, total) -> dict[str, Tensor]:
    batches = list(islice(batches, max_batches))
    readers = {key: group.reader for key, group in units.items() if group.reader is not None}
    rest = {key: replace(group, output=_last_seen(group)) for key, group in units.items() if key not in readers}
    scores = {}
    if rest:
        alone = Criterion("output", lambda a: a.square().mean(2))
        scores = _score_activations(model, rest, alone, batches, None, max_batches, total)
    parameter = next(model.parameters())
    layers = dict.fromkeys(reader.layer for reader in readers.values())
    with torch.no_grad(), evaluating(model), reading(model, layers) as moments:
        for images, _ in batches:
            model(images.to(parameter.device, parameter.dtype))
    for layer in layers:
        seen, module = moments.pop(layer), model.get_submodule(layer)
        if total:
            seen.reduce(total)
        if seen.count == 0:
            raise ValueError("the training data given for scoring is empty")
        here = {key: reader for key, reader in readers.items() if reader.layer == layer}
        takes_means = module.bias is not None or any(reader.shift for reader in here.values())
        inverse = _inverse(seen.covariance() if takes_means else seen.second())
        # LayerScale is a part of how much of an output others hear
        factors = [model.get_parameter(reader.scale) for reader in here.values() if reader.scale is not None]
        weight = _float64(module.weight.detach()).to(inverse.device)
        if factors:
            weight = weight * _float64(factors[0].detach()).to(weight)[:, None]
        places = torch.arange(weight[0].numel(), device=weight.device).view(1, *weight.shape[1:])
        for key, reader in here.items():
            columns = reader.columns.split(places)[0, 0].flatten(1)  # [units, columns of each]
            blocks = inverse[columns[:, :, None], columns[:, None, :]]
            scores[key] = criterion.score(weight.flatten(1)[:, columns].transpose(0, 1), blocks).cpu()
    return {key: scores[key] for key in units}


def _inverse(second: Tensor) -> Tensor:
    """(C + lambda I)^-1; where nothing varies, lambda is as good as zero."""
    ridge = max(RIDGE * float(second.diagonal().mean()), 1e-30)
    return torch.linalg.inv(second + ridge * torch.eye(len(second)).to(second))


def _last_seen(group: Units) -> Tap:
    """The output of the last layer that holds parts of the units, such as a filter's batch norm; a branch's own tap."""
    module = [*group.parts][-1].rpartition(".")[0]
    return group.output if group.output.compute is not None else replace(group.output, module=module)


def _summed_loss(logits: Tensor, labels: Tensor, loss: Callable | None) -> Tensor:
    if loss is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    value = loss(logits, labels)
    return value * len(labels) if getattr(loss, "reduction", "mean") == "mean" else value


def _float64(tensor: Tensor) -> Tensor:
    # MPS has no float64
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


@contextmanager
def captured(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[dict[str, Tensor]]:
    """Record the tapped activations of each forward pass; the hooks are removed at the end of the block."""
    found: dict[str, Tensor] = {}
    handles = []
    for key, tap in taps.items():
        module = model.get_submodule(tap.module)

        def see(module, activation, key=key, tap=tap) -> None:
            found[key] = tap.values(module, activation)

        if tap.side == "input":
            handles.append(module.register_forward_pre_hook(lambda module, args, see=see: see(module, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda module, _, out, see=see: see(module, out)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside the block; afterwards every module is back in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def trained_weights(model: nn.Module, weights: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
    """`model` with other weights inside the block, its own again afterwards; None changes nothing.

    Models under `torch.nn.utils.prune` keep their reparametrisation: inside the block their masks are all ones.
    """
    if weights is None:
        yield model
        return
    saved = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    replacement = dict(saved)
    for name, value in plain_weights(weights).items():
        if f"{name}_orig" in replacement:
            replacement[f"{name}_orig"] = value
            replacement[f"{name}_mask"] = torch.ones_like(value)
        elif name in replacement:
            replacement[name] = value
    try:
        model.load_state_dict(replacement)
        _recompute_pruned(model)
        yield model
    finally:
        model.load_state_dict(saved)
        _recompute_pruned(model)


def _recompute_pruned(model: nn.Module) -> None:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(module, None)
