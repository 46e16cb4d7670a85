"""The plan of `--dry_run`: what a command would do, without reading data or writing files."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from dataset import split_sizes
from engine.allocation import Allocation
from engine.journal import cost_columns
from engine.model import make_model, run_length, units_of_run
from engine.rounds import finish_images, finish_steps
from engine.run_folder import has_run, target_dir
from families import Family, family_of
from models.merging import merging_line
from models.weight_files import FILE_SUFFIXES
from pruning.depth import DEPTH, candidates
from pruning.nm import parse_pattern, scheduled_keep, weights_left
from pruning.units import Kept, count_parameters, unit_weights
from reporting.words import plural
from utils import RunError, format_table

_PROBED = (
    "The sensitivity probe of each state decides how many units each layer keeps; this table takes the same share from "
    "all layers."
)


def plan(args: argparse.Namespace) -> str:
    """Density, units, parameters and MACs of each state; steps, images, disk and files.

    Raises:
        RunError: what the command would refuse, and files of weights that do not exist.
    """
    resumes = bool(getattr(args, "resumed_from", None))
    if not resumes:
        _check_weights(args)
    with torch.device("meta"):
        model = make_model(args, weights=False)
    units, allocation = units_of_run(args, model)
    family = family_of(model)
    states, epochs, _ = run_length(args)
    train_images, val_images = split_sizes(args.dataset, args.val_fraction, args.train_limit, args.data)
    batch, parameters = args.batch_size * args.accum_steps, count_parameters(model)
    steps = plural(max(1, train_images // batch), "step")
    lines = [
        f"{args.struct} on {args.arch}, {args.dataset}: {plural(states, 'state')} x {plural(epochs, 'epoch')} x "
        f"{steps} of {min(batch, train_images)} images ({train_images:,} train, {val_images:,} validate)"
    ]
    if args.finish_epochs:
        images = finish_images(args, train_images, val_images)
        steps = plural(finish_steps(args, train_images, val_images), "step")
        lines.append(
            f"then a finish of {plural(args.finish_epochs, 'epoch')} x {steps} of {min(batch, images)} images "
            f"({images:,} train, {'none' if args.finish_on_all else f'{val_images:,}'} validate): the last state's "
            f"model, lr {args.finish_lr:g}"
        )
    if args.token_merge:
        lines.append(merging_line(model))
    prunable, rows = _prunable(args, model, family), _rows(args, model, family, units, allocation)
    columns = {"state": "state", "density": lambda row: f"{100 * row['density']:.2f}%", **cost_columns(rows[0])}
    lines += [f"{parameters:,} parameters, {prunable:,} of them prunable weights", "", format_table(rows, columns), ""]
    if args.nm and states > 1:
        counts = ", ".join(str(_keep(args, state)[0]) for state in range(states))
        lines += [f"Of every {_keep(args, 0)[1]} consecutive weights of a row {counts} stay.", ""]
    elif allocation and allocation.probes:
        lines += [_PROBED, ""]
    elif allocation and allocation.remark:
        lines += [allocation.remark, ""]
    total = plural(states * epochs + (args.finish_epochs or 0), "epoch")
    lines += [
        f"About {_disk(args, parameters, prunable) / 1e6:,.0f} MB of disk.",
        *_where(args, resumes),
        f"{total} in all; a short run shows how long one takes here: --epochs 1 --pruning_times 1.",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in [*args.notes, *notes_on_steps(args, train_images)])])


def notes_on_steps(args: argparse.Namespace, images: int) -> list[str]:
    """A note where an epoch of so many training images has a single step."""
    batch = args.batch_size * args.accum_steps
    few = f"an epoch is one step of {min(batch, images)} of the {images:,} training images; lower --batch_size for more"
    return [few] if images < 2 * batch else []


def _check_weights(args: argparse.Namespace) -> None:
    """Raises: RunError, for a file of initial weights that does not exist."""
    for name in ("pretrained", "init"):
        value = getattr(args, name)
        is_file = isinstance(value, str) and (name == "init" or Path(value).suffix in FILE_SUFFIXES)
        if is_file and not Path(value).is_file():
            raise RunError(f"--{name} {value}: no such file")


def _where(args: argparse.Namespace, resumes: bool) -> list[str]:
    """The folders that the command reads and writes, a line each, and what would stop it there."""
    folder, data = target_dir(args), Path(args.data)
    taken = has_run(folder) and not (resumes or args.overwrite)
    lines = [f"Files in {folder}{', which holds a run: add --resume or --overwrite' if taken else ''}."]
    if args.dataset != "digits":  # comes with scikit-learn
        lines.append(f"Data in {data}{'' if data.is_dir() else ', which is not there yet'}.")
    return lines


def _keep(args: argparse.Namespace, state: int) -> tuple[int, int]:
    """How many weights of a group a state of --nm keeps, and how many a group has."""
    keep, group = parse_pattern(args.nm)
    return scheduled_keep(keep, group, args.ratio_schedule, state, run_length(args)[0]), group


def planned_states(args: argparse.Namespace) -> list[dict]:
    """A row a state: density and what its model costs."""
    with torch.device("meta"):
        model = make_model(args, weights=False)
    units, allocation = units_of_run(args, model)
    return _rows(args, model, family_of(model), units, allocation)


def _prunable(args: argparse.Namespace, model: nn.Module, family: Family) -> int:
    return sum(module.weight.numel() for module in family.prunable_layers(model, args.prune_patch_embed).values())


def _rows(
    args: argparse.Namespace, model: nn.Module, family: Family, units: dict, allocation: Allocation | None
) -> list[dict]:
    prunable, states = _prunable(args, model, family), run_length(args)[0]
    if allocation is None:
        return [{"state": state, **_single_weights(args, model, family, prunable, state)} for state in range(states)]
    rows = []
    for state, kept in enumerate(allocation.plan()):
        removed = sum((units[key].count - len(ids)) * unit_weights(model, units[key]) for key, ids in kept.items())
        whole = {DEPTH[args.vit_prune_target]: _left_whole(args, kept)} if allocation.by_branch else {}
        rows.append({"state": state, "density": 1 - removed / prunable, **whole, **family.cost(model, kept)})
    return rows


def _left_whole(args: argparse.Namespace, kept: Kept) -> int:
    """How many blocks or branches have units left."""
    return sum(any(kept[key] for key in keys) for keys in candidates(kept, args.vit_prune_target).values())


def _disk(args: argparse.Namespace, parameters: int, prunable: int) -> float:
    """Bytes of two checkpoints, with three mask sets each, and of initial, best and rewind weights."""
    moments = (1 if args.opt == "sgd" else 2) + bool(args.ema_decay)
    copies = 2 * (1 + moments) + 2 + (args.prune_type == "rewind_lt")
    return 4 * parameters * copies + 2 * 3 * prunable / 8


def _single_weights(args: argparse.Namespace, model: nn.Module, family: Family, prunable: int, state: int) -> dict:
    """Density and cost of a state with element-wise masks, as if all layers had the same density."""
    left = round(prunable * (1 - args.rate) ** state)
    if args.nm:
        layers = family.prunable_layers(model, args.prune_patch_embed).values()
        left = weights_left((layer.weight.shape for layer in layers), *_keep(args, state))
    if args.struct in ("refill", "rsst") and state:
        left += round((prunable - left) * args.fillback_rate)
    cost = family.cost(model, {})
    return {"density": left / prunable, **cost, "parameters": cost["parameters"] - (prunable - left)}
