"""What a run trains and prunes: flags in; the model with its first weights, the units that go, the run's length out."""

from __future__ import annotations

import argparse

from torch import nn

from dataset import dataset_facts
from engine.allocation import Allocation, allocation_of
from engine.depth import has_branches
from engine.optimizer import milestones_of
from engine.preprocessing import weights_want
from engine.shape import model_from_flags
from families import Family, family_of
from models.pretrained import TransferReport, load_whole
from models.weight_files import PretrainedError, import_timm
from pruning.depth import DEPTH, WHOLE
from pruning.ranking import KINDS
from pruning.rounding import ROUNDED, lowest_multiple
from pruning.units import LayoutError, Units
from utils import RunError


def make_model(args: argparse.Namespace, weights: bool = True) -> nn.Module:
    try:
        if args.mixup or args.cutmix:
            import_timm("--mixup and --cutmix")
        model = model_from_flags(args, dataset_facts(args.dataset, args.data), weights)
    except (ValueError, PretrainedError) as error:
        raise RunError(str(error)) from error
    _check_blocks(args, model)
    if has_two_heads(model):
        model.set_distilled_training(True)  # in training it gives the logits of both, in evaluation their mean
    return model


def has_two_heads(model: nn.Module) -> bool:
    """Whether the model has a head that learns from a teacher beside that of the labels: timm's distilled DeiTs."""
    return hasattr(model, "set_distilled_training")


def _check_blocks(args: argparse.Namespace, model: nn.Module) -> None:
    """Some flags of training need a model that is made of blocks."""
    for name, fits in (("layer_decay", hasattr(model, "blocks")), ("drop_path", has_branches(model))):
        value = getattr(args, name)
        if value and not fits:
            raise RunError(f"--{name} {value}: goes by the blocks of a ViT, which {args.arch} has not; leave it out")


def first_model(args: argparse.Namespace) -> nn.Module:
    """The model of a fresh run with its initial weights.

    Sets `pretrained_note`, why they are not, or not all, pretrained ones, and `preprocessing_used`, how these weights
    want their images shown.
    """
    model = make_model(args)
    report = model.pretrained_report
    args.pretrained_note = report.failure if report else ""
    if args.pretrained_note and args.prune_type == "pt":
        raise RunError(f"--prune_type pt: nothing pretrained to rewind to ({args.pretrained_note})")
    if args.init:
        try:
            report = load_whole(model, args.init, "--init", args.allow_partial)
        except (PretrainedError, ValueError) as error:
            raise RunError(str(error)) from error
    if args.struct != "dense" and state_epochs(args, 0) == 0:
        _check_trained(args, model, report)
    args.preprocessing_used = weights_want(args)
    if report and report.gaps:
        args.pretrained_note = f"--allow_partial: {report.gaps}"
    return model


def _check_trained(args: argparse.Namespace, model: nn.Module, report: TransferReport) -> None:
    """Raises: RunError, where the first weights, which no state trains, are not all from a file."""
    flag = "--dense_epochs 0" if args.dense_epochs == 0 else "--epochs 0"
    source = f"--init {args.init}" if args.init else f"--pretrained {args.pretrained}"
    if report.failure:
        raise RunError(f"{flag}: the weights must be trained ones ({report.failure})")
    if not report.reinitialised:
        return
    names = ", ".join(report.reinitialised[:2]) + (" and more" if len(report.reinitialised) > 2 else "")
    classifier = family_of(model).classifier
    why = f"{names} of {source} start from random values"
    if any(name.startswith(classifier) for name in report.reinitialised):
        why = f"{source} has no classifier for the {dataset_facts(args.dataset, args.data).classes} classes ({names})"
    raise RunError(f"{flag}: {why}, and what is not trained cannot be validated; fine-tune first, or leave it out")


def units_of_run(args: argparse.Namespace, model: nn.Module) -> tuple[dict[str, Units], Allocation | None]:
    """The units that this run removes, heads and neurons if structured, a CNN's filters, none element-wise; and how
    many of them.

    A `--round_to` that none of them goes by is noted in `args.notes`.

    Raises:
        RunError: the model has no such units, or not as many as the flags ask for.
    """
    try:
        family = family_of(model)
    except LayoutError as error:
        raise RunError(f"--arch {args.arch}: {error}") from error
    units = _units_that_go(args, model, family)
    _check_counts(args, units)
    return units, allocation_of(args, family, model, units)


def _units_that_go(args: argparse.Namespace, model: nn.Module, family: Family) -> dict[str, Units]:
    if family.counts_by == "density":
        if args.vit_structured:
            raise RunError(
                f"--vit_structured: {args.arch} has no heads and neurons; "
                "--struct refill and rsst remove a CNN's filters, so leave it out"
            )
        if args.struct == "oneshot":
            raise RunError(
                f"--struct oneshot: removes heads and neurons; {args.arch} has filters, use --struct refill or rsst"
            )
        if args.nm and args.struct in ("refill", "rsst"):
            raise RunError(
                f"--nm {args.nm}: --struct {args.struct} removes whole filters of {args.arch}, which leaves no such "
                "pattern; use --struct imp"
            )
        return family.units(model, first=args.prune_patch_embed) if args.struct in ("refill", "rsst") else {}
    if not args.vit_structured:
        if args.struct == "oneshot":
            raise RunError("--struct oneshot: removes heads and neurons; add --vit_structured")
        return {}
    if args.vit_prune_target in WHOLE:
        try:
            family.branches_as_units(model)
        except LayoutError as error:
            raise RunError(f"--vit_prune_target {args.vit_prune_target}: {error}; use head, mlp or both") from error
    return family.units(model, KINDS[args.vit_prune_target])


def _check_counts(args: argparse.Namespace, units: dict[str, Units]) -> None:
    """Whether every layer has as many units as the flags ask for, where it goes by layers."""
    if args.vit_structured and args.vit_prune_target in DEPTH:
        return
    if args.vit_structured and units:
        smallest = min(group.count for group in units.values())
        if args.min_units > smallest:
            raise RunError(f"--min_units {args.min_units}: a layer of {args.arch} has only {smallest} units to prune")
    if args.round_to == 1:
        return
    rounded = {group.count for group in units.values() if group.kind in ROUNDED}
    note = f"--round_to {args.round_to}: goes by neurons and filters, and this run removes none; no effect here"
    if not rounded and note not in args.notes:
        args.notes.append(note)
    least = lowest_multiple(max(1, args.min_units if args.vit_structured else 1), args.round_to)
    if rounded and least > min(rounded):
        flags = f"--round_to {args.round_to}" + (f" and --min_units {args.min_units}" if args.vit_structured else "")
        raise RunError(
            f"{flags}: leave {least} units or more; a layer of {args.arch} has only {min(rounded)}; lower it"
        )


def state_epochs(args: argparse.Namespace, state: int) -> int:
    """Epochs of a state that is no finish."""
    own = None if state or args.struct == "dense" else args.dense_epochs
    return run_length(args)[1] if own is None else own


def run_epochs(args: argparse.Namespace) -> int:
    """Epochs of all states and of the finish."""
    states = run_length(args)[0]
    return sum(state_epochs(args, state) for state in range(states)) + (args.finish_epochs or 0)


def run_length(args: argparse.Namespace) -> tuple[int, int, list[int]]:
    """States, epochs per state and milestones; `dense` spends the same epochs in one schedule."""
    milestones = milestones_of(args)
    if args.struct == "dense":
        return 1, args.epochs * args.pruning_times, [epoch * args.pruning_times for epoch in milestones]
    return args.pruning_times, args.epochs, milestones
