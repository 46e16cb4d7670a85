"""Checks: flags as parsed in, complete ones out; what cannot work ends here in one line, before any work."""

from __future__ import annotations

import argparse
import math
import os
import re

import models
from dataset import DATASETS
from engine.allocation import LATENCY, SORTING, TARGETS, allocates, read_counts, takes_all, target_of
from engine.capture import GRAPHS
from engine.distill import SELF, wants_teacher
from engine.optimizer import milestones_of
from engine.processes import world_size
from engine.sensitivity import SENSITIVITY
from engine.shape import check_arch
from pruning.depth import DEPTH
from pruning.nm import parse_pattern
from pruning.scores import CRITERIA
from utils import RunError

BY_LAYER = ("mlp_prune_ratio", "sorting_mode", "min_units", "round_to")  # without effect where whole branches go
ONLY_STRUCTURED = ("vit_prune_target", "mlp_prune_ratio", "sorting_mode", "ratio_schedule", "rank_by", "min_units")
OF_RATIOS = ("rate", "mlp_prune_ratio", "rank_by")


def check_and_complete(args: argparse.Namespace, given: dict) -> list[str]:
    """Fill in what is left to itself, refuse what cannot work; returns notes for the log.

    Args:
        given: the flags that were given by hand, by name.

    Raises:
        RunError: naming the flag, the value and the way out.
    """
    _check_names(args)
    _check_numbers(args)
    _complete(args)
    _complete_allocation(args, given)
    _check_combinations(args)
    _check_processes(args)
    return _notes(args, given)


def check_search(args: argparse.Namespace) -> None:
    """What a search cannot do together with other flags."""
    if args.search is None:
        for name in ("search_space", "search_objective", "search_patience"):
            if getattr(args, name) is not None:
                raise RunError(f"--{name} {getattr(args, name)}: belongs to --search, which says how many trials")
        return
    require(args.search >= 1, "--search", args.search, "must be 1 or more")
    args.search_patience = 5 if args.search_patience is None else args.search_patience
    require(args.search_patience >= 0, "--search_patience", args.search_patience, "must be 0 or more")
    refused = {
        "--resume": "the same command goes on with a search, and with the trials that it has begun",
        "--checkpoint": "every trial starts anew",
        "--overwrite": "a search goes on with what its folder holds; choose another --save_dir",
        "--finish_on_all": "leaves no images on which trials could be compared",
    }
    for flag, reason in refused.items():
        if getattr(args, flag.removeprefix("--")):
            raise RunError(f"{flag}: has no place beside --search: {reason}; leave it out")
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


def require(fine: bool, flag: str, value, way_out: str) -> None:
    if not fine:
        raise RunError(f"{flag} {value}: {way_out}")


def _check_names(args: argparse.Namespace) -> None:
    require(args.dataset in DATASETS, "--dataset", args.dataset, f"unknown; choose from {', '.join(DATASETS)}")
    check_arch(args.arch)
    check_run_name(args)


def check_run_name(args: argparse.Namespace) -> None:
    if args.exp_name is not None:
        plain = args.exp_name not in ("", ".", "..") and not re.search(r"[/\\\0]", args.exp_name)
        require(plain, "--exp_name", args.exp_name, "must be the plain name of a folder, which results/ will hold")


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("epochs", "batch_size", "accum_steps", "pruning_times", "print_freq", "score_batches", "round_to"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "must be 1 or more")
    for name in ("workers", "gpu", "min_units", "seed", "token_merge"):
        require(getattr(args, name) >= 0, f"--{name}", getattr(args, name), "must be 0 or more")
    require(args.seed < 2**63, "--seed", args.seed, "must be below 2^63")
    if args.checkpoint_every is not None:
        sensible = re.fullmatch(r"[1-9]\d*m?", args.checkpoint_every)
        require(bool(sensible), "--checkpoint_every", args.checkpoint_every, "give steps (500) or minutes (10m)")
    for name in ("img_size", "patch_size", "train_limit", "finish_epochs"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name}", value, "must be 1 or more")
    for name in ("rate", "mlp_prune_ratio", "label_smoothing", "momentum"):
        value = getattr(args, name)
        require(value is None or 0 <= value < 1, f"--{name}", value, "must lie in [0, 1)")
    for name in ("lr", "finish_lr", "reg_granularity_prune", "exponents", "clip_grad"):
        value = getattr(args, name)
        require(value is None or 0 < value < math.inf, f"--{name}", value, "must be a number above 0")
    _check_recipe_numbers(args)
    require(0 <= args.weight_decay < math.inf, "--weight_decay", args.weight_decay, "must be 0 or more")
    require(0 <= args.fillback_rate <= 1, "--fillback_rate", args.fillback_rate, "must lie in [0, 1]")
    require(0 < args.val_fraction < 1, "--val_fraction", args.val_fraction, "must lie in (0, 1)")


