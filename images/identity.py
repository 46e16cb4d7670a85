"""The identity of the data that a run was trained on, for its checkpoint, and how two of them differ.

An identity is plain values: the number of images of each part, the names of the classes, and a hash of the rest. It
does not depend on where the data are, nor on flags.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from images.facts import Split
from images.trees import Tree, some

STATED, OPENED, HEAD = 10_000, 64, 2**16  # files whose size, and whose first bytes, count; and how many bytes
SAMPLED = 1_000  # images whose pixels count


def identity_of_tree(tree: Tree, root: Path) -> dict:
    """Of a folder of images: all relative paths and labels, the sizes of 10,000 files and the first 64 KiB of 64,
    which lie evenly among them."""
    parts = {part: getattr(tree, part) for part in ("train", "val", "test") if getattr(tree, part)}
    digest = hashlib.sha256()
    for part, files in parts.items():
        paths = files.paths.tolist()
        digest.update(b"\0".join([part.encode(), *paths]) + files.labels.numpy().tobytes())
        for path in paths[:: -(-len(paths) // STATED)]:
            digest.update(str(_size(root, path)).encode() + b" ")
        for path in paths[:: -(-len(paths) // OPENED)]:
            digest.update(_head(root, path))
    counts = {part: len(files.labels) for part, files in parts.items()}
    return {"counts": counts, "classes": list(tree.classes), "hash": digest.hexdigest()}


def identity_of_splits(train: Split, test: Split) -> dict:
    """Of a small data set as it was read: all labels, and the pixels of 1,000 images of each part."""
    digest = hashlib.sha256()
    for split in (train, test):
        step = -(-len(split.labels) // SAMPLED)
        for values in (split.labels, split.images[::step].contiguous()):
            digest.update(str(tuple(values.shape)).encode() + values.numpy().tobytes())
    counts = {"train": len(train.labels), "test": len(test.labels)}
    return {"counts": counts, "classes": [], "hash": digest.hexdigest()}


def difference(before: Mapping, now: Mapping) -> str:
    """What differs, in words; "" where nothing does.

    Raises AttributeError, KeyError or TypeError where `before` is no identity.
    """
    if before["classes"] != now["classes"]:
        gone, new = (
            [name for name in one["classes"] if name not in {*other["classes"]}]
            for one, other in ((before, now), (now, before))
        )
        words = [f"{what} {some(names)}" for what, names in (("without", gone), ("with", new)) if names]
        return f"classes were {len(before['classes']):,} and are {len(now['classes']):,}, {' and '.join(words)}"
    counts = [
        f"{before['counts'].get(part, 0):,} images in {part} and now {now['counts'].get(part, 0):,}"
        for part in ("train", "val", "test")
        if before["counts"].get(part, 0) != now["counts"].get(part, 0)
    ]
    if counts:
        return f"there were {', '.join(counts)}"
    if before["hash"] != now["hash"]:
        return "there are as many images as before, but names, labels, sizes or contents differ"
    return ""


def _size(root: Path, path: bytes) -> int:
    try:
        return os.stat(os.path.join(os.fsencode(root), path)).st_size
    except OSError:  # a link that leads nowhere, or a file that may not be looked at
        return -1


def _head(root: Path, path: bytes) -> bytes:
    try:
        with open(os.path.join(os.fsencode(root), path), "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""
