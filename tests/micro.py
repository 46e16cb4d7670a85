"""The Vision Transformer that runs of the whole command train in tests, and such runs with what was seen in them."""

import contextlib
import csv
import io
import json
import math
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import export
import main_imp_fillback as entry
import models
import utils
from dataset import load_dataset
from engine.model import first_model
from engine.run import Run
from engine.training import StateTraining
from models.vit import VisionTransformer
from vit_structured_pruning import scatter_tensors

DIM, DEPTH, HEADS, HEAD_DIM, HIDDEN, TOKENS = 24, 2, 4, 6, 48, 5
WHOLE = 14_818  # parameters with 10 classes
PATCH_EMBED = 3 * 8 * 8 * DIM
HEAD_WEIGHTS, NEURON_WEIGHTS = 4 * DIM * HEAD_DIM, 2 * DIM
PRUNABLE = DEPTH * (HEADS * HEAD_WEIGHTS + HIDDEN * NEURON_WEIGHTS)
HEAD_MACS = 4 * TOKENS * DIM * HEAD_DIM + 2 * TOKENS * TOKENS * HEAD_DIM
NEURON_MACS = 2 * TOKENS * DIM
PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LAYERS = [f"blocks.{block}.{part}" for block in range(DEPTH) for part in PARTS]

# a run of three states; --arch vit_micro stands in `furnish`
MICRO = str.split(
    "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.3 --no-export"
)
STEPS = 3  # an epoch of it
BOTH = ("--vit_structured", "--vit_prune_target", "both")
TIMES = ("seconds", "images_per_second")


# `done` of conftest.py looks at them
RUNS = {
    "rsst": "--struct rsst --init {noisy} --epochs 4 --reg_finish 0.5 --RST_schedule x^2 --reg_granularity_prune 0.4 "
    "--print_freq 1",
    "rsst units": "--struct rsst {both} --fc --init {noisy} --epochs 4 --reg_finish 0.5 --RST_schedule x --rate 0.5 "
    "--weight_decay 0.01 --print_freq 2",
    "rsst adamw": "--struct rsst {both} --rate 0.5 --opt adamw --lr 0.005 --clip_grad 0.5 --no-compact_training "
    "--criteria l2 --reg_finish 0.75 --epochs 4",
    "rsst rewound": "--struct rsst {both} --prune_type rewind_lt --rewind_epoch 1 --fc --criteria saliency --amp bf16",
    "rsst pretrained": "--struct rsst --prune_type pt --pretrained {noisy} --fc --conv1 --verbose",
    "refill": "--struct refill --fillback_rate 0.4 --init {noisy} --rate 0.15 --pruning_times 4",
    "refill rewound": "--struct refill --prune_type rewind_lt --rewind_epoch 1 --fillback_rate 0.4 --opt adamw "
    "--lr 0.01 --weight_decay 0.01",
    "refill finetuned": "--struct refill --prune_type finetune --repair none --fillback_rate 0.4 --init {noisy}",
    "refill pretrained": "--struct refill --vit_structured --rate 0.5 --prune_type pt --pretrained {noisy} "
    "--ratio_schedule linear --sched cosine --warmup 1 --criteria remain",
    "refill units": "--struct refill {both} --prune_type finetune --repair none --init {noisy} --no-compact_training",
    "imp": "--struct imp --prune_type rewind_lt --rewind_epoch 0 --fc --init {noisy} --decreasing_lr 1,80,120",
    "imp units": "--struct imp --vit_structured --vit_prune_target mlp --ratio_schedule constant",
    "oneshot": "--struct oneshot {both} --rate 0.5 --mlp_prune_ratio 0.3 --no-compact_training",
    "emptied": "--struct rsst {both} --min_units 0 --sorting_mode global --rate 0.9 --mlp_prune_ratio 0.95",
    "no refill": "--struct refill {both} --no-refill --mlp_prune_ratio 0.25",
    "dense": "--struct dense --decreasing_lr 1 --warmup 0",
    "one state": "--pruning_times 1",
}