def _check_recipe_numbers(args: argparse.Namespace) -> None:
    for name in ("mixup", "cutmix"):
        value = getattr(args, name)
        require(value is None or 0 <= value < math.inf, f"--{name}", value, "must be 0, for off, or more")
    require(args.drop_path is None or 0 <= args.drop_path < 1, "--drop_path", args.drop_path, "must lie in [0, 1)")
    require(args.ema_decay is None or 0 <= args.ema_decay < 1, "--ema_decay", args.ema_decay, "must lie in [0, 1)")
    value = args.layer_scale
    require(value is None or 0 <= value < math.inf, "--layer_scale", value, "must be 0, for off, or more")
    require(args.min_lr is None or 0 <= args.min_lr <= args.lr, "--min_lr", args.min_lr, "must lie in [0, --lr]")
    require(
        args.layer_decay is None or 0 < args.layer_decay <= 1, "--layer_decay", args.layer_decay, "must lie in (0, 1]"
    )


def _complete(args: argparse.Namespace) -> None:
    """What is left to itself scales with the epochs or follows from other flags."""
    if args.criteria is None:
        args.criteria = "magnitude" if args.struct == "imp" and args.vit_structured else "l1"
    require(args.criteria in CRITERIA, "--criteria", args.criteria, f"unknown; choose from {', '.join(CRITERIA)}")
    args.warmup = args.epochs // 6 if args.warmup is None else args.warmup
    require(args.warmup >= 0, "--warmup", args.warmup, "must be 0 or more")
    args.rewind_epoch = args.epochs // 5 if args.rewind_epoch is None else args.rewind_epoch
    require(args.rewind_epoch >= 0, "--rewind_epoch", args.rewind_epoch, "must be 0 or more")
    if args.decreasing_lr is None:
        args.decreasing_lr = ",".join(map(str, sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})))
    if args.finish_epochs and args.finish_lr is None:
        args.finish_lr = args.lr
    if args.reg_finish is None:
        args.reg_finish = 1.0 if args.reg_form == "gradient" else 0.25


