"""Writes a web page, one static folder, that runs the full and the small network side by side in the browser.

    files = runtime_files(None)            ONNX Runtime for browsers, from its npm package or an unpacked copy
    write_demo(Path("demo"), models, ...)  index.html and what it needs; nothing comes from the network when it is open

The page itself is in demo_page/: image.mjs turns any image into what the data set's pipeline makes of its own, app.mjs
runs the networks. Any web server will do, since one thread of WebAssembly needs no special headers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dataset import DatasetFacts, preprocessing_of
from deployment.compaction import macs
from deployment.exported import check_writable, whole_folder
from deployment.onnx_file import OPSET, to_onnx
from pruning.units import count_parameters
from utils import RunError

PAGE = Path(__file__).parent / "demo_page"
PAGE_FILES = ("index.html", "style.css", "app.mjs", "image.mjs")
ORT_WEB = "onnxruntime-web@1.30.0"
ORT_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # of its dist/
NPM_SECONDS = 300
_WAY_OUT = "or unpack the package elsewhere (npm pack onnxruntime-web) and give its folder by --ort_web DIR"

_FASHION = ("T-shirt", "Trousers", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSES = {"digits": tuple("0123456789"), "fashionmnist": _FASHION, "cifar10": _CIFAR10}
# how an image of another size becomes one of the data set's: see `seen` in demo_page/image.mjs
FITS = {"digits": "ink", "fashionmnist": "trim", "cifar10": "square", "cifar100": "square"}


TITLES = {"dense": "Dense", "masked": "Full size"}  # of the network beside the pruned one


@dataclass(frozen=True)
class Shown:
    """A network of the page: its title there, an ONNX file that is there or the model to write one of, and its size."""

    name: str
    model: nn.Module
    file: Path | None = None


# ------------------------------------------------------------------------------------------------ before any work


def check_new_folder(flag: str, folder: Path, overwrite: bool = False) -> None:
    """Raise when a folder that a flag names is there, or could not be made."""
    if folder.exists() and not overwrite:
        hint = "choose another, or replace it by --overwrite" if flag == "--demo" else "choose another"
        raise RunError(f"{flag} {folder}: is there already; {hint}")
    if folder.exists() and not (folder / "demo.json").is_file():
        raise RunError(f"{flag} {folder}: holds no page of --demo, so --overwrite does not replace it; choose another")
    check_writable(flag, folder)


def runtime_files(ort_web: str | None) -> dict[str, bytes]:
    """The files of ONNX Runtime for browsers that the page loads, by name.

    Args:
        ort_web: an unpacked npm package onnxruntime-web, or its dist/; None fetches the package by npm.

    Raises:
        RunError: they cannot be had.
    """
    if ort_web is not None:
        folder = Path(ort_web)
        folder = folder / "dist" if (folder / "dist").is_dir() else folder
        try:
            return {name: (folder / name).read_bytes() for name in ORT_FILES}
        except OSError as error:
            raise RunError(
                f"--ort_web {ort_web}: {error.filename} cannot be read ({error.strerror}); give the folder of an "
                "unpacked npm package onnxruntime-web"
            ) from error
    npm = shutil.which("npm")
    if npm is None:
        raise RunError(f"--demo: npm is not installed, which fetches {ORT_WEB}; install Node.js, {_WAY_OUT}")
    with tempfile.TemporaryDirectory(prefix="ort-web-") as folder:
        command = [npm, "pack", ORT_WEB, "--silent", "--fetch-retries=1", "--pack-destination", folder]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS)
            reason = " ".join((done.stderr or done.stdout).split())[:200] or f"exit code {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunError(f"--demo: npm cannot fetch {ORT_WEB} ({error}); {_WAY_OUT}", code=1) from error
        if done.returncode:
            raise RunError(f"--demo: npm cannot fetch {ORT_WEB} ({reason}); go online, {_WAY_OUT}", code=1)
        try:
            (archive,) = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as package:
                return {name: package.extractfile(f"package/dist/{name}").read() for name in ORT_FILES}
        except (KeyError, OSError, ValueError, tarfile.TarError) as error:
            raise RunError(f"--demo: {ORT_WEB} is not what it was ({error}); {_WAY_OUT}", code=1) from error


# ------------------------------------------------------------------------------------------------ the page


def write_demo(
    folder: Path,
    shown: Sequence[Shown],
    about: Mapping[str, str],
    dataset: str,
    facts: DatasetFacts,
    size: int,
    classes: Sequence[str],
    runtime: Mapping[str, bytes],
    opset: int = OPSET,
) -> None:
    """Write the folder of the page, whole or not at all; one that is there is replaced.

    Args:
        shown: networks side by side; the others' times are held against the first one's.
        about: see `page_words`.
        size: pixels a side of the networks' images.
        classes: their names, in the order of the logits.
        runtime: see `runtime_files`.

    Raises:
        RunError: a network cannot be written as ONNX, or the disk is full.
    """
    with whole_folder("--demo", folder, replace=True) as draft:
        (draft / "ort").mkdir()
        for name in PAGE_FILES:
            shutil.copyfile(PAGE / name, draft / name)
        for name, content in runtime.items():
            (draft / "ort" / name).write_bytes(content)
        content = {
            **about,
            "draw": dataset == "digits",
            "classes": list(classes),
            "image": image_spec(dataset, facts, size),
            "models": [_network(draft, number, network, opset) for number, network in enumerate(shown)],
        }
        (draft / "demo.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def page_words(arch: str, dataset: str, name: str) -> dict[str, str]:
    """The sentences of the page: title, about, note. `name` says what the first network is, "dense" or "masked"."""
    about = f"{arch} on {dataset}, computed in this browser: the network of full size, and what is left of it once "
    about += "pruned units are physically removed."
    note = "The first network is the dense one, trained before anything was pruned."
    if name == "masked":
        note = "The first network is of full size with its pruned weights at zero: the same answers, at the dense cost."
    return {"title": "Before and after pruning", "about": about, "note": note}


def _network(draft: Path, number: int, network: Shown, opset: int) -> dict:
    """A network's line in demo.json, and its file."""
    path = draft / f"model_{number}.onnx"
    if network.file is None:
        to_onnx(network.model, path, opset)
    else:
        shutil.copyfile(network.file, path)
    sizes = {"parameters": count_parameters(network.model), "macs": macs(network.model), "bytes": path.stat().st_size}
    return {"name": network.name, "file": path.name, **sizes}


