"""The command line of export.py."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

import report
import utils
from dataset import DATASETS, DataError, DatasetFacts, Splits, load_dataset, make_batches
from deployment.compaction import affordable, compact
from deployment.compiled import aot_package, check_compiler, compiled, torch_export
from deployment.demo import TITLES, Shown, check_new_folder, class_names, page_words, runtime_files, write_demo
from deployment.exported import (
    FOLDED,
    check_folder,
    foldable,
    load,
    model_folder,
    read_config,
    verification_line,
    write,
    write_folded,
)
from deployment.hub import check_hub, write_hub
from deployment.onnx_file import OPSET, check_onnx, onnx_metadata, to_onnx
from deployment.predict import answer_line, answer_rows, image_files, predict
from deployment.quantise import INT8_FILES, better_form, write_int8
from deployment.semi_structured import semi_structured_table
from deployment.source import full_network, masked_from_checkpoint, masked_from_run, run_provenance
from deployment.speed import latency_table, size_table
from engine.evaluation import accuracy
from families import family_of
from models import BUILDERS
from models.merging import merged_tokens
from reporting.words import onnx_columns
from utils import RunError

log = logging.getLogger("export")


_SWITCHES = {
    "onnx": "write model.onnx too, with a parity check",
    "int8": "with --onnx: write model_int8.onnx (scales fixed on training images) and model_int8_dynamic.onnx (scales "
    "from each batch), and onnx.csv: test accuracy, size and milliseconds beside float32",
    "fold": "write folded/ too, the same function without what inference can do without: batch norms go into the "
    "convolutions before them, LayerScale into projections; --onnx, --torch_export and --aot then start from it",
    "torch_export": "write model.pt2, torch.export's program for any batch",
    "aot": "write model_aot.pt2, machine code by AOTInductor (needs a C++ compiler)",
    "compile": "with --latency: time torch.compile, too (needs a C++ compiler)",
    "latency": "time dense against removed",
    "evaluate": "accuracy on the test images",
    "overwrite": "replace the page of an earlier --demo, or the CSV file of --predict",
}
_VALUES = {
    "out": (
        None,
        "where to write the model (RUN_DIR/model when not given), or with --predict the CSV file of answers",
    ),
    "ort_web": ("DIR", "unpacked npm package onnxruntime-web for --demo; npm fetches it when not given"),
    "dense": (
        "FILE",
        "dense network that --int8 and --demo show beside the removed one: a run, an exported model or weights; the "
        "run's teacher.pt, or else its own network with pruned weights at zero, when not given",
    ),
    "hf": ("DIR", "write the model to DIR as the Hugging Face hub expects it; nothing is uploaded"),
    "dataset": (None, f"one of {', '.join(DATASETS)}; the run's own when not given"),
    "data": (None, "folder of the data; the run's own when not given"),
    "from_checkpoint": ("FILE", "a state dict with weight_orig and weight_mask pairs"),
}


def build_parser() -> argparse.ArgumentParser:
    what = "The small model that a run ends with: on disk and back, verified to compute what the masked model does."
    parser = utils.OneLineParser(description=what)
    add = parser.add_argument
    run_dir = "folder of a finished run; of an exported model for --onnx, --torch_export, --aot, --hf and --predict, "
    add("run_dir", nargs="?", help=f"{run_dir}which then need no data set")
    for name, text in _SWITCHES.items():
        add(f"--{name}", action="store_true", help=text)
    for name, (metavar, text) in _VALUES.items():
        add(f"--{name}", metavar=metavar, help=text)
    predict_help = "print the most probable classes of images, or of all images in folders; with --out FILE.csv every "
    add("--predict", nargs="+", metavar="FILE", help=f"{predict_help}class's probability goes there")
    demo_help = "write a folder with a web page (RUN_DIR/demo when DIR is not given) that shows the answers and times "
    demo_help += "of the full and the removed network, with --int8 also of the int8 one, on images or drawn digits"
    add("--demo", nargs="?", const="", metavar="DIR", help=demo_help)
    add("--opset", type=int, default=OPSET, help="version of ONNX's operators that --onnx and --demo write")
    add("--arch", choices=list(BUILDERS), help="architecture of --from_checkpoint")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="cpu", help="where to compute")
    return parser


def main(argv: list[str] | None = None) -> int:
    utils.keep_output_harmless()
    parser = build_parser()
    args = parser.parse_args(argv)
    _check_flags(parser, args)
    utils.start_logging()
    try:
        _check_places(args)
        if args.predict:
            _predict(args)
        elif _is_model(args):
            _export_again(args)
        else:
            _export(args)
    except (RunError, DataError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)
    return 0


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that lack what they need, or that --predict or the folder of an exported model cannot serve."""
    demo, has_data = args.demo is not None, bool(args.run_dir or args.dataset)
    compares, sources = args.int8 or demo, bool(args.run_dir) + bool(args.from_checkpoint)
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    wrong = {
        "give the folder of a finished run, or --from_checkpoint FILE": sources != 1,
        "--from_checkpoint: needs --arch ARCH and --out DIR": args.from_checkpoint and not (args.arch and args.out),
        f"--arch {args.arch}: belongs to --from_checkpoint; a run knows its own": args.run_dir and args.arch,
        "--evaluate and --data: need --dataset NAME with --from_checkpoint": args.from_checkpoint
        and not args.dataset
        and (args.evaluate or args.data),
        "--compile: is timed by --latency; add it, or leave this out": args.compile and not args.latency,
        "--int8: belongs to --onnx; give both": args.int8 and not args.onnx,
        f"--opset {args.opset}: belongs to --onnx or --demo": args.opset != OPSET and not (args.onnx or compares),
        "--overwrite: belongs to --demo or --predict; a model is replaced anyway": args.overwrite
        and not (demo or args.predict),
        f"--ort_web {args.ort_web}: belongs to --demo": args.ort_web and not demo,
        f"--dense {args.dense}: belongs to --int8 or --demo": args.dense and not compares,
        f"--dense {args.dense}: needs the folder of a run": args.dense and args.from_checkpoint,
        "--int8: calibrates on training images, --dataset NAME says which": args.int8 and not has_data,
        "--demo: shows images as a data set does, --dataset NAME says which": demo and not has_data,
        "--demo: needs a folder, as in --demo DIR, with --from_checkpoint": args.demo == "" and args.from_checkpoint,
    }
    if args.predict:
        alone = [name for name in given if name not in ("run_dir", "predict", "out", "overwrite", "device")]
        wrong |= {f"--{name}: does not go with --predict; give it in a call of its own": True for name in alone}
        wrong["--predict: needs the folder of a run or of an exported model"] = not args.run_dir
    elif _is_model(args):
        which = f"{args.run_dir} is an exported model"
        others = [name for name in given if name not in FROM_MODEL]
        wrong |= {f"--{name}: {which}; this flag needs the folder of its run": True for name in others}
        wanted = args.onnx or args.torch_export or args.aot or args.hf
        wrong[f"{which}: say what to make of it, such as --onnx"] = not wanted
    for message, holds in wrong.items():
        if holds:
            parser.error(message)


