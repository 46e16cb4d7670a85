"""Data sets, small ones as device-resident uint8 tensors and folders of images, in batches that can be replayed.

    splits = load_dataset("digits", "data", image_size=16)
    train = make_batches(splits.train, splits.facts, batch_size=128, device="cpu", seed=42, aug="basic")
    images, labels = train.batch(state=0, epoch=3, step=7)     # the same bits whenever it is asked for

Images are uint8 until a batch is made; a batch is float32 [B, 3, H, W], normalised once by the data set's own
mean and standard deviation. Which images validate is fixed, whatever the seed of the run.
"""

import contextlib
import dataclasses
import errno
import functools
import gzip
import http.client
import importlib
import io
import itertools
import logging
import math
import os
import signal
import socket
import struct
import tarfile
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, get_worker_info

logger = logging.getLogger(__name__)


class DataError(RuntimeError):
    """One line that says what is wrong with the data and what to do."""


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set without reading it. Mean and std are per stored channel, on the 0..1 scale,
    over the training set at its native size; `train_images` counts the training set before validation is
    taken from it; `vit_image_size` is what a ViT built for 32 pixels is shown when the user names no size.
    For folders of images, whose files differ in size, `image_size` is what they are commonly cropped to, and
    `dataset_facts` replaces the counts by those found.
    """

    classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    vit_image_size: int
    train_images: int


_IMAGENET_FACTS = DatasetFacts(
    classes=1_000,
    channels=3,
    image_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    flip=True,
    vit_image_size=224,
    train_images=1_281_167,
)

DATASETS = {
    "cifar10": DatasetFacts(
        classes=10,
        channels=3,
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        flip=True,
        vit_image_size=32,
        train_images=50_000,
    ),
    "cifar100": DatasetFacts(
        classes=100,
        channels=3,
        image_size=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        flip=True,
        vit_image_size=32,
        train_images=50_000,
    ),
    "fashionmnist": DatasetFacts(
        classes=10,
        channels=1,
        image_size=28,
        mean=(0.2860,),
        std=(0.3530,),
        flip=True,
        vit_image_size=32,
        train_images=60_000,
    ),
    "digits": DatasetFacts(
        classes=10,
        channels=1,
        image_size=8,
        mean=(0.3058,),
        std=(0.3762,),
        flip=False,
        vit_image_size=16,
        train_images=1_438,
    ),
    "imagenet": _IMAGENET_FACTS,
    "tiny-imagenet": DatasetFacts(
        classes=200,
        channels=3,
        image_size=64,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        flip=True,
        vit_image_size=64,
        train_images=100_000,
    ),
    "folder": dataclasses.replace(_IMAGENET_FACTS, classes=0, train_images=0),  # known once it is listed
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
    one's own images may bring a validation set."""

    train: Split | FolderSplit
    val: Split | FolderSplit
    test: Split | FolderSplit
    facts: DatasetFacts


# Splitting


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


def split_sizes(
    name: str, val_fraction: float = 0.1, train_limit: int | None = None, data_dir: str | Path | None = None
) -> tuple[int, int]:
    """Images in train and val as `load_dataset` would return them, without any data; a folder of images that
    is there is listed and counted.

    Raises DataError for an unknown name, a fraction outside (0, 1), a limit below 1, and for `folder` where
    there is none.
    """
    facts, tree = _facts(name), _tree_if_there(name, data_dir)
    if tree and tree.val:
        return _count_split(len(tree.train.labels), val_fraction, train_limit, cut_val=False)[0], len(tree.val.labels)
    return _count_split(len(tree.train.labels) if tree else facts.train_images, val_fraction, train_limit)


def dataset_facts(name: str, data_dir: str | Path | None = None) -> DatasetFacts:
    """What `DATASETS` says; for a folder of images that is there, with its own numbers of classes and images.

    Raises DataError for an unknown name, a tree that cannot be used, and for `folder` where there is none.
    """
    facts, tree = _facts(name), _tree_if_there(name, data_dir)
    return _found_facts(facts, tree) if tree else facts