def flags_of(name, noisy):
    return str.split(RUNS[name].format(noisy=noisy, both=" ".join(BOTH)))


def vit_micro(num_classes=None, img_size=None, **overrides):
    geometry = {"img_size": img_size or 16, "patch_size": 8, "num_classes": num_classes or 10, "embed_dim": DIM}
    return VisionTransformer(**{**geometry, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2, **overrides})


def masks_of(checkpoint, name):
    """The 0/1 masks of a set in a checkpoint, flat; equal sets are stored once, as the other's name."""
    packed = checkpoint["run"][name]
    if isinstance(packed, str):
        return masks_of(checkpoint, packed)
    inflated = {layer: zlib.decompress(mask["bits"].numpy().tobytes()) for layer, mask in packed.items()}
    bits = {layer: np.frombuffer(content, dtype=np.uint8) for layer, content in inflated.items()}
    return {layer: np.unpackbits(bits[layer], count=math.prod(mask["shape"])) for layer, mask in packed.items()}


def call(argv):
    """Exit code of the command, in process."""
    try:
        return entry.main([str(part) for part in argv])
    except SystemExit as stop:
        return stop.code


def runner(tmp_path, capsys, base):
    """run("--struct", "imp", name="a") -> what the command, with the flags `base`, did and left in tmp_path/a."""

    def run(*flags, name="run", base=base, code=0):
        folder = tmp_path / name
        capsys.readouterr()
        found = call([*base, "--save_dir", folder, *flags])
        out, err = capsys.readouterr()
        assert found == code, err
        return SimpleNamespace(dir=folder, out=out, err=err)

    return run


def furnish(patch, here):
    """What every run in a test finds: the micro model, an empty current folder, a disk that does not wait."""
    patch.setitem(models.BUILDERS, "vit_micro", vit_micro)
    patch.setattr(os, "fsync", lambda _: None)  # no power fails here, and a shared disk is slow
    patch.chdir(here)


def wrap(patch, method, before=None, after=None):
    """f(owner, *arguments) at a method of the run or of a state's training, whichever has it."""
    (owner,) = (owner for owner in (Run, StateTraining) if hasattr(owner, method))
    original = getattr(owner, method)

    def wrapped(self, *arguments):
        if before:
            before(self, *arguments)
        result = original(self, *arguments)
        if after:
            after(self, *arguments)
        return result

    patch.setattr(owner, method, wrapped)


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics(folder, drop=()):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in drop} for line in lines]


def log_of(folder):
    return (folder / "run.log").read_text()


def assert_same_tensors(found, expected, skip=()):
    assert found.keys() == expected.keys()
    for name in expected:
        assert name.startswith(tuple(skip)) or torch.equal(found[name], expected[name]), name


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one if one[name].numel())


SHARES = {
    "geometric": lambda ratio, progress: 1 - (1 - ratio) ** progress,
    "linear": lambda ratio, progress: ratio * progress,
    "constant": lambda ratio, progress: ratio if progress else 0.0,
}


def surviving(weights, names=LAYERS):
    return sum(int((weights[f"{name}.weight"] != 0).sum()) for name in names)


def dead_rows(layer, kept):
    """Rows of qkv, or of fc1, that belong to units which are gone."""
    if layer.endswith("attn"):
        gone = [head for head in range(HEADS) if head not in kept]
        return [c * DIM + head * HEAD_DIM + i for c in range(3) for head in gone for i in range(HEAD_DIM)]
    return [neuron for neuron in range(HIDDEN) if neuron not in kept]


def masked(weights, masks, kept):
    """weights x mask, with the biases of units that are gone, by hand."""
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for name, mask in masks.items():
        expected[f"{name}.weight"] *= mask
    for layer, ids in kept.items():
        rows = "qkv" if layer.endswith("attn") else "fc1"
        expected[f"{layer}.{rows}.bias"][dead_rows(layer, ids)] = 0
    return expected


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def dense_shaped(training):
    """The weights of the network that trains, in the shapes of the whole one."""
    return clones(scatter_tensors(training.model.state_dict(), training.run.units, training.model_kept))


