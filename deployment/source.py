"""Where a model to export comes from: the folder of a finished run or a foreign checkpoint in, the masked model out."""

from __future__ import annotations

import argparse
import copy
import csv
import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from torch import Tensor, nn

import utils
from dataset import dataset_facts
from deployment.folder import load
from engine.distill import named_teacher
from engine.model import run_epochs
from engine.shape import model_from_flags
from models import from_weights, load_weights
from models.weight_files import MisfitError, PretrainedError, read_weights, without_prefixes
from reporting.runs import method_of
from settings.effect import TARGETS
from settings.flags import complete, idle_flags
from utils import RunError


def masked_from_run(run_dir: Path) -> tuple[nn.Module, dict[str, list[int]] | None, argparse.Namespace, dict]:
    """The selected model of a run, its kept units (None for element-wise runs), its flags and its metrics."""
    damaged = (OSError, yaml.YAMLError, AttributeError, IndexError, KeyError, TypeError, ValueError)
    try:
        args = argparse.Namespace(**yaml.safe_load((run_dir / "args.yaml").read_text()))
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        best = utils.load_tensors(run_dir / "best.pt", "best.pt")
        epochs = run_epochs(argparse.Namespace(**complete(vars(args))))
        with open(run_dir / "states.csv", newline="", encoding="utf-8") as file:
            last = list(csv.DictReader(file))[-1]
        if len(rows) != epochs or best["state"] != int(last["state"]):
            raise RunError(f"{run_dir}: this run is not finished; go on with --resume --save_dir {run_dir}")
        metrics = {} if getattr(args, "finish_on_all", False) else {"val_accuracy": best["accuracy"]}
        metrics["test_accuracy"] = float(last["test_accuracy"])
        weights, kept = best["weights"], best["kept"] or None
    except damaged as error:
        raise RunError(f"{run_dir} is not the folder of a run ({type(error).__name__}: {error})") from error
    return _model_of_run(args, weights), kept, args, metrics


def _model_of_run(args: argparse.Namespace, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model that the run's flags describe, with these weights."""
    model = model_from_flags(args, dataset_facts(args.dataset, args.data), weights=False)
    try:
        load_weights(model, args.arch, weights)
    except MisfitError as error:
        raise RunError(str(error)) from error
    return model.eval()


def full_network(
    run_dir: Path, masked: nn.Module, args: argparse.Namespace, dense: str | None
) -> tuple[str, nn.Module]:
    """The network of full size that stands beside the small one, and "dense" or "masked", which it is.

    Dense is what `--dense` names, or the selected model of state 0 where the run has kept it as its teacher. Other runs
    have kept no dense weights: their network of full size is the masked one, which computes what the small one does.

    Raises:
        RunError: `--dense` does not classify these images into these classes.
    """
    kept = run_dir / "teacher.pt"
    if dense is None and not kept.exists():
        return "masked", copy.deepcopy(masked).cpu()
    named = argparse.Namespace(**{**vars(args), "teacher": dense or str(kept), "kd_alpha": 1.0, "kd_features": None})
    facts = dataset_facts(args.dataset, args.data, getattr(args, "preprocessing_used", None))
    try:
        model = named_teacher(named, facts, masked, load)
    except RunError as error:
        raise RunError(str(error).replace("--teacher", "--dense", 1)) from error
    return "dense", model.eval()


def masked_from_checkpoint(path: Path, arch: str) -> nn.Module:
    """A model from a state dict of `torch.nn.utils.prune`, with its masks applied."""
    try:
        return from_weights(arch, without_prefixes(read_weights(path, "--from_checkpoint")))
    except (PretrainedError, ValueError) as error:
        raise RunError(str(error)) from error


def run_provenance(run: argparse.Namespace) -> dict:
    """What made a model, for its config.json and card."""
    method = method_of(vars(run))
    idle = idle_flags(vars(run))
    names = ("arch", "dataset", "struct", "criteria", "prune_type", "rate", "pruning_times", "epochs", "seed", "nm")
    names += ("vit_prune_target", "mlp_prune_ratio", "token_merge", *TARGETS, "latency_batch")
    found = {name: getattr(run, name, None) for name in names if name not in idle}
    found = {name: value for name, value in found.items() if value is not None and (name != "token_merge" or value)}
    found["struct"] = method
    if getattr(run, "finish_epochs", None):
        found |= {"finish_epochs": run.finish_epochs, "finish_lr": run.finish_lr}
        if run.finish_on_all:
            found |= {"finish_on_all": True, "selection": "none: it is what the finish ended with, on all images"}
    return found
