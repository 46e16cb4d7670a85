#!/usr/bin/env python
"""The small model that a run ends with: on disk and back, with the proof that nothing changed.

    python export.py results/NAME                              writes results/NAME/model/
    python export.py results/NAME --onnx --latency             and model.onnx, and a table of speeds
    python export.py results/NAME --evaluate                   accuracy on the run's test images
    python export.py --from_checkpoint model.pth.tar --arch vit_small --out model

`model/` holds model.safetensors, config.json, parity.json and a model card. `export.load("model")` gives the model
back; the card shows how plain timm does. No file holds pickled code.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import importlib
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

# PyTorch's CPU threads spin for one another: beside another busy process a step took 5.2 s, with this 0.8 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

import utils
from dataset import DATASETS, DataError, DatasetFacts, dataset_facts, load_dataset, make_batches
from engine.evaluation import accuracy
from families import family_of, family_of_config
from families.cards import LOADING_SNIPPETS
from models import BUILDERS, from_flags, from_weights, load_weights
from models.vit import MisfitError
from pruning.masks import plain_weights
from pruning.removal import remove_units
from pruning.scores import evaluating
from pruning.units import Kept, count_parameters
from utils import RunError

__all__ = [
    "LOADING_SNIPPETS",
    "accuracy",
    "check_folder",
    "check_onnx",
    "compact",
    "describe",
    "latency_table",
    "load",
    "macs",
    "main",
    "model_card",
    "parity",
    "proof_line",
    "read_config",
    "run_provenance",
    "size_table",
    "throughput",
    "to_onnx",
    "write",
]

log = logging.getLogger("export")

FLOAT32_BOUND = 1e-5  # times max(1, largest logit)
ONNX_BOUND = 1e-4


# ------------------------------------------------------------------------------------------ remove and prove


def compact(model: nn.Module, kept: Kept | None = None) -> tuple[nn.Module, dict[str, list[int]]]:
    """The physically smaller copy of a masked model, and the ids of the units that it keeps.

    Args:
        kept: units that stay; None finds the dead ones among weights that were pruned one by one and first folds what
            biases of dead heads and neurons emit into their branch's output bias.
    """
    small = copy.deepcopy(model)
    family = family_of(small)
    units = family.units(small)
    if kept is None:
        kept = family.working_units_(small)
    kept = {key: list(kept[key]) if key in kept else list(range(group.count)) for key, group in units.items()}
    return remove_units(small, units, kept), kept


def _largest(so_far: float, value: Tensor) -> float:
    """max() that lets no NaN pass: Python's max(0.0, nan) is 0.0."""
    return float(torch.maximum(torch.tensor(so_far, dtype=torch.float64), value.detach().cpu().double()))


