#!/usr/bin/env python
"""What several processes make of a training step: images/s, and the share of it that goes into exchanging gradients.

    python benchmarks/scaling.py [--processes 1 2] [--arch vit_tiny] [--batch_size 32] [--repeats 9]
    python benchmarks/scaling.py --expected          ViT-Large on 8 and 64 GPUs: a computation, not a measurement

The measured step is the real loop's (see train_step.py), in processes with one thread each that find one another by the
environment that torchrun sets and exchange gradients over gloo. All groups of processes live side by side and take
turns; those that wait sleep. A group is measured with the batch of one process shared among all, and with as much for
each process. The exchange's share is what a step loses when the gradients are not exchanged (`no_sync` of PyTorch's
DistributedDataParallel), over the step: what the backward pass hides is not in it.

`--expected` works out, from the model's own counts, for n GPUs with B images each,

    compute     t = 3 x 2 x MACs x B / (sustained x peak)           the backward pass is two thirds of it
    exchange    c = 2 (n - 1) / n x gradient bytes / link           a ring all-reduce; the slowest link sets its pace
    efficiency without overlap    t / (t + c)
    efficiency with overlap       t / (t + max(c - 2/3 t, c x bucket / gradient bytes))

against one GPU with the same B, one forward pass a step. With overlap the exchange runs beside the backward pass, but
for the last bucket, which is full only when that pass ends. The link is the slower one of a GPU's to its node and a
node's to the others: rings cross each node's border once, whatever the number of its GPUs.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads; see threads.py

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from families import family_of
from models import build_model
from pruning.units import count_parameters
from utils import format_table

GIGA = 1e9
BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends together

# ------------------------------------------------------------------------------------------------------- measurement


def serve(args: argparse.Namespace) -> None:
    """In one process of a group: for each line of standard input its number of steps, in seconds.

    A line is `exchange`, or `keep` for steps whose gradients stay where they are.
    """
    from benchmarks.train_step import OurStep
    from engine.processes import joined

    out = sys.stdout  # all but the first process are quiet from here on
    with joined() as processes:
        processes.pick_device("cpu", gpu=0)
        flags = ["--arch", args.arch, "--batch_size", str(args.batch_size), "--amp", args.amp]
        step = OurStep([*flags, "--no-compact_training", "--print_freq", "1000000"], processes=processes)

        def steps() -> None:
            for _ in range(args.steps):
                step()

        steps()
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            processes.meet()
            if line.strip() == "exchange":
                spent = common.seconds(steps)
            else:
                with step.training.wrapped.no_sync():
                    spent = common.seconds(steps)
            print(spent, file=out, flush=True)


class Group:
    """Processes that train together, each with one thread; a call returns the seconds of a step, the slowest one's."""

    def __init__(self, size: int, batch_size: int, args: argparse.Namespace):
        self.size, self.batch_size, self.steps = size, batch_size, args.steps
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--serve", "--arch", args.arch, "--batch_size", str(batch_size)]
        command += ["--amp", args.amp, "--steps", str(args.steps)]
        self.members = []
        for rank in range(size):
            torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = {**os.environ, **{name: str(value) for name, value in torchrun.items()}}
            member = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            self.members.append(member)
        while not all(answer == "ready" for answer in self._answers()):
            pass

    def _answers(self) -> list[str]:
        lines = [member.stdout.readline() for member in self.members]
        if not all(lines):
            for member in self.members:
                member.kill()
            raise SystemExit("a process of this benchmark ended early")
        return [line.strip() for line in lines]

    def __call__(self, how: str = "exchange") -> float:
        for member in self.members:
            member.stdin.write(f"{how}\n")
            member.stdin.flush()
        return max(map(float, self._answers())) / self.steps

    def end(self) -> None:
        for member in self.members:
            member.stdin.close()
        for member in self.members:
            member.wait()


def measure(args: argparse.Namespace) -> None:
    sizes = dict.fromkeys([1, *args.processes])
    cases = dict.fromkeys((size, batch) for size in sizes for batch in (args.batch_size, size * args.batch_size))
    groups = {case: Group(*case, args) for case in cases}
    work: dict[tuple, Callable[[], float]] = {}
    for (size, batch), group in groups.items():
        work[size, batch, "exchange"] = group
        if size > 1:
            work[size, batch, "keep"] = partial(group, "keep")
    times = common.interleaved(work, args.repeats)
    for group in groups.values():
        group.end()
    rows = [_row(size, batch, times, args.batch_size) for size, batch in cases]
    with torch.device("meta"):
        gradient = 4 * count_parameters(build_model(args.arch, 10))
    machine = f"{common.machine()}; {os.cpu_count()} cores"
    print(f"\n{args.arch}, --amp {args.amp}, {machine}, {args.repeats} rounds of {args.steps} steps, one thread each")
    print(f"gradients of {gradient / 1e6:.1f} MB over gloo\n")
    print(format_table(rows, {title: title for title in rows[0]}))
    common.save("scaling", {"machine": machine, "arch": args.arch, "amp": args.amp, "rows": rows})


