"""Compiles the small model: torch.export's program, an ahead-of-time package or torch.compile, each compared with it.

    torch_export(model, path)          torch.export's program, for any batch; torch.export.load(path).module()
    aot_package(model, path)           machine code by AOTInductor; torch._inductor.aoti_load_package(path)
    compiled(model)                    torch.compile, in this process only

The last two need a C++ compiler.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deployment.compaction import BOUND, without_empty_layers, worst_of
from families import family_of
from pruning.scores import evaluating
from utils import RunError

BATCHES = (1, 3)  # that a file is checked at; it is made at another


def check_compiler(flag: str) -> None:
    """Raise a RunError that says what to install when no C++ compiler is at hand."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise RunError(f"{flag}: needs a C++ compiler, and {' and '.join(names)} is missing; install g++ or set CXX")


def torch_export(model: nn.Module, path: Path) -> float:
    """Write torch.export's program with a dynamic batch; the largest difference of what was read back to `model`.

    Raises:
        RunError: the difference is above 1e-5 x max(1, largest logit) and what the device rounds (no file is left).
    """

    def write(draft: Path) -> Callable[[Tensor], Tensor]:
        torch.export.save(_program(model), draft)
        return torch.export.load(draft).module()

    return _written("--torch_export", model, path, write)


def aot_package(model: nn.Module, path: Path) -> float:
    """Write AOTInductor's package for this machine's kind of processor; returns and raises as `torch_export`."""
    check_compiler("--aot")

    def write(draft: Path) -> Callable[[Tensor], Tensor]:
        torch._inductor.aoti_compile_and_package(_program(model), package_path=str(draft))
        return torch._inductor.aoti_load_package(str(draft))

    return _written("--aot", model, path, write)


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`torch.compile` for any batch.

    Raises:
        RunError: as `torch_export`, or there is no compiler.
    """
    check_compiler("--compile")
    fast = torch.compile(without_empty_layers(model), dynamic=True)
    with evaluating(model), torch.no_grad():
        _compare("--compile", model, fast)
    return fast


def _program(model: nn.Module) -> torch.export.ExportedProgram:
    example = _images(model, 2)
    return torch.export.export(
        without_empty_layers(model), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )


def _images(model: nn.Module, batch: int) -> Tensor:
    size, parameter = family_of(model).image_size(model), next(model.parameters())
    noise = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
    return noise.to(parameter.device, parameter.dtype)


@torch.no_grad()
def _written(flag: str, model: nn.Module, path: Path, write: Callable[[Path], Callable[[Tensor], Tensor]]) -> float:
    draft = path.with_name(f".{path.stem}.tmp{path.suffix}")  # both writers ask for the suffix
    try:
        with evaluating(model):
            worst = _compare(flag, model, write(draft))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return worst


def _compare(flag: str, model: nn.Module, other: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of `other` to `model`; raises where rounding alone does not explain it.

    How far `model` is from its copy in float64 on the CPU says how much its device rounds: TF32 convolutions of a GPU
    by more than the bound. Of what was compiled as much is allowed, on top of the bound and of the model's own.
    """
    exact = copy.deepcopy(model).cpu().double()
    worst = allowed = 0.0
    with evaluating(exact):
        for batch in BATCHES:
            images = _images(model, batch)
            expected, truth = model(images), exact(images.cpu().double())
            worst = worst_of(worst, (expected - other(images)).abs().max())
            rounding = worst_of(0.0, (expected.cpu() - truth).abs().max())
            allowed = max(allowed, BOUND * max(1.0, float(truth.abs().max())) + 2 * rounding)
    if not worst <= allowed:
        raise RunError(
            f"{flag}: what was compiled differs by {worst:.2g} (allowed: {allowed:.2g}); not written", code=1
        )
    return worst
