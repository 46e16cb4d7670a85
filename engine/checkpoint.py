"""Checkpoints: where a run stands in, sealed files on disk out, and back.

`RunState` is what changes while a run goes on; a checkpoint is that plus weights, optimizer and random-number states.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset import difference
from engine.processes import Processes
from utils import RunError, cause, load_tensors, save_tensors

log = logging.getLogger(__name__)

Target = tuple[dict[str, Tensor], dict[str, list[int]]]  # masks by layer name, kept ids by key of the units
MASK_SETS = ("masks", "target", "elementwise")
CHECKPOINTS = ("checkpoint.pt", "checkpoint.prev.pt")  # the latest and the one before


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
    sums: list[float] = field(default_factory=list)  # of loss and accuracy over the steps of a broken-off epoch
    start_norm: float | None = None  # of the doomed weights
    cut: dict = field(default_factory=dict)  # accuracy before and after, residual
    best: dict = field(default_factory=dict)  # epoch and validation accuracy
    seconds: float = 0.0  # spent in this state
    history: list[dict] = field(default_factory=list)  # a row an epoch
    penalty: list[dict] = field(default_factory=list)  # rows of lambda and residual
    states: list[dict] = field(default_factory=list)  # a row a state
    units: list[dict] = field(default_factory=list)  # a row for each layer of each state
    wandb_id: str = ""

    def snapshot(self) -> RunState:
        """What the run's going on will not change: it replaces masks and appends to lists."""
        lists = {name: list(value) for name, value in vars(self).items() if isinstance(value, list)}
        return replace(self, **lists)

    def pack(self) -> dict:
        """Plain values and tensors; masks take a bit an element at most, and equal sets are stored once."""
        content = dict(vars(self))
        first = {}
        for name in MASK_SETS:
            same = first.setdefault(id(content[name]), name)
            content[name] = same if same != name else {layer: _pack_bits(m) for layer, m in content[name].items()}
        return content

    @classmethod
    def unpack(cls, content: Mapping, device: torch.device) -> RunState:
        content = dict(content)
        for name in MASK_SETS:
            packed = content[name]
            if packed in MASK_SETS[: MASK_SETS.index(name)]:
                content[name] = content[packed]
            else:
                content[name] = {layer: _unpack_bits(bits, device) for layer, bits in packed.items()}
        run = cls(**content)
        run.check_types()
        return run

    def check_types(self) -> None:
        """Raises: TypeError, for a value that no run has."""

        def number(value) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        fine = {
            "state": type(self.state) is int and self.state >= 0,
            "step": type(self.step) is int and self.step >= 0,
            "begun": isinstance(self.begun, bool),
            "kept": _ids_by_name(self.kept),
            "target_kept": _ids_by_name(self.target_kept),
            "sums": isinstance(self.sums, list) and len(self.sums) in (0, 2) and all(map(number, self.sums)),
            "start_norm": self.start_norm is None or number(self.start_norm),
            "cut": isinstance(self.cut, dict) and all(map(number, self.cut.values())),
            "best": isinstance(self.best, dict) and all(map(number, self.best.values())),
            "seconds": number(self.seconds),
            "wandb_id": isinstance(self.wandb_id, str),
        }
        for name in ("history", "penalty", "states", "units"):
            rows = getattr(self, name)
            fine[name] = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        wrong = [name for name, good in fine.items() if not good]
        if wrong:
            raise TypeError(f"{', '.join(wrong)} of a wrong type")


def _ids_by_name(kept: object) -> bool:
    return isinstance(kept, dict) and all(
        isinstance(ids, list) and all(type(unit) is int and unit >= 0 for unit in ids) for ids in kept.values()
    )


def _pack_bits(mask: Tensor) -> dict:
    bits = np.packbits(mask.cpu().numpy().astype(bool).reshape(-1))
    deflated = bytearray(zlib.compress(bits.tobytes(), 1))  # whole units leave long runs
    return {"bits": torch.frombuffer(deflated, dtype=torch.uint8), "shape": list(mask.shape)}


def _unpack_bits(packed: Mapping, device: torch.device) -> Tensor:
    count = int(np.prod(packed["shape"]))
    size = (count + 7) // 8
    if not isinstance(packed["bits"], Tensor):
        raise TypeError("a mask has no bits")
    try:
        inflated = zlib.decompressobj().decompress(packed["bits"].numpy().tobytes(), size + 1)
    except zlib.error as error:
        raise ValueError("a mask is damaged") from error
    if len(inflated) != size:
        raise ValueError("a mask has not the bits of its shape")
    bits = np.unpackbits(np.frombuffer(inflated, dtype=np.uint8), count=count)
    return torch.from_numpy(bits).reshape(packed["shape"]).to(device, torch.get_default_dtype())


