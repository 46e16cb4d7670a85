"""How rows about ONNX files are shown, in report, card and log: rows of onnx.csv in, titles and texts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from reporting.words import percent


def onnx_columns(rows: Sequence[Mapping]) -> dict[str, Callable[[Mapping], str]]:
    """Title to a function of a row; a column such as "ms_2_threads_batch_64" becomes "batch 64, 2 threads"."""
    columns = {
        "model": lambda row: row["model"],
        "file": lambda row: f"{row['megabytes']:.2f} MB",
        "test": lambda row: percent(row["test_accuracy"]),
    }
    for name in rows[0]:
        if name.startswith("ms_"):
            threads, _, batch = name.removeprefix("ms_").partition("_batch_")
            columns[f"batch {batch}, {threads.replace('_', ' ')}"] = lambda row, name=name: f"{row[name]:.2f} ms"
    return columns
