"""How a run shows its images: flags and the weights that it starts from in; the weights' own mean, std, interpolation
and crop out, or None for the data set's.

Where weights were trained on images of one kind, others are not what they know. Their own record decides: args.yaml of
one of our runs, config.json of an exported model, timm's configuration of a named architecture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from dataset import DATASETS
from models import TIMM, pretrained_source
from models.vit import CONFIGS
from models.weight_files import import_timm
from utils import RunError, load_tensors

FIELDS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "shown_as")  # of DatasetFacts
OWN_RUN = "the run that the weights come from"


def weights_want(args: argparse.Namespace) -> dict | None:
    """`FIELDS` of the weights that a fresh run starts from; None where they are the data set's own, or not known.

    Raises:
        RunError: `--preprocessing model` where no weights are loaded, or nothing is known of them.
    """
    if args.preprocessing == "dataset":
        return None
    found = _wanted(args)
    if args.preprocessing == "model" and not found:
        raise RunError("--preprocessing model: nothing says how the weights' images were shown; leave it out")
    own = of_run({"dataset": args.dataset})
    same = found and all(found[name] == own[name] for name in FIELDS if name != "shown_as")
    return None if same else found


def _wanted(args: argparse.Namespace) -> dict | None:
    source = args.init or args.pretrained
    if not source or (not args.init and args.pretrained_note):
        return None
    if isinstance(source, str):
        found = recorded(Path(source))
        if found:
            return found
    name = None
    if args.arch.startswith(TIMM) or (source is True and args.arch in CONFIGS):
        name = pretrained_source(args.arch, args.pretrained_tag) or args.arch.removeprefix(TIMM)
    elif args.arch in CONFIGS and (str(source).endswith(".npz") or args.preprocessing == "model"):
        name = CONFIGS[args.arch].timm_name
    return timm_wants(name) if name else None


def timm_wants(name: str) -> dict | None:
    """timm's record of a model, "NAME" or "NAME.TAG"; None where it has none."""
    config = import_timm(f"--arch {TIMM}{name}").get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        return None
    said = f"timm's {config.architecture or name}" + (f".{config.tag}" if config.tag else "")
    mode = "bicubic" if config.interpolation == "bicubic" else "bilinear"
    crop = "squash" if config.crop_mode == "squash" else "center"
    return _record(config.mean, config.std, mode, config.crop_pct, crop, said)


def _record(mean, std, interpolation: str, crop_pct: float | None, crop_mode: str, shown_as: str) -> dict:
    mean, std = (list(values) * (3 // len(values)) for values in (mean, std))
    return dict(zip(FIELDS, (mean, std, interpolation, crop_pct, crop_mode, shown_as), strict=True))


def recorded(path: Path) -> dict | None:
    """What is recorded next to weights of this program: in config.json of a `model/`, args.yaml or a run's checkpoint.

    Raises:
        RunError: a file that stands there cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    try:
        if (folder / "config.json").is_file() and (path.is_dir() or path.name == "model.safetensors"):
            return _of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        flags = None
        if (folder / "args.yaml").is_file():
            flags = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
        elif path.name.startswith("checkpoint") and path.is_file():
            flags = load_tensors(path, "weights").get("args")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise RunError(f"{folder}: what its weights are cannot be read ({error})") from error
    return of_run(flags) if isinstance(flags, Mapping) else None


def of_run(flags: Mapping) -> dict | None:
    """How the images of a run were shown, by its flags."""
    if flags.get("preprocessing_used"):
        return dict(flags["preprocessing_used"])
    facts = DATASETS.get(flags.get("dataset"))
    if facts is None:
        return None
    return _record(facts.mean, facts.std, facts.interpolation, facts.crop_pct, facts.crop_mode, OWN_RUN)


def _of_config(config: Mapping) -> dict | None:
    """Of an exported model; older ones say no more than mean and std."""
    if not config.get("mean") or not config.get("std"):
        return None
    shown = config.get("preprocessing") or {}
    mode, crop = shown.get("interpolation", "bilinear"), shown.get("crop_mode", "center")
    return _record(config["mean"], config["std"], mode, shown.get("crop_pct"), crop, OWN_RUN)
