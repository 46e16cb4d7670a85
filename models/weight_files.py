"""Reads weights from files, or from timm by name, as {name: tensor}.

    weights = read_weights("results/NAME", "--init")        # a run's folder, a model/ folder, or any file of weights

Nothing that is read can run code: safetensors, numpy without pickles, and torch.load(weights_only=True).
"""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from utils import RunError, check_finite, plain_weights, seal_broken

log = logging.getLogger(__name__)

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin", ".npz")
IN_FOLDERS = ("model.safetensors", "best.pt")  # of an exported model/, of a run
# averages first, as timm takes them; "weights" is of our own checkpoints
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
# what training scripts save with the weights: plain values, which load without running code
_PLAIN_VALUES = [
    argparse.Namespace,
    np.dtype,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "bool")),
]


class PretrainedError(RuntimeError):
    """Pretrained weights that cannot be had; one line that says what to do."""


class MisfitError(PretrainedError):
    """Pretrained weights that were read and belong to another architecture."""


def read_weights(source: str | Path, flag: str, public: bool = False) -> dict[str, Tensor]:
    """All tensors of a file of weights, without its containers and, where they were pruned by
    `torch.nn.utils.prune`, with their masks applied.

    Args:
        source: a file, or a folder with one of `IN_FOLDERS`.
        flag: what an error begins with.
        public: `source` may also name a timm model, whose weights timm downloads.

    Raises:
        PretrainedError: it is missing or damaged, or holds no tensors; timm is not installed; no network.
        ValueError: it is no file or folder of weights, nor such a timm model.
    """
    path, said = _file_of(source, public), f"{flag} {source}"
    if path is None:
        return _fetch(str(source), flag)
    if path.is_dir():
        raise ValueError(f"{said}: holds no weights; give a file, or the folder of a run or of an exported model")
    timm = import_timm(said) if path.suffix == ".npz" else None
    try:
        content = _read_npz(path, timm) if path.suffix == ".npz" else _read(path)
    except Exception as error:  # every reader raises its own types on a damaged file
        if path.suffix not in FILE_SUFFIXES and path.exists():
            raise ValueError(f"{said}: no weights file; known are {', '.join(FILE_SUFFIXES)}") from error
        raise PretrainedError(f"{said}: cannot be read ({reason(error)}); give a file of weights") from error
    while isinstance(content, Mapping):
        held = [key for key in CONTAINERS if content.get(key) and isinstance(content[key], Mapping)]
        if not held:
            break
        if len(held) > 1:
            log.info("%s: of %s in it the first is taken", said, " and ".join(held))
        content = content[held[0]]
    tensors = {}
    if isinstance(content, Mapping):
        named = ((str(name), value) for name, value in content.items())
        tensors = {name: value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise PretrainedError(f"{said}: not a dictionary of tensors; give a file of weights")
    try:
        check_finite(tensors, said)
    except RunError as error:
        raise PretrainedError(str(error)) from error
    try:
        return plain_weights(tensors)
    except RuntimeError as error:
        raise MisfitError(f"{said}: a mask does not fit its weight ({reason(error)})") from error


def _file_of(source: str | Path, public: bool) -> Path | None:
    """The file that holds the weights, or a folder without any; None where `source` can only be a timm name."""
    path = Path(source)
    if path.is_dir():
        return next((path / name for name in IN_FOLDERS if (path / name).is_file()), path)
    return None if public and path.suffix not in FILE_SUFFIXES and not path.exists() else path


def without_prefixes(weights: Mapping[str, Tensor], own: Iterable[str] = ()) -> dict[str, Tensor]:
    """Names without what wrappers put before them, but for prefixes that the model's `own` names have, too."""
    own, found = tuple(own), dict(weights)
    prefixes = [prefix for prefix in PREFIXES if not any(name.startswith(prefix) for name in own)]
    for _ in PREFIXES:  # wrapped in any order
        for prefix in prefixes:
            shorter = {name: name.removeprefix(prefix) for name in found}
            if len(set(shorter.values())) == len(found):  # or two tensors would have one name
                found = {shorter[name]: value for name, value in found.items()}
    return found


def import_timm(who: str) -> ModuleType:
    """timm, or a PretrainedError that names who needs it."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch is a RuntimeError
        raise PretrainedError(
            f"{who}: needs timm, which cannot be imported ({reason(error)}); pip install timm"
        ) from error
    return timm


def reason(error: Exception) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own line recommends unsafe loading
        return "damaged, or holds more than tensors"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    if seal_broken(path):
        raise ValueError("its content changed after it was written")
    with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN_VALUES):
        warnings.simplefilter("ignore")  # about what raw pickles hold; they are refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _fetch(name: str, flag: str) -> dict[str, Tensor]:
    timm = import_timm(f"{flag} {name}")
    if not timm.models.is_model_pretrained(name):
        raise ValueError(
            f"{flag} {name}: neither a weights file ({', '.join(FILE_SUFFIXES)}) nor a timm model with weights"
        )
    try:
        with _quiet_hub():
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # hub and network errors have no common base class
        raise PretrainedError(
            f"{flag}: timm could not fetch {name} ({reason(error)}); check the network, or give a file with {flag} PATH"
        ) from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without a network the hub warns of two dozen retries; the error after them says it once."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _read_npz(path: Path, timm: ModuleType) -> dict[str, Tensor]:
    """A ViT in Google's layout, by timm's own reader into a timm model of the file's geometry."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        names = set(file.files)
        prefixes = ("", "opt/target/", "params/", "params/img/")
        prefix = next((prefix for prefix in prefixes if f"{prefix}embedding/kernel" in names), None)
        if prefix is None or f"{prefix}conv_root/kernel" in names:
            raise ValueError("not a plain ViT in Google's layout")

        def shape(start: str, end: str) -> tuple[int, ...]:
            found = next((name for name in names if name.startswith(prefix + start) and name.endswith(end)), None)
            if found is None:
                raise ValueError(f"not a plain ViT in Google's layout: no {prefix}{start}...{end}")
            return file[found].shape

        trunk = f"{prefix}Transformer/"
        blocks = {name.removeprefix(trunk).split("/")[0] for name in names if name.startswith(f"{trunk}encoderblock")}
        stacked = blocks == {"encoderblock"}  # one tensor for all blocks
        first = f"Transformer/encoderblock{'' if stacked else '_0'}/"
        patch, _, channels, dim = file[f"{prefix}embedding/kernel"].shape
        positions = shape("", "pos_embedding")[-2]
        class_token = f"{prefix}cls" in names
        embedded = class_token and math.isqrt(positions) ** 2 != positions  # the class token has a position, too
        grid = math.isqrt(positions - embedded)
        if grid**2 != positions - embedded:
            raise ValueError(f"{positions} positions are not a square grid")
        pooled = "token" if class_token else "avg"
        geometry = {
            "img_size": grid * patch,
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": dim,
            "depth": shape(first, "LayerNorm_0/scale")[0] if stacked else len(blocks),
            "num_heads": shape(first, "query/kernel")[-2],
            "mlp_ratio": (shape(first, "Dense_0/kernel")[-1] + 0.5) / dim,  # timm rounds the product down
            "num_classes": shape("head/", "bias")[-1] if f"{prefix}head/bias" in names else 0,
            "class_token": class_token,
            "no_embed_class": not embedded,
            "global_pool": "map" if any(f"{prefix}MAPHead_0/" in name for name in names) else pooled,
            "fc_norm": False,
        }
    model = timm.models.VisionTransformer(**geometry)
    model.load_pretrained(str(path))
    return model.state_dict()
