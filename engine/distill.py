"""Distillation (Hinton et al. 2015, arXiv:1503.02531): `--teacher` in, its logits for a student's images out.

A teacher is in eval mode, has no gradients and computes in the run's precision, once a step. Where images are shown as
they are (`--aug none`, resident data, nothing mixed), its logits are worked out once for all of them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from dataset import Batches, DatasetFacts, FolderBatches
from engine.processes import ALONE, Processes
from models.vit import PretrainedError
from utils import RunError, autocast, load_state_file, load_tensors

log = logging.getLogger(__name__)

SELF = "self"


def wants_teacher(args: argparse.Namespace) -> bool:
    """Whether a loss of this run has a teacher's share."""
    return bool(args.teacher and args.kd_alpha)


class Teacher:
    """Logits of a fixed network for the batches of `data`.

    Args:
        shows_as_they_are: images come unchanged, so that each has its logits once and for all.
        processes: each works out its share of these.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches | FolderBatches,
        like: Tensor,
        precision: torch.dtype | None,
        shows_as_they_are: bool = False,
        processes: Processes = ALONE,
    ):
        self.model = model.to(like.device, like.dtype).eval().requires_grad_(False)
        self.data, self.precision = data, precision
        self.table: Tensor | None = None  # logits of all training images
        if shows_as_they_are and isinstance(data, Batches):
            own = [self._logits(images.to(like.dtype)) for images, _ in data.sequential(whole=False)]
            self.table = processes.joined_shares(torch.cat(own), len(data))

    def logits(self, images: Tensor, parts: int, state: int, epoch: int, step: int) -> Tensor:
        """[B, classes] for the images [B, 3, H, W] of a step, which are looked at in as many parts as the student's."""
        if self.table is not None:
            return self.table.index_select(0, self.data.chosen(state, epoch, step))
        return torch.cat([self._logits(part) for part in images.chunk(parts)])

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            return self.model(images).to(images.dtype)


def named_teacher(
    args: argparse.Namespace, facts: DatasetFacts, pixels: int, load_exported: Callable[[Path], nn.Module]
) -> nn.Module | None:
    """The network that `--teacher` names; None without one, and for `self`, which has to be trained first.

    Raises:
        RunError: it cannot be had, or does not classify these images into these classes.
    """
    if not wants_teacher(args) or args.teacher == SELF:
        return None
    flag, path = f"--teacher {args.teacher}", Path(args.teacher)
    try:
        with torch.random.fork_rng(devices=[]):  # random weights that are replaced; the run draws what it always does
            if args.teacher.startswith(models.TIMM):
                model = _public_model(args.teacher, facts, pixels)
            elif path.is_dir():
                model = load_exported(path if (path / "config.json").exists() else path / "model")
            else:
                model = _model_of_file(args, facts, path)
        shape = tuple(model.eval()(torch.zeros(1, 3, pixels, pixels)).shape)
    except (PretrainedError, RunError) as error:
        raise RunError(f"{flag}: {str(error).removeprefix('--teacher ')}") from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise RunError(f"{flag}: cannot teach this run ({reason})") from error
    if shape != (1, facts.classes):
        raise RunError(f"{flag}: has {shape[-1]} outputs, and --dataset {args.dataset} {facts.classes} classes")
    return model


def _public_model(name: str, facts: DatasetFacts, pixels: int) -> nn.Module:
    model = models.build_model(name, facts.classes, pixels, pretrained=True)
    classifier = [tensor for tensor in model.pretrained_report.reinitialised if tensor.startswith("head")]
    if classifier:
        raise RunError(
            f"its public weights have no classifier for {facts.classes} classes; fine-tune it by a run of "
            "--pruning_times 1 and give that run's folder"
        )
    shown = model.pretrained_cfg
    return Renormalised(model, facts, shown["mean"], shown["std"])


def _model_of_file(args: argparse.Namespace, facts: DatasetFacts, path: Path) -> nn.Module:
    """A checkpoint is of its own architecture, unknown flags being off; weights alone are of this run's."""
    content = {} if path.suffix == ".safetensors" else load_tensors(path, "--teacher")
    weights = content.get("weights")
    flags = argparse.Namespace(**{**dict.fromkeys(vars(args)), **content["args"]}) if "args" in content else args
    model = models.from_flags(flags, facts, weights=False)
    model.load_state_dict(load_state_file(path, "--teacher") if weights is None else weights)
    return model


class Renormalised(nn.Module):
    """A network that wants its images normalised by another mean and deviation than the data set's."""

    def __init__(self, model: nn.Module, facts: DatasetFacts, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        own_mean, own_std, mean, std = (
            torch.tensor(values).expand(3)[:, None, None] for values in (facts.mean, facts.std, mean, std)
        )
        self.register_buffer("scale", own_std / std)
        self.register_buffer("bias", (own_mean - mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.scale + self.bias)
