#!/usr/bin/env python
"""Prune a Vision Transformer iteratively: train, prune, rewind, retrain.

    python main_imp_fillback.py --dataset digits --struct rsst --epochs 15 --pruning_times 4 --rate 0.3
    python main_imp_fillback.py --dataset fashionmnist --data /usr/share/datasets/fashion-mnist --img_size 28 \\
        --patch_size 7 --struct rsst --vit_structured --vit_prune_target both --rate 0.3 --mlp_prune_ratio 0.3
    python main_imp_fillback.py --save_dir results/NAME --resume

State 0 trains dense. Before every further state some weights are chosen: Refill cuts them at once, RSST drives them to
zero by a growing penalty while the state trains and cuts them when cutting costs nothing. `--dry_run` shows what a
command would do. What a run leaves behind is described in README.md.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm import tqdm

import export
import models
import report
import rsst
import utils
from dataset import (
    DATASETS,
    Batches,
    DataError,
    FolderBatches,
    Splits,
    dataset_facts,
    load_dataset,
    make_batches,
    split_sizes,
)
from models import BUILDERS
from models.resnet import BUILDERS as RESNETS
from models.vit import PretrainedError
from pruning_utils import (
    classifier_prefix,
    cost_of,
    family,
    filter_count,
    filter_units,
    image_size,
    is_cnn,
    prunable_layers,
    select_filters,
)
from utils import RunError, RunState
from vit_pruning_utils import (
    Masks,
    count_kept,
    density,
    elementwise_step,
    full_masks,
    refill_rows,
    sparsity_report,
    structured_masks,
)
from vit_pruning_utils_head_mlp import KINDS, mark_removed, rank_units, target_ratios, units_report
from vit_structured_pruning import (
    CRITERIA,
    SCORE_BATCHES,
    LayoutError,
    Units,
    count_vit_parameters,
    follower_masks,
    plan_structured,
    remove_units,
    row_units,
    scatter_tensors,
    scheduled_ratio,
    score_units,
    slice_tensors,
    unit_masks,
    unit_weights,
    vit_units,
)

log = utils.logging.getLogger("main")

EVAL_BATCH = 256

# ---------------------------------------------------------------------------------------------------------------- flags


def build_parser() -> utils.OneLineParser:
    parser = utils.OneLineParser(description=__doc__.split("\n\n")[0])

    def switch(group, name: str, text: str, *aliases: str) -> None:
        group.add_argument(name, *aliases, action="store_true", default=False, help=text)

    run = parser.add_argument_group("run")
    run.add_argument("--save_dir", help="folder of the run; results/<run name> when not given")
    run.add_argument("--exp_name", help="replaces the run name")
    run.add_argument("--seed", type=int, default=42, help="of weights and batches; 0 is a seed")
    run.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    run.add_argument("--gpu", type=int, default=0, help="index of the GPU when CUDA is used")
    switch(run, "--resume", "go on from the latest checkpoint of --save_dir, with its flags")
    run.add_argument("--checkpoint", help="go on from this checkpoint file")
    run.add_argument(
        "--checkpoint_every", metavar="N|Nm", help="a checkpoint every N steps or N minutes (10m) besides every epoch"
    )
    switch(run, "--deterministic", "only operations that give the same bits each time; slower on a GPU")
    run.add_argument("--config", metavar="FILE", help="a YAML file of flags; flags given by hand win")
    run.add_argument("--print_freq", type=int, default=200, help="log every so many batches")
    switch(run, "--verbose", "log more: names of tensors, ids of neurons")
    switch(run, "--dry_run", "print the plan (per state: density, units, parameters, MACs; disk) and exit")
    switch(run, "--overwrite", "replace the run that --save_dir holds")
    run.add_argument(
        "--no-export", dest="export", action="store_false", default=True, help="do not write the small model to model/"
    )

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="cifar100", help=f"one of {', '.join(DATASETS)}")
    data.add_argument("--data", default="data", help="folder of the data; downloaded into it when missing")
    data.add_argument("--workers", type=int, default=4, help="processes that read image folders; others need none")
    data.add_argument("--batch_size", type=int, default=128, help="images per forward pass")
    data.add_argument("--img_size", type=int, help="pixels the model sees; the data set's or architecture's own")
    data.add_argument("--val_fraction", type=float, default=0.1, help="share of training images that validate")
    data.add_argument("--train_limit", type=int, help="keep so many training images, balanced by class")
    data.add_argument("--aug", choices=["none", "basic", "strong"], default="basic", help="crop and flip; and more")

    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="vit_tiny", help=f"one of {', '.join(BUILDERS)}, or timm/NAME of a plain ViT")
    model.add_argument("--patch_size", type=int, help="pixels per patch side; the architecture's own when not given")
    model.add_argument(
        "--pretrained",
        "--vit_pretrained",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="start from timm's public weights, or from a .safetensors, .pth or .npz FILE",
    )
    model.add_argument("--pretrained_tag", help="which of timm's public weights, such as augreg_in21k")
    model.add_argument(
        "--patch_embed",
        choices=["resample", "reinit"],
        default="resample",
        help="pretrained patch embedding of another patch size: resample it, or start it anew",
    )
    switch(model, "--pretrained_fallback", "start from random weights when the pretrained ones cannot be had")
    model.add_argument("--init", metavar="FILE", help="initial weights: a state dict of this architecture")

    train = parser.add_argument_group("training (each state anew)")
    train.add_argument("--epochs", type=int, default=120, help="per state")
    train.add_argument("--opt", choices=["sgd", "adamw"], default="sgd", help="optimizer")
    train.add_argument("--lr", type=float, default=0.01, help="learning rate after the warm-up")
    train.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    train.add_argument("--weight_decay", type=float, default=1e-4, help="on weight matrices, not biases and norms")
    train.add_argument("--warmup", type=int, help="epochs of linear warm-up, per step; epochs // 6 when not given")
    train.add_argument("--sched", choices=["multistep", "cosine"], default="multistep", help="learning-rate schedule")
    train.add_argument("--decreasing_lr", help="epochs at which lr is divided by 10; 1/2 and 3/4 when not given")
    train.add_argument("--clip_grad", type=float, help="largest L2 norm of the gradient; off when not given")
    train.add_argument("--label_smoothing", type=float, default=0.0, help="of the cross entropy, in [0, 1)")
    train.add_argument("--accum_steps", type=int, default=1, help="forward passes per optimizer step")
    train.add_argument(
        "--compile",
        nargs="?",
        const="default",
        default=None,
        choices=["default", "reduce-overhead", "max-autotune", *utils.GRAPHS],
        help="train with torch.compile in one of its modes; graph: capture the whole step as a CUDA graph, bit for bit "
        "what it is without; compiled-graph: both",
    )
    train.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast precision")

    prune = parser.add_argument_group("pruning")
    prune.add_argument(
        "--struct",
        choices=["rsst", "refill", "imp", "oneshot", "dense"],
        default="rsst",
        help="rsst: penalty first, cut later; refill: cut at once; imp: element-wise lottery ticket; oneshot: remove "
        "all units after state 0; dense: no pruning, one schedule over all states",
    )
    prune.add_argument("--pruning_times", type=int, default=20, help="states S; there are S - 1 prunings between them")
    prune.add_argument("--rate", type=float, default=0.2, help="of the weights left, per state; heads: of all heads")
    prune.add_argument(
        "--prune_type",
        choices=["lt", "rewind_lt", "pt", "finetune"],
        default="lt",
        help="a state starts from: initial weights, weights after --rewind_epoch, pretrained ones, trained ones",
    )
    prune.add_argument("--rewind_epoch", type=int, help="epoch of state 0 that rewind_lt returns to; epochs // 5")
    prune.add_argument("--criteria", help=f"score of a unit: {', '.join(CRITERIA)}; l1 when not given")
    prune.add_argument("--score_batches", type=int, default=SCORE_BATCHES, help="training batches that scores see")
    prune.add_argument("--fillback_rate", type=float, default=0.0, help="element-wise refill: share given back a layer")
    switch(prune, "--prune_patch_embed", "the patch embedding is prunable too, element-wise", "--conv1")
    switch(prune, "--fc", "the classifier rewinds too")
    switch(prune, "--vit_structured", "prune whole heads and neurons")
    prune.add_argument("--vit_prune_target", choices=list(KINDS), default="head", help="which units go")
    prune.add_argument("--mlp_prune_ratio", type=float, help="share of all neurons that goes; --rate when not given")
    prune.add_argument(
        "--sorting_mode", choices=["layer-wise", "global"], default="layer-wise", help="rank in a layer or over all"
    )
    prune.add_argument(
        "--ratio_schedule",
        choices=["geometric", "linear", "constant"],
        default="geometric",
        help="how the shares of units grow over the states; the last pruning reaches them",
    )
    prune.add_argument(
        "--rank_by",
        choices=["score", "score_per_mac"],
        default="score",
        help="score_per_mac ranks heads and neurons together by cost; needs global sorting and target both",
    )
    prune.add_argument("--min_units", type=int, default=1, help="units a layer keeps at least; 0 may empty it")
    prune.add_argument(
        "--no-refill",
        dest="refill",
        action="store_false",
        default=True,
        help="surviving units keep the element-wise mask instead of being whole",
    )
    prune.add_argument(
        "--compact_training",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the physically smaller network once units are cut (structured runs)",
    )

    penalty = parser.add_argument_group("rsst")
    penalty.add_argument(
        "--RST_schedule", choices=list(rsst.SHAPES), default="exp_custom_exponents", help="shape of lambda over time"
    )
    penalty.add_argument("--reg_granularity_prune", type=float, default=1.0, help="strength g: lambda ends at g")
    penalty.add_argument("--exponents", type=float, default=4.0, help="p of exp_custom_exponents")
    penalty.add_argument(
        "--reg_form",
        choices=["decay", "gradient"],
        default="decay",
        help="decay: shrink by exp(-20 g) in all, whatever the learning rate; gradient: add lambda * w to the gradient",
    )
    penalty.add_argument(
        "--reg_clock", choices=["epoch", "state"], help="gradient form: the ramp restarts each epoch (default) or not"
    )
    penalty.add_argument("--reg_finish", type=float, help="share of the state before the cut; 0.25, gradient form 1")
    switch(penalty, "--block_loss_grad", "doomed weights get no gradient from the loss")

    tracking = parser.add_argument_group("tracking")
    tracking.add_argument(
        "--wandb_mode",
        choices=["auto", "online", "offline", "disabled"],
        default="auto",
        help="auto: the environment's WANDB_MODE, or online where credentials exist, else offline",
    )
    tracking.add_argument("--wandb_project", default="RSST", help="Weights & Biases project")
    tracking.add_argument("--wandb_entity", help="user or team of the project")
    return parser


ONLY_STRUCTURED = ("vit_prune_target", "mlp_prune_ratio", "sorting_mode", "ratio_schedule", "rank_by", "min_units")
FREE_ON_RESUME = {
    "workers", "device", "gpu", "print_freq", "verbose", "save_dir", "resume", "checkpoint", "data", "config",
    "checkpoint_every", "wandb_mode", "wandb_project", "wandb_entity", "dry_run", "overwrite",
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with everything left to itself filled in; contradictions end here, before any work.

    `notes` holds what should be said in the log about flags that have no effect.
    """
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        argv = config_flags(parser, argv) + argv
    except RunError as error:
        parser.error(str(error))
    args = parser.parse_args(argv)
    bare = build_parser()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    given = vars(bare.parse_args(argv))

    resumes = args.resume or args.checkpoint
    try:
        if resumes:
            args, given = _resumed_args(parser, args, given), {}
        args.notes = _check_and_complete(args, given)
    except RunError as error:
        parser.error(str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if not resumes:
            raise
        parser.error(f"--resume: {args.checkpoint or args.save_dir} holds no checkpoint of this program ({error})")
    return args


def config_flags(parser: utils.OneLineParser, argv: list[str]) -> list[str]:
    """The flags of the YAML file that `--config` names, to be read before those given by hand."""
    finder = utils.OneLineParser(prog=parser.prog, add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return []
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"--config {path}: {error.strerror}; give a YAML file of flags") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RunError(f"--config {path}: not a YAML file ({error})") from error
    if not isinstance(content, dict):
        raise RunError(f"--config {path}: must hold flags and values such as 'epochs: 120'")
    actions = {action.dest: action for action in parser._actions}
    actions |= {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    flags = []
    for name, value in content.items():
        if name == "pretrained_note":  # args.yaml of a run has it
            continue
        action = actions.get(name) if isinstance(name, str) else None
        if action is None or action.dest == "help" or (action.dest == "config" and value is not None):
            raise RunError(f"--config {path}: unknown flag {name!r}; see --help")
        if value is None:
            continue
        option = action.option_strings[0]
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict) or (action.nargs == 0 and not isinstance(value, bool)):
            raise RunError(f"--config {path}: {name}: {value!r} is not a value of {option}; see --help")
        if isinstance(action, argparse.BooleanOptionalAction):
            flags.append(action.option_strings[value == name.startswith("no-")])
        elif action.nargs == 0:
            # `no-export: true` and `export: false` mean the same
            if value == (action.const if name == action.dest else True):
                flags.append(option)
        elif value is True and action.nargs == "?":
            flags.append(option)
        elif not (value is False and action.nargs == "?"):
            flags.append(f"{option}={value}")
    return flags


def _resumed_args(parser: utils.OneLineParser, args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The flags of the run that goes on, with those of today's that are free to change."""
    if not (args.save_dir or args.checkpoint):
        parser.error("--resume: needs --save_dir DIR or --checkpoint FILE")
    args.save_dir = args.save_dir or str(Path(args.checkpoint).parent)
    if args.checkpoint:
        content = utils.load_tensors(Path(args.checkpoint), "--checkpoint")
    else:
        content = utils.load_checkpoint(Path(args.save_dir))
    stored = content.get("args")
    if not (isinstance(stored, dict) and isinstance(content.get("run"), dict)):
        raise TypeError("no flags, or no state")
    missing = {"arch", "dataset", "struct", "epochs", "pruning_times", "lr", "rate", "seed"} - stored.keys()
    wrong = [action.dest for action in parser._actions if action.dest in stored and not _could_be(action, stored)]
    if missing or wrong:
        raise TypeError(f"flags missing or of a wrong type: {', '.join(sorted(missing) + wrong)}")
    stored = {**{name: parser.get_default(name) for name in vars(args)}, **stored}
    longer = given.get("pruning_times", 0) > stored["pruning_times"]
    grows = stored["vit_structured"] and stored["ratio_schedule"] != "constant"
    free = FREE_ON_RESUME | ({"pruning_times"} if longer and not grows and stored["struct"] != "dense" else set())
    other = [f"--{name} {value}" for name, value in given.items() if name not in free and stored.get(name) != value]
    if other:
        parser.error(f"--resume: the run was started with other flags than {' '.join(other)}; leave them out")
    resumed = argparse.Namespace(**{**vars(args), **stored, **{name: given[name] for name in free if name in given}})
    resumed.save_dir, resumed.resume, resumed.resumed_from = args.save_dir, True, content
    return resumed


def _could_be(action: argparse.Action, stored: dict) -> bool:
    """Whether the value of a stored flag is of a kind that the parser gives it."""
    value = stored[action.dest]
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return action.nargs == "?"
    kinds = {int: int, float: (int, float)}.get(action.type, str)
    return isinstance(value, kinds) and (not action.choices or value in action.choices)


def _check_and_complete(args: argparse.Namespace, given: dict) -> list[str]:
    """Fill in what is left to itself, refuse what cannot work; returns notes for the log."""

    def require(fine: bool, flag: str, value, way_out: str) -> None:
        if not fine:
            raise RunError(f"{flag} {value}: {way_out}")

    require(args.dataset in DATASETS, "--dataset", args.dataset, f"unknown; choose from {', '.join(DATASETS)}")
    try:
        models.check_arch(args.arch)
    except ValueError as error:
        raise RunError(f"--arch {args.arch}: {error}") from error
    for name in ("epochs", "batch_size", "accum_steps", "pruning_times", "print_freq", "score_batches"):
        require(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "must be 1 or more")
    for name in ("workers", "gpu", "min_units", "seed"):
        require(getattr(args, name) >= 0, f"--{name}", getattr(args, name), "must be 0 or more")
    require(args.seed < 2**63, "--seed", args.seed, "must be below 2^63")
    if args.checkpoint_every is not None:
        sensible = re.fullmatch(r"[1-9]\d*m?", args.checkpoint_every)
        require(bool(sensible), "--checkpoint_every", args.checkpoint_every, "give steps (500) or minutes (10m)")
    for name in ("img_size", "patch_size", "train_limit"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name}", value, "must be 1 or more")
    for name in ("rate", "mlp_prune_ratio", "label_smoothing", "momentum"):
        value = getattr(args, name)
        require(value is None or 0 <= value < 1, f"--{name}", value, "must lie in [0, 1)")
    for name in ("lr", "reg_granularity_prune", "exponents", "clip_grad"):
        value = getattr(args, name)
        require(value is None or 0 < value < math.inf, f"--{name}", value, "must be a number above 0")
    require(0 <= args.weight_decay < math.inf, "--weight_decay", args.weight_decay, "must be 0 or more")
    require(0 <= args.fillback_rate <= 1, "--fillback_rate", args.fillback_rate, "must lie in [0, 1]")
    require(0 < args.val_fraction < 1, "--val_fraction", args.val_fraction, "must lie in (0, 1)")

    if args.criteria is None:
        args.criteria = "magnitude" if args.struct == "imp" and args.vit_structured else "l1"
    require(args.criteria in CRITERIA, "--criteria", args.criteria, f"unknown; choose from {', '.join(CRITERIA)}")
    args.warmup = args.epochs // 6 if args.warmup is None else args.warmup
    require(args.warmup >= 0, "--warmup", args.warmup, "must be 0 or more")
    args.rewind_epoch = args.epochs // 5 if args.rewind_epoch is None else args.rewind_epoch
    require(args.rewind_epoch >= 0, "--rewind_epoch", args.rewind_epoch, "must be 0 or more")
    if args.prune_type == "rewind_lt":
        require(args.rewind_epoch < args.epochs, "--rewind_epoch", args.rewind_epoch, "must be below --epochs")
    if args.prune_type == "pt" and not args.pretrained:
        raise RunError("--prune_type pt: rewinds to pretrained weights; give --pretrained or choose another type")
    milestones = _milestones(args)
    if args.reg_finish is None:
        args.reg_finish = 1.0 if args.reg_form == "gradient" else 0.25
    require(0 < args.reg_finish <= 1, "--reg_finish", args.reg_finish, "must lie in (0, 1]")
    if args.reg_form == "decay" and args.reg_clock:
        raise RunError(f"--reg_clock {args.reg_clock}: belongs to --reg_form gradient; decay has one ramp a state")
    if args.struct == "oneshot" and not args.vit_structured:
        way_out = "add --vit_structured"
        if args.arch in RESNETS:
            way_out = f"{args.arch} has filters, use --struct refill or rsst"
        raise RunError(f"--struct oneshot: removes heads and neurons; {way_out}")
    if args.rank_by == "score_per_mac" and not (args.sorting_mode == "global" and args.vit_prune_target == "both"):
        raise RunError(
            "--rank_by score_per_mac: compares heads with neurons; add --sorting_mode global --vit_prune_target both"
        )

    late = [epoch for epoch in milestones if epoch >= args.epochs]
    notes = [f"--decreasing_lr: epoch {epoch} lies beyond the last of {args.epochs}" for epoch in late]
    if args.warmup > args.epochs:
        notes.append(f"--warmup {args.warmup}: longer than the {args.epochs} epochs of a state; lr never gets full")
    idle = [] if args.vit_structured else [name for name in ONLY_STRUCTURED if name in given]
    if not args.vit_structured and not args.refill:
        idle.append("no-refill")
    notes += [f"--{name}: has no effect without --vit_structured" for name in idle]
    if args.fillback_rate and (args.vit_structured or args.struct in ("imp", "dense", "oneshot")):
        notes.append("--fillback_rate: only element-wise refill and rsst give weights back; no effect here")
    if args.prune_patch_embed and args.vit_structured:
        notes.append("--prune_patch_embed: heads and neurons have no share in it; no effect here")
    if args.pruning_times == 1 or args.struct == "dense":
        notes.append("nothing is pruned in this run: it trains dense")
    return notes


def _milestones(args: argparse.Namespace) -> list[int]:
    if args.decreasing_lr is None:
        found = sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})
        args.decreasing_lr = ",".join(map(str, found))
    try:
        found = [int(epoch) for epoch in args.decreasing_lr.split(",") if args.decreasing_lr]
    except ValueError:
        found = [0]
    if any(epoch < 1 for epoch in found) or any(a >= b for a, b in zip(found, found[1:], strict=False)):
        raise RunError(f"--decreasing_lr {args.decreasing_lr}: give increasing epochs such as 60,90")
    return found


