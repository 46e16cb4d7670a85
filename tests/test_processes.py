"""Laws of a run in several processes: it is the run of one process, and ends as one.

Most groups of processes here are forked off a server that has imported the command, with the environment that torchrun
gives and the store that its agent holds; torchrun itself starts one.
"""

import functools
import multiprocessing
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
from micro import BOTH, TIMES, load, log_of, metrics, rows_of, wrap
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
    "--epochs 2 --pruning_times 3 --lr 0.05 --rate 0.4 --reg_finish 0.5 --print_freq 2 --workers 1 --warmup 0 "
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
    multiprocessing.set_start_method("fork", force=True)  # of worker processes, as in a process that is started anew
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


def finished(group, patience=400):
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
    "features": (*REFILL, *words("--aug none --teacher self --kd_features 2 --kd_hard")),
    "shown to a teacher": (*RSST, *words("--teacher self --batch_size 6 --accum_steps 2 --kd_features 1")),
    "finish": (*RSST, *words("--finish_epochs 2 --finish_on_all --ema_decay 0.9")),
    "emptied": ("--struct", "refill", *BOTH, *words("--min_units 0 --sorting_mode global --rate 0.95")),
    "repaired": ("--struct", "refill", *BOTH, *words("--prune_type finetune --repair_images 41")),
    "cut and repaired": (*RSST, *words("--prune_type finetune --ema_decay 0.9")),
    "cnn": words("--struct rsst --arch res20s --img_size 8 --pruning_times 2"),
    **METHODS,
}


# an image whose two largest logits are next to equal may be right in one run and wrong in the other
ACCURACIES = words(
    "train_accuracy val_accuracy accuracy_before_cut accuracy_after_cut accuracy_trained best_epoch best_accuracy "
    "test_accuracy accuracy_at_start accuracy_after_repair"
)


def assert_one_run(folder, one, size, tolerance):
    """`folder` was left by several processes, `one` by a single one with the same flags."""
    run = folder / "run"
    losses, expected = ([row["train_loss"] for row in metrics(where)] for where in (run, one / "run"))
    assert len(losses) == len(expected) >= EPOCHS * STATES
    assert losses == pytest.approx(expected, rel=tolerance, abs=0)
    for state in range(STATES):
        first, *others = (load(folder / f"{rank}.{state}") for rank in range(size))
        for other in others:
            assert plain(other) == plain(first)
        reference = load(one / f"0.{state}")
        assert first["kept"] == reference["kept"]
        assert plain(first["masks"]) == plain(reference["masks"])
    assert rows_of(run / "units.csv") == rows_of(one / "run" / "units.csv")
    drop = (*TIMES, "train_loss", "residual", *(ACCURACIES if tolerance > 1e-9 else ()))
    rows, expected = ([*metrics(where, drop), *rows_of(where / "states.csv")] for where in (run, one / "run"))
    for row, like in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k not in drop} == {k: v for k, v in like.items() if k not in drop}
    log = log_of(run)
    assert log.count("state 2 done") == log.count("state 0 epoch 1/2  ") == 1
    assert sorted(os.listdir(run)) == sorted(os.listdir(one / "run"))


@pytest.mark.parametrize(("name", "size"), [
    ("recipe", 2), slow("recipe", 3), slow("few images", 2), ("few images", 3), slow("table", 2), slow("features", 3),
    slow("shown to a teacher", 2), slow("finish", 2), slow("emptied", 2),
    slow("repaired", 2), slow("cut and repaired", 3),
    *(slow(name, size) for name in METHODS for size in (2, 3)),
])  # fmt: skip
def test_several_processes_train_what_one_does(name, size, run_of):
    one, several = (run_of(processes, CASES[name], (double,)) for processes in (1, size))
    assert_one_run(several, one, size, 1e-12)


@pytest.mark.parametrize(("name", "size"), [("refill", 2), *(slow(name, 3) for name in METHODS)])
def test_several_processes_share_folders(name, size, run_of, pictures):
    one, several = (run_of(processes, (*METHODS[name], *pictures)) for processes in (1, size))
    assert_one_run(several, one, size, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "tolerance"), [("--compile default", 1e-4), ("--amp bf16", 0.02)])
