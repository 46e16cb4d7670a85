"""Writes a verified model to `model/`, and loads it.

model.safetensors and config.json vouch for one another; no file holds pickled code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

import utils
from dataset import DatasetFacts, preprocessing_of
from deployment.card import model_card
from deployment.compaction import compact, macs, parity
from families import family_of, family_of_config
from families.cards import LOADER, LOADER_SOURCE, needs_loader
from models.merging import unmerged
from pruning.removal import remove_units
from pruning.units import Kept, count_parameters
from utils import RunError, cause, disk_advice

FOLDED = "folded"  # the folder of that variant inside of model/
FOLLOWING = (  # made from a model/ that is there
    "model.onnx",
    "model_int8.onnx",
    "model_int8_dynamic.onnx",
    "onnx.csv",
    "model.pt2",
    "model_aot.pt2",
    "latency.txt",
)
OWN = ("README.md", "config.json", LOADER, "parity.json", "model.safetensors", *FOLLOWING, FOLDED)
SECTION = "\n## ONNX\n"  # what a call with --int8 adds to the card starts with it
# in JSON with indents: a list without lists or objects in it, and what separates its values; strings hold no line ends
LIST, BREAK = re.compile(r"\[\n\s*([^\[\]{}]*?)\n\s*\]"), re.compile(r",\n\s*")
log = logging.getLogger("export")


class VerificationError(RunError):
    """The small model computes something else than the masked one."""


def write(
    folder: Path,
    masked: nn.Module,
    kept: Kept | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    facts: DatasetFacts | None,
    provenance: Mapping,
    metrics: Mapping,
    classes: Sequence[str] = (),
    measured: Mapping | None = None,
) -> nn.Module:
    """Write `model/` and return the small model; nothing is written when it computes something else.

    Args:
        masked: the dense-shaped model with pruned weights at zero.
        kept: as in `compact`.
        batches: images on which both models are compared.
        provenance, metrics: plain values for config.json and the card. A `val_accuracy` gives way to that of the small
            model on `batches`: the one that selected it was measured in the precision of training.
        classes: their names, in the order of the logits; empty where they are not known.
        measured: metrics too, measured just now; `metrics` give way to what an earlier call measured on these weights.

    Raises:
        RunError: the small model's logits differ by more than 1e-5 x max(1, largest logit) in float64.
    """
    small, kept = compact(masked, kept)
    check = _verified("removed", masked, small, batches)
    config = describe(small, kept, facts, classes)
    config["parameters"] = {"dense": count_parameters(masked), "removed": count_parameters(small)}
    config["macs"] = {"dense": macs(unmerged(masked)), "removed": macs(small)}
    config["provenance"], config["metrics"] = dict(provenance), dict(metrics)
    _write_files(folder, small, config, check, measured)
    return small


def write_folded(
    folder: Path, masked: nn.Module, kept: Kept | None, batches: Iterable[tuple[Tensor, Tensor]]
) -> nn.Module:
    """Write `model/folded/` beside the `model/` that `write` wrote, and return the folded model.

    It is the removed model without what inference can do without (`Family.fold_`): batch norms, LayerScale. Its weights
    are products, rounded once more to float32, which the difference in float64 shows.

    Raises:
        RunError: nothing is there to fold; or its logits differ from the masked model's by more than `write` allows.
    """
    folded, config = compact(masked, kept)[0], read_config(folder)
    config["folded"] = foldable(folded, in_place=True)
    check = _verified("folded", masked, folded, batches)
    config["parameters"]["removed"], config["macs"]["removed"] = count_parameters(folded), macs(folded)
    _write_files(folder / FOLDED, folded, config, check, config["metrics"])
    return folded


def foldable(model: nn.Module, in_place: bool = False) -> list[str]:
    """What `--fold` folds into the weights before it, by name.

    Raises:
        RunError: nothing.
    """
    names = family_of(model).fold_(model if in_place else copy.deepcopy(model))
    if not names:
        raise RunError("--fold: this model has no batch norm and no LayerScale to fold; leave it out")
    return names


def _verified(what: str, masked: nn.Module, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    check = parity(masked, model, batches)
    if not check["max_difference_float64"] <= check["bound"]:
        raise VerificationError(
            f"the {what} model differs from the masked one by {check['max_difference_float64']:.2g} in float64 "
            f"(allowed: {check['bound']:.2g}); not exported",
            code=1,
        )
    if not math.isfinite(check["max_difference_float32"]):
        raise VerificationError(f"the {what} model's logits are not finite in float32; not exported", code=1)
    return check


def _write_files(folder: Path, model: nn.Module, config: dict, check: dict, measured: Mapping | None = None) -> None:
    """Write the files of a model. Files made from an earlier model in the folder, such as model.onnx, and the metrics
    measured on it are kept if weights and config are the same; otherwise they are deleted, and a line says so."""
    accuracy = check.pop("accuracy")
    if "val_accuracy" in config["metrics"]:
        measured = {"val_accuracy": accuracy, **(measured or {})}
    before = _config_of_same(folder, model.state_dict(), config)
    if before is not None:
        config["metrics"] = {**config["metrics"], **before["metrics"]}
    config["metrics"] = {**config["metrics"], **(measured or {})}
    config, blob = seal(config, model.state_dict())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        following = [folder / name for name in (*FOLLOWING, FOLDED) if (folder / name).exists()]
        if before is None and following:
            names = ", ".join(path.name for path in following)
            log.warning(f"{folder}: {names} belonged to another model and is gone; ask for it again")
            for path in following:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; the run itself is complete", code=1) from error
    sections = _sections(folder) if before is not None else ""
    utils.write_atomic(folder / "model.safetensors", lambda file: file.write(blob))
    utils.write_text(folder / "config.json", as_json(config))
    utils.write_text(folder / "parity.json", as_json(check))
    utils.write_text(folder / "README.md", model_card(config, check) + sections)
    if needs_loader(config):
        utils.write_text(folder / LOADER, LOADER_SOURCE.read_text("utf-8"))


def _config_of_same(folder: Path, weights: Mapping[str, Tensor], config: Mapping) -> dict | None:
    """The config.json that is there, if it describes this model and these weights; metrics may differ."""
    try:
        there, tensors = read_config(folder), load_file(str(folder / "model.safetensors"))
    except RunError:
        return None  # none, damaged, or of an older version
    named = [json.loads(json.dumps({**content, "metrics": {}, "sha256": ""})) for content in (there, config)]
    same = named[0] == named[1] and tensors.keys() == weights.keys()
    return there if same and all(torch.equal(tensors[name], weights[name].cpu()) for name in tensors) else None


def _sections(folder: Path) -> str:
    """What was appended to the present card: the table of its ONNX files."""
    card = folder / "README.md"
    _, heading, text = (card.read_text(encoding="utf-8") if card.exists() else "").partition(SECTION)
    return heading + text


def add_section(folder: Path, text: str) -> None:
    """Append text to the card, in place of what an earlier call appended."""
    card, _, _ = (folder / "README.md").read_text(encoding="utf-8").partition(SECTION)
    utils.write_text(folder / "README.md", f"{card}{SECTION}{text}")


def as_json(content: Mapping) -> str:
    """JSON with a line for each list of plain values, such as the ids that a layer keeps."""
    return LIST.sub(lambda found: f"[{BREAK.sub(', ', found[1])}]", json.dumps(content, indent=2)) + "\n"


def _ordered(blob: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in any, and equal models differ then."""
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    return blob[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + blob[end:]


def seal(config: Mapping, weights: Mapping[str, Tensor]) -> tuple[dict, bytes]:
    """config.json's and model.safetensors' content, each with the digest of the other."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    blob = _ordered(save(tensors, metadata={"format": "pt", "config_sha256": _digest(config)}))
    return {**config, "sha256": hashlib.sha256(blob).hexdigest()}, blob


def check_folder(folder: Path, flag: str = "--out") -> None:
    """Raise early when `folder` could not be made or written, or holds files of others that would be replaced."""
    check_writable(flag, folder, folder)
    in_the_way = [name for name in OWN if (folder / name).exists()]
    if in_the_way and not _is_export(folder):
        raise RunError(f"{flag} {folder}: holds {in_the_way[0]}, which this program did not write; choose another")


def check_writable(flag: str, path: Path, *first: Path) -> None:
    """Raise where `path` could not be made: the first folder that exists, of `first` and its parents, must be
    writable."""
    there = next(parent for parent in (*first, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{flag} {path}: {there} is not a folder that can be written; choose another")


@contextmanager
def whole_folder(flag: str, folder: Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder to write in, which becomes `folder` at the end of the block, whole or not at all.

    Raises:
        RunError: it cannot be written, or there are files in `folder` that are not to be replaced.
    """
    try:
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=there) as staging:
            draft = Path(staging) / folder.name
            draft.mkdir()
            yield draft
            folder.parent.mkdir(parents=True, exist_ok=True)
            if replace and folder.exists():
                folder.rename(Path(staging) / "old")
            draft.rename(folder)
    except OSError as error:
        raise RunError(f"{flag} {folder}: cannot be written ({cause(error)}){disk_advice(error)}", 1) from error


