"""The RSST penalty: how large it is now (pure functions) and what it does to the weights (in place).

Doomed weights are driven to zero while the next state trains and cut once they are small. Parameters and their doomed
masks are given by name. Two forms:

decay (the default), after each optimizer step k = 1..K:
    lambda_k = g * shape(k / K)
    w <- w * exp(-20 * lambda_k / sum_j shape(j / K))
so the penalty's factor over a state is exp(-20 g), whatever the learning rate, momentum or precision.

gradient, the form of older descriptions: lambda_k * w is added to the gradient. What that achieves depends on the
learning rate; `predicted_dose` says how much before a state starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DOSE_PER_STRENGTH = 20.0  # total exponent of the decay form per unit of --reg_granularity_prune
RECORDS = 50  # of lambda and residual over a ramp
LETHAL_DOSE = 5.0  # exp(-5) < 0.7%: below this a gradient-form penalty leaves too much behind

SHAPES: dict[str, Callable[[float, float], float]] = {
    "x": lambda u, p: u,
    "x^2": lambda u, p: u**2,
    "x^3": lambda u, p: u**3,
    "exp": lambda u, p: math.expm1(u) / math.expm1(1),
    "exp_custom": lambda u, p: math.expm1(u) / math.expm1(1),
    "exp_custom_exponents": lambda u, p: math.expm1(u**p) / math.expm1(1),
}


def cut_step(total_steps: int, steps_per_epoch: int, finish: float) -> int:
    """Step K of a state after which its doomed weights are cut: max(1, round(finish * total_steps)).

    K moves to the nearest epoch border, ties to the later one and never 0, when that moves it by less than a tenth
    of the state.
    """
    step = max(1, round(finish * total_steps))
    border = max(1, math.floor(step / steps_per_epoch + 0.5)) * steps_per_epoch
    if border <= total_steps and abs(border - step) < total_steps / 10:
        return border
    return step


@dataclass(frozen=True)
class Ramp:
    """Strength of the penalty over the steps 1..`steps` of a state (`--RST_schedule`).

    `period` is the number of steps after which the ramp restarts: `steps` for one ramp over the state, the steps of
    an epoch for the older clock (gradient form only).
    """

    schedule: str
    strength: float  # g, --reg_granularity_prune
    steps: int
    period: int
    exponent: float = 4.0

    def shape(self, step: int) -> float:
        """shape(u) in [0, 1] with u = position of `step` (1-based) in its period."""
        return SHAPES[self.schedule](((step - 1) % self.period + 1) / self.period, self.exponent)

    def value(self, step: int) -> float:
        """lambda at `step`, 0 before the first step and after the last."""
        return self.strength * self.shape(step) if 1 <= step <= self.steps else 0.0

    @cached_property
    def cumulative(self) -> list[float]:
        """sum_{j <= k} shape(j / K) for k = 0..steps."""
        sums = [0.0]
        for step in range(1, self.steps + 1):
            sums.append(sums[-1] + self.shape(step))
        return sums

    def exponent_at(self, step: int) -> float:
        """Decay form: -log of the factor applied after `step`."""
        return DOSE_PER_STRENGTH * self.value(step) / self.cumulative[-1]

    @cached_property
    def parts(self) -> int:
        """Decay form: parts of `Penalty.shrink_` so that no exponent is above 1; the last step has the largest."""
        return max(1, math.ceil(self.exponent_at(self.steps)))

    def is_recorded(self, step: int) -> bool:
        """Whether lambda and residual are written down after `step`: RECORDS times or more, if a ramp has the steps."""
        return step == self.steps or step % max(1, self.steps // RECORDS) == 0

    def dose(self, step: int) -> float:
        """Decay form: -log of the factor that has been applied up to and including `step`."""
        done = self.cumulative[max(0, min(step, self.steps))]
        return DOSE_PER_STRENGTH * self.strength * done / self.cumulative[-1]


def predicted_dose(ramp: Ramp, learning_rates: Sequence[float], momentum: float) -> list[float]:
    """Gradient form with SGD: the dose sum_{j <= k} lr_j lambda_j / (1 - momentum) for k = 0..steps."""
    doses = [0.0]
    for step in range(1, ramp.steps + 1):
        doses.append(doses[-1] + learning_rates[step - 1] * ramp.value(step) / (1 - momentum))
    return doses


class Penalty:
    """The doomed weights of one state and what is done to them.

    How much is done is a scalar on the weights' device, `amount`: steps that are captured as a CUDA graph read it anew.

    Args:
        parameters: by name, those that hold doomed weights; they change in place.
        doomed: by the same names, tensors of their shape that are 1 on doomed weights and 0 elsewhere.
        start_norm: norm of the doomed weights when the state started, for a state that goes on; measured when None.
    """

    def __init__(self, parameters: Mapping[str, Tensor], doomed: Mapping[str, Tensor], start_norm: float | None = None):
        self.names = [name for name, mask in doomed.items() if mask.any()]
        self.parameters = [parameters[name] for name in self.names]
        self.doomed = [doomed[name].to(parameters[name]) for name in self.names]
        self.amount = self.doomed[0].new_zeros(()) if self.names else torch.zeros(())
        self.start_norm = self.norm() if start_norm is None else start_norm

    def __bool__(self) -> bool:
        return bool(self.names)

    def set_(self, amount: float) -> None:
        """What the next step does: the exponent of `shrink_` or the strength of `add_to_gradients_`."""
        self.amount.fill_(amount)

    @torch.no_grad()
    def shrink_(self, parts: int = 1) -> None:
        """w <- w * exp(-amount) on doomed weights, in `parts` equal ones; all others keep their bits."""
        if not self.names:
            return
        # w + (factor - 1) * w * doomed; in parts, since a small factor would lose its digits in factor - 1
        changes = torch._foreach_mul(self.doomed, torch.expm1(-self.amount / parts))
        for _ in range(parts):
            torch._foreach_addcmul_(self.parameters, self.parameters, changes)

    @torch.no_grad()
    def block_gradients_(self) -> None:
        """Take the loss's gradient away from doomed weights."""
        with_gradients = [pair for pair in zip(self.parameters, self.doomed, strict=True) if pair[0].grad is not None]
        gradients = [parameter.grad for parameter, _ in with_gradients]
        if gradients:
            torch._foreach_addcmul_(gradients, gradients, [mask for _, mask in with_gradients], value=-1.0)

    @torch.no_grad()
    def add_to_gradients_(self) -> None:
        """grad <- grad + amount * w on doomed weights (the gradient of amount / 2 * |w|^2)."""
        gradients = [parameter.grad for parameter in self.parameters]
        if gradients:
            torch._foreach_addcmul_(gradients, self.parameters, torch._foreach_mul(self.doomed, self.amount))

    @torch.no_grad()
    def norm(self) -> float:
        """L2 norm of all doomed weights."""
        squares = (
            (parameter.double() if parameter.device.type != "mps" else parameter).mul(mask).square().sum()
            for parameter, mask in zip(self.parameters, self.doomed, strict=True)
        )
        return math.sqrt(sum(float(square) for square in squares))

    @torch.no_grad()
    def measure(self) -> Tensor:
        """The same as a scalar that stays on the device, so that nothing waits for it."""
        squares = [
            parameter.mul(mask).square().sum() for parameter, mask in zip(self.parameters, self.doomed, strict=True)
        ]
        return torch.stack(squares).sum().sqrt()

    def residual(self) -> float:
        """Norm of the doomed weights over their norm when the state started; 0 when there are none."""
        return self.norm() / self.start_norm if self.start_norm else 0.0


class Trace:
    """Steps with their lambda and the norm of the doomed weights, kept on the device until they are taken."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.norms: list[Tensor] = []

    def add(self, step: int, strength: float, norm: Tensor) -> None:
        self.points.append((step, strength))
        self.norms.append(norm)

    def take(self) -> list[tuple[int, float, float]]:
        """(step, lambda, norm) of all points since the last call; waits for the device."""
        norms = torch.stack(self.norms).tolist() if self.norms else []
        taken = [(*point, norm) for point, norm in zip(self.points, norms, strict=True)]
        self.points, self.norms = [], []
        return taken
