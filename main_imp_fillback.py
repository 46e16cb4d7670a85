#!/usr/bin/env python
"""Prune a Vision Transformer iteratively: train, prune, rewind, retrain.

    python main_imp_fillback.py --dataset digits --struct rsst --epochs 15 --pruning_times 4 --rate 0.3
    python main_imp_fillback.py --dataset fashionmnist --data /usr/share/datasets/fashion-mnist --img_size 28 \\
        --patch_size 7 --struct rsst --vit_structured --vit_prune_target both --rate 0.3 --mlp_prune_ratio 0.3
    python main_imp_fillback.py --save_dir results/NAME --resume
    torchrun --nproc_per_node=8 main_imp_fillback.py --dataset imagenet --data /data/imagenet --batch_size 1024

State 0 trains dense. Before every further state some weights are chosen: Refill cuts them at once, RSST drives them to
zero by a growing penalty while the state trains and cuts them when cutting costs nothing. Behind the last state a
finish may train on what it selected. `--dry_run` shows what a command would do. What a run leaves behind is described
in README.md.

The method is `prune_and_retrain` below; what it calls stands in engine/ (the run, a state's training, the choice).
Flags and their checks stand in cli/, units, scores and masks in pruning/, what differs between models in families/.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

# PyTorch's CPU threads spin for one another: beside another busy process a step took 5.2 s, like this 0.8 s
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn

import export
import report
import utils
from cli.checks import check_model_folder
from cli.errors import explain, leave, one_voice, way_on
from cli.parse import parse_args
from cli.plan import notes_on_steps, plan
from dataset import DataError, Splits, load_dataset, preprocessing_of
from deployment.folder import NotProvenError
from engine import journal
from engine.capture import check_compile
from engine.checkpoint import check_same_data, check_same_start
from engine.choose import choose_target
from engine.distill import named_teacher
from engine.folder import EXPORT_FAILED, make_save_dir, write_run_facts
from engine.model import first_model, make_model, run_length, state_epochs, units_of_run
from engine.processes import ALONE, Processes, joined
from engine.run import Run
from engine.starting import select_start
from engine.training import StateTraining, resume
from families import family_of
from pruning.reports import sparsity_by_kind, sparsity_report
from pruning.units import count_parameters
from reporting.words import plural
from search.command import search
from utils import RunError

log = logging.getLogger("main")

# ----------------------------------------------------------------------------------------------------------- the method


def prune_and_retrain(run: Run, training: StateTraining | None = None) -> None:
    """All states of a run, and a finish behind them, from where `run.progress` stands; a resumed one may enter in the
    middle of a `training`."""
    while run.progress.state < run.rounds:
        if not run.progress.begun:
            run.begin_state()
            if run.prunes():
                target = choose_target(run)  # score the trained network and choose what stays
                if run.args.struct != "rsst":
                    run.cut_at_once(target)  # what goes is zero before training starts, and what stays takes over
                else:
                    run.doom(target)  # what goes trains on, under the penalty
                run.rewind()  # weights back to where states start from
            select_start(run)  # a network that is trained already takes part in the state's selection
        if run.total_steps:
            training = training or StateTraining(run)
        while training and not training.finished:
            training.step()
            if training.at_cut:
                training.cut()  # what the penalty drove to nothing becomes zero for good, and the rest heals
            if training.at_epoch_end:
                training.end_epoch()  # validate, keep the best, write a checkpoint
            elif run.signals.received or run.checkpoint_due():
                training.break_off()
            run.signals.check()
        if training:
            training.close()
        training = None  # frees its network and, on a GPU, its captured step
        run.end_state()  # test the selected model
        run.signals.check()


def conclude(run: Run) -> None:
    """Everything is trained: tables, the small model with its proof, the report."""
    run.writer.wait()
    unreadable = set().union(*(data.unreadable_files for data in (run.train_data, run.val_data, run.test_data)))
    if unreadable:
        log.warning("%d images could not be read and were skipped; their names stand above", len(unreadable))
    masks, title = run.progress.masks, run.family.title
    log.info("\n%s", sparsity_report(masks, title), extra=utils.FILE_ONLY)
    table = journal.states_table(run.progress.states, run.finish_state)
    log.info("\n%s\n\n%s\n", sparsity_by_kind(masks, title), table)
    failed = run.save_dir / EXPORT_FAILED
    failed.unlink(missing_ok=True)
    try:
        hand_over(run)
    except NotProvenError as error:  # which it would be again
        utils.write_text(failed, f"{error}\n")
        raise
    finally:  # the run is trained, whatever its export runs into
        write_report(run)


def hand_over(run: Run) -> None:
    """The selected model of the last state, or of the finish, physically small, with its proof; see export.py."""
    best = utils.load_tensors(run.save_dir / "best.pt", "best.pt")
    run.dense.load_state_dict(best["weights"])
    kept = best["kept"] if run.units else None
    if not run.args.export:
        log.info(export.size_table(run.dense, export.compact(run.dense, kept)[0]))
        return
    last, folder, provenance = run.progress.states[-1], run.save_dir / "model", export.run_provenance(run.args)
    metrics = {"val_accuracy": last["best_accuracy"], "test_accuracy": last["test_accuracy"]}
    metrics = {name: value for name, value in metrics.items() if value != ""}  # a finish on all images has none
    classes = export.class_names(run.args.dataset, run.args.data, run.facts.classes)
    small = export.write(folder, run.dense, kept, run.val_data.sequential(), run.facts, provenance, metrics, classes)
    log.info(f"{export.size_table(run.dense, small)}\n\n{export.proof_line(folder)}")


def write_report(run: Run) -> None:
    """Plots and report from the run's files; see report.py."""
    try:
        report.write(run.save_dir)
        log.info(f"report: {run.save_dir / 'report.html'}")
    except Exception as error:  # the run is done and its model written, whatever a plot runs into
        log.warning("report: %s; python report.py %s tries again", utils.cause(error), run.save_dir)
    pictures = {f"plots/{path.stem}": path for path in sorted((run.save_dir / "plots").glob("*.png"))}
    run.tracker.summarise({f"final/{key}": value for key, value in run.progress.states[-1].items()}, pictures)


