#!/usr/bin/env python
"""One global threshold over a ViT's weights: `magnitude_step` against `torch.nn.utils.prune.global_unstructured`.

    python benchmarks/global_threshold.py [--archs vit_tiny vit_base vit_large_imagenet] [--rate 0.2] [--repeats 7]
                                          [--baseline_repeats 2] [--device cpu] [--threads N]

Each prunes the same random weights twice: first from full masks, then what is left. `applied` is `pruning_model_vit`,
which also puts the masks onto the model, as `global_unstructured` does; `kthvalue` is what a careful user would write
in three lines. Times are interleaved medians; memory is the peak above the level before the call, less the masks that
come out (not less the masked weights that `applied` and `global_unstructured` leave), each in a process of its own.
Both must keep as many weights, and the same ones up to ties.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from models import build_model
from models.vit import CONFIGS
from utils import format_table
from vit_pruning_utils import Masks, count_kept, full_masks, magnitude_step, prunable_layers, pruning_model_vit

OURS, APPLIED, TORCH, KTHVALUE = "magnitude_step", "applied", "global_unstructured", "kthvalue"
BASELINE_NEEDS = 14  # times the weights' bytes: what global_unstructured took, with a margin


class Setting:
    """The prunable weights of one architecture, random, and the weights to keep."""

    def __init__(self, arch: str, rate: float, device: str):
        with torch.device("meta"):
            self.shell = build_model(arch, 10)  # only its layers' names and shapes are needed
        generator = torch.Generator().manual_seed(0)
        self.weights: dict[str, Tensor] = {}
        for name, layer in prunable_layers(self.shell).items():
            self.weights[name] = torch.empty(layer.weight.shape).normal_(0, 0.02, generator=generator).to(device)
        self.device = device
        self.total = sum(weight.numel() for weight in self.weights.values())
        self.bytes = 4 * self.total
        self.keep = {1: round(self.total * (1 - rate)), 2: round(self.total * (1 - rate) ** 2)}

    def model(self, masks: Masks | None = None) -> nn.Module:
        """The architecture around the same weights, freed of earlier pruning; the second pruning starts from masks."""
        for name, layer in prunable_layers(self.shell).items():
            if prune.is_pruned(layer):
                prune.remove(layer, "weight")
            layer.weight = nn.Parameter(self.weights[name])
            if masks is not None:
                prune.custom_from_mask(layer, "weight", masks[name])
        return self.shell

    def work(self, name: str, step: int, masks: Masks) -> Callable[[], object]:
        """What is timed: pruning number `step`, from `masks`; everything before it is done on return."""
        left, keep = self.total if step == 1 else self.keep[1], self.keep[step]
        if name == OURS:
            return lambda: magnitude_step(self.weights, masks, keep)
        if name == KTHVALUE:
            return lambda: kthvalue_step(self.weights, left - keep)
        model = self.model(None if step == 1 else masks)
        if name == APPLIED:
            return lambda: pruning_model_vit(model, 1 - keep / left)
        layers = [(layer, "weight") for layer in prunable_layers(model).values()]
        return lambda: prune.global_unstructured(layers, prune.L1Unstructured, amount=left - keep)


def kthvalue_step(weights: dict[str, Tensor], pruned: int) -> Masks:
    threshold = torch.cat([weight.abs().flatten() for weight in weights.values()]).kthvalue(pruned).values
    return {name: (weight.abs() > threshold).to(weight) for name, weight in weights.items()}


def compare(setting: Setting, ours: Masks, theirs: Masks) -> str:
    """One line on whether two results agree; exits when they do not."""
    kept, other = count_kept(ours), count_kept(theirs)
    differing = torch.cat([setting.weights[name][ours[name] != theirs[name]].abs() for name in ours])
    if kept != other or len(differing.unique()) > 1:
        sys.exit(f"results differ: {kept:,} and {other:,} kept, {len(differing):,} weights decided otherwise")
    ties = f", {len(differing)} decided otherwise, all of one absolute value" if len(differing) else ""
    return f"both keep {kept:,} of {setting.total:,}{ties}"


def measure_memory(arch: str, rate: float, device: str, name: str, step: int) -> float:
    """Peak extra memory in multiples of the weights' bytes. For a fresh process."""
    setting = Setting(arch, rate, device)
    masks = full_masks(setting.weights)
    if step == 2:
        # any masks of that density; without a first pruning, whose freed memory would hide part of the second's
        generator = torch.Generator().manual_seed(1)
        for mask in masks.values():
            for row in mask.flatten(1):
                row.copy_(torch.rand(len(row), generator=generator) < 1 - rate)
        setting.keep[1] = count_kept(masks)
        setting.keep[2] = round(setting.keep[1] * (1 - rate))
    work = setting.work(name, step, masks)
    return (common.extra_bytes(work, device) - setting.bytes) / setting.bytes