def _check_combinations(args: argparse.Namespace) -> None:
    if args.prune_type == "rewind_lt":
        require(args.rewind_epoch < args.epochs, "--rewind_epoch", args.rewind_epoch, "must be below --epochs")
    if args.prune_type == "pt" and not args.pretrained:
        raise RunError("--prune_type pt: rewinds to pretrained weights; give --pretrained or choose another type")
    milestones_of(args)  # raises
    if args.min_lr is not None and args.sched != "cosine":
        raise RunError(f"--min_lr {args.min_lr}: is where a cosine ends; add --sched cosine")
    _check_finish(args)
    require(0 < args.reg_finish <= 1, "--reg_finish", args.reg_finish, "must lie in (0, 1]")
    if args.reg_form == "decay" and args.reg_clock:
        raise RunError(f"--reg_clock {args.reg_clock}: belongs to --reg_form gradient; decay has one ramp a state")
    _check_teacher(args)
    _check_pattern(args)
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
        and not takes_all(args)
        and not (args.sorting_mode == "global" and args.vit_prune_target == "both")
    ):
        raise RunError(
            "--rank_by score_per_mac: compares heads with neurons; add --sorting_mode global --vit_prune_target both"
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


def _complete_allocation(args: argparse.Namespace, given: dict) -> None:
    """What says how many units stay; a file's counts go along as `unit_counts`, so that a resumed run has them."""
    for name in ("target_macs", "target_params"):
        value = getattr(args, name)
        require(value is None or 0 < value < 1, f"--{name}", value, "must lie in (0, 1)")
    value, batch = args.target_latency_ms, args.latency_batch
    require(value is None or 0 < value < math.inf, f"--{LATENCY}", value, "must be a number above 0")
    require(batch is None or batch >= 1, "--latency_batch", batch, "must be 1 or more")
    targets, target, how = [name for name in TARGETS if getattr(args, name)], target_of(args), args.ratio_allocation
    if len(targets) > 1:
        raise RunError(
            f"--{targets[1]} {getattr(args, targets[1]):g}: a run has one target; leave it or --{target} out"
        )
    if batch is not None and value is None:
        raise RunError(f"--latency_batch {batch}: belongs to --{LATENCY}, which it is measured for")
    args.latency_batch = 1 if value is not None and batch is None else batch
    args.unit_counts = getattr(args, "unit_counts", None)
    whole, asked = args.vit_structured and args.vit_prune_target in DEPTH, target or (how and "ratio_allocation")
    if whole and asked:
        raise RunError(
            f"--{asked} {getattr(args, asked)}: --vit_prune_target {args.vit_prune_target} goes by --rate; use all"
        )
    if takes_all(args):
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


def _check_finish(args: argparse.Namespace) -> None:
    if args.finish_epochs is None:
        if args.finish_lr is not None:
            raise RunError(f"--finish_lr {args.finish_lr}: belongs to --finish_epochs, which says for how long")
        if args.finish_on_all:
            raise RunError("--finish_on_all: belongs to --finish_epochs, which says for how long")
    elif args.min_lr is not None:
        fits = args.min_lr <= args.finish_lr
        require(fits, "--finish_lr", args.finish_lr, f"must not lie below --min_lr {args.min_lr}, where it ends")


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
    for name in ("kd_alpha", "kd_temperature", "kd_features"):
        if getattr(args, name) is not None and args.teacher is None:
            raise RunError(f"--{name} {getattr(args, name)}: belongs to --teacher, which says who teaches")
    if args.teacher is None:
        if args.kd_hard:
            raise RunError("--kd_hard: belongs to --teacher, which says who teaches")
        return
    _complete_teacher(args)
    if args.teacher == SELF and (args.pruning_times == 1 or args.struct == "dense") and not args.finish_epochs:
        raise RunError("--teacher self: state 0 teaches later states, and this run has none; leave it out")
    if args.teacher.startswith(models.TIMM):
        try:
            models.check_arch(args.teacher)
        except ValueError as error:
            raise RunError(f"--teacher {args.teacher}: {error}") from error
    elif args.teacher != SELF and not os.path.exists(args.teacher):
        raise RunError(f"--teacher {args.teacher}: no such file or folder; give self, a path or timm/NAME")


def _complete_teacher(args: argparse.Namespace) -> None:
    args.kd_alpha = 0.5 if args.kd_alpha is None else args.kd_alpha
    require(0 <= args.kd_alpha <= 1, "--kd_alpha", args.kd_alpha, "must lie in [0, 1]")
    if args.kd_hard and args.kd_temperature is not None:
        raise RunError(f"--kd_temperature {args.kd_temperature}: a label has none; leave it or --kd_hard out")
    if not args.kd_hard:
        args.kd_temperature = 2.0 if args.kd_temperature is None else args.kd_temperature
        require(0 < args.kd_temperature < math.inf, "--kd_temperature", args.kd_temperature, "must be a number above 0")
    value = args.kd_features
    require(value is None or 0 <= value < math.inf, "--kd_features", value, "must be 0, for off, or more")


def _notes(args: argparse.Namespace, given: dict) -> list[str]:
    """What should be said about flags that have no effect."""
    late = [epoch for epoch in milestones_of(args) if epoch >= args.epochs]
    notes = [f"--decreasing_lr: epoch {epoch} lies beyond the last of {args.epochs}" for epoch in late]
    if args.warmup > args.epochs:
        notes.append(f"--warmup {args.warmup}: longer than the {args.epochs} epochs of a state; lr never gets full")
    allocated = ("ratio_schedule", "min_units") if allocates(args) else ()  # filters go by them then, too
    only = [name for name in ONLY_STRUCTURED if name in given and name not in allocated]
    without_effect = [] if args.vit_structured else only
    if not args.vit_structured and not args.refill:
        without_effect.append("no-refill")
    if args.nm:
        without_effect = [name for name in without_effect if name != "ratio_schedule"]
        if "rate" in given:
            notes.append(f"--rate: --nm {args.nm} says how many weights stay; no effect here")
    notes += [f"--{name}: has no effect without --vit_structured" for name in without_effect]
    notes += _notes_on_allocation(args, given) + _notes_on_depth(args, given)
    if not args.flip and (args.aug == "none" or not DATASETS[args.dataset].flip):
        never = "--aug none" if args.aug == "none" else f"--dataset {args.dataset}"
        notes.append(f"--no-flip: has no effect, {never} never flips")
    if args.fillback_rate and (args.vit_structured or args.struct in ("imp", "dense", "oneshot")):
        notes.append("--fillback_rate: only element-wise refill and rsst give weights back; no effect here")
    if args.stem == "conv" and given.get("patch_embed") == "resample":
        notes.append("--patch_embed resample: a conv stem has no patches to resample; no effect here")
    if args.prune_patch_embed and args.vit_structured:
        notes.append("--prune_patch_embed: heads and neurons have no share in it; no effect here")
    if args.teacher and not wants_teacher(args):
        notes.append(f"--teacher {args.teacher}: --kd_alpha 0 and no --kd_features leave it no share of the loss")
    elif args.kd_hard and not args.kd_alpha:
        notes.append("--kd_hard: has no effect with --kd_alpha 0")
    if "gpu" in given and world_size() > 1:
        notes.append("--gpu: has no effect under torchrun, which gives each process a GPU of its own")
    if args.pruning_times == 1 or args.struct == "dense":
        notes.append("nothing is pruned in this run: it trains dense")
    return notes


def _notes_on_depth(args: argparse.Namespace, given: dict) -> list[str]:
    if args.vit_structured and args.vit_prune_target in DEPTH:
        whole = f"{DEPTH[args.vit_prune_target]} are ranked over the whole model, by --rate alone"
        return [f"--{name}: has no effect, {whole}" for name in BY_LAYER if name in given]
    if not takes_all(args):
        return []
    names = [name for name in ("mlp_prune_ratio", "rank_by") if name in given and not target_of(args)]
    names += ["sorting_mode"] if given.get("sorting_mode") == "layer-wise" else []
    return [f"--{name}: has no effect, all kinds are ranked together by score per cost" for name in names]


def _notes_on_allocation(args: argparse.Namespace, given: dict) -> list[str]:
    if target_of(args) is None and args.unit_counts is None:
        if args.ratio_allocation is not None and not args.vit_structured:
            return ["--ratio_allocation: has no effect without --vit_structured or a target"]
        names = ("sorting_mode", "rank_by") if args.ratio_allocation == SENSITIVITY else ()
        return [f"--{name}: has no effect, layers go by their sensitivity" for name in names if name in given]
    says = f"--{target_of(args)}" if target_of(args) else "the file of --ratio_allocation"
    names = [name for name in OF_RATIOS if name in given]
    if "rate" in names and (args.criteria == "remain" or (args.vit_structured and not args.refill)):
        names.remove("rate")  # single weights go by it
    if args.unit_counts is not None:
        names += [name for name in ("sorting_mode", "round_to") if name in given]
    elif args.ratio_allocation == SENSITIVITY and "sorting_mode" in given:
        names.append("sorting_mode")
    return [f"--{name}: has no effect, {says} says how many units stay" for name in names]
