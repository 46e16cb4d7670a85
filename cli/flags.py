"""The flag table: every flag of the command with its meaning, unit and default, in groups; a parser comes out."""

from __future__ import annotations

import argparse

import rsst
from dataset import DATASETS
from engine.capture import GRAPHS
from models import BUILDERS
from models.embedding import STEMS
from pruning.ranking import KINDS
from pruning.scores import CRITERIA, SCORE_BATCHES
from utils import OneLineParser

Group = argparse._ArgumentGroup
AUTO = "auto"  # of --resume


def _switch(group: Group, name: str, text: str, *aliases: str) -> None:
    group.add_argument(name, *aliases, action="store_true", default=False, help=text)


def _run(group: Group) -> None:
    group.add_argument("--save_dir", help="folder of the run; results/<run name> when not given")
    group.add_argument("--exp_name", help="replaces the run name")
    group.add_argument("--seed", type=int, default=42, help="of weights and batches; 0 is a seed")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    group.add_argument("--gpu", type=int, default=0, help="index of the GPU when CUDA is used")
    group.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        choices=[AUTO],
        help="go on from the latest checkpoint of --save_dir, with its flags; auto: where there is one, and start the "
        "run where there is none, so that one command can be given again and again",
    )
    group.add_argument("--checkpoint", help="go on from this checkpoint file")
    group.add_argument(
        "--checkpoint_every", metavar="N|Nm", help="a checkpoint every N steps or N minutes (10m) besides every epoch"
    )
    _switch(group, "--deterministic", "only operations that give the same bits each time; slower on a GPU")
    group.add_argument("--config", metavar="FILE", help="a YAML file of flags; flags given by hand win")
    group.add_argument("--print_freq", type=int, default=200, help="log every so many batches")
    _switch(group, "--verbose", "log more: names of tensors, ids of neurons")
    _switch(group, "--dry_run", "print the plan (per state: density, units, parameters, MACs; disk) and exit")
    group.add_argument(
        "--list_archs",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="print timm's models that can be pruned (names like PATTERN) and exit; with --verbose the others and why",
    )
    _switch(group, "--overwrite", "replace the run that --save_dir holds")
    group.add_argument(
        "--no-export", dest="export", action="store_false", default=True, help="do not write the small model to model/"
    )


def _data(group: Group) -> None:
    group.add_argument("--dataset", default="cifar100", help=f"one of {', '.join(DATASETS)}")
    group.add_argument("--data", default="data", help="folder of the data; downloaded into it when missing")
    group.add_argument("--workers", type=int, default=4, help="processes that read image folders; others need none")
    group.add_argument("--batch_size", type=int, default=128, help="images per forward pass")
    group.add_argument("--img_size", type=int, help="pixels the model sees; the data set's or architecture's own")
    group.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        help="share of training images that validate. In folders of images val/ is the test set, unless there is a "
        "test/, too: then val/ validates; without either, a fifth of train/ is the test set",
    )
    group.add_argument("--train_limit", type=int, help="keep so many training images, stratified by class")
    group.add_argument(
        "--aug",
        choices=["none", "basic", "strong", "rand"],
        default="basic",
        help="basic: horizontal flips and a random crop, of image files of 8%% to 100%% of the area, resized; of small "
        "data sets shifted by up to 4 pixels. strong: and brightness, contrast and an erased square; image files: and "
        "RandAugment. rand: basic, two operations of RandAugment at magnitude 9 and random erasing (2%% to 33%% of "
        "the area of a quarter of the images), on image files too",
    )
    group.add_argument(
        "--no-flip", dest="flip", action="store_false", default=True, help="--aug without horizontal flips"
    )


