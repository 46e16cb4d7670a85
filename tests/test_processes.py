"""Laws of a run in several processes: it is the run of one process, and ends as one.

Most groups of processes here are forked off a server that has imported the command, with the environment that torchrun
gives and the store that its agent holds; torchrun itself starts one.
"""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import test_reliable
import torch
import torch.distributed as dist
from micro import BOTH, load, log_of, metrics, rows_of, wrap
from PIL import Image
from test_reliable import HERE, SCRIPT, at, kill, plain, send, words

from dataset import load_dataset, make_batches
from engine.depth import StochasticDepth
from engine.mixing import Mixing
from images.orders import Share
from models.vit import VisionTransformer

server = test_reliable.server
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

EPOCHS, STATES = 2, 3  # of 3 steps an epoch; RSST cuts after the third
BASE = words(
    "--dataset digits --arch vit_micro --img_size 16 --device cpu --amp off --train_limit 40 --batch_size 12 "
    "--epochs 2 --pruning_times 3 --lr 0.05 --rate 0.4 --reg_finish 0.5 --print_freq 2 --workers 2 --warmup 0 "
    "--score_batches 2 --wandb_mode disabled --no-export"
)
RSST = ("--struct", "rsst", *BOTH)
REFILL = words("--struct refill --fillback_rate 0.2")


# ------------------------------------------------------------------------------------------------------- the processes


def double():
    torch.set_default_dtype(torch.float64)


def remember(folder):
    """What this process ends each state with, as folder/RANK.STATE."""

    def note(run):
        progress = run.progress
        state = {"masks": progress.masks, "kept": progress.kept, "weights": run.dense.state_dict()}
        torch.save(state, folder / f"{os.environ.get('RANK', 0)}.{progress.state}")

    wrap(HERE, "end_state", before=note)


def _one_of_them(argv, output, patches, environment):
    os.environ.update(environment)
    test_reliable._process(argv, output, patches)


@pytest.fixture(scope="module")
def start(server, tmp_path_factory):
    """start(2, argv, patch, ..., patches_of={1: [patch]}) -> the processes, which are running."""

    def start(size, argv, *patches, patches_of=None):
        output = tmp_path_factory.mktemp("processes")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        running = []
        for rank in range(size):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": store.port}
            environment = {name: str(value) for name, value in numbers.items()} if size > 1 else {}
            environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            folder = output / str(rank)
            folder.mkdir()
            everything = [(test_reliable.without_report,), *patches, *(patches_of or {}).get(rank, ())]
            given = ([str(part) for part in argv], folder, everything, environment)
            running.append(server.Process(target=_one_of_them, args=given))
            running[-1].start()
        return SimpleNamespace(processes=running, output=output, store=store)

    return start


@pytest.fixture(scope="module")
def launch(start):
    """launch(2, argv, ...) -> codes, out and err of the processes in the order of their ranks."""
    return lambda *arguments, **options: finished(start(*arguments, **options))


def finished(group, patience=120):
    deadline = time.monotonic() + patience
    for process in group.processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(group.processes) if process.is_alive()]
    for process in group.processes:
        process.kill()
        process.join()
    ranks = range(len(group.processes))
    out, err = ([(group.output / str(rank) / name).read_text() for rank in ranks] for name in ("out", "err"))
    assert not hanging, f"{hanging} hang: {err}"
    return SimpleNamespace(codes=[process.exitcode for process in group.processes], out=out, err=err)


def all_well(done):
    assert (set(done.codes), set(done.err)) == ({0}, {""})
    assert not any(done.out[1:])


@pytest.fixture(scope="module")
def run_of(launch, tmp_path_factory):
    """run_of(size, flags, patch, ...) -> the folder that such a run left, made once."""
    made = {}

    def look(size, flags, *patches):
        key = (size, *map(str, flags), *patches)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            argv = [*BASE, *flags, "--save_dir", made[key] / "run"]
            all_well(launch(size, argv, (remember, made[key]), *patches))
        return made[key]

    return look


def ending(folder):
    """All that a finished run leaves but times and names."""
    checkpoint = load(folder / "checkpoint.pt")
    del checkpoint["args"], checkpoint["run"]["wandb_id"], checkpoint["random"]
    files = {path.name: rows_of(path) for path in folder.glob("*.csv")}
    return plain({**checkpoint, "metrics": metrics(folder), "best": load(folder / "best.pt"), **files})


