"""`model/` on disk and back: a model that was proven to compute the same goes in, `load` gives it back.

model.safetensors and config.json vouch for one another; no file holds pickled code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

import utils
from dataset import DatasetFacts, preprocessing_of
from deployment.card import model_card
from deployment.compaction import compact, macs, parity
from families import family_of, family_of_config
from models.merging import unmerged
from pruning.removal import remove_units
from pruning.units import Kept, count_parameters
from utils import RunError

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


def write(
    folder: Path,
    masked: nn.Module,
    kept: Kept | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    facts: DatasetFacts | None,
    provenance: Mapping,
    metrics: Mapping,
    classes: Sequence[str] = (),
) -> nn.Module:
    """Write `model/` and return the small model; nothing is written when it computes something else.

    Args:
        masked: the dense-shaped model with pruned weights at zero.
        kept: as in `compact`.
        batches: validation images for the proof.
        provenance, metrics: plain values for config.json and the card.
        classes: their names, in the order of the logits; empty where they are not known.

    Raises:
        RunError: the small model's logits differ by more than 1e-5 x max(1, largest logit) in float32.
    """
    small, kept = compact(masked, kept)
    proof = _proven("removed", masked, small, batches)
    config = describe(small, kept, facts, classes)
    config["parameters"] = {"dense": count_parameters(masked), "removed": count_parameters(small)}
    config["macs"] = {"dense": macs(unmerged(masked)), "removed": macs(small)}
    config["provenance"], config["metrics"] = dict(provenance), dict(metrics)
    _write_files(folder, small, config, proof)
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
    proof = _proven("folded", masked, folded, batches)
    config["parameters"]["removed"], config["macs"]["removed"] = count_parameters(folded), macs(folded)
    _write_files(folder / FOLDED, folded, config, proof)
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


def _proven(what: str, masked: nn.Module, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    proof = parity(masked, model, batches)
    if not proof["max_difference_float32"] <= proof["bound_float32"]:
        raise RunError(
            f"the {what} model differs from the masked one by {proof['max_difference_float32']:.2g} "
            f"(allowed: {proof['bound_float32']:.2g}); not exported",
            code=1,
        )
    return proof


def _write_files(folder: Path, model: nn.Module, config: dict, proof: Mapping) -> None:
    config, blob = seal(config, model.state_dict())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FOLLOWING:
            (folder / name).unlink(missing_ok=True)  # they belong to the model that was here
        if (folder / FOLDED).is_dir():
            shutil.rmtree(folder / FOLDED)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; the run itself is complete", code=1) from error
    utils.write_atomic(folder / "model.safetensors", lambda file: file.write(blob))
    utils.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    utils.write_text(folder / "parity.json", json.dumps(proof, indent=2) + "\n")
    utils.write_text(folder / "README.md", model_card(config, proof))


def seal(config: Mapping, weights: Mapping[str, Tensor]) -> tuple[dict, bytes]:
    """config.json's and model.safetensors' content, each vouching for the other: the weights carry the config's digest,
    the config theirs."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    blob = save(tensors, metadata={"format": "pt", "config_sha256": _digest(config)})
    return {**config, "sha256": hashlib.sha256(blob).hexdigest()}, blob


def check_folder(folder: Path) -> None:
    """Raise early when `folder` could not be made or written."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"--out {folder}: {there} is not a folder that can be written; choose another")


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
    """The exported model, in eval mode on the CPU; how it wants its images stands in `preprocessing` of config.json.

    Raises:
        RunError: a file is missing, truncated or not the one that was written.
    """
    folder = Path(folder)
    config = read_config(folder)
    family = family_of_config(config)
    model, kept = family.rebuild(config)
    remove_units(model, family.units(model), kept)
    if "folded" in config:
        family.fold_(model)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model.eval()


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


def proof_line(folder: Path) -> str:
    """What parity.json says, in a sentence."""
    proof = json.loads((folder / "parity.json").read_text())
    merged = ""
    if proof.get("merged_otherwise"):
        merged = f" (of {proof['merged_otherwise']:,}, for which rounding let other tokens merge, given the same ones)"
    return (
        f"{folder}: the removed model differs from the masked one by {proof['max_difference_float32']:.2g} in float32, "
        f"{proof['max_difference_float64']:.2g} in float64 over {proof['images']:,} validation images{merged}"
    )
