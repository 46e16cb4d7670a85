"""Optimizer and learning rate: flags and a model in; groups, a schedule over a state's steps, moments by name out."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.removal import scatter_tensors, slice_tensors
from pruning.units import Kept, Units
from settings.flags import GRAPHS
from utils import RunError


def milestones_of(args: argparse.Namespace) -> list[int]:
    """The epochs of `--decreasing_lr`.

    Raises:
        RunError: they are not increasing whole numbers above 0.
    """
    try:
        found = [int(epoch) for epoch in args.decreasing_lr.split(",") if args.decreasing_lr]
    except ValueError:
        found = [0]
    if any(epoch < 1 for epoch in found) or any(a >= b for a, b in zip(found, found[1:], strict=False)):
        raise RunError(f"--decreasing_lr {args.decreasing_lr}: give increasing epochs such as 60,90")
    return found


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a state: linear warm-up per step, then x0.1 at the milestones or half a cosine.

    `warmup`, `milestones` and `total_steps` are in steps. A cosine reaches its floor at the state's last step; without
    a floor it would reach zero a step after the last.
    """

    kind: str  # --sched
    lr: float
    warmup: int
    milestones: tuple[int, ...]
    total_steps: int
    floor: float | None = None  # --min_lr

    def rate(self, step: int) -> float:
        """The rate of the optimizer step that follows `step` others of its state."""
        warmup = self.warmup
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.kind == "cosine" and self.floor is not None:
            span = self.total_steps - warmup - 1
            left = 0.5 * (1 + math.cos(math.pi * (step - warmup) / span)) if span > 0 else 0.0
            return self.floor + (self.lr - self.floor) * left
        if self.kind == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))
        return self.lr * 0.1 ** sum(step >= milestone for milestone in self.milestones)


# what the names of parameters after a ViT's last block start with; all others outside blocks come before the first
AFTER_THE_BLOCKS = ("norm.", "fc_norm.", "head", "attn_pool.")


def layer_scales(names: Iterable[str], depth: int, decay: float) -> dict[str, float]:
    """The factor of the learning rate by parameter name, decay^(depth + 1 - i) for layer i of a ViT.

    The embedding (patches, positions, prefix tokens) is layer 0, block i - 1 layer i, what comes after the blocks
    layer depth + 1 (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2022).
    """
    layers = {}
    for name in names:
        first, second, *_ = f"{name}..".split(".")
        layers[name] = int(second) + 1 if first == "blocks" else (depth + 1) * name.startswith(AFTER_THE_BLOCKS)
    return {name: decay ** (depth + 1 - layer) for name, layer in layers.items()}


def parameter_groups(args: argparse.Namespace, model: nn.Module) -> list[dict]:
    """Every parameter in exactly one group, by its `weight_decay` and, under `--layer_decay`, its `scale` of the rate.

    Weight decay acts on the weights of linear and convolution layers only.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    named = dict(model.named_parameters())
    scales = dict.fromkeys(named, 1.0)
    if args.layer_decay is not None:
        scales = layer_scales(named, len(model.blocks), args.layer_decay)
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        members.setdefault((-scales[name], id(parameter) not in decayed), []).append(parameter)
    return [
        {"params": members[key], "scale": -key[0], "weight_decay": 0.0 if key[1] else args.weight_decay}
        for key in sorted(members)
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, in place: each group's tensor stays where it is."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group["scale"])


def make_optimizer(args: argparse.Namespace, model: nn.Module, rate: Tensor) -> torch.optim.Optimizer:
    """SGD or AdamW whose groups have scalars like `rate` as learning rates, on its device; see `set_rate`.

    Fused kernels read the rate on the device, and on a CPU they are twice to six times as fast (measured).
    """
    groups = [{**group, "lr": rate.clone()} for group in parameter_groups(args, model)]
    if args.opt == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=True, capturable=args.compile in GRAPHS)
    else:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=args.momentum, fused=True)
    # PyTorch makes moments in a parameter's first step: none for what never has a gradient, such as the norm before an
    # emptied layer, and uninitialised ones of SGD where the scaler of fp16 skips that step
    for parameter in model.parameters():
        for name in moment_names(args):
            optimizer.state[parameter][name] = _first_moment(name, parameter)
    return optimizer


def moment_names(args: argparse.Namespace) -> tuple[str, ...]:
    """What the optimizer remembers of each parameter."""
    if args.opt == "adamw":
        return "step", "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if args.momentum else ()


def _first_moment(name: str, parameter: Tensor) -> Tensor:
    """Zero; the count of steps is a float32 scalar, whatever the parameter's type, as in PyTorch's fused AdamW."""
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return torch.zeros_like(parameter)


def moments_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, units: Mapping[str, Units], kept: Kept
) -> dict[str, dict]:
    """The optimizer's state by parameter name, in dense shapes; `kept` are the units that `model` still holds."""
    names = [name for name, _ in model.named_parameters()]
    states = [optimizer.state[parameter] for parameter in model.parameters()]
    found: dict[str, dict] = {name: {} for name in names}
    for entry in {key for state in states for key in state}:
        tensors = {name: state[entry] for name, state in zip(names, states, strict=True) if entry in state}
        if any(tensor.ndim for tensor in tensors.values()) and kept:
            tensors = scatter_tensors(tensors, units, kept)
        for name, tensor in tensors.items():
            found[name][entry] = tensor
    return found


