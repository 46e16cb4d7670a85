"""The plan of `--dry_run`: flags in, what the command would do as text out; no data is read, nothing is written."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from dataset import split_sizes
from engine.allocation import Allocation
from engine.finish import finish_images, finish_steps
from engine.journal import cost_columns
from engine.model import make_model, run_length, units_of_run
from families import Family, family_of
from models.merging import merging_line
from pruning.depth import DEPTH, candidates
from pruning.nm import parse_pattern, scheduled_keep, weights_left
from pruning.units import Kept, count_parameters, unit_weights
from utils import format_table


def plan(args: argparse.Namespace) -> str:
    """Per state density, units, parameters and MACs; steps, images and disk."""
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
            f"then a finish of {args.finish_epochs} epochs x {finish_steps(args, train_images, val_images)} steps of "
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
        f"{args.struct} on {args.arch}, {args.dataset}: {states} states x {epochs} epochs x "
        f"{max(1, train_images // batch)} steps of {min(batch, train_images)} images "
        f"({train_images:,} train, {val_images:,} validate)\n"
        f"{finish}{merging}{count_parameters(model):,} parameters, {prunable:,} of them prunable weights\n\n{table}\n"
        f"{remark}\n"
        f"About {_disk(args, count_parameters(model), prunable) / 1e6:,.0f} MB of disk."
    )


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