@torch.no_grad()
def parity(masked: nn.Module, small: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """How far the small model's logits are from the masked one's, over all images given.

    float64 is measured on the first batch, on a CPU copy of both.

    Returns:
        largest absolute differences, the largest logit, the bound that float32 has to meet, and top-1 agreement.
    """
    parameter = next(masked.parameters())
    images_seen = agreed = 0
    difference = largest = 0.0
    exact: float | None = None
    with evaluating(masked), evaluating(small):
        for images, _ in batches:
            if exact is None:
                models = [copy.deepcopy(model).cpu().double() for model in (masked, small)]
                first = images[: _affordable(masked)].cpu().double()
                exact = float((models[0](first) - models[1](first)).abs().max())
            images = images.to(parameter.device, parameter.dtype)
            expected, found = masked(images), small(images)
            difference = _largest(difference, (expected - found).abs().max())
            largest = max(largest, float(expected.abs().max()))
            agreed += int((expected.argmax(1) == found.argmax(1)).sum())
            images_seen += len(images)
    return {
        "images": images_seen,
        "max_difference_float32": difference,
        "max_difference_float64": exact,
        "largest_logit": largest,
        "bound_float32": FLOAT32_BOUND * max(1.0, largest),
        "top1_agreement": agreed / images_seen,
    }


# ------------------------------------------------------------------------------------------- on disk and back


def write(
    folder: Path,
    masked: nn.Module,
    kept: Kept | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    facts: DatasetFacts | None,
    provenance: Mapping,
    metrics: Mapping,
) -> nn.Module:
    """Write `model/` and return the small model; nothing is written when it computes something else.

    Args:
        masked: the dense-shaped model with pruned weights at zero.
        kept: as in `compact`.
        batches: validation images for the proof.
        provenance, metrics: plain values for config.json and the card.

    Raises:
        RunError: the small model's logits differ by more than 1e-5 x max(1, largest logit) in float32.
    """
    small, kept = compact(masked, kept)
    proof = parity(masked, small, batches)
    if not proof["max_difference_float32"] <= proof["bound_float32"]:
        raise RunError(
            f"the removed model differs from the masked one by {proof['max_difference_float32']:.2g} "
            f"(allowed: {proof['bound_float32']:.2g}); not exported",
            code=1,
        )
    config = describe(small, kept, facts)
    config["parameters"] = {"dense": count_parameters(masked), "removed": count_parameters(small)}
    config["macs"] = {"dense": macs(masked), "removed": macs(small)}
    config["provenance"], config["metrics"] = dict(provenance), dict(metrics)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in small.state_dict().items()}
    # each file vouches for the other: the weights carry the config's digest, the config theirs
    blob = save(weights, metadata={"format": "pt", "config_sha256": _digest(config)})
    config["sha256"] = hashlib.sha256(blob).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.onnx", "latency.txt"):
            (folder / name).unlink(missing_ok=True)  # they belong to the model that was here
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; the run itself is complete", code=1) from error
    utils.write_atomic(folder / "model.safetensors", lambda file: file.write(blob))
    utils.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    utils.write_text(folder / "parity.json", json.dumps(proof, indent=2) + "\n")
    utils.write_text(folder / "README.md", model_card(config, proof))
    return small


def macs(model: nn.Module) -> int:
    """Forward multiply-accumulates per image of the model as it is."""
    return family_of(model).cost(model, {})["macs"]