def image_spec(dataset: str, facts: DatasetFacts, size: int) -> dict:
    """How an image becomes the networks' input, as plain values for `seen` and `inputOf` of image.mjs.

    Pixels of 0..255 are multiplied by `scale` and moved by `bias`, by channel, as in `images.augment.Normalise`.
    """
    shown = preprocessing_of(facts, size)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (shown.mean, shown.std))
    spec = {"size": size, "native": facts.image_size, "grey": shown.channels == 1, "fit": FITS.get(dataset, "file")}
    spec |= {"resize": shown.resize, "keepsAspect": shown.resize_mode == "shorter", "kernel": shown.interpolation}
    return {**spec, "scale": (1 / (255 * std)).float().tolist(), "bias": (-mean / std).float().tolist()}


def class_names(dataset: str, data: str | Path, classes: int) -> list[str]:
    """What the classes are called: a data set's names, those of the folders of images, or else their numbers."""
    names = list(CLASSES.get(dataset, ()))
    root = Path(data).expanduser()
    if dataset == "cifar100":
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            names = importlib.import_module("torchvision.datasets").CIFAR100(str(root), train=False).classes
    elif not names and (root / "train").is_dir():
        names = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir() and entry.name[0] != ".")
        names = _described(names)
    return names if len(names) == classes else [str(number) for number in range(classes)]


def _described(names: list[str]) -> list[str]:
    """ImageNet's folders by the words that timm knows for them; others as they are."""
    try:
        known = importlib.import_module("timm.data").ImageNetInfo()
    except (AssertionError, AttributeError, ImportError, OSError):
        return names
    words = list(names)
    for number, name in enumerate(names):
        with contextlib.suppress(KeyError):
            words[number] = known.label_name_to_description(name).partition(",")[0]
    return words
