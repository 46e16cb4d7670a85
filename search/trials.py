"""The study of a search and its trials, ordinary runs in trial_0000, trial_0001 and so on.

Optuna keeps the study in an SQLite file; the folder of its run holds everything else about a trial. A process that
works on a trial holds a lock in that folder, which the system releases when the process dies; a running trial without a
lock can be resumed. The list of trials only changes under a lock of the study, so that several processes can share it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cli.checks import check_and_complete
from cli.config import typed_out
from cli.plan import planned_states
from dataset import difference, folder_identity
from deployment.exported import load
from deployment.speed import throughput
from engine.model import run_length
from engine.run_folder import RunLock
from reporting.runs import load_run
from search.space import Space
from utils import RunError, StopSignals, cause, pick_device

log = logging.getLogger(__name__)

COMMAND = Path(__file__).resolve().parents[1] / "main_imp_fillback.py"
POLL = 0.5  # seconds between two checks of a trial
BROKEN = 3  # failures before the first success, after which the search gives up
STOPPED = [128 + getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
COLUMN = {"macs": "macs", "params": "parameters", "latency": "macs"}  # of the plan, to find trials that cost no more


def need_optuna():
    """Optuna, silent.

    Raises:
        RunError: it is missing; says what to install.
    """
    try:
        import optuna
    except ImportError as error:
        raise RunError(f"--search: needs Optuna ({error}); pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def is_weak(
    history: Sequence[Mapping], peers: Sequence[Sequence[Mapping]], least: int, epochs: Mapping[int, int]
) -> bool:
    """Whether a trial is below the median of its peers' validation accuracies at the same state and epoch.

    Peers are complete trials that cost as much or less, so that a small network is never compared with larger ones. The
    first half of a state does not count, since networks recover there from rewinding or a cut. Otherwise the rule is
    Vizier's (Golovin et al., 2017).

    Args:
        history: rows of metrics.jsonl, with "state", "epoch" and "val_accuracy".
        peers: the histories of the others.
        least: the number of peers that must have reached that epoch, at least 1.
        epochs: of each state.
    """
    if not history or "val_accuracy" not in history[-1]:
        return False
    at = (history[-1]["state"], history[-1]["epoch"])
    if 2 * (at[1] + 1) <= epochs[at[0]]:
        return False
    there = [row["val_accuracy"] for peer in peers for row in peer if (row["state"], row["epoch"]) == at]
    return len(there) >= max(1, least) and history[-1]["val_accuracy"] < statistics.median(there)


def read_history(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def run_trial(flags: Sequence[str], folder: Path, weak: Callable[[], bool], signals: StopSignals) -> str:
    """Run or resume a trial up to its end: "" when it is complete, "weak", or why it failed.

    Raises:
        Stopped: this process got a signal; the trial has its checkpoint.
        RunError: another process stopped the trial.
    """
    command = [sys.executable, str(COMMAND), *flags, "--save_dir", str(folder), "--resume", "auto"]
    # a session of its own: Ctrl-C reaches this process alone, which passes it on once
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
    with tempfile.TemporaryFile() as errors, subprocess.Popen(command, stderr=errors, **how) as child:
        stopping = found_weak = False
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)
                if not stopping and (signals.received or weak()):
                    stopping, found_weak = True, not signals.received
                    child.terminate()
        except BaseException:  # a second signal
            child.kill()
            raise
        errors.seek(0)
        last_line = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    if child.returncode == 0:
        return ""
    if child.returncode in STOPPED:
        if found_weak:
            return "weak"
        time.sleep(2 * POLL)  # a scheduler that ends a job may signal this process later
        signals.check()
        raise RunError(f"{folder}: stopped by another process, with a checkpoint; the same command resumes it", 1)
    signals.check()
    return last_line or f"exit status {child.returncode}"


class Study:
    """The trials of a search, in a folder that several processes may share.

    Args:
        args: the command's flags, complete, with the objective.
        folder: of the study.
        base: flags of all trials, by name.
        own: flags that may differ between processes.

    Raises:
        RunError: the folder holds a run, another search, or a study that Optuna cannot read.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, base: dict, own: dict, space: Space):
        self.args, self.folder, self.base, self.own, self.space = args, folder, base, own, space
        self.signals, self.optuna = StopSignals(), need_optuna()
        self.running, self.weak, self.failed, self.complete = (
            self.optuna.trial.TrialState[name] for name in ("RUNNING", "PRUNED", "FAIL", "COMPLETE")
        )
        if (folder / "args.yaml").exists():
            raise RunError(f"--save_dir {folder}: holds a run; a search needs a folder of its own")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.locked():
                self.study = self._open()
        except OSError as error:
            raise RunError(f"--save_dir {folder}: cannot be written ({error.strerror}); choose another") from error

    def _open(self):
        from sqlalchemy.exc import SQLAlchemyError

        file = self.folder / "study.db"
        command = {**self.base, "search_objective": self.args.search_objective, "search_space": self.space.values}
        try:
            storage = self.optuna.storages.RDBStorage(
                f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            study = self.optuna.create_study(
                storage=storage, study_name="search", directions=["maximize", "minimize"], load_if_exists=True
            )
            begun = study.user_attrs.get("command")
            if begun is None:
                study.set_user_attr("command", command)
                begun = command
            data = folder_identity(self.args.dataset, self.args.data)
            if data and "data" not in study.user_attrs:
                study.set_user_attr("data", data)
        except (SQLAlchemyError, RuntimeError) as error:
            raise RunError(
                f"{file}: Optuna cannot open it ({cause(error)}); move it away if it is no study of this Optuna"
            ) from error
        if data and (changed := difference(study.user_attrs["data"], data)):
            where = f"--save_dir {self.folder}"
            raise RunError(f"{where}: was searched on other data: {changed}; give their folder by --data")
        other = sorted(name for name in command | begun if command.get(name) != begun.get(name))
        if other:
            names = ", ".join(f"--{name}" for name in other)
            raise RunError(f"--save_dir {self.folder}: was searched with another {names}; give that, or another folder")
        return study

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process changes the list of trials inside the block."""
        lock = None
        while lock is None:
            self.signals.check()
            lock = _try_lock(self.folder, "study.lock")
            time.sleep(0 if lock else 0.05)
        try:
            yield
        finally:
            lock.release()

    def trials(self, *states) -> list:
        """Trials in these states, or all; without those whose process died while their flags were drawn."""
        found = self.study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in found if "plan" in trial.user_attrs]

    def folder_of(self, trial) -> Path:
        return self.folder / f"trial_{trial.number:04}"

    def flags_of(self, trial) -> dict:
        """The flags of the command line and the drawn ones, by name."""
        return {**self.own, **self.base, **trial.user_attrs["plan"]["flags"]}

    def in_words(self, cost: float) -> str:
        if self.args.search_objective == "latency":
            return f"{cost:.2f} ms"
        return f"{cost:,.0f} parameters" if self.args.search_objective == "params" else f"{cost / 1e6:,.2f} MMACs"

    def next(self):
        """A trial to work on, an abandoned or a new one, and its lock; None when the study has N."""
        with self.locked():
            for trial in self.trials(self.running):
                if (lock := _try_lock(self.folder_of(trial), "search.lock")) is not None:
                    if not self._runs(trial):
                        return trial, lock
                    lock.release()
            if len(self.trials()) >= self.args.search:
                return None
            number = len(self.study.get_trials(deepcopy=False))
            # depends only on the seed and the earlier trials, also after an interruption
            (seed,) = np.random.SeedSequence([self.args.seed, number]).generate_state(1)
            self.study.sampler = self.optuna.samplers.TPESampler(seed=int(seed))
            trial = self.study.ask()
            flags = self.space.draw(trial)
            self.folder_of(trial).mkdir(exist_ok=True)
            lock = RunLock(self.folder_of(trial), "search.lock")
            if lock.trouble:
                log.warning("%s is not locked: %s; use only one process", self.folder, lock.trouble)
            trial.set_user_attr("plan", {"flags": flags, "cost": self._planned_cost(flags)})
            return trial, lock

    def _runs(self, trial) -> bool:
        """Whether a process trains it, such as one that outlived its search; call only with the trial's lock."""
        lock = _try_lock(self.folder_of(trial), "run.lock")
        if lock is not None:
            lock.release()
        return lock is None

    def _planned_cost(self, drawn: Mapping) -> int | None:
        """MACs or parameters of the last state of a trial; None for flags that its run will refuse."""
        args = argparse.Namespace(**{**vars(self.args), **drawn})
        try:
            check_and_complete(args, {**self.args.given, **drawn})
            rows = planned_states(args)
        except RunError:
            return None
        return rows[-1][COLUMN[self.args.search_objective]]

    def work_on(self, trial) -> None:
        """Run a trial to its end and record the result in the study."""
        folder, number = self.folder_of(trial), trial.number
        words = ", ".join(f"{name} {value}" for name, value in trial.user_attrs["plan"]["flags"].items())
        log.info(f"trial {number} ({len(self.trials())} of {self.args.search} begun): {words}")
        outcome = run_trial(typed_out(self.flags_of(trial), str(folder)), folder, self._judge(trial), self.signals)
        if not outcome:
            accuracy, cost = self._values(folder)
            self.study.tell(number, [accuracy, cost])
            log.info(f"trial {number}: validation {100 * accuracy:.2f}%, {self.in_words(cost)}")
        elif outcome == "weak":
            self.study.tell(number, state=self.weak)
            log.info(f"trial {number}: stopped, below the median of those that cost no more")
        elif self._runs(trial):
            log.info(f"trial {number}: continues in another process")
        else:
            self.study.tell(number, state=self.failed)
            log.warning("trial %d: failed: %s", number, outcome)
            if len(self.trials(self.failed)) >= BROKEN and not self.trials(self.complete, self.weak):
                raise RunError(f"the first {BROKEN} trials failed, the last one with: {outcome}", 1)

    def _judge(self, trial) -> Callable[[], bool]:
        """weak() of a trial, which checks every epoch once."""
        plan, seen = trial.user_attrs["plan"], 0
        args = argparse.Namespace(**{**vars(self.args), **plan["flags"]})
        states, epochs, _ = run_length(args)
        lengths = {**dict.fromkeys(range(states), epochs), states: args.finish_epochs}

        def weak() -> bool:
            nonlocal seen
            history = read_history(self.folder_of(trial))
            if not self.args.search_patience or plan["cost"] is None or len(history) == seen:
                return False
            seen = len(history)
            cheaper = [peer for peer in self.trials(self.complete) if peer.user_attrs["plan"]["cost"] <= plan["cost"]]
            peers = [read_history(self.folder_of(peer)) for peer in cheaper]
            return is_weak(history, peers, self.args.search_patience, lengths)

        return weak

    def _values(self, folder: Path) -> tuple[float, float]:
        """Validation accuracy and cost of a complete trial; latency is that of one image, in ms."""
        last = load_run(folder).states[-1]
        if self.args.search_objective != "latency":
            return last["best_accuracy"], last[COLUMN[self.args.search_objective]]
        small = load(folder / "model").to(pick_device(self.args.device, self.args.gpu))
        return last["best_accuracy"], 1000 / throughput({"small": small}, 1, repeats=30)["small"]


def _try_lock(folder: Path, name: str) -> RunLock | None:
    try:
        return RunLock(folder, name)
    except RunError:
        return None
