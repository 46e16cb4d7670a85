"""Reads the small data sets: scikit-learn's digits, CIFAR and Fashion-MNIST, downloaded when missing.

A reader returns the official training and test sets as `Split`s, checked against the facts. A failed download leaves
the data folder as it was.
"""

import contextlib
import gzip
import http.client
import importlib
import io
import logging
import math
import os
import socket
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from images.facts import DATASETS, DataError, DatasetFacts, Split, one_line
from images.orders import balanced_order

logger = logging.getLogger(__name__)


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
    """scikit-learn's 1,797 embedded digits: a fixed, stratified fifth is the test set."""
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
    datasets = import_torchvision(name, "datasets")
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
        datasets = import_torchvision(name, "datasets")

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
        raise DataError(f"{path}: cannot be read ({one_line(error)}); {way_out}") from error
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


# Downloading


def import_torchvision(name: str, part: str):
    # Imported late: digits and plans without data need no torchvision, whose import fails where its version
    # does not belong to torch's (a RuntimeError then).
    try:
        return importlib.import_module(f"torchvision.{part}")
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"--dataset {name}: torchvision cannot be imported ({one_line(error)}); pip install -r"
            " requirements.txt brings the pair that belongs together"
        ) from error


def _fetch(name: str, root: Path, obtain: Callable[[str], object], found: str, wanted: str) -> None:
    """Runs `obtain(staging folder)` and moves the files that it made to the same places under `root`.

    torchvision writes straight to the final names and overwrites what is there. The staging folder keeps a
    failed or interrupted attempt from touching anything, and is deleted with it.
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
            f"--dataset {name}: {found} and the download failed ({one_line(error)}); put {wanted} into"
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


# Name to reader, (name, data folder) -> official training and test set; the name has its facts in facts.py.
READERS: dict[str, Callable[[str, Path], tuple[Split, Split]]] = {
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "fashionmnist": _read_fashion,
    "digits": _read_digits,
}