# ---------------------------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    utils.keep_output_harmless()
    try:
        with joined() as processes:  # those that torchrun started, or this one alone
            return command(argv, processes)
    except RunError as error:
        return leave(ALONE, f"error: {error}", error.code)


def command(argv: list[str] | None, processes: Processes) -> int:
    with one_voice(processes):
        args = parse_args(argv)
    utils.start_logging(verbose=args.verbose)
    try:
        if args.search:
            return search(args)
        if args.dry_run:
            print(plan(args))
        else:
            with processes.stopping_together():
                start_or_go_on(args, processes)
    except (RunError, DataError) as error:
        return leave(processes, f"error: {error}", getattr(error, "code", 2))
    except utils.Stopped as stop:
        how = f"--resume --save_dir {args.save_dir}"
        return leave(processes, f"stopped by {stop} with a checkpoint; go on with {how}", stop.code)
    except KeyboardInterrupt:
        return leave(processes, f"interrupted; {way_on(args)}", 130)
    except Exception as error:
        reason = explain(error, args, processes)
        if reason is None:
            raise
        return leave(processes, f"error: {reason}", 1)
    return 0


def start_or_go_on(args: argparse.Namespace, processes: Processes) -> None:
    """Set the run up and run it. Whatever can be wrong with device, model or data shows before its folder is made."""
    if args.deterministic:
        utils.be_deterministic()
    device = processes.pick_device(args.device, args.gpu)
    utils.pick_precision(args.amp, device)
    check_compile(args.compile, args.accum_steps, device)
    utils.seed_everything(args.seed)
    content = vars(args).pop("resumed_from", None)
    check_same_start(content, processes)
    with processes.in_turn():
        model = make_model(args, weights=False) if content else first_model(args)
        units_of_run(args, model)
        pixels = family_of(model).image_size(model)
        shown = getattr(args, "preprocessing_used", None)  # runs of older versions have none
        splits = load_dataset(args.dataset, args.data, pixels, args.val_fraction, args.train_limit, shown)
        if content:
            args.notes += check_same_data(content, splits.identity)
        teacher = named_teacher(args, splits.facts, model, export.load)
    processes.check_enough(len(splits.train.labels))
    check_model_folder(args)
    lock = make_save_dir(args) if processes.first else None
    args.save_dir = processes.from_first(args.save_dir)
    try:
        save_dir = Path(args.save_dir)
        run = Run(args, device, splits, model, save_dir, teacher, processes)
        training = resume(run, content) if content else None
        utils.start_logging(save_dir / "run.log" if processes.first else None, args.verbose)
        announce(args, device, model, splits)
        if content:
            run.go_on()
        else:
            run.write(write_run_facts, save_dir, args, device)
            run.start()
        try:
            with run.signals:
                with run.whole_run_bar():
                    prune_and_retrain(run, training)
                processes.part()
                run.write(conclude, run)
        finally:
            run.close()
    finally:
        if lock:
            lock.release()


def announce(args: argparse.Namespace, device: torch.device, model: nn.Module, splits: Splits) -> None:
    """The log's first lines: what is run on what."""
    parameters, pixels = count_parameters(model), family_of(model).image_size(model)
    precision = utils.precision_name(args.amp, device)
    log.info(
        f"{args.struct} on {args.arch}: {parameters:,} parameters, {pixels} pixels, {device}, {precision}, "
        f"seed {args.seed}"
    )
    train_images, val, test = (len(split.labels) for split in (splits.train, splits.val, splits.test))
    data = args.dataset if args.dataset != "folder" else f"folder {args.data}"
    log.info(f"{data}: {train_images:,} train, {val:,} val, {test:,} test images, {splits.facts.classes} classes")
    if report := getattr(model, "pretrained_report", None):  # a resumed run loads none
        log.info(f"weights from {args.pretrained}: {report.failure or report.summary()}", extra=utils.FILE_ONLY)
    log.info(f"images: {preprocessing_of(splits.facts, pixels).words()}")
    for line in splits.lines:  # which stand on the screen already; run.log was not open yet
        log.info(line, extra=utils.FILE_ONLY)
    states, epochs, _ = run_length(args)
    behind = f", then a finish of {plural(args.finish_epochs, 'epoch')}" if args.finish_epochs else ""
    which = f"states 0 to {states - 1} of" if states > 1 else "one state of"
    dense = state_epochs(args, 0)
    first = f" ({plural(dense, 'epoch')} of state 0)" if dense != epochs else ""
    each = " each" if states > 1 else ""
    log.info(f"{which} {plural(epochs, 'epoch')}{each}{first}{behind}; files in {args.save_dir}")
    log.info("epochs count from 1 in this log, from 0 in metrics.jsonl, metrics.csv and states.csv")
    for note in [*args.notes, *notes_on_steps(args, train_images)]:
        log.warning("note: %s", note)
    if args.vit_structured and args.struct == "rsst" and args.prune_type == "lt" and args.ratio_schedule == "constant":
        what = "are the same as Refill's, bit for bit" if args.fc else "differ from Refill's only by the classifier"
        log.warning("note: with lt and a constant ratio, states from 2 on %s; a growing ratio lets RSST act", what)


if __name__ == "__main__":
    sys.exit(main())
