"""What the benchmarks share: interleaved timing, memory, a line about the machine, a JSON file for each table."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from utils import processor_name


def machine() -> str:
    """Processor, threads and versions, for the line above a table."""
    return f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save(name: str, content: dict) -> None:
    """Write benchmarks/NAME.json."""
    path = Path(__file__).parent / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nwritten: {path}")


def interleaved(
    candidates: Mapping[str, Callable[[], float]], repeats: int, fewer: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """What each candidate returns (seconds, images per second), round by round, so that drift affects all equally.

    Args:
        candidates: each measures itself and returns one number.
        fewer: rounds for slow candidates, which run in the first rounds only.
    """
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats):
        for name, candidate in candidates.items():
            if turn < (fewer or {}).get(name, repeats):
                measured[name].append(candidate())
    return measured


def seconds(
    work: Callable[[], object], device: str | torch.device = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """How long `work` takes, until the device is done with it."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    started = clock()
    result = work()
    wait()
    spent = clock() - started
    del result  # freeing its memory is not timed
    return spent


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def add_clock(parser: argparse.ArgumentParser) -> None:
    """`--clock`: on a busy machine, processor time of one thread is more reliable than wall-clock time."""
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: the processor's time of this process, all threads together; for a busy machine, with --threads 1",
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(low), float(middle), float(high)


def pairwise(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median ratio over the rounds that both have."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=False))


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def extra_bytes(work: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """How far memory rose above its level before `work`, at most, while `work` ran.

    On CUDA by PyTorch's allocator, on the CPU by the process's resident high-water mark (Linux), which is set back
    first; run it once in a fresh process, where no freed memory of earlier work is reused unseen.

    Raises:
        OSError: the system has no high-water mark that can be set back.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmHWM")
    result = work()
    peak = _resident("VmHWM")
    del result
    return peak - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