# ---------------------------------------------------------------------------------------------------------- the plan


def make_model(args: argparse.Namespace, weights: bool = True) -> nn.Module:
    try:
        return models.from_flags(args, dataset_facts(args.dataset, args.data), weights)
    except (ValueError, PretrainedError) as error:
        raise RunError(str(error)) from error


def plan(args: argparse.Namespace) -> str:
    """What the command would do, from flags alone: no data is read, nothing is written."""
    with torch.device("meta"):
        model = make_model(args, weights=False)
    units = run_units(args, model)
    states, epochs, _ = run_length(args)
    train_images, val_images = split_sizes(args.dataset, args.val_fraction, args.train_limit, args.data)
    batch = args.batch_size * args.accum_steps
    steps = max(1, train_images // batch)
    layers = prunable_layers(model, args.prune_patch_embed)
    prunable = sum(module.weight.numel() for module in layers.values())
    if args.vit_structured and args.struct != "dense":
        ratios = target_ratios(args.vit_prune_target, args.rate, args.mlp_prune_ratio)
        schedule = "constant" if args.struct == "oneshot" else args.ratio_schedule
        rows = plan_structured(model, ratios, states, schedule, args.sorting_mode, args.min_units)
    else:
        rows = [{"state": state, **planned_state(args, model, units, prunable, state)} for state in range(states)]
    weight_bytes = 4 * count_vit_parameters(model)
    optimizer = 1 if args.opt == "sgd" else 2
    disk = weight_bytes * (2 * (1 + optimizer) + 2 + (args.prune_type == "rewind_lt")) + 2 * 3 * prunable / 8
    table = utils.format_table(
        rows, {"state": "state", "density": lambda row: f"{100 * row['density']:.2f}%", **cost_columns(rows[0])}
    )
    remark = ""
    if args.rank_by == "score_per_mac":
        remark = "\nRanked by score per MAC: which units go is up to the scores; the MACs are as above.\n"
    elif units and is_cnn(model):
        remark = "\nHow many filters a layer keeps follows its density; here all layers are taken as equally dense.\n"
    return (
        f"{args.struct} on {args.arch}, {args.dataset}: {states} states x {epochs} epochs x {steps} steps of "
        f"{min(batch, train_images)} images ({train_images:,} train, {val_images:,} validate)\n"
        f"{count_vit_parameters(model):,} parameters, {prunable:,} of them prunable weights\n\n{table}\n"
        f"{remark}\n"
        f"About {disk / 1e6:,.0f} MB of disk."
    )


def run_length(args: argparse.Namespace) -> tuple[int, int, list[int]]:
    """States, epochs per state and milestones; `dense` spends the same epochs in one schedule."""
    if args.struct == "dense":
        return 1, args.epochs * args.pruning_times, [epoch * args.pruning_times for epoch in _milestones(args)]
    return args.pruning_times, args.epochs, _milestones(args)


def run_units(args: argparse.Namespace, model: nn.Module) -> dict[str, Units]:
    """The units that this run removes: heads and neurons if structured, a CNN's filters; none element-wise."""
    if is_cnn(model):
        if args.vit_structured:
            raise RunError(
                f"--vit_structured: {args.arch} has no heads and neurons; "
                "--struct refill and rsst remove a CNN's filters, so leave it out"
            )
        return filter_units(model, args.prune_patch_embed) if args.struct in ("refill", "rsst") else {}
    try:
        units = vit_units(model, KINDS[args.vit_prune_target])
    except LayoutError as error:
        raise RunError(f"--arch {args.arch}: {error}") from error
    if not args.vit_structured:
        return {}
    smallest = min(group.count for group in units.values())
    if args.min_units > smallest:
        raise RunError(f"--min_units {args.min_units}: a layer of {args.arch} has only {smallest} units to prune")
    return units


def planned_state(args: argparse.Namespace, model: nn.Module, units: dict, prunable: int, state: int) -> dict:
    """Density and cost of a state whose masks come from the element-wise step, every layer taken as equally dense."""
    left = round(prunable * (1 - args.rate) ** state)
    if units and state:
        counts = {key: filter_count(group.count, left / prunable, args.fillback_rate) for key, group in units.items()}
        weights = sum(count * unit_weights(model, units[key]) for key, count in counts.items())
        return {"density": weights / prunable, **cost_of(model, {key: range(count) for key, count in counts.items()})}
    if args.struct in ("refill", "rsst") and state:
        left += round((prunable - left) * args.fillback_rate)
    cost = cost_of(model, {})
    return {"density": left / prunable, **cost, "parameters": cost["parameters"] - (prunable - left)}


# ----------------------------------------------------------------------------------------------------------- the loop


class PruneRetrain:
    """One run: its models, data and files, and the loop over states.

    `dense` has the original shapes and holds the weights between states. `model` is what trains: `dense` itself, or
    the smaller network without the units that are cut already.
    """

    def __init__(self, args, device: torch.device, splits: Splits, dense: nn.Module, save_dir: Path):
        self.args, self.device, self.save_dir, self.dense = args, device, save_dir, dense.to(device)
        if is_cnn(dense):
            dense.to(memory_format=torch.channels_last)  # 1.3x as fast for res20s on a CPU (measured)
        self.states, self.epochs, self.milestones = run_length(args)
        self.facts = splits.facts
        batch, facts, workers = args.batch_size * args.accum_steps, splits.facts, args.workers
        self.train_data = make_batches(splits.train, facts, batch, device, args.seed, args.aug, workers)
        self.val_data = make_batches(splits.val, facts, EVAL_BATCH, device, workers=workers)
        self.test_data = make_batches(splits.test, facts, EVAL_BATCH, device, workers=workers)
        self.steps_per_epoch = self.train_data.steps_per_epoch
        self.total_steps = self.steps_per_epoch * self.epochs
        self.precision = utils.pick_precision(args.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        # read and written by every step, hence on the device and never replaced: a captured step knows their addresses
        self.rate = torch.zeros((), dtype=self.dtype, device=device)  # learning rate
        self.sums = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else None, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # all losses so far
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)  # steps of this epoch while that held
        self.units = run_units(args, dense)
        self.model, self.model_kept = self.dense, {}
        self.rewind_weights: dict[str, Tensor] = {}
        self.run = RunState()
        self.signals, self.run_bar = utils.StopSignals(), tqdm(disable=True)
        self.writer = utils.Background()

    # -- the run

    def start(self) -> None:
        """A fresh run: initial weights on disk, nothing pruned."""
        self.keep_for_rewind("init.pt")
        masks = full_masks(self.prunable())
        everything = {key: list(range(group.count)) for key, group in self.units.items()}
        self.run = RunState(masks=masks, target=masks, elementwise=masks, kept=everything, target_kept=everything)
        self.start_tracking()

    def resume(self, content: dict) -> None:
        """Take over where a checkpoint stands; nothing is written before it proves sound."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what does not belong there is refused, not commented
                self.take_over(content)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise RunError(f"--resume: the checkpoint does not fit this run ({reason})") from error

    def take_over(self, content: dict) -> None:
        self.run = RunState.unpack(content["run"], self.device)
        self.check_rows()
        path = self.save_dir / content["rewind_file"]
        self.rewind_weights = utils.load_tensors(path, "--resume")
        self.rewind_file, self.rewind_sha256 = content["rewind_file"], _sha256(path)
        if self.rewind_sha256 != content["rewind_sha256"]:
            raise RunError(f"--resume: {path} is not the file that this run started from")
        self.dense.load_state_dict(content["weights"])
        utils.restore_random_states(content["random"])
        if self.run.begun:
            self.set_up_training()
            # the settings are those of flags and device
            groups, settings = self.optimizer.param_groups, self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": content["moments"], "param_groups": settings})
            self.optimizer.param_groups = groups
            self.settle_moments()
            if content["scaler"]:  # empty unless the run trained in fp16 so far
                self.scaler.load_state_dict(content["scaler"])

    def check_rows(self) -> None:
        """A sound checkpoint has all numbers that later lines and tables need."""
        run = self.run
        if bool(run.step % self.steps_per_epoch) != bool(run.sums):
            raise ValueError("the sums of a broken-off epoch")
        if run.states:
            states_table(run.states)
        for row in run.history:
            float(row["state"] + row["epoch"] + row["val_accuracy"])

    def settle_moments(self) -> None:
        """`load_state_dict` takes moments of any kind, number, shape and layout."""
        expected = {"step", "exp_avg", "exp_avg_sq"} if self.args.opt == "adamw" else {"momentum_buffer"}
        if self.args.opt == "sgd" and not self.args.momentum:
            expected = set()
        for parameter in self.model.parameters():
            moments = self.optimizer.state[parameter]
            if moments.keys() != expected:
                raise ValueError(f"optimizer: moments {', '.join(map(str, moments)) or 'missing'}")
            for name, value in moments.items():
                if value.shape != (torch.Size() if name == "step" else parameter.shape):
                    raise ValueError(f"optimizer: {name} has the shape {tuple(value.shape)}")
                moments[name] = laid_out_like(parameter, value)

    def go_on(self) -> None:
        """What a resumed run writes first: files as they were at the checkpoint."""
        utils.write_flags(self.save_dir, self.args)  # more states, other devices
        utils.write_metrics(self.save_dir, self.run.history)
        self.start_tracking()
        log.info(f"resumed at state {self.run.state}, step {self.run.step} of {self.total_steps}")

    def start_tracking(self) -> None:
        args = self.args
        self.tracker = utils.Tracker(
            args.wandb_mode, self.save_dir, self.run.wandb_id, project=args.wandb_project, entity=args.wandb_entity,
            name=self.save_dir.resolve().name, config=utils.plain_args(args),
        )  # fmt: skip
        self.run.wandb_id = self.tracker.run_id

    def __call__(self) -> None:
        try:
            with self.signals:
                with self.whole_run_bar() as self.run_bar:
                    while self.run.state < self.states:
                        if not self.run.begun:
                            self.begin_state()
                            self.set_up_training()
                        self.train_state()
                        self.end_state()
                        self.signals.check()
                self.finish()
        finally:
            self.train_data.close()
            self.tracker.finish()
            self.writer.wait()

    def finish(self) -> None:
        """All states are trained: tables, the small model, the report."""
        self.writer.wait()
        unreadable = sum(data.unreadable for data in (self.train_data, self.val_data, self.test_data))
        if unreadable:
            log.warning("%d images could not be read and were skipped; their names stand above", unreadable)
        table = states_table(self.run.states)
        log.info("\n%s\n\n%s\n", sparsity_report(self.run.masks, family(self.dense)), table)
        self.hand_over()
        self.report()

    def whole_run_bar(self) -> tqdm:
        """Steps of all states with the time left, on a terminal."""
        total, done = self.states * self.total_steps, self.run.state * self.total_steps + self.run.step
        return tqdm(
            total=total,
            initial=done,
            desc="run",
            unit=" steps",
            position=1,
            leave=False,
            disable=not sys.stdout.isatty(),
        )

    # -- between states: choose, cut or doom, rewind

    def begin_state(self) -> None:
        run, state = self.run, self.run.state
        run.begun, run.step, run.seconds, run.start_norm, run.cut, run.best = True, 0, 0.0, None, {}, {}
        if state == 0 or self.args.struct == "dense":
            return
        if not (self.args.struct == "oneshot" and state > 1):
            run.target, run.target_kept = self.choose_target()
        soft = self.args.struct == "rsst"
        if not soft:
            run.masks, run.kept = run.target, run.target_kept
            # what cutting costs before any retraining: trained weights, new mask
            self.enforce(self.dense, self.parameter_masks(run.masks, run.kept))
            run.cut = {"before": run.history[-1]["val_accuracy"], "after": self.evaluate(self.dense, self.val_data)}
        else:
            # what refill returns comes back now; what is doomed stays until the cut
            run.masks = {name: torch.maximum(mask, run.target[name]) for name, mask in run.masks.items()}
            run.kept = {key: sorted({*ids, *run.target_kept[key]}) for key, ids in run.kept.items()}
        self.rewind()

    def choose_target(self) -> tuple[Masks, dict[str, list[int]]]:
        """Masks and kept units that the coming state ends with, from the trained weights that `dense` holds."""
        args, run, state = self.args, self.run, self.run.state
        weights = self.prunable()

        def score(units: dict) -> dict[str, Tensor]:
            images = self.train_data.sequential(args.score_batches)
            options = {"batches": images, "max_batches": args.score_batches, "seed": args.seed}
            try:
                return score_units(self.dense, units, args.criteria, mask=run.elementwise, **options)
            except ValueError as error:  # activations that overflow
                reason = f"state {state}: the trained network is not finite ({error}); lower --lr or add --clip_grad 1"
                raise RunError(reason, code=1) from error

        if is_cnn(self.dense) and self.units:
            run.elementwise = elementwise_step(weights, run.elementwise, args.rate, state)
            scores = score(self.units)
            kept = select_filters(run.elementwise, scores, args.fillback_rate)
            target = structured_masks(weights, self.units, kept)
            mask_density, trained_density = 100 * density(run.elementwise), 100 * density(target)
            log.info(f"state {state} prunes by {args.criteria}: density {mask_density:.2f}% of single weights,")
            log.info(f"  {trained_density:.2f}% in whole filters")
            log.info(units_report(self.dense, self.units, scores, run.kept, kept, run.masks, target, cost_of))
            return target, kept

        if not args.vit_structured:
            run.elementwise = target = elementwise_step(weights, run.elementwise, args.rate, state)
            if args.fillback_rate and args.struct in ("refill", "rsst"):
                rows = row_units({name: self.dense.get_submodule(name) for name in weights})
                target = refill_rows(target, score(rows), args.fillback_rate)
            mask_density, trained_density = 100 * density(run.elementwise), 100 * density(target)
            log.info(f"state {state} prunes to density {mask_density:.2f}%, trains {trained_density:.2f}%")
            return target, {}

        if args.criteria == "remain" or not args.refill:
            alive = structured_masks(weights, self.units, run.kept)
            run.elementwise = elementwise_step(weights, run.elementwise, args.rate, state, alive)
        scores = mark_removed(score(self.units), run.kept)
        schedule = "constant" if args.struct == "oneshot" else args.ratio_schedule
        ratios = {
            kind: scheduled_ratio(schedule, ratio, state, self.states)
            for kind, ratio in target_ratios(args.vit_prune_target, args.rate, args.mlp_prune_ratio).items()
        }
        kept = rank_units(self.dense, self.units, scores, ratios, args.sorting_mode, args.min_units, args.rank_by)
        target = structured_masks(weights, self.units, kept)
        if not args.refill:
            targeted = {name.rpartition(".")[0] for group in self.units.values() for name in group.parts}
            target = {name: mask * run.elementwise[name] if name in targeted else mask for name, mask in target.items()}
        log.info(f"state {state} prunes by {args.criteria}:")
        log.info(units_report(self.dense, self.units, scores, run.kept, kept, run.masks, target))
        return target, kept

    def rewind(self) -> None:
        """Put `dense` where the next state starts; see --prune_type."""
        if self.args.prune_type == "finetune":
            if self.args.struct == "refill" and not self.units:
                # refilled weights start at zero
                self.enforce(self.dense, {f"{name}.weight": mask for name, mask in self.run.elementwise.items()})
            return
        keep = () if self.args.fc else (classifier_prefix(self.dense),)
        start = {name: value for name, value in self.rewind_weights.items() if not name.startswith(keep)}
        self.dense.load_state_dict(start, strict=False)

    # -- within a state

    def set_up_training(self) -> None:
        """Model, penalty and optimizer for the masks and units enforced now; `dense` holds the weights."""
        args, run = self.args, self.run
        hold = self.parameter_masks(run.masks, run.kept)
        aim = self.parameter_masks(run.target, run.target_kept)
        self.enforce(self.dense, hold)
        doomed = {name: hold.get(name, 1) * (1 - mask) for name, mask in aim.items()}
        removed = any(len(run.kept[key]) < group.count for key, group in self.units.items())
        if removed and (args.compact_training or args.struct == "oneshot"):
            self.model_kept = run.kept
            self.model = remove_units(copy.deepcopy(self.dense), self.units, run.kept)
            if is_cnn(self.model) and self.precision is None:
                # 1.1x as fast as they are cut; in bf16 it would be 0.84x (measured on a CPU)
                self.model.to(memory_format=torch.channels_last)
            hold, doomed = (slice_tensors(masks, self.units, run.kept) for masks in (hold, doomed))
        else:
            self.model, self.model_kept = self.dense, {}
        parameters = dict(self.model.named_parameters())
        held = {name: mask for name, mask in hold.items() if not mask.all()}
        held, doomed = (
            {name: laid_out_like(parameters[name], mask) for name, mask in masks.items()} for masks in (held, doomed)
        )
        # what follows removed units takes no part in training and keeps its values, in full size as in small
        whole = self.dense.state_dict()
        idle = follower_masks(self.units, run.kept, whole)
        self.idle = {name: (mask == 0, whole[name].clone()) for name, mask in idle.items()}
        self.forward = self.model
        if args.compile and args.compile != "graph":
            torch.compiler.reset()  # or the networks of many states pass the limit of recompilations
            mode = "default" if args.compile == "compiled-graph" else args.compile
            self.forward = torch.compile(self.model, mode=mode, dynamic=False)
        self.update = utils.CapturedStep(self.device_step) if args.compile in utils.GRAPHS else self.device_step
        self.held, self.held_masks = [parameters[name] for name in held], list(held.values())
        self.optimizer = make_optimizer(args, self.model, self.rate)
        self.penalty = rsst.Penalty(parameters, doomed, run.start_norm)
        if self.penalty:
            run.start_norm = self.penalty.start_norm
            self.cut_after = rsst.cut_step(self.total_steps, self.steps_per_epoch, args.reg_finish)
            sawtooth = args.reg_form == "gradient" and args.reg_clock != "state"
            period = self.steps_per_epoch if sawtooth else self.cut_after
            strength = args.reg_granularity_prune
            self.ramp = rsst.Ramp(args.RST_schedule, strength, self.cut_after, period, args.exponents)
            self.doses = self.predict_dose()

    def predict_dose(self) -> list[float]:
        """Dose after each step of this state, logged before it trains; empty when it cannot be known."""
        args, ramp = self.args, self.ramp
        if args.reg_form == "decay":
            doses = [ramp.dose(step) for step in range(ramp.steps + 1)]
            log.info(f"rsst: doomed weights shrink by exp(-{doses[-1]:.3g}) in {ramp.steps} steps, then they are cut")
            return doses
        if args.opt == "adamw":
            log.info("rsst: adamw normalises the penalty's gradient, so its dose is unknown; watch the residual")
            return []
        rates = [self.learning_rate(step) for step in range(ramp.steps)]
        doses = rsst.predicted_dose(ramp, rates, args.momentum)
        lethal = next((step for step, dose in enumerate(doses) if dose >= rsst.LETHAL_DOSE), None)
        when = f"it passes {rsst.LETHAL_DOSE:g} at step {lethal} of {ramp.steps}" if lethal else "too little"
        log.info(f"rsst: predicted dose {doses[-1]:.3g} over this state, {when}")
        if lethal is None:
            log.warning(
                f"rsst: a dose below {rsst.LETHAL_DOSE:g} leaves much of the doomed weights; "
                "raise --reg_granularity_prune, --lr or --epochs, or use --reg_form decay"
            )
        return doses

    def train_state(self) -> None:
        run = self.run
        self.clock = self.last_checkpoint = time.perf_counter()
        self.bar = None
        while run.step < self.total_steps:
            epoch, batch = divmod(run.step, self.steps_per_epoch)
            if self.bar is None:
                self.start_epoch(epoch, batch)
            self.train_step(epoch, batch)
            if self.penalty and run.step == self.cut_after:
                self.cut()
            if run.step % self.steps_per_epoch == 0:
                self.end_epoch(epoch)
            elif self.signals.received or self.checkpoint_due():
                self.check_finite()
                run.sums = self.sums.tolist()
                self.sync_dense()
                self.checkpoint()
            self.signals.check()

    def start_epoch(self, epoch: int, batch: int) -> None:
        self.model.train()
        self.sums.copy_(torch.tensor(self.run.sums if batch else [0.0, 0.0], dtype=self.sums.dtype))
        self.finite_steps.zero_()
        self.epoch_started, self.first_batch, self.first_step = time.perf_counter(), batch, self.run.step
        title = f"state {self.run.state} epoch {epoch + 1}/{self.epochs}"
        steps = self.steps_per_epoch
        self.bar = tqdm(
            total=steps, initial=batch, desc=title, unit=" steps", leave=False, disable=not sys.stdout.isatty()
        )

    def train_step(self, epoch: int, batch: int) -> None:
        args, run = self.args, self.run
        images, labels = self.train_data.batch(run.state, epoch, batch)
        rate = self.learning_rate(run.step)
        self.rate.fill_(rate)
        self.strength = 0.0  # lambda
        if self.penalty:
            self.strength = self.ramp.value(run.step + 1)
            decays = args.reg_form == "decay"
            self.penalty.set_(self.ramp.exponent_at(run.step + 1) if decays else self.strength)
        self.update(images.to(self.dtype), labels)
        run.step += 1
        self.bar.update()
        self.run_bar.update()
        if (batch + 1) % args.print_freq == 0:
            self.check_finite()
            mean_loss, accuracy = (self.sums / (batch + 1)).tolist()
            fading = self.penalty_values()
            log.info(
                f"state {run.state} epoch {epoch + 1}/{self.epochs} batch {batch + 1}/{self.steps_per_epoch}"
                f"  loss {mean_loss:.4f}  accuracy {100 * accuracy:.2f}%  lr {rate:.3g}{self.penalty_note(fading)}"
            )
            if batch + 1 < self.steps_per_epoch:  # the last one is logged with its epoch
                values = {"train/loss": mean_loss, "train/accuracy": accuracy, "train/lr": rate}
                self.track(values | fading)

    def device_step(self, images: Tensor, labels: Tensor) -> None:
        """All that the device does for one optimizer step; see `utils.CapturedStep` for what may stand here.

        Args:
            images: [B, 3, H, W], B = batch_size * accum_steps.
            labels: [B].
        """
        args, optimizer = self.args, self.optimizer
        parts = zip(images.chunk(args.accum_steps), labels.chunk(args.accum_steps), strict=True)
        for part, truth in parts:
            with utils.autocast(self.device, self.precision):
                logits = self.forward(part)
                loss = F.cross_entropy(logits, truth, label_smoothing=args.label_smoothing)
            loss = loss * (len(truth) / len(labels))
            self.scaler.scale(loss).backward()
            self.count(loss.detach(), (logits.detach().argmax(1) == truth).sum() / len(labels))
        self.finite_steps += self.finite
        self.scaler.unscale_(optimizer)
        self.mask_gradients()  # before clipping: dead weights have no say in the norm
        if self.penalty and args.block_loss_grad:
            self.penalty.block_gradients_()
        if args.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
        if self.penalty and args.reg_form == "gradient":
            self.penalty.add_to_gradients_()
        self.scaler.step(optimizer)
        self.scaler.update()
        self.mask_weights()
        if self.penalty and args.reg_form == "decay":
            self.penalty.shrink_(self.ramp.parts)
        optimizer.zero_grad(set_to_none=True)  # here: gradients that outlive a graph would hold its memory

    def count(self, loss: Tensor, accuracy: Tensor) -> None:
        """Add to the epoch's sums on the device; nothing here waits for it."""
        self.sums += torch.stack((loss, accuracy.to(loss.dtype)))
        self.finite &= loss.isfinite()

    def checkpoint_due(self) -> bool:
        every = self.args.checkpoint_every
        if every is None:
            return False
        if every.endswith("m"):
            return time.perf_counter() - self.last_checkpoint >= 60 * int(every[:-1])
        return self.run.step % int(every) == 0

    def mask_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.held]
        if gradients:
            torch._foreach_mul_(gradients, self.held_masks)

    @torch.no_grad()
    def mask_weights(self) -> None:
        if self.held:
            torch._foreach_mul_(self.held, self.held_masks)

    def penalty_values(self) -> dict[str, float]:
        """lambda and residual norm of the doomed weights, while there are any; measuring waits for the device."""
        if not self.penalty:
            return {}
        return {"rsst/lambda": self.ramp.value(self.run.step), "rsst/residual": self.penalty.residual()}

    def track(self, values: dict[str, float], after: int = 0) -> None:
        """Send numbers of the step done, on an axis that rises strictly over the states; each state's end is a step."""
        self.tracker.log(values, self.run.state * (self.total_steps + 1) + self.run.step + after)

    def penalty_note(self, fading: dict[str, float]) -> str:
        """What `penalty_values` found and the dose so far, for a line of the log."""
        if not fading:
            return ""
        dose = f"{self.doses[self.run.step]:.3g}" if self.doses else "unknown"
        return f"  lambda {fading['rsst/lambda']:.4g}  dose {dose}  residual {fading['rsst/residual']:.2g}"

    def check_finite(self) -> None:
        if not self.finite:
            step = self.first_step + int(self.finite_steps)
            raise RunError(
                f"the loss is not finite at step {step} of state {self.run.state}; the last checkpoint is good: "
                "lower --lr, add --clip_grad 1 or use --amp off",
                code=1,
            )

    def check_weights(self) -> None:
        """The last step of a state may break weights without a loss that shows it."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.dense.parameters()):
            raise RunError(
                f"weights are not finite after step {self.run.step} of state {self.run.state}; the last checkpoint is "
                "good: lower --lr, add --clip_grad 1 or use --amp off",
                code=1,
            )

    def cut(self) -> None:
        """RSST: the doomed weights become zero for good; optimizer state goes with them."""
        run = self.run
        before, residual = self.evaluate(self.model, self.val_data), self.penalty.residual()
        self.sync_dense()
        moments = self.dense_optimizer_state()
        run.masks, run.kept = run.target, run.target_kept
        self.set_up_training()
        self.load_optimizer_state(moments)
        after = self.evaluate(self.model, self.val_data)
        run.cut = {"before": before, "after": after, "residual": residual}
        log.info(
            f"cut at step {run.step}: accuracy {100 * before:.2f}% before, {100 * after:.2f}% after; "
            f"residual {residual:.2g}"
        )
        if residual > 0.1:
            log.warning("residual above 0.1: the cut weights were not small; raise --reg_granularity_prune")
        self.model.train()

    def end_epoch(self, epoch: int) -> None:
        """Validate, write the epoch's line, keep the best, checkpoint."""
        args, run = self.args, self.run
        self.bar.close()
        self.bar = None
        self.check_finite()
        seconds = time.perf_counter() - self.epoch_started
        loss, train_accuracy = (self.sums / self.steps_per_epoch).tolist()
        accuracy = self.evaluate(self.model, self.val_data)
        cost, fading = cost_of(self.dense, run.kept), self.penalty_values()
        images = min(args.batch_size * args.accum_steps, len(self.train_data))
        row = {
            "state": run.state,
            "epoch": epoch,
            "lr": self.learning_rate(run.step - 1),
            "train_loss": loss,
            "train_accuracy": train_accuracy,
            "val_accuracy": accuracy,
            "density": density(run.masks),
            **cost,
            "lambda": self.strength,
            "residual": fading.get("rsst/residual", 0.0),
            "seconds": seconds,
            "images_per_second": (self.steps_per_epoch - self.first_batch) * images / seconds,
        }
        run.history.append(row)
        run.sums = []
        log.info(
            f"state {run.state} epoch {epoch + 1}/{self.epochs}  loss {loss:.4f}"
            f"  train {100 * train_accuracy:.2f}%  val {100 * accuracy:.2f}%  lr {row['lr']:.3g}"
            f"{self.penalty_note(fading)}  {seconds:.1f} s"
        )
        self.track(
            {
                "train/loss": loss,
                "train/accuracy": train_accuracy,
                "train/lr": row["lr"],
                "train/images_per_second": row["images_per_second"],
                "val/accuracy": accuracy,
                **fading,
                **{f"prune/{name}": row[name] for name in ("density", *cost)},
            }
        )
        self.sync_dense()
        self.check_weights()
        # before the cut the model is not yet what the state ends with
        if not self.penalty and accuracy > run.best.get("accuracy", -1.0):
            run.best = {"epoch": epoch, "accuracy": accuracy}
            best = {"weights": utils.weights_of(self.dense), "state": run.state, "kept": run.kept, **run.best}
            self.writer.submit(utils.save_tensors, self.save_dir / "best.pt", best)
        if args.prune_type == "rewind_lt" and run.state == 0 and epoch + 1 == args.rewind_epoch:
            self.keep_for_rewind("rewind.pt")
        utils.write_metrics(self.save_dir, run.history)
        self.checkpoint()

    def keep_for_rewind(self, name: str) -> None:
        """The weights of now are those that later states start from."""
        self.rewind_weights, self.rewind_file = utils.weights_of(self.dense), name
        utils.save_tensors(self.save_dir / name, self.rewind_weights)
        self.rewind_sha256 = _sha256(self.save_dir / name)

    def end_state(self) -> None:
        """Test the selected model, write the state's line; `dense` keeps the weights of the last step."""
        run = self.run
        last = utils.weights_of(self.dense)
        self.writer.wait()
        best = utils.load_tensors(self.save_dir / "best.pt", "best.pt")
        if best["state"] == run.state:
            self.dense.load_state_dict(best["weights"])
        else:
            log.warning("best.pt is of another state (resumed from an older checkpoint): testing the last weights")
        test_accuracy = self.evaluate(self.dense, self.test_data)
        self.dense.load_state_dict(last)
        row = {"state": run.state, "density": density(run.masks), **cost_of(self.dense, run.kept)}
        if not self.units:
            row["parameters"] -= sum(mask.numel() for mask in run.masks.values()) - count_kept(run.masks)
        row |= {
            "accuracy_before_cut": run.cut.get("before", ""),
            "accuracy_after_cut": run.cut.get("after", ""),
            "residual": run.cut.get("residual", ""),
            "accuracy_trained": run.history[-1]["val_accuracy"],
            "best_epoch": run.best["epoch"],
            "best_accuracy": run.best["accuracy"],
            "test_accuracy": test_accuracy,
            "seconds": run.seconds,
        }
        run.states.append(row)
        run.units += self.unit_rows()
        utils.write_csv(self.save_dir / "states.csv", run.states)
        utils.write_csv(self.save_dir / "units.csv", run.units)
        self.track({"test/accuracy": test_accuracy, "val/best_accuracy": run.best["accuracy"]}, after=1)
        log.info(
            f"state {run.state} done: density {100 * row['density']:.2f}%, best val "
            f"{100 * row['best_accuracy']:.2f}% (epoch {row['best_epoch'] + 1}), test {100 * test_accuracy:.2f}%, "
            f"{run.seconds:.0f} s"
        )
        self.model, self.model_kept = self.dense, {}
        run.state, run.step, run.begun = run.state + 1, 0, False
        self.checkpoint()

    def unit_rows(self) -> list[dict]:
        """What is left of each layer: units in a run that removes units, single weights otherwise."""
        state, run = self.run.state, self.run
        if not self.units:
            rows = [(name, "weight", int(mask.count_nonzero()), mask.numel()) for name, mask in run.masks.items()]
        else:
            rows = [(key, group.kind, len(run.kept[key]), group.count) for key, group in self.units.items()]
        return [dict(zip(("state", "layer", "kind", "kept", "total"), (state, *row), strict=True)) for row in rows]

    def report(self) -> None:
        """Plots and report from the run's files; see report.py."""
        try:
            report.write(self.save_dir)
            log.info(f"report: {self.save_dir / 'report.html'}")
        except Exception as error:  # the run is done and its model written, whatever a plot runs into
            log.warning("report: %s; python report.py %s tries again", error, self.save_dir)
        pictures = {f"plots/{path.stem}": path for path in sorted((self.save_dir / "plots").glob("*.png"))}
        self.tracker.summarise({f"final/{key}": value for key, value in self.run.states[-1].items()}, pictures)

    def hand_over(self) -> None:
        """The last state's selected model, physically small, with its proof; see export.py."""
        args, last = self.args, self.run.states[-1]
        best = utils.load_tensors(self.save_dir / "best.pt", "best.pt")
        self.dense.load_state_dict(best["weights"])
        kept = best["kept"] if self.units else None
        if not args.export:
            log.info(export.size_table(self.dense, export.compact(self.dense, kept)[0]))
            return
        metrics = {"val_accuracy": last["best_accuracy"], "test_accuracy": last["test_accuracy"]}
        folder, facts, provenance = self.save_dir / "model", self.facts, export.run_provenance(args)
        small = export.write(folder, self.dense, kept, self.val_data.sequential(), facts, provenance, metrics)
        log.info(f"{export.size_table(self.dense, small)}\n\n{export.proof_line(folder)}")

    # -- small things

    @property
    def dtype(self) -> torch.dtype:
        return next(self.dense.parameters()).dtype

    def prunable(self) -> dict[str, Tensor]:
        layers = prunable_layers(self.dense, self.args.prune_patch_embed)
        return {name: module.weight.detach() for name, module in layers.items()}

    def learning_rate(self, step: int) -> float:
        """Linear warm-up per step, then x0.1 at the milestones or half a cosine; a function of the state's step."""
        args, warmup = self.args, self.args.warmup * self.steps_per_epoch
        if step < warmup:
            return args.lr * (step + 1) / warmup
        if args.sched == "cosine":
            return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))
        return args.lr * 0.1 ** sum(step >= epoch * self.steps_per_epoch for epoch in self.milestones)

    def parameter_masks(self, masks: Masks, kept: dict) -> dict[str, Tensor]:
        """Masks by parameter name, in dense shapes, with all that belongs to removed units; whole ones are left out."""
        found = {f"{name}.weight": mask for name, mask in masks.items()}
        others = {name: p for name, p in self.dense.named_parameters() if name not in found}
        found |= unit_masks(self.units, kept, others)
        return {name: mask.detach() for name, mask in found.items() if not mask.all()}

    @torch.no_grad()
    def enforce(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)

    def sync_dense(self) -> None:
        """Carry the weights of the network that trains back into `dense`."""
        if self.model is self.dense and not self.idle:
            return
        weights = self.model.state_dict()
        if self.model is not self.dense:
            weights = scatter_tensors(weights, self.units, self.model_kept)
        for name, (idle, value) in self.idle.items():
            weights[name] = torch.where(idle, value, weights[name])
        self.dense.load_state_dict(weights)

    def dense_optimizer_state(self) -> dict[str, dict]:
        """Optimizer state by parameter name, in dense shapes."""
        names = [name for name, _ in self.model.named_parameters()]
        states = [self.optimizer.state[parameter] for parameter in self.model.parameters()]
        found: dict[str, dict] = {name: {} for name in names}
        for entry in {key for state in states for key in state}:
            tensors = {name: state[entry] for name, state in zip(names, states, strict=True) if entry in state}
            if any(tensor.ndim for tensor in tensors.values()) and self.model_kept:
                tensors = scatter_tensors(tensors, self.units, self.model_kept)
            for name, tensor in tensors.items():
                found[name][entry] = tensor
        return found

    def load_optimizer_state(self, moments: dict[str, dict]) -> None:
        """The inverse, for the model and masks of now: what is cut is gone here too."""
        hold = self.parameter_masks(self.run.masks, self.run.kept)
        for entry in {key for state in moments.values() for key in state}:
            tensors = {name: state[entry] for name, state in moments.items() if entry in state}
            if any(tensor.ndim for tensor in tensors.values()):
                tensors = {name: tensor * hold.get(name, 1) for name, tensor in tensors.items()}
                tensors = slice_tensors(tensors, self.units, self.model_kept)
            for name, tensor in tensors.items():
                parameter = self.model.get_parameter(name)
                self.optimizer.state[parameter][entry] = laid_out_like(parameter, tensor)

    def evaluate(self, model: nn.Module, data: Batches | FolderBatches) -> float:
        return export.accuracy(model, data, self.precision)

    def checkpoint(self) -> None:
        """Take a copy of everything that the run needs to go on; a thread writes it."""
        now = time.perf_counter()
        self.run.seconds += now - self.clock
        self.clock = self.last_checkpoint = now
        self.writer.wait()  # no more than one copy at a time
        content = {
            "weights": utils.weights_of(self.dense),
            "moments": utils.cpu_copy(self.optimizer.state_dict()["state"]),
            "scaler": self.scaler.state_dict(),
            "rewind_file": self.rewind_file,
            "rewind_sha256": self.rewind_sha256,
            "random": utils.random_states(),
            "args": utils.plain_args(self.args),
        }
        self.writer.submit(_write_checkpoint, self.save_dir, self.run.snapshot(), content)


