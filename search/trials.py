"""The study and its trials: flags to search in, ordinary runs in trial_0000, trial_0001 and so on out.

The study is a file of SQLite that Optuna keeps; all else about a trial stands in the folder of its run. Who works on a
trial holds a lock there, which the system takes back when the process dies: a trial that runs without one is free to
be gone on with. The list of trials changes under a lock of the study, so that several processes can share it.
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
from deployment.folder import load
from deployment.speed import throughput
from engine.folder import RunLock
from engine.model import run_length, state_epochs
from reporting.runs import load_run
from search.space import Space
from utils import RunError, StopSignals, cause, pick_device

log = logging.getLogger(__name__)

COMMAND = Path(__file__).resolve().parents[1] / "main_imp_fillback.py"
POLL = 0.5  # seconds between two looks at a trial
BROKEN = 3  # so many failures before anything has worked are no accident
STOPPED = [128 + getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
COLUMN = {"macs": "macs", "params": "parameters", "latency": "macs"}  # of a plan, by which trials are compared


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
    """Whether a trial lies below the median of its peers' validation accuracies at the same state and epoch.

    Peers are complete trials that cost as much or less, so that a small network is never measured by larger ones. The
    first half of a state does not count: networks that were just rewound or cut find back there, each in its own time.
    Otherwise the rule is Vizier's (Golovin et al., 2017).

    Args:
        history: rows of metrics.jsonl, with "state", "epoch" and "val_accuracy".
        peers: the histories of the others.
        least: so many peers must have been there, at least 1.
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
    """The epochs that a run has behind it, as metrics.jsonl has them."""
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def run_trial(flags: Sequence[str], folder: Path, weak: Callable[[], bool], signals: StopSignals) -> str:
    """Run a trial, or go on with it, up to its end: "" when it is complete, "weak", or why it failed.

    Raises:
        Stopped: this process was asked to stop; the trial has its checkpoint.
        RunError: somebody else stopped the trial.
    """
    command = [sys.executable, str(COMMAND), *flags, "--save_dir", str(folder), "--resume", "auto"]
    # a session of its own: Ctrl-C reaches this process alone, which passes it on once
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
    with tempfile.TemporaryFile() as errors, subprocess.Popen(command, stderr=errors, **how) as child:
        asked = found_weak = False
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)
                if not asked and (signals.received or weak()):
                    asked, found_weak = True, not signals.received
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
        time.sleep(2 * POLL)  # who ends all processes of a job may not have come to this one yet
        signals.check()
        raise RunError(f"{folder}: stopped from elsewhere, with a checkpoint; the same command goes on with it", 1)
    signals.check()
    return last_line or f"exit status {child.returncode}"


class Study:
    """The trials of a search, in a folder that several processes may share.

    Args:
        args: the command's flags, complete, with the objective.
        folder: of the study.
        base: the flags that all trials get, by name.
        own: those that may differ from process to process.

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
        """Inside the block nobody else changes the list of trials."""
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
        """Trials in these states, all when none is named, that have flags: others died while theirs were drawn."""
        found = self.study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in found if "plan" in trial.user_attrs]

    def folder_of(self, trial) -> Path:
        return self.folder / f"trial_{trial.number:04}"

    def flags_of(self, trial) -> dict:
        """What was given by hand and what was drawn, by name."""
        return {**self.own, **self.base, **trial.user_attrs["plan"]["flags"]}

    def in_words(self, cost: float) -> str:
        if self.args.search_objective == "latency":
            return f"{cost:.2f} ms"
        return f"{cost:,.0f} parameters" if self.args.search_objective == "params" else f"{cost / 1e6:,.2f} MMACs"

    def next(self):
        """A trial to work on and the lock that says so: one that was left alone, or a new one; None when N are had."""
        with self.locked():
            for trial in self.trials(self.running):
                if (lock := _try_lock(self.folder_of(trial), "search.lock")) is not None:
                    if not self._runs(trial):
                        return trial, lock
                    lock.release()
            if len(self.trials()) >= self.args.search:
                return None
            number = len(self.study.get_trials(deepcopy=False))
            # a function of the seed and of the trials before, wherever the search was broken off
            (seed,) = np.random.SeedSequence([self.args.seed, number]).generate_state(1)
            self.study.sampler = self.optuna.samplers.TPESampler(seed=int(seed))
            trial = self.study.ask()
            flags = self.space.draw(trial)
            self.folder_of(trial).mkdir(exist_ok=True)
            lock = RunLock(self.folder_of(trial), "search.lock")
            if lock.trouble:
                log.warning("%s is not locked: %s; let one process search", self.folder, lock.trouble)
            trial.set_user_attr("plan", {"flags": flags, "cost": self._planned_cost(flags)})
            return trial, lock

    def _runs(self, trial) -> bool:
        """Whether a process trains it, for example one that outlived its search; only who holds the trial may ask."""
        lock = _try_lock(self.folder_of(trial), "run.lock")
        if lock is not None:
            lock.release()
        return lock is None

    def _planned_cost(self, drawn: Mapping) -> int | None:
        """MACs or parameters that a trial with these flags ends with; None where the run will say what is wrong."""
        args = argparse.Namespace(**{**vars(self.args), **drawn})
        try:
            check_and_complete(args, {**self.args.given, **drawn})
            rows = planned_states(args)
        except RunError:
            return None
        return rows[-1][COLUMN[self.args.search_objective]]

    def work_on(self, trial) -> None:
        """Run a trial to its end and tell the study."""
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
            log.info(f"trial {number}: goes on in another process")
        else:
            self.study.tell(number, state=self.failed)
            log.warning("trial %d: failed: %s", number, outcome)
            if len(self.trials(self.failed)) >= BROKEN and not self.trials(self.complete, self.weak):
                raise RunError(f"the first {BROKEN} trials failed, the last one with: {outcome}", 1)

    def _judge(self, trial) -> Callable[[], bool]:
        """weak() of a trial: looks at every epoch once."""
        plan, seen = trial.user_attrs["plan"], 0
        args = argparse.Namespace(**{**vars(self.args), **plan["flags"]})
        states = run_length(args)[0]
        lengths = {**{state: state_epochs(args, state) for state in range(states)}, states: args.finish_epochs}

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
        """What a complete trial is judged by: validation accuracy and cost; latency is that of one image, in ms."""
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
