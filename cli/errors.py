"""Failures: one line and an exit status for errors that the user can act on."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from engine.checkpoint import has_checkpoint
from engine.processes import Processes
from settings.flags import AUTO, GRAPHS
from utils import DISK_ERRORS, cannot_write, cause

# messages of gloo and NCCL after another process died or the network failed
LOST = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|Socket Timeout|Timed out waiting|"
    r"remote process exited|ncclRemoteError|ncclSystemError|communicator was aborted"
)
MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


def leave(processes: Processes, message: str, code: int) -> int:
    """Print on standard error why the run ends; of several processes only the first to call this prints."""
    if processes.reports_end():
        print(f"{Path(sys.argv[0]).name}: {processes.name}{message}", file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def one_voice(processes: Processes) -> Iterator[None]:
    """Of several processes that leave the block with an error, only the first prints its message."""
    if not processes.several:
        yield
        return
    said, wanted = io.StringIO(), processes.first
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as leaving:
        wanted = processes.reports_end() if leaving.code else wanted
        raise
    finally:
        if wanted:
            sys.stderr.write(said.getvalue())


def way_on(args: argparse.Namespace) -> str:
    """How to continue a run that ended early: from its checkpoint where it has one, else from the start."""
    if args.save_dir and has_checkpoint(Path(args.save_dir)):
        return f"go on from the last checkpoint with --resume --save_dir {args.save_dir}"
    again = "" if args.resume == AUTO else ", with --overwrite"
    return f"there is no checkpoint yet: give the same command again{again}"


def explain(error: Exception, args: argparse.Namespace, processes: Processes) -> str | None:
    """A line for errors of the system and of PyTorch that the user can fix; None for others, which are bugs."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and MEMORY.search(text)
    ):
        return (
            f"out of memory with --batch_size {args.batch_size} --accum_steps {args.accum_steps} --amp {args.amp} "
            f"({cause(error)[:200]}): start anew with a lower --batch_size and a higher --accum_steps; if another "
            f"program filled the memory: {way_on(args)}"
        )
    if processes.several and _is_message_lost(error, text):
        return f"{processes.dead_ranks()} ({cause(error)[:200]}); {way_on(args)}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return cannot_write(error, error.filename or args.save_dir)
    if "deterministic" in text and args.deterministic:
        return f"--deterministic: not possible on this device ({text[:200]}); leave it out or use --device cpu"
    if args.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile {args.compile}: cannot compile here ({text[:200]}); leave it out"
    if args.compile in GRAPHS and "captur" in text:
        return f"--compile {args.compile}: cannot capture this step ({text[:200]}); leave it out"
    return None


def _is_message_lost(error: Exception, text: str) -> bool:
    """Whether a message between processes failed. A failed check of gloo ("enforce fail") is a bug instead."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and "enforce fail" not in text and bool(LOST.search(text))
