#!/usr/bin/env python
"""A study: a grid of ordinary runs from one YAML file, some at a time; one row of a CSV file for each.

    python benchmarks/study.py --scale cpu --list                   # how many runs, how many hours
    python benchmarks/study.py --scale cpu                          # benchmarks/studies/cpu.yaml into results/study_cpu
    python benchmarks/study.py FILE.yaml --out DIR --processes 2 --only both start
    python benchmarks/study.py --scale cpu --seeds 5 6 7 --out DIR  # the same with other seeds
    python benchmarks/study.py FILE.yaml --report -- --epochs 10    # flags for every run, and report.py's comparison
    python benchmarks/study_tables.py results/study_cpu/study.csv   # tables and picture

The same command continues where it was stopped: complete runs are kept, interrupted ones continue from their
checkpoint, failed ones are tried again. Ctrl-C and SIGTERM let each run write a checkpoint first. benchmarks/grid.py
explains the file.
"""

from __future__ import annotations

import csv
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402

from benchmarks.grid import MAIN, Planned, checked, read_study  # noqa: E402
from engine.run_folder import RunLock  # noqa: E402
from reporting.compare import compare  # noqa: E402
from reporting.runs import load_run  # noqa: E402
from reporting.words import duration  # noqa: E402
from utils import OneLineParser, RunError, StopSignals, write_csv, write_text  # noqa: E402

SCALES = {"cpu": "results/study_cpu", "gpu": "results/study_gpu"}


def build_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", metavar="FILE.yaml", help="the study; --scale names one of ours")
    parser.add_argument("--scale", choices=list(SCALES), default="cpu", help="benchmarks/studies/SCALE.yaml")
    parser.add_argument("--out", help="folder of all runs and of study.csv; results/study_SCALE or _FILE if not given")
    parser.add_argument(
        "--processes", type=int, help="runs at once; the file's number, 1 on a GPU, or one for each core"
    )
    parser.add_argument("--only", nargs="+", metavar="CELL", help="these cells or runs (or NAM*) and what they need")
    parser.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", help="as if `base` of the file said so")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="instead of the file's: a second look")
    parser.add_argument("--report", action="store_true", help="compare all runs at the end, as report.py does")
    parser.add_argument("--list", action="store_true", help="print all runs and how long they would take, and exit")
    return parser


# ------------------------------------------------------------------------------------------------ finished runs


def is_complete(run: Planned) -> bool:
    """Whether a run has left all that other runs and its row read."""
    return (run.folder / ("model/config.json" if run.program == MAIN else "states.csv")).is_file()


def row_of(run: Planned, wall_seconds: float | None) -> dict:
    """The row of a complete run; accuracies are fractions, cuts those after state 0.

    Raises:
        RunError: its files are damaged.
    """
    found = load_run(run.folder)
    last, args = found.states[-1], found.args
    cuts = [
        (row["accuracy_before_cut"], row["accuracy_after_cut"])
        for row in found.states
        if math.isfinite(row["accuracy_before_cut"])
    ]
    worst = max(cuts, key=lambda cut: cut[0] - cut[1], default=("", ""))
    means = [statistics.fmean(values) for values in zip(*cuts, strict=True)] or ["", ""]
    target = args.get("vit_prune_target", "head") if args.get("vit_structured") else "weights"
    return {
        **_naming(run),
        "target": "none" if found.method == "dense" else target,
        "rewinding": args.get("prune_type", ""),
        "density": last["density"],
        **{name: _number(last, name, int) for name in ("heads", "neurons", "parameters", "macs")},
        "best_val": _number(last, "best_accuracy", float),
        "test": last["test_accuracy"],
        "cuts": len(cuts),
        "before_cut_mean": means[0],
        "after_cut_mean": means[1],
        "before_cut_worst": worst[0],
        "after_cut_worst": worst[1],
        "seconds": round(found.seconds, 1),
        "wall_seconds": "" if wall_seconds is None else round(wall_seconds, 1),
        "device": found.environment.get("device_name", ""),
        "precision": found.environment.get("precision", ""),
        "torch": found.environment.get("versions", {}).get("torch", ""),
        "commit": found.environment.get("commit") or "",
        "failure": "",
        "command": run.command,
    }


def _naming(run: Planned) -> dict:
    """The cells of a row that the study itself knows.

    `method` is what the mappings of `each` chose, `asked` the share to keep, `variant` all but the seed.
    """
    axes = run.axes
    return {
        "name": run.name,
        "cell": run.cell,
        "variant": run.variant,
        "method": run.kind.removeprefix(run.cell).strip("_") or run.flags.get("struct", "rsst"),
        "asked": axes.get("density", ""),
        "seed": axes.get("seed", run.flags.get("seed", "")),
    }