FROM_MODEL = ("run_dir", "onnx", "opset", "torch_export", "aot", "hf", "overwrite", "device")


def _is_model(args: argparse.Namespace) -> bool:
    """Whether the folder is that of an exported model, and not of a run."""
    folder = Path(args.run_dir or "")
    return bool(args.run_dir) and (folder / "model.safetensors").is_file() and not (folder / "args.yaml").exists()


def _check_places(args: argparse.Namespace) -> None:
    """Refuse, before any work, packages, compilers and operator sets that are missing and folders in the way."""
    for flag, wanted in (("--aot", args.aot), ("--compile", args.compile)):
        if wanted:
            check_compiler(flag)
    if args.onnx or args.demo is not None:
        check_onnx(args.opset)
    if args.predict:
        _check_csv(args)
    elif not _is_model(args):
        check_folder(*((Path(args.out), "--out") if args.out else (Path(args.run_dir) / "model", "RUN_DIR")))
    if args.demo is not None:
        check_new_folder("--demo", _demo_folder(args), args.overwrite)
    if args.hf:
        check_hub()
        check_new_folder("--hf", Path(args.hf))


def _check_csv(args: argparse.Namespace) -> None:
    if args.out and Path(args.out).suffix.lower() != ".csv":
        raise RunError(f"--out {args.out}: with --predict it is a CSV file, such as answers.csv")
    if args.out and Path(args.out).exists() and not args.overwrite:
        raise RunError(f"--out {args.out}: is there already; choose another, or replace it by --overwrite")
    if args.out and not os.access(Path(args.out).absolute().parent, os.W_OK):
        raise RunError(f"--out {args.out}: {Path(args.out).absolute().parent} is not a folder that can be written")


