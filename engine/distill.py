"""Distillation (Hinton et al. 2015, arXiv:1503.02531): `--teacher` in, its logits for a student's images out, and with
`--kd_features` the output tokens of its last block; `objective.py` is the loss of a student that learns from them.

A teacher is in eval mode, has no gradients and computes in the run's precision, once a step. Where images are shown as
they are (`--aug none`, resident data, nothing mixed), its logits are worked out once for all of them, and its features
where those of all images take no more than `MOST_KEPT` bytes.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from dataset import Batches, DatasetFacts, FolderBatches
from engine.objective import Answer
from engine.preprocessing import recorded, timm_wants
from engine.processes import ALONE, Processes
from engine.shape import model_from_flags
from families import family_of
from models.merging import restore_tokens_
from models.pretrained import load_whole
from models.weight_files import PretrainedError
from pruning.scores import evaluating
from pruning.units import LayoutError
from utils import RunError, autocast, cause, load_tensors

log = logging.getLogger(__name__)

SELF = "self"
MOST_KEPT = 2**30


def wants_teacher(args: argparse.Namespace) -> bool:
    """Whether a loss of this run has a teacher's share."""
    return bool(args.teacher and (args.kd_alpha or args.kd_features))


def is_taught(args: argparse.Namespace, state: int) -> bool:
    """Whether the loss of this state has a teacher's share; state 0 cannot learn from itself."""
    return wants_teacher(args) and (args.teacher != SELF or state > 0)


class Answering(nn.Module):
    """A network whose forward pass gives an `Answer`, on request with its features."""

    def __init__(self, model: nn.Module, features: bool = False):
        super().__init__()
        self.model, self.tokens = model, _tokens_of(model) if features else None
        if features:
            restore_tokens_(model)  # or merged ones would be compared, which stand for other patches

    def forward(self, images: Tensor) -> Answer:
        if self.tokens is None:
            return Answer(_heads(self.model(images)))
        features = self.model.forward_features(images)
        return Answer(_heads(self.model.forward_head(features)), self.tokens(features))