def _is_export(folder: Path) -> bool:
    """Whether one of its files says that this program wrote the folder, whole or damaged since."""
    try:
        with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
            if "config_sha256" in (file.metadata() or {}):
                return True
    except (OSError, SafetensorError):
        pass  # the other file may say it
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"sha256", "provenance", "macs"} <= config.keys()


def describe(small: nn.Module, kept: Kept, facts: DatasetFacts | None, classes: Sequence[str] = ()) -> dict:
    """A removed model as plain values, enough to build it again (its family's share) and to feed it images."""
    family = family_of(small)
    shown = preprocessing_of(facts, family.image_size(small)).as_config() if facts else {}
    config = family.describe(small, kept) | {name: shown.get(name) for name in ("mean", "std")}
    config["preprocessing"] = shown or None
    if classes:
        config["class_names"] = list(classes)
    return config


def _digest(config: Mapping) -> str:
    content = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load(folder: str | Path) -> nn.Module:
    """The exported model, in eval mode on the CPU; `preprocessing` in config.json says how it expects its images.

    Args:
        folder: `model/`, or the folder of the run that it is in.

    Raises:
        RunError: a file is missing, truncated or not the one that was written.
    """
    folder = model_folder(Path(folder))
    config = read_config(folder)
    family = family_of_config(config)
    model, kept = family.rebuild(config)
    remove_units(model, family.units(model), kept)
    if "folded" in config:
        family.fold_(model)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model.eval()