def _demo_folder(args: argparse.Namespace) -> Path:
    return Path(args.demo or Path(args.run_dir) / "demo")


def _predict(args: argparse.Namespace) -> None:
    """Answers for images, in the log and as CSV."""
    files = image_files(map(Path, args.predict))
    names, answers = predict(model_folder(Path(args.run_dir)), files, utils.pick_device(args.device))
    for file, probabilities in answers:
        log.info(answer_line(file, names, probabilities))
    if args.out and answers:
        utils.write_csv(Path(args.out), answer_rows(names, answers))
    if len(answers) < len(files):
        raise RunError(f"--predict: {len(files) - len(answers)} of {len(files)} files could not be read", code=1)


def _export_again(args: argparse.Namespace) -> None:
    """More forms of the exported model that is there."""
    folder = Path(args.run_dir)
    _write_programs(args, folder)
    if args.hf:
        _write_hub(args, folder)


def _write_hub(args: argparse.Namespace, folder: Path) -> None:
    model = load(folder)
    dataset = args.dataset or read_config(folder)["provenance"].get("dataset")
    write_hub(folder, Path(args.hf), dataset, family_of(model).image_size(model))
    log.info(f"{args.hf}: ready for the Hugging Face hub, as in: hf upload NAME {args.hf}")


def _export(args: argparse.Namespace) -> None:
    splits = run = None
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
    _check_model(args, masked)
    device = utils.pick_device(args.device)
    masked, size = masked.to(device), family_of(masked).image_size(masked)
    if args.run_dir or args.dataset:
        shown = getattr(run, "preprocessing_used", None)
        splits = load_dataset(dataset, data, size, val_fraction, shown=shown)
        facts, compared = splits.facts, make_batches(splits.val, splits.facts, 256, device, workers=workers).sequential
        if facts.classes != masked.num_classes:
            raise RunError(f"--dataset {dataset}: has {facts.classes} classes, the model {masked.num_classes}")
    else:
        # without the data, outputs are compared on random images
        facts = None
        noise = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))
        compared = partial(iter, [(noise, torch.zeros(64, dtype=torch.long))])
    shows_full = args.int8 or args.demo is not None
    if shows_full:
        name, full = "masked", copy.deepcopy(masked).cpu()
        if args.run_dir:
            name, full = full_network(run_dir, full, run, args.dense)
    if args.demo is not None:
        runtime = runtime_files(args.ort_web)
    measured = _evaluated(compact(masked, kept)[0], splits, device, workers) if args.evaluate else {}
    classes = class_names(dataset, data, facts.classes) if facts else ()
    small = write(folder, masked, kept, compared(), facts, provenance, metrics, classes, measured)
    log.info(f"{size_table(masked, small)}\n\n{verification_line(folder)}")
    variants = {}
    if args.fold:
        variants["folded"] = write_folded(folder, masked, kept, compared())
        log.info(verification_line(folder / FOLDED))
    _write_programs(args, folder)
    if args.compile:
        variants["compiled"] = compiled(variants.get("folded", small))
    if args.latency:
        text = latency_table(masked, small, variants=variants)
        _write_latency(folder, f"{text}\n{semi_structured_table(masked, small)}" if "nm" in provenance else text)
    if shows_full:
        with tempfile.TemporaryDirectory(prefix="full-") as drafts:
            shown = Shown(name, full, Path(drafts) / "full.onnx")
            to_onnx(full, shown.file, args.opset)
            if args.int8:
                rows = write_int8(folder, shown.file, name, affordable(full), splits, workers)
                log.info(f"\n{utils.format_table(rows, onnx_columns(rows))}\n")
            if args.demo is not None:
                _write_page(args, folder, shown, runtime, dataset, data, facts)
    if args.hf:
        _write_hub(args, folder)
    if args.int8 or args.latency:
        _write_report(args, folder)