def test_compiled_and_half_precise_networks_train_alike(flags, tolerance, launch, run_of, tmp_path):
    given = (*RSST, *words("--accum_steps 2 --batch_size 6 --pruning_times 2"))
    one, several = run_of(1, given) / "run", tmp_path / "run"
    done = launch(2, [*BASE, *given, *words(flags), "--save_dir", several])  # PyTorch says this and that of compiling
    assert done.codes == [0, 0], done.err
    losses, expected = ([row["train_loss"] for row in metrics(folder)] for folder in (several, one))
    assert losses == pytest.approx(expected, rel=tolerance)


def test_batch_norm_keeps_the_same_statistics_everywhere(run_of):
    folder = run_of(2, CASES["cnn"])
    for state in range(2):
        first, second = (load(folder / f"{rank}.{state}") for rank in range(2))
        assert any(name.endswith("running_var") for name in first["weights"])
        assert plain(first) == plain(second)
    assert "running statistics are averaged" in log_of(folder / "run")


def together(parts):
    """Images and labels that several processes showed."""
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("limit", [40, 7])
@pytest.mark.parametrize("aug", ["none", "basic", "strong", "rand"])
def test_shares_of_a_batch_are_the_batch(aug, limit, size):
    splits = load_dataset("digits", "", 16, 0.1, limit)
    made = functools.partial(make_batches, splits.train, splits.facts, 12, "cpu", 3, aug)
    whole, shares = made(), [made(share=Share(rank, size)) for rank in range(size)]
    assert {share.steps_per_epoch for share in shares} == {whole.steps_per_epoch}
    for step in range(whole.steps_per_epoch):
        shown, expected = together([share.batch(1, 2, step) for share in shares]), whole.batch(1, 2, step)
        assert all(torch.equal(a, b) for a, b in zip(shown, expected, strict=True))
        chosen = torch.cat([share.chosen(1, 2, step) for share in shares])
        assert torch.equal(chosen, whole.chosen(1, 2, step))
    for limit in (None, 1, 2):
        shown = together([part for share in shares for part in share.sequential(limit, whole=False)])
        assert all(torch.equal(a, b) for a, b in zip(shown, together(whole.sequential(limit)), strict=True))
        assert torch.equal(together(shares[1].sequential(limit))[1], together(whole.sequential(limit))[1])
        largest = max(len(labels) for share in shares for _, labels in share.sequential(limit, whole=False))
        assert largest <= 12 // size


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_shares_of_a_mixed_batch_bring_their_partners(mixup, cutmix, size):
    splits = load_dataset("digits", "", 16, 0.1, 7)
    shown = []
    for rank in range(size):
        data = make_batches(splits.train, splits.facts, 12, "cpu", 3, share=Share(rank, size, paired=True))
        shown.append(Mixing(mixup, cutmix, 0.1, 10, seed=5, paired=True)(*data.batch(0, 0, 0), 1, 2, 3))
    whole = make_batches(splits.train, splits.facts, 12, "cpu", 3).batch(0, 0, 0)
    expected = Mixing(mixup, cutmix, 0.1, 10, seed=5)(*whole, 1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(together(shown), expected, strict=True))


def test_shares_of_a_batch_drop_the_branches_of_the_batch():
    def factors(rank, size, images):
        model = VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=3, num_classes=5)
        depth = StochasticDepth(model, 0.5, 7, Share(rank, size))
        depth.draw(torch.zeros(images, 1), 1, 2, 3, count=7)
        return depth.factors

    assert torch.equal(torch.cat([factors(0, 2, 3), factors(1, 2, 4)], 1), factors(0, 1, 7))


# ------------------------------------------------------------------------------------------------------- how they end


def assert_one_line(done, codes, *named):
    assert done.codes == codes
    (line,) = words_of(done)
    assert all(part in line for part in named), line