def put_moments(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    units: Mapping[str, Units],
    kept: Kept,
    moments: Mapping[str, dict],
    masks: Mapping[str, Tensor],
) -> None:
    """The inverse of `moments_by_name`, in place, for another `kept`; `masks` by parameter name zero what is cut."""
    for entry in {key for state in moments.values() for key in state}:
        tensors = {name: state[entry] for name, state in moments.items() if entry in state}
        if any(tensor.ndim for tensor in tensors.values()):
            tensors = {name: tensor * masks.get(name, 1) for name, tensor in tensors.items()}
            tensors = slice_tensors(tensors, units, kept)
        for name, tensor in tensors.items():
            parameter = model.get_parameter(name)
            optimizer.state[parameter][entry] = laid_out_like(parameter, tensor)


def load_moments(optimizer: torch.optim.Optimizer, model: nn.Module, args: argparse.Namespace, moments: dict) -> None:
    """Take a checkpoint's moments, in place; the settings stay those of flags and device.

    Older checkpoints of AdamW hold none for parameters that never had a gradient: those keep their first ones.

    Raises:
        ValueError: moments that this optimizer does not have.
    """
    groups, settings = optimizer.param_groups, optimizer.state_dict()["param_groups"]
    if args.opt == "adamw":
        moments = optimizer.state_dict()["state"] | moments
    check_moments(optimizer, args, moments)
    optimizer.load_state_dict({"state": moments, "param_groups": settings})
    optimizer.param_groups = groups
    for parameter, found in optimizer.state.items():
        for name, value in found.items():
            found[name] = laid_out_like(parameter, value)


def check_moments(optimizer: torch.optim.Optimizer, args: argparse.Namespace, moments: Mapping[int, Mapping]) -> None:
    """Whether an optimizer of these parameters can go on with `moments`, numbered as its `state_dict` numbers them.

    `load_state_dict` takes moments of any kind, number, shape and layout, so they are checked before it, and before a
    checkpoint with them takes the place of the one before.

    Raises:
        ValueError: it cannot.
    """
    expected, numbers = set(moment_names(args)), itertools.count()
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        found = moments.get(next(numbers), {})
        if found.keys() != expected:
            raise ValueError(f"optimizer: moments {', '.join(map(str, found)) or 'missing'}")
        for name, value in found.items():
            if value.shape != (torch.Size() if name == "step" else parameter.shape):
                raise ValueError(f"optimizer: {name} has the shape {tuple(value.shape)}")


def laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the parameter's strides; scalars stay.

    Fused optimizers run over the memory of weights and moments as it lies, whatever the strides say; operations on
    lists of tensors go one by one where strides differ.
    """
    same = not tensor.ndim or tensor.stride() == parameter.stride()
    return tensor if same else torch.empty_like(parameter).copy_(tensor)
