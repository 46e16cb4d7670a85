"""Whole steps as CUDA graphs: a function of tensors in, one that launches all its kernels at once out."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from settings.flags import GRAPHS
from utils import RunError


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


def check_compile(mode: str | None, accum_steps: int, device: torch.device) -> None:
    if mode in GRAPHS and device.type != "cuda":
        raise RunError(f"--compile {mode}: needs a CUDA GPU, this run is on {device.type}; leave it out")
    if mode in ("reduce-overhead", "max-autotune") and accum_steps > 1 and device.type == "cuda":
        # the CUDA graph of the second part would overwrite the gradients of the first
        raise RunError(f"--compile {mode}: cannot accumulate gradients on a GPU; use compiled-graph or --accum_steps 1")
