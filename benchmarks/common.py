"""What the benchmarks share: a line about the machine, and a JSON file beside each table."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch


def machine() -> str:
    """Processor, threads and versions, for the line above a table."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save(name: str, content: dict) -> None:
    """Write benchmarks/NAME.json."""
    path = Path(__file__).parent / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nwritten: {path}")
