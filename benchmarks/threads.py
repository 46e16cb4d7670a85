#!/usr/bin/env python
"""A training step alone and beside another busy process, by what OpenMP's threads do while they wait.

    python benchmarks/threads.py [--arch vit_tiny] [--batch_size 32] [--repeats 6] [--competitors 1]

PyTorch's CPU threads wait for one another by spinning. On a machine that does other work as well, the thread that all
wait for gets no core while the others spin on theirs; OMP_WAIT_POLICY=passive lets them sleep. The policy is read when
PyTorch is loaded, so each kind of step runs in a process of its own; the rounds take turns. The competitors count in a
loop, one core each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from utils import format_table

POLICIES = ("not set", "passive")


def serve(arch: str, batch_size: int) -> None:
    """In a process of its own: one training step and its seconds for each line of standard input."""
    from benchmarks.train_step import OurStep

    step = OurStep(["--arch", arch, "--batch_size", str(batch_size), "--amp", "off"])
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(common.seconds(step), flush=True)


class StepProcess:
    """Training steps under one policy; a call returns the seconds of one."""

    def __init__(self, policy: str, args: argparse.Namespace):
        command = [sys.executable, __file__, "--serve", "--arch", args.arch, "--batch_size", str(args.batch_size)]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        if policy != "not set":
            environment["OMP_WAIT_POLICY"] = policy
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        while self.answer() != "ready":
            pass

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process of this benchmark ended early")
        return line.strip()

    def __call__(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.answer())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def competing(count: int):
    """`count` processes that keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def beside(step: StepProcess, competitors: int) -> float:
    with competing(competitors):
        return step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="vit_tiny")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--competitors", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.arch, args.batch_size)
        return
    steps = {policy: StepProcess(policy, args) for policy in POLICIES}
    cases = {"alone": 0, f"beside {args.competitors} busy": args.competitors}
    work = {
        f"{case}, {policy}": partial(beside, steps[policy], count)
        for case, count in cases.items()
        for policy in POLICIES
    }
    times = common.interleaved(work, args.repeats)
    for step in steps.values():
        step.end()
    rows = []
    for case in cases:
        default = times[f"{case}, {POLICIES[0]}"]
        for policy in POLICIES:
            spent = times[f"{case}, {policy}"]
            low, middle, high = (1000 * value for value in common.quartiles(spent))
            rows.append(
                {
                    "case": case,
                    "OMP_WAIT_POLICY": policy,
                    "median ms": f"{middle:.0f}",
                    "quartiles ms": f"{low:.0f}-{high:.0f}",
                    "over not set": f"{common.pairwise(default, spent):.2f}x",
                }
            )
    print(f"\n{args.arch}, batch {args.batch_size}, {common.machine()}, {args.repeats} rounds\n")
    print(format_table(rows, {title: title for title in rows[0]}))
    common.save("threads", {"machine": common.machine(), "rows": rows})


if __name__ == "__main__":
    main()