def moments(training):
    """{parameter: {moment: tensor}} of the optimizer."""
    named, state = training.model.named_parameters(), training.optimizer.state
    return {name: clones({key: torch.as_tensor(v) for key, v in state[p].items()}) for name, p in named}


def make_run(folder, *flags):
    """The run of a command up to its first state, without the command's log; close it in the end."""
    args = entry.parse_args([*MICRO, "--wandb_mode", "disabled", "--save_dir", str(folder), *map(str, flags)])
    Path(folder).mkdir(exist_ok=True)
    utils.seed_everything(args.seed)
    splits = load_dataset(args.dataset, args.data, 16, args.val_fraction, args.train_limit)
    run = Run(args, torch.device("cpu"), splits, first_model(args), Path(folder))
    run.start()
    return run


def record(folder, argv):
    """Run the command and see: where each state starts, what each step, epoch, cut and state leaves.

    Weights are clones in dense shapes. Nothing is drawn or measured in the end: that takes longer than the run.
    """
    seen = SimpleNamespace(dir=folder / "run", starts={}, steps={}, epochs={}, ends={}, cuts={})

    def facts(run, weights):
        progress = run.progress
        sets = {name: getattr(progress, name) for name in ("masks", "target", "elementwise", "kept", "target_kept")}
        return SimpleNamespace(**{name: dict(content) for name, content in sets.items()}, weights=weights)

    def built(training):
        seen.run, seen.training = training.run, training
        if training.progress.step == 0:
            seen.starts[training.progress.state] = facts(training.run, clones(training.run.dense.state_dict()))

    def stepped(training):
        now = facts(training.run, dense_shaped(training))
        now.width = sum(parameter.numel() for parameter in training.model.parameters())
        now.types = {parameter.dtype for parameter in training.model.parameters()}
        (now.rate,) = {float(group["lr"]) for group in training.optimizer.param_groups}
        now.penalised = bool(training.penalty)
        seen.steps[training.progress.state, training.progress.step] = now

    def epoch_ended(training):
        run, progress = training.run, training.progress
        seen.epochs[progress.state, progress.step // run.steps_per_epoch - 1] = SimpleNamespace(
            weights=clones(run.dense.state_dict()),
            rewind=clones(run.rewind_weights),
            best=dict(progress.best),
            penalised=bool(training.penalty),
        )

    def ended(run):
        seen.ends[run.progress.state - 1] = clones(run.dense.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        here = folder / "cwd"
        here.mkdir(parents=True)
        furnish(patch, here)
        patch.setattr(entry.report, "write", lambda _: None)
        patch.setattr(export, "size_table", lambda *_: "")
        wrap(patch, "build", after=built)
        wrap(patch, "step", after=stepped)
        wrap(patch, "end_epoch", after=epoch_ended)
        wrap(patch, "end_state", after=ended)
        wrap(patch, "cut", before=lambda training: seen.cuts.update({training.progress.state: [moments(training)]}))
        wrap(patch, "cut", after=lambda training: seen.cuts[training.progress.state].append(moments(training)))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            seen.code = call([*argv, "--save_dir", seen.dir])
        seen.elsewhere = os.listdir(here)
    seen.out, seen.err = out.getvalue(), err.getvalue()
    seen.log = log_of(seen.dir) if seen.dir.exists() else ""
    return seen


def linked(run, folder):
    """The files of the run without its model/."""
    folder.mkdir()
    for name in ("args.yaml", "metrics.jsonl", "states.csv", "best.pt", "checkpoint.pt"):
        os.link(run / name, folder / name)  # whoever changes one writes a new file
    return folder


def assert_one_line(result, *words, code=2):
    found, _, err = result
    assert found == code, err
    assert err.count("\n") == 1, err
    assert "error: " in err
    assert all(str(word) in err for word in words), err