def _facts(name: str) -> DatasetFacts:
    if name not in DATASETS:
        raise DataError(f"--dataset {name}: unknown; choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _check_arguments(val_fraction: float, train_limit: int | None) -> None:
    if not 0 < val_fraction < 1:
        raise DataError(f"--val_fraction {val_fraction}: must lie between 0 and 1, such as 0.1")
    if train_limit is not None and train_limit < 1:
        raise DataError(f"--train_limit {train_limit}: must be at least 1; leave it out to train on all images")


def _count_split(images: int, val_fraction: float, train_limit: int | None, cut_val: bool = True) -> tuple[int, int]:
    _check_arguments(val_fraction, train_limit)
    val = max(1, round(images * val_fraction)) if cut_val else 0
    available = images - val
    if available < 1:
        raise DataError(f"--val_fraction {val_fraction}: leaves nothing to train on of {images} images; lower it")
    return (available if train_limit is None else min(available, train_limit)), val


def _cut(labels: Tensor, val_fraction: float, train_limit: int | None, cut_val: bool = True) -> tuple[Tensor, Tensor]:
    """Indices of train and val, int64; val is empty without `cut_val`."""
    train_images, val_images = _count_split(len(labels), val_fraction, train_limit, cut_val)
    order = balanced_order(labels)
    val, rest = order[:val_images], order[val_images:]
    if train_limit is not None and train_limit > len(rest):
        logger.warning("--train_limit %d: only %d training images, all are used", train_limit, len(rest))
    return rest[balanced_order(labels[rest])][:train_images], val


# Loading


def load_dataset(
    name: str,
    data_dir: str | Path,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    train_limit: int | None = None,
) -> Splits:
    """Reads a data set, downloading it into `data_dir` when it is missing, and splits it.

    Validation is the prefix of `balanced_order` of the official training set; the rest is train, in its own
    balanced order, of which `train_limit` keeps the first. `image_size` (pixels) other than the native one
    resizes bilinearly with antialiasing, once. No argument depends on the seed of a run.

    Folders of images (imagenet, tiny-imagenet, folder) are never downloaded, and only listed here: their
    splits are `FolderSplit`s. In `folder`, where only one of val/ and test/ is there, it is the test set;
    where neither is, a fixed class-balanced fifth of train/ is, before validation is cut.

    Raises DataError, in one line, for a bad argument and for data that is missing (with no network), damaged
    or labelled outside the classes. A failed download leaves `data_dir` as it was.
    """
    facts, root = _facts(name), Path(data_dir).expanduser()
    if image_size is not None and image_size < 1:
        raise DataError(f"--img_size {image_size}: must be at least 1 pixel")
    _check_arguments(val_fraction, train_limit)
    if name in _TREES:
        return _load_folders(name, root, image_size or facts.image_size, val_fraction, train_limit)

    _count_split(facts.train_images, val_fraction, train_limit)
    official_train, test = _READERS[name](name, root)
    train_order, val_order = _cut(official_train.labels, val_fraction, train_limit)

    def finish(split: Split) -> Split:
        return Split(_resize(split.images, image_size or facts.image_size), split.labels)

    train, val = (Split(official_train.images[o], official_train.labels[o]) for o in (train_order, val_order))
    return Splits(finish(train), finish(val), finish(test), facts)


def _load_folders(name: str, root: Path, image_size: int, val_fraction: float, train_limit: int | None) -> Splits:
    tree = _read_tree(name, root)
    known, facts = DATASETS[name], _found_facts(DATASETS[name], tree)
    if known.classes not in (0, facts.classes):
        logger.info("--dataset %s: %d classes found, the full set has %d", name, facts.classes, known.classes)
    if tree.roles:
        logger.info("--dataset %s: %s", name, tree.roles)
    train_order, val_order = _cut(tree.train.labels, val_fraction, train_limit, cut_val=tree.val is None)

    def finish(files: _Files) -> FolderSplit:
        return FolderSplit(files.paths, files.labels, root, image_size, name)

    val = tree.val or tree.train.take(val_order)
    return Splits(finish(tree.train.take(train_order)), finish(val), finish(tree.test), facts)


def _resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, H] to uint8 [N, C, size, size], in chunks whose float copies stay around 64 MiB."""
    count, channels, height, _ = images.shape
    if size == height:
        return images
    resized = torch.empty(count, channels, size, size, dtype=torch.uint8)
    chunk = max(1, 2**24 // (channels * max(size, height) ** 2))
    for start in range(0, count, chunk):
        part = images[start : start + chunk].float()
        part = functional.interpolate(part, size=(size, size), mode="bilinear", antialias=True)
        resized[start : start + chunk] = part.round_().clamp_(0, 255).to(torch.uint8)
    return resized


def _checked_split(images: Tensor, labels: Tensor, facts: DatasetFacts, source: str) -> Split:
    shape = (facts.channels, facts.image_size, facts.image_size)
    if len(labels) == 0:
        raise DataError(f"{source}: holds no images; replace it with a fresh copy")
    if len(images) != len(labels) or tuple(images.shape[1:]) != shape:
        raise DataError(
            f"{source}: {len(labels)} labels for images of shape {tuple(images.shape)}, expected"
            f" {(len(labels), *shape)}; replace it with a fresh copy"
        )
    outside = labels[(labels < 0) | (labels >= facts.classes)]
    if len(outside):
        raise DataError(
            f"{source}: label {outside[0].item()} is outside 0..{facts.classes - 1}; the file is damaged or"
            " belongs to another data set, replace it"
        )
    return Split(images, labels)


def _read_digits(name: str, root: Path) -> tuple[Split, Split]:
    """scikit-learn's 1,797 embedded digits: a fixed, class-balanced fifth is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"--dataset {name}: needs scikit-learn ({error}); pip install scikit-learn") from error
    digits = load_digits()
    facts = DATASETS[name]
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    split = _checked_split(images, labels, facts, "scikit-learn's digits")
    order = balanced_order(labels)
    train, test = order[-facts.train_images :], order[: -facts.train_images]
    return Split(split.images[train], split.labels[train]), Split(split.images[test], split.labels[test])