def _model(group: Group) -> None:
    group.add_argument(
        "--arch",
        default="vit_tiny",
        help=f"one of {', '.join(BUILDERS)}, timm/NAME (--list_archs), or the folder of an exported model: its shape, "
        "with fresh weights",
    )
    group.add_argument("--patch_size", type=int, help="pixels per patch side; the architecture's own when not given")
    group.add_argument(
        "--pretrained",
        "--vit_pretrained",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="start from timm's public weights, or from a .safetensors, .pth or .npz FILE",
    )
    group.add_argument("--pretrained_tag", help="which of timm's public weights, such as augreg_in21k")
    group.add_argument(
        "--patch_embed",
        choices=["resample", "reinit"],
        default="resample",
        help="pretrained patch embedding of another patch size: resample it, or start it anew",
    )
    _switch(group, "--pretrained_fallback", "start from random weights when the pretrained ones cannot be had")
    group.add_argument(
        "--layer_scale", type=float, metavar="V", help="our ViTs' branches end in a learned factor from V on; off"
    )
    group.add_argument(
        "--stem",
        choices=list(STEMS),
        default="patch",
        help="how our ViTs make tokens of pixels. patch: one convolution per patch; conv: 3x3 convolutions of stride 2 "
        "with batch norm and ReLU, and a 1x1 (patch size a power of two); pretrained patch embeddings have no place in "
        "it, it starts anew",
    )
    group.add_argument(
        "--token_merge",
        type=int,
        default=0,
        metavar="R",
        help="between attention and MLP of each block of a plain ViT, ours or timm's, the R most similar pairs of "
        "tokens merge into their averages (ToMe), at most half of the patch tokens that are left; 0 is off",
    )
    group.add_argument("--init", metavar="FILE", help="initial weights: a state dict of this architecture")


def _train(group: Group) -> None:
    group.add_argument("--epochs", type=int, default=120, help="per state")
    group.add_argument("--opt", choices=["sgd", "adamw"], default="sgd", help="optimizer")
    group.add_argument("--lr", type=float, default=0.01, help="learning rate after the warm-up")
    group.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    group.add_argument("--weight_decay", type=float, default=1e-4, help="on weight matrices, not biases and norms")
    group.add_argument("--warmup", type=int, help="epochs of linear warm-up, per step; epochs // 6 when not given")
    group.add_argument("--sched", choices=["multistep", "cosine"], default="multistep", help="learning-rate schedule")
    group.add_argument("--min_lr", type=float, help="the cosine ends there, at the last step of a state")
    group.add_argument(
        "--layer_decay",
        type=float,
        metavar="D",
        help="for pretrained starts: layer i of a ViT with N blocks trains at D^(N + 1 - i) of the learning rate, the "
        "embedding being layer 0 and the classifier N + 1",
    )
    group.add_argument("--decreasing_lr", help="epochs at which lr is divided by 10; 1/2 and 3/4 when not given")
    group.add_argument("--clip_grad", type=float, help="largest L2 norm of the gradient; off when not given")
    group.add_argument("--label_smoothing", type=float, default=0.0, help="of the cross entropy, in [0, 1)")
    group.add_argument("--mixup", type=float, metavar="A", help="mix images in pairs, shares by Beta(A, A); off")
    group.add_argument(
        "--cutmix", type=float, metavar="A", help="paste rectangles of one image into another, areas by Beta(A, A); off"
    )
    group.add_argument(
        "--drop_path",
        type=float,
        metavar="R",
        help="stochastic depth: images skip a block's branches with a chance that grows from 0 in the first block of a "
        "ViT to R in the last; off",
    )
    group.add_argument(
        "--ema_decay",
        type=float,
        metavar="D",
        help="validate, select and export the exponential moving average of the weights of a state, of decay D, or "
        "(1 + t) / (10 + t) after t steps while that is smaller; off",
    )
    group.add_argument("--accum_steps", type=int, default=1, help="forward passes per optimizer step")
    group.add_argument(
        "--finish_epochs",
        type=int,
        metavar="N",
        help="behind the last state train its selected model for N epochs more, masks as they are, with warm-up, "
        "milestones and cosine over these epochs; off",
    )
    group.add_argument("--finish_lr", type=float, metavar="LR", help="learning rate of the finish; --lr when not given")
    _switch(
        group,
        "--finish_on_all",
        "the finish trains on training and validation images; what it ends with is exported, as nothing is left to "
        "select by",
    )
    group.add_argument(
        "--compile",
        nargs="?",
        const="default",
        default=None,
        choices=["default", "reduce-overhead", "max-autotune", *GRAPHS],
        help="train with torch.compile in one of its modes; graph: capture the whole step as a CUDA graph, bit for bit "
        "what it is without; compiled-graph: both",
    )
    group.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast precision")


