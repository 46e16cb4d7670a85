"""Stochastic depth (Huang et al., ECCV 2016): a network, a rate and the key of a step in, residual branches that some
images of the batch skip out.

What is dropped is a pure function of (seed, state, epoch, step), the branch and the image's place in the batch: a
resumed run, the masked network and the small one without its dead units all drop the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from images.orders import WHOLE, Share, random_seed
from utils import to_device

DEPTH_KEY = 2  # tells these draws from others of the same step
BRANCHES = ("drop_path1", "drop_path2")  # of a block, ours and timm's: attention, MLP


def has_branches(model: nn.Module) -> bool:
    """Whether every block of the model has places where its branches can be dropped."""
    blocks = list(getattr(model, "blocks", ()))
    return bool(blocks) and all(hasattr(block, name) for block in blocks for name in BRANCHES)


class DropPath(nn.Module):
    """In training, a branch [B, ...] times a factor per image: 0, or 1 / keep so that the mean stays."""

    def __init__(self) -> None:
        super().__init__()
        self.factor: Tensor | None = None  # [B]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.factor is None:
            return x
        return x * self.factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class StochasticDepth:
    """Drops branches of `model`, those of block i of N with probability rate * i / (N - 1), for a
    `share` of each batch."""

    def __init__(self, model: nn.Module, rate: float, seed: int, share: Share = WHOLE):
        self.seed, self.share = seed, share
        rates = torch.linspace(0, rate, len(model.blocks), dtype=torch.float64)
        self.keep = 1 - rates.repeat_interleave(len(BRANCHES))  # a branch each
        self.paths = [DropPath() for _ in self.keep]
        self.factors = torch.ones(len(self.keep), 1)
        places = [(block, name) for block in model.blocks for name in BRANCHES]
        for (block, name), path in zip(places, self.paths, strict=True):
            setattr(block, name, path)

    def draw(self, images: Tensor, state: int, epoch: int, step: int, count: int | None = None) -> None:
        """Choose what the images [B, ...] of this step skip, which are the share of `count`; B when not given."""
        generator = torch.Generator().manual_seed(random_seed(self.seed, state, epoch, step, DEPTH_KEY))
        count = len(images) if count is None else count
        chances = torch.rand(len(self.keep), count, generator=generator, dtype=torch.float64)[:, self.share.of(count)]
        factors = (chances < self.keep[:, None]) / self.keep[:, None]  # [branches, B]
        self.factors = to_device(factors.to(images.dtype), images.device)

    def show(self, start: int, stop: int) -> None:
        """The next forward pass gets these images of the batch."""
        for path, factors in zip(self.paths, self.factors, strict=True):
            path.factor = factors[start:stop]
