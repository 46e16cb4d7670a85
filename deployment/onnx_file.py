"""ONNX: a model in, a file with a dynamic batch out, checked under ONNX Runtime."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import nn

from deployment.compaction import worst_of
from families import family_of
from pruning.scores import evaluating
from utils import RunError

ONNX_BOUND = 1e-4


def check_onnx() -> None:
    """Raise a RunError that says what to install when something that ONNX export needs is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not _importable(name)]
    if missing:
        raise RunError(f"--onnx: {', '.join(missing)} missing; pip install onnx onnxscript onnxruntime")


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def to_onnx(model: nn.Module, path: Path) -> float:
    """Write ONNX with a dynamic batch and return the largest difference to `model` under ONNX Runtime, batch 1 and 3.

    Raises:
        RunError: onnx, onnxscript or onnxruntime is missing, or the difference is above 1e-4 (no file is left).
    """
    check_onnx()
    import onnxruntime

    size = family_of(model).image_size(model)
    generator = torch.Generator().manual_seed(0)
    inputs = {batch: torch.randn(batch, 3, size, size, generator=generator) for batch in (2, 1, 3)}
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with evaluating(model):
            torch.onnx.export(
                model,
                (inputs[2],),
                str(draft),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
            session = onnxruntime.InferenceSession(str(draft), providers=["CPUExecutionProvider"])
            worst = 0.0
            for batch in (1, 3):
                (found,) = session.run(None, {"images": inputs[batch].numpy()})
                worst = worst_of(worst, (torch.from_numpy(found) - model(inputs[batch])).abs().max())
        if not worst <= ONNX_BOUND:
            raise RunError(
                f"--onnx: ONNX Runtime differs by {worst:.2g} (allowed: {ONNX_BOUND:g}); not written", code=1
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return worst