def memory(arch: str, args: argparse.Namespace, name: str, step: int) -> str:
    command = [sys.executable, __file__, "--archs", arch, "--rate", str(args.rate), "--device", args.device,
               "--threads", str(args.threads), "--measure", name, str(step)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    return f"{json.loads(done.stdout):.2f}x" if done.returncode == 0 else "not measured"


def run(arch: str, args: argparse.Namespace) -> list[dict]:
    setting = Setting(arch, args.rate, args.device)
    names = [OURS, APPLIED, KTHVALUE, TORCH]
    available = common.available_bytes()
    if args.device == "cpu" and available is not None and available < BASELINE_NEEDS * setting.bytes:
        names.remove(TORCH)
        print(f"{arch}: {TORCH} is left out, it needs about {BASELINE_NEEDS * setting.bytes / 2**30:.0f} GiB and "
              f"{available / 2**30:.0f} are available")  # fmt: skip
    start = {1: full_masks(setting.weights)}
    start[2] = magnitude_step(setting.weights, start[1], setting.keep[1])
    if TORCH in names:
        setting.work(TORCH, 1, start[1])()
        theirs = {name: layer.weight_mask for name, layer in prunable_layers(setting.shell).items()}
        print(f"{arch}: {compare(setting, start[2], theirs)}")
        del theirs
        setting.model()

    def candidate(name: str, step: int) -> Callable[[], float]:
        def measure() -> float:
            spent = common.seconds(setting.work(name, step, start[step]), args.device)
            setting.model()  # frees what the call left on the layers
            return spent

        return measure

    keys = [(name, step) for step in (1, 2) for name in names if (name, step) != (KTHVALUE, 2)]
    fewer = {key: args.baseline_repeats for key in keys if key[0] in (KTHVALUE, TORCH)}
    times = common.interleaved({key: candidate(*key) for key in keys}, args.repeats, fewer)
    rows = []
    for name, step in keys:
        low, middle, high = (1000 * value for value in common.quartiles(times[name, step]))
        gain = common.pairwise(times[TORCH, step], times[name, step]) if TORCH in names else None
        rows.append(
            {
                "arch": arch,
                "pruning": step,
                "by": name,
                "rounds": len(times[name, step]),
                "median ms": f"{middle:.1f}",
                "quartiles ms": f"{low:.1f}-{high:.1f}",
                f"over {TORCH}": "" if gain is None else f"{gain:.1f}x",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--archs", choices=list(CONFIGS), nargs="+", default=["vit_tiny", "vit_base", "vit_large_imagenet"]
    )
    parser.add_argument("--rate", type=float, default=0.2, help="fraction of the remaining weights to prune each time")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--baseline_repeats", type=int, default=2, help="rounds of the slow baselines")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "PRUNING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)  # nobody trains vit_large from scratch here
    if args.measure:
        name, step = args.measure
        print(json.dumps(measure_memory(args.archs[0], args.rate, args.device, name, int(step))))
        return

    rows = [row for arch in args.archs for row in run(arch, args)]
    for row in rows:  # only now, when this process holds no weights
        row["extra memory"] = memory(row["arch"], args, row["by"], row["pruning"])
    head = f"float32, rate {args.rate}, {args.device}, {common.machine()}"
    print(f"\n{head}\nextra memory: peak above the level before the call, less the masks that come out, as a multiple")
    print(f"of the weights\n\n{format_table(rows, {title: title for title in rows[0]})}")
    common.save("global_threshold", {"head": head, "rows": rows})


if __name__ == "__main__":
    main()
