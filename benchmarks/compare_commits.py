"""Do two commits compute the same bits?

    python benchmarks/compare_commits.py OLD NEW [--jobs 1] [--only NAME ...] [--kill]

Each commit is checked out into a temporary worktree ("." for NEW is the tree as it is) and runs short commands of every
kind on digits, on the CPU with one thread. Their results must be equal: the tensors of model/model.safetensors bit
by bit, states.csv except its seconds, and the kept units (units.csv, model/config.json); columns that only NEW has are
allowed. With --kill each command of OLD is started again, killed in its state 1 and resumed by NEW: the result must
equal that of OLD's uninterrupted run. When anything differs, the exit status is 1 and the folders of all runs are kept.
"""

import argparse
import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
BASE = (
    "--dataset digits --img_size 8 --train_limit 160 --batch_size 16 --epochs 2 --pruning_times 3 --reg_finish 0.75 "
    "--checkpoint_every 4 --device cpu --amp off --wandb_mode disabled"
)
BOTH = "--vit_structured --vit_prune_target both --rate 0.34"
BUDGET, ADAMW = (
    "--struct refill --vit_structured --vit_prune_target both",
    "--opt adamw --lr 0.001 --prune_type finetune",
)
RECIPE = (
    "--sched cosine --min_lr 1e-5 --aug rand --mixup 0.2 --cutmix 1 --label_smoothing 0.1 --drop_path 0.1 "
    "--ema_decay 0.9 --clip_grad 1 --accum_steps 2 --layer_decay 0.8"
)
COMMANDS = {
    "rsst": "--struct rsst",
    "imp": "--struct imp",
    "refill": "--struct refill --fillback_rate 0.1",
    "rsst_units": f"--struct rsst {BOTH}",
    "rsst_units_masked": f"--struct rsst {BOTH} --no-compact_training",
    "refill_units": f"--struct refill {BOTH}",
    "rsst_filters": "--struct rsst --arch res20s",
    "gradient": "--reg_form gradient --reg_finish 1 --block_loss_grad --lr 0.02 --reg_granularity_prune 20",
    "oneshot": f"--struct oneshot {BOTH} --criteria random",
    "pattern": "--struct imp --nm 2:4",
    "macs": f"{BUDGET} --target_macs 0.6 --ratio_allocation global --criteria magnitude --round_to 4 --min_units 0",
    "sensitivity": f"{BUDGET} --target_macs 0.6 --ratio_allocation sensitivity --criteria saliency {ADAMW}",
    "branches": f"--struct refill --vit_structured --vit_prune_target branch --rate 0.3 {ADAMW}",
    "depth": f"--vit_structured --vit_prune_target all --target_params 0.6 {ADAMW} --prune_type rewind_lt",
    "recipe": f"{BUDGET} --target_macs 0.7 {ADAMW} {RECIPE} --finish_epochs 1 --finish_on_all",
    "teacher": f"--struct refill {BOTH} --sorting_mode global --teacher self --kd_features 1 --finish_epochs 1",
    "tokens": f"--stem conv --layer_scale 0.1 --token_merge 2 --img_size 16 {BOTH} --criteria l2",
    "timm": f"--arch timm/test_vit --img_size 32 {BOTH} --sorting_mode global --rank_by score_per_mac",
}


@contextlib.contextmanager
def checked_out(commit: str):
    """The folder of a commit's files, for a while; "." is the tree that this file lies in."""
    if commit == ".":
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="commit_") as folder:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def start(tree: Path, folder: Path, resume: bool = False) -> subprocess.Popen:
    """The command that the folder is named after, by the code of `tree`; its output in a file next to the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    flags = "--resume" if resume else f"{BASE} {COMMANDS[folder.name]}"
    command = [sys.executable, tree / "main_imp_fillback.py", *flags.split(), "--save_dir", folder.name]
    with open(folder.with_suffix(".log"), "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=folder.parent, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait():
        raise RuntimeError(f"{folder} ended with status {process.returncode}, see {folder}.log")


def kill_in_state_1(process: subprocess.Popen, folder: Path) -> None:
    """End it the hard way once an epoch of state 1 and a checkpoint after it are on the disk."""
    epoch_ended = None
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # a file is replaced just now, or not there yet
            written = (folder / "checkpoint.pt").stat().st_mtime_ns
            if epoch_ended is None and '"state": 1' in (folder / "metrics.jsonl").read_text():
                epoch_ended = written
            if epoch_ended not in (None, written):
                process.kill()
        time.sleep(0.01)
    if process.returncode != -9:
        raise RuntimeError(f"{folder} ended with status {process.returncode} before it could be killed")


def columns_of(table: Path) -> dict[str, tuple[str, ...]]:
    return {name: tuple(values) for name, *values in zip(*csv.reader(table.read_text().splitlines()), strict=True)}


def differences(old: Path, new: Path) -> tuple[list[str], list[str]]:
    """What differs between two finished runs, and the columns that only the newer one has."""
    tensors, others = (
        {name: (a.dtype, a.shape, a.tobytes()) for name, a in load_file(folder / "model" / "model.safetensors").items()}
        for folder in (old, new)
    )
    found = [f"tensor {name}" for name in sorted({*tensors, *others}) if tensors.get(name) != others.get(name)]
    added = []
    for file in ("states.csv", "units.csv"):
        columns, others = (columns_of(folder / file) for folder in (old, new))
        found += [f"{file} {name}" for name in columns if name != "seconds" and columns[name] != others.get(name)]
        added += [f"{file} new column {name}" for name in others if name not in columns]
    config, other = (json.loads((folder / "model" / "config.json").read_text()) for folder in (old, new))
    found += [f"config.json {key}" for key in config if key.startswith("kept_") and config[key] != other.get(key)]
    return found, added


def compare(name: str, old: Path, new: Path, out: Path, kill: bool) -> dict[str, tuple[list[str], list[str]]]:
    """{title: (differences, added columns)} of the comparisons of one command."""
    whole, again, killed, resumed = (out / part / name for part in ("old", "new", "killed", "resumed"))
    results = {}
    try:
        finish(start(old, whole), whole)
        finish(start(new, again), again)
        results[name] = differences(whole, again)
        if kill:
            kill_in_state_1(start(old, killed), killed)
            shutil.copytree(killed, resumed)
            finish(start(new, resumed, resume=True), resumed)
            results[f"{name}, killed"] = differences(whole, resumed)
    except (RuntimeError, OSError, LookupError) as error:
        results[f"{name}, failed"] = ([str(error)], [])
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", help='another one, or "." for the files as they are')
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="NAME")
    parser.add_argument("--kill", action="store_true", help="NEW also finishes runs of OLD that were killed")
    args = parser.parse_args(argv)
    out, failed = Path(tempfile.mkdtemp(prefix="compare_commits_")), False
    print(f"the runs are in {out}", flush=True)
    with checked_out(args.old) as old, checked_out(args.new) as new, ThreadPoolExecutor(args.jobs) as pool:
        for results in pool.map(lambda name: compare(name, old, new, out, args.kill), args.only):
            for title, (found, added) in results.items():
                print("\n    ".join([f"{title:<28}{'differs' if found else 'equal'}", *found, *added]), flush=True)
                failed |= bool(found)
    if not failed:
        shutil.rmtree(out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
