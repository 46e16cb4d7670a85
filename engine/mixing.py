"""Mixing: images and labels of a batch in, images mixed in pairs and targets that say in which shares out.

Image i of a batch is mixed with image B - 1 - i, by a weighted sum (mixup, Zhang et al., ICLR 2018) or by a rectangle
cut out of the other one (CutMix, Yun et al., ICCV 2019), all pairs of a batch alike, as timm's `Mixup` does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from images.orders import random_seed

MIXING_KEY = 1  # tells these draws from others of the same step


class Mixing:
    """Mixes batches; with both kinds on, each batch takes one of them, with equal chances.

    Args:
        mixup, cutmix: alpha of the Beta(alpha, alpha) distribution of the shares; 0 for off.
        smoothing: label smoothing, part of the targets.
        paired: the second half of what comes in are only partners of the first; see `images.orders.Share`.
    """

    def __init__(
        self, mixup: float, cutmix: float, smoothing: float, classes: int, seed: int, paired: bool = False
    ):  # fmt: skip
        from timm.data import mixup as functions  # an optional package, checked when the model was made

        self.functions, self.mixup, self.cutmix = functions, mixup, cutmix
        self.smoothing, self.classes, self.seed, self.paired = smoothing, classes, seed, paired

    def __call__(self, images: Tensor, labels: Tensor, state: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and targets [B, classes] that sum to 1: a pure function of its arguments and the seed."""
        with _numpy_seeded(random_seed(self.seed, state, epoch, step, MIXING_KEY)):
            images, share = self._mix(images)
        targets = self.functions.mixup_target(labels, self.classes, share, self.smoothing)
        own = len(images) // 2 if self.paired else len(images)
        return images[:own], targets[:own].to(images.dtype)

    def _mix(self, images: Tensor) -> tuple[Tensor, float]:
        """The mixed images and the share of each that is its own; draws in timm's order."""
        np.random.rand()  # timm's chance of leaving a batch alone, which is none here
        cuts = np.random.rand() < 0.5 if self.mixup and self.cutmix else bool(self.cutmix)
        alpha = self.cutmix if cuts else self.mixup
        share = float(np.random.beta(alpha, alpha))
        if not cuts:
            return images * share + images.flip(0) * (1 - share), share
        (top, bottom, left, right), share = self.functions.cutmix_bbox_and_lam(images.shape, share)
        mixed = images.clone(memory_format=torch.contiguous_format)  # grey images are one channel, seen three times
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        return mixed, float(share)


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """timm draws from NumPy's global generator; it goes on afterwards as if nothing had been drawn."""
    state = np.random.get_state()
    np.random.seed([seed % 2**32, seed >> 32])
    try:
        yield
    finally:
        np.random.set_state(state)
