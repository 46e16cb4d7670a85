"""Train, validation and test of a data set, cut the same way whatever the seed of the run.

In come a name, the data folder, the validation fraction and a limit; out go `Splits`, or without reading any image
their sizes and facts.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from images.facts import DataError, DatasetFacts, FolderSplit, Split, Splits, known_facts
from images.identity import identity_of_splits, identity_of_tree
from images.orders import balanced_order
from images.preprocessing import resized
from images.reading import READERS
from images.trees import TREES, Files, Tree, found_facts, read_tree, tree_if_there

logger = logging.getLogger(__name__)

SMALL = 1_000  # images; an accuracy of so many has a standard error of up to 1.6 points


def load_dataset(
    name: str,
    data_dir: str | Path,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    train_limit: int | None = None,
    shown: Mapping | None = None,
) -> Splits:
    """Reads a data set, downloading it into `data_dir` when it is missing, and splits it.

    Validation is the prefix of `balanced_order` of the official training set; the rest is train, in its own
    balanced order, of which `train_limit` keeps the first. `image_size` (pixels) other than the native one
    resizes with antialiasing, once. No argument depends on the seed of a run. `shown`: see
    `DatasetFacts.shown_by`.

    Folders of images (imagenet, tiny-imagenet, folder) are never downloaded, and only listed here: their
    splits are `FolderSplit`s. In `folder`, where only one of val/ (or valid/, validation/) and test/ is there, it is
    the test set; where neither is, a fixed, stratified fifth of train/ is, before validation is cut.

    Raises DataError, in one line, for a bad argument and for data that is missing (with no network), damaged
    or labelled outside the classes. A failed download leaves `data_dir` as it was.
    """
    facts, root = known_facts(name).shown_by(shown), Path(data_dir).expanduser()
    if image_size is not None and image_size < 1:
        raise DataError(f"--img_size {image_size}: must be at least 1 pixel")
    _check_arguments(val_fraction, train_limit)
    if name in TREES:
        return _load_folders(name, facts, root, image_size or facts.image_size, val_fraction, train_limit)

    _count_split(facts.train_images, val_fraction, train_limit)
    official_train, test = READERS[name](name, root)
    train_order, val_order = _cut(official_train.labels, val_fraction, train_limit)

    def finish(split: Split) -> Split:
        return Split(resized(split.images, image_size or facts.image_size, facts.interpolation), split.labels)

    train, val = (Split(official_train.images[o], official_train.labels[o]) for o in (train_order, val_order))
    return Splits(finish(train), finish(val), finish(test), facts, identity_of_splits(official_train, test))


def split_sizes(
    name: str, val_fraction: float = 0.1, train_limit: int | None = None, data_dir: str | Path | None = None
) -> tuple[int, int]:
    """Images in train and val as `load_dataset` would return them, without any data; a folder of images that
    is there is listed and counted.

    Raises DataError for an unknown name, a fraction outside (0, 1), a limit below 1, and for `folder` where
    there is none.
    """
    facts, tree = known_facts(name), tree_if_there(name, data_dir)
    if tree and tree.val:
        return _count_split(len(tree.train.labels), val_fraction, train_limit, cut_val=False)[0], len(tree.val.labels)
    return _count_split(len(tree.train.labels) if tree else facts.train_images, val_fraction, train_limit)


def folder_identity(name: str, data_dir: str | Path | None = None) -> dict | None:
    """Which images a folder holds, as `load_dataset` would say it; None for other data sets, and without the data."""
    tree = tree_if_there(name, data_dir)
    return identity_of_tree(tree, Path(data_dir).expanduser()) if tree else None


def dataset_facts(name: str, data_dir: str | Path | None = None, shown: Mapping | None = None) -> DatasetFacts:
    """What `DATASETS` says; for a folder of images that is there, with its own numbers of classes and images.

    Raises DataError for an unknown name, a tree that cannot be used, and for `folder` where there is none.
    """
    facts, tree = known_facts(name).shown_by(shown), tree_if_there(name, data_dir)
    return found_facts(facts, tree) if tree else facts


def joined(first: Split | FolderSplit, second: Split | FolderSplit) -> Split | FolderSplit:
    """The images of both, of one data set, those of `second` behind those of `first`."""
    labels = torch.cat([first.labels, second.labels])
    if isinstance(first, FolderSplit):
        return dataclasses.replace(first, paths=np.concatenate([first.paths, second.paths]), labels=labels)
    return Split(torch.cat([first.images, second.images]), labels)


def first_images(split: Split | FolderSplit, count: int) -> Split | FolderSplit:
    """The first images of a split, whose order holds the classes in their proportions; all where it has fewer."""
    if isinstance(split, FolderSplit):
        return dataclasses.replace(split, paths=split.paths[:count], labels=split.labels[:count])
    return Split(split.images[:count], split.labels[:count])


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


def _load_folders(
    name: str, known: DatasetFacts, root: Path, image_size: int, val_fraction: float, train_limit: int | None
) -> Splits:
    tree = read_tree(name, root)
    facts = found_facts(known, tree)
    train_order, val_order = _cut(tree.train.labels, val_fraction, train_limit, cut_val=tree.val is None)
    found, full = facts.classes, known.classes
    lines = [f"{found:,} classes found, the full set has {full:,}"] if full not in (0, found) else []
    lines = [f"--dataset {name}: {line}" for line in (*lines, _roles(tree, len(val_order)), *tree.notes)]
    for number, line in enumerate(lines):
        logger.log(logging.WARNING if number >= len(lines) - len(tree.notes) else logging.INFO, line)

    def finish(files: Files) -> FolderSplit:
        return FolderSplit(files.paths, files.labels, root, image_size, name)

    train, val = tree.train.take(train_order), tree.val or tree.train.take(val_order)
    identity = identity_of_tree(tree, root)
    return Splits(finish(train), finish(val), finish(tree.test), facts, identity, tuple(lines))


def _roles(tree: Tree, cut: int) -> str:
    """Which images validate and test; `cut` of those of train/ validate. Small sets measure coarsely, which is said."""
    validates = f"; {cut:,} images cut from train/ validate" if tree.val is None else ""
    sizes = [cut if tree.val is None else len(tree.val.labels), len(tree.test.labels)]
    errors = [f"{50 / size**0.5:.1f} points on {size:,} images" for size in sizes if size < SMALL]
    coarse = f"; the standard error of an accuracy is up to {', '.join(dict.fromkeys(errors))}" if errors else ""
    return f"{tree.roles}{validates}{coarse}"
