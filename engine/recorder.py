"""Recording a run: checkpoints written by a thread, the selected model on disk, numbers for tracking, elapsed time.

A `Recorder` knows nothing of pruning: the run hands it what is to be written. Of several processes the first one alone
writes; see `Processes.on_first`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from engine.checkpoint import Background, RunState, promote_best, save_checkpoint
from engine.processes import Processes
from engine.run_folder import plain_args
from engine.tracking import Tracker
from utils import StopSignals, save_tensors


class Timer:
    """Seconds since moments that have names."""

    def __init__(self, *names: str):
        self._started = dict.fromkeys(names, time.perf_counter())

    def passed(self, name: str) -> float:
        return time.perf_counter() - self._started[name]

    def restart(self, name: str) -> float:
        """Start again from zero; returns the seconds until now, 0 at the first call."""
        now = time.perf_counter()
        before, self._started[name] = self._started.get(name, now), now
        return now - before


class Recorder:
    """Writes what a run leaves in its folder and sends its numbers to the tracker.

    Attributes:
        timer: "state", of which `progress.seconds` has not been told yet; "checkpoint", since the last one; "epoch".
    """

    def __init__(self, args: argparse.Namespace, save_dir: Path, processes: Processes):
        self.args, self.save_dir, self.processes = args, save_dir, processes
        self.writer, self.timer = Background(), Timer("state", "checkpoint")
        self.tracker: Tracker | None = None
        self._late = False  # the time for a checkpoint has come, as several processes agreed

    def start_tracking(self, progress: RunState) -> None:
        args = self.args
        self.tracker = Tracker(
            args.wandb_mode if self.processes.first else "disabled", self.save_dir, progress.wandb_id,
            project=args.wandb_project, entity=args.wandb_entity, name=self.save_dir.resolve().name,
            config=plain_args(args),
        )  # fmt: skip
        progress.wandb_id = self.tracker.run_id

    def close(self) -> None:
        """Everything that was handed over is on disk afterwards."""
        if self.tracker:
            self.tracker.finish()
        self.writer.wait()

    # -- checkpoints

    def write_checkpoint(self, progress: RunState, content: Mapping) -> None:
        """Pack and write in the background; `content` and what `progress` refers to must not change any more."""
        self.writer.submit(_write_checkpoint, self.save_dir, progress.snapshot(), content)

    def agree(self, signals: StopSignals) -> None:
        """After each step of several processes: what all do about signals and time, after the same step."""
        if self.processes.several:
            late = self.processes.first and self._is_late()
            signals.agreed, self._late = self.processes.vote(signals.heard, late)

    def checkpoint_due(self, step: int) -> bool:
        """Whether `--checkpoint_every` asks for a checkpoint after so many steps of the state."""
        every = self.args.checkpoint_every
        if every is None:
            return False
        if every.endswith("m"):
            return bool(self._late) if self.processes.several else self._is_late()
        return step % int(every) == 0

    def _is_late(self) -> bool:
        every = self.args.checkpoint_every or ""
        return every.endswith("m") and self.timer.passed("checkpoint") >= 60 * int(every[:-1])

    # -- the selected model

    def write_selected(self, best: Mapping) -> None:
        """As best.new.pt, in the background; the next checkpoint, which names it, makes it best.pt."""
        self.writer.submit(save_tensors, self.save_dir / "best.new.pt", best)


def _write_checkpoint(save_dir: Path, progress: RunState, content: Mapping) -> None:
    save_checkpoint(save_dir, {"run": progress.pack(), **content})
    promote_best(save_dir)
