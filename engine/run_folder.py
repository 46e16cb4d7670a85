"""The folder of a run: named by the flags, locked for this process, with the files that say what is run."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
import yaml

from engine.checkpoint import has_checkpoint
from utils import RunError, precision_name, processor_name, write_text

try:
    import fcntl
except ImportError:  # Windows: runs go unlocked
    fcntl = None

EXPORT_FAILED = "export_failed.txt"  # why a trained run has no model/: it would fail again
RUN_FILES = (
    "args.yaml", "environment.json", "run.log", "metrics.jsonl", "metrics.csv", "states.csv",
    "units.csv", "penalty.csv", "latency.json", "sensitivity.json", "report.md", "report.html",
    "init.pt", "rewind.pt", "teacher.pt", "best.pt", "best.new.pt",
    "checkpoint.pt", "checkpoint.prev.pt", "checkpoint.new.pt", EXPORT_FAILED,
)  # fmt: skip


class RunLock:
    """A folder that only one process at a time may write: taken here, given back by `release` or by the process's end.

    A record lock (POSIX fcntl): the system releases it however the process dies, and worker processes do not inherit
    it. Where file system or platform have no locks the folder stays unlocked, and `trouble` says why.

    Raises:
        RunError: another process has it; the message names its number and host.
    """

    def __init__(self, save_dir: Path, name: str = "run.lock"):
        self.file = (save_dir / name).open("a+", encoding="utf-8")
        self.trouble = "" if fcntl else "this platform has no file locks"
        try:
            if fcntl:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.file.seek(0)
                owner = self.file.read().strip() or "another process"
                self.file.close()
                raise RunError(
                    f"--save_dir {save_dir}: {owner} is running it; wait for its end, stop it or choose another"
                ) from error
            self.trouble = f"its file system gives no lock ({error.strerror})"
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


def make_save_dir(args: argparse.Namespace) -> RunLock:
    """Check the run's folder before any work, make it and lock it; fills in `save_dir`, notes that it is not locked."""
    by_name = args.save_dir is None and args.exp_name
    save_dir = target_dir(args)
    args.save_dir = str(save_dir)
    goes_on = args.resume is True  # and not "auto", which has found nothing to go on from
    try:
        holds_run = has_run(save_dir)
        if holds_run and not args.resume and not args.overwrite:
            where = f"--exp_name {args.exp_name}: {save_dir}" if by_name else f"--save_dir {save_dir}:"
            raise RunError(f"{where} holds another run; add --resume or --overwrite")
        save_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(save_dir)
        if holds_run and not goes_on:
            if args.resume and has_checkpoint(save_dir):
                lock.release()
                raise RunError(f"--resume auto: {save_dir} has just got a checkpoint; give the command again")
            for name in RUN_FILES:
                (save_dir / name).unlink(missing_ok=True)
            for name in ("plots", "model", "wandb"):
                shutil.rmtree(save_dir / name, ignore_errors=True)
        if lock.trouble:
            args.notes.append(f"{save_dir} is not locked: {lock.trouble}; start no other run in it")
        (save_dir / "run.log").touch()
    except OSError as error:
        raise RunError(f"--save_dir {save_dir}: cannot be written ({error.strerror}); choose another") from error
    return lock


def has_run(save_dir: Path) -> bool:
    """Whether the folder holds a run, and not only the log of a start that failed."""
    return any((save_dir / name).exists() for name in RUN_FILES if name != "run.log")


def target_dir(args: argparse.Namespace) -> Path:
    """Where the run that these flags start has its folder."""
    if args.save_dir or args.exp_name:  # a name that is given is a folder that is given
        return Path(args.save_dir or named_dir(args.exp_name))
    return free_dir(named_dir(run_name(args)))


def named_dir(name: str) -> Path:
    """Where a run of this name has its folder when nobody says where."""
    return Path("results") / name


def run_name(args) -> str:
    """method_arch_dataset_criterion_rate[_pretrained][_struct_target]_monthday_hourminute."""
    parts = [args.struct, args.arch.replace("/", "-"), args.dataset, "crit", args.criteria, "rate", f"{args.rate:g}"]
    if args.nm:
        parts[-2:] = "nm", args.nm.replace(":", "-")
    if args.pretrained:
        parts.append("pretrained")
    if args.vit_structured:
        parts += ["struct", args.vit_prune_target]
    return "_".join(parts) + time.strftime("_%m%d_%H%M")


def free_dir(path: Path) -> Path:
    """`path`, or with the first of the endings _2, _3 ... that is free."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}_{number}"), number + 1
    return candidate


def environment(device: torch.device, amp: str) -> dict:
    """Versions, device, precision and commit, for environment.json; what cannot be found out is None."""
    versions = {}
    for package in ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "precision": precision_name(amp, device),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The program's commit; None without git, outside a repository, or where git cannot say it in a few seconds."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):  # not installed, not executable, or a file system that hangs
        return None
    return found.stdout.strip() or None


def plain_args(args) -> dict:
    """The flags of a run, without what only this process knows and those of a search, whose trial it may be."""
    own = {name: value for name, value in vars(args).items() if name not in ("notes", "resumed_from")}
    return {name: value for name, value in own.items() if name.split("_")[0] != "search"}


def write_flags(save_dir: Path, args) -> None:
    """args.yaml."""
    fresh = {**plain_args(args), "resume": False, "checkpoint": None, "config": None}
    write_text(save_dir / "args.yaml", yaml.safe_dump(fresh, sort_keys=False))


def write_run_facts(save_dir: Path, args, device: torch.device, images: Mapping[str, int]) -> None:
    """args.yaml and environment.json, which has the number of `images` of each part of the data, too."""
    write_flags(save_dir, args)
    facts = {**environment(device, args.amp), "images": images}
    write_text(save_dir / "environment.json", json.dumps(facts, indent=2) + "\n")
