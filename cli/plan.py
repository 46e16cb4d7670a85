"""The plan of `--dry_run`: flags in, what the command would do as text out; no data is read, nothing is written."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from dataset import split_sizes
from engine.allocation import Allocation
from engine.finish import finish_images, finish_steps
from engine.folder import has_run, target_dir
from engine.journal import cost_columns
from engine.model import make_model, run_epochs, run_length, state_epochs, units_of_run
from families import Family, family_of
from models.merging import merging_line
from models.weight_files import FILE_SUFFIXES
from pruning.depth import DEPTH, candidates
from pruning.nm import parse_pattern, scheduled_keep, weights_left
from pruning.units import Kept, count_parameters, unit_weights
from reporting.words import plural
from utils import RunError, format_table


def plan(args: argparse.Namespace) -> str:
    """Per state density, units, parameters and MACs; steps, images, disk and files.

    Raises:
        RunError: what the command would refuse, and weights that are not there.
    """
    resumes = bool(getattr(args, "resumed_from", None))
    if not resumes:
        _check_weights(args)
    with torch.device("meta"):
        model = make_model(args, weights=False)
    family, (units, allocation) = family_of(model), units_of_run(args, model)
    states, epochs, _ = run_length(args)
    finish = ""
    train_images, val_images = split_sizes(args.dataset, args.val_fraction, args.train_limit, args.data)
    batch = args.batch_size * args.accum_steps
    if args.finish_epochs:
        images = finish_images(args, train_images, val_images)
        finish = (
            f"then a finish of {plural(args.finish_epochs, 'epoch')} x "
            f"{plural(finish_steps(args, train_images, val_images), 'step')} of "
            f"{min(batch, images)} images ({images:,} train, {'none' if args.finish_on_all else f'{val_images:,}'} "
            f"validate): the last state's model, lr {args.finish_lr:g}\n"
        )
    prunable, rows = _prunable(args, model, family), _rows(args, model, family, units, allocation)
    table = format_table(
        rows, {"state": "state", "density": lambda row: f"{100 * row['density']:.2f}%", **cost_columns(rows[0])}
    )
    merging = f"{merging_line(model)}\n" if args.token_merge else ""
    remark = ""
    if args.nm and states > 1:
        counts = ", ".join(str(_keep(args, state)[0]) for state in range(states))
        remark = f"\nOf every {_keep(args, 0)[1]} consecutive weights of a row {counts} stay.\n"
    elif allocation and allocation.probes:
        remark = "\nHow many units each layer keeps depends on the probe of every state; here all give one share.\n"
    elif allocation and allocation.remark:
        remark = f"\n{allocation.remark}\n"
    return (
        f"{args.struct} on {args.arch}, {args.dataset}: {plural(states, 'state')} x {plural(epochs, 'epoch')} x "
        f"{plural(max(1, train_images // batch), 'step')} of {min(batch, train_images)} images "
        f"({train_images:,} train, {val_images:,} validate)\n{_state_zero(args)}"
        f"{finish}{merging}{count_parameters(model):,} parameters, {prunable:,} of them prunable weights\n\n{table}\n"
        f"{remark}\n"
        f"About {_disk(args, count_parameters(model), prunable) / 1e6:,.0f} MB of disk.\n{_where(args, resumes)}"
        f"{plural(run_epochs(args), 'epoch')} in all; how long one takes here, a short run "
        "tells: --epochs 1 --pruning_times 1."
        + "".join(f"\nnote: {note}" for note in [*args.notes, *notes_on_steps(args, train_images)])
    )


def _state_zero(args: argparse.Namespace) -> str:
    """A line where state 0 is of another length than those behind it."""
    epochs = state_epochs(args, 0)
    if epochs == run_length(args)[1]:
        return ""
    return f"state 0: {plural(epochs, 'epoch') if epochs else 'the given weights, which are validated, not trained'}\n"


def notes_on_steps(args: argparse.Namespace, images: int) -> list[str]:
    """What should be said about the steps of an epoch of so many training images."""
    batch = args.batch_size * args.accum_steps
    if images >= 2 * batch:
        return []
    return [
        f"an epoch is one step of {min(batch, images)} of the {images:,} training images; lower --batch_size for more"
    ]


def _check_weights(args: argparse.Namespace) -> None:
    """Raises: RunError, for a file of first weights that is not there."""
    for name in ("pretrained", "init"):
        value = getattr(args, name)
        is_file = isinstance(value, str) and (name == "init" or Path(value).suffix in FILE_SUFFIXES)
        if is_file and not Path(value).is_file():
            raise RunError(f"--{name} {value}: no such file")


def _where(args: argparse.Namespace, resumes: bool) -> str:
    """The folders that the command reads and writes, and what would stop it there."""
    folder, data = target_dir(args), Path(args.data)
    taken = has_run(folder) and not (resumes or args.overwrite)
    line = f"Files in {folder}{', which holds a run: add --resume or --overwrite' if taken else ''}.\n"
    if args.dataset == "digits":  # comes with scikit-learn
        return line
    return f"{line}Data in {data}{'' if data.is_dir() else ', which is not there yet'}.\n"


def _keep(args: argparse.Namespace, state: int) -> tuple[int, int]:
    """How many weights of a group stay in a state of --nm, and how many a group has."""
    keep, group = parse_pattern(args.nm)
    return scheduled_keep(keep, group, args.ratio_schedule, state, run_length(args)[0]), group


def planned_states(args: argparse.Namespace) -> list[dict]:
    """A row a state: density and what its model costs."""
    with torch.device("meta"):
        model = make_model(args, weights=False)
    return _rows(args, model, family_of(model), *units_of_run(args, model))


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
        gone = sum((units[key].count - len(ids)) * unit_weights(model, units[key]) for key, ids in kept.items())
        whole = {DEPTH[args.vit_prune_target]: _left_whole(args, kept)} if allocation.by_branch else {}
        rows.append({"state": state, "density": 1 - gone / prunable, **whole, **family.cost(model, kept)})
    return rows


def _left_whole(args: argparse.Namespace, kept: Kept) -> int:
    """How many blocks or branches have units left."""
    return sum(any(kept[key] for key in keys) for keys in candidates(kept, args.vit_prune_target).values())


def _disk(args: argparse.Namespace, parameters: int, prunable: int) -> float:
    """Bytes: two checkpoints, initial and best weights, those to rewind to, and three mask sets in each checkpoint."""
    moments = (1 if args.opt == "sgd" else 2) + bool(args.ema_decay)
    copies = 2 * (1 + moments) + 2 + (args.prune_type == "rewind_lt")
    return 4 * parameters * copies + 2 * 3 * prunable / 8


def _single_weights(args: argparse.Namespace, model: nn.Module, family: Family, prunable: int, state: int) -> dict:
    """Density and cost of a state whose masks come from the element-wise step, every layer taken as equally dense."""
    left = round(prunable * (1 - args.rate) ** state)
    if args.nm:
        layers = family.prunable_layers(model, args.prune_patch_embed).values()
        left = weights_left((layer.weight.shape for layer in layers), *_keep(args, state))
    if args.struct in ("refill", "rsst") and state:
        left += round((prunable - left) * args.fillback_rate)
    cost = family.cost(model, {})
    return {"density": left / prunable, **cost, "parameters": cost["parameters"] - (prunable - left)}
