#!/usr/bin/env python
"""Images a second of our batches against torchvision in a DataLoader, for images in memory.

    python benchmarks/data_pipeline.py [--images 20000] [--batch_size 128] [--repeats 5] [--threads 1]

Ours are device-resident batches of CIFAR-shaped random pixels.
`PIL` is the usual CIFAR recipe: Image.fromarray, RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and
Normalize; `v2` the same on uint8 tensors by torchvision.transforms.v2, image by image. Both run once inside the
training process (0 workers) and once with 2 workers.

Rates are interleaved medians over one epoch a round; ratios are per core, that is after dividing by --threads or by
the number of workers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from dataset import DATASETS, Batches, Split
from utils import format_table

FACTS = DATASETS["cifar10"]
WORKERS = 2


class PilImages(Dataset):
    """As torchvision's CIFAR10: an array [N, H, W, C] of bytes and a transform of PIL images."""

    def __init__(self, pixels: np.ndarray, labels: list[int]):
        self.pixels, self.labels = pixels, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(FACTS.image_size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(FACTS.mean, FACTS.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class TensorImages(Dataset):
    """The same without PIL: uint8 tensors [C, H, W] and transforms.v2."""

    def __init__(self, split: Split):
        self.images, self.labels = split.images, split.labels.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(FACTS.image_size, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(FACTS.mean, FACTS.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


def rate(epoch: Callable[[], Iterable]) -> float:
    """Images a second of one pass over what `epoch` returns; starting workers is not counted."""
    batches = iter(epoch())
    shown = 0

    def consume() -> None:
        nonlocal shown
        for images, _ in batches:
            shown += len(images)

    spent = common.seconds(consume)
    return shown / spent


def ours(data: Batches) -> Callable[[], Iterable]:
    """Passes over the data, an epoch each."""
    epochs = iter(range(10**9))

    def epoch() -> Iterable:
        number = next(epochs)  # a new one each time, so that drawing the epoch's random numbers is counted
        yield from (data.batch(0, number, step) for step in range(data.steps_per_epoch))

    return epoch


def small_images(args: argparse.Namespace) -> tuple[dict[str, Callable[[], Iterable]], dict[str, int]]:
    """Ways to read 32x32x3 images that are in memory, by name, and the cores each may use."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.images, 3, FACTS.image_size, FACTS.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, FACTS.classes, (args.images,), generator=generator)
    split = Split(images, labels)
    augmentations = ("none", "basic", "strong")
    ways = {f"Batches, {aug}": ours(Batches(split, FACTS, args.batch_size, aug=aug)) for aug in augmentations}
    cores = dict.fromkeys(ways, args.threads)
    sources = {
        "PIL": PilImages(images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()),
        "v2": TensorImages(split),
    }
    for name, source in sources.items():
        for workers in (0, WORKERS):
            loader = DataLoader(source, args.batch_size, shuffle=True, drop_last=True, num_workers=workers)
            ways[f"{name}, {workers} workers"] = lambda loader=loader: loader
            cores[f"{name}, {workers} workers"] = max(1, workers)
    return ways, cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the training process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    ways, cores = small_images(args)
    rates = common.interleaved({name: lambda way=way: rate(way) for name, way in ways.items()}, args.repeats)
    per_core = {name: [value / cores[name] for value in values] for name, values in rates.items()}
    rows = []
    for name, values in rates.items():
        low, middle, high = common.quartiles(values)
        row = {
            "way": name,
            "cores": cores[name],
            "images/s": f"{middle:,.0f}",
            "quartiles": f"{low:,.0f}-{high:,.0f}",
        }
        for baseline in ("PIL, 0 workers", "v2, 0 workers"):
            row[f"per core over {baseline}"] = f"{common.pairwise(per_core[name], per_core[baseline]):.2f}x"
        rows.append(row)
    head = f"32x32x3, {args.images:,} images, batch {args.batch_size}, {common.machine()}, {args.repeats} repeats"
    print(f"\n{head}\n\n{format_table(rows, {title: title for title in rows[0]})}")
    common.save("data_pipeline", {"head": head, "rows": rows})


if __name__ == "__main__":
    main()
