"""Failures: an exception in, one line for the user and an exit status out."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.capture import GRAPHS
from engine.processes import Processes
from utils import DISK_ERRORS

MESSAGE_FAILED = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Distributed"
)  # from or to another process


def leave(processes: Processes, message: str, code: int) -> int:
    """Say on standard error why the run ends; of several processes that do, the first one to come says it."""
    if processes.speaks():
        print(f"{Path(sys.argv[0]).name}: {processes.name}{message}", file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def one_voice(processes: Processes) -> Iterator[None]:
    """Of several processes that leave the block with an error, the first one to come says it."""
    if not processes.several:
        yield
        return
    said, wanted = io.StringIO(), processes.first
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as leaving:
        wanted = processes.speaks() if leaving.code else wanted
        raise
    finally:
        if wanted:
            sys.stderr.write(said.getvalue())


def explain(error: Exception, args: argparse.Namespace, processes: Processes) -> str | None:
    """A line for errors of the system and of PyTorch that the user can mend; None for others, which are bugs."""
    text = " ".join(str(error).split())
    if processes.several and isinstance(error, RuntimeError) and MESSAGE_FAILED.search(text):
        return f"{processes.lost()}; go on from the last checkpoint with --resume --save_dir {args.save_dir}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"cannot write {error.filename or args.save_dir}: {error.strerror}; free the disk or choose --save_dir"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return (
            f"out of memory with --batch_size {args.batch_size} --accum_steps {args.accum_steps} --amp {args.amp}: "
            "lower the first and raise the second by the same factor, or use --amp bf16; the last checkpoint is good"
        )
    if "deterministic" in text and args.deterministic:
        return f"--deterministic: not possible on this device ({text[:200]}); leave it out or use --device cpu"
    if args.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile {args.compile}: cannot compile here ({text[:200]}); leave it out"
    if args.compile in GRAPHS and "captur" in text:
        return f"--compile {args.compile}: cannot capture this step ({text[:200]}); leave it out"
    return None
