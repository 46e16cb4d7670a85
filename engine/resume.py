"""Resuming: the content of a checkpoint is checked and put into a run; nothing is written before all of it fits."""

from __future__ import annotations

import logging
import warnings

from torch import Tensor

from engine import journal
from engine.checkpoint import MASK_SETS, RunState, check_kinds, fitting, is_selected, promote_best
from engine.optimizer import load_moments
from engine.run import Run
from engine.run_folder import write_flags
from engine.training import StateTraining
from utils import RunError, load_tensors, restore_random_states, sha256

log = logging.getLogger(__name__)


def resume(run: Run, content: dict) -> StateTraining | None:
    """Put a run where a checkpoint stands.

    Returns:
        the training of the state in whose middle that is; None between two states.

    Raises:
        RunError: the checkpoint is of another run, or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what does not belong there is refused, not commented
        with fitting("entries"):
            check_kinds(content)
        _restore_run(run, content)
        if not run.progress.begun:
            return None
        training = StateTraining(run)
        with fitting("optimizer"):
            load_moments(training.optimizer, training.network.model, run.args, content["moments"])
        if content["scaler"]:  # empty unless the run trained in fp16 so far
            with fitting("scaler"):
                run.scaler.load_state_dict(content["scaler"])
        return training


def log_and_rewrite(run: Run) -> None:
    """What a resumed run writes first: its files as they were at the checkpoint."""
    first = run.processes.on_first
    first(find_best, run)
    first(write_flags, run.save_dir, run.args)  # more states, other devices
    first(journal.write, run.save_dir, run.progress)
    run.recorder.start_tracking(run.progress)
    log.info(f"resumed at {run.title}, step {run.progress.step} of {run.round.total_steps}")
    run.log_settings()


def _restore_run(run: Run, content: dict) -> None:
    """All but the training of a state."""
    args = run.args
    with fitting("progress"):
        run.progress = RunState.unpack(content["run"], run.device)
    finish_before = content["args"].get("finish_epochs")
    if args.finish_epochs and finish_before and args.finish_epochs > finish_before:
        _lengthen_finish(run, finish_before)
    elif run.finishing:
        run.enter_finish()
    with fitting("progress"):
        unvalidated = run.finish_state if args.finish_on_all else None
        journal.check_rows(run.progress, run.round.steps_per_epoch, unvalidated)
        _check_progress(run)
    path = run.save_dir / content["rewind_file"]
    run.rewind_weights = load_tensors(path, "--resume")
    run.rewind_file, run.rewind_sha256 = content["rewind_file"], sha256(path)
    if run.rewind_sha256 != content["rewind_sha256"]:
        raise RunError(f"--resume: {path} is not the file that this run started from")
    with fitting("weights"):
        run.dense.load_state_dict(content["weights"])
    if run.finishing and not finish_before:  # the run had ended, and its last weights are those of the last step
        _start_from_selected(run)
    with fitting("average"):
        _restore_average(run, content.get("average", {}))
    run.teacher_sha256 = content.get("teacher_sha256", "")
    with fitting("random"):
        restore_random_states(content["random"])


def _check_progress(run: Run) -> None:
    """Raises: ValueError, when steps, masks or units are not those of this model and these flags."""
    progress, shapes = run.progress, {name: weight.shape for name, weight in run.prunable().items()}
    if progress.state > run.rounds or progress.step > run.round.total_steps:
        raise ValueError(f"state {progress.state}, step {progress.step} lie after the end")
    for name in MASK_SETS:
        if {layer: mask.shape for layer, mask in getattr(progress, name).items()} != shapes:
            raise ValueError(f"{name}: other layers or shapes than this model's")
    for name in ("kept", "target_kept"):
        kept = getattr(progress, name)
        if kept.keys() != run.units.keys() or any(
            len({*ids}) < len(ids) or any(unit >= run.units[key].count for unit in ids) for key, ids in kept.items()
        ):
            raise ValueError(f"{name}: other units than this model's")


def _lengthen_finish(run: Run, epochs: int) -> None:
    """The run has begun its finish, or ended it, when it was to have fewer `epochs`: further ones follow."""
    progress = run.progress
    if progress.state >= run.finish_state:
        done = progress.state > run.finish_state
        progress.state = run.finish_state
        run.enter_finish()
        if done:
            progress.step, progress.begun = epochs * run.round.steps_per_epoch, True
            progress.states.pop()
        if progress.begun:
            run.args.notes.append(
                f"--finish_epochs {run.args.finish_epochs}: the epochs to come have the learning rates of so long "
                f"a finish, those that are done have those of {epochs} epochs"
            )


def _start_from_selected(run: Run) -> None:
    best = load_tensors(run.save_dir / "best.pt", "best.pt")
    row = run.progress.states[-1]
    if best["state"] != row["state"] or best["epoch"] != row["best_epoch"]:
        raise RunError(
            f"--finish_epochs {run.args.finish_epochs}: {run.save_dir / 'best.pt'} is not the model that state "
            f"{row['state']} selected; go on from the latest checkpoint"
        )
    run.dense.load_state_dict(best["weights"])


def _restore_average(run: Run, average: dict[str, Tensor]) -> None:
    shapes = {name: value.shape for name, value in run.dense.state_dict().items()} if run.args.ema_decay else {}
    if {name: value.shape for name, value in average.items()} != shapes:
        raise ValueError("the average of the weights")
    run.average = {name: value.to(run.device) for name, value in average.items()}


def find_best(run: Run) -> None:
    """Make best.pt the model that the checkpoint's state has selected so far.

    Later epochs may have replaced the one that an older checkpoint names. Then the epochs to come select anew, so that
    tables and weights tell of one epoch.
    """
    progress, fresh, path = run.progress, run.save_dir / "best.new.pt", run.save_dir / "best.pt"
    if fresh.is_file() and is_selected(load_tensors(fresh, "best.new.pt"), progress):
        promote_best(run.save_dir)
    fresh.unlink(missing_ok=True)  # of an epoch that is to be trained again
    if not (progress.begun and progress.best):
        return
    if not (path.is_file() and is_selected(load_tensors(path, "best.pt"), progress)):
        log.warning(
            f"best.pt is of another epoch than epoch {progress.best['epoch'] + 1} of {run.title}, which the "
            "checkpoint names (resumed from an older one): the epochs to come select anew"
        )
        progress.best = {}