def _number(row: Mapping, name: str, kind: type) -> object:
    return kind(row[name]) if math.isfinite(row.get(name, math.nan)) else ""


class Table:
    """study.csv: a row a run, written whole or not at all; a row of a failure gives way to the next try's."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = {row["name"]: row for row in csv.DictReader(file)}

    def add(self, row: Mapping) -> None:
        self.rows.pop(row["name"], None)
        self.rows[row["name"]] = dict(row)
        width = max(self.rows.values(), key=len)  # a failure has fewer cells
        write_csv(self.path, [{**dict.fromkeys(width, ""), **row} for row in self.rows.values()])

    def has(self, run: Planned) -> bool:
        row = self.rows.get(run.name)
        return row is not None and not row["failure"]

    def seconds(self, name: str) -> float:
        row = self.rows.get(name, {})
        return float(row.get("wall_seconds") or row.get("seconds") or 0)


# ------------------------------------------------------------------------------------------------ how long it takes


def seconds_left(runs: Iterable[Planned], done: Sequence[Planned], table: Table, speed: float) -> float:
    """Seconds of one process for `runs`: cost times what a unit of it took, in runs of the same variant, else of the
    same cell, else of all; by `speed` (MACs a second) where none is done."""
    spent: dict[object, list[float]] = {}
    for run in done:
        for key in (("variant", run.variant), ("cell", run.cell), "all"):
            sums = spent.setdefault(key, [0.0, 0.0])
            sums[0] += table.seconds(run.name)
            sums[1] += run.cost
    total = 0.0
    for run in runs:
        keys = (("variant", run.variant), ("cell", run.cell), "all")
        seconds, cost = next((spent[key] for key in keys if spent.get(key, [0])[0]), (1.0, speed))
        total += run.cost * seconds / cost
    return total


def listing(runs: Sequence[Planned], done: set[str], settings: Mapping, table: Table, processes: int) -> str:
    """A line a cell, and the hours of all that is still to do."""
    lines, speed = [], float(settings.get("speed", 5)) * 1e9
    finished = [run for run in runs if run.name in done]
    for cell in dict.fromkeys(run.cell for run in runs):
        own = [run for run in runs if run.cell == cell]
        left = [run for run in own if run.name not in done]
        hours = seconds_left(left, finished, table, speed) / processes / 3600
        lines.append(f"{cell:<24} stage {own[0].stage}  {len(own):>4} runs, {len(left):>4} to do, {hours:6.2f} h")
    left = [run for run in runs if run.name not in done]
    hours = seconds_left(left, finished, table, speed) / processes / 3600
    lines.append(f"{len(runs)} runs, {len(left)} to do: about {hours:.1f} h with {processes} at once")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ making the runs


class Study:
    """The runs that are to be made, those that are made now, and what came of the others."""

    def __init__(self, runs: Sequence[Planned], table: Table, processes: int, speed: float):
        self.runs, self.table, self.processes, self.speed = runs, table, processes, speed
        self.failures: dict[str, str] = {}
        self.working: dict[Planned, tuple[subprocess.Popen, float]] = {}
        self.done: list[Planned] = []
        self.waiting: list[Planned] = []
        for run in runs:
            (self.done if self._left_complete(run) else self.waiting).append(run)
        self.waiting = [run for run in self.waiting if run.name not in self.failures]

    def _left_complete(self, run: Planned) -> bool:
        """Whether an earlier call made the run, by the same command; its row may be missing."""
        if not is_complete(run):
            return False
        if self._noted(run) not in (None, run.command):
            self.failures[run.name] = f"{run.folder} was made by another command; remove it, or choose another --out"
            return False
        if not self.table.has(run):
            self.table.add(row_of(run, None))
        return True

    @staticmethod
    def _noted(run: Planned) -> str | None:
        """The command that the run was started by."""
        note = run.folder / "command.txt"
        return note.read_text(encoding="utf-8").strip() if note.exists() else None

    def make(self, signals: StopSignals) -> None:
        """Start what can start until nothing is left, or a signal asks to stop; a run that fails stops no other."""
        try:
            while (self.waiting or self.working) and not signals.received:
                self._give_up_dependents()
                while len(self.working) < self.processes and (run := self._next()):
                    self.waiting.remove(run)
                    self._start(run)
                time.sleep(0.1)
                self._collect()
        finally:  # on errors and a second signal, too
            for process, _ in self.working.values():
                process.send_signal(signals.received or signal.SIGTERM)
            for process, _ in self.working.values():
                process.wait()
            self._collect(stopping=True)

    def _next(self) -> Planned | None:
        made = {run.name for run in self.done}
        return next((run for run in self.waiting if made.issuperset(run.needs)), None)

    def _give_up_dependents(self) -> None:
        """Drop runs whose starting point failed, or is neither there nor part of this call."""
        possible = {run.name for run in [*self.waiting, *self.working, *self.done]}
        for run in list(self.waiting):
            missing = [need for need in run.needs if need not in possible]
            if missing:
                self.waiting.remove(run)
                self._fail(run, f"not started: needs {', '.join(missing)}")

    def _start(self, run: Planned) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        argv, has_checkpoint = [sys.executable, *run.argv], any(run.folder.glob("checkpoint*.pt"))
        if has_checkpoint and self._noted(run) == run.command:
            argv = [sys.executable, run.program, "--resume", "--save_dir", str(run.folder)]
        elif run.program == MAIN:
            argv.append("--overwrite")
        write_text(run.folder / "command.txt", run.command + "\n")
        threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {"WANDB_MODE": "disabled", "OMP_WAIT_POLICY": "passive", **os.environ, **threads}
        with (run.folder / "output.log").open("a", encoding="utf-8") as output:
            process = subprocess.Popen(  # in its own session, so that Ctrl-C reaches it only through us, and once
                argv, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.working[run] = process, time.perf_counter()

    def _collect(self, stopping: bool = False) -> None:
        for run, (process, started) in list(self.working.items()):
            if process.poll() is None:
                continue
            del self.working[run]
            if process.returncode == 0 and is_complete(run):
                self._finish(run, time.perf_counter() - started)
            elif not stopping:
                said = (run.folder / "output.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                self._fail(run, f"exit status {process.returncode}: {said[-1] if said else 'no output'}")

    def _finish(self, run: Planned, wall_seconds: float) -> None:
        row = row_of(run, wall_seconds)
        self.table.add(row)
        self.done.append(run)
        left = seconds_left([*self.waiting, *self.working], self.done, self.table, self.speed) / self.processes
        print(
            f"[{len(self.done)}/{len(self.runs)}] {run.name}: test {100 * row['test']:.2f}%, "
            f"{wall_seconds:.0f} s; about {duration(left)} left",
            flush=True,
        )

    def _fail(self, run: Planned, reason: str) -> None:
        self.failures[run.name] = reason
        self.table.add({**_naming(run), "failure": reason, "command": run.command})
        print(f"{run.name} FAILED: {reason}", flush=True)


def default_processes() -> int:
    """One on a GPU, else one for each core that this process may use."""
    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wanted(runs: Sequence[Planned], only: Sequence[str] | None) -> list[Planned]:
    """The runs of these cells or names, and all that they need, in their order."""
    if not only:
        return list(runs)
    by_name = {run.name: run for run in runs}
    for pattern in only:
        if not any(fnmatch(run.cell, pattern) or fnmatch(run.name, pattern) for run in runs):
            known = ", ".join(dict.fromkeys(run.cell for run in runs))
            raise RunError(f"--only {pattern}: no cell or run has that name; cells are {known}")
    todo = [run.name for run in runs if any(fnmatch(run.cell, p) or fnmatch(run.name, p) for p in only)]
    found = set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += by_name[name].needs
    return [run for run in runs if run.name in found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    args, words = parser.parse_args(argv[:split]), argv[split + 1 :]
    file = Path(args.file or ROOT / "benchmarks" / "studies" / f"{args.scale}.yaml")
    out = Path(args.out or (f"results/study_{file.stem}" if args.file else SCALES[args.scale]))
    try:
        more = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in args.set)}
        settings, runs = read_study(file, out, more, args.seeds, words)
        runs = checked(wanted(runs, args.only), settings)
        processes = args.processes or settings.get("processes") or default_processes()
        speed = float(settings.get("speed", 5)) * 1e9
        if args.list:
            table = Table(out / "study.csv")
            print(listing(runs, {run.name for run in runs if is_complete(run)}, settings, table, processes))
            return 0
        out.mkdir(parents=True, exist_ok=True)
        lock = RunLock(out)
    except RunError as error:
        parser.error(str(error).replace("--save_dir", "--out"))
    try:
        with StopSignals() as signals:
            study = Study(runs, Table(out / "study.csv"), processes, speed)
            study.make(signals)
    finally:
        lock.release()
    if signals.received:
        print("stopped; each unfinished run has a checkpoint, and the same command continues", file=sys.stderr)
        return 128 + signals.received
    for name, reason in study.failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(f"{len(study.done)} of {len(runs)} runs are in {out / 'study.csv'}")
    if args.report and not study.failures:
        print(f"comparison: {compare([run.folder for run in runs], out / 'report') / 'compare.html'}")
    return 1 if study.failures else 0


if __name__ == "__main__":
    sys.exit(main())