def _write_checkpoint(save_dir: Path, run: RunState, content: dict) -> None:
    utils.save_checkpoint(save_dir, {"run": run.pack(), **content})


def make_optimizer(args: argparse.Namespace, model: nn.Module, rate: Tensor) -> torch.optim.Optimizer:
    """SGD or AdamW whose learning rate is the scalar `rate`, on the model's device and changed in place.

    Weight decay acts on the weights of linear and convolution layers only. Fused kernels read the rate on the device,
    and on a CPU they are twice to six times as fast (measured).
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    decayed = {id(module.weight) for module in layers}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=args.compile in utils.GRAPHS)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=args.momentum, fused=True)
    if args.momentum:
        # PyTorch makes them uninitialised in the first step and leaves them so when the scaler of fp16 skips that step
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def states_table(rows: list[dict]) -> str:
    """The table that a run ends with."""

    def percent(key: str):
        return lambda row: f"{100 * row[key]:.2f}%" if row[key] != "" else "-"

    return utils.format_table(
        rows,
        {
            "state": "state",
            "density": percent("density"),
            **cost_columns(rows[0]),
            "before cut": percent("accuracy_before_cut"),
            "after cut": percent("accuracy_after_cut"),
            "trained": percent("accuracy_trained"),
            "best": percent("best_accuracy"),
            "test": percent("test_accuracy"),
            "seconds": lambda row: f"{row['seconds']:.0f}",
        },
    )


def cost_columns(row: dict) -> dict:
    """Columns of a table for what `cost_of` counts in this row."""
    units = [kind for kind in ("heads", "neurons", "filters") if kind in row]
    columns = {kind: lambda row, kind=kind: f"{row[kind]:,}" for kind in units}
    columns["parameters"] = lambda row: f"{row['parameters']:,}"
    columns["MACs"] = lambda row: f"{row['macs'] / 1e9:.4f} G"
    return columns


def laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the parameter's strides; scalars stay.

    Fused optimizers run over the memory of weights and moments as it lies, whatever the strides say; operations on
    lists of tensors go one by one where strides differ.
    """
    same = not tensor.ndim or tensor.stride() == parameter.stride()
    return tensor if same else torch.empty_like(parameter).copy_(tensor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------- main

RUN_FILES = (
    "args.yaml", "environment.json", "run.log", "metrics.jsonl", "metrics.csv", "states.csv",
    "units.csv", "report.md", "report.html", "tracking.json",
    "init.pt", "rewind.pt", "best.pt", "checkpoint.pt", "checkpoint.prev.pt", "checkpoint.new.pt",
)  # fmt: skip


def make_save_dir(args: argparse.Namespace) -> Path:
    """The run's folder, checked before any work and made."""
    if args.save_dir is None:
        args.save_dir = str(utils.free_dir(Path("results") / (args.exp_name or utils.run_name(args))))
    save_dir = Path(args.save_dir)
    try:
        if any((save_dir / name).exists() for name in RUN_FILES) and not args.resume:
            if not args.overwrite:
                raise RunError(f"--save_dir {save_dir}: holds another run; add --resume or --overwrite")
            for name in RUN_FILES:
                (save_dir / name).unlink(missing_ok=True)
            for name in ("plots", "model", "wandb"):
                shutil.rmtree(save_dir / name, ignore_errors=True)
        save_dir.mkdir(parents=True, exist_ok=True)
        (save_dir / "run.log").touch()
    except OSError as error:
        raise RunError(f"--save_dir {save_dir}: cannot be written ({error.strerror}); choose another") from error
    return save_dir


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    utils.start_logging(verbose=args.verbose)
    try:
        if args.dry_run:
            print(plan(args))
            return 0
        # whatever can be wrong with device, model or data shows before the run's folder is made
        if args.deterministic:
            utils.be_deterministic()
        device = utils.pick_device(args.device, args.gpu)
        utils.pick_precision(args.amp, device)
        utils.check_compile(args.compile, args.accum_steps, device)
        utils.seed_everything(args.seed)
        content = vars(args).pop("resumed_from", None)
        model = make_model(args, weights=not content)
        run_units(args, model)
        if not content:
            args.pretrained_note = model.pretrained_report.failure if model.pretrained_report else ""
            if args.pretrained_note and args.prune_type == "pt":
                raise RunError(f"--prune_type pt: nothing pretrained to rewind to ({args.pretrained_note})")
        if args.init and not content:
            load_initial_weights(model, Path(args.init))
        pixels = image_size(model)
        splits = load_dataset(args.dataset, args.data, pixels, args.val_fraction, args.train_limit)
        save_dir = make_save_dir(args)
        job = PruneRetrain(args, device, splits, model, save_dir)
        if content:
            job.resume(content)
        utils.start_logging(save_dir / "run.log", args.verbose)
        announce(args, device, model, splits)
        if content:
            job.go_on()
        else:
            utils.write_run_facts(save_dir, args, device)
            job.start()
        job()
    except (RunError, DataError) as error:
        return leave(f"error: {error}", getattr(error, "code", 2))
    except utils.Stopped as stop:
        return leave(f"stopped by {stop} with a checkpoint; go on with --resume --save_dir {args.save_dir}", stop.code)
    except KeyboardInterrupt:
        return leave(f"interrupted; go on from the last checkpoint with --resume --save_dir {args.save_dir}", 130)
    except Exception as error:
        reason = explain(error, args)
        if reason is None:
            raise
        return leave(f"error: {reason}", 1)
    return 0


def leave(message: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return code


def explain(error: Exception, args: argparse.Namespace) -> str | None:
    """A line for errors of the system and of PyTorch that the user can mend; None for others, which are bugs."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in utils.DISK_ERRORS:
        return f"cannot write {error.filename or args.save_dir}: {error.strerror}; free the disk or choose --save_dir"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return (
            f"out of memory with --batch_size {args.batch_size} --accum_steps {args.accum_steps} --amp {args.amp}: "
            "lower the first and raise the second by the same factor, or use --amp bf16; the last checkpoint is good"
        )
    if "deterministic" in text and args.deterministic:
        return f"--deterministic: not possible on this device ({text[:200]}); leave it out or use --device cpu"
    if args.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile {args.compile}: cannot compile here ({text[:200]}); leave it out"
    if args.compile in utils.GRAPHS and "captur" in text:
        return f"--compile {args.compile}: cannot capture this step ({text[:200]}); leave it out"
    return None


def load_initial_weights(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(utils.load_state_file(path, "--init"))
    except RuntimeError as error:
        raise RunError(f"--init {path}: does not fit this model ({str(error).splitlines()[-1].strip()})") from error


def announce(args: argparse.Namespace, device: torch.device, model: nn.Module, splits: Splits) -> None:
    """The log's first lines: what is run on what."""
    parameters, pixels = count_vit_parameters(model), image_size(model)
    precision = utils.precision_name(args.amp, device)
    log.info(
        f"{args.struct} on {args.arch}: {parameters:,} parameters, {pixels} pixels, {device}, {precision}, "
        f"seed {args.seed}"
    )
    train, val, test = (len(split.labels) for split in (splits.train, splits.val, splits.test))
    log.info(f"{args.dataset}: {train:,} train, {val:,} val, {test:,} test images, {splits.facts.classes} classes")
    states, epochs, _ = run_length(args)
    log.info(f"states 0 to {states - 1} of {epochs} epochs each; files in {args.save_dir}")
    for note in args.notes:
        log.warning("note: %s", note)
    if args.vit_structured and args.struct == "rsst" and args.prune_type == "lt" and args.ratio_schedule == "constant":
        what = "are the same as Refill's, bit for bit" if args.fc else "differ from Refill's only by the classifier"
        log.warning("note: with lt and a constant ratio, states from 2 on %s; a growing ratio lets RSST act", what)


if __name__ == "__main__":
    sys.exit(main())