@pytest.mark.parametrize(("flags", "code", "named"), [
    ("--batch_size 13", 2, ("--batch_size 13", "2 processes", "a multiple of 2")),
    slow("--train_limit 1 --dataset digits", 2, ("1 training images", "2 processes; start fewer")),
    slow("--compile reduce-overhead", 2, ("--compile reduce-overhead", "--compile default")),
    slow("--rate 2", 2, ("--rate 2",)),
    slow("--lr 1e30", 1, ("not finite at step",)),
])  # fmt: skip
def test_what_cannot_be_is_one_line_for_all_processes(flags, code, named, launch, tmp_path):
    assert_one_line(launch(2, [*BASE, *words(flags), "--save_dir", tmp_path / "run"]), [code, code], *named)
    if code == 2:
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_that_one_process_cannot_find_is_one_line(launch, tmp_path):
    """The first process of a machine looks for it; what the others say depends on how far they came."""
    done = launch(2, [*BASE, "--dataset", "folder", "--data", "nowhere", "--save_dir", tmp_path / "run"])
    (line,) = words_of(done)
    assert (done.codes[0], line.count("'nowhere'")) == (2, 1)
    assert done.codes[1] in (1, 2)


def test_a_folder_that_holds_a_run_stays_as_it_is(launch, run_of):
    folder = run_of(2, RSST) / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = launch(2, [*BASE, *RSST, "--save_dir", folder])
    (line,) = words_of(done)
    assert done.codes[0] == 2
    assert done.codes[1] in (1, 2)
    assert "holds another run" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_plan_is_printed_once(launch):
    done = launch(2, [*BASE, *RSST, "--dry_run"])
    assert (done.codes, done.err) == ([0, 0], ["", ""])
    assert "3 states x 2 epochs x 3 steps of 12 images" in done.out[0]
    assert not done.out[1]


def ended_alike(launch, folder, size, expected):
    all_well(launch(size, ["--resume", "--save_dir", folder]))
    assert ending(folder) == expected


def test_a_process_that_dies_ends_the_run_which_goes_on(launch, run_of, tmp_path):
    folder, expected = tmp_path / "run", ending(run_of(2, RSST) / "run")
    argv = [*BASE, *RSST, "--save_dir", folder]
    done = launch(2, argv, patches_of={1: [(at, "step", 1, 5, kill)]})
    assert_one_line(done, [1, -signal.SIGKILL], "rank 1 ended", f"--resume --save_dir {folder}")
    for size in (1, 3):
        other = tmp_path / f"other{size}"
        shutil.copytree(folder, other)
        all_well(launch(size, ["--resume", "--save_dir", other]))
        losses, reference = ([row["train_loss"] for row in metrics(path)] for path in (other, run_of(2, RSST) / "run"))
        assert losses == pytest.approx(reference, rel=1e-3)
        assert rows_of(other / "units.csv") == rows_of(run_of(2, RSST) / "run" / "units.csv")
    ended_alike(launch, folder, 2, expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_killed_at_random_lose_nothing(size, start, launch, run_of, tmp_path):
    """Ten kills of any process at moments of its training, over as many runs as it takes; all end as unbroken ones."""
    chosen, kills, runs = random.Random(size), 0, 0
    flags = (*RSST, "--checkpoint_every", "1")
    expected = ending(run_of(size, flags) / "run")
    while kills < 10:
        folder, runs = tmp_path / str(runs), runs + 1
        argv, killed = [*BASE, *flags, "--save_dir", folder], True
        while killed and kills < 10:
            victim, group = chosen.randrange(size), start(size, argv, (slower,))
            wait_for_steps(group)
            time.sleep(chosen.uniform(0, 1.5))
            group.processes[victim].kill()
            done = finished(group)
            killed = done.codes[victim] == -signal.SIGKILL
            if killed:
                assert all(code == 1 for rank, code in enumerate(done.codes) if rank != victim)
                assert len(words_of(done)) == 1
                kills += 1
            saved = (folder / "checkpoint.pt").exists() or (folder / "checkpoint.prev.pt").exists()
            argv = ["--resume", "--save_dir", folder] if saved else [*BASE, *flags, "--save_dir", folder, "--overwrite"]
        if killed:
            all_well(launch(size, argv))
        assert ending(folder) == expected


def slower():
    wrap(HERE, "step", before=lambda _: time.sleep(0.1))


def wait_for_steps(group):
    """Until the first process has said what it is going to train on."""
    out, deadline = group.output / "0" / "out", time.monotonic() + 60
    while not (out.exists() and "processes: each shows" in out.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)


SIGNALS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}


