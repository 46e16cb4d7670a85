"""Folders of images (imagenet, tiny-imagenet, one's own) as they lie on the disk, listed without opening any.

In come a name and the data folder; out goes a `Tree`: the paths and labels of its parts, and which part is which.
"""

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from images.facts import DataError, DatasetFacts, one_line
from images.orders import balanced_order

logger = logging.getLogger(__name__)

TREES = {
    "imagenet": "train/CLASS/*.JPEG and val/CLASS/*.JPEG",
    "tiny-imagenet": "train/CLASS/*.JPEG and val/CLASS/*.JPEG, or the original train/CLASS/images/*.JPEG and"
    " val/images/*.JPEG with val/val_annotations.txt",
    "folder": "train/CLASS/*.jpg and, if you have them, val/CLASS/*.jpg and test/CLASS/*.jpg",
}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Files:
    """Paths relative to the data folder, bytes [N], and labels int64 [N]."""

    paths: np.ndarray
    labels: Tensor

    def take(self, indices: Tensor) -> "Files":
        return Files(self.paths[indices.numpy()], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Tree:
    """A listed folder of images; `val` is None where it is to be cut from train, `roles` a line for the log
    where the parts of the tree leave it open which is which."""

    classes: int
    train: Files
    val: Files | None
    test: Files
    roles: str


def tree_if_there(name: str, data_dir: str | Path | None) -> Tree | None:
    if name not in TREES:
        return None
    root = None if data_dir is None else Path(data_dir).expanduser()
    if name != "folder" and (root is None or not os.path.isdir(root / "train")):
        return None
    if root is None:
        raise _tree_error(name, "its classes and images are unknown without the data")
    return read_tree(name, root)


def found_facts(facts: DatasetFacts, tree: Tree) -> DatasetFacts:
    return dataclasses.replace(facts, classes=tree.classes, train_images=len(tree.train.labels))


def _tree_error(name: str, problem: str) -> DataError:
    return DataError(f"--dataset {name}: {problem}; --data must name a folder with {TREES[name]}")


def read_tree(name: str, root: Path) -> Tree:
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
        raise _tree_error(name, f"'{root}' cannot be read ({one_line(error)})") from error

    train, val, test = (found.get(part) for part in ("train", "val", "test"))
    if name != "folder":
        return Tree(len(classes), train, None, val, "")
    if val and test:
        return Tree(len(classes), train, val, test, "val/ validates and test/ tests")
    if val or test:
        roles = f"{there[1]}/ is the test set, validation is cut from train/"
        return Tree(len(classes), train, None, val or test, roles)
    images = len(train.labels)
    if images < 3:
        raise _tree_error(name, f"'{root / 'train'}' holds {images} images, too few to cut test and validation from")
    order, fifth = balanced_order(train.labels), max(1, round(images / 5))
    test, rest = (train.take(part.sort().values) for part in (order[:fifth], order[fifth:]))
    roles = f"a fixed, class-balanced fifth of train/ ({fifth} images) is the test set, validation is cut from the rest"
    return Tree(len(classes), rest, None, test, roles)


def _list_part(name: str, root: Path, part: str, classes: dict[str, int]) -> Files:
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
                raise _tree_error(name, f"class folder '{root / place}' holds no images ({' '.join(EXTENSIONS)})")
            pairs += [(f"{place}/{image}", classes[folder]) for image in images]
        if not pairs:
            raise _tree_error(name, f"'{root / part}' holds no class folders with images ({' '.join(EXTENSIONS)})")
    paths = np.array([os.fsencode(path) for path, _ in pairs])
    return Files(paths, torch.tensor([label for _, label in pairs], dtype=torch.int64))


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
        return sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith("."))
