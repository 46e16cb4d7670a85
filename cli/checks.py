"""Rules between flags: values as parsed in, complete ones out; what cannot work ends in one line, before any work.

What concerns one flag alone, its type, its range and the flag that it belongs to, stands in the table
(`settings/flags.py`).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import models
from deployment.folder import check_folder
from engine.allocation import read_counts
from engine.distill import SELF
from engine.folder import named_dir
from engine.model import run_length, state_epochs
from engine.optimizer import milestones_of
from engine.processes import world_size
from engine.shape import check_arch
from pruning.depth import DEPTH
from pruning.nm import parse_pattern
from reporting.words import plural
from settings import effect
from settings.effect import TARGETS, takes_all, target_of
from settings.flag import check_values, require
from settings.flags import FLAGS, GRAPHS, SEARCH, SENSITIVITY, SORTING, idle_flags
from utils import RunError


def check_and_complete(args: argparse.Namespace, given: dict) -> list[str]:
    """Fill in what is left to itself, refuse what cannot work; returns notes for the log.

    Args:
        given: the flags that were given by hand, by name.

    Raises:
        RunError: naming the flag, the value and the way out.
    """
    check_arch(args.arch)
    resumes = bool(getattr(args, "resumed_from", None))
    tunes = 0 in (args.dense_epochs, args.epochs) and "prune_type" not in given and not resumes
    if tunes:
        args.prune_type = "finetune"
    check_values(FLAGS.values(), args)
    _check_allocation(args, given)
    _check_combinations(args)
    _check_processes(args)
    notes = _notes(args, given)
    if tunes and not effect.prunes(vars(args)):
        notes.append("states go on from what is trained already (--prune_type finetune), as no other start was given")
    return notes


def check_model_folder(args: argparse.Namespace) -> None:
    """Refuse a run's folder whose model/ holds files of others, which the run would replace at its end."""
    folder = args.save_dir or (args.exp_name and named_dir(args.exp_name))
    if folder and (args.export or args.overwrite):
        check_folder(Path(folder) / "model", "--save_dir" if args.save_dir else "--exp_name")


def check_search(args: argparse.Namespace) -> None:
    """What a search cannot do together with other flags."""
    check_values(SEARCH, args)
    if args.search is None:
        return
    refused = {
        "resume": "the same command goes on with a search, and with the trials that it has begun",
        "checkpoint": "every trial starts anew",
        "overwrite": "a search goes on with what its folder holds; choose another --save_dir",
        "finish_on_all": "leaves no images on which trials could be compared",
    }
    for name, reason in refused.items():
        if getattr(args, name):
            raise RunError(f"--{name}: has no place beside --search: {reason}; leave it out")
    if not (args.save_dir or args.exp_name):
        raise RunError(
            f"--search {args.search}: needs --save_dir DIR or --exp_name NAME, where the same command goes on"
        )
    if args.search_objective == "latency" and not args.export:
        raise RunError("--search_objective latency: measures the small model; leave --no-export out")
    if world_size() > 1:
        raise RunError(
            f"--search {args.search}: is no work for torchrun; start the same command once for each process instead"
        )


