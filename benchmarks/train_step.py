#!/usr/bin/env python
"""One training step of the real loop against a plain one, and what a training run of each model costs.

    python benchmarks/train_step.py [--archs vit_tiny vit_small] [--batch_size 128] [--repeats 7] [--threads N]
    python benchmarks/train_step.py --models vit_tiny vit_small vit_base     memory, images/s, seconds an epoch

The plain step is what one writes without much thought: eager float32, `torch.nn.utils.prune` masks, a penalty that
visits the layers with index lists, `.item()` in every step. "plain, no lists" is the same without that penalty:
the gap between the two is what the lists alone cost. All train the same network on the same images in the RSST ramp of
a state whose first units are cut already; the plain steps get ready-made batches, ours augment theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import torch
import torch.nn.functional as F
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from benchmarks import common
from cli.parse import parse_args
from dataset import DATASETS, Split, Splits
from engine.choose import choose_target
from engine.model import make_model
from engine.run import Run
from engine.training import StateTraining
from families import family_of
from models import build_model

CIFAR_IMAGES = 50_000


def training_state(flags: list[str], device: str = "cpu", steps: int = 4) -> StateTraining:
    """The training of a run on random images, ready for `step()` in the RSST ramp of state 2.

    A third of the heads and neurons is cut and another part is doomed; `flags` are the command line's.
    """
    folder = tempfile.mkdtemp(prefix="bench-")
    ratios = ["--vit_structured", "--vit_prune_target", "both", "--rate", "0.67", "--mlp_prune_ratio", "0.7"]
    rsst = ["--struct", "rsst", "--criteria", "magnitude", "--pruning_times", "3", "--epochs", "1000", "--warmup", "0"]
    always = ["--wandb_mode", "disabled", "--save_dir", folder, "--device", device, "--dataset", "cifar10"]
    arch = flags[flags.index("--arch") + 1]
    if family_of(build_model(arch, 10)).counts_by == "density":
        ratios = []
    args = parse_args([*always, *rsst, *ratios, *flags])
    where = torch.device(device)
    model = make_model(args)
    size = family_of(model).image_size(model)
    count = steps * args.batch_size * args.accum_steps
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    split = Split(images, torch.randint(0, 10, (count,)))
    few = Split(images[:8], split.labels[:8])
    run = Run(args, where, Splits(split, few, few, DATASETS["cifar10"]), model, Path(folder))
    weakref.finalize(run, shutil.rmtree, folder, ignore_errors=True)
    run.start()
    for run.progress.state in (1, 2):
        run.begin_state()
        target = choose_target(run)
        run.doom(target)
        if run.progress.state == 1:
            run.progress.masks, run.progress.kept = target
        run.rewind()
    return StateTraining(run)


class OurStep:
    def __init__(self, flags: list[str], device: str = "cpu"):
        self.training = training_state(flags, device)

    def __call__(self) -> None:
        self.training.step()

    def bookkeeping(self) -> None:
        """What masks and penalty add to a step."""
        training = self.training
        for parameter in training.network.masked:
            parameter.grad = parameter.detach()  # any numbers do, and these are masked already
        training.mask_gradients()
        training.mask_weights()
        training.penalty.set_(training.ramp.exponent_at(training.progress.step + 1))
        training.penalty.shrink_(training.ramp.parts)
        training.optimizer.zero_grad(set_to_none=True)


class PlainStep:
    """The same state of the same run, written plainly."""

    def __init__(self, run: Run, arch: str, lists: bool = True):
        self.model = build_model(arch, 10).to(run.device)
        self.model.load_state_dict(run.dense.state_dict())
        self.doomed = []
        for name, mask in run.progress.masks.items():
            module = self.model.get_submodule(name)
            target = run.progress.target[name]
            dim = 0 if name.endswith(("qkv", "fc1")) else 1
            gone = (mask - target).flatten(1).any(1 - dim).nonzero().flatten().tolist()
            prune.custom_from_mask(module, "weight", mask)
            if lists:
                self.doomed.append((module, dim, gone))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.batches = [run.round.data.batch(0, 0, step) for step in range(2)]
        self.steps, self.loss, self.correct = 0, 0.0, 0

    def __call__(self) -> None:
        images, labels = self.batches[self.steps % len(self.batches)]
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        strength = 1e-3 * self.steps
        for module, dim, gone in self.doomed:
            for index in gone:
                weight, gradient = module.weight_orig, module.weight_orig.grad
                gradient.select(dim, index).add_(strength * weight.detach().select(dim, index))
        self.optimizer.step()
        self.loss += loss.item()
        self.correct += (logits.argmax(1) == labels).sum().item()
        self.steps += 1


def compare(args: argparse.Namespace) -> None:
    rows, shares = [], []
    for arch in args.archs:
        flags = ["--arch", arch, "--batch_size", str(args.batch_size), "--no-compact_training"]
        ours = OurStep([*flags, "--amp", "off"])
        steps = {
            "plain": PlainStep(ours.training.run, arch),
            "plain, no lists": PlainStep(ours.training.run, arch, lists=False),
            "ours, full size": ours,
            "ours, full size, bf16": OurStep([*flags, "--amp", "bf16"]),
            "ours, small": OurStep([*flags, "--amp", "off", "--compact_training"]),
            "ours, small, bf16": OurStep([*flags, "--amp", "bf16", "--compact_training"]),
        }
        if args.compile:
            steps["ours, full size, compiled"] = OurStep([*flags, "--amp", "off", "--compile"])
            steps["ours, full size, bf16, compiled"] = OurStep([*flags, "--amp", "bf16", "--compile"])
        for step in steps.values():
            step()
        work = {**steps, "bookkeeping": ours.bookkeeping}
        times = common.interleaved({name: partial(common.seconds, each) for name, each in work.items()}, args.repeats)
        book = times.pop("bookkeeping")
        for name, spent in times.items():
            low, middle, high = common.quartiles(spent)
            rows.append(
                {
                    "model": arch,
                    "step": name,
                    "median ms": f"{1000 * middle:.0f}",
                    "quartiles ms": f"{1000 * low:.0f}-{1000 * high:.0f}",
                    "over plain": f"{common.pairwise(times['plain'], spent):.2f}x",
                }
            )
        share = common.pairwise(book, times["ours, full size"])
        shares.append(f"{arch}: masks and penalty take {100 * share:.2f}% of a step")
    print(f"\nbatch {args.batch_size}, {common.machine()}, {args.repeats} repeats\n")
    print(utils.format_table(rows, {title: title for title in rows[0]}))
    print("\n".join(shares))
    common.save("train_step", {"machine": common.machine(), "rows": rows, "bookkeeping": shares})


def measure_one(arch: str, batch_size: int, amp: str, repeats: int) -> dict:
    """In a process of its own: peak memory and images/s of a step at full size."""
    flags = ["--arch", arch, "--batch_size", str(batch_size), "--amp", amp, "--no-compact_training"]
    steps = []

    def start() -> None:
        steps.append(OurStep(flags))
        steps[0]()

    memory = common.extra_bytes(start)
    times = common.interleaved({"step": partial(common.seconds, steps[0])}, repeats)["step"]
    return {"memory": memory, "images_per_second": batch_size / common.quartiles(times)[1]}


def models(args: argparse.Namespace) -> None:
    rows = []
    for arch in args.models:
        row = {"model": arch, "parameters": f"{sum(p.numel() for p in build_model(arch, 10).parameters()):,}"}
        for amp, precision in (("off", "float32"), ("bf16", "bf16")):
            command = [sys.executable, __file__, "--one", arch, "--batch_size", str(args.batch_size), "--amp", amp]
            command += ["--repeats", str(args.repeats), "--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            speed = found["images_per_second"]
            row[f"{precision} memory"] = f"{found['memory'] / 2**30:.2f} GiB"
            row[f"{precision} images/s"] = f"{speed:,.1f}"
            row[f"{precision} CIFAR epoch"] = f"{0.9 * CIFAR_IMAGES / speed:,.0f} s"
        rows.append(row)
    print(f"\ntraining, batch {args.batch_size}, {common.machine()}, {args.repeats} repeats\n")
    print(utils.format_table(rows, {title: title for title in rows[0]}))
    common.save("train_models", {"machine": common.machine(), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--archs", nargs="+", default=["vit_tiny", "vit_small"])
    parser.add_argument("--models", nargs="+", help="the cost of each model instead, in a process of its own")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="time the compiled steps too")
    parser.add_argument("--amp", choices=["off", "bf16"], default="off", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.one:
        print(json.dumps(measure_one(args.one, args.batch_size, args.amp, args.repeats)))
    elif args.models:
        models(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