def _affordable(model: nn.Module) -> int:
    """Images of a batch of about 64 GMACs, 64 at most: with more, large models keep a CPU busy for minutes."""
    return max(1, min(64, 64 * 10**9 // max(1, macs(model))))


def check_folder(folder: Path) -> None:
    """Raise early when `folder` could not be made or written."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"--out {folder}: {there} is not a folder that can be written; choose another")


def describe(small: nn.Module, kept: Kept, facts: DatasetFacts | None) -> dict:
    """A removed model as plain values, enough to build it again (its family's share) and to feed it images."""
    config = family_of(small).describe(small, kept)
    mean, std = ([], []) if facts is None else (facts.mean, facts.std)
    # per channel; grey images become three equal ones
    config["mean"] = list(mean) * (3 // len(mean)) if mean else None
    config["std"] = list(std) * (3 // len(std)) if std else None
    return config


def _digest(config: Mapping) -> str:
    content = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load(folder: str | Path) -> nn.Module:
    """The exported model, in eval mode on the CPU; images are normalised by `mean` and `std` of config.json.

    Raises:
        RunError: a file is missing, truncated or not the one that was written.
    """
    folder = Path(folder)
    config = read_config(folder)
    family = family_of_config(config)
    model, kept = family.rebuild(config)
    remove_units(model, family.units(model), kept)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model.eval()


def read_config(folder: Path) -> dict:
    """config.json, checked against model.safetensors in both directions."""
    weights = folder / "model.safetensors"
    try:
        config = json.loads((folder / "config.json").read_text())
        blob_digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        with safe_open(str(weights), framework="pt") as file:
            config_digest = (file.metadata() or {}).get("config_sha256")
    except OSError as error:
        raise RunError(
            f"{error.filename or folder}: {error.strerror}; is {folder} an exported model/ folder?"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{folder / 'config.json'} is damaged ({error}); export again") from error
    except SafetensorError as error:
        raise RunError(f"{weights} is damaged ({error}); export again") from error
    if not isinstance(config, dict) or config.get("sha256") != blob_digest or config_digest != _digest(config):
        raise RunError(f"{folder}: model.safetensors and config.json do not belong together; one was changed")
    return config


def proof_line(folder: Path) -> str:
    """What parity.json says, in a sentence."""
    proof = json.loads((folder / "parity.json").read_text())
    return (
        f"{folder}: the removed model differs from the masked one by {proof['max_difference_float32']:.2g} in float32, "
        f"{proof['max_difference_float64']:.2g} in float64 over {proof['images']:,} validation images"
    )


def model_card(config: Mapping, proof: Mapping) -> str:
    """README.md of an exported model."""
    provenance, metrics = config["provenance"], config["metrics"]
    rows = [("", "dense", "removed")]
    parameters, macs = config["parameters"], config["macs"]
    rows.append(("parameters", f"{parameters['dense']:,}", f"{parameters['removed']:,}"))
    rows.append(("MACs an image", f"{macs['dense'] / 1e9:.4f} G", f"{macs['removed'] / 1e9:.4f} G"))
    rows.append(
        ("weights file", f"{4 * parameters['dense'] / 1e6:.2f} MB", f"{4 * parameters['removed'] / 1e6:.2f} MB")
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ("---", "---:", "---:"), *rows[1:]))
    facts = "\n".join(f"- {name}: {value}" for name, value in {**provenance, **metrics}.items())
    normalisation = f"Images are scaled to 0..1 and normalised with mean {config['mean']} and std {config['std']}."
    if config["mean"] is None:
        normalisation = "How its images are normalised is not known: the weights came without their data set."
    left, loading = family_of_config(config).card(config)
    return (
        f"# Pruned {provenance.get('arch', 'Vision Transformer')}\n\n{table}\n\n{left}\n\n"
        f"The removed model computes what the masked one does: largest difference "
        f"{proof['max_difference_float32']:.2g} in float32 and {proof['max_difference_float64']:.2g} in float64, top-1 "
        f"agreement {100 * proof['top1_agreement']:.2f}% of {proof['images']:,} validation images (parity.json).\n\n"
        f"{facts}\n\n{normalisation}\n\n{loading}"
    )


# ---------------------------------------------------------------------------------------------- ONNX and speed


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
                worst = _largest(worst, (torch.from_numpy(found) - model(inputs[batch])).abs().max())
        if not worst <= ONNX_BOUND:
            raise RunError(
                f"--onnx: ONNX Runtime differs by {worst:.2g} (allowed: {ONNX_BOUND:g}); not written", code=1
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return worst


@torch.no_grad()
def throughput(
    models: Mapping[str, nn.Module], batch_size: int, repeats: int = 5, seconds: float = 5.0
) -> dict[str, float]:
    """Images per second of each model, from interleaved medians on the models' own device.

    Repeats stop early once `seconds` have passed, but each model runs at least once after its warm-up.
    """
    model = next(iter(models.values()))
    parameter = next(model.parameters())
    size = family_of(model).image_size(model)
    images = torch.randn(batch_size, 3, size, size, device=parameter.device, dtype=parameter.dtype)

    def timed(model: nn.Module) -> float:
        _synchronise(parameter.device)
        started = time.perf_counter()
        model(images)
        _synchronise(parameter.device)
        return time.perf_counter() - started

    times: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
            timed(model)
        begun = time.perf_counter()
        for _ in range(repeats):
            for name, model in models.items():
                times[name].append(timed(model))
            if time.perf_counter() - begun > seconds:
                break
    return {name: batch_size / statistics.median(spent) for name, spent in times.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def latency_table(dense: nn.Module, small: nn.Module, batch_sizes: Iterable[int] = (1, 8, 64)) -> str:
    """Speed of the removed model over the dense one, beside the limit that the MACs set."""
    limit = macs(dense) / max(1, macs(small))
    rows = []
    for batch_size in batch_sizes:
        speed = throughput({"dense": dense, "removed": small}, batch_size, repeats=15)
        gain = speed["removed"] / speed["dense"]
        rows.append(
            {
                "batch": batch_size,
                "dense ms": f"{1000 * batch_size / speed['dense']:.2f}",
                "removed ms": f"{1000 * batch_size / speed['removed']:.2f}",
                "faster": f"{gain:.2f}x",
                "MACs limit": f"{limit:.2f}x",
                "of limit": f"{100 * gain / limit:.0f}%",
            }
        )
    device = next(dense.parameters()).device
    head = f"float32 on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, interleaved medians"
    return f"{head}\n{utils.format_table(rows, {title: title for title in rows[0]})}"


@torch.no_grad()
def size_table(masked: nn.Module, small: nn.Module) -> str:
    """Dense, masked and removed side by side: parameters in use, MACs, file size and images/s on this device."""
    in_use = sum(int(parameter.count_nonzero()) for parameter in masked.parameters())
    dense = copy.deepcopy(masked)
    for parameter in dense.parameters():
        parameter.masked_fill_(parameter == 0, 0.02)  # whether zeros are faster than other numbers is the question
    models = {"dense": dense, "masked": masked, "removed": small}
    speed = throughput(models, _affordable(masked))
    parameters = {
        "dense": count_parameters(masked),
        "masked": in_use,
        "removed": count_parameters(small),
    }
    rows = [
        {
            "model": name,
            "parameters": f"{parameters[name]:,}",
            "MACs": f"{macs(model) / 1e9:.4f} G",
            "file": f"{sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6:.2f} MB",
            "images/s": f"{speed[name]:,.0f}",
        }
        for name, model in models.items()
    ]
    return utils.format_table(rows, {title: title for title in rows[0]})


# ----------------------------------------------------------------------------------------------- the command


def build_parser() -> argparse.ArgumentParser:
    parser = utils.OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_dir", nargs="?", help="folder of a finished run")
    parser.add_argument("--out", help="where the model goes; RUN_DIR/model when not given")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too, with a parity check")
    parser.add_argument("--latency", action="store_true", help="time dense against removed")
    parser.add_argument("--evaluate", action="store_true", help="accuracy on the test images")
    parser.add_argument("--dataset", help=f"one of {', '.join(DATASETS)}; the run's own when not given")
    parser.add_argument("--data", help="folder of the data; the run's own when not given")
    parser.add_argument("--from_checkpoint", metavar="FILE", help="a state dict with weight_orig and weight_mask pairs")
    parser.add_argument("--arch", choices=list(BUILDERS), help="architecture of --from_checkpoint")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="cpu", help="where to compute")
    return parser


def masked_from_run(run_dir: Path) -> tuple[nn.Module, dict[str, list[int]] | None, argparse.Namespace, dict]:
    """The selected model of a run, its kept units (None for element-wise runs), its flags and its metrics."""
    damaged = (OSError, yaml.YAMLError, AttributeError, IndexError, KeyError, TypeError, ValueError)
    try:
        args = argparse.Namespace(**yaml.safe_load((run_dir / "args.yaml").read_text()))
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        best = utils.load_tensors(run_dir / "best.pt", "best.pt")
        epochs = args.pruning_times * args.epochs + (getattr(args, "finish_epochs", None) or 0)
        if len(rows) != epochs or best["state"] != rows[-1]["state"]:
            raise RunError(f"{run_dir}: this run is not finished; go on with --resume --save_dir {run_dir}")
        with open(run_dir / "states.csv", newline="", encoding="utf-8") as file:
            last = list(csv.DictReader(file))[-1]
        metrics = {} if getattr(args, "finish_on_all", False) else {"val_accuracy": best["accuracy"]}
        metrics["test_accuracy"] = float(last["test_accuracy"])
        return _model_of_run(args, best["weights"]), best["kept"] or None, args, metrics
    except damaged as error:
        raise RunError(f"{run_dir} is not the folder of a run ({type(error).__name__}: {error})") from error


def _model_of_run(args: argparse.Namespace, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model that the run's flags describe, with these weights."""
    model = from_flags(args, dataset_facts(args.dataset, args.data), weights=False)
    try:
        load_weights(model, args.arch, weights)
    except MisfitError as error:
        raise RunError(str(error)) from error
    return model.eval()


def masked_from_checkpoint(path: Path, arch: str) -> nn.Module:
    """A model from a state dict of `torch.nn.utils.prune`, with its masks applied."""
    content = utils.load_state_file(path, "--from_checkpoint")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    try:
        weights = plain_weights(tensors)
    except RuntimeError as error:
        raise RunError(f"--from_checkpoint {path}: a mask does not fit its weight ({error})") from error
    try:
        return from_weights(arch, {name.removeprefix("module."): value for name, value in weights.items()})
    except MisfitError as error:
        raise RunError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.run_dir) == bool(args.from_checkpoint):
        parser.error("give the folder of a finished run, or --from_checkpoint FILE")
    if args.from_checkpoint and not (args.arch and args.out):
        parser.error("--from_checkpoint: needs --arch ARCH and --out DIR")
    if args.run_dir and args.arch:
        parser.error(f"--arch {args.arch}: belongs to --from_checkpoint; a run knows its own")
    if args.from_checkpoint and not args.dataset and (args.evaluate or args.data):
        parser.error("--evaluate and --data: need --dataset NAME with --from_checkpoint")
    utils.start_logging()
    try:
        _export(args)
    except (RunError, DataError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)
    return 0


def _export(args: argparse.Namespace) -> None:
    if args.onnx:
        check_onnx()
    if args.out:
        check_folder(Path(args.out))
    if args.run_dir:
        run_dir = Path(args.run_dir)
        masked, kept, run, metrics = masked_from_run(run_dir)
        dataset, data = args.dataset or run.dataset, args.data or run.data
        val_fraction, workers, folder = run.val_fraction, run.workers, Path(args.out or run_dir / "model")
        provenance = run_provenance(run)
    else:
        masked, kept, metrics = masked_from_checkpoint(Path(args.from_checkpoint), args.arch), None, {}
        dataset, data, val_fraction, workers = args.dataset, args.data or "data", 0.1, 0
        folder = Path(args.out)
        provenance = {"arch": args.arch, "checkpoint": Path(args.from_checkpoint).name}
    device = utils.pick_device(args.device)
    masked, size = masked.to(device), family_of(masked).image_size(masked)
    if args.run_dir or args.dataset:
        splits = load_dataset(dataset, data, size, val_fraction)
        facts, batches = splits.facts, make_batches(splits.val, splits.facts, 256, device, workers=workers).sequential()
        if facts.classes != masked.num_classes:
            raise RunError(f"--dataset {dataset}: has {facts.classes} classes, the model {masked.num_classes}")
    else:
        # without the data, random images prove the same function
        facts = None
        noise = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))
        batches = [(noise, torch.zeros(64, dtype=torch.long))]
    if args.evaluate:
        test = make_batches(splits.test, facts, 256, device, workers=workers)
        metrics["test_accuracy"] = accuracy(compact(masked, kept)[0], test)
        log.info(f"test accuracy {100 * metrics['test_accuracy']:.2f}% of {len(test):,} images")
    small = write(folder, masked, kept, batches, facts, provenance, metrics)
    log.info(f"{size_table(masked, small)}\n\n{proof_line(folder)}")
    if args.onnx:
        worst = to_onnx(load(folder), folder / "model.onnx")
        log.info(f"{folder / 'model.onnx'}: ONNX Runtime differs by {worst:.2g} at batch 1 and 3")
    if args.latency:
        table = latency_table(masked, small)
        log.info(table)
        utils.write_text(folder / "latency.txt", table + "\n")


def run_provenance(run: argparse.Namespace) -> dict:
    """What made a model, for its config.json and card."""
    names = ("arch", "dataset", "struct", "criteria", "prune_type", "rate", "pruning_times", "epochs", "seed")
    found = {name: getattr(run, name) for name in names}
    if run.vit_structured:
        found |= {"vit_prune_target": run.vit_prune_target, "mlp_prune_ratio": run.mlp_prune_ratio}
    if getattr(run, "finish_epochs", None):
        found |= {"finish_epochs": run.finish_epochs, "finish_lr": run.finish_lr}
        if run.finish_on_all:
            found |= {"finish_on_all": True, "selection": "none: it is what the finish ended with, on all images"}
    return found


if __name__ == "__main__":
    sys.exit(main())
