"""Batches of a small data set, whose pixels stay on the device.

A batch is images, normalised float32 [B, 3, H, W], and labels, int64 [B]. `make_batches` chooses between these batches
and those of image files.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from images import augment
from images.facts import DatasetFacts, FolderSplit, Split
from images.folders import FolderBatches
from images.orders import WHOLE, Share, count_steps, epoch_order, step_positions
from images.randaugment import rand_augment


def make_batches(
    split: Split | FolderSplit,
    facts: DatasetFacts,
    batch_size: int,
    device: str | torch.device,
    seed: int = 0,
    aug: str = "none",
    workers: int = 0,
    share: Share = WHOLE,
) -> "Batches | FolderBatches":
    """`Batches` of a small data set or `FolderBatches` of a folder of images, which is read by `workers`."""
    if isinstance(split, FolderSplit):
        return FolderBatches(split, facts, batch_size, device, seed, aug, workers, share)
    return Batches(split, facts, batch_size, device, seed, aug, share)


class Batches:
    """Batches of one split, whose pixels live on `device` once, as uint8.

    `aug`: "none"; "basic" is a random crop out of the image with a black border, and a horizontal flip where
    the data set allows it; "strong" adds brightness and contrast jitter (factors 0.6 to 1.4, clamped to the
    pixel range, contrast around the image's own mean) and, for half of the images, one square of a quarter of
    the side set to the mean (random erasing, Zhong et al. 2017, arXiv:1708.04896); "rand" adds to "basic" two random
    operations of RandAugment and, for a quarter of the images, a rectangle of 2% to 33% of the area set to the mean.

    All random numbers come from the CPU generator, seeded by (seed, state, epoch) alone, so the choices are
    the same on every device. Grey images come out as an expanded (stride 0) view of three channels: clone
    before writing into one.

    `batch_size` counts the images of all processes, of which this one shows its `share`.
    """

    unreadable, broken = 0, {}  # `FolderBatches` counts files that are no images
    unreadable_files: frozenset[str] = frozenset()

    def __init__(
        self,
        split: Split,
        facts: DatasetFacts,
        batch_size: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        aug: str = "none",
        share: Share = WHOLE,
    ) -> None:
        augment.check_augmentation(aug)
        self.batch_size, self.seed, self.aug, self.share = batch_size, seed, aug, share
        self.steps_per_epoch = count_steps(len(split.images), batch_size)
        self.labels = split.labels.to(device)
        border = augment.border_width(aug, split.images.shape[-1])
        self._images = augment.PaddedImages(split.images, border, device)
        self._normalise_ = augment.Normalise(facts, device)
        self._device, self._flips = torch.device(device), facts.flip
        self._cached_draws: tuple[tuple[int, int], augment.Draws] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, state: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Training batch: images float32 [B, 3, H, W], labels int64 [B]; a pure function of its arguments and
        the seed. Raises IndexError for a step outside 0..steps_per_epoch-1.

        Only the first call of an epoch draws and copies to the device; the others never wait for it.
        """
        drawn = self._draws(state, epoch).part(self._positions(step))
        if self.aug == "none":
            pixels = self._images.pixels.index_select(0, drawn.order).float()
        else:
            pixels = self._images.crop(drawn.origin, drawn.flip)
        if self.aug == "strong":
            augment.jitter_(pixels, drawn.brightness, drawn.contrast)
        elif self.aug == "rand":
            pixels = rand_augment(pixels, drawn.operations, drawn.signs)
        images = self._normalise_(pixels)
        if self.aug in ("strong", "rand"):
            augment.erase_(images, drawn, self._images.span)
        return images.expand(-1, 3, -1, -1), self.labels.index_select(0, drawn.order)

    def chosen(self, state: int, epoch: int, step: int) -> Tensor:
        """The positions in the split of the images that `batch` returns, int64 [B] on the device."""
        return augment.joined([self._draws(state, epoch).order[part] for part in self._positions(step)])

    def sequential(self, limit: int | None = None, whole: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in stored order, never augmented, the last batch as long as it is; at most `limit`
        batches. Shapes as in `batch`. Not the `whole`: this process's share of these images."""
        for positions in self.share.batches(len(self), self.batch_size, limit, whole):
            part = slice(positions.start, positions.stop)
            pixels = self._images.inner(part).to(torch.float32, memory_format=torch.contiguous_format)
            yield self._normalise_(pixels).expand(-1, 3, -1, -1), self.labels[part]

    def note(self, broken: Iterable[tuple[int, str]]) -> None:
        """Nothing can be broken; to `FolderBatches` other processes report files that they could not read."""

    def close(self) -> None:
        """Nothing to close; `FolderBatches` ends its worker processes here."""

    def _positions(self, step: int) -> list[slice]:
        return self.share.of_step(step_positions(step, self.batch_size, len(self)))

    def _draws(self, state: int, epoch: int) -> augment.Draws:
        if self._cached_draws is None or self._cached_draws[0] != (state, epoch):
            order, generator = epoch_order(self.seed, state, epoch, len(self))
            drawn = augment.draw(self.aug, order, self._images, self._flips, generator)
            self._cached_draws = (state, epoch), drawn.to(self._device)
        return self._cached_draws[1]
