"""The table of flags: one record each, in groups. A new flag is one record here and the line that uses its value.

`flag.py` defines the record and derives parser, help and checks from it; `effect.py` has the rules on when a flag has
an effect. args.yaml, notes and refusals, resume, the identity of a run, the search space and docs/flags.md follow from
this table.
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
    """Whole units: the share removed in the end. Single weights: the share of each pruning, to keep 90% to 5%."""
    if flags["vit_structured"]:
        return {"low": 0.1, "high": 0.8}
    times = max(1, flags["pruning_times"] - 1)
    return {"low": round(1 - 0.9 ** (1 / times), 4), "high": round(1 - 0.05 ** (1 / times), 4)}


def _searched_starts(flags: Flags) -> Values:
    return ["lt", "rewind_lt", "finetune", *(["pt"] if flags["pretrained"] else [])]


def _starts_fresh(flags: Flags) -> bool:
    return not (flags["init"] or flags["pretrained"])


def _first_criterion(args: argparse.Namespace) -> str:
    return "magnitude" if args.struct == "imp" and args.vit_structured else "l1"


def _first_milestones(args: argparse.Namespace) -> str:
    return ",".join(map(str, sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})))


WHERE = {"computes": False, "resumes": True, "searchable": False}  # where and how a run is made
FIXED = {"searchable": False}  # of trials that are to be compared

RUN = (
    Flag("save_dir", "folder of the run; results/<run name> when not given", common=True, **WHERE),
    Flag(
        "exp_name", "name of the folder in results/, instead of the generated one", computes=False, **FIXED,
        check=matches(r"(?!\.{1,2}$)[^/\\\0]+", "must be the plain name of a folder, which results/ will hold"),
    ),
    Flag(
        "seed", "seed of weights and batches; 0 is a seed", 42, int, **FIXED,
        check=Check(lambda value: 0 <= value < 2**63, "must be 0 or more, and below 2^63"),
    ),
    Flag("device", "where to compute", "auto", choices=("auto", "cpu", "cuda", "mps"), **WHERE),
    Flag("gpu", "index of the GPU when CUDA is used", 0, int, check=at_least(0), **WHERE),
    Flag(
        "resume",
        "resume from the latest checkpoint of --save_dir, with its flags; auto: start the run if there is no "
        "checkpoint, so that the same command starts and resumes a run. A larger --finish_epochs, or --pruning_times "
        "where the schedule of ratios allows it, makes the run longer",
        False, choices=(AUTO,), const=True, common=True, **WHERE,
    ),
    Flag("checkpoint", "resume from this checkpoint file", **WHERE),
    Flag(
        "checkpoint_every",
        "write a checkpoint every N steps or N minutes (10m), in addition to every epoch",
        metavar="N|Nm",
        check=matches(r"[1-9]\d*m?", "give steps (500) or minutes (10m)"), **WHERE,
    ),
    Flag("deterministic", "use only deterministic operations; slower on a GPU", False, bool),
    Flag("config", "a YAML file of flags; flags on the command line win", metavar="FILE", common=True, **WHERE),
    Flag("print_freq", "batches between two lines of the log", 200, int, check=at_least(1), **WHERE),
    Flag("verbose", "log more: names of tensors, ids of neurons", False, bool, **WHERE),
    Flag(
        "dry_run", "print the plan (per state: density, units, parameters, MACs; disk) and exit", False, bool,
        common=True, **WHERE,
    ),
    Flag(
        "list_archs",
        "print timm's models that can be pruned (names like PATTERN) and exit; --verbose also prints the others and "
        "why",
        const="*", metavar="PATTERN", **WHERE,
    ),
    Flag("overwrite", "replace the run that --save_dir holds", False, bool, **WHERE),
    Flag("export", "do not write the small model to model/", True, bool, computes=False, **FIXED),
)  # fmt: skip

DATA = (
    Flag("dataset", f"one of {', '.join(DATASETS)}", "cifar100", check=one_of(DATASETS), common=True, **FIXED),
    Flag("data", "folder of the data; downloaded into it when missing", "data", common=True, **WHERE),
    Flag("workers", "processes that read image folders; other data sets need none", 4, int, check=at_least(0), **WHERE),
    Flag("batch_size", "images per forward pass", 128, int, check=at_least(1), common=True),
    Flag(
        "img_size",
        "side of the input images in pixels; by default the model's or the data set's own",
        kind=square, check=at_least(1),
    ),
    Flag(
        "val_fraction",
        "share of training images for validation. In folders of images val/ is the test set; with a test/ as well, "
        "val/ is for validation; without either, a fifth of train/ is the test set",
        0.1, float, check=OPEN, **FIXED,
    ),
    Flag("train_limit", "number of training images to use, stratified by class", kind=int, check=at_least(1), **FIXED),
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
        "start from timm's public weights, or from a FILE (.safetensors, .pth, .npz) or folder of weights; all except "
        "the classifier must fit",
        False, const=True, metavar="FILE", also=("--vit_pretrained",), common=True,
    ),
    Flag("pretrained_tag", "which of timm's public weights, such as augreg_in21k"),
    Flag(
        "patch_embed", "a pretrained patch embedding of another patch size is resampled, or initialised again",
        "resample", choices=("resample", "reinit"), idle=effect.patch_embed,
    ),
    Flag("pretrained_fallback", "start from random weights if the pretrained ones are not available", False, bool),
    Flag(
        "layer_scale", "LayerScale of our ViTs: a learned factor at the end of each branch, initialised with V; off",
        kind=float, metavar="V", check=OFF_OR_MORE,
        clash=(lambda f: f["pretrained"], "pretrained weights were trained without; leave one of them out"),
    ),
    Flag(
        "stem",
        "patch embedding of our ViTs. patch: one convolution; conv: 3x3 convolutions of stride 2 with batch norm and "
        "ReLU, and a 1x1 (patch size a power of two), which cannot load a pretrained patch embedding",
        "patch", choices=tuple(STEMS),
    ),
    Flag(
        "token_merge",
        "between attention and MLP of each block of a plain ViT, ours or timm's, the R most similar pairs of tokens "
        "merge into their averages (ToMe), at most half of the remaining patch tokens; 0 is off",
        0, int, metavar="R", check=at_least(0),
    ),
    Flag(
        "allow_partial",
        "load --pretrained or --init weights with missing or additional tensors",
        False, bool, computes=False,
        clash=(_starts_fresh, "is about weights that a run starts from; add --pretrained"),
    ),
    Flag(
        "preprocessing",
        "whose mean, std, interpolation and centre crop to use; by default the model's if its initial weights record "
        "them (timm's configuration, a run of this program), else the data set's",
        choices=("model", "dataset"), computes=False,
        clash=(
            lambda f: f["preprocessing"] == "model" and _starts_fresh(f),
            "is about weights that a run starts from; add --pretrained",
        ),
    ),
    Flag(
        "init", "initial weights: a file or folder with all weights of this model, classifier included", metavar="FILE"
    ),
)  # fmt: skip

_BELOW = "must not lie below --min_lr {min_lr}, where the cosine ends"
_FINISHES = ("finish_epochs", "which says for how long")
TRAINING = (
    Flag("epochs", "epochs per state", 120, int, check=at_least(1), common=True),
    Flag("opt", "optimizer", "sgd", choices=("sgd", "adamw"), common=True),
    Flag(
        "lr", "learning rate after the warm-up", 0.01, float, check=POSITIVE, common=True,
        clash=(lambda f: f["lr"] < (f["min_lr"] or 0), _BELOW),
    ),
    Flag("momentum", "momentum of SGD", 0.9, float, check=SHARE, idle=effect.momentum),
    Flag("weight_decay", "weight decay of weight matrices, not of biases and norms", 1e-4, float, check=at_least(0)),
    Flag(
        "warmup", "epochs of linear warm-up, in steps; epochs // 6 when not given", kind=int, check=at_least(0),
        follows=lambda args: args.epochs // 6,
    ),
    Flag("sched", "learning-rate schedule", "multistep", choices=("multistep", "cosine")),
    Flag(
        "min_lr", "learning rate at the end of the cosine, the last step of a state", kind=float, check=at_least(0),
        clash=(lambda f: f["sched"] != "cosine", "is where a cosine ends; add --sched cosine"),
    ),
    Flag(
        "layer_decay",
        "for pretrained starts: layer i of a ViT with N blocks trains at D^(N + 1 - i) of the learning rate, the "
        "embedding being layer 0 and the classifier N + 1",
        kind=float, metavar="D", check=NOT_ZERO,
        clash=(
            lambda f: f["struct"] == "rsst" and f["reg_form"] == "gradient",
            "the dose of --reg_form gradient depends on the learning rate, which would differ from layer to layer; use "
            "--reg_form decay",
        ),
    ),
    Flag(
        "decreasing_lr", "epochs at which lr is divided by 10; 1/2 and 3/4 when not given",
        follows=_first_milestones, idle=effect.decreasing_lr,
    ),
    Flag("clip_grad", "largest L2 norm of the gradient; off when not given", kind=float, check=POSITIVE),
    Flag("label_smoothing", "label smoothing of the cross entropy, in [0, 1)", 0.0, float, check=SHARE),
    Flag(
        "mixup", "mix pairs of images, with shares from Beta(A, A); off", kind=float, metavar="A", check=OFF_OR_MORE
    ),
    Flag(
        "cutmix", "paste rectangles of one image into another, with areas from Beta(A, A); off",
        kind=float, metavar="A", check=OFF_OR_MORE,
    ),
    Flag(
        "drop_path",
        "stochastic depth: an image skips a block's branches with a probability from 0 in the first block of a ViT "
        "to R in the last; off",
        kind=float, metavar="R", check=SHARE,
        clash=(
            lambda f: f["compile"] in GRAPHS,
            "drops other branches in every step, and --compile {compile} captures one; use --compile default",
        ),
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
        "after the last state, fine-tune its selected model for N epochs with fixed masks; warm-up, milestones and "
        "cosine span these epochs; off",
        kind=int, metavar="N", check=at_least(1),
    ),
    Flag(
        "finish_lr", "learning rate of the finish; --lr when not given", kind=float, metavar="LR", check=POSITIVE,
        follows=lambda args: args.lr if args.finish_epochs else None, needs=_FINISHES,
        clash=(lambda f: f["finish_lr"] < (f["min_lr"] or 0), _BELOW),
    ),
    Flag(
        "finish_on_all",
        "the finish trains on training and validation images; without validation images, its last model is exported",
        False, bool, needs=_FINISHES, **FIXED,
    ),
    Flag(
        "compile",
        "train with torch.compile in one of its modes; graph: capture the whole step as a CUDA graph, with identical "
        "bits; compiled-graph: both",
        const="default", choices=("default", "reduce-overhead", "max-autotune", *GRAPHS),
    ),
    Flag("amp", "autocast precision", "auto", choices=("auto", "off", "bf16", "fp16")),
)  # fmt: skip

PRUNING = (
    Flag(
        "struct",
        "rsst: a growing penalty, then the cut; refill: cut at once; imp: element-wise lottery ticket; oneshot: remove "
        "all units after state 0; dense: no pruning, one schedule over all states",
        "rsst", choices=("rsst", "refill", "imp", "oneshot", "dense"), common=True, search=["rsst", "refill"],
    ),
    Flag(
        "pruning_times", "number of states S, with S - 1 prunings between them", 20, int, check=at_least(1), common=True
    ),
    Flag(
        "rate",
        "share to prune: of the remaining weights, at each pruning; of all heads, blocks or branches, in the end",
        0.2, float, check=SHARE,
        idle=effect.rate, search=_searched_rate, common=True,
    ),
    Flag(
        "mlp_prune_ratio", "share of all neurons to prune; --rate when not given", kind=float, check=SHARE,
        idle=effect.mlp_prune_ratio, search={"low": 0.1, "high": 0.9}, common=True,
    ),
    Flag(
        "nm",
        "element-wise, instead of --rate: keep N of every M consecutive weights of a row in the end, as in 2:4; "
        "--ratio_schedule sets how many are kept in earlier states; off when not given",
        metavar="N:M", idle=effect.prunes,
        clash=(
            lambda f: f["vit_structured"], "is a pattern of single weights; leave it or --vit_structured out"
        ),
    ),
    Flag(
        "criteria", f"score of a unit: {', '.join(CRITERIA)}; l1 when not given", check=one_of(CRITERIA),
        follows=_first_criterion, idle=effect.criteria, search=[name for name in CRITERIA if name != "random"],
        common=True,
    ),
    Flag(
        "score_batches", "training batches for scores", SCORE_BATCHES, int, check=at_least(1),
        idle=effect.criteria,
    ),
    Flag(
        "fillback_rate",
        "element-wise refill and rsst: share of the pruned weights of a layer that is given back",
        0.0, float, check=CLOSED,
        idle=effect.fillback_rate,
        clash=(lambda f: f["nm"], "would fill groups beyond --nm {nm}; leave it out"),
    ),
    Flag(
        "prune_patch_embed", "also prune the patch embedding (a conv stem's 1x1), element-wise", False, bool,
        also=("--conv1",), idle=effect.prune_patch_embed,
    ),
    Flag("fc", "also rewind the classifier", False, bool, idle=effect.prunes),
    Flag("vit_structured", "prune whole heads and neurons", False, bool, idle=effect.prunes, common=True),
    Flag(
        "vit_prune_target",
        "units to prune: heads, neurons, both; branch: whole attentions and MLPs; block: whole blocks; all: heads, "
        "neurons and branches in one ranking by score per MAC",
        "head", choices=tuple(KINDS), idle=effect.structured, common=True,
    ),
    Flag(
        "sorting_mode",
        "rank units per layer or over all layers; older synonym of --ratio_allocation uniform and global",
        "layer-wise", choices=("layer-wise", "global"), idle=effect.sorting_mode,
    ),
    Flag(
        "target_macs",
        "share of the dense network's MACs to keep in the end, in (0, 1), instead of ratios of heads, neurons or "
        "filters; off",
        kind=float, metavar="F", check=OPEN, idle=effect.prunes, common=True,
        words="{:.4g} of the dense network's MACs are left in the end",
    ),
    Flag(
        "target_params",
        "share of the dense network's parameters to keep in the end, instead of ratios; off",
        kind=float, metavar="F",
        check=OPEN, idle=effect.prunes, words="{:.4g} of the dense network's parameters are left in the end",
    ),
    Flag(
        "target_latency_ms",
        "milliseconds that the small network may take in the end for a batch of --latency_batch images, instead of "
        "ratios; measured on the device of the run in float32; off",
        kind=float, metavar="T", check=POSITIVE, idle=effect.prunes,
        words="a batch takes the small network {:.4g} ms in the end",
    ),
    Flag(
        "latency_batch",
        "images per batch of --target_latency_ms; 1 when not given",
        kind=int, metavar="N", check=at_least(1), idle=effect.prunes,
        follows=lambda args: 1 if args.target_latency_ms is not None else None,
        needs=("target_latency_ms", "which it is measured for"),
    ),
    Flag(
        "ratio_allocation",
        "how many units each layer loses. uniform: the same share (--sorting_mode layer-wise is a synonym); global: "
        "by one ranking of all units (synonym: --sorting_mode global); sensitivity: so that the loss rises least, "
        "measured on --score_batches batches with the lowest-scored units of one layer removed at a time; FILE: the "
        "units that each layer keeps in the end, as JSON or the units.csv of another run",
        metavar="uniform|global|sensitivity|FILE", idle=effect.ratio_allocation, search=[*SORTING, SENSITIVITY],
        common=True,
    ),
    Flag(
        "prune_type",
        "weights that each state starts from: lt: initial; rewind_lt: after --rewind_epoch; pt: pretrained; finetune: "
        "trained",
        "lt", choices=("lt", "rewind_lt", "pt", "finetune"), idle=effect.prunes, search=_searched_starts, common=True,
        clash=(
            lambda f: f["prune_type"] == "pt" and not f["pretrained"],
            "rewinds to pretrained weights; give --pretrained or choose another type",
        ),
    ),
    Flag(
        "rewind_epoch", "epoch of state 0 that rewind_lt returns to; epochs // 5", kind=int, check=at_least(0),
        follows=lambda args: args.epochs // 5, idle=effect.rewind_epoch,
        clash=(
            lambda f: f["prune_type"] == "rewind_lt" and f["rewind_epoch"] >= f["epochs"], "must be below --epochs"
        ),
    ),
    Flag(
        "ratio_schedule",
        "how the pruned shares of units, and of --nm, grow over the states up to the last pruning",
        "geometric", choices=("geometric", "linear", "constant"), idle=effect.ratio_schedule,
    ),
    Flag(
        "rank_by",
        "score_per_mac ranks heads and neurons together by cost; needs global sorting and target both",
        "score", choices=("score", "score_per_mac"), idle=effect.rank_by,
        clash=(
            lambda f: f["rank_by"] != "score" and not effect.ranks_both(f),
            "compares heads with neurons; add --sorting_mode global --vit_prune_target both",
        ),
    ),
    Flag(
        "min_units",
        "units that a layer keeps at least; 0 allows to remove all",
        1, int, check=at_least(0), idle=effect.min_units,
    ),
    Flag(
        "round_to",
        "round the numbers of neurons and filters that layers keep to the nearest multiple of N; not of heads",
        1, int, metavar="N", check=at_least(1), idle=effect.round_to,
    ),
    Flag(
        "refill", "keep the element-wise masks of surviving units instead of making them whole", True, bool,
        idle=effect.structured,
    ),
    Flag(
        "compact_training", "train the physically smaller network once units are cut (structured runs)", True, bool,
        both=True, idle=effect.structured,
    ),
)  # fmt: skip

RSST = (
    Flag(
        "reg_granularity_prune",
        "strength g of the penalty: lambda ends at g",
        1.0, float, check=POSITIVE, idle=effect.rsst,
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
        "reg_clock",
        "with --reg_form gradient: the ramp of lambda spans an epoch (default) or the state",
        choices=("epoch", "state"),
        idle=effect.rsst,
        clash=(lambda f: f["reg_form"] == "decay", "belongs to --reg_form gradient; decay has one ramp a state"),
    ),
    Flag(
        "reg_finish",
        "share of the state before the cut; 0.25, or 1 with --reg_form gradient",
        kind=float, check=NOT_ZERO,
        follows=lambda args: 1.0 if args.reg_form == "gradient" else 0.25, idle=effect.rsst,
        search={"low": 0.1, "high": 0.75},
    ),
    Flag(
        "block_loss_grad",
        "doomed weights (chosen to be cut) get no gradient from the loss",
        False, bool, idle=effect.rsst,
    ),
)  # fmt: skip

_TEACHES = ("teacher", "which names the teacher")
DISTILLATION = (
    Flag(
        "teacher",
        "distil from this model: self, the selected model of state 0, stored as teacher.pt; an exported model/ or its "
        "run's folder; a checkpoint, or a file of weights of this architecture; timm's public weights for the classes "
        "of the data set",
        metavar="self|PATH|timm/NAME", idle=effect.teacher, common=True,
        clash=(
            lambda f: f["teacher"] == "self" and effect.prunes(f) and not f["finish_epochs"],
            "state 0 teaches later states, and this run has none; leave it out",
        ),
    ),
    Flag(
        "kd_alpha", "weight of the distillation loss, in [0, 1]; 0.5 with a teacher", kind=float, check=CLOSED,
        follows=lambda args: None if args.teacher is None else 0.5, needs=_TEACHES,
    ),
    Flag(
        "kd_temperature",
        "temperature that divides the logits of both networks; 2 with a teacher",
        kind=float, check=POSITIVE,
        follows=lambda args: None if args.teacher is None or args.kd_hard else 2.0, needs=_TEACHES,
        clash=(lambda f: f["kd_hard"], "a label has none; leave it or --kd_hard out"),
    ),
    Flag(
        "kd_hard",
        "hard distillation: the teacher's largest logit is a label; otherwise soft, by the divergence from all its "
        "logits. In a distilled DeiT the head of the distillation token learns from the teacher and the class head "
        "from the labels; without a teacher both learn from the labels; evaluation averages both",
        False, bool, needs=_TEACHES, idle=effect.kd_hard,
    ),
    Flag(
        "kd_features",
        "add W times the mean squared distance between the normalised output tokens of student and teacher after the "
        "last block; both need the same width and grid; off when not given",
        kind=float, metavar="W", check=OFF_OR_MORE, needs=_TEACHES,
    ),
)  # fmt: skip

TRACKING = (
    Flag(
        "wandb_mode",
        "auto: WANDB_MODE of the environment, else online with credentials, else offline",
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
        "run N trials with different values of the pruning flags that are not given, each in a folder of --save_dir, "
        "and write the Pareto front of validation accuracy and cost; the same command resumes the search, or joins it "
        "from another shell",
        kind=int, metavar="N", check=at_least(1), **_TRIALS,
    ),
    Flag(
        "search_space",
        "a YAML file of the flags to search: a list of values, or {low: 0.1, high: 1, log: true}",
        metavar="FILE", needs=_TRIED, **_TRIALS,
    ),
    Flag(
        "search_objective",
        "the cost: MACs or parameters of the last state, or milliseconds of the small model for one image on this "
        "device; by default macs, or params where only single weights are pruned",
        choices=("macs", "params", "latency"), needs=_TRIED, **_TRIALS,
    ),
    Flag(
        "search_patience",
        "stop a trial below the median of K or more complete trials that cost no more; 0: never; 5 when not given",
        kind=int, metavar="K", check=at_least(0), needs=_TRIED, **_TRIALS,
        follows=lambda args: None if args.search is None else 5,
    ),
)  # fmt: skip

GROUPS = {
    "run": RUN,
    "data": DATA,
    "model": MODEL,
    "training (of each state)": TRAINING,
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
    """{name: why} of the flags that have no effect with the others."""
    known = complete(flags)
    reasons = {name: flag.idle(known) for name, flag in FLAGS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


if __name__ == "__main__":
    print(markdown(GROUPS), end="")
