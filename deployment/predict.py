"""Classifies image files by an exported model.

    rows = predict(Path("results/NAME/model"), image_files([Path("photo.jpg"), Path("more")]))

Images are shown to the model as its config.json says that test images were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataset import Preprocessing
from deployment.exported import load, read_config
from images.files import EXTENSIONS, list_images, read_rgb
from images.trees import some
from utils import RunError

log = logging.getLogger("export")
BATCH = 32
SHOWN = 3  # classes of each image in the log


def image_files(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` in their order, and of the folders among them all images in them, sorted by name.

    Raises:
        RunError: a path is not there, or there is no image in a folder.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            images, left_out = list_images(path)
            for reason, names in left_out.items():
                log.warning("%s: left out: %s (%s)", path, some(names), reason)
            if not images:
                raise RunError(f"--predict {path}: no images in this folder ({' '.join(EXTENSIONS)})")
            found += [path / name for name in images]
        elif path.is_file():
            found.append(path)
        else:
            raise RunError(f"--predict {path}: no such file or folder")
    return found


@torch.no_grad()
def predict(
    folder: Path, files: Sequence[Path], device: str | torch.device = "cpu"
) -> tuple[list[str], list[tuple[Path, Tensor]]]:
    """The names of the classes, and (file, probabilities [classes]) of each image that can be read, in order.

    An image that cannot be read is left out, and a line of the log names it.

    Args:
        folder: an exported `model/`.
        files: see `image_files`.

    Raises:
        RunError: the folder is damaged, or does not say how its images are to be shown.
    """
    config, model = read_config(folder), load(folder).to(device)
    shown = Preprocessing.from_config(config)
    if shown is None:
        raise RunError(f"--predict: {folder / 'config.json'} does not say how images are shown; export the run again")
    names = config.get("class_names") or [str(number) for number in range(model.num_classes)]
    answers: list[tuple[Path, Tensor]] = []
    for start in range(0, len(files), BATCH):
        readable, images = [], []
        for file in files[start : start + BATCH]:
            try:
                images.append(shown.pixels(read_rgb(str(file))))
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())
                log.warning(f"{file}: cannot be read as an image ({reason}), left out")
                continue
            readable.append(file)
        if readable:
            inputs = shown.normalised(torch.stack(images).to(device))
            answers += zip(readable, model(inputs).softmax(1).cpu(), strict=True)
    return names, answers


def answer_line(file: Path, names: Sequence[str], probabilities: Tensor) -> str:
    """The most probable classes of an image, for the log."""
    values, places = probabilities.topk(min(SHOWN, len(names)))
    said = ", ".join(f"{names[place]} {100 * value:.1f}%" for value, place in zip(values, places.tolist(), strict=True))
    return f"{file}: {said}"


def answer_rows(names: Sequence[str], answers: Iterable[tuple[Path, Tensor]]) -> list[dict]:
    """A row an image for a CSV file: "file", "class", "probability", and the probability of each class by its name."""
    return [
        {
            "file": str(file),
            "class": names[int(shares.argmax())],
            "probability": round(float(shares.max()), 6),
            **{f"p_{name}": round(float(share), 6) for name, share in zip(names, shares, strict=True)},
        }
        for file, shares in answers
    ]