def _heads(logits: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return logits if isinstance(logits, tuple) else (logits,)


def _tokens_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return family_of(model.model if isinstance(model, Renormalised) else model).tokens


class Teacher:
    """The outputs of a fixed network for the batches of `data`.

    Args:
        unchanged: images are shown as they are in every epoch, so that outputs are computed once.
        features: outputs hold features, too.
        processes: each computes its share of what is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches | FolderBatches,
        like: Tensor,
        precision: torch.dtype | None,
        unchanged: bool = False,
        features: bool = False,
        processes: Processes = ALONE,
    ):
        self.model = model.to(like.device, like.dtype).eval().requires_grad_(False)
        self._network = Answering(self.model, features).eval()
        self.data, self.precision, self.processes = data, precision, processes
        self.tables: tuple[Tensor, ...] = ()  # outputs for all training images, where they are kept
        if unchanged and isinstance(data, Batches):
            self.tables = self._outputs_of_all(like.dtype)

    def outputs(self, images: Tensor, parts: int, state: int, epoch: int, step: int) -> tuple[Tensor, ...]:
        """Logits [B, classes] and, where they are taught, features [B, N, D].

        Args:
            images: [B, 3, H, W] of this step, which pass the network in as many parts as the student's.
        """
        if self.tables:
            chosen = self.data.chosen(state, epoch, step)
            return tuple(table.index_select(0, chosen) for table in self.tables)
        return _concatenated(self._outputs(part) for part in images.chunk(parts))

    @torch.no_grad()
    def _outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        with autocast(images.device, self.precision):
            answer = self._network(images)
        return tuple(tensor.to(images.dtype) for tensor in (answer.logits, answer.features) if tensor is not None)

    def _outputs_of_all(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """For all images in stored order; none where features are too large to be kept."""
        outputs = (self._outputs(images.to(dtype)) for images, _ in self.data.sequential(whole=False))
        first = next(outputs)
        if sum(features[0].nbytes for features in first[1:]) * len(self.data) > MOST_KEPT:
            return ()
        return tuple(self.processes.gather_rows(own, len(self.data)) for own in _concatenated([first, *outputs]))


def _concatenated(outputs: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*outputs, strict=True))


def teacher_line(args: argparse.Namespace, teacher: Teacher, two_heads: bool) -> str:
    """Who teaches and how, for the log; `two_heads` of the student, see `objective.Objective`."""
    how = "by its hard labels" if args.kd_hard else f"at temperature {args.kd_temperature:g}"
    features = f" and its features at weight {args.kd_features:g}" if args.kd_features else ""
    heads = "; only the head of the distillation token sees its logits" if two_heads and args.kd_alpha else ""
    kept = f"; its logits{' and features' if features else ''} are kept" if teacher.tables else ""
    return f"distillation: {args.teacher} teaches, with {args.kd_alpha:g} of the loss {how}{features}{heads}{kept}"


def named_teacher(
    args: argparse.Namespace, facts: DatasetFacts, student: nn.Module, load_exported: Callable[[Path], nn.Module]
) -> nn.Module | None:
    """The network that `--teacher` names; None without one, and for `self`, which has to be trained first.

    Raises:
        RunError: it cannot be had, does not classify these images into these classes, or has other features than the
            student, which is to learn them.
    """
    if not wants_teacher(args) or args.teacher == SELF:
        return None
    flag, path, pixels = f"--teacher {args.teacher}", Path(args.teacher), family_of(student).image_size(student)
    try:
        with torch.random.fork_rng(devices=[]):  # random weights that are replaced; the run draws what it always does
            if args.teacher.startswith(models.TIMM):
                model = _public_model(args.teacher, facts, pixels)
            elif path.is_dir():
                folder = path if (path / "config.json").exists() else path / "model"
                model = _shown_its_way(load_exported(folder), facts, recorded(folder))
            else:
                model = _model_of_file(args, facts, path)
        shape = tuple(model.eval()(torch.zeros(1, 3, pixels, pixels)).shape)
    except (PretrainedError, RunError) as error:
        told = str(error)
        raise RunError(told if told.startswith(f"{flag}: ") else f"{flag}: {told}") from error
    except torch.OutOfMemoryError:
        raise
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{flag}: cannot teach this run ({cause(error)})") from error
    if shape != (1, facts.classes):
        raise RunError(f"{flag}: has {shape[-1]} outputs, and --dataset {args.dataset} {facts.classes} classes")
    if args.kd_features:
        _check_features(args, student, model, pixels)
    return model


@torch.no_grad()
def _check_features(args: argparse.Namespace, student: nn.Module, teacher: nn.Module, pixels: int) -> None:
    flag = f"--kd_features {args.kd_features:g}"
    shapes = []
    for model in (student, teacher):
        with evaluating(model):
            try:
                features = Answering(model, features=True)(torch.zeros(1, 3, pixels, pixels)).features
            except LayoutError as error:
                raise RunError(f"{flag}: --teacher {args.teacher}: {error}; leave it out") from error
        shapes.append(tuple(features.shape[1:]))
    own, taught = (f"{count} tokens of {width} channels" for count, width in shapes)
    if own != taught:
        raise RunError(
            f"{flag}: {args.arch} has {own} after its last block and --teacher {args.teacher} {taught}; "
            "take a teacher of the same width and grid, or leave it out"
        )


def _public_model(name: str, facts: DatasetFacts, pixels: int) -> nn.Module:
    model = models.build_model(name, facts.classes, pixels, pretrained=True)
    classifier = [tensor for tensor in model.pretrained_report.reinitialised if tensor.startswith("head")]
    if classifier:
        raise RunError(
            f"its public weights have no classifier for {facts.classes} classes; fine-tune it by a run of "
            "--pruning_times 1 and give that run's folder"
        )
    return _shown_its_way(model, facts, timm_wants(name.removeprefix(models.TIMM)))


def _model_of_file(args: argparse.Namespace, facts: DatasetFacts, path: Path) -> nn.Module:
    """A checkpoint is of its own architecture, unknown flags being off; weights alone are of this run's."""
    content = {} if path.suffix == ".safetensors" else load_tensors(path, "--teacher")
    flags = argparse.Namespace(**{**dict.fromkeys(vars(args)), **content["args"]}) if "args" in content else args
    model = model_from_flags(flags, facts, weights=False)
    load_whole(model, path, "--teacher")
    return _shown_its_way(model, facts, recorded(path))


def _shown_its_way(model: nn.Module, facts: DatasetFacts, wanted: Mapping | None) -> nn.Module:
    """A teacher that sees the student's images normalised as its own were."""
    wants = wanted and facts.shown_by(wanted)
    if not wants or all(_three(getattr(wants, name)).equal(_three(getattr(facts, name))) for name in ("mean", "std")):
        return model
    return Renormalised(model, facts, wants.mean, wants.std)


def _three(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).expand(3)[:, None, None]


class Renormalised(nn.Module):
    """A network that wants its images normalised by another mean and deviation than the run's."""

    def __init__(self, model: nn.Module, facts: DatasetFacts, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        own_mean, own_std, mean, std = map(_three, (facts.mean, facts.std, mean, std))
        self.register_buffer("scale", own_std / std)
        self.register_buffer("bias", (own_mean - mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.scale + self.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images * self.scale + self.bias)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.model.forward_head(features)