def _row(size: int, batch: int, times: dict[tuple, list[float]], alone: int) -> dict:
    """A line of the table: one group's steps against those of one process with `alone` images."""
    spent = times[size, batch, "exchange"]
    slow, middle, fast = (batch / quartile for quartile in reversed(common.quartiles(spent)))
    gain = common.pairwise(times[1, alone, "exchange"], spent) * batch / alone
    row = {
        "processes": size,
        "images a step": batch,
        "per process": batch // size,
        "images/s": f"{middle:,.1f}",
        "quartiles": f"{slow:,.1f}-{fast:,.1f}",
        "over 1 process": f"{gain:.2f}x",
        "efficiency": f"{100 * gain / size:.0f}%",
        "exchange": "",
        "its quartiles": "",
    }
    if size > 1:
        rounds = zip(times[size, batch, "keep"], spent, strict=True)
        low, middle, high = common.quartiles([100 * (1 - keep / exchange) for keep, exchange in rounds])
        row |= {"exchange": f"{middle:.1f}%", "its quartiles": f"{low:.1f} to {high:.1f}%"}
    return row


# ------------------------------------------------------------------------------------------------------- computation


class Machines(NamedTuple):
    """GPUs and what links them; speeds are the makers' figures in GB/s and one direction."""

    gpus: int
    name: str
    per_gpu: float  # from a GPU to the others of its node
    per_node: float | None = None  # from a node to the others; None where there is one node

    @property
    def slowest(self) -> float:
        return min(self.per_gpu, self.per_node or self.per_gpu)


MACHINES = (
    Machines(8, "NVLink 4", 450),
    Machines(8, "PCIe 4.0 x16", 32),
    Machines(64, "NVLink 4, a node on 8 x 400 Gb/s", 450, 400),
    Machines(64, "NVLink 4, a node on 200 Gb/s", 450, 25),
    Machines(64, "NVLink 4, a node on 100 Gb/s", 450, 12.5),
)


class Expected(NamedTuple):
    """Seconds of a step's parts, and the share of n GPUs' work that is not waiting."""

    compute: float
    exchange: float
    without_overlap: float
    with_overlap: float


def expected(parameters: int, macs: int, batch: int, gpus: int, rate: float, link: float) -> Expected:
    """See the top of this file.

    Args:
        parameters: of the model; a gradient takes 4 bytes of each.
        macs: multiply-adds of a forward pass of one image.
        batch: images per GPU.
        rate: operations a second that a GPU sustains; a multiply-add is two.
        link: bytes a second over the slowest link.
    """
    gradient = 4 * parameters
    compute = 3 * 2 * macs * batch / rate
    exchange = 2 * (gpus - 1) / gpus * gradient / link
    hidden_badly = exchange * min(1.0, BUCKET / gradient)
    exposed = max(exchange - 2 / 3 * compute, hidden_badly)
    return Expected(compute, exchange, compute / (compute + exchange), compute / (compute + exposed))


def print_expected(args: argparse.Namespace) -> None:
    with torch.device("meta"):
        model = build_model(args.expected, 1000)
    parameters, macs = count_parameters(model), family_of(model).cost(model, {})["macs"]
    rate = args.sustained * args.peak * 1e12
    rows = []
    for machines in MACHINES:
        for batch in args.batches:
            found = expected(
                parameters, macs, batch, machines.gpus, rate, args.link_share * GIGA * machines.slowest
            )  # fmt: skip
            rows.append(
                {
                    "GPUs": machines.gpus,
                    "links": machines.name,
                    "batch per GPU": batch,
                    "compute ms": f"{1000 * found.compute:.1f}",
                    "exchange ms": f"{1000 * found.exchange:.1f}",
                    "without overlap": f"{100 * found.without_overlap:.1f}%",
                    "with overlap": f"{100 * found.with_overlap:.1f}%",
                }
            )
    print("\nA computation, not a measurement: the formulas at the top of benchmarks/scaling.py with")
    print(
        f"  {args.expected}: {parameters:,} parameters, gradients of {4 * parameters / GIGA:.3f} GB in float32, "
        f"{macs / GIGA:.4f} G MACs an image"
    )
    print(
        f"  {100 * args.sustained:g}% of {args.peak:g} TFLOP/s sustained, {100 * args.link_share:g}% of the links' "
        "nominal speed reached\n"
    )
    print(format_table(rows, {title: title for title in rows[0]}))
    common.save("scaling_expected", {"model": args.expected, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="one process is always measured")
    parser.add_argument("--arch", default="vit_tiny")
    parser.add_argument("--batch_size", type=int, default=32, help="of one process; others share it, or have as much")
    parser.add_argument("--amp", choices=["off", "bf16"], default="off")
    parser.add_argument("--steps", type=int, default=4, help="steps per round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--expected",
        nargs="?",
        const="vit_large_imagenet",
        metavar="ARCH",
        help="compute what GPUs could reach instead",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 128], help="per GPU, of --expected")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU in dense bf16; H100 SXM: 989")
    parser.add_argument("--sustained", type=float, default=0.4, help="share of --peak that a step reaches")
    parser.add_argument("--link_share", type=float, default=0.8, help="share of the links' speed that is reached")
    args = parser.parse_args()
    if args.expected:
        print_expected(args)
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.serve:
        serve(args)
        return
    uneven = [size for size in args.processes if args.batch_size % size]
    if uneven:
        parser.error(f"--batch_size {args.batch_size}: cannot be shared by {uneven[0]} processes; give a multiple")
    measure(args)


if __name__ == "__main__":
    main()
