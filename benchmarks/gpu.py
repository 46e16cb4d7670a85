#!/usr/bin/env python
"""Training on a CUDA GPU, no network needed: images/s, MFU, launches and synchronisations per step, seconds an epoch.

    python benchmarks/gpu.py                                   the whole table
    python benchmarks/gpu.py --archs vit_tiny --batch_sizes 128 --modes plain eager
    python benchmarks/gpu.py --device cpu --archs vit_tiny --batch_sizes 8 --modes plain eager --repeats 1      a trial

Random images; the real loop in the RSST ramp of a state against the plain loop of train_step.py on the same GPU: a
factor here is a same-hardware factor. The modes besides `plain` and `eager` are the values of the flag --compile:
`default` compiles the network, `graph` captures the whole step, `compiled-graph` does both, and `reduce-overhead`
captures forward and backward pass alone. They run one after the other, not in turns: each would hold its memory while
the others are measured. MFU is 6 x MACs x images/s over --peak, the dense bf16 peak of the device.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from benchmarks import common
from benchmarks.train_step import CIFAR_IMAGES, OurStep, PlainStep
from families import family_of
from models import build_model

IMAGENET_IMAGES = 1_281_167
MODES = ("plain", "eager", "default", "reduce-overhead", "graph", "compiled-graph")


def make_step(arch: str, batch_size: int, mode: str, device: str):
    flags = ["--arch", arch, "--batch_size", str(batch_size), "--print_freq", "1000000", "--no-compact_training"]
    if mode == "plain":
        return PlainStep(OurStep([*flags, "--amp", "off"], device).training.run, arch)
    compiled = [] if mode == "eager" else ["--compile", mode]
    return OurStep([*flags, "--amp", "bf16", *compiled], device)


def count_kernels(step, device: str) -> tuple[int, int]:
    """Kernels and copies of one step on the device, and launches of them by the host; 0 on the CPU."""
    if device != "cuda":
        return 0, 0
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.events()
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    launching = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
    return len(on_device), sum(event.name.startswith(launching) for event in events)


def count_synchronisations(step, device: str) -> int:
    """How often the host waits for the device within one step."""
    if device != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def run_steps(step, count: int) -> None:
    for _ in range(count):
        step()


def peak_bytes(work, device: str) -> int:
    """What `work` takes of the device's memory: on CUDA all that PyTorch reserves, the memory of graphs included."""
    if device != "cuda":
        return common.extra_bytes(work)
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_reserved() - before


def measure(arch: str, batch_size: int, mode: str, args: argparse.Namespace) -> dict:
    made = []

    def warm_up() -> None:
        made.append(make_step(arch, batch_size, mode, args.device))
        run_steps(made[0], args.warm_up)

    memory = peak_bytes(warm_up, args.device)
    (step,) = made
    kernels, launches = count_kernels(step, args.device)
    waits = count_synchronisations(step, args.device)
    timed = partial(common.seconds, partial(run_steps, step, args.steps), args.device)
    times = common.interleaved({"steps": timed}, args.repeats)["steps"]
    low, middle, high = (1000 * spent / args.steps for spent in common.quartiles(times))
    speed = 1000 * batch_size / middle
    with torch.device("meta"):
        model = build_model(arch, 10)
        macs = family_of(model).cost(model, {})["macs"]
    images = IMAGENET_IMAGES if arch.endswith("_imagenet") else CIFAR_IMAGES
    return {
        "model": arch,
        "batch": batch_size,
        "mode": mode,
        "images/s": f"{speed:,.0f}",
        "quartiles ms": f"{low:.1f}-{high:.1f}",
        "MFU": f"{100 * 6 * macs * speed / (args.peak * 1e12):.1f}%",
        "kernels": kernels,
        "launches": launches,
        "syncs": waits,
        "s/epoch": f"{0.9 * images / speed:,.1f}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "_speed": speed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--archs", nargs="+", default=["vit_tiny", "vit_small", "vit_base", "vit_small_imagenet"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the device in dense bf16; H100 SXM: 989")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps per repeat")
    parser.add_argument("--warm_up", type=int, default=6, help="steps before, which compile and capture")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU; try --device cpu with a small --batch_sizes")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "trial on a CPU"
    device = f"{name}, torch {torch.__version__}"
    rows, failed = [], []
    for arch in args.archs:
        for batch_size in args.batch_sizes:
            plain = None
            for mode in args.modes:
                torch.compiler.reset()
                gc.collect()  # a run's objects hold each other
                if args.device == "cuda":
                    torch.cuda.empty_cache()
                try:
                    row = measure(arch, batch_size, mode, args)
                except Exception as error:  # out of memory, or what this GPU cannot do: the other rows matter
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    failed.append(f"{arch}, batch {batch_size}, {mode}: {reason[:200]}")
                    print(failed[-1], flush=True)
                    continue
                speed = row.pop("_speed")
                plain = speed if mode == "plain" else plain
                row["over plain"] = f"{speed / plain:.2f}x" if plain else ""
                rows.append(row)
                print(" ".join(f"{title} {value}" for title, value in row.items()), flush=True)
    print(f"\n{device}, {args.repeats} x {args.steps} steps\n")
    if rows:
        print(utils.format_table(rows, {title: title for title in rows[0]}))
        common.save("gpu", {"device": device, "rows": rows, "failed": failed})
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