def _evaluated(model: torch.nn.Module, splits: Splits, device: torch.device, workers: int) -> dict[str, float]:
    """The exported model's accuracy on the test images, in its own precision, which is float32."""
    test = make_batches(splits.test, splits.facts, 256, device, workers=workers)
    found = {"test_accuracy": accuracy(model, test)}
    log.info(f"test accuracy {100 * found['test_accuracy']:.2f}% of {len(test):,} images")
    return found


def _write_report(args: argparse.Namespace, folder: Path) -> None:
    """Write the run's report again, where it has one, with what was measured on the model in its folder."""
    run_dir = Path(args.run_dir or "")
    if not args.run_dir or not (run_dir / "report.md").exists() or folder.resolve() != (run_dir / "model").resolve():
        return
    try:
        report.write(run_dir)
    except RunError as error:  # everything else is written
        log.warning(f"report: {error}; python report.py {run_dir} tries again")


def _check_model(args: argparse.Namespace, masked: torch.nn.Module) -> None:
    """Refuse, before any work, what cannot be made of this model."""
    if args.int8 and merged_tokens(masked):
        raise RunError("--int8: ONNX Runtime's quantiser cannot follow the shapes of merged tokens; leave it out")
    if args.fold:
        foldable(masked)


def _write_latency(folder: Path, text: str) -> None:
    log.info(text)
    utils.write_text(folder / "latency.txt", f"{text}\n")


def _write_page(
    args: argparse.Namespace,
    folder: Path,
    full: Shown,
    runtime: Mapping[str, bytes],
    dataset: str,
    data: str,
    facts: DatasetFacts,
) -> None:
    """Write the folder of --demo: `full`, the exported model of `folder`, and with --int8 its int8 file."""
    small, arch = load(folder), read_config(folder)["provenance"]["arch"]
    shown = [dataclasses.replace(full, name=TITLES[full.name])]
    shown += [Shown("Pruned", small, folder / "model.onnx" if args.onnx else None)]
    if args.int8:
        shown.append(Shown("Pruned, int8", small, folder / INT8_FILES[better_form(folder / "model.onnx")]))
    page, size = _demo_folder(args), family_of(small).image_size(small)
    words, classes = page_words(arch, dataset, full.name), class_names(dataset, data, facts.classes)
    write_demo(page, shown, words, dataset, facts, size, classes, runtime, args.opset)
    log.info(f"{page}: the page; python -m http.server --directory {page}, then open http://localhost:8000")


def _write_programs(args: argparse.Namespace, folder: Path) -> None:
    """What runs without this program, from the folded network where there is one."""
    model = load(folder / FOLDED if args.fold else folder) if args.onnx or args.torch_export or args.aot else None
    if args.onnx:
        worst = to_onnx(model, folder / "model.onnx", args.opset, onnx_metadata(read_config(folder)))
        log.info(f"{folder / 'model.onnx'}: ONNX Runtime differs by {worst:.2g} at batch 1 and 3")
    if args.torch_export:
        worst = torch_export(model, folder / "model.pt2")
        log.info(f"{folder / 'model.pt2'}: torch.export's program differs by {worst:.2g} at batch 1 and 3")
    if args.aot:
        worst = aot_package(model, folder / "model_aot.pt2")
        log.info(f"{folder / 'model_aot.pt2'}: AOTInductor's code differs by {worst:.2g} at batch 1 and 3")