def _check_combinations(args: argparse.Namespace) -> None:
    if args.prune_type == "rewind_lt":
        flag = "--epochs" if args.dense_epochs is None else "--dense_epochs"
        require(args.rewind_epoch < state_epochs(args, 0), "--rewind_epoch", args.rewind_epoch, f"must be below {flag}")
    if args.prune_type == "pt" and not args.pretrained:
        raise RunError("--prune_type pt: rewinds to pretrained weights; give --pretrained or choose another type")
    milestones_of(args)  # raises
    if args.min_lr is not None and args.sched != "cosine":
        raise RunError(f"--min_lr {args.min_lr}: is where a cosine ends; add --sched cosine")
    lowest = [("lr", args.lr), *([("finish_lr", args.finish_lr)] if args.finish_epochs else [])]
    for name, rate in lowest:
        fits = args.min_lr is None or args.min_lr <= rate
        require(fits, f"--{name}", rate, f"must not lie below --min_lr {args.min_lr}, where the cosine ends")
    if args.reg_form == "decay" and args.reg_clock:
        raise RunError(f"--reg_clock {args.reg_clock}: belongs to --reg_form gradient; decay has one ramp a state")
    _check_untrained(args)
    if args.repair in ("mean", "ls") and args.prune_type != "finetune" and not effect.prunes(vars(args)):
        raise RunError(
            f"--repair {args.repair}: changes the weights that stay, which --prune_type {args.prune_type} takes back "
            "when it rewinds; add --prune_type finetune"
        )
    _check_teacher(args)
    _check_pattern(args)
    for name, value in (("allow_partial", ""), ("preprocessing", "model")):
        if getattr(args, name) and value in ("", getattr(args, name)) and not (args.init or args.pretrained):
            raise RunError(f"--{name} {value}".rstrip() + ": is about weights that a run starts from; add --pretrained")
    if args.layer_scale and args.pretrained:
        raise RunError(
            f"--layer_scale {args.layer_scale}: pretrained weights were trained without; leave one of them out"
        )
    if args.drop_path and args.compile in GRAPHS:
        raise RunError(
            f"--drop_path {args.drop_path}: drops other branches in every step, and --compile {args.compile} captures "
            "one; use --compile default"
        )
    if args.layer_decay is not None and args.struct == "rsst" and args.reg_form == "gradient":
        raise RunError(
            f"--layer_decay {args.layer_decay}: the dose of --reg_form gradient goes by the learning rate, which would "
            "differ from layer to layer; use --reg_form decay"
        )
    if (
        args.rank_by == "score_per_mac"
        and not takes_all(vars(args))
        and not (args.sorting_mode == "global" and args.vit_prune_target == "both")
    ):
        raise RunError(
            "--rank_by score_per_mac: compares heads with neurons; add --sorting_mode global --vit_prune_target both"
        )


def _check_untrained(args: argparse.Namespace) -> None:
    """States without epochs: what they start from has to be trained already."""
    flag = f"--dense_epochs {args.dense_epochs}" if args.dense_epochs == 0 else f"--epochs {args.epochs}"
    if args.struct != "dense" and state_epochs(args, 0) == 0 and not (args.pretrained or args.init):
        ways = "give trained weights by --pretrained or --init"
        raise RunError(f"{flag}: state 0 does not train; {ways}{', or --dense_epochs N' if not args.epochs else ''}")
    if args.epochs:
        return
    if args.struct == "dense":
        raise RunError("--epochs 0: --struct dense does nothing but train; give 1 or more")
    if effect.prunes(vars(args)):
        return
    if args.struct == "rsst":
        raise RunError(
            "--epochs 0: RSST's penalty acts while a state trains; give 1 or more, or --struct refill, imp or oneshot"
        )
    if args.prune_type != "finetune":
        raise RunError(
            f"--epochs 0: weights that --prune_type {args.prune_type} takes back must train again; use finetune"
        )


def _check_pattern(args: argparse.Namespace) -> None:
    if args.nm is None:
        return
    try:
        parse_pattern(args.nm)
    except ValueError as error:
        raise RunError(f"--nm {args.nm}: {error}") from error
    if args.vit_structured:
        raise RunError(f"--nm {args.nm}: is a pattern of single weights; leave it or --vit_structured out")
    if args.fillback_rate:
        raise RunError(f"--fillback_rate {args.fillback_rate}: would fill groups beyond --nm {args.nm}; leave it out")


