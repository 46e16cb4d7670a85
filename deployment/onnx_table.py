"""Compares ONNX files: accuracy on test images, size and milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dataset import Batches, FolderBatches
from deployment.onnx_file import cores, open_session
from engine.latency import medians
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
            calls = {name: partial(session, shown) for name, session in sessions.items()}
            column = f"ms_{threads}_{'thread' if threads == 1 else 'threads'}_batch_{batch_size}"
            for name, spent in medians(calls, torch.device("cpu"), repeats, seconds).items():
                rows[name][column] = round(1000 * spent, 3)
    return list(rows.values())


def session_accuracy(session: Session, test: Batches | FolderBatches) -> float:
    """Fraction of images whose largest logit is right."""
    right = 0
    for images, labels in test.sequential():
        logits = torch.from_numpy(session(images.cpu().numpy()))
        right += int((logits.argmax(1) == labels.cpu()).sum())
    return right / len(test)


def onnx_section(rows: list[dict]) -> str:
    """The part of a model card about the ONNX files beside it, without its heading."""
    table = md_table(rows, onnx_columns(rows), left=1)
    return (
        "\nmodel.onnx (input `images` float32 [batch, 3, height, width], output `logits`) holds the removed model, "
        "model_int8.onnx the same with 8-bit integers as weights and with scales of activations fixed on training "
        "images, model_int8_dynamic.onnx with scales taken from each batch. Medians of interleaved rounds on this "
        f"machine's CPU, accuracy on the test images:\n\n{table}\n"
    )
