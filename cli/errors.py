"""Failures: an exception in, one line for the user and an exit status out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from engine.capture import GRAPHS
from utils import DISK_ERRORS


def leave(message: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return code


def explain(error: Exception, args: argparse.Namespace) -> str | None:
    """A line for errors of the system and of PyTorch that the user can mend; None for others, which are bugs."""
    text = " ".join(str(error).split())
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