def _read_cifar(name: str, root: Path) -> tuple[Split, Split]:
    datasets = _import_torchvision(name, "datasets")
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder, archive = root / source.base_folder, root / source.filename

    def open_parts() -> tuple:
        return source(str(root), train=True), source(str(root), train=False)

    def convert(part, files: list) -> Split:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(part.targets, dtype=torch.int64)
        names = ", ".join(file_name for file_name, _ in files)
        return _checked_split(images, labels, DATASETS[name], f"{folder} ({names})")

    try:
        train, test = open_parts()
    except (RuntimeError, OSError):
        # torchvision raises RuntimeError for files that are missing as for files with another md5.
        archive_intact = os.access(archive, os.R_OK) and datasets.utils.check_integrity(archive, source.tgz_md5)
        suspects = [folder] if archive_intact else [folder, archive]
        damaged = " and ".join(path.name for path in suspects if path.exists())
        found = f"{damaged} under '{root}' damaged or incomplete" if damaged else f"not found under '{root}'"

        def obtain(staging: str) -> None:
            if archive_intact:
                datasets.utils.extract_archive(str(archive), staging)
            else:
                source(staging, download=True)

        _fetch(name, root, obtain, found, f"{source.filename} from the CIFAR page")
        train, test = open_parts()
    return convert(train, source.train_list), convert(test, source.test_list)


_IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def _read_fashion(name: str, root: Path) -> tuple[Split, Split]:
    folder = _find_idx_folder(root)
    if folder is None:
        datasets = _import_torchvision(name, "datasets")

        def obtain(staging: str) -> None:
            datasets.FashionMNIST(staging, download=True)

        _fetch(name, root, obtain, f"not found under '{root}'", "the four .gz files of Fashion-MNIST")
        folder = root / "FashionMNIST" / "raw"

    def read(part: str) -> Split:
        images, labels = (folder / file_name for file_name in _IDX_FILES[part])
        return _checked_split(
            read_idx(images, dimensions=3)[:, None],
            read_idx(labels, dimensions=1).to(torch.int64),
            DATASETS[name],
            str(labels),
        )

    return read("train"), read("test")


