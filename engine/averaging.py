"""Averaging: a network that trains in; a copy of it whose weights are the exponential moving average of its own out."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def averaging_line(decay: float) -> str:
    """What the averaged weights are for, for the log."""
    return (
        f"ema: validated, selected, tested and exported is the average of the weights, decay {decay:g}; scores, "
        "rewinding and further training use the weights themselves"
    )


class Average:
    """`model`: the average of another model's weights and statistics over the steps of a state, in the same shapes.

    After step t it takes up 1 - min(decay, (1 + t) / (10 + t)) of the weights of now: where a state starts from is
    forgotten soon, however short the state is. What is zero from the start to the end is zero in the average.

    Args:
        start: the average so far, which `model` had when it was saved; None: the state starts.
    """

    def __init__(self, model: nn.Module, decay: float, start: Mapping[str, Tensor] | None = None):
        self.decay, self.model = decay, copy.deepcopy(model).requires_grad_(False)
        if start is not None:
            self.model.load_state_dict(start)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take up the weights after `step` steps of the state; nothing here waits for the device."""
        averages, current = (list(tensors) for tensors in zip(*self._floats, strict=True))
        get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(averages, current, step)
        for own, counted in self._counts:
            own.copy_(counted)
