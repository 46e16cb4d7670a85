"""What is known of each data set without reading it, and what a split of one holds once it is read.

A new data set needs an entry in `DATASETS` and a reader (in `READERS` of reading.py, or in `TREES` of trees.py for a
folder of images).
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor


class DataError(RuntimeError):
    """One line that says what is wrong with the data and what to do."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set without reading it. Mean and std are per stored channel, on the 0..1 scale,
    over the training set at its native size; `train_images` counts the training set before validation is
    taken from it; `vit_image_size` is what a ViT built for 32 pixels is shown when the user names no size.
    For folders of images (`files`), whose files differ in size, `image_size` is what they are commonly cropped to,
    and `dataset_facts` replaces the counts by those found.

    How images are shown is the data set's own, or that of pretrained weights where `shown_by` replaced it: then mean
    and std have three values. `preprocessing.py` makes steps of it.
    """

    classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    vit_image_size: int
    train_images: int
    files: bool = False
    interpolation: str = "bilinear"
    crop_pct: float | None = None  # what the centre crop is of the resized side, as in timm's configurations
    crop_mode: str = "center"  # or "squash": the aspect is not kept
    shown_as: str = "the data set"

    def shown_by(self, weights: Mapping | None) -> "DatasetFacts":
        """With the mean, std, interpolation, crop and `shown_as` that weights want; None: with its own."""
        if not weights:
            return self
        return dataclasses.replace(self, **{**weights, "mean": tuple(weights["mean"]), "std": tuple(weights["std"])})


# classes, channels, pixels, mean, std, whether flips keep the class, pixels for a ViT, training images
_IMAGENET = DatasetFacts(1000, 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True, 224, 1_281_167, files=True)
DATASETS = {
    "cifar10": DatasetFacts(10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True, 32, 50_000),
    "cifar100": DatasetFacts(100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, 32, 50_000),
    "fashionmnist": DatasetFacts(10, 1, 28, (0.2860,), (0.3530,), True, 32, 60_000),
    "digits": DatasetFacts(10, 1, 8, (0.3058,), (0.3762,), False, 16, 1_438),
    "imagenet": _IMAGENET,
    "tiny-imagenet": DatasetFacts(
        200, 3, 64, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), True, 64, 100_000, files=True
    ),
    "folder": dataclasses.replace(_IMAGENET, classes=0, train_images=0),  # known once it is listed
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N], both on the CPU."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Image files that are read when a batch needs them, and their labels int64 [N] on the CPU.

    `paths` are bytes [N], relative to `root` and as the file system spells them: one block of memory, which
    worker processes share, where a million strings would be copied to each by their reference counts.
    """

    paths: np.ndarray
    labels: Tensor
    root: Path
    image_size: int
    dataset: str

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))


@dataclass(frozen=True, eq=False)
class Splits:
    """Train and validation are cut from the official training set, test is the official test set. Folders of
    one's own images may bring a validation set. `identity` says which data were read (see identity.py), `lines` what
    was said of them in the log: which part is which, and what is left out."""

    train: Split | FolderSplit
    val: Split | FolderSplit
    test: Split | FolderSplit
    facts: DatasetFacts
    identity: dict = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Images of each part."""
        return {"train": len(self.train.labels), "val": len(self.val.labels), "test": len(self.test.labels)}


def known_facts(name: str) -> DatasetFacts:
    if name not in DATASETS:
        raise DataError(f"--dataset {name}: unknown; choose one of {', '.join(DATASETS)}")
    return DATASETS[name]
