"""Lists folders of images (imagenet, tiny-imagenet, the user's own) without opening any of them."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from images.facts import DataError, DatasetFacts, one_line
from images.files import EXTENSIONS, list_images
from images.orders import balanced_order

TREES = {
    "imagenet": "train/CLASS/*.JPEG and val/CLASS/*.JPEG",
    "tiny-imagenet": "train/CLASS/*.JPEG and val/CLASS/*.JPEG, or the original train/CLASS/images/*.JPEG and"
    " val/images/*.JPEG with val/val_annotations.txt",
    "folder": "train/CLASS/*.jpg and, if you have them, val/CLASS/*.jpg and test/CLASS/*.jpg",
}
# What else val/ may be called in a folder of one's own.
VALIDATION = ("val", "valid", "validation")
SHOWN = 3  # names of a kind in a line of the log


@dataclass(frozen=True, eq=False)
class Files:
    """Paths relative to the data folder, bytes [N], and labels int64 [N]."""

    paths: np.ndarray
    labels: Tensor

    def take(self, indices: Tensor) -> "Files":
        return Files(self.paths[indices.numpy()], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Tree:
    """A listed folder of images; `val` is None where it is to be cut from train.

    `roles` says for the log which part is which, `notes` what lies there and is not used, a line each.
    """

    classes: tuple[str, ...]
    train: Files
    val: Files | None
    test: Files
    roles: str
    notes: tuple[str, ...]


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
    return dataclasses.replace(facts, classes=len(tree.classes), train_images=len(tree.train.labels))


def _tree_error(name: str, problem: str) -> DataError:
    return DataError(f"--dataset {name}: {problem}; --data must name a folder with {TREES[name]}")


def some(names: list[str]) -> str:
    """The first few names, for a line."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def read_tree(name: str, root: Path) -> Tree:
    """Lists the images, opening none, in the order of their sorted classes and file names."""
    try:
        if not os.path.isdir(root):
            raise _tree_error(name, f"there is no folder '{root}'")
        folders, _ = _entries(root)
        parts = _parts(name, root, folders)
        classes = {folder: label for label, folder in enumerate(_entries(root / "train")[0])}
        left_out: dict[str, list[str]] = {}
        notes: list[str] = []
        found = {part: _list_part(name, root, folder, classes, left_out, notes) for part, folder in parts.items()}
    except OSError as error:
        raise _tree_error(name, f"'{root}' cannot be read ({one_line(error)})") from error
    if len(classes) == 1:
        only = next(iter(classes))
        raise _tree_error(name, f"'{root / 'train'}' holds one class only ({only}), a classifier needs two")
    others = [f"{folder}/" for folder in folders if folder not in parts.values()]
    notes = _left_out(left_out) + ([f"not read beside train/: {some(others)}"] if others else []) + notes

    train, val, test = (found.get(part) for part in ("train", "val", "test"))
    if name == "folder" and not (val or test):
        train, test = _cut_test(name, root, train)
        roles = f"a fixed fifth of train/, stratified by class, is the test set ({len(test.labels):,} images)"
    elif name == "folder" and val and test:
        roles = f"{parts['val']}/ validates ({len(val.labels):,} images), test/ tests ({len(test.labels):,} images)"
    else:
        part, other = ("val", "test") if val else ("test", "val")
        missing = f", as there is no {other}/" if name == "folder" else ""
        val, test = None, val or test
        roles = f"{parts[part]}/ is the test set ({len(test.labels):,} images){missing}"
    return Tree(tuple(classes), train, val, test, roles, tuple(notes))


def _parts(name: str, root: Path, folders: list[str]) -> dict[str, str]:
    """Which folder is train, which val and which test, as far as they are there."""
    spelt = {"train": ("train",), "val": VALIDATION if name == "folder" else ("val",)}
    spelt |= {"test": ("test",)} if name == "folder" else {}
    parts = {}
    for part, spellings in spelt.items():
        there = [folder for folder in spellings if folder in folders]
        if len(there) > 1:
            raise _tree_error(name, f"'{root}' holds {' and '.join(f'{folder}/' for folder in there)}; keep one")
        if there:
            parts[part] = there[0]
        elif part == "train" or name != "folder":
            raise _tree_error(name, f"'{root}' has no folder {part}/")
    return parts


