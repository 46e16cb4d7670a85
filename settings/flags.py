"""The table of flags: one record each, in groups. A new flag is one record here and the line that uses its value.

`flag.py` says what a record holds, and makes parser, help and checks of it; `effect.py` holds the rules on when a flag
has an effect. args.yaml, notes and refusals, resume, the identity of a run, the search space and docs/flags.md
follow from this table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import rsst
from dataset import DATASETS
from models import BUILDERS
from models.embedding import STEMS
from pruning.ranking import KINDS
from pruning.scores import CRITERIA, SCORE_BATCHES
from settings import effect
from settings.flag import (
    AUTO,
    CLOSED,
    NOT_ZERO,
    OFF_OR_MORE,
    OPEN,
    POSITIVE,
    SHARE,
    Check,
    Flag,
    Flags,
    Values,
    at_least,
    markdown,
    matches,
    parser_of,
    square,
)
from utils import OneLineParser

SORTING = {"uniform": "layer-wise", "global": "global"}  # --ratio_allocation -> --sorting_mode
SENSITIVITY = "sensitivity"  # of --ratio_allocation
GRAPHS = ("graph", "compiled-graph")  # of --compile: the whole step is one CUDA graph


def one_of(names: Iterable[str]) -> Check:
    return Check(lambda value: value in names, f"unknown; choose from {', '.join(names)}")


def _flip(flags: Flags) -> str:
    if flags["aug"] == "none":
        return "with --aug none"
    return "" if DATASETS[flags["dataset"]].flip else f"with --dataset {flags['dataset']}, which is never flipped"


def _searched_rate(flags: Flags) -> Values:
    """Whole units: the share that is gone in the end. Otherwise what goes each time, so that 90% to 5% are left."""
    if flags["vit_structured"]:
        return {"low": 0.1, "high": 0.8}
    times = max(1, flags["pruning_times"] - 1)
    return {"low": round(1 - 0.9 ** (1 / times), 4), "high": round(1 - 0.05 ** (1 / times), 4)}


def _searched_starts(flags: Flags) -> Values:
    if flags["epochs"] == 0:
        return ["finetune"]
    return ["lt", "rewind_lt", "finetune", *(["pt"] if flags["pretrained"] else [])]


def _first_criterion(args: argparse.Namespace) -> str:
    return "magnitude" if args.struct == "imp" and args.vit_structured else "l1"


def _schedule_epochs(args: argparse.Namespace) -> int:
    """Epochs of the states that train, which warm-up and milestones follow."""
    return args.epochs or args.dense_epochs or 0


def _first_milestones(args: argparse.Namespace) -> str:
    epochs = _schedule_epochs(args)
    return ",".join(map(str, sorted({epochs // 2, epochs * 3 // 4} - {0})))


def _first_repair(args: argparse.Namespace) -> str | None:
    return "ls" if args.prune_type == "finetune" and not effect.prunes(vars(args)) else None


WHERE = {"computes": False, "resumes": True, "searchable": False}  # where and how a run is made
FIXED = {"searchable": False}  # of trials that are to be compared

RUN = (
    Flag("save_dir", "folder of the run; results/<run name> when not given", common=True, **WHERE),
    Flag(
        "exp_name", "of the folder in results/, in the place of the run's generated name", computes=False, **FIXED,
        check=matches(r"(?!\.{1,2}$)[^/\\\0]+", "must be the plain name of a folder, which results/ will hold"),
    ),
    Flag(
        "seed", "of weights and batches; 0 is a seed", 42, int, **FIXED,
        check=Check(lambda value: 0 <= value < 2**63, "must be 0 or more, and below 2^63"),
    ),
    Flag("device", "where to compute", "auto", choices=("auto", "cpu", "cuda", "mps"), **WHERE),
    Flag("gpu", "index of the GPU when CUDA is used", 0, int, check=at_least(0), **WHERE),
    Flag(
        "resume",
        "go on from the latest checkpoint of --save_dir, with its flags; auto: where there is one, and start the run "
        "where there is none, so that one command can be given again and again. A larger --finish_epochs, or "
        "--pruning_times where the schedule of ratios allows it, makes the run longer",
        False, choices=(AUTO,), const=True, common=True, **WHERE,
    ),
    Flag("checkpoint", "go on from this checkpoint file", **WHERE),
    Flag(
        "checkpoint_every", "a checkpoint every N steps or N minutes (10m) besides every epoch", metavar="N|Nm",
        check=matches(r"[1-9]\d*m?", "give steps (500) or minutes (10m)"), **WHERE,
    ),
    Flag("deterministic", "only operations that give the same bits each time; slower on a GPU", False, bool),
    Flag("config", "a YAML file of flags; flags given by hand win", metavar="FILE", common=True, **WHERE),
    Flag("print_freq", "log every so many batches", 200, int, check=at_least(1), **WHERE),
    Flag("verbose", "log more: names of tensors, ids of neurons", False, bool, **WHERE),
    Flag(
        "dry_run", "print the plan (per state: density, units, parameters, MACs; disk) and exit", False, bool,
        common=True, **WHERE,
    ),
    Flag(
        "list_archs",
        "print timm's models that can be pruned (names like PATTERN) and exit; with --verbose the others and why",
        const="*", metavar="PATTERN", **WHERE,
    ),
    Flag("overwrite", "replace the run that --save_dir holds", False, bool, **WHERE),
    Flag("export", "do not write the small model to model/", True, bool, computes=False, **FIXED),
)  # fmt: skip

DATA = (
    Flag("dataset", f"one of {', '.join(DATASETS)}", "cifar100", check=one_of(DATASETS), common=True, **FIXED),
    Flag("data", "folder of the data; downloaded into it when missing", "data", common=True, **WHERE),
    Flag("workers", "processes that read image folders; others need none", 4, int, check=at_least(0), **WHERE),
    Flag("batch_size", "images per forward pass", 128, int, check=at_least(1), common=True),
    Flag("img_size", "pixels per side that the model sees; its or the data set's own", kind=square, check=at_least(1)),
    Flag(
        "val_fraction",
        "share of training images that validate. In folders of images val/ is the test set, unless there is a test/, "
        "too: then val/ validates; without either, a fifth of train/ is the test set",
        0.1, float, check=OPEN, **FIXED,
    ),
    Flag("train_limit", "keep so many training images, stratified by class", kind=int, check=at_least(1), **FIXED),
    Flag(
        "aug",
        "basic: horizontal flips and a random crop, of image files of 8% to 100% of the area, resized; of small data "
        "sets shifted by up to 4 pixels. strong: and brightness, contrast and an erased square; image files: and "
        "RandAugment. rand: basic, two operations of RandAugment at magnitude 9 and random erasing (2% to 33% of the "
        "area of a quarter of the images), on image files too",
        "basic", choices=("none", "basic", "strong", "rand"),
    ),
    Flag("flip", "--aug without horizontal flips", True, bool, idle=_flip),
)  # fmt: skip

MODEL = (
    Flag(
        "arch",
        f"one of {', '.join(BUILDERS)}, timm/NAME (--list_archs), or the folder of an exported model: its shape, with "
        "fresh weights",
        "vit_tiny", common=True,
    ),
    Flag("patch_size", "pixels per patch side; the architecture's own when not given", kind=square, check=at_least(1)),
    Flag(
        "pretrained",
        "start from timm's public weights, or from a FILE (.safetensors, .pth, .npz) or folder of weights; all of them "
        "must fit, but for the classifier",
        False, const=True, metavar="FILE", also=("--vit_pretrained",), common=True,
    ),
    Flag("pretrained_tag", "which of timm's public weights, such as augreg_in21k"),
    Flag(
        "patch_embed", "pretrained patch embedding of another patch size: resample it, or start it anew",
        "resample", choices=("resample", "reinit"), idle=effect.patch_embed,
    ),
    Flag("pretrained_fallback", "start from random weights when the pretrained ones cannot be had", False, bool),
    Flag(
        "layer_scale", "our ViTs' branches end in a learned factor from V on; off",
        kind=float, metavar="V", check=OFF_OR_MORE,
    ),
    Flag(
        "stem",
        "how our ViTs make tokens of pixels. patch: one convolution per patch; conv: 3x3 convolutions of stride 2 with "
        "batch norm and ReLU, and a 1x1 (patch size a power of two); pretrained patch embeddings have no place in it, "
        "it starts anew",
        "patch", choices=tuple(STEMS),
    ),
    Flag(
        "token_merge",
        "between attention and MLP of each block of a plain ViT, ours or timm's, the R most similar pairs of tokens "
        "merge into their averages (ToMe), at most half of the patch tokens that are left; 0 is off",
        0, int, metavar="R", check=at_least(0),
    ),
    Flag(
        "allow_partial",
        "load --pretrained or --init weights that lack tensors of the model, or hold tensors that it has no place for",
        False, bool, computes=False,
    ),
    Flag(
        "preprocessing",
        "whose mean, std, interpolation and centre crop images get; the model's where it starts from weights that have "
        "a record of them (timm's configuration, a run of this program), else the data set's",
        choices=("model", "dataset"), computes=False,
    ),
    Flag(
        "init", "initial weights: a file or folder with all weights of this model, classifier included", metavar="FILE"
    ),
)  # fmt: skip

_FINISHES = ("finish_epochs", "which says for how long")
TRAINING = (
    Flag("epochs", "per state; 0: states are cut and tested, not trained", 120, int, check=at_least(0), common=True),
    Flag(
        "dense_epochs",
        "of state 0; --epochs when not given. 0: the weights of --pretrained or --init are the trained network, which "
        "is validated, not trained; later states then fine-tune unless --prune_type says otherwise",
        kind=int, metavar="N", check=at_least(0), idle=effect.dense_epochs, common=True,
    ),
    Flag("opt", "optimizer", "sgd", choices=("sgd", "adamw"), common=True),
    Flag("lr", "learning rate after the warm-up", 0.01, float, check=POSITIVE, common=True),
    Flag("momentum", "of SGD", 0.9, float, check=SHARE, idle=effect.momentum),
    Flag("weight_decay", "on weight matrices, not biases and norms", 1e-4, float, check=at_least(0)),
    Flag(
        "warmup", "epochs of linear warm-up, per step; epochs // 6 when not given", kind=int, check=at_least(0),
        follows=lambda args: _schedule_epochs(args) // 6,
    ),
    Flag("sched", "learning-rate schedule", "multistep", choices=("multistep", "cosine")),
    Flag("min_lr", "the cosine ends there, at the last step of a state", kind=float, check=at_least(0)),
    Flag(
        "layer_decay",
        "for pretrained starts: layer i of a ViT with N blocks trains at D^(N + 1 - i) of the learning rate, the "
        "embedding being layer 0 and the classifier N + 1",
        kind=float, metavar="D", check=NOT_ZERO,
    ),
    Flag(
        "decreasing_lr", "epochs at which lr is divided by 10; 1/2 and 3/4 when not given",
        follows=_first_milestones, idle=effect.decreasing_lr,
    ),
    Flag("clip_grad", "largest L2 norm of the gradient; off when not given", kind=float, check=POSITIVE),
    Flag("label_smoothing", "of the cross entropy, in [0, 1)", 0.0, float, check=SHARE),
    Flag(
        "mixup", "mix images in pairs, shares by Beta(A, A); off", kind=float, metavar="A", check=OFF_OR_MORE
    ),
    Flag(
        "cutmix", "paste rectangles of one image into another, areas by Beta(A, A); off",
        kind=float, metavar="A", check=OFF_OR_MORE,
    ),
    Flag(
        "drop_path",
        "stochastic depth: images skip a block's branches with a chance that grows from 0 in the first block of a ViT "
        "to R in the last; off",
        kind=float, metavar="R", check=SHARE,
    ),
    Flag(
        "ema_decay",
        "validate, select and export the exponential moving average of the weights of a state, of decay D, or "
        "(1 + t) / (10 + t) after t steps while that is smaller; off",
        kind=float, metavar="D", check=SHARE,
    ),
    Flag("accum_steps", "forward passes per optimizer step", 1, int, check=at_least(1)),
    Flag(
        "finish_epochs",
        "behind the last state train its selected model for N epochs more, masks as they are, with warm-up, milestones "
        "and cosine over these epochs; off",
        kind=int, metavar="N", check=at_least(1),
    ),
    Flag(
        "finish_lr", "learning rate of the finish; --lr when not given", kind=float, metavar="LR", check=POSITIVE,
        follows=lambda args: args.lr if args.finish_epochs else None, needs=_FINISHES,
    ),
    Flag(
        "finish_on_all",
        "the finish trains on training and validation images; what it ends with is exported, as nothing is left to "
        "select by",
        False, bool, needs=_FINISHES, **FIXED,
    ),
    Flag(
        "compile",
        "train with torch.compile in one of its modes; graph: capture the whole step as a CUDA graph, bit for bit what "
        "it is without; compiled-graph: both",
        const="default", choices=("default", "reduce-overhead", "max-autotune", *GRAPHS),
    ),
    Flag("amp", "autocast precision", "auto", choices=("auto", "off", "bf16", "fp16")),
)  # fmt: skip

PRUNING = (
    Flag(
        "struct",
        "rsst: penalty first, cut later; refill: cut at once; imp: element-wise lottery ticket; oneshot: remove all "
        "units after state 0; dense: no pruning, one schedule over all states",
        "rsst", choices=("rsst", "refill", "imp", "oneshot", "dense"), common=True, search=["rsst", "refill"],
    ),
    Flag(
        "pruning_times", "states S; there are S - 1 prunings between them", 20, int, check=at_least(1), common=True
    ),
    Flag(
        "rate", "of the weights left, per state; heads, blocks, branches: of all", 0.2, float, check=SHARE,
        idle=effect.rate, search=_searched_rate, common=True,
    ),
    Flag(
        "mlp_prune_ratio", "share of all neurons that goes; --rate when not given", kind=float, check=SHARE,
        idle=effect.mlp_prune_ratio, search={"low": 0.1, "high": 0.9}, common=True,
    ),
    Flag(
        "nm",
        "element-wise, in the place of --rate: in the end N of every M consecutive weights of a row stay, as in 2:4; "
        "--ratio_schedule says how many stay before that; off when not given",
        metavar="N:M", idle=effect.prunes,
    ),
    Flag(
        "criteria", f"score of a unit: {', '.join(CRITERIA)}; l1 when not given", check=one_of(CRITERIA),
        follows=_first_criterion, idle=effect.criteria, search=[name for name in CRITERIA if name != "random"],
        common=True,
    ),
    Flag(
        "score_batches", "training batches that scores see", SCORE_BATCHES, int, check=at_least(1),
        idle=effect.criteria,
    ),
    Flag(
        "fillback_rate", "element-wise refill: share given back a layer", 0.0, float, check=CLOSED,
        idle=effect.fillback_rate,
    ),
    Flag(
        "prune_patch_embed", "the patch embedding (a conv stem's 1x1) is prunable too, element-wise", False, bool,
        also=("--conv1",), idle=effect.prune_patch_embed,
    ),
    Flag("fc", "the classifier rewinds too", False, bool, idle=effect.prunes),
    Flag("vit_structured", "prune whole heads and neurons", False, bool, idle=effect.prunes, common=True),
    Flag(
        "vit_prune_target",
        "which units go: heads, neurons, both; branch: whole attentions and MLPs; block: whole blocks; all: heads, "
        "neurons and branches in one ranking by score per MAC",
        "head", choices=tuple(KINDS), idle=effect.structured, common=True,
    ),
    Flag(
        "sorting_mode", "rank in a layer or over all; an older way to say --ratio_allocation uniform or global",
        "layer-wise", choices=("layer-wise", "global"), idle=effect.sorting_mode,
    ),
    Flag(
        "target_macs",
        "share of the dense network's MACs that is left in the end, in (0, 1); says in place of ratios how many heads, "
        "neurons or filters go; off",
        kind=float, metavar="F", check=OPEN, idle=effect.prunes, common=True,
        words="{:.4g} of the dense network's MACs are left in the end",
    ),
    Flag(
        "target_params", "share of the dense network's parameters, likewise; off", kind=float, metavar="F",
        check=OPEN, idle=effect.prunes, words="{:.4g} of the dense network's parameters are left in the end",
    ),
    Flag(
        "target_latency_ms",
        "milliseconds that a batch of --latency_batch images takes the small network in the end, likewise, as measured "
        "on the device of the run in float32; off",
        kind=float, metavar="T", check=POSITIVE, idle=effect.prunes,
        words="a batch takes the small network {:.4g} ms in the end",
    ),
    Flag(
        "latency_batch", "images; 1 when not given", kind=int, metavar="N", check=at_least(1), idle=effect.prunes,
        follows=lambda args: 1 if args.target_latency_ms is not None else None,
        needs=("target_latency_ms", "which it is measured for"),
    ),
    Flag(
        "ratio_allocation",
        "uniform: layers give away one share; global: by one ranking of all; without a target as --sorting_mode, which "
        "it follows when not given; sensitivity: so that the loss rises least, as far as --score_batches of training "
        "images tell where a layer alone loses its lowest-scored units. FILE: counts by layer that the last pruning "
        "reaches, as JSON or as the units.csv of another run",
        metavar="uniform|global|sensitivity|FILE", idle=effect.ratio_allocation, search=[*SORTING, SENSITIVITY],
        common=True,
    ),
    Flag(
        "prune_type",
        "a state starts from: initial weights, weights after --rewind_epoch, pretrained ones, trained ones",
        "lt", choices=("lt", "rewind_lt", "pt", "finetune"), idle=effect.prunes, search=_searched_starts, common=True,
    ),
    Flag(
        "rewind_epoch", "epoch of state 0 that rewind_lt returns to; epochs // 5", kind=int, check=at_least(0),
        follows=lambda args: (args.epochs if args.dense_epochs is None else args.dense_epochs) // 5,
        idle=effect.rewind_epoch,
    ),
    Flag(
        "repair",
        "at every cut the weights that stay take over, in closed form, what the removed ones did, by unlabelled "
        "training images: ls by least squares, mean by biases alone. Needs --prune_type finetune, where ls is the "
        "default; none otherwise",
        choices=("none", "mean", "ls"), idle=effect.prunes, follows=_first_repair, common=True,
    ),
    Flag(
        "repair_images", "the first N training images, without augmentation, which --repair goes by", 512, int,
        metavar="N", check=at_least(1), idle=effect.repair_images,
    ),
    Flag(
        "ratio_schedule",
        "how the shares of units, and of --nm, grow over the states; the last pruning reaches them",
        "geometric", choices=("geometric", "linear", "constant"), idle=effect.ratio_schedule,
    ),
    Flag(
        "rank_by",
        "score_per_mac ranks heads and neurons together by cost; needs global sorting and target both",
        "score", choices=("score", "score_per_mac"), idle=effect.rank_by,
    ),
    Flag(
        "min_units", "units a layer keeps at least; 0 may empty it", 1, int, check=at_least(0), idle=effect.min_units
    ),
    Flag(
        "round_to",
        "neurons and filters that a layer keeps are a multiple of N, the nearest one; heads are left alone",
        1, int, metavar="N", check=at_least(1), idle=effect.round_to,
    ),
    Flag(
        "refill", "surviving units keep the element-wise mask instead of being whole", True, bool,
        idle=effect.structured,
    ),
    Flag(
        "compact_training", "train the physically smaller network once units are cut (structured runs)", True, bool,
        both=True, idle=effect.structured,
    ),
)  # fmt: skip

RSST = (
    Flag(
        "reg_granularity_prune", "strength g: lambda ends at g", 1.0, float, check=POSITIVE, idle=effect.rsst,
        search={"low": 0.2, "high": 2.0, "log": True},
    ),
    Flag(
        "RST_schedule", "shape of lambda over time", "exp_custom_exponents", choices=tuple(rsst.SHAPES),
        idle=effect.rsst, search=list(rsst.SHAPES),
    ),
    Flag("exponents", "p of exp_custom_exponents", 4.0, float, check=POSITIVE, idle=effect.exponents),
    Flag(
        "reg_form",
        "decay: shrink by exp(-20 g) in all, whatever the learning rate; gradient: add lambda * w to the gradient",
        "decay", choices=("decay", "gradient"), idle=effect.rsst,
    ),
    Flag(
        "reg_clock", "gradient form: the ramp restarts each epoch (default) or not", choices=("epoch", "state"),
        idle=effect.rsst,
    ),
    Flag(
        "reg_finish", "share of the state before the cut; 0.25, gradient form 1", kind=float, check=NOT_ZERO,
        follows=lambda args: 1.0 if args.reg_form == "gradient" else 0.25, idle=effect.rsst,
        search={"low": 0.1, "high": 0.75},
    ),
    Flag("block_loss_grad", "doomed weights get no gradient from the loss", False, bool, idle=effect.rsst),
)  # fmt: skip

_TEACHES = ("teacher", "which says who teaches")
DISTILLATION = (
    Flag(
        "teacher",
        "learn from this model, too: self, the selected model of state 0, kept as teacher.pt; an exported model/ or "
        "the run's folder that holds it; a checkpoint, or a file of weights of this architecture; public weights of "
        "timm that know the data set's classes",
        metavar="self|PATH|timm/NAME", idle=effect.teacher, common=True,
    ),
    Flag(
        "kd_alpha", "the teacher's share of the loss, in [0, 1]; 0.5 with a teacher", kind=float, check=CLOSED,
        follows=lambda args: None if args.teacher is None else 0.5, needs=_TEACHES,
    ),
    Flag(
        "kd_temperature", "divides the logits of both; 2 with a teacher", kind=float, check=POSITIVE,
        follows=lambda args: None if args.teacher is None or args.kd_hard else 2.0, needs=_TEACHES,
    ),
    Flag(
        "kd_hard",
        "the teacher's largest logit is a label for its share; else the divergence from all its logits (soft). Of a "
        "distilled DeiT the head of the distillation token learns from the teacher, the class head from the labels; "
        "without a teacher both do; evaluation takes the mean of both",
        False, bool, needs=_TEACHES, idle=effect.kd_hard,
    ),
    Flag(
        "kd_features",
        "add W times the mean squared distance between the normalised output tokens behind the last block, the "
        "student's and the teacher's, which has the same width and grid; off when not given",
        kind=float, metavar="W", check=OFF_OR_MORE, needs=_TEACHES,
    ),
)  # fmt: skip

TRACKING = (
    Flag(
        "wandb_mode",
        "auto: the environment's WANDB_MODE, or online where credentials exist, else offline",
        "auto", choices=("auto", "online", "offline", "disabled"), **WHERE,
    ),
    Flag("wandb_project", "Weights & Biases project", "RSST", **WHERE),
    Flag("wandb_entity", "user or team of the project", **WHERE),
)  # fmt: skip

_TRIALS = {"computes": False, "searchable": False}
_TRIED = ("search", "which says how many trials")
SEARCH = (
    Flag(
        "search",
        "try N sets of the flags of pruning that are left alone, each as a run in --save_dir, and end with those that "
        "no other beats in validation accuracy and cost; the same command goes on, or helps in another shell",
        kind=int, metavar="N", check=at_least(1), **_TRIALS,
    ),
    Flag(
        "search_space",
        "a YAML file of the flags to search instead: a list of values, or {low: 0.1, high: 1, log: true}",
        metavar="FILE", needs=_TRIED, **_TRIALS,
    ),
    Flag(
        "search_objective",
        "the cost: MACs or parameters of the last state, or milliseconds of the small model for one image on this "
        "device; macs, and params where only single weights go",
        choices=("macs", "params", "latency"), needs=_TRIED, **_TRIALS,
    ),
    Flag(
        "search_patience",
        "stop a trial that is worse than the median of K or more complete ones that cost no more; 0 stops none; 5 when "
        "not given",
        kind=int, metavar="K", check=at_least(0), needs=_TRIED, **_TRIALS,
        follows=lambda args: None if args.search is None else 5,
    ),
)  # fmt: skip

GROUPS = {
    "run": RUN,
    "data": DATA,
    "model": MODEL,
    "training (each state anew)": TRAINING,
    "pruning": PRUNING,
    "rsst": RSST,
    "distillation": DISTILLATION,
    "tracking": TRACKING,
    "search": SEARCH,
}
FLAGS: dict[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}


def build_parser(shows_all: bool = True) -> OneLineParser:
    return parser_of(GROUPS, shows_all)


def complete(flags: Flags) -> dict[str, object]:
    """A run's flags with the defaults of those that its version did not know, and no counts where it has none."""
    return {**{name: flag.default for name, flag in FLAGS.items()}, "unit_counts": None, **flags}


def idle_flags(flags: Flags) -> dict[str, str]:
    """{name: why} of the flags that have no effect beside the others."""
    known = complete(flags)
    reasons = {name: flag.idle(known) for name, flag in FLAGS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


if __name__ == "__main__":
    print(markdown(GROUPS), end="")
