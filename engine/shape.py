"""An architecture by its folder: flags whose `--arch` may name an exported model in, the model that they describe out.

    model = model_from_flags(args, facts)            # of --arch results/NAME/model: its shape, with fresh weights

Whether a small network has to be pruned out of a large one, or may be trained as small as it is from the start (Liu et
al., "Rethinking the Value of Network Pruning", ICLR 2019), takes the shape alone: the folder's weights are not read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

import models
from dataset import DatasetFacts
from families import Family, family_of_config
from pruning.removal import remove_units
from pruning.units import LayoutError
from utils import RunError, cause


def names_folder(arch: str) -> bool:
    """Whether `--arch` names a folder, there or not, and no architecture by its name."""
    return not (arch in models.BUILDERS or arch.startswith(models.TIMM)) and ("/" in arch or Path(arch).is_dir())


def check_arch(arch: str) -> None:
    """Raises: RunError, when `--arch` names neither a known architecture nor an exported model."""
    if names_folder(arch):
        _read(arch)
        return
    try:
        models.check_arch(arch)
    except ValueError as error:
        raise RunError(f"--arch {arch}: {error}; or the folder of an exported model") from error


def model_from_flags(args: argparse.Namespace, facts: DatasetFacts, weights: bool = True) -> nn.Module:
    """`models.from_flags`, for folders as well: the shape of the network in them, with as many classes as the data set.

    Its initial weights are those that its family draws for layers of this size. Raises as `models.from_flags` does.

    Raises:
        RunError: the folder holds no model, or other flags contradict it.
    """
    if not names_folder(args.arch):
        return models.from_flags(args, facts, weights)
    family, config = _read(args.arch)
    _refuse_contradictions(args)
    geometry = next(key for key in family.config_keys if key in config)
    try:
        sized = {**config, geometry: {**config[geometry], "num_classes": facts.classes}}
        model, kept = family.rebuild(sized)
        remove_units(model, family.units(model), kept)
    except (
        AttributeError,
        IndexError,
        KeyError,
        LayoutError,
        RuntimeError,
        StopIteration,
        TypeError,
        ValueError,
    ) as error:
        reason = f"its config.json describes no network ({cause(error)})"
        raise RunError(f"--arch {args.arch}: {reason}; export again") from error
    if hasattr(model, "reset_parameters"):  # of other models no layer's initial values go by its size
        model.reset_parameters()
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    for name, own in (("img_size", family.image_size(model)), ("patch_size", patch)):
        own = own[0] if isinstance(own, tuple) else own
        if getattr(args, name) not in (None, own):
            raise RunError(f"--{name} {getattr(args, name)}: the network of --arch {args.arch} has {own}; leave it out")
    model.pretrained_report = None
    return model


def _read(arch: str) -> tuple[Family, Mapping]:
    """The family and config.json of the model that a folder holds, itself or in its model/."""
    flag, path = f"--arch {arch}", Path(arch)
    if not path.is_dir():
        raise RunError(f"{flag}: no such folder; give an exported model/, or one of {', '.join(models.BUILDERS)}")
    found = next((file for file in (path / "config.json", path / "model" / "config.json") if file.is_file()), None)
    if found is None:
        raise RunError(f"{flag}: holds no model; give an exported model/, or the folder of a run that has one")
    try:
        config = json.loads(found.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
        family = family_of_config(config)
    except (OSError, LayoutError, ValueError) as error:
        raise RunError(f"{flag}: {found} cannot be used ({error}); export again") from error
    if "folded" in config:
        raise RunError(
            f"{flag}: its {', '.join(config['folded'][:2])} are folded away; give the model/ it was made from"
        )
    return family, config


def _refuse_contradictions(args: argparse.Namespace) -> None:
    flags = {name: getattr(args, name, None) for name in ("pretrained", "pretrained_tag", "layer_scale")}
    flags["stem"] = args.stem if getattr(args, "stem", "patch") != "patch" else None
    for name, value in flags.items():
        if value:
            raise RunError(
                f"--{name} {value}: --arch {args.arch} names a shape, with fresh weights; leave one of them out"
            )
