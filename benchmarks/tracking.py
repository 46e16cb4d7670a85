#!/usr/bin/env python
"""What tracking costs a training step of vit_tiny: off, and offline at the default and the tightest `--print_freq`.

    python benchmarks/tracking.py [--arch vit_tiny] [--batch_size 128] [--steps 20] [--repeats 15] [--threads N]

Each round trains some steps of the real loop with every tracker in turn, on runs that are otherwise the same. With
`--print_freq 1` the loop itself has more to do, as it reads and logs the loss of every step, so tracking is compared
with no tracking at the same frequency. On a busy machine a percent of wall-clock time is lost in noise, so the CPU time
that handing over one step's numbers takes of the run's process is shown beside that of a step.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from benchmarks import common
from benchmarks.train_step import training_state

EVERY = (200, 1)  # the default --print_freq, and the worst case
EPOCH = 201  # steps; the last one of an epoch is logged by the epoch


class TrackedSteps:
    """Steps of a run; a call returns how many a second there were."""

    def __init__(self, mode: str, flags: list[str], steps: int):
        self.training, self.steps = training_state([*flags, "--wandb_mode", mode], steps=EPOCH), steps
        self.run = self.training.run
        self.note = self.run.save_dir / "tracking.json"
        self.step()
        if mode != "disabled":
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Starting wandb takes a second of a run of hours; here it would be all that is measured."""
        self.run.track({"ready": 1.0})
        for _ in range(600):
            if self.note.exists():
                return
            time.sleep(0.1)
        raise SystemExit("wandb does not start; try a run with --wandb_mode offline")

    def step(self) -> None:
        self.training.step()

    def __call__(self) -> float:
        return self.steps / common.seconds(lambda: [self.step() for _ in range(self.steps)])

    def sent(self) -> bool:
        return self.note.exists() and json.loads(self.note.read_text())["step"] == self.run.tracker.last_step

    def handing_over(self, count: int = 500) -> float:
        """Seconds of this process's CPU, all threads, to hand one step's numbers to the process that sends them."""
        names = ("train/loss", "train/accuracy", "train/lr", "rsst/lambda", "rsst/residual")
        started = time.process_time()
        for number in range(count):
            self.run.track(dict.fromkeys(names, number / 7), after=1 + number)
        while not self.sent():
            time.sleep(0.1)
        return (time.process_time() - started) / count

    def finish(self) -> bool:
        """Whether all that was logged has been sent."""
        self.run.tracker.finish()
        return self.sent()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="vit_tiny")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(logging.NullHandler())  # lines are made, and nobody's screen slows them down

    shared = ["--arch", args.arch, "--batch_size", str(args.batch_size), "--amp", "off"]
    runs = {
        (mode, every): TrackedSteps(mode, [*shared, "--print_freq", str(every)], args.steps)
        for every in EVERY
        for mode in ("disabled", "offline")
    }
    speeds = common.interleaved({str(key): run for key, run in runs.items()}, args.repeats)
    started = time.process_time()
    runs["disabled", 200].step()
    step_cpu, hand_cpu = time.process_time() - started, runs["offline", 1].handing_over()
    rows = []
    for (mode, every), run in runs.items():
        speed = speeds[str((mode, every))]
        low, middle, high = common.quartiles(speed)
        cost = common.pairwise(speeds[str(("disabled", every))], speed) - 1
        rows.append(
            {
                "print_freq": every,
                "tracking": mode,
                "steps/s": f"{middle:.3f}",
                "quartiles": f"{low:.3f}-{high:.3f}",
                "cost": f"{100 * cost:+.2f}%" if mode != "disabled" else "-",
                "all sent": {True: "yes", False: "-"}[run.finish()],
            }
        )
    print(f"\n{args.arch}, batch {args.batch_size}, {common.machine()}, {args.repeats} rounds of {args.steps} steps\n")
    print(utils.format_table(rows, {title: title for title in rows[0]}))
    line = f"handing over takes {1e6 * hand_cpu:.0f} us of CPU, {100 * hand_cpu / step_cpu:.3f}% of a step's"
    print(line)
    common.save("tracking", {"machine": common.machine(), "rows": rows, "handing_over": line})


if __name__ == "__main__":
    main()