def _find_idx_folder(root: Path) -> Path | None:
    names = [file_name for part in _IDX_FILES.values() for file_name in part]
    missing = {}
    for folder in (root, root / "FashionMNIST" / "raw", root / "fashion-mnist"):
        missing[folder] = [file_name for file_name in names if not os.path.isfile(folder / file_name)]
        if not missing[folder]:
            return folder
    for folder, absent in missing.items():
        if len(absent) < len(names):
            raise DataError(
                f"--dataset fashionmnist: '{folder}' lacks {', '.join(absent)}; add what is missing, or"
                " remove the other idx .gz files there to have all four downloaded"
            )
    return None


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads a gzipped IDX file of unsigned bytes into a uint8 tensor of that many dimensions.

    Format: http://yann.lecun.com/exdb/mnist (magic number 0x0000 0x08 dimensions, then big-endian sizes).
    Raises DataError when the file cannot be read, has another magic number, or is longer or shorter than its
    header says.
    """
    way_out = "replace it with a fresh copy from the Fashion-MNIST page"
    try:
        with gzip.open(path, "rb") as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_one_line(error)}); {way_out}") from error
    header = struct.Struct(f">i{dimensions}I")
    magic = 0x0800 + dimensions
    if len(content) < header.size or (found := header.unpack_from(content))[0] != magic:
        raise DataError(f"{path}: not an IDX file of {dimensions} dimensions (magic number {magic}); {way_out}")
    shape = found[1:]
    if len(content) != header.size + math.prod(shape):
        raise DataError(
            f"{path}: damaged, {len(content) - header.size} bytes where its header promises"
            f" {'x'.join(map(str, shape))}; {way_out}"
        )
    values = np.frombuffer(content, dtype=np.uint8, offset=header.size).reshape(shape)
    # A copy, because a tensor must not alias the read-only bytes.
    return torch.from_numpy(values.copy())


_READERS: dict[str, Callable[[str, Path], tuple[Split, Split]]] = {
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "fashionmnist": _read_fashion,
    "digits": _read_digits,
}


# Folders of images

_TREES = {
    "imagenet": "train/CLASS/*.JPEG and val/CLASS/*.JPEG",
    "tiny-imagenet": "train/CLASS/*.JPEG and val/CLASS/*.JPEG, or the original train/CLASS/images/*.JPEG and"
    " val/images/*.JPEG with val/val_annotations.txt",
    "folder": "train/CLASS/*.jpg and, if you have them, val/CLASS/*.jpg and test/CLASS/*.jpg",
}
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class _Files:
    """Paths relative to the data folder, bytes [N], and labels int64 [N]."""

    paths: np.ndarray
    labels: Tensor

    def take(self, indices: Tensor) -> "_Files":
        return _Files(self.paths[indices.numpy()], self.labels[indices])


@dataclass(frozen=True, eq=False)
class _Tree:
    """A listed folder of images; `val` is None where it is to be cut from train, `roles` a line for the log
    where the parts of the tree leave it open which is which."""

    classes: int
    train: _Files
    val: _Files | None
    test: _Files
    roles: str


def _tree_if_there(name: str, data_dir: str | Path | None) -> _Tree | None:
    if name not in _TREES:
        return None
    root = None if data_dir is None else Path(data_dir).expanduser()
    if name != "folder" and (root is None or not os.path.isdir(root / "train")):
        return None
    if root is None:
        raise _tree_error(name, "its classes and images are unknown without the data")
    return _read_tree(name, root)


def _found_facts(facts: DatasetFacts, tree: _Tree) -> DatasetFacts:
    return dataclasses.replace(facts, classes=tree.classes, train_images=len(tree.train.labels))


def _tree_error(name: str, problem: str) -> DataError:
    return DataError(f"--dataset {name}: {problem}; --data must name a folder with {_TREES[name]}")


def _read_tree(name: str, root: Path) -> _Tree:
    """Lists the images, opening none, in the order of their sorted classes and file names."""
    parts = ("train", "val", "test") if name == "folder" else ("train", "val")
    try:
        if not os.path.isdir(root):
            raise _tree_error(name, f"there is no folder '{root}'")
        there = [part for part in parts if (root / part).is_dir()]
        for part in ("train",) if name == "folder" else parts:
            if part not in there:
                raise _tree_error(name, f"'{root}' has no folder {part}/")
        classes = {folder: label for label, folder in enumerate(_list_folders(root / "train"))}
        found = {part: _list_part(name, root, part, classes) for part in there}
    except OSError as error:
        raise _tree_error(name, f"'{root}' cannot be read ({_one_line(error)})") from error

    train, val, test = (found.get(part) for part in ("train", "val", "test"))
    if name != "folder":
        return _Tree(len(classes), train, None, val, "")
    if val and test:
        return _Tree(len(classes), train, val, test, "val/ validates and test/ tests")
    if val or test:
        roles = f"{there[1]}/ is the test set, validation is cut from train/"
        return _Tree(len(classes), train, None, val or test, roles)
    images = len(train.labels)
    if images < 3:
        raise _tree_error(name, f"'{root / 'train'}' holds {images} images, too few to cut test and validation from")
    order, fifth = balanced_order(train.labels), max(1, round(images / 5))
    test, rest = (train.take(part.sort().values) for part in (order[:fifth], order[fifth:]))
    roles = f"a fixed, class-balanced fifth of train/ ({fifth} images) is the test set, validation is cut from the rest"
    return _Tree(len(classes), rest, None, test, roles)


def _list_part(name: str, root: Path, part: str, classes: dict[str, int]) -> _Files:
    if name == "tiny-imagenet" and part == "val" and (root / "val" / "images").is_dir():
        pairs = _list_annotated(name, root, classes)
    else:
        pairs = []
        for folder in _list_folders(root / part):
            if folder not in classes:
                raise _tree_error(name, f"class folder '{root / part / folder}' is not among those of train/")
            place = f"{part}/{folder}"
            if name == "tiny-imagenet" and (root / place / "images").is_dir():
                place += "/images"
            images = _list_images(root / place)
            if part == "train" and not images:
                raise _tree_error(name, f"class folder '{root / place}' holds no images ({' '.join(_EXTENSIONS)})")
            pairs += [(f"{place}/{image}", classes[folder]) for image in images]
        if not pairs:
            raise _tree_error(name, f"'{root / part}' holds no class folders with images ({' '.join(_EXTENSIONS)})")
    paths = np.array([os.fsencode(path) for path, _ in pairs])
    return _Files(paths, torch.tensor([label for _, label in pairs], dtype=torch.int64))


def _list_annotated(name: str, root: Path, classes: dict[str, int]) -> list[tuple[str, int]]:
    """Tiny-imagenet's own val/: all images in one folder, with lines of file, class and box, separated by tabs."""
    table = root / "val" / "val_annotations.txt"
    if not table.is_file():
        raise _tree_error(name, f"'{table}' is missing")
    images = _list_images(root / "val" / "images")
    class_of = {}
    for number, line in enumerate(table.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        image, _, rest = line.partition("\t")
        class_of[image] = folder = rest.split("\t")[0].strip()
        if folder not in classes:
            raise _tree_error(name, f"'{table}' line {number}: class '{folder}' is not among those of train/")
    missing = sorted(class_of.keys() - set(images))
    if missing:
        raise _tree_error(name, f"'{table}' names '{missing[0]}', which is not in val/images/")
    if not class_of:
        raise _tree_error(name, f"'{table}' is empty")
    if len(class_of) < len(images):
        logger.warning("%s: %d images of val/images/ are not in it and left out", table, len(images) - len(class_of))
    return [(f"val/images/{image}", classes[class_of[image]]) for image in images if image in class_of]


def _list_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: Path) -> list[str]:
    # A link that leads nowhere is listed, so that it is reported when its image is wanted; what macOS leaves
    # beside images (._name.jpg) is not.
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries if not entry.is_dir())
        return sorted(n for n in names if n.lower().endswith(_EXTENSIONS) and not n.startswith("."))


# Downloading


def _import_torchvision(name: str, part: str):
    # Imported late: digits and plans without data need no torchvision, whose import fails where its version
    # does not belong to torch's (a RuntimeError then).
    try:
        return importlib.import_module(f"torchvision.{part}")
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"--dataset {name}: torchvision cannot be imported ({_one_line(error)}); pip install -r"
            " requirements.txt brings the pair that belongs together"
        ) from error


