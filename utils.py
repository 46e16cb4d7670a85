"""Plumbing: seeds, device, precision, logging, files that are whole or absent, checkpoints, run names, tables."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import logging
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

log = logging.getLogger(__name__)


class RunError(Exception):
    """Something the user can mend: one line naming what is wrong and the way out.

    `code` is the exit status: 2 for what shows before any work, 1 for what shows only later.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(" ".join(message.split()))
        self.code = code


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line on standard error and exit code 2; flags are not abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


# ------------------------------------------------------------------------------- seeds, device, precision


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and Torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str = "auto", gpu: int = 0) -> torch.device:
    """The device that everything runs on: "auto" takes CUDA, then MPS, then the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no CUDA GPU; use --device auto or cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RunError("--device mps: not available on this machine; use --device auto or cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if gpu >= torch.cuda.device_count():
            raise RunError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} CUDA GPU(s), counted from 0")
        return torch.device("cuda", gpu)
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        return torch.device("mps")
    return torch.device("cpu")


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--amp`; None computes in the weights' own precision."""
    if amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        # without AMX tiles bf16 on a CPU is emulated around fp32 units and gains nothing
        has_tiles = device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return torch.bfloat16 if has_tiles else None
    if amp == "fp16" and device.type != "cuda":
        raise RunError(f"--amp fp16: needs a CUDA GPU, this run is on {device.type}; use --amp bf16 or off")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(device: torch.device, precision: torch.dtype | None) -> contextlib.AbstractContextManager:
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


# ------------------------------------------------------------------------------------------------ logging


