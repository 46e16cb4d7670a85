"""Plumbing: seeds, device, precision, logging, files that are whole or absent, checkpoints, run names, tables."""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import functools
import hashlib
import inspect
import io
import json
import logging
import netrc
import os
import platform
import queue
import random
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

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

    def _get_values(self, action, arg_strings):
        # argparse takes the value of --data=-- for a separator, and hands on an empty list
        if action.option_strings and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "needs a value")
        return super()._get_values(action, arg_strings)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


# ------------------------------------------------------------------------------- seeds, device, precision


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and Torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict:
    """The states of all random-number generators of this process, as plain values and tensors."""
    name, words, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (name, words.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: Mapping) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if len(states.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])


def be_deterministic() -> None:
    """Only operations that give the same bits each time; one without such an implementation raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def pick_device(name: str = "auto", gpu: int = 0) -> torch.device:
    """The device that everything runs on: "auto" takes CUDA, then MPS, then the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no CUDA GPU; use --device auto or cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise RunError("--device mps: not available on this machine; use --device auto or cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if gpu >= torch.cuda.device_count():
            raise RunError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} CUDA GPU(s), counted from 0")
        torch.cuda.set_device(gpu)  # streams, graphs and pinned memory go there too
        return torch.device("cuda", gpu)
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        return torch.device("mps")
    return torch.device("cpu")


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--amp`; None computes in the weights' own precision."""
    if amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        # other CPUs emulate bf16 by float32 instructions and gain nothing
        instructions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported") if device.type == "cpu" else ()
        return torch.bfloat16 if any(getattr(torch.cpu, has, bool)() for has in instructions) else None
    if amp == "fp16" and device.type != "cuda":
        raise RunError(f"--amp fp16: needs a CUDA GPU, this run is on {device.type}; use --amp bf16 or off")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def precision_name(amp: str, device: torch.device) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[pick_precision(amp, device)]


def check_compile(mode: str | None, accum_steps: int, device: torch.device) -> None:
    if mode in GRAPHS and device.type != "cuda":
        raise RunError(f"--compile {mode}: needs a CUDA GPU, this run is on {device.type}; leave it out")
    if mode in ("reduce-overhead", "max-autotune") and accum_steps > 1 and device.type == "cuda":
        # the CUDA graph of the second part would overwrite the gradients of the first
        raise RunError(f"--compile {mode}: cannot accumulate gradients on a GPU; use compiled-graph or --accum_steps 1")


def autocast(device: torch.device, precision: torch.dtype | None) -> contextlib.AbstractContextManager:
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


# ------------------------------------------------------------------------------------------------ CUDA graphs

GRAPHS = ("graph", "compiled-graph")  # values of --compile that capture the whole step


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all graphs: libraries keep working memory for every stream


class CudaGraph:
    """Work on the current GPU that is captured once and repeated by one launch."""

    def __init__(self) -> None:
        self.graph, self.stream = torch.cuda.CUDAGraph(), _capture_stream()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do it, on the stream of the capture: autograd binds its nodes to the stream that they first ran on."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, work: Callable[[], object]) -> None:
        """Note what `work` does, without doing it."""
        # "thread_local": the threads of a loader that pins memory may call CUDA meanwhile
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        self.graph.replay()


class CapturedStep:
    """A function of tensors that is captured as a CUDA graph and replayed: one launch instead of hundreds.

    A replay repeats the same kernels on the same addresses. Besides its arguments, whose shapes stay, the function may
    read and write only tensors that stay where they are, and numbers that change must come in such tensors. It returns
    nothing. Its first calls run as they are: autotuning, compilation and first-step branches stay out of the graph.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[..., None]):
        self.function, self.calls, self.graph = function, 0, CudaGraph()
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> None:
        self.calls += 1
        # the same tensors from the first call on: a network compiled for other strides would compile again in a capture
        self.inputs = self.inputs or [given.clone() for given in inputs]
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        if self.calls <= self.WARM_UP:
            self.graph.warm_up(self._work)
            return
        if self.calls == self.WARM_UP + 1:
            self.graph.capture(self._work)
        self.graph.replay()

    def _work(self) -> None:
        self.function(*self.inputs)


# ------------------------------------------------------------------------------------------------ signals


class Stopped(Exception):
    """The run was asked to stop and has written its checkpoint; `code` is the exit status, 128 + signal number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class StopSignals:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 only leave a note; a second one acts as usual.

    Clusters send SIGUSR1 or SIGTERM ahead of a job's time limit.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame) -> None:
        self.received = number
        self.__exit__()

    def check(self) -> None:
        """Raises: Stopped, when a signal has come."""
        if self.received:
            raise Stopped(self.received)


# ------------------------------------------------------------------------------------------------ logging


class _TqdmHandler(logging.Handler):
    """Log lines that do not tear a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A log file that a full disk silences: what must not get lost raises where it is written."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


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
        file = _LogFile(run_log, encoding="utf-8")
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


DISK_ERRORS = {getattr(errno, name) for name in ("ENOSPC", "EROFS", "EDQUOT", "EIO", "EACCES", "EPERM", "EFBIG")}


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
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
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


# zip's checksums are not checked by torch.load: behind the archive stands a line that makes flipped bits show
_SEAL = b"\nsha256 "
_SEAL_LENGTH = len(_SEAL) + 64


class _Hashing:
    """A file to write to that keeps the digest of what went through."""

    def __init__(self, file: io.BufferedWriter):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save raises something else on top of it
            raise

    def flush(self) -> None:
        self.file.flush()


def save_tensors(path: Path, content: object) -> None:
    """`torch.save`, whole or not at all; only tensors and plain values, so that it loads with weights_only."""

    def write(file: io.BufferedWriter) -> None:
        through = _Hashing(file)
        try:
            torch.save(content, through)
        except RuntimeError:
            if through.error:
                raise through.error from None
            raise
        file.write(_SEAL + through.digest.hexdigest().encode())

    write_atomic(path, write)


def _seal_broken(path: Path) -> bool:
    """Whether a file that `save_tensors` wrote has changed since; others carry no seal."""
    digest, left = hashlib.sha256(), path.stat().st_size - _SEAL_LENGTH
    if left < 0:
        return False
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, 2**22))):
            digest.update(block)
            left -= len(block)
        seal = file.read()
    return seal.startswith(_SEAL) and seal != _SEAL + digest.hexdigest().encode()


def load_tensors(path: Path, what: str) -> dict:
    """`torch.load(weights_only=True)` onto the CPU; `what` is the flag or file kind named in the error."""
    if not path.is_file():
        raise RunError(f"{what}: {path} does not exist")
    try:
        if _seal_broken(path):
            raise RunError(f"{what}: {path} is damaged (its content changed after it was written)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what raw pickles hold; they are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
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


MASK_SETS = ("masks", "target", "elementwise")


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
        run._check_types()
        return run

    def _check_types(self) -> None:
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
        for name in ("history", "states", "units"):
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
    raise RunError(f"--resume: {save_dir} holds no checkpoint that can be loaded; start anew with --overwrite")


# ----------------------------------------------------------------------------------------------- tracking


class Tracker:
    """Numbers for Weights & Biases, sent by a process of its own.

    The run never waits for it, and what wandb does to a process (hooks of the interpreter, replaced streams, a wait at
    exit) does not reach the run: a missing package, no network, a failing init or a full disk cost a line in the log.
    When the run is killed, the process sends what it has got and ends.
    All segments of a run that was broken off and resumed are one wandb run; `tracking.json` remembers its id and the
    last step sent, so that steps which are trained again are not sent again.

    Args:
        mode: auto (WANDB_MODE, or online where credentials exist, else offline), online, offline or disabled.
        run_id: of an earlier segment; empty for a new run.
        settings: further arguments of `wandb.init`, as plain values.
    """

    patience = 60.0  # seconds that `finish` waits

    def __init__(self, mode: str, save_dir: Path, run_id: str = "", **settings):
        self.mode = os.environ.get("WANDB_MODE") or mode if mode == "auto" else mode
        self.folder, self.settings = save_dir, settings
        self.path = save_dir / "tracking.json"
        self.run_id, self.last_step = self._earlier_segment(run_id)
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._process: subprocess.Popen | None = None
        self._gave_up, self._thread = False, None
        if self.mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def log(self, values: Mapping, step: int) -> None:
        """Numbers of one step; steps that do not rise are left out."""
        if self._thread and self._thread.is_alive() and step > self.last_step:
            self.last_step = step
            self._queue.put(("log", dict(values), step))

    def summarise(self, values: Mapping, pictures: Mapping[str, Path]) -> None:
        """The final numbers, and pictures by title; empty values are left out."""
        if self._thread:
            filled = {name: value for name, value in values.items() if value != ""}
            self._queue.put(("summary", filled, {title: str(path) for title, path in pictures.items()}))

    def finish(self) -> None:
        """Send what is left, for at most `patience` seconds."""
        thread, self._thread = self._thread, None
        if thread:
            self._queue.put(None)
            thread.join(self.patience)
            if thread.is_alive():
                log.warning("wandb: not done after %g s; the run's files are complete without it", self.patience)
                self._gave_up = True
                if self._process:
                    self._process.kill()

    def _earlier_segment(self, run_id: str) -> tuple[str, int]:
        """Id and last step sent; a tracking.json that is damaged or of another run counts as none."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            known, step = found["id"], found["step"]
            if re.fullmatch("[0-9a-z]+", known) and type(step) is int and run_id in ("", known):
                return known, step
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        return run_id or secrets.token_hex(4), -1

    def _work(self) -> None:
        """The thread: starts the process and hands it what is in the queue."""
        mode = self.mode
        if mode == "auto":
            mode = "online" if _wandb_credentials() else "offline"
        try:
            answer, text = self._start(mode)
            if answer == "not online":
                log.warning("wandb: cannot go online (%s); tracking offline", text)
                self._end()
                answer, text = self._start("offline")
            log.info("wandb: %s", text)
            while (item := self._queue.get()) is not None:
                if item[0] == "log":
                    # first the note: a step may get lost when the run is killed here, but none comes twice
                    write_text(self.path, json.dumps({"id": self.run_id, "step": item[2]}) + "\n")
                self._tell(item)
            self._tell(None)
            self._answer()
            self._process.wait()
        except Exception as error:  # whatever it is, the training matters more
            if not self._gave_up:
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning("wandb: %s; this run goes on without it", reason)
        finally:
            self._end()

    def _start(self, mode: str) -> tuple[str, str]:
        """Start the process and return what it answers to `wandb.init`."""
        # the empty WANDB_MODE that counts as none here is an error to wandb; it measures the process of this number
        environ = {**os.environ, "WANDB_MODE": mode, "WANDB__STATS_PID": str(os.getpid())}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{inspect.getsource(_send_to_wandb)}\n{_send_to_wandb.__name__}()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ,
            start_new_session=True,  # ctrl-c is for the run, which says when tracking ends
        )  # fmt: skip
        # resume lets `wandb sync` append this segment to those before it
        self._tell({"id": self.run_id, "mode": mode, "dir": str(self.folder), "resume": "allow", **self.settings})
        return self._answer()

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.stdout.close()
            with contextlib.suppress(OSError):  # a line that it never read
                self._process.stdin.close()
            self._process.wait()

    def _tell(self, message: object) -> None:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._answer()  # raises with the reason
            raise

    def _answer(self) -> tuple[str, str]:
        """What the process says next, and a text for the log.

        Raises:
            RunError: it failed.
        """
        line = self._process.stdout.readline()
        answer, text = json.loads(line) if line else ("failed", f"its process ended with {self._process.wait()}")
        if answer == "failed":
            raise RunError(text)
        return answer, text


def _send_to_wandb() -> None:
    """The program of a Tracker's process, which has only this function.

    Reads a message a line: the arguments of `wandb.init`, what to log or to summarise, and null at the end. Answers
    after the first and the last one, or when it fails.
    """
    import json
    import os
    import shlex
    import sys
    from pathlib import Path

    sys.path[:] = [folder for folder in sys.path if folder]  # the current folder may hold a json.py
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever wandb prints is not for the log

    def answer(what: str, text: str = "") -> None:
        answers.write(json.dumps([what, " ".join(text.split())[:300]]) + "\n")

    try:
        import wandb

        options = json.loads(sys.stdin.readline())
        offline = options["mode"] != "online"
        settings = wandb.Settings(init_timeout=30, console="off", silent=True, save_code=False, disable_git=True)
        try:
            run = wandb.init(settings=settings, **options)
        except Exception as error:  # no network, no such project, an outdated key
            if offline:
                raise
            answer("not online", str(error) or type(error).__name__)
            return
        upload = f"offline; upload later with: wandb sync {shlex.quote(str(Path(run.dir).parent))}"
        answer("ready", upload if offline else run.url)
        for line in sys.stdin:
            message = json.loads(line)
            if message is None:
                break
            kind, values, more = message
            if kind == "log":
                run.log(values, step=more)
            else:
                pictures = {title: wandb.Image(path) for title, path in more.items()}
                run.summary.update({**values, **pictures})
        else:
            run.finish(exit_code=1)  # the input ended without the null: the run was killed
            return
        run.finish()
        answer("done")
    except Exception as error:  # whatever it is, the training matters more
        answer("failed", str(error) or type(error).__name__)


def _wandb_credentials() -> bool:
    """Whether the environment holds a key, or `wandb login` has been here."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for name in names:
        with contextlib.suppress(OSError, ValueError, netrc.NetrcParseError):
            *_, password = netrc.netrc(os.path.expanduser(name)).hosts.get(host, [""])
            if password:
                return True
    return False


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


def environment(device: torch.device, amp: str) -> dict:
    """Versions, device, precision and commit, for environment.json."""
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
        "precision": precision_name(amp, device),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


def plain_args(args) -> dict:
    """The flags, without what only this process knows."""
    return {name: value for name, value in vars(args).items() if name not in ("notes", "resumed_from")}


def write_flags(save_dir: Path, args) -> None:
    """args.yaml."""
    fresh = {**plain_args(args), "resume": False, "checkpoint": None, "config": None}
    write_text(save_dir / "args.yaml", yaml.safe_dump(fresh, sort_keys=False))


def write_run_facts(save_dir: Path, args, device: torch.device) -> None:
    """args.yaml and environment.json."""
    write_flags(save_dir, args)
    write_text(save_dir / "environment.json", json.dumps(environment(device, args.amp), indent=2) + "\n")


def cpu_copy(content):
    """A copy on the CPU of all tensors in nested dicts, lists and tuples, which nobody else holds."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {key: cpu_copy(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(cpu_copy, content))
    return content


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """CPU clones of all tensors of a model, which no module holds."""
    return cpu_copy(model.state_dict())
