"""Checks of a whole command, before any work starts.

The table (`settings/flags.py`) has the checks of each flag: type, range, the flag that it belongs to, and the values of
others that it cannot work with. This module has those that need files, processes or several flags at once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import models
from deployment.exported import check_folder
from engine.allocation import read_counts
from engine.distill import SELF
from engine.model import run_length
from engine.optimizer import milestones_of
from engine.processes import world_size
from engine.run_folder import named_dir
from engine.shape import check_arch
from pruning.depth import DEPTH
from pruning.nm import parse_pattern
from reporting.words import plural
from settings import effect
from settings.effect import TARGETS, takes_all, target_of
from settings.flag import check_clashes, check_values, require
from settings.flags import FLAGS, SEARCH, SENSITIVITY, SORTING, idle_flags
from utils import RunError


def check_and_complete(args: argparse.Namespace, given: dict) -> list[str]:
    """Fill in values that were not given and refuse what cannot work; returns notes for the log.

    Args:
        given: the flags on the command line, by name.

    Raises:
        RunError: naming the flag, its value and what to do.
    """
    check_arch(args.arch)
    check_values(FLAGS.values(), args)
    _check_allocation(args, given)
    milestones_of(args)  # raises
    check_clashes(FLAGS.values(), args)
    _check_pattern(args)
    _check_teacher(args)
    _check_processes(args)
    return _notes(args, given)


def check_model_folder(args: argparse.Namespace) -> None:
    """Refuse a folder whose model/ holds files of other programs, which the run would overwrite at its end."""
    folder = args.save_dir or (args.exp_name and named_dir(args.exp_name))
    if folder and (args.export or args.overwrite):
        check_folder(Path(folder) / "model", "--save_dir" if args.save_dir else "--exp_name")


def check_search(args: argparse.Namespace) -> None:
    """Refuse flags that a search cannot work with."""
    check_values(SEARCH, args)
    if args.search is None:
        return
    refused = {
        "resume": "the same command resumes a search and its unfinished trials",
        "checkpoint": "every trial starts from the beginning",
        "overwrite": "a search continues with the trials in its folder; choose another --save_dir",
        "finish_on_all": "it leaves no validation images to compare trials on",
    }
    for name, reason in refused.items():
        if getattr(args, name):
            raise RunError(f"--{name}: cannot be combined with --search: {reason}; leave it out")
    if not (args.save_dir or args.exp_name):
        raise RunError(f"--search {args.search}: needs --save_dir DIR or --exp_name NAME, so that it can be resumed")
    if args.search_objective == "latency" and not args.export:
        raise RunError("--search_objective latency: needs the small model; leave --no-export out")
    if world_size() > 1:
        raise RunError(f"--search {args.search}: does not run under torchrun; start the same command several times")


def _check_pattern(args: argparse.Namespace) -> None:
    if args.nm is None:
        return
    try:
        parse_pattern(args.nm)
    except ValueError as error:
        raise RunError(f"--nm {args.nm}: {error}") from error


def _check_allocation(args: argparse.Namespace, given: dict) -> None:
    """Check the flags that say how many units are kept; reads a file's counts into `unit_counts`, for resumed runs."""
    targets, target, how = [t for t in TARGETS if getattr(args, t)], target_of(vars(args)), args.ratio_allocation
    if len(targets) > 1:
        other = f"--{targets[1]} {getattr(args, targets[1]):g}"
        raise RunError(f"{other}: a run can have only one target; leave it or --{target} out")
    if target and args.pruning_times == 1 and args.struct != "dense" and not getattr(args, "resumed_from", None):
        raise RunError(
            f"--{target} {getattr(args, target):g}: --pruning_times 1 has state 0 alone, and the first pruning "
            "comes before state 1; give 2 or more"
        )
    args.unit_counts = getattr(args, "unit_counts", None)
    whole, by = args.vit_structured and args.vit_prune_target in DEPTH, target or (how and "ratio_allocation")
    if whole and by:
        raise RunError(
            f"--{by} {getattr(args, by)}: --vit_prune_target {args.vit_prune_target} is set by --rate only; use all"
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
    even = f"cannot be split evenly over {size} processes; give a multiple of {size}"
    require(args.batch_size % size == 0, "--batch_size", args.batch_size, even)
    if size > 1 and args.compile not in (None, "default"):
        raise RunError(
            f"--compile {args.compile}: captures whole steps, but {size} processes exchange gradients within a step; "
            "use --compile default"
        )


def _check_teacher(args: argparse.Namespace) -> None:
    if args.teacher is None:
        return
    if args.teacher.startswith(models.TIMM):
        try:
            models.check_arch(args.teacher)
        except ValueError as error:
            raise RunError(f"--teacher {args.teacher}: {error}") from error
    elif args.teacher != SELF and not os.path.exists(args.teacher):
        raise RunError(f"--teacher {args.teacher}: no such file or folder; give self, a path or timm/NAME")


def _notes(args: argparse.Namespace, given: dict) -> list[str]:
    """Notes on flags that have no effect, and on unusual learning-rate schedules."""
    late = [epoch for epoch in milestones_of(args) if epoch >= args.epochs]
    notes = [f"--decreasing_lr: epoch {epoch} lies beyond the last of {args.epochs}" for epoch in late]
    length = run_length(args)[1]
    if args.warmup > length:
        state = f"the {plural(length, 'epoch')} of a state"
        notes.append(f"--warmup {args.warmup}: longer than {state}; lr never reaches its full value")
    elif args.warmup == length:
        notes.append(f"--warmup {args.warmup}: all epochs of a state; lr rises to its last step and never falls")
    idle = idle_flags({**vars(args), **given})
    notes += [
        f"{FLAGS[name].option}: has no effect {idle[name]}"
        for name in given
        if name in idle and idle[name] != effect.DENSE  # one note below says that for all flags
    ]
    if "gpu" in given and world_size() > 1:
        notes.append("--gpu: has no effect under torchrun, which gives each process its own GPU")
    if effect.prunes(vars(args)):
        notes.append("nothing is pruned in this run: it trains dense")
    return notes
