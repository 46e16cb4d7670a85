"""Numbers as text, and Markdown that shows any text literally."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def wilson(share: float, images: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share that was measured on so many images: the score interval of Wilson, Probable
    inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212."""
    middle, spread = share + z**2 / (2 * images), z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    return tuple(max(0.0, min(1.0, end / (1 + z**2 / images))) for end in (middle - spread, middle + spread))


def thousands(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{round(value):,}"


def giga(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value / 1e9:.4f} G"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def escaped(value) -> str:
    """Any value as one line of Markdown that shows it literally, HTML included."""
    words = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|#])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda found: f"\\{found[0]}", words)


def md_table(rows: Sequence[Mapping], columns: Mapping[str, Callable[[Mapping], object]], left: int = 0) -> str:
    """The first `left` columns are text; the others are numbers, aligned right."""
    lines = [list(columns), ["---" if i < left else "---:" for i in range(len(columns))]]
    lines += [[escaped(get(row)) for get in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def onnx_columns(rows: Sequence[Mapping]) -> dict[str, Callable[[Mapping], str]]:
    """Columns of a table of onnx.csv; "ms_2_threads_batch_64" becomes "batch 64, 2 threads"."""
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