class _TqdmHandler(logging.Handler):
    """Log lines that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def start_logging(run_log: Path | None = None, verbose: bool = False) -> None:
    """Log to standard output, and from now on to `run_log` too, where the lines also carry the time."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    for noisy in ("matplotlib", "PIL", "urllib3", "filelock", "fsspec", "timm", "torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    screen = _TqdmHandler()
    screen.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(screen)
    if run_log is not None:
        file = logging.FileHandler(run_log, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        root.addHandler(file)


def format_table(rows: Sequence[Mapping], columns: Mapping[str, Callable | str]) -> str:
    """Rows as an aligned text table; `columns` maps a title to a key of the rows or to a function of a row."""
    cells = [list(columns)]
    cells += [[str(get(row) if callable(get) else row.get(get, "")) for get in columns.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- files


def write_atomic(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Let `write` fill a temporary file, flush it to disk and rename it: `path` is old, new, never half.

    Raises:
        RunError: the disk is full or read-only; the old file is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free the disk or choose --save_dir", 1
        ) from error


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """All rows as CSV; the columns are those of the first row and what later ones add."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_metrics(save_dir: Path, history: Sequence[Mapping]) -> None:
    """metrics.jsonl and metrics.csv, each epoch of `history` exactly once."""
    write_text(save_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    write_csv(save_dir / "metrics.csv", history)


def save_tensors(path: Path, content: object) -> None:
    """`torch.save`, whole or not at all; only tensors and plain values, so that it loads with weights_only."""
    write_atomic(path, lambda file: torch.save(content, file))


def load_tensors(path: Path, what: str) -> dict:
    """`torch.load(weights_only=True)` onto the CPU; `what` is the flag or file kind named in the error."""
    if not path.is_file():
        raise RunError(f"{what}: {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated zips, foreign pickles and bad magic numbers all raise their own types
        raise RunError(
            f"{what}: {path} cannot be loaded safely (damaged, or it holds more than tensors and plain values)"
        ) from error
    if not isinstance(content, dict):
        raise RunError(f"{what}: {path} holds no dictionary of tensors")
    return content


def load_state_file(path: Path, what: str) -> dict[str, Tensor]:
    """A state dict from `.safetensors` or a `torch.save` file, also nested under `state_dict` or `model`."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except Exception as error:  # safetensors raises its own error type, and OSError
            raise RunError(f"{what}: {path} is missing or not a safetensors file") from error
    content = load_tensors(path, what)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return content


# -------------------------------------------------------------------------------------------- checkpoints


@dataclass
class RunState:
    """Where a run stands; with weights and optimizer it is all that a checkpoint holds.

    `masks` and `kept` are enforced now. `target` and `target_kept` will be from the cut on; before a state's cut they
    differ from the former by what is doomed. `elementwise` is the mask of iterative magnitude pruning.
    """

    state: int = 0
    step: int = 0  # optimizer steps done in this state
    begun: bool = False  # this state's pruning and rewinding are done
    masks: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Tensor] = field(default_factory=dict)
    elementwise: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    target_kept: dict[str, list[int]] = field(default_factory=dict)
    start_norm: float | None = None  # of the doomed weights
    cut: dict = field(default_factory=dict)  # accuracy before and after, residual
    best: dict = field(default_factory=dict)  # epoch and validation accuracy
    seconds: float = 0.0  # spent in this state
    history: list[dict] = field(default_factory=list)  # a row an epoch
    states: list[dict] = field(default_factory=list)  # a row a state

    def pack(self) -> dict:
        """Plain values and tensors; masks take one bit an element."""
        content = dict(vars(self))
        for name in ("masks", "target", "elementwise"):
            content[name] = {layer: _pack_bits(mask) for layer, mask in content[name].items()}
        return content

    @classmethod
    def unpack(cls, content: Mapping, device: torch.device) -> RunState:
        content = dict(content)
        for name in ("masks", "target", "elementwise"):
            content[name] = {layer: _unpack_bits(bits, device) for layer, bits in content[name].items()}
        return cls(**content)


def _pack_bits(mask: Tensor) -> dict:
    bits = np.packbits(mask.cpu().numpy().astype(bool).reshape(-1))
    return {"bits": torch.from_numpy(bits), "shape": list(mask.shape)}


def _unpack_bits(packed: Mapping, device: torch.device) -> Tensor:
    count = int(np.prod(packed["shape"]))
    bits = np.unpackbits(packed["bits"].numpy(), count=count)
    return torch.from_numpy(bits).reshape(packed["shape"]).to(device, torch.get_default_dtype())


def save_checkpoint(save_dir: Path, content: dict) -> None:
    """Write checkpoint.pt; the one before stays as checkpoint.prev.pt."""
    latest = save_dir / "checkpoint.pt"
    fresh = save_dir / "checkpoint.new.pt"
    save_tensors(fresh, content)
    if latest.exists():
        os.replace(latest, save_dir / "checkpoint.prev.pt")
    os.replace(fresh, latest)


def load_checkpoint(save_dir: Path) -> dict:
    """The latest checkpoint of a run, or the one before when that is damaged."""
    damaged = []
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        if (save_dir / name).is_file():
            try:
                content = load_tensors(save_dir / name, "--resume")
            except RunError as error:
                damaged.append(str(error))
                continue
            for error in damaged:
                log.warning("%s; going on from the checkpoint before it", error)
            return content
    raise RunError(f"--resume: {save_dir} holds no checkpoint that can be loaded; start without --resume")


# ---------------------------------------------------------------------------------- what a run says of itself


def run_name(args) -> str:
    """method_arch_dataset_criterion_rate[_pretrained][_struct_target]_monthday_hourminute."""
    parts = [args.struct, args.arch.replace("/", "-"), args.dataset, "crit", args.criteria, "rate", f"{args.rate:g}"]
    if args.pretrained:
        parts.append("pretrained")
    if args.vit_structured:
        parts += ["struct", args.vit_prune_target]
    return "_".join(parts) + time.strftime("_%m%d_%H%M")


def free_dir(path: Path) -> Path:
    """`path`, or with _2, _3 and so on behind it when that is taken."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}_{number}"), number + 1
    return candidate


def environment(device: torch.device) -> dict:
    """Versions, device and commit, for environment.json."""
    versions = {}
    for package in ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


def plain_args(args) -> dict:
    """The flags, without what only this process knows."""
    return {name: value for name, value in vars(args).items() if name not in ("notes", "resumed_from")}


def write_run_facts(save_dir: Path, args, device: torch.device) -> None:
    """args.yaml and environment.json."""
    write_text(save_dir / "args.yaml", yaml.safe_dump(plain_args(args), sort_keys=False))
    write_text(save_dir / "environment.json", json.dumps(environment(device), indent=2) + "\n")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """CPU clones of all tensors of a model, which no module holds."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