def _check_allocation(args: argparse.Namespace, given: dict) -> None:
    """What says how many units stay; a file's counts go along as `unit_counts`, so that a resumed run has them."""
    targets, target = [name for name in TARGETS if getattr(args, name)], target_of(vars(args))
    how = args.ratio_allocation
    if len(targets) > 1:
        raise RunError(
            f"--{targets[1]} {getattr(args, targets[1]):g}: a run has one target; leave it or --{target} out"
        )
    if target and args.pruning_times == 1 and args.struct != "dense" and not getattr(args, "resumed_from", None):
        raise RunError(
            f"--{target} {getattr(args, target):g}: nothing is pruned before state 1, and --pruning_times 1 has "
            "state 0 alone; give 2 or more"
        )
    args.unit_counts = getattr(args, "unit_counts", None)
    whole, asked = args.vit_structured and args.vit_prune_target in DEPTH, target or (how and "ratio_allocation")
    if whole and asked:
        raise RunError(
            f"--{asked} {getattr(args, asked)}: --vit_prune_target {args.vit_prune_target} goes by --rate; use all"
        )
    if takes_all(vars(args)):
        if how not in (None, "global"):
            raise RunError(f"--ratio_allocation {how}: --vit_prune_target all ranks all layers together; leave it out")
        args.sorting_mode = "global"
        return
    if how in SORTING:
        args.sorting_mode = args.sorting_mode if "sorting_mode" in given else SORTING[how]
        if args.sorting_mode != SORTING[how]:
            raise RunError(f"--ratio_allocation {how}: contradicts --sorting_mode {args.sorting_mode}; leave one out")
    elif how not in (None, SENSITIVITY):
        if target:
            raise RunError(f"--ratio_allocation {how}: its counts leave no choice to --{target}; leave one of them out")
        args.unit_counts = args.unit_counts or read_counts(how)


def _check_processes(args: argparse.Namespace) -> None:
    size = world_size()
    shared = f"cannot be shared by {size} processes, each of which takes as many images"
    require(args.batch_size % size == 0, "--batch_size", args.batch_size, f"{shared}; give a multiple of {size}")
    if size > 1 and args.compile not in (None, "default"):
        raise RunError(
            f"--compile {args.compile}: captures steps whole, and {size} processes exchange gradients in the middle of "
            "one; use --compile default"
        )


def _check_teacher(args: argparse.Namespace) -> None:
    if args.teacher is None:
        return
    if args.kd_hard and args.kd_temperature is not None:
        raise RunError(f"--kd_temperature {args.kd_temperature}: a label has none; leave it or --kd_hard out")
    if args.teacher == SELF and (args.pruning_times == 1 or args.struct == "dense") and not args.finish_epochs:
        raise RunError("--teacher self: state 0 teaches later states, and this run has none; leave it out")
    if args.teacher.startswith(models.TIMM):
        try:
            models.check_arch(args.teacher)
        except ValueError as error:
            raise RunError(f"--teacher {args.teacher}: {error}") from error
    elif args.teacher != SELF and not os.path.exists(args.teacher):
        raise RunError(f"--teacher {args.teacher}: no such file or folder; give self, a path or timm/NAME")


def _notes(args: argparse.Namespace, given: dict) -> list[str]:
    """What should be said about flags that have no effect."""
    usual = args.epochs or args.dense_epochs or 0
    late = [epoch for epoch in milestones_of(args) if epoch >= usual]
    notes = [f"--decreasing_lr: epoch {epoch} lies beyond the last of {usual}" for epoch in late]
    length = run_length(args)[1]
    if not length:
        pass
    elif args.warmup > length:
        notes.append(
            f"--warmup {args.warmup}: longer than the {plural(length, 'epoch')} of a state; lr never gets full"
        )
    elif args.warmup == length:
        notes.append(f"--warmup {args.warmup}: all epochs of a state; lr rises to its last step and never falls")
    idle = idle_flags({**vars(args), **given})
    told = [name for name in given if name in idle and idle[name] != effect.DENSE]  # that has a note of its own
    notes += [f"{FLAGS[name].option}: has no effect {idle[name]}" for name in told]
    if "gpu" in given and world_size() > 1:
        notes.append("--gpu: has no effect under torchrun, which gives each process a GPU of its own")
    if args.criteria == "obs" and args.repair not in ("mean", "ls"):
        notes.append("--criteria obs: scores what is left once a repair has taken over, and this run does not repair")
    if effect.prunes(vars(args)):
        notes.append("nothing is pruned in this run: it trains dense")
    return notes
