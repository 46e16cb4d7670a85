"""The order of images: when a data set is split, in an epoch, in a step.

Everything is a pure function of labels, counts and the key (seed, state, epoch, ...): it does not depend on a device,
on the number of workers or on earlier draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def balanced_order(labels: Tensor | Sequence[int], seed: int = 0) -> Tensor:
    """A fixed permutation, int64 [N], any prefix of which holds the classes in their proportions.

    Image r of the n of its class (after a seeded shuffle) stands at (r + 0.5) / n; images are sorted by that
    and then by class. With classes of equal size, counts in a prefix differ by at most one.
    """
    labels = np.asarray(labels)
    # RandomState's stream is frozen by NumPy's compatibility policy; Generator's may change with a release,
    # and with it every validation set.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    position = (rank + 0.5) / np.repeat(counts, counts)
    return torch.from_numpy(by_class[np.lexsort((labels[by_class], position))].astype(np.int64))


def count_steps(images: int, batch_size: int) -> int:
    """Of a training epoch: the last incomplete batch is dropped unless it is the only one."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")
    return max(images // batch_size, min(images, 1))


@dataclass(frozen=True)
class Share:
    """What one of several processes shows of each batch: the `rank`-th of `size` contiguous parts, which differ in
    length by one image at most.

    `paired`: behind its own images of a training batch of B come those that `engine.mixing` pairs them with, image
    B - 1 - i with image i, the last one's first, so that what is flipped pairs them.
    """

    rank: int = 0
    size: int = 1
    paired: bool = False

    def of(self, count: int) -> slice:
        """Its own positions among `count`."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def of_step(self, positions: slice) -> list[slice]:
        """Which of the positions of a training step it shows, those of partners last."""
        own = self.of(positions.stop - positions.start)
        shown = [slice(positions.start + own.start, positions.start + own.stop)]
        if self.paired:
            shown.append(slice(positions.stop - own.stop, positions.stop - own.start))
        return shown

    def batches(self, images: int, batch_size: int, limit: int | None, whole: bool) -> list[range]:
        """Positions of the batches, as many images each as it shows at once, that evaluation looks at in stored order:
        its own part of the images that `limit` batches of all processes hold, or the `whole` of them."""
        images = images if limit is None else min(images, limit * batch_size)
        part = slice(0, images) if whole else self.of(images)
        size = -(-batch_size // self.size)
        return [range(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]


WHOLE = Share()


def step_positions(step: int, batch_size: int, images: int) -> slice:
    """The positions in an epoch's order that a training step shows.

    Raises IndexError for a step outside 0..count_steps-1.
    """
    steps = count_steps(images, batch_size)
    if not 0 <= step < steps:
        raise IndexError(f"step {step}: an epoch has {steps} steps")
    return slice(step * batch_size, min((step + 1) * batch_size, images))


def random_seed(seed: int, *key: int) -> int:
    # The key is a spawn key, because words of one entropy list can run into each other; the modulus admits
    # negative seeds.
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0])


def epoch_order(seed: int, state: int, epoch: int, images: int) -> tuple[Tensor, torch.Generator]:
    """The epoch's permutation, int64 [N] on the CPU, and the generator that draws what else is random about it."""
    generator = torch.Generator().manual_seed(random_seed(seed, state, epoch))
    return torch.randperm(images, generator=generator), generator