def _prune(group: Group) -> None:
    group.add_argument(
        "--struct",
        choices=["rsst", "refill", "imp", "oneshot", "dense"],
        default="rsst",
        help="rsst: penalty first, cut later; refill: cut at once; imp: element-wise lottery ticket; oneshot: remove "
        "all units after state 0; dense: no pruning, one schedule over all states",
    )
    group.add_argument("--pruning_times", type=int, default=20, help="states S; there are S - 1 prunings between them")
    group.add_argument(
        "--rate", type=float, default=0.2, help="of the weights left, per state; heads, blocks, branches: of all"
    )
    group.add_argument(
        "--nm",
        metavar="N:M",
        help="element-wise, in the place of --rate: in the end N of every M consecutive weights of a row stay, as in "
        "2:4; --ratio_schedule says how many stay before that; off when not given",
    )
    group.add_argument(
        "--prune_type",
        choices=["lt", "rewind_lt", "pt", "finetune"],
        default="lt",
        help="a state starts from: initial weights, weights after --rewind_epoch, pretrained ones, trained ones",
    )
    group.add_argument("--rewind_epoch", type=int, help="epoch of state 0 that rewind_lt returns to; epochs // 5")
    group.add_argument("--criteria", help=f"score of a unit: {', '.join(CRITERIA)}; l1 when not given")
    group.add_argument("--score_batches", type=int, default=SCORE_BATCHES, help="training batches that scores see")
    group.add_argument("--fillback_rate", type=float, default=0.0, help="element-wise refill: share given back a layer")
    _switch(
        group, "--prune_patch_embed", "the patch embedding (a conv stem's 1x1) is prunable too, element-wise", "--conv1"
    )
    _switch(group, "--fc", "the classifier rewinds too")
    _switch(group, "--vit_structured", "prune whole heads and neurons")
    group.add_argument(
        "--vit_prune_target",
        choices=list(KINDS),
        default="head",
        help="which units go: heads, neurons, both; branch: whole attentions and MLPs; block: whole blocks; all: "
        "heads, neurons and branches in one ranking by score per MAC",
    )
    group.add_argument("--mlp_prune_ratio", type=float, help="share of all neurons that goes; --rate when not given")
    group.add_argument(
        "--sorting_mode", choices=["layer-wise", "global"], default="layer-wise", help="rank in a layer or over all"
    )
    group.add_argument(
        "--target_macs",
        type=float,
        metavar="F",
        help="share of the dense network's MACs that is left in the end, in (0, 1); says in place of ratios how many "
        "heads, neurons or filters go; off",
    )
    group.add_argument(
        "--target_params", type=float, metavar="F", help="share of the dense network's parameters, likewise; off"
    )
    group.add_argument(
        "--target_latency_ms",
        type=float,
        metavar="T",
        help="milliseconds that a batch of --latency_batch images takes the small network in the end, likewise, as "
        "measured on the device of the run in float32; off",
    )
    group.add_argument("--latency_batch", type=int, metavar="N", help="images; 1 when not given")
    group.add_argument(
        "--ratio_allocation",
        metavar="uniform|global|sensitivity|FILE",
        help="uniform: layers give away one share; global: by one ranking of all; without a target as --sorting_mode, "
        "which it follows when not given; sensitivity: so that the loss rises least, as far as --score_batches of "
        "training images tell where a layer alone loses its lowest-scored units. FILE: counts by layer that the last "
        "pruning reaches, as JSON or as the units.csv of another run",
    )
    group.add_argument(
        "--ratio_schedule",
        choices=["geometric", "linear", "constant"],
        default="geometric",
        help="how the shares of units, and of --nm, grow over the states; the last pruning reaches them",
    )
    group.add_argument(
        "--rank_by",
        choices=["score", "score_per_mac"],
        default="score",
        help="score_per_mac ranks heads and neurons together by cost; needs global sorting and target both",
    )
    group.add_argument("--min_units", type=int, default=1, help="units a layer keeps at least; 0 may empty it")
    group.add_argument(
        "--round_to",
        type=int,
        default=1,
        metavar="N",
        help="neurons and filters that a layer keeps are a multiple of N, the nearest one; heads are left alone",
    )
    group.add_argument(
        "--no-refill",
        dest="refill",
        action="store_false",
        default=True,
        help="surviving units keep the element-wise mask instead of being whole",
    )
    group.add_argument(
        "--compact_training",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the physically smaller network once units are cut (structured runs)",
    )


