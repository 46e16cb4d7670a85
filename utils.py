"""What all modules share: user errors, seeds, device, precision, signals, logs, tables, atomic files."""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import hashlib
import io
import logging
import os
import platform
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
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


def cause(error: BaseException) -> str:
    """Why something failed, in one line: the first of the error's own, and the second where that is a heading."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (" ".join([first, *others[:1]]) if first.endswith(":") else first)[:300]


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


def processor_name() -> str:
    """The processor's model where the system says it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # another system, or a sandbox
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


AMP_AUTO = "VIT_PRUNING_AMP_AUTO"


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--amp`; None computes in the weights' own precision.

    The environment variable VIT_PRUNING_AMP_AUTO, bf16 or off, stands for `auto` on every processor; tests use it.
    """
    if amp == "auto":
        amp = os.environ.get(AMP_AUTO) or amp
        if amp not in ("auto", "off", "bf16"):
            raise RunError(f"{AMP_AUTO}={amp}: must be bf16 or off; unset it to go by the processor")
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


def autocast(device: torch.device, precision: torch.dtype | None) -> contextlib.AbstractContextManager:
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


# ------------------------------------------------------------------------------------------------ signals


class Stopped(Exception):
    """The run was asked to stop and has written its checkpoint; `code` is the exit status, 128 + signal number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def _write_now(number: int, text: bytes) -> None:
    """A line on standard error about a signal; not by a print, which the signal may have interrupted."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, b"%s: %s\n" % (signal.Signals(number).name.encode(), text))


class StopSignals:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 only leave a note; a second one acts as usual.

    Clusters send SIGUSR1 or SIGTERM ahead of a job's time limit. A signal that was ignored when the run was started, as
    shells do with SIGINT for what they start in the background, leaves its note all the same and then ends the process.

    `shared` by several processes, which stop after the same step: what one has `heard` counts once it is `agreed`, and
    more signals change nothing, since launchers and clusters send theirs to each process, at different times and twice.
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared, self.heard, self.agreed = shared, 0, 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        if not self.shared:  # whose processes go on to the end that they agreed on
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def received(self) -> int:
        """The number of the signal to stop for; 0 for none."""
        return self.agreed if self.shared else self.heard

    def _note(self, number: int, _frame) -> None:
        again, self.heard = self.heard, number
        if self.shared:
            if not again:
                _write_now(number, b"all processes stop after a step")
            return
        ignored = [number for number, handler in self._before.items() if handler is signal.SIG_IGN]
        self._restore()
        for other in ignored:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)
        _write_now(number, b"stopping after this step; a second one stops at once")

    def check(self) -> None:
        """Raises: Stopped, when a signal has come."""
        if self.received:
            raise Stopped(self.received)


# ------------------------------------------------------------------------------------- output and logging


class _Descriptor(io.FileIO):
    """The descriptor of a standard stream, whose reader may go away: what is written from then on is dropped."""

    lost = False

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:  # a pipe without a reader, a terminal that was closed, a full disk
            self.lost = True
            return len(data)


def keep_output_harmless() -> None:
    """From now on nothing that is printed ends the program: see `_Descriptor`, and characters that a terminal does not
    know come out as backslash escapes. Streams that something else has put in place stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the program was started with the stream closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            buffer = io.BufferedWriter(_Descriptor(stream.fileno(), "w", closefd=False))
            lines = stream.line_buffering
            fresh = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=lines)
            setattr(sys, name, fresh)


def _is_lost(stream: io.TextIOBase) -> bool:
    return getattr(getattr(getattr(stream, "buffer", None), "raw", None), "lost", False)


class _TqdmHandler(logging.Handler):
    """Log lines that do not tear a progress bar apart."""

    noted = False

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()
        if _is_lost(sys.stdout) and not self.noted:
            self.noted = True
            log.warning("standard output is gone; the program goes on")


class _LogFile(logging.FileHandler):
    """A log file that a full disk silences: what must not get lost raises where it is written."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


FILE_ONLY = {"file_only": True}  # log.info(..., extra=FILE_ONLY): not on the terminal unless --verbose


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
    screen.addFilter(lambda record: verbose or not getattr(record, "file_only", False))
    root.addHandler(screen)
    if run_log is not None:
        file = _LogFile(run_log, encoding="utf-8", errors="backslashreplace")
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


def disk_advice(error: OSError) -> str:
    """What to do where a file could not be written, when the system's reason tells; goes behind that reason."""
    ways = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "; free the disk or choose another folder")
    ways |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "; choose a folder that can be written")
    return ways.get(error.errno, "")


def cannot_write(error: OSError, path: str | Path) -> str:
    return f"cannot write {path}: {cause(error)}{disk_advice(error)}"


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
        raise RunError(cannot_write(error, path), 1) from error


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """All rows as CSV; the columns are those of the first row and what later ones add."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


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


def seal_broken(path: Path) -> bool:
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
        if seal_broken(path):
            raise RunError(f"{what}: {path} is damaged (its content changed after it was written)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what raw pickles hold; they are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except OSError as error:
        raise RunError(f"{what}: {path} cannot be read ({cause(error)})") from error
    except Exception as error:  # truncated zips, foreign pickles and bad magic numbers all raise their own types
        why = "damaged, or it holds more than tensors and plain values"
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            why = f"out of memory, or damaged: {cause(error)}"
        raise RunError(f"{what}: {path} cannot be loaded safely ({why})") from error
    if not isinstance(content, dict):
        raise RunError(f"{what}: {path} holds no dictionary of tensors")
    return content


def plain_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without `torch.nn.utils.prune`'s pairs: X_orig and X_mask become X = X_orig * X_mask."""
    plain = {}
    for name, value in state_dict.items():
        if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in state_dict:
            stem = name.removesuffix("_orig")
            plain[stem] = value * state_dict[f"{stem}_mask"].to(value)
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state_dict):
            plain[name] = value
    return plain


def check_finite(weights: Mapping, source: str) -> None:
    """Raises: RunError, naming `source` and the first tensor that holds NaN or infinity."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.float().isfinite().all():
            raise RunError(f"{source}: {name} holds NaN or infinity; give weights that training has not broken")


def cpu_copy(content):
    """A copy on the CPU of all tensors in nested dicts, lists and tuples, which nobody else holds."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {key: cpu_copy(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(cpu_copy, content))
    return content


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. Only to CUDA, and out of pinned memory, does the copy go on while others work:
    the memory is kept for it there, where elsewhere its owner may have it overwritten before."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """CPU clones of all tensors of a model, which no module holds."""
    return cpu_copy(model.state_dict())