def words_of(done):
    """The lines on standard error of all processes, without what each says about a signal that came."""
    return [
        line for err in done.err for line in err.splitlines() if not line.endswith("all processes stop after a step")
    ]


# ----------------------------------------------------------------------------------------------- the run of one process


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Three classes of 24 images each."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for label in range(3):
        folder = root / "train" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(24):
            pixels = generator.integers(0, 255, (20, 20, 3)) // 2 + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return ("--dataset", "folder", "--data", str(root), "--val_fraction", "0.2")


RECIPE = words("--mixup 0.8 --cutmix 1 --drop_path 0.3 --label_smoothing 0.1 --ema_decay 0.9 --clip_grad 1")
METHODS = {
    "rsst units": RSST,
    "rsst": words("--struct rsst --fillback_rate 0.2"),
    "refill units": ("--struct", "refill", *BOTH),
    "refill": REFILL,
}
CASES = {
    "recipe": (*RSST, *RECIPE, *words("--aug strong --accum_steps 3 --batch_size 6")),
    "few images": (*RSST, *RECIPE, *words("--train_limit 7 --accum_steps 2 --criteria saliency")),
    "table": (*REFILL, *words("--aug none --teacher self --opt adamw --lr 0.003")),
    "shown to a teacher": (*RSST, *words("--teacher self --batch_size 6 --accum_steps 2")),
    "emptied": ("--struct", "refill", *BOTH, *words("--min_units 0 --sorting_mode global --rate 0.95")),
    "cnn": words("--struct rsst --arch res20s --img_size 8"),
    **METHODS,
}


def assert_one_run(folder, one, size, tolerance):
    """`folder` was left by several processes, `one` by a single one with the same flags."""
    run = folder / "run"
    losses, expected = ([row["train_loss"] for row in metrics(where)] for where in (run, one / "run"))
    assert len(losses) == EPOCHS * STATES
    assert losses == pytest.approx(expected, rel=tolerance, abs=0)
    for state in range(STATES):
        first, *others = (load(folder / f"{rank}.{state}") for rank in range(size))
        for other in others:
            assert plain(other) == plain(first)
        reference = load(one / f"0.{state}")
        assert first["kept"] == reference["kept"]
        assert plain(first["masks"]) == plain(reference["masks"])
    for name in ("states.csv", "units.csv"):
        assert plain(rows_of(run / name)) == plain(rows_of(one / "run" / name))
    accuracies, expected = ([row["val_accuracy"] for row in metrics(where)] for where in (run, one / "run"))
    assert accuracies == expected
    log = log_of(run)
    assert log.count("state 2 done") == log.count("state 0 epoch 1/2  ") == 1
    assert sorted(os.listdir(run)) == sorted(os.listdir(one / "run"))


@pytest.mark.parametrize(("name", "size"), [
    ("recipe", 2), slow("recipe", 3), slow("few images", 2), ("few images", 3), slow("table", 2),
    slow("shown to a teacher", 2), slow("emptied", 2), *(slow(name, size) for name in METHODS for size in (2, 3)),
])  # fmt: skip
def test_several_processes_train_what_one_does(name, size, run_of):
    one, several = (run_of(processes, CASES[name], (double,)) for processes in (1, size))
    assert_one_run(several, one, size, 1e-12)


@pytest.mark.parametrize(("name", "size"), [("refill", 2), *(slow(name, 3) for name in METHODS)])
def test_several_processes_share_folders(name, size, run_of, pictures):
    one, several = (run_of(processes, (*METHODS[name], *pictures)) for processes in (1, size))
    assert_one_run(several, one, size, 1e-5)


def test_batch_norm_keeps_the_same_statistics_everywhere(run_of):
    folder = run_of(2, CASES["cnn"])
    for state in range(STATES):
        first, second = (load(folder / f"{rank}.{state}") for rank in range(2))
        assert any(name.endswith("running_var") for name in first["weights"])
        assert plain(first) == plain(second)
    assert "running statistics are averaged" in log_of(folder / "run")