def _cut_test(name: str, root: Path, train: Files) -> tuple[Files, Files]:
    """A fixed, stratified fifth is the test set."""
    images = len(train.labels)
    if images < 3:
        raise _tree_error(name, f"'{root / 'train'}' holds {images} images, too few to cut test and validation from")
    order, fifth = balanced_order(train.labels), max(1, round(images / 5))
    test, rest = (train.take(part.sort().values) for part in (order[:fifth], order[fifth:]))
    return rest, test


def _list_part(
    name: str, root: Path, part: str, classes: dict[str, int], left_out: dict[str, list[str]], notes: list[str]
) -> Files:
    """The images of a folder such as val/; adds to `left_out`, by reason, and to the `notes`."""
    if name == "tiny-imagenet" and part == "val" and (root / "val" / "images").is_dir():
        pairs = _list_annotated(name, root, classes, notes)
    else:
        pairs = []
        folders, files = _entries(root / part)
        outside = [f"{part}/{file}" for file in files if file.lower().endswith(EXTENSIONS)]
        _add(left_out, "outside the class folders", outside)
        for folder in folders:
            if folder not in classes:
                raise _tree_error(name, f"class folder '{root / part / folder}' is not among those of train/")
            place = f"{part}/{folder}"
            if name == "tiny-imagenet" and (root / place / "images").is_dir():
                place += "/images"
            images, others = list_images(root / place)
            for reason, paths in others.items():
                _add(left_out, reason, [f"{place}/{path}" for path in paths])
            if part == "train" and not images:
                raise _tree_error(name, f"class folder '{root / place}' holds no images ({' '.join(EXTENSIONS)})")
            pairs += [(f"{place}/{image}", classes[folder]) for image in images]
        if not pairs:
            raise _tree_error(name, f"'{root / part}' holds no class folders with images ({' '.join(EXTENSIONS)})")
    paths = np.array([os.fsencode(path) for path, _ in pairs])
    labels = [label for _, label in pairs]
    present = {*labels}
    without = [folder for folder, label in classes.items() if label not in present]
    if without:
        notes.append(f"{part}/ has no images of {len(without):,} of {len(classes):,} classes: {some(without)}")
    # on the CPU wherever a model that needs the number of classes is being built
    return Files(paths, torch.tensor(labels, dtype=torch.int64, device="cpu"))


def _add(left_out: dict[str, list[str]], reason: str, paths: list[str]) -> None:
    if paths:
        left_out.setdefault(reason, []).extend(paths)


def _left_out(by_reason: dict[str, list[str]]) -> list[str]:
    """One line about all files that are not images."""
    if not by_reason:
        return []
    kinds = "; ".join(f"{len(paths):,} {reason} ({some(paths)})" for reason, paths in by_reason.items())
    return [f"{sum(map(len, by_reason.values())):,} files are left out: {kinds}; read are {' '.join(EXTENSIONS)}"]


def _list_annotated(name: str, root: Path, classes: dict[str, int], notes: list[str]) -> list[tuple[str, int]]:
    """Tiny-imagenet's own val/: all images in one folder, with lines of file, class and box, separated by tabs."""
    table = root / "val" / "val_annotations.txt"
    if not table.is_file():
        raise _tree_error(name, f"'{table}' is missing")
    images, _ = list_images(root / "val" / "images")
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
        notes.append(f"{len(images) - len(class_of)} images of val/images/ are left out: '{table}' does not name them")
    return [(f"val/images/{image}", classes[class_of[image]]) for image in images if image in class_of]


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of all else in it, sorted, without those that begin with a dot."""
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    return [name for name, is_dir in found if is_dir], [name for name, is_dir in found if not is_dir]