@pytest.mark.parametrize(("first", "second"), [
    ((), ("step", 1, 3, send, "SIGTERM")),
    slow(("step", 1, 3, send, "SIGINT"), ("step", 1, 4, send, "SIGINT", "SIGINT")),
    slow(("step", 1, 1, send, "SIGUSR1"), ()),
    slow(("step", 0, 2, send, "SIGTERM", "SIGTERM"), ("end_epoch", 0, 1, send, "SIGTERM")),
])  # fmt: skip
def test_a_signal_to_any_process_is_one_checkpoint_and_one_code(first, second, launch, run_of, tmp_path):
    folder = tmp_path / "run"
    patches = {rank: [(at, *patch)] for rank, patch in enumerate((first, second)) if patch}
    done = launch(2, [*BASE, *RSST, "--save_dir", folder], patches_of=patches)
    name = (first or second)[4]
    assert_one_line(done, [SIGNALS[name]] * 2, f"stopped by {name} with a checkpoint", f"--save_dir {folder}")
    stopped = load(folder / "checkpoint.pt")["run"]
    assert (stopped["state"], stopped["step"]) not in ((0, 0), (2, 6))
    ended_alike(launch, folder, 2, ending(run_of(2, RSST) / "run"))


@pytest.mark.slow
def test_all_wait_for_the_first_to_have_written(start, tmp_path):
    """torchrun ends the others when one process has left."""
    patches = {0: [(close_slowly, tmp_path / "closed")], 1: [(at, "step", 1, 3, send, "SIGTERM")]}
    group = start(2, [*BASE, *RSST, "--save_dir", tmp_path / "run"], patches_of=patches)
    group.processes[1].join(120)
    assert (tmp_path / "closed").exists()
    assert finished(group).codes == [143, 143]


def close_slowly(note):
    def close(_):
        time.sleep(1)
        note.touch()

    wrap(HERE, "close", after=close)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_ends_all(launch, tmp_path):
    done = launch(2, [*BASE, *RSST, "--save_dir", tmp_path / "run"], patches_of={1: [(spoil,)]})
    assert_one_line(done, [1, 1], "the loss is not finite at step 2 of state 0")


def spoil():
    """From step 2 on the images that this process shows are no numbers."""

    def spoiled(run, *_):
        data = run.train_data
        batch = data.batch

        def broken(state, epoch, step):
            images, labels = batch(state, epoch, step)
            return (images * float("nan") if step == 2 else images), labels

        data.batch = broken

    wrap(HERE, "start", after=spoiled)


PROGRAM = """
import torch
from engine.processes import joined

with joined() as processes:
    processes.pick_device("cpu", 0)
    given = [processes.vote(processes.rank, 5), processes.vote(0, 0)]
    found = [processes.rank + 1.0, processes.sum_(torch.tensor(processes.rank + 1.0)).item()]
    found += [processes.from_first(processes.name), processes.gathered(processes.rank), given]
    found += [processes.joined_shares(torch.arange(3)[processes.share.of(3)], 3).tolist()]
    spoke = processes.gathered(processes.speaks())
    processes.part()
    print(found, sorted(spoke))
"""


def torchrun(tmp_path, program, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_brings_processes_together(tmp_path):
    """By hand: ranks 0 and 1; a vote's result comes with the next; the second one's lines go nowhere."""
    (tmp_path / "program.py").write_text(PROGRAM)
    found = "[1.0, 3.0, '', [0, 1], [(0, 0), (1, 5)], [0, 1, 2]] [False, True]\n"
    assert torchrun(tmp_path, tmp_path / "program.py") == found


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path):
    """The command as users give it: one table on standard output, one log, one checkpoint."""
    flags = words(
        "--dataset digits --arch vit_tiny --img_size 8 --device cpu --amp off --train_limit 24 --batch_size 12 "
        "--epochs 1 --pruning_times 1 --wandb_mode disabled --no-export"
    )
    out = torchrun(tmp_path, SCRIPT, *flags, "--save_dir", tmp_path / "run")
    assert out.count("state 0 epoch 1/1  ") == out.count("before cut") == 1
    assert "2 processes: each shows 6 of the 12 images" in log_of(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 1
