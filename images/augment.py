"""Augmentation as batched tensor code, on the device that holds the pixels.

A new augmentation is a field of `Draws`, its lines in `draw` (after the existing ones, whose random numbers must not
change), a function here, and a call in `Batches.batch`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from images.facts import DatasetFacts
from images.randaugment import draw_operations

AUGMENTATIONS = ("none", "basic", "strong", "rand")
ERASE_CHANCE, ERASE_AREA, ERASE_RATIO = 0.25, (0.02, 1 / 3), (0.3, 3.3)  # of "rand"; timm's


@dataclass(frozen=True)
class Draws:
    """Everything random about the images of an epoch or of a part of it, entry i for the i-th image shown.

    `origin` is the flat index, in the padded images, of the crop's upper left corner.
    """

    order: Tensor  # int64 [N]
    origin: Tensor | None = None  # [N]
    flip: Tensor | None = None  # bool [N]
    brightness: Tensor | None = None  # float32 [N], a factor
    contrast: Tensor | None = None  # float32 [N], a factor
    erase_top: Tensor | None = None  # int64 [N], the image size where nothing is erased
    erase_left: Tensor | None = None  # int64 [N]
    erase_height: Tensor | None = None  # int64 [N]
    erase_width: Tensor | None = None  # int64 [N]
    operations: Tensor | None = None  # int64 [N, 2], into `randaugment.OPERATIONS`
    signs: Tensor | None = None  # int64 [N, 2], their directions

    def part(self, positions: Sequence[slice]) -> "Draws":
        return self._each(lambda values: joined([values[part] for part in positions]))

    def to(self, device: torch.device) -> "Draws":
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        return Draws(**{name: None if values is None else change(values) for name, values in vars(self).items()})


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated along the first dimension; a single part is returned as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class PaddedImages:
    """Images uint8 [N, C, H, H] on `device`, once, with a black border of `border` pixels out of which crops come."""

    def __init__(self, images: Tensor, border: int, device: str | torch.device) -> None:
        self.count, self.channels, self.size, _ = images.shape
        self.border, self.side = border, self.size + 2 * border
        if border:
            shape = (self.count, self.channels, self.side, self.side)
            self.pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
            self.inner(slice(None)).copy_(images)
        else:
            self.pixels = images.contiguous().to(device)

        # Measured at 32x32x3, batch 128, one thread: 32-bit indices gather 1.4 times as fast as 64-bit ones.
        self._index_type = torch.int32 if self.pixels.numel() < 2**31 else torch.int64
        span = torch.arange(self.size, dtype=self._index_type)
        planes = torch.arange(self.channels, dtype=self._index_type)[:, None] * self.side**2
        self._rows = (planes + span * self.side).to(device)  # [C, H]
        self.span = span.to(device)
        self._mirrored = span.flip(0).to(device)

    def inner(self, part: slice) -> Tensor:
        """The images without their border: a view, uint8 [n, C, H, W]."""
        inside = slice(self.border, self.border + self.size)
        return self.pixels[part, :, inside, inside]

    def origin(self, chosen: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """Flat index of the corner (top, left) of each chosen image."""
        return (chosen * (self.channels * self.side**2) + top * self.side + left).to(self._index_type)

    def crop(self, origin: Tensor, flip: Tensor) -> Tensor:
        """One flat gather: crop offset and flip are only an arithmetic of indices. float32 [B, C, H, W]."""
        columns = torch.where(flip[:, None], self._mirrored, self.span)  # [B, W]
        rows = origin[:, None, None] + self._rows  # [B, C, H]
        index = rows[..., None] + columns[:, None, None, :]
        return self.pixels.view(-1).index_select(0, index.view(-1)).view(index.shape).float()


def check_augmentation(aug: str) -> None:
    if aug not in AUGMENTATIONS:
        raise ValueError(f"aug {aug!r}: choose none, basic, strong or rand")


def border_width(aug: str, size: int) -> int:
    """4 pixels (He et al. 2016, section 4.2), and an eighth of the side below 24 pixels, where 4 would move a
    16-pixel digit by a quarter of its width and cut strokes off."""
    return 0 if aug == "none" else 4 if size >= 24 else size // 8


def draw(aug: str, order: Tensor, images: PaddedImages, flips: bool, generator: torch.Generator) -> Draws:
    """All random numbers of an epoch, on the CPU, whose generator makes the same ones for every device."""
    count, size = len(order), images.size

    def integers(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    def factors() -> Tensor:
        return 0.6 + 0.8 * torch.rand(count, generator=generator)

    drawn = {"order": order}
    if aug != "none":
        top, left = integers(2 * images.border + 1), integers(2 * images.border + 1)
        drawn["origin"] = images.origin(order, top, left)
        drawn["flip"] = integers(2).bool() if flips else torch.zeros(count, dtype=torch.bool)
    if aug == "strong":
        drawn["brightness"], drawn["contrast"] = factors(), factors()
        corners = size - size // 4 + 1
        top, left = integers(corners), integers(corners)
        drawn["erase_top"] = torch.where(integers(2).bool(), top, size)
        drawn["erase_left"] = left
    if aug == "rand":
        drawn["operations"], drawn["signs"] = draw_operations(count, generator)
        drawn |= _draw_rectangles(count, size, generator)
    return Draws(**drawn)


def _draw_rectangles(count: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What random erasing takes out of each image: nothing, or 2% to 33% of its area, up to 3.3 times as long as wide
    or as wide as long."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    chosen = uniform(0, 1) < ERASE_CHANCE
    area, ratio = uniform(*ERASE_AREA) * size**2, uniform(*map(math.log, ERASE_RATIO)).exp()
    height = (area * ratio).sqrt().round().clamp(1, size)
    width = (area / ratio).sqrt().round().clamp(1, size)
    top, left = (uniform(0, 1) * (size - height + 1)).floor(), (uniform(0, 1) * (size - width + 1)).floor()
    found = {"top": top.where(chosen, size), "left": left, "height": height, "width": width}
    return {f"erase_{name}": value.long() for name, value in found.items()}


def jitter_(pixels: Tensor, brightness: Tensor, contrast: Tensor) -> None:
    """Brightness p -> b p, then contrast p -> m + c (p - m) around the image's mean m, each clamped to 0..255
    as it would be to 0..1. In place; pixels float32 [B, C, H, W], factors [B]."""
    pixels.mul_(brightness[:, None, None, None]).clamp_(max=255)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels.sub_(mean).mul_(contrast[:, None, None, None]).add_(mean).clamp_(0, 255)


def erase_(images: Tensor, drawn: Draws, span: Tensor) -> None:
    """Zeroes one rectangle in each image, as drawn; where no size was, a square of a quarter of the side. In place;
    images [B, C, H, H], `span` holds 0..H-1 on the device."""
    top, left = drawn.erase_top[:, None], drawn.erase_left[:, None]
    height = width = len(span) // 4
    if drawn.erase_height is not None:
        height, width = drawn.erase_height[:, None], drawn.erase_width[:, None]
    rows = (span >= top) & (span < top + height)
    columns = (span >= left) & (span < left + width)
    images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


class Normalise:
    """Pixels of 0..255, float32 [B, C, H, W], by mean and standard deviation: what they are of 0..1 becomes 0 and 1.

    `facts` are a data set's, or a `Preprocessing`. In place, but for grey pixels that become three channels because
    mean and deviation have three values.
    """

    def __init__(self, facts: DatasetFacts, device: str | torch.device) -> None:
        mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (facts.mean, facts.std))
        if facts.channels == 1 and len(mean.unique()) == len(std.unique()) == 1:
            mean, std = mean[:1], std[:1]
        self._scale, self._bias = (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-3] < len(self._scale):
            return (pixels * self._scale).add_(self._bias)
        # Two roundings rather than addcmul: a device that fuses them would give other bits, and on the CPU
        # this is the faster way (measured).
        return pixels.mul_(self._scale).add_(self._bias)
