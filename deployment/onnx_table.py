"""What ONNX files are worth side by side: files and test images in, rows of accuracy, size and milliseconds out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from dataset import Batches, FolderBatches
from deployment.onnx_file import cores, open_session
from reporting.words import md_table, onnx_columns

Session = Callable[[np.ndarray], np.ndarray]


def onnx_rows(
    files: Mapping[str, Path],
    test: Batches | FolderBatches,
    batch_sizes: tuple[int, ...] = (1, 64),
    repeats: int = 15,
    seconds: float = 10.0,
) -> list[dict]:
    """A row a file: "model", "megabytes", "test_accuracy", and a column of milliseconds for each number of threads and
    batch size, such as "ms_1_thread_batch_64".

    Args:
        files: ONNX files by name, all for the images of `test`.
        batch_sizes: images at once.
        repeats, seconds: rounds of the interleaved timing, and when it stops early, for each column.
    """
    rows = {name: {"model": name, "megabytes": round(path.stat().st_size / 1e6, 3)} for name, path in files.items()}
    for name, path in files.items():
        rows[name]["test_accuracy"] = session_accuracy(open_session(path), test)
    images = next(iter(test.sequential(1)))[0].cpu()
    for threads in sorted({1, cores()}):
        sessions = {name: open_session(path, threads) for name, path in files.items()}
        for batch_size in batch_sizes:
            shown = images[torch.arange(batch_size) % len(images)].contiguous().numpy()
            times = interleaved(sessions, shown, repeats, seconds)
            column = f"ms_{threads}_thread{'s' * (threads > 1)}_batch_{batch_size}"
            for name, spent in times.items():
                rows[name][column] = round(1000 * statistics.median(spent), 3)
    return list(rows.values())


def session_accuracy(session: Session, test: Batches | FolderBatches) -> float:
    """Fraction of images whose largest logit is right."""
    right = 0
    for images, labels in test.sequential():
        logits = torch.from_numpy(session(images.cpu().numpy()))
        right += int((logits.argmax(1) == labels.cpu()).sum())
    return right / len(test)


def interleaved(
    sessions: Mapping[str, Session], images: np.ndarray, repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each session's passes, in rounds after a warm-up; every session has at least one."""
    for session in sessions.values():
        session(images)
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    begun = time.perf_counter()
    for _ in range(repeats):
        for name, session in sessions.items():
            started = time.perf_counter()
            session(images)
            spent[name].append(time.perf_counter() - started)
        if time.perf_counter() - begun > seconds:
            break
    return spent


def onnx_section(rows: list[dict]) -> str:
    """The part of a model card about the ONNX files beside it, without its heading."""
    table = md_table(rows, onnx_columns(rows), left=1)
    return (
        "\nmodel.onnx (input `images` float32 [batch, 3, height, width], output `logits`) holds the removed model, "
        "model_int8.onnx the same with 8-bit integers as weights and with scales of activations fixed on training "
        "images, model_int8_dynamic.onnx with scales taken from each batch. Medians of interleaved rounds on this "
        f"machine's CPU, accuracy on the test images:\n\n{table}\n"
    )