def _fetch(name: str, root: Path, obtain: Callable[[str], object], found: str, wanted: str) -> None:
    """Runs `obtain(staging folder)` and moves the files that it made to the same places under `root`.

    torchvision writes straight to the final names and overwrites what is there. The staging folder keeps a
    failed or interrupted attempt from touching anything, and goes with it.
    """
    logger.info("--dataset %s: %s, downloading or unpacking it", name, found)
    created: list[Path] = []
    complete = False
    try:
        created = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as staging:
            with _quiet_network(timeout=30.0):
                obtain(staging)
            for path in sorted(path for path in Path(staging).rglob("*") if path.is_file()):
                target = root / path.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        complete = True
    except (
        OSError,
        RuntimeError,
        EOFError,
        zlib.error,
        tarfile.TarError,
        http.client.HTTPException,
    ) as error:
        raise DataError(
            f"--dataset {name}: {found} and the download failed ({_one_line(error)}); put {wanted} into"
            f" '{root}', or start offline with --dataset digits"
        ) from error
    finally:
        if not complete:
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextlib.contextmanager
def _quiet_network(timeout: float) -> Iterator[None]:
    """Gives new sockets a timeout (seconds) and keeps torchvision's progress bars off the terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Batches


def make_batches(
    split: Split | FolderSplit,
    facts: DatasetFacts,
    batch_size: int,
    device: str | torch.device,
    seed: int = 0,
    aug: str = "none",
    workers: int = 0,
) -> "Batches | FolderBatches":
    """`Batches` of a small data set or `FolderBatches` of a folder of images, which is read by `workers`."""
    if isinstance(split, FolderSplit):
        return FolderBatches(split, facts, batch_size, device, seed, aug, workers)
    return Batches(split, facts, batch_size, device, seed, aug)


def _check_batches(aug: str, batch_size: int) -> None:
    if aug not in ("none", "basic", "strong"):
        raise ValueError(f"aug {aug!r}: choose none, basic or strong")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")


def _count_steps(images: int, batch_size: int) -> int:
    """Of a training epoch: the last incomplete batch is dropped unless it is the only one."""
    return max(images // batch_size, min(images, 1))


def _random_seed(seed: int, *key: int) -> int:
    # The key is a spawn key, because words of one entropy list can run into each other; the modulus admits
    # negative seeds.
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0])


def _scale_and_bias(facts: DatasetFacts, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand, float32 [C, 1, 1], that normalise pixels of 0..255."""
    mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (facts.mean, facts.std))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


@dataclass(frozen=True)
class _EpochPlan:
    """Everything random about one epoch, entry i for the i-th image shown; on the training device.

    `origin` is the flat index, in the padded store, of the crop's upper left corner.
    """

    order: Tensor  # int64 [N]
    origin: Tensor | None = None  # [N]
    flip: Tensor | None = None  # bool [N]
    brightness: Tensor | None = None  # float32 [N], a factor
    contrast: Tensor | None = None  # float32 [N], a factor
    erase_top: Tensor | None = None  # int64 [N], the image size where nothing is erased
    erase_left: Tensor | None = None  # int64 [N]