def _penalty(group: Group) -> None:
    group.add_argument(
        "--RST_schedule", choices=list(rsst.SHAPES), default="exp_custom_exponents", help="shape of lambda over time"
    )
    group.add_argument("--reg_granularity_prune", type=float, default=1.0, help="strength g: lambda ends at g")
    group.add_argument("--exponents", type=float, default=4.0, help="p of exp_custom_exponents")
    group.add_argument(
        "--reg_form",
        choices=["decay", "gradient"],
        default="decay",
        help="decay: shrink by exp(-20 g) in all, whatever the learning rate; gradient: add lambda * w to the gradient",
    )
    group.add_argument(
        "--reg_clock", choices=["epoch", "state"], help="gradient form: the ramp restarts each epoch (default) or not"
    )
    group.add_argument("--reg_finish", type=float, help="share of the state before the cut; 0.25, gradient form 1")
    _switch(group, "--block_loss_grad", "doomed weights get no gradient from the loss")


def _teaching(group: Group) -> None:
    group.add_argument(
        "--teacher",
        metavar="self|PATH|timm/NAME",
        help="learn from this model, too: self, the selected model of state 0, kept as teacher.pt; an "
        "exported model/ or the run's folder that holds it; a checkpoint, or a file of weights of this architecture; "
        "public weights of timm that know the data set's classes",
    )
    group.add_argument("--kd_alpha", type=float, help="the teacher's share of the loss, in [0, 1]; 0.5 with a teacher")
    group.add_argument("--kd_temperature", type=float, help="divides the logits of both; 2 with a teacher")
    _switch(
        group,
        "--kd_hard",
        "the teacher's largest logit is a label for its share; else the divergence from all its logits (soft). Of a "
        "distilled DeiT the head of the distillation token learns from the teacher, the class head from the labels; "
        "without a teacher both do; evaluation takes the mean of both",
    )
    group.add_argument(
        "--kd_features",
        type=float,
        metavar="W",
        help="add W times the mean squared distance between the normalised output tokens behind the last block, the "
        "student's and the teacher's, which has the same width and grid; off when not given",
    )


def _tracking(group: Group) -> None:
    group.add_argument(
        "--wandb_mode",
        choices=["auto", "online", "offline", "disabled"],
        default="auto",
        help="auto: the environment's WANDB_MODE, or online where credentials exist, else offline",
    )
    group.add_argument("--wandb_project", default="RSST", help="Weights & Biases project")
    group.add_argument("--wandb_entity", help="user or team of the project")


def _search(group: Group) -> None:
    group.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="try N sets of the flags of pruning that are left alone, each as a run in --save_dir, and end with those "
        "that no other beats in validation accuracy and cost; the same command goes on, or helps in another shell",
    )
    group.add_argument(
        "--search_space",
        metavar="FILE",
        help="a YAML file of the flags to search instead: a list of values, or {low: 0.1, high: 1, log: true}",
    )
    group.add_argument(
        "--search_objective",
        choices=["macs", "params", "latency"],
        help="the cost: MACs or parameters of the last state, or milliseconds of the small model for one image on this "
        "device; macs, and params where only single weights go",
    )
    group.add_argument(
        "--search_patience",
        type=int,
        metavar="K",
        help="stop a trial that is worse than the median of K or more complete ones that cost no more; 0 stops none; "
        "5 when not given",
    )


GROUPS = {
    "run": _run,
    "data": _data,
    "model": _model,
    "training (each state anew)": _train,
    "pruning": _prune,
    "rsst": _penalty,
    "distillation": _teaching,
    "tracking": _tracking,
    "search": _search,
}


def build_parser() -> OneLineParser:
    parser = OneLineParser(description="Prune a Vision Transformer iteratively: train, prune, rewind, retrain.")
    for title, add_flags in GROUPS.items():
        add_flags(parser.add_argument_group(title))
    return parser