def model_folder(folder: Path) -> Path:
    """`folder`, or where it is a run's, the `model/` in it."""
    return folder / "model" if (folder / "model").is_dir() and not (folder / "config.json").exists() else folder


def read_config(folder: Path) -> dict:
    """config.json, checked against model.safetensors in both directions."""
    weights = folder / "model.safetensors"
    try:
        config = json.loads((folder / "config.json").read_text())
        blob_digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        with safe_open(str(weights), framework="pt") as file:
            config_digest = (file.metadata() or {}).get("config_sha256")
    except OSError as error:
        raise RunError(
            f"{error.filename or folder}: {error.strerror}; is {folder} an exported model/ folder?"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{folder / 'config.json'} is damaged ({error}); export again") from error
    except SafetensorError as error:
        raise RunError(f"{weights} is damaged ({error}); export again") from error
    if not isinstance(config, dict) or config.get("sha256") != blob_digest or config_digest != _digest(config):
        raise RunError(f"{folder}: model.safetensors and config.json do not belong together; one was changed")
    return config


def verification_line(folder: Path) -> str:
    """What parity.json says, in a sentence."""
    check = json.loads((folder / "parity.json").read_text())
    merged = ""
    if check.get("merged_otherwise"):
        merged = f" (of {check['merged_otherwise']:,}, for which rounding let other tokens merge, given the same ones)"
    return (
        f"{folder}: the removed model differs from the masked one by {check['max_difference_float32']:.2g} in float32, "
        f"{check['max_difference_float64']:.2g} in float64 over {check['images']:,} validation images{merged}"
    )