class Batches:
    """Batches of one split, whose pixels live on `device` once, as uint8.

    `aug`: "none"; "basic" is a random crop out of the image with a black border, and a horizontal flip where
    the data set allows it; "strong" adds brightness and contrast jitter (factors 0.6 to 1.4, clamped to the
    pixel range, contrast around the image's own mean) and, for half of the images, one square of a quarter of
    the side set to the mean (random erasing, Zhong et al. 2017, arXiv:1708.04896).
    The border is 4 pixels (He et al. 2016, section 4.2), and an eighth of the side below 24 pixels, where 4
    would move a 16-pixel digit by a quarter of its width and cut strokes off.

    All random numbers come from the CPU generator, seeded by (seed, state, epoch) alone, so the choices are
    the same on every device. Grey images come out as an expanded (stride 0) view of three channels: clone
    before writing into one.
    """

    def __init__(
        self,
        split: Split,
        facts: DatasetFacts,
        batch_size: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        aug: str = "none",
    ) -> None:
        _check_batches(aug, batch_size)
        count, channels, size, _ = split.images.shape
        self.batch_size, self.seed, self.aug = batch_size, seed, aug
        self.steps_per_epoch = _count_steps(count, batch_size)
        self.labels = split.labels.to(device)
        self._device, self._size, self._flip = torch.device(device), size, facts.flip

        self._border = 0 if aug == "none" else 4 if size >= 24 else size // 8
        side = size + 2 * self._border
        if self._border:
            self._store = torch.zeros(count, channels, side, side, dtype=torch.uint8, device=device)
            self._inner(slice(None)).copy_(split.images)
        else:
            self._store = split.images.contiguous().to(device)

        self._scale, self._bias = _scale_and_bias(facts, device)

        # Measured at 32x32x3, batch 128, one thread: 32-bit indices gather 1.4 times as fast as 64-bit ones.
        self._index_type = torch.int32 if self._store.numel() < 2**31 else torch.int64
        span = torch.arange(size, dtype=self._index_type)
        planes = torch.arange(channels, dtype=self._index_type)[:, None] * side**2
        self._rows = (planes + span * side).to(device)  # [C, H]
        self._columns = span.to(device)
        self._mirrored = span.flip(0).to(device)
        self._cached_plan: tuple[tuple[int, int], _EpochPlan] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    unreadable = 0  # `FolderBatches` counts files that are no images

    def batch(self, state: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Training batch: images float32 [B, 3, H, W], labels int64 [B]; a pure function of its arguments and
        the seed. Raises IndexError for a step outside 0..steps_per_epoch-1.

        Only the first call of an epoch draws and copies to the device; the others never wait for it.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step}: an epoch has {self.steps_per_epoch} steps")
        plan = self._plan(state, epoch)
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = plan.order[part]
        if self.aug == "none":
            pixels = self._store.index_select(0, chosen).float()
        else:
            pixels = self._crop(plan.origin[part], plan.flip[part])
        if self.aug == "strong":
            _jitter_(pixels, plan.brightness[part], plan.contrast[part])
        images = self._normalise_(pixels)
        if self.aug == "strong":
            self._erase_(images, plan.erase_top[part], plan.erase_left[part])
        return images.expand(-1, 3, -1, -1), self.labels.index_select(0, chosen)

    def sequential(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in stored order, never augmented, the last batch as long as it is; at most `limit`
        batches. Shapes as in `batch`."""
        starts = range(0, len(self), self.batch_size)
        for start in starts if limit is None else starts[:limit]:
            part = slice(start, start + self.batch_size)
            pixels = self._inner(part).to(torch.float32, memory_format=torch.contiguous_format)
            yield self._normalise_(pixels).expand(-1, 3, -1, -1), self.labels[part]

    def close(self) -> None:
        """Nothing to give back; `FolderBatches` ends its worker processes here."""

    def _inner(self, part: slice) -> Tensor:
        """The images without their border: a view, uint8 [n, C, H, W]."""
        inside = slice(self._border, self._border + self._size)
        return self._store[part, :, inside, inside]

    def _plan(self, state: int, epoch: int) -> _EpochPlan:
        if self._cached_plan is None or self._cached_plan[0] != (state, epoch):
            self._cached_plan = (state, epoch), self._draw(state, epoch)
        return self._cached_plan[1]

    def _draw(self, state: int, epoch: int) -> _EpochPlan:
        generator = torch.Generator().manual_seed(_random_seed(self.seed, state, epoch))
        count, channels, side, _ = self._store.shape

        def integers(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        def factors() -> Tensor:
            return 0.6 + 0.8 * torch.rand(count, generator=generator)

        order = torch.randperm(count, generator=generator)
        drawn = {"order": order}
        if self.aug != "none":
            top, left = integers(2 * self._border + 1), integers(2 * self._border + 1)
            drawn["origin"] = (order * (channels * side**2) + top * side + left).to(self._index_type)
            drawn["flip"] = integers(2).bool() if self._flip else torch.zeros(count, dtype=torch.bool)
        if self.aug == "strong":
            drawn["brightness"], drawn["contrast"] = factors(), factors()
            corners = self._size - self._size // 4 + 1
            top, left = integers(corners), integers(corners)
            drawn["erase_top"] = torch.where(integers(2).bool(), top, self._size)
            drawn["erase_left"] = left
        return _EpochPlan(**{name: value.to(self._device) for name, value in drawn.items()})

    def _crop(self, origin: Tensor, flip: Tensor) -> Tensor:
        """One flat gather: crop offset and flip are only an arithmetic of indices. float32 [B, C, H, W]."""
        columns = torch.where(flip[:, None], self._mirrored, self._columns)  # [B, W]
        rows = origin[:, None, None] + self._rows  # [B, C, H]
        index = rows[..., None] + columns[:, None, None, :]
        return self._store.view(-1).index_select(0, index.view(-1)).view(index.shape).float()

    def _normalise_(self, pixels: Tensor) -> Tensor:
        # Two roundings rather than addcmul: a device that fuses them would give other bits, and on the CPU
        # this is the faster way (measured).
        return pixels.mul_(self._scale).add_(self._bias)

    def _erase_(self, images: Tensor, top: Tensor, left: Tensor) -> None:
        side = self._size // 4
        span = self._columns
        rows = (span >= top[:, None]) & (span < top[:, None] + side)
        columns = (span >= left[:, None]) & (span < left[:, None] + side)
        images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


def _jitter_(pixels: Tensor, brightness: Tensor, contrast: Tensor) -> None:
    """Brightness p -> b p, then contrast p -> m + c (p - m) around the image's mean m, each clamped to 0..255
    as it would be to 0..1. In place; pixels float32 [B, C, H, W], factors [B]."""
    pixels.mul_(brightness[:, None, None, None]).clamp_(max=255)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels.sub_(mean).mul_(contrast[:, None, None, None]).add_(mean).clamp_(0, 255)


# Batches of image files

# A worker that died is noticed after the first time (seconds), one that hangs given up after the second.
_WORKER_CHECK = 5
_WORKER_PATIENCE = 600


class FolderBatches:
    """Batches of image files, decoded and augmented by `workers` processes that work ahead (0: in this process).

    `aug`: "none" shows images as evaluation does: shorter side resized to size / 0.875 (to the size itself
    below 128 pixels), centre cropped; "basic" is a random resized crop of 8% to 100% of the area and a
    horizontal flip; "strong" adds RandAugment (Cubuk et al. 2020, arXiv:1909.13719). Transforms are
    torchvision's, on Pillow images; bytes travel to `device`, which normalises.

    What is random about the image at a position of an epoch comes from a generator of its own, seeded by
    (seed, state, epoch, position), so batches do not depend on the number of workers, and reading can start
    at any step. Steps asked for in order come from a running stream that goes on into the next epoch; any
    other step starts a new one.

    A file that cannot be read as an image is logged once. In training the next readable image of the epoch's
    order stands in for it, in evaluation it is left out. Raises DataError, from `batch` and `sequential`, when
    more than 1% of the images (at least one, never all) are unreadable and when a worker dies or hangs.
    """

    def __init__(
        self,
        split: FolderSplit,
        facts: DatasetFacts,
        batch_size: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        aug: str = "none",
        workers: int = 0,
    ) -> None:
        _check_batches(aug, batch_size)
        if workers < 0:
            raise ValueError(f"workers {workers}: must be 0 or more")
        count = len(split.labels)
        self.batch_size, self.seed, self.aug, self.workers = batch_size, seed, aug, workers
        self.steps_per_epoch = _count_steps(count, batch_size)
        self.labels = split.labels.to(device)
        self._split, self._device = split, torch.device(device)
        self._scale, self._bias = _scale_and_bias(facts, device)
        self._allowed = min(max(1, count // 100), count - 1)
        self._reader = _FolderReader(split, batch_size, seed, aug, facts.flip, self._allowed)
        self._broken: dict[int, str] = {}
        self._stream: Iterator | None = None
        self._upcoming = (0, 0, 0)
        _quiet_pillow()

    def __len__(self) -> int:
        """Images that `sequential` yields: those found unreadable so far are not counted."""
        return len(self.labels) - self.unreadable

    @property
    def unreadable(self) -> int:
        """Files found so far that are no images."""
        return len(self._broken)

    def batch(self, state: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Training batch: images float32 [B, 3, H, W], labels int64 [B]; a pure function of its arguments, the
        seed and the files. Raises IndexError for a step outside 0..steps_per_epoch-1."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step}: an epoch has {self.steps_per_epoch} steps")
        if self._stream is None or self._upcoming != (state, epoch, step):
            self.close()
            self._stream = self._start(self._steps_from(state, epoch, step), self.workers)
        self._upcoming = (state, epoch, step + 1) if step + 1 < self.steps_per_epoch else (state, epoch + 1, 0)
        try:
            return self._receive(self._stream)
        except BaseException:
            self.close()
            raise

    def sequential(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All readable images in stored order, never augmented, the last batch as long as it is; at most
        `limit` batches. Shapes as in `batch`."""
        parts = range(0, len(self.labels), self.batch_size)
        parts = parts if limit is None else parts[:limit]
        stream = self._start(iter(parts), min(self.workers, len(parts)))
        try:
            for _ in parts:
                images, labels = self._receive(stream)
                if len(labels):
                    yield images, labels
        finally:
            _stop(stream)

    def close(self) -> None:
        """Ends the worker processes of `batch`, which starts new ones when it is called again."""
        stream, self._stream = self._stream, None
        _stop(stream)

    def _steps_from(self, state: int, epoch: int, step: int) -> Iterator[tuple[int, int, int]]:
        for later in itertools.count(epoch):
            for position in range(step if later == epoch else 0, self.steps_per_epoch):
                yield state, later, position

    def _start(self, keys: Iterator, workers: int) -> Iterator:
        # The loader draws a seed for its workers, which must not come from the run's generator; nobody uses it.
        options = {"batch_size": None, "sampler": keys, "generator": torch.Generator()}
        if workers:
            options |= {"num_workers": workers, "timeout": _WORKER_CHECK, "worker_init_fn": _set_up_worker}
        on_cuda = self._device.type == "cuda"
        # torch raises from its handler of SIGCHLD, in the middle of whatever the main process is doing, when a
        # worker dies. Without the handler the loader notices where it waits for a batch.
        handles = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if handles else None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create")  # how many is the user's choice
                return iter(DataLoader(self._reader, pin_memory=on_cuda, **options))
        except (OSError, RuntimeError) as error:
            raise self._worker_error(_one_line(error)) from error
        finally:
            if handles:
                signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def _receive(self, stream: Iterator) -> tuple[Tensor, Tensor]:
        """The next batch of the stream on the device, after a look at what could not be read for it."""
        started = time.monotonic()
        while True:
            try:
                images, chosen, broken = next(stream)
                break
            except (OSError, RuntimeError, MemoryError, EOFError) as error:
                if not self.workers:
                    raise
                if not str(error).startswith("DataLoader timed out"):
                    # What a worker raised arrives with its traceback, the error itself last.
                    raise self._worker_error(str(error).strip().splitlines()[-1]) from error
                if time.monotonic() - started > _WORKER_PATIENCE:
                    raise self._worker_error(f"no batch in {_WORKER_PATIENCE} seconds") from error
        self._note(broken)
        images, chosen = (tensor.to(self._device, non_blocking=True) for tensor in (images, chosen))
        return images.float().mul_(self._scale).add_(self._bias), self.labels.index_select(0, chosen)

    def _worker_error(self, reason: str) -> DataError:
        return DataError(
            f"--workers {self.workers}: reading --dataset {self._split.dataset} failed ({reason}); lower --workers"
            " when memory or shared memory (/dev/shm) runs out, 0 reads in the main process"
        )

    def _note(self, broken: list[tuple[int, str]]) -> None:
        for index, reason in broken:
            if index not in self._broken:
                self._broken[index] = reason
                logger.warning("%s: cannot be read as an image (%s), skipped", self._split.path(index), reason)
        if len(self._broken) > self._allowed:
            first = ", ".join(f"{self._split.path(i)}: {self._broken[i]}" for i in list(self._broken)[:3])
            raise DataError(
                f"--dataset {self._split.dataset}: {len(self._broken):,} of {len(self.labels):,} images cannot be"
                f" read (first: {first}); replace or remove them"
            )


_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class _FolderReader:
    """Reads the batch of a key, wherever the loader asks for it: (state, epoch, step) for training, the first
    index for evaluation. Returns pixels uint8 [B, 3, H, W], indices int64 [B] of the images shown, and the
    (index, reason) of those that were wanted and cannot be read."""

    def __init__(self, split: FolderSplit, batch_size: int, seed: int, aug: str, flip: bool, allowed: int) -> None:
        v2 = _import_torchvision(split.dataset, "transforms.v2")
        size = split.image_size
        self._split, self._batch_size, self._seed, self._allowed = split, batch_size, seed, allowed
        shorter = round(size / 0.875) if size >= 128 else size
        self._plain = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
        self._random = None
        if aug != "none":
            steps = [v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True)]
            steps += [v2.RandomHorizontalFlip()] * flip + [v2.RandAugment()] * (aug == "strong")
            self._random = v2.Compose([*steps, v2.PILToTensor()])
        self._cached_order: tuple[tuple[int, int], np.ndarray] | None = None

    def __getitem__(self, key: tuple[int, int, int] | int) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        wanted = self._evaluation(key) if isinstance(key, int) else self._training(*key)
        size = self._split.image_size
        pixels = torch.empty(len(wanted), 3, size, size, dtype=torch.uint8)
        if get_worker_info() is not None:
            # Here, where an error reaches the main process; the loader would share it in a thread that
            # swallows errors.
            pixels.share_memory_()
        shown, broken = [], {}
        for candidates, transform in wanted:
            for index in candidates:
                path = self._split.path(index)
                try:
                    image = _read_rgb(path)
                except Exception as error:  # decoders of broken files raise whatever they like
                    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NOT_THE_FILE:
                        raise
                    broken[index] = getattr(error, "strerror", None) or _one_line(error).replace(f" {path!r}", "")
                    continue
                pixels[len(shown)] = transform(image)
                shown.append(index)
                break
        return pixels[: len(shown)], torch.tensor(shown, dtype=torch.int64), list(broken.items())

    def _evaluation(self, start: int) -> list[tuple[Iterator[int], Callable]]:
        stop = min(start + self._batch_size, len(self._split.labels))
        return [(iter([index]), self._plain) for index in range(start, stop)]

    def _training(self, state: int, epoch: int, step: int) -> list[tuple[Iterator[int], Callable]]:
        order = self._order(state, epoch)
        positions = range(step * self._batch_size, min((step + 1) * self._batch_size, len(order)))

        def candidates(position: int) -> Iterator[int]:
            # One more than may be broken: when none of them can be read, the run ends.
            return (int(order[(position + k) % len(order)]) for k in range(self._allowed + 1))

        def transform(image, position: int) -> Tensor:
            if self._random is None:
                return self._plain(image)
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed, which seeds the accelerator too.
                torch.default_generator.manual_seed(_random_seed(self._seed, state, epoch, position))
                return self._random(image)

        return [(candidates(p), functools.partial(transform, position=p)) for p in positions]

    def _order(self, state: int, epoch: int) -> np.ndarray:
        if self._cached_order is None or self._cached_order[0] != (state, epoch):
            generator = torch.Generator().manual_seed(_random_seed(self._seed, state, epoch))
            order = torch.randperm(len(self._split.labels), generator=generator).numpy()
            self._cached_order = (state, epoch), order
        return self._cached_order[1]


def _read_rgb(path: str):
    """The file as a Pillow image of three 8-bit channels."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")


def _quiet_pillow() -> None:
    """Pillow warns of large images, odd palettes and metadata; what matters is whether an image can be read."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _stop(stream: Iterator | None) -> None:
    # Workers end with the loader's iterator, which the traceback of an error may keep alive.
    if hasattr(stream, "_shutdown_workers"):
        stream._shutdown_workers()


def _set_up_worker(_: int) -> None:
    _quiet_pillow()
    # Ctrl-C reaches every process of the terminal; what it means is for the main process to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