def save_checkpoint(save_dir: Path, content: dict) -> None:
    """Write checkpoint.pt; the one before stays as checkpoint.prev.pt, so that one of them is whole at any time."""
    latest = save_dir / "checkpoint.pt"
    fresh = save_dir / "checkpoint.new.pt"
    save_tensors(fresh, content)
    try:
        if latest.exists():
            os.replace(latest, save_dir / "checkpoint.prev.pt")
        os.replace(fresh, latest)
    except OSError as error:
        raise RunError(f"cannot write {latest}: {error.strerror}; the checkpoint before it stays", 1) from error


def promote_best(save_dir: Path) -> None:
    """best.new.pt becomes best.pt: it is written before the checkpoint that names it and renamed after it, so that the
    selected model of the latest checkpoint is on disk at any time."""
    fresh = save_dir / "best.new.pt"
    try:
        if fresh.exists():
            os.replace(fresh, save_dir / "best.pt")
    except OSError as error:
        raise RunError(f"cannot write {save_dir / 'best.pt'}: {error.strerror}", 1) from error


def is_selected(best: Mapping, progress: RunState) -> bool:
    """Whether the content of a best.pt is the model that the state has selected so far: its state, epoch, accuracy."""
    found = {name: best[name] for name in ("epoch", "accuracy") if name in best}
    return best.get("state") == progress.state and found == progress.best


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
    """Here `what` of a checkpoint is read into the run, and nothing else is done.

    Raises:
        RunError: it is damaged, or of another run. Memory that runs out stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"--resume: the checkpoint does not fit this run ({what}: {cause(error)})") from error


def check_kinds(content: Mapping) -> None:
    """Raises: TypeError, for an entry of a checkpoint that is missing or of a kind that no checkpoint has."""
    moments, states = content.get("moments"), []
    if isinstance(moments, dict):
        states = list(moments.values())
    fine = {
        "run": isinstance(content.get("run"), dict),
        "weights": _tensors_by_name(content.get("weights")),
        "average": _tensors_by_name(content.get("average", {})),
        "moments": isinstance(moments, dict)
        and all(isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values()) for state in states),
        "scaler": isinstance(content.get("scaler"), dict),
        "random": isinstance(content.get("random"), dict),
        "rewind_file": isinstance(content.get("rewind_file"), str),
    }
    wrong = [name for name, good in fine.items() if not good]
    if wrong:
        raise TypeError(f"{', '.join(wrong)} missing or of a wrong type")


def _tensors_by_name(weights: object) -> bool:
    return isinstance(weights, dict) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in weights.items())


class Background:
    """Writes files one after the other in a thread while the run goes on; errors show at the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending: list[Future] = []

    def submit(self, write: Callable, *arguments) -> None:
        """Call `write(*arguments)` once all that was submitted before is on disk."""
        self._pending.append(self._pool.submit(write, *arguments))

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            RunError: what the first failing write raised.
        """
        pending, self._pending = self._pending, []
        for done in pending:
            done.result()


def has_checkpoint(save_dir: Path) -> bool:
    """Whether a run has written one, whatever has become of it since."""
    return any((save_dir / name).exists() for name in CHECKPOINTS)


def check_same_start(content: Mapping | None, processes: Processes) -> None:
    """All processes start anew, or all go on from one checkpoint.

    Raises:
        RunError: this one has found another than the first process.
    """
    found = "none" if content is None else f"state {content['run'].get('state')}, step {content['run'].get('step')}"
    first = processes.from_first(found)
    if found != first:
        raise RunError(
            f"--resume: the checkpoint found here ({found}) is not the first process's ({first}); --save_dir must be a "
            "folder that all machines share"
        )


def check_same_data(content: Mapping, identity: dict) -> list[str]:
    """Whether a checkpoint is of a run on these data; returns notes for the log.

    Args:
        identity: of the data as they are now; see images/identity.py.

    Raises:
        RunError: the data differ, and how.
    """
    before = content.get("data")
    if before is None:
        return ["--resume: the checkpoint does not hold which data it is of; whether they are the same is not checked"]
    try:
        other = difference(before, identity)
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"--resume: the checkpoint does not fit this run (data: {error})") from error
    if other:
        raise RunError(f"--resume: the data are not those of this run: {other}; give their folder by --data")
    return []


def load_checkpoint(save_dir: Path) -> dict:
    """The latest checkpoint of a run, or the one before when that is damaged."""
    if not save_dir.is_dir():
        raise RunError(f"--resume: {save_dir} is no folder; give --save_dir the folder of a run, as its log names it")
    if not has_checkpoint(save_dir):
        instead = "with --overwrite instead of" if (save_dir / "args.yaml").exists() else "without"
        raise RunError(f"--resume: {save_dir} has no checkpoint to go on from; start the run {instead} --resume")
    damaged = []
    for name in CHECKPOINTS:
        if (save_dir / name).is_file():
            try:
                content = load_tensors(save_dir / name, "--resume")
            except RunError as error:
                damaged.append(str(error))
                continue
            for error in damaged:
                log.warning("%s; going on from the checkpoint before it", error)
            return content
    raise RunError(
        f"--resume: {save_dir} holds no checkpoint that can be loaded ({'; '.join(damaged)}); "
        "start anew with --overwrite"
    )
