"""Where a state starts from: a network that is trained already takes part in the selection of its state, as epoch 0.

In fine-tuning runs that is the network right after a cut at the start of a state, so that training never hands over
less than the cut left; of a state that does not train it is all there is. Files, which count epochs from 0, have it as
epoch -1.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from engine import journal
from utils import save_tensors, weights_of

if TYPE_CHECKING:
    from engine.run import Run

log = logging.getLogger(__name__)

START = -1  # the epoch of what a state starts from, in files


def select_start(run: Run) -> None:
    """Validate the network that the state starts from and select it, where it is trained already."""
    args, progress = run.args, run.progress
    fine_tunes = run.prunes() and args.struct != "rsst" and args.prune_type == "finetune"
    if run.total_steps and not fine_tunes:
        return
    accuracy = run.evaluate(run.dense, "val")["accuracy"]
    weights = weights_of(run.dense)
    if progress.cut:
        _note_cut(run, accuracy)
    else:
        log.info(f"{run.title}: the weights are taken as trained, validation accuracy {100 * accuracy:.2f}%")
    progress.best = {"epoch": START, "accuracy": accuracy}
    best = {"weights": weights, "state": progress.state, "kept": progress.kept, **progress.best}
    run.write(run.writer.submit, save_tensors, run.save_dir / "best.new.pt", best)
    if not run.total_steps:
        run.optimizer, run.average = None, {}
        if args.ema_decay:
            run.average = {name: value.clone() for name, value in run.dense.state_dict().items()}
        run.write(journal.write, run.save_dir, progress)
        run.checkpoint()


def _note_cut(run: Run, accuracy: float) -> None:
    cut, repaired = run.progress.cut, ""
    if run.args.repair in ("mean", "ls"):
        cut["repaired"], repaired = accuracy, f", {100 * accuracy:.2f}% with repair"
    log.info(
        f"{run.title}: accuracy {100 * cut['before']:.2f}% before the cut, {100 * cut['after']:.2f}% after{repaired}"
    )


def start_is_best(run: Run) -> str:
    """Of a state that has trained: what to say when no epoch was better than what it started from."""
    args, best = run.args, run.progress.best
    if not run.total_steps or best["epoch"] != START:
        return ""
    ways = f"a lower --lr than {args.lr:g}" + ("" if args.teacher else ", or --teacher self")
    return (
        f"{run.title}: no epoch was better than the network right after the cut ({100 * best['accuracy']:.2f}%), which "
        f"is kept; try {ways}"
    )
