"""Writes a model as ONNX, with a dynamic batch, and checks it under ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deployment.compaction import without_empty_layers, worst_of
from families import family_of
from pruning.scores import evaluating
from utils import RunError

ONNX_BOUND = 1e-4
OPSET = 20  # PyTorch's own choice
OLDEST_OPSET = 18  # what PyTorch's exporter is written in; its way back to older ones stops there without a word


def check_onnx(opset: int = OPSET, packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")) -> None:
    """Raise a RunError that says what to install, or which operator sets there are, before any work."""
    missing = [name for name in packages if not _importable(name)]
    if missing:
        raise RunError(f"--onnx: {', '.join(missing)} missing; pip install {' '.join(packages)}")
    newest = importlib.import_module("onnx").defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise RunError(
            f"--opset {opset}: there is no way to write it; choose one of {OLDEST_OPSET} to {newest}, {OPSET} when in "
            "doubt"
        )


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(path: Path, threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images float32 [B, 3, H, W] to logits [B, classes], by ONNX Runtime on the CPU.

    Args:
        threads: None for one a core of those that this process may use.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait leave the core
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def onnx_metadata(config: Mapping) -> dict[str, str]:
    """Preprocessing and class names from an exported model's config.json, as metadata of an ONNX file."""
    named = {name: config.get(name) for name in ("preprocessing", "class_names")}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in named.items() if value}


def label(path: Path, metadata: Mapping[str, str]) -> None:
    """Put `metadata` into an ONNX file, in place of what it has."""
    import onnx

    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, str(path))


def labels_of(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file."""
    import onnx

    return {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}


def to_onnx(model: nn.Module, path: Path, opset: int = OPSET, metadata: Mapping[str, str] | None = None) -> float:
    """Write ONNX with a dynamic batch and return the largest difference to `model` under ONNX Runtime, batch 1 and 3.

    Args:
        opset: version of the standard operators that the file is written in.
        metadata: what the file says of itself; see `onnx_metadata`.

    Raises:
        RunError: onnx, onnxscript or onnxruntime is missing, the operator set cannot be written or run, or the
            difference is above 1e-4 (no file is left).
    """
    check_onnx(opset)
    size = family_of(model).image_size(model)
    generator = torch.Generator().manual_seed(0)
    inputs = {batch: torch.randn(batch, 3, size, size, generator=generator) for batch in (2, 1, 3)}
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with evaluating(model):
            with quiet():
                _export(without_empty_layers(model), inputs[2], draft, opset)
            if metadata:
                label(draft, metadata)
            session = _checked_session(draft, opset)
            worst = 0.0
            for batch in (1, 3):
                found = session(inputs[batch].numpy())
                worst = worst_of(worst, (torch.from_numpy(found) - model(inputs[batch])).abs().max())
        if not worst <= ONNX_BOUND:
            raise RunError(
                f"--onnx: ONNX Runtime differs by {worst:.2g} (allowed: {ONNX_BOUND:g}); not written", code=1
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return worst


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that ONNX's tools log about this use of them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _export(model: nn.Module, images: Tensor, path: Path, opset: int) -> None:
    for module in model.modules():
        if hasattr(module, "relative_position_bias_table") and hasattr(module, "fused_attn"):
            module.fused_attn = False  # PyTorch 2.9 cannot write fused attention with a bias
    try:
        torch.onnx.export(
            model,
            (images,),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            opset_version=opset,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")[:200]
        raise RunError(
            f"--onnx: PyTorch cannot write {type(model).__name__} ({type(cause).__name__}: {reason}); not written", 1
        ) from error


def _checked_session(path: Path, opset: int) -> Callable[[np.ndarray], np.ndarray]:
    """`open_session`, of a file that is in this operator set and that this ONNX Runtime can run."""
    import onnx

    versions = {entry.domain: entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import}
    if versions.get("") != opset:
        raise RunError(f"--opset {opset}: PyTorch writes {versions.get('')} for it; not written", code=1)
    try:
        return open_session(path)
    except Exception as error:  # ONNX Runtime raises types of its own, by file format and by operator
        reason = str(error).strip().splitlines()[0][:200]
        raise RunError(
            f"--opset {opset}: this ONNX Runtime cannot run it ({reason}); take {OPSET}, or a newer onnxruntime", code=1
        ) from error
