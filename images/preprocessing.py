"""What is done to an image before a network sees it, as one value that training, evaluation, exports and pages share.

shown = preprocessing_of(facts, 224)
inputs = shown.normalised(shown.pixels(image))         # a Pillow image -> float32 [3, 224, 224]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import floor
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from images.augment import Normalise
from images.facts import DatasetFacts
from images.reading import import_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = ("bilinear", "bicubic")  # with antialiasing


@dataclass(frozen=True)
class Preprocessing:
    """The steps in their order: EXIF orientation, `channels` of 8 bits (1: grey), resizing, the centre crop, values
    scaled to 0..1, mean and deviation of three channels (grey ones are equal before that)."""

    size: int  # pixels a side of the network's input
    resize: int  # pixels before the crop
    resize_mode: str  # "shorter": of the shorter side, the aspect is kept; "square": of both sides
    crop: int  # the centre crop, as large as the input
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: int
    orientation: str = "exif"  # images are turned as their EXIF data say
    source: str = "the data set"  # whose values these are
    crop_pct: float | None = None  # of `DatasetFacts`, for networks of other sizes that start from these weights
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: Mapping) -> Preprocessing | None:
        """What a config.json says; None where it does not."""
        found = config.get("preprocessing")
        if not found:
            return None
        return cls(**{**found, "mean": tuple(found["mean"]), "std": tuple(found["std"])})

    def as_config(self) -> dict:
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        return {name: value for name, value in values.items() if value is not None}

    def words(self) -> str:
        """In one line."""
        sides = "the shorter side" if self.resize_mode == "shorter" else "both sides"
        cut = f", centre crop of {self.crop}" if self.crop != self.resize or self.resize_mode == "shorter" else ""
        kind = "grey" if self.channels == 1 else "RGB"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{kind}, {sides} resized to {self.resize} pixels ({self.interpolation}){cut}, scaled to 0..1, "
            f"mean {mean}, std {std}, as for {self.source}"
        )

    def transform(self, dataset: str = "folder") -> Callable[[Image], Tensor]:
        """From an image of three 8-bit channels to uint8 [3, size, size], by torchvision on Pillow's images."""
        v2 = import_torchvision(dataset, "transforms.v2")
        mode = v2.InterpolationMode(self.interpolation)
        to = self.resize if self.resize_mode == "shorter" else (self.resize, self.resize)
        return v2.Compose([v2.Resize(to, mode, antialias=True), v2.CenterCrop(self.crop), v2.PILToTensor()])

    def pixels(self, image: Image) -> Tensor:
        """An image of three 8-bit channels, oriented, to uint8 [channels, size, size]."""
        if self.channels == 3:
            return self.transform()(image)
        from torchvision.transforms.v2 import functional as transforms

        return resized(transforms.pil_to_tensor(image.convert("L"))[None], self.size, self.interpolation)[0]

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [..., channels, size, size] to what the network takes, float32 [..., 3, size, size]."""
        images = Normalise(self, pixels.device)(pixels.float())
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


def preprocessing_of(facts: DatasetFacts, size: int) -> Preprocessing:
    """How images of a data set are shown to a network of `size` pixels.

    Files of any size: unless the facts name a share (`crop_pct`) as timm's do, the shorter side is resized to size /
    0.875, below 128 pixels to the size itself. Small data sets are stored as squares, of which nothing is cut off.
    """
    resize, mode = size, "square"
    if facts.files:
        mode = "square" if facts.crop_mode == "squash" else "shorter"
        if facts.crop_pct is not None:
            resize = floor(size / facts.crop_pct + 1e-6)
        elif size >= 128:
            resize = round(size / 0.875)
    mean, std = (tuple(values) * (3 // len(values)) for values in (facts.mean, facts.std))
    wanted = {"source": facts.shown_as, "crop_pct": facts.crop_pct, "crop_mode": facts.crop_mode}
    return Preprocessing(size, resize, mode, size, facts.interpolation, mean, std, facts.channels, **wanted)


def resized(images: Tensor, size: int, mode: str = "bilinear") -> Tensor:
    """uint8 [N, C, H, H] to uint8 [N, C, size, size], in chunks whose float copies stay around 64 MiB."""
    count, channels, height, width = images.shape
    if size == height == width:
        return images
    found = torch.empty(count, channels, size, size, dtype=torch.uint8)
    chunk = max(1, 2**24 // (channels * max(size, height) ** 2))
    for start in range(0, count, chunk):
        part = images[start : start + chunk].float()
        part = functional.interpolate(part, size=(size, size), mode=mode, antialias=True)
        found[start : start + chunk] = part.round_().clamp_(0, 255).to(torch.uint8)
    return found
