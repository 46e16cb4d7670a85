"""The Vision Transformer that runs of the whole command train in tests, and such runs with what was seen in them."""

import contextlib
import io
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

# a run of three states; --arch vit_micro stands in `furnish`
MICRO = str.split(
    "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.3 --no-export"
)
STEPS = 3  # an epoch of it
BOTH = ("--vit_structured", "--vit_prune_target", "both")


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
        seen.run = training.run
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
    seen.out, seen.err, seen.log = out.getvalue(), err.getvalue(), (seen.dir / "run.log").read_text()
    return seen
