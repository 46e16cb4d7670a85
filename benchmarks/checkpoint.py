#!/usr/bin/env python
"""Checkpoints: how large they are, and how long training waits for one.

    python benchmarks/checkpoint.py [--archs vit_tiny vit_base] [--repeats 5]

Ours: masks one bit an element, initial weights by reference, a copy in memory that a thread writes. Plain: `torch.save`
of model, optimizer, initial weights and masks as floats, and the training waits. Size is given over the fp32 weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from benchmarks import common
from benchmarks.train_step import training_state
from engine.training import StateTraining


def save_plainly(training: StateTraining, path: Path) -> None:
    content = {
        "model": training.network.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "initial": training.run.rewind_weights,
        "masks": training.progress.masks,
        "target": training.progress.target,
    }
    torch.save(content, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--archs", nargs="+", default=["vit_tiny", "vit_base"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for arch in args.archs:
        for optimizer in ("sgd", "adamw"):
            training = training_state(
                ["--arch", arch, "--batch_size", "2", "--opt", optimizer, "--no-compact_training"]
            )
            run = training.run
            training.step()
            weights = 4 * sum(parameter.numel() for parameter in run.dense.parameters())
            latest, plain = run.save_dir / "checkpoint.pt", run.save_dir / "plain.pt"
            candidates = {
                "ours": partial(common.seconds, run.checkpoint),
                "written": partial(common.seconds, run.recorder.writer.wait),  # of ours, right after it
                "plain": partial(common.seconds, partial(save_plainly, training, plain)),
            }
            times = common.interleaved(candidates, args.repeats)
            written = [sum(pair) for pair in zip(times["ours"], times.pop("written"), strict=True)]
            gain = common.pairwise(times["plain"], times["ours"])
            for name, path in (("plain", plain), ("ours", latest)):
                low, middle, high = (1000 * value for value in common.quartiles(times[name]))
                rows.append(
                    {
                        "model": arch,
                        "optimizer": optimizer,
                        "checkpoint": name,
                        "size": f"{path.stat().st_size / 1e6:,.1f} MB",
                        "over weights": f"{path.stat().st_size / weights:.2f}x",
                        "training waits": f"{middle:.1f} ms",
                        "quartiles": f"{low:.1f}-{high:.1f} ms",
                        "on disk after": f"{1000 * common.quartiles(written)[1]:.1f} ms" if name == "ours" else "",
                        "shorter wait": f"{gain:.1f}x" if name == "ours" else "",
                    }
                )
    print(f"\n{common.machine()}, {args.repeats} repeats\n")
    print(utils.format_table(rows, {title: title for title in rows[0]}))
    common.save("checkpoint", {"machine": common.machine(), "rows": rows})


if __name__ == "__main__":
    main()
