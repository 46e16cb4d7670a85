#!/usr/bin/env python
"""What a training step costs in each state of a structured run: masked full-size network against the small one.

    python benchmarks/compact_training.py [--arch vit_tiny] [--states 4] [--batch_size 128] [--repeats 9] [--threads N]

The states are those of `--vit_structured --vit_prune_target both --rate 0.67 --mlp_prune_ratio 0.7`. A step is what the
training loop does: batch from device-resident images, forward, backward, gradient mask, SGD, weight mask. Times are
interleaved medians; the limit is dense over remaining MACs.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from dataset import DATASETS, Batches, Split
from models import build_model
from models.vit import CONFIGS
from utils import format_table
from vit_pruning_utils_head_mlp import mark_removed, rank_units
from vit_structured_pruning import remove_units, scheduled_ratio, score_units, unit_masks, vit_macs, vit_units

HEAD_RATIO, MLP_RATIO = 0.67, 0.7


class Step:
    """One training step of one network, with the masks it still needs."""

    def __init__(self, model, masks, data: Batches):
        self.model, self.data = model.train(), data
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        parameters = dict(model.named_parameters())
        self.masked = [parameters[name] for name in masks]
        self.masks = list(masks.values())
        self.count = 0

    def __call__(self) -> float:
        started = time.perf_counter()
        images, labels = self.data.batch(0, 0, self.count % self.data.steps_per_epoch)
        self.count += 1
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.masked:
            torch._foreach_mul_([parameter.grad for parameter in self.masked], self.masks)
        self.optimizer.step()
        if self.masked:
            with torch.no_grad():
                torch._foreach_mul_(self.masked, self.masks)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=list(CONFIGS), default="vit_tiny")
    parser.add_argument("--states", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    dense = build_model(args.arch, 10)
    size = dense.patch_embed.img_size[0]
    images = torch.randint(0, 256, (4 * args.batch_size, 3, size, size), dtype=torch.uint8)
    split = Split(images, torch.randint(0, 10, (len(images),)))
    data = Batches(split, DATASETS["cifar10"], args.batch_size, aug="basic")

    units = vit_units(dense)
    scores = score_units(dense, units, "magnitude")
    steps, limits, kept = {}, {}, {key: range(group.count) for key, group in units.items()}
    for state in range(args.states):
        if state:
            progress = {
                kind: scheduled_ratio("geometric", ratio, state, args.states)
                for kind, ratio in (("head", HEAD_RATIO), ("neuron", MLP_RATIO))
            }
            kept = rank_units(dense, units, mark_removed(scores, kept), progress)
        small = remove_units(copy.deepcopy(dense), units, kept)
        limits[state] = vit_macs(dense) / vit_macs(small)
        masked = copy.deepcopy(dense)
        masks = unit_masks(units, kept, dict(masked.named_parameters())) if state else {}
        steps[state, "masked"] = Step(masked, masks, data)
        steps[state, "compact"] = Step(small, {}, data)

    times: dict[tuple, list[float]] = {key: [] for key in steps}
    for step in steps.values():
        step()
    for _ in range(args.repeats):
        for key, step in steps.items():
            times[key].append(step())

    rows = []
    for state, limit in limits.items():
        masked, compact = times[state, "masked"], times[state, "compact"]
        first = times[0, "masked"]
        gain = statistics.median(a / b for a, b in zip(first, compact, strict=True))
        rows.append(
            {
                "state": state,
                "masked ms": f"{1000 * statistics.median(masked):.1f}",
                "compact ms": f"{1000 * statistics.median(compact):.1f}",
                "over state 0": f"{gain:.2f}x",
                "MACs limit": f"{limit:.2f}x",
                "of the limit": f"{100 * gain / limit:.0f}%",
            }
        )
    head = f"{args.arch}, batch {args.batch_size}, float32, {common.machine()}, {args.repeats} repeats"
    print(f"\n{head}\n\n{format_table(rows, {title: title for title in rows[0]})}")
    common.save("compact_training", {"arch": args.arch, "machine": common.machine(), "rows": rows})


if __name__ == "__main__":
    main()
