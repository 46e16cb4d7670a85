"""Laws of a run: what it leaves, where its states start, what never moves, and that it can be broken off anywhere.

Runs are real ones through `main([...])`: scikit-learn's digits and a Vision Transformer of two small blocks. Most are
made once (RUNS) and looked at by many tests.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import micro
import numpy as np
import pytest
import torch
import yaml
from micro import BOTH, DEPTH, LAYERS, MICRO, PRUNABLE, RUNS, SHARES, STEPS, TIMES, call, flags_of, log_of, vit_micro

# isort: split
from micro import assert_same_tensors, largest_difference, load, metrics, record, rows_of, surviving

import deployment.folder
import main_imp_fillback as entry
from engine.folder import environment, make_save_dir
from engine.run import Run
from utils import RunError

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "main_imp_fillback.py"

words = str.split


@pytest.fixture(autouse=True)
def _in_house(house, monkeypatch):
    monkeypatch.setattr(entry.report, "write", lambda _: None)  # pictures take longer than these runs


@pytest.fixture
def run(tmp_path, capsys):
    return micro.runner(tmp_path, capsys, MICRO)


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------ command line

OLDER_COMMAND = words(
    "--dataset cifar100 --arch vit_tiny --struct rsst --criteria l1 --epochs 120 --batch_size 128 --lr 0.001 "
    "--pruning_times 15 --rate 0.15 --RST_schedule exp_custom_exponents --reg_granularity_prune 0.5 --exponents 3 "
    "--save_dir results/vit_tiny_rsst --dry_run"
)


def plan_rows(out):
    return [line.split() for line in out.splitlines() if re.match(r" *\d+ +\d+\.\d+%", line)]


def test_the_older_command_line_prints_its_plan_and_does_nothing(capsys):
    assert call(OLDER_COMMAND) == 0  # without data: there is none here
    out, err = capsys.readouterr()
    assert err == ""
    assert os.listdir() == []
    # 50,000 images less a tenth; 45,000 // 128 steps
    assert "15 states x 120 epochs x 351 steps" in out
    assert "2,714,980 parameters, 2,654,208 of them prunable" in out
    assert [int(line[0]) for line in plan_rows(out)] == list(range(15))
    for state, line in enumerate(plan_rows(out)):
        left = round(2_654_208 * 0.85**state)
        assert line[1:4] == [f"{100 * left / 2_654_208:.2f}%", "27", "3,456"]
        assert line[4] == f"{2_714_980 - 2_654_208 + left:,}"
        assert float(line[5]) == pytest.approx(0.1877, abs=1e-3)
    # two checkpoints of weights and momentum with three mask sets each, initial and best weights
    assert f"About {(4 * 2_714_980 * 6 + 2 * 3 * 2_654_208 / 8) / 1e6:,.0f} MB of disk" in out


def test_a_plan_says_where_it_reads_and_writes_how_long_it_is_and_what_has_no_effect(capsys, tmp_path):
    flags = words("--dataset cifar10 --train_limit 250 --epochs 2 --warmup 2 --finish_epochs 3 --dry_run")
    (tmp_path / "args.yaml").touch()
    assert call([*flags, "--pruning_times", 1, "--data", tmp_path / "none", "--save_dir", tmp_path]) == 0
    out = capsys.readouterr().out
    assert "1 state x 2 epochs x 1 step of 128 images (250 train, " in out
    for line in (
        f"Files in {tmp_path}, which holds a run: add --resume or --overwrite.",
        f"Data in {tmp_path / 'none'}, which is not there yet.",
        "5 epochs in all",
        "note: --warmup 2: all epochs of a state; lr rises to its last step and never falls",
        "note: nothing is pruned in this run: it trains dense",
        "note: an epoch is one step of 128 of the 250 training images",
    ):
        assert line in out, line
    assert call([*flags, "--data", tmp_path, "--warmup", 1, "--batch_size", 125, "--exp_name", "mine"]) == 0
    out = capsys.readouterr().out
    assert "Files in results/mine.\n" in out
    assert f"Data in {tmp_path}.\n" in out
    assert "note: " not in out


@pytest.mark.parametrize("schedule", SHARES)
def test_the_plan_of_a_structured_run(schedule, capsys):
    flags = "--vit_structured --vit_prune_target both --rate 0.33 --mlp_prune_ratio 0.3 --pruning_times 4"
    assert call(["--dataset", "cifar10", *words(flags), "--ratio_schedule", schedule, "--dry_run"]) == 0
    table = plan_rows(capsys.readouterr().out)
    assert len(table) == 4
    for state, line in enumerate(table):
        heads = math.floor(3 * (1 - SHARES[schedule](0.33, state / 3)) + 1e-9)
        neurons = math.floor(384 * (1 - SHARES[schedule](0.3, state / 3)) + 1e-9)
        assert line[2:4] == [str(9 * heads), f"{9 * neurons:,}"]
        gone = 9 * (3 - heads) * (4 * 192 * 64 + 3 * 64) + 9 * (384 - neurons) * (2 * 192 + 1)
        assert line[4] == f"{2_697_610 - gone:,}"
        left = 9 * heads * 4 * 192 * 64 + 9 * neurons * 2 * 192
        assert line[1] == f"{100 * left / 2_654_208:.2f}%"
    assert table[-1][2:4] == ["18", "2,412"]
    assert os.listdir() == []


# flag, value, where it goes when that is not its own name
OLDER_FLAGS = """--data some/folder; --dataset cifar10; --arch vit_small; --vit_pretrained -> pretrained; --seed 0;
--save_dir out; --exp_name mine; --gpu 1; --init init.pt; --batch_size 64; --workers 8; --lr 0.1; --momentum 0.8;
--weight_decay 0.0005; --epochs 182; --warmup 5; --print_freq 50; --decreasing_lr 91,136; --pruning_times 16;
--rate 0.3; --prune_type rewind_lt; --conv1 -> prune_patch_embed; --fc; --rewind_epoch 3; --struct refill;
--fillback_rate 0.2; --block_loss_grad; --RST_schedule x^3; --reg_granularity_prune 0.5; --criteria saliency;
--exponents 3; --vit_structured; --vit_prune_target both; --mlp_prune_ratio 0.4; --sorting_mode global; --pretrained"""
OLDER_FLAGS = [flag.partition("->")[::2] for flag in OLDER_FLAGS.split(";")]


def test_each_older_flag_parses():
    for flag, place in OLDER_FLAGS:
        name, *value = words(flag)
        found = getattr(entry.parse_args(words(flag)), place.strip() or name.removeprefix("--"))
        assert found == (type(found)(*value) if value else True), flag
    together = [part for flag, _ in OLDER_FLAGS for part in words(flag)]
    args = entry.parse_args(together)
    assert (args.epochs, args.seed, args.pretrained, args.vit_structured) == (182, 0, True, True)


def test_defaults():
    args = entry.parse_args([])
    expected = """dataset cifar100, arch vit_tiny, data data, batch_size 128, lr 0.01, momentum 0.9, epochs 120,
        weight_decay 0.0001, pruning_times 20, rate 0.2, prune_type lt, struct rsst, fillback_rate 0.0, exponents 4.0,
        RST_schedule exp_custom_exponents, reg_granularity_prune 1.0, criteria l1, vit_prune_target head, seed 42,
        sorting_mode layer-wise, workers 4, print_freq 200, warmup 20, rewind_epoch 24, ratio_schedule geometric,
        reg_form decay, reg_finish 0.25, score_batches 10, min_units 1, round_to 1, val_fraction 0.1,
        compact_training True, rank_by score, opt sgd, sched multistep, device auto, amp auto, refill True,
        export True, accum_steps 1, vit_structured False, fc False, prune_patch_embed False, pretrained False,
        block_loss_grad False, resume False, dry_run False, decreasing_lr 60|90, clip_grad None, compile None"""
    for name, value in map(words, expected.split(",")):
        assert str(getattr(args, name)) == value.replace("|", ","), name
    assert entry.parse_args(["--reg_form", "gradient"]).reg_finish == 1.0
    assert entry.parse_args(["--struct", "imp", "--vit_structured"]).criteria == "magnitude"
    assert entry.parse_args(["--struct", "imp", "--vit_structured", "--criteria", "l2"]).criteria == "l2"


@pytest.mark.parametrize(
    ("epochs", "warmup", "milestones", "rewind"), [(60, 10, "30,45", 12), (7, 1, "3,5", 1), (2, 0, "1", 0)]
)
def test_what_is_left_to_itself_scales_with_the_epochs(epochs, warmup, milestones, rewind):
    args = entry.parse_args(["--epochs", str(epochs)])
    assert (args.warmup, args.decreasing_lr, args.rewind_epoch) == (warmup, milestones, rewind)
    by_hand = entry.parse_args(words("--epochs 60 --warmup 0 --decreasing_lr 5,70 --rewind_epoch 0"))
    assert (by_hand.warmup, by_hand.decreasing_lr, by_hand.rewind_epoch) == (0, "5,70", 0)


def test_help_shows_the_common_flags_and_how_to_see_the_rest(capsys):
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--help all" in text
    assert 20 <= len(re.findall(r"^  --", text, re.MULTILINE)) <= 25


def test_help_has_its_groups_and_every_flag(capsys):
    assert call(["--help", "all"]) == 0
    text = capsys.readouterr().out
    for group in ("run", "data", "model", "training", "pruning", "rsst", "tracking"):
        assert re.search(rf"^{group}\b.*:$", text, re.MULTILINE), group
    for flag in [*(words(flag)[0] for flag, _ in OLDER_FLAGS), "--resume", "--checkpoint"]:
        assert re.search(rf"(^|[\s,\[]){flag}\b", text), flag


def test_the_command_itself_refuses_in_one_line_with_its_exit_code(tmp_path):
    command = [sys.executable, str(REPOSITORY / "main_imp_fillback.py"), "--rate", "1"]
    here = tmp_path / "empty"
    here.mkdir()
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "--rate 1" in done.stderr
    assert list(here.iterdir()) == []


def test_these_tests_set_a_policy_for_threads_that_wait():
    assert os.environ["OMP_WAIT_POLICY"]  # by conftest.py where the user has not


def test_threads_that_wait_do_not_spin_unless_the_user_wants_it(tmp_path):
    """The variable is read when torch loads; here its place is taken by a file that tells what it finds and ends."""
    (tmp_path / "torch.py").write_text("import os, sys\nsys.exit(os.environ['OMP_WAIT_POLICY'])\n")
    for given, found in ((None, "passive"), ("active", "active")):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": given}
        environment = {name: value for name, value in environment.items() if value is not None}
        done = subprocess.run(
            [sys.executable, "-c", "import main_imp_fillback"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.stderr == f"{found}\n"


# ---------------------------------------------------------------------------------------------------- what a run leaves

FILES = {
    "args.yaml", "environment.json", "checkpoint.pt", "checkpoint.prev.pt", "best.pt", "init.pt", "metrics.jsonl",
    "metrics.csv", "states.csv", "units.csv", "run.log",
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_whole_files_with_each_epoch_once(name, done):
    seen = done(name)
    args, folder = seen.args, seen.dir
    states, epochs = args["pruning_times"], args["epochs"]
    if name == "dense":
        states, epochs = 1, epochs * states
    assert seen.err == ""
    assert seen.elsewhere == []  # nothing anywhere else
    present = set(os.listdir(folder))
    optional = {"rewind.pt": args["prune_type"] == "rewind_lt" and args["rewind_epoch"] > 0}
    optional["penalty.csv"] = args["struct"] == "rsst" and states > 1
    assert present - {"run.lock"} == FILES | {file for file, there in optional.items() if there}
    rows = metrics(folder)
    assert [(row["state"], row["epoch"]) for row in rows] == list(itertools.product(range(states), range(epochs)))
    for line, row in zip(rows_of(folder / "metrics.csv"), rows, strict=True):
        assert line.keys() == row.keys()
        assert {key: float(value) for key, value in line.items()} == pytest.approx(row, rel=1e-12)
    table = rows_of(folder / "states.csv")
    assert [row["state"] for row in table] == [str(state) for state in range(states)]
    for file in present:
        if file.endswith(".pt"):
            assert load(folder / file)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert "commit" in environment
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    assert "model name" not in cpuinfo or f": {environment['device_name']}\n" in cpuinfo
    precision = {"off": "float32", "bf16": "bf16"}[args["amp"]]
    assert (environment["device"], environment["precision"]) == ("cpu", precision)
    # the best of the last state, among epochs that end when nothing is doomed any more
    best, ends = load(folder / "best.pt"), [row for row in rows if row["state"] == states - 1]
    assert best["state"] == states - 1
    # or, where refill fine-tunes, of what the state started from, which stands for epoch 0 and has accuracy_after_cut
    starts = args["struct"] == "refill" and args["prune_type"] == "finetune"
    of_start = [float(row["accuracy_after_cut"]) if starts and row["state"] != "0" else None for row in table]
    if best["epoch"] == -1:
        assert best["accuracy"] == float(table[-1]["best_accuracy"])
        assert_same_tensors(best["weights"], seen.starts[states - 1].weights)
    else:
        assert best["accuracy"] == ends[best["epoch"]]["val_accuracy"] == float(table[-1]["best_accuracy"])
        assert_same_tensors(best["weights"], seen.epochs[states - 1, best["epoch"]].weights)
    for (state, epoch), ended in seen.epochs.items():
        allowed = [row for row in rows if row["state"] == state and row["epoch"] <= epoch]
        allowed = [row["val_accuracy"] for row in allowed if not seen.epochs[state, row["epoch"]].penalised]
        if (
            "--fillback_rate" not in RUNS[name] or not starts
        ):  # what is given back counts after the cut, not at the start
            allowed += [] if of_start[state] is None else [of_start[state]]
            assert ended.best.get("accuracy") == max(allowed, default=None)
        else:
            assert ended.best["accuracy"] >= max(allowed)
    for state, row in enumerate(table):
        assert float(row["accuracy_trained"]) == rows[(state + 1) * epochs - 1]["val_accuracy"]
    # the checkpoint goes on from the last weights, whatever was tested
    assert_same_tensors(load(folder / "checkpoint.pt")["weights"], seen.ends[states - 1])
    assert f"state {states - 1} done: density {100 * float(table[-1]['density']):.2f}%" in seen.log


def test_the_log_says_by_what_is_pruned_and_what_has_no_effect(done):
    criteria = {"rsst units": "l1", "rsst adamw": "l2", "rsst rewound": "saliency", "refill pretrained": "remain"}
    for name, criterion in {**criteria, "imp units": "magnitude"}.items():
        assert done(name).args["criteria"] == criterion
        assert f"state 2 prunes by {criterion}:" in done(name).log
    for name in ("dense", "one state"):
        assert "trains dense" in done(name).log
        assert [row["density"] for row in rows_of(done(name).dir / "states.csv")] == ["1.0"]
    assert len(re.findall(r"--decreasing_lr: epoch (80|120) lies beyond", done("imp").log)) == 2
    assert "--warmup 3" in entry.parse_args(words("--epochs 2 --warmup 3")).notes[-1]


def test_the_terminal_gets_a_line_per_kind_of_layer_and_the_log_one_per_mask(done):
    seen, verbose = done("rsst"), done("rsst pretrained")
    weights = seen.ends[2]
    per_mask = [rf"{name}\.weight_mask +\| Sparsity: " for name in LAYERS]
    for part in micro.PARTS:
        total = sum(weights[f"blocks.{block}.{part}.weight"].numel() for block in range(DEPTH))
        sparsity = 1 - surviving(weights, [f"blocks.{block}.{part}" for block in range(DEPTH)]) / total
        (line,) = (line for line in seen.out.splitlines() if line.startswith(f"blocks.*.{part} ({DEPTH})"))
        assert line.endswith(f"| Sparsity: {100 * sparsity:.2f}%")
    for pattern in per_mask:
        assert not re.search(pattern, seen.out)
        assert len(re.findall(pattern, seen.log)) == len(re.findall(pattern, verbose.out)) == 1
    overall = 1 - surviving(weights) / PRUNABLE
    assert seen.out.count(f"Overall sparsity: {100 * overall:.2f}%") == 1
    assert seen.out.count("[ViT Sparsity Report]") == 1
    assert "patch_embed.proj (1)" in verbose.out


# ------------------------------------------------------------------------------------------------ bits and seeds


def outcome(folder):
    """All that a run ends with but the times."""
    checkpoint, best = load(folder / "checkpoint.pt"), load(folder / "best.pt")
    tables = {name: rows_of(folder / name) for name in ("states.csv", "units.csv")}
    tables["penalty.csv"] = rows_of(folder / "penalty.csv") if (folder / "penalty.csv").exists() else []
    for row in tables["states.csv"]:
        del row["seconds"]
    masks = {name: torch.from_numpy(mask) for name, mask in micro.masks_of(checkpoint, "masks").items()}
    tensors = {"weights": checkpoint["weights"], "best": best.pop("weights"), "masks": masks}
    return tensors, best, checkpoint["run"]["kept"], metrics(folder, drop=TIMES), tables


def assert_same_outcome(one, other):
    (tensors, *rest), (expected, *others) = outcome(one), outcome(other)
    for name in expected:
        assert_same_tensors(tensors[name], expected[name])
    assert rest == others


def test_the_same_seed_gives_the_same_bits_and_another_does_not(seen, tmp_path):
    """0 is a seed of its own, and 42 the default."""
    flags = ("--struct", "rsst", *BOTH, "--criteria", "random", "--pruning_times", "2")
    first = seen(*flags, "--seed", "0")
    torch.rand(3)  # whatever came before the run has no say
    np.random.rand(3)
    assert_same_outcome(record(tmp_path / "again", [*MICRO, *flags, "--seed", "0"]).dir, first.dir)
    other, default = seen(*flags), seen(*flags, "--seed", "42")
    assert_same_outcome(other.dir, default.dir)
    assert largest_difference(other.starts[0].weights, first.starts[0].weights) > 1e-3
    assert other.ends[1].keys() == first.ends[1].keys()
    assert other.starts[1].target_kept != first.starts[1].target_kept
    batches = [run.run.train_data.batch(0, 0, 0)[1].tolist() for run in (first, default, other)]
    assert batches[0] != batches[1] == batches[2]


# ---------------------------------------------------------------------------------------------------- break and resume


@pytest.fixture
def broken(run, around):
    """Run until (state, epoch, batch) is about to train, as if Ctrl-C came there; exit code 130."""
    where = []

    def stop(training):
        if where and (training.progress.state, *divmod(training.progress.step, STEPS)) == where[0]:
            where.clear()
            raise KeyboardInterrupt

    around("step", before=stop)

    def start(point, *flags):
        where.append(point)
        done = run(*flags, name="broken", code=130)
        assert not where
        assert done.err.count("\n") == 1
        saved = (done.dir / "checkpoint.pt").exists()
        way_on = (
            f"the last checkpoint with --resume --save_dir {done.dir}" if saved else "no checkpoint yet: give the same"
        )
        assert way_on in done.err
        return done

    return start


# run, and state, epoch and batch that it does not come to: within an epoch, before a state's first step, before the cut
BREAKS = [
    ("rsst", 2, 2, 1), ("rsst units", 1, 1, 0), ("rsst adamw", 1, 3, 0), ("rsst rewound", 0, 1, 0),
    ("refill rewound", 1, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "state", "epoch", "batch"), BREAKS)
def test_a_broken_run_ends_with_the_bits_of_an_unbroken_one(name, state, epoch, batch, done, broken, run, noisy):
    half = broken((state, epoch, batch), *flags_of(name, noisy))
    assert len(metrics(half.dir)) == done(name).args["epochs"] * state + epoch
    run("--resume", name="broken", base=())
    assert_same_outcome(half.dir, done(name).dir)


def test_the_gradient_form_resumes_from_a_checkpoint_file_with_its_flags_said_again(broken, run, seen, tmp_path):
    flags = words("--struct rsst --reg_form gradient --reg_granularity_prune 20 --fillback_rate 0.2")
    half = broken((1, 1, 0), *flags)
    assert call(["--checkpoint", half.dir / "checkpoint.pt", *MICRO, *flags]) == 0
    assert_same_outcome(half.dir, seen(*flags).dir)


@pytest.fixture
def copied(done, tmp_path):
    """A finished run's folder, to do with as one likes."""
    return shutil.copytree(done("refill").dir, tmp_path / "copied")


def digests(folder, skip=()):
    return {name: sha(folder / name) for name in os.listdir(folder) if (folder / name).is_file() and name not in skip}


def test_a_finished_run_resumes_to_itself(run, copied):
    before = digests(copied, skip=("run.log", "run.lock", "args.yaml"))
    again = run("--resume", name="copied", base=())
    assert digests(copied, skip=("run.log", "run.lock", "args.yaml")) == before
    assert "Remaining weights" in again.out


def test_one_command_starts_a_run_goes_on_with_it_and_leaves_it_when_it_is_complete(broken, run):
    flags = ("--struct", "refill", "--fillback_rate", "0.4", "--pruning_times", "2", "--resume", "auto")
    for point in ((0, 0, 2), (1, 1, 0)):  # the first time before there is any checkpoint
        half = broken(point, *flags)
        assert f"--resume auto: {half.dir} holds no checkpoint yet; the run starts" in half.out
    again = run(*flags, name="broken", base=[*MICRO, "--print_freq", "1"])
    assert "resumed at state 1, step 3 of 6" in again.out
    assert "no checkpoint" not in again.out
    assert_same_outcome(again.dir, run(*flags[:-2]).dir)

    assert "Remaining weights" in run(*flags, name="broken").out  # its report is not written yet
    (again.dir / "report.html").write_text("")
    before = digests(again.dir)
    assert run(*flags, name="broken").out == f"{again.dir} is complete: all its states are trained; nothing to do\n"
    assert run("--resume", "auto", name="broken", base=()).out.count("\n") == 1
    assert digests(again.dir) == before
    more = (*flags, "--pruning_times", "3")
    for _ in range(2):  # the second time because the report is of two states
        assert "resumed at state " in run(*more, name="broken").out


def test_a_name_is_one_folder_however_often_it_is_given(capsys):
    Path("auto.yaml").write_text("resume: auto\nexp_name: one\n")
    for said in ("the run starts", "resumed at state 1, step 0 of 3"):
        assert call([*MICRO, *words("--pruning_times 1 --epochs 1 --config auto.yaml")]) == 0
        assert said in capsys.readouterr().out
    assert os.listdir("results") == ["one"]
    assert yaml.safe_load(Path("results/one/args.yaml").read_text())["resume"] is False


def test_a_checkpoint_that_comes_while_a_run_starts_is_not_lost(tmp_path):
    args = entry.parse_args([*MICRO, "--save_dir", str(tmp_path), "--resume", "auto"])
    for name in ("args.yaml", "checkpoint.pt"):
        (tmp_path / name).write_text("of another process")
    with pytest.raises(RunError, match="has just got a checkpoint"):
        make_save_dir(args)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint.prev.pt")
    with pytest.raises(RunError, match="has just got a checkpoint"):
        make_save_dir(args)
    assert (tmp_path / "args.yaml").exists()
    (tmp_path / "checkpoint.prev.pt").unlink()
    make_save_dir(args).release()
    assert not (tmp_path / "args.yaml").exists()


def test_a_changed_rewind_file_is_refused(run, copied):
    weights = load(copied / "init.pt")
    weights["head.bias"] += 1
    torch.save(weights, copied / "init.pt")
    refused = run("--resume", name="copied", base=(), code=2)
    assert refused.err.count("\n") == 1
    assert "init.pt" in refused.err


def test_save_dir_of_another_run_needs_overwrite(run, copied):
    before = digests(copied)
    refused = run("--pruning_times", "1", name="copied", code=2)
    assert refused.err.count("\n") == 1
    assert str(copied) in refused.err
    assert "--overwrite" in refused.err
    assert digests(copied) == before
    again = run(*words("--pruning_times 1 --epochs 1 --seed 5 --overwrite"), name="copied")
    assert len(metrics(again.dir)) == 1
    assert yaml.safe_load((again.dir / "args.yaml").read_text())["seed"] == 5
    assert "seed 42" not in log_of(again.dir)


# ------------------------------------------------------------------------------------------------------------ top-5


def test_data_with_many_classes_gets_top5_accuracy_too(run, tmp_path, done):
    """20 classes of six small pictures; the same shares counted by sorting logits image by image."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for number in range(20):
            folder = tmp_path / "data" / split / f"class{number:02}"
            folder.mkdir(parents=True)
            for k in range(count):
                image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    flags = ("--dataset", "folder", "--data", tmp_path / "data", *words("--img_size 16 --workers 0 --struct imp"))
    seen = record(tmp_path / "seen", [*MICRO, *flags, *words("--train_limit 80 --pruning_times 2 --val_fraction 0.3")])

    def shares(data, weights):
        model = vit_micro(num_classes=20, img_size=16).eval()
        model.load_state_dict(weights)
        ranks = []
        for images, labels in data.sequential():
            for logits, truth in zip(model(images).tolist(), labels.tolist(), strict=True):
                ranks.append(sorted(range(20), key=lambda c: -logits[c]).index(truth))
        return [sum(rank < best for rank in ranks) / len(ranks) for best in (1, 5)]

    rows, table = metrics(seen.dir), rows_of(seen.dir / "states.csv")
    last = shares(seen.run.val_data, seen.ends[1])
    test = shares(seen.run.test_data, load(seen.dir / "best.pt")["weights"])
    assert [rows[-1]["val_accuracy"], rows[-1]["val_top5"]] == last
    assert [float(table[-1]["test_accuracy"]), float(table[-1]["test_top5"])] == test
    assert last[1] > last[0]
    assert f"val {100 * last[0]:.2f}% (top-5 {100 * last[1]:.2f}%)" in seen.log
    assert f"test {100 * test[0]:.2f}% (top-5 {100 * test[1]:.2f}%)" in seen.log
    # with 10 classes five guesses say little
    few = done("imp")
    assert "top5" not in (few.dir / "metrics.jsonl").read_text() + (few.dir / "states.csv").read_text()
    assert "top-5" not in few.out


# ------------------------------------------------------------------------------------------------------ names of runs


def test_a_run_starts_where_only_the_log_of_a_failed_start_is_and_without_git(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.log").write_text("failed\n")
    args = entry.parse_args([*MICRO, "--save_dir", str(tmp_path / "run")])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "sandbox")))
    make_save_dir(args).release()
    found = environment(torch.device("cpu"), "off")
    assert found["commit"] is None
    assert found["device_name"]


def test_the_default_folder_is_named_after_the_run():
    def made(*flags):
        args = entry.parse_args([*MICRO, *flags])
        make_save_dir(args).release()
        return args.save_dir

    name = r"results/rsst_vit_micro_digits_crit_magnitude_rate_0.3{}_\d{{4}}_\d{{4}}"
    assert re.fullmatch(name.format("_struct_head"), made("--criteria", "magnitude", "--vit_structured"))
    assert re.fullmatch(name.format("_pretrained"), made("--criteria", "magnitude", "--pretrained"))
    refill = made(*words("--struct refill --arch timm/vit_tiny_patch16_224"))
    assert re.fullmatch(r"results/refill_timm-vit_tiny_patch16_224_digits_crit_l1_rate_0.3_\d{4}_\d{4}", refill)
    assert made("--exp_name", "mine") == "results/mine"
    Path("results/mine/args.yaml").touch()
    with pytest.raises(RunError, match=r"^--exp_name mine: results/mine holds another run; add --resume or --overwrit"):
        made("--exp_name", "mine")
    assert made("--exp_name", "mine", "--overwrite") == "results/mine"


def test_a_name_given_by_hand_counts_beside_the_folder_of_a_config():
    Path("args.yaml").write_text("save_dir: results/dense\nexp_name: dense\nlr: 0.3\n")
    for flags, folder in (
        ("", "results/dense"), ("--exp_name t2", None), ("--save_dir x", "x"), ("--exp_name t2 --save_dir x", "x"),
    ):  # fmt: skip
        args = entry.parse_args([*MICRO, "--config", "args.yaml", *words(flags)])
        assert (args.save_dir, args.lr) == (folder, 0.05)
    args = entry.parse_args([*MICRO, *words("--config args.yaml --exp_name t2")])
    make_save_dir(args).release()
    assert args.save_dir == "results/t2"


def test_a_folder_that_cannot_be_locked_is_said(monkeypatch, tmp_path):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    args = entry.parse_args([*MICRO, "--save_dir", str(tmp_path / "run")])
    make_save_dir(args).release()
    assert [note for note in args.notes if "is not locked" in note and "No locks available" in note]


def test_an_export_that_proves_wrong_costs_no_report_and_is_not_tried_for_ever(run, monkeypatch):
    base = [flag for flag in MICRO if flag != "--no-export"]
    flags = words("--struct imp --pruning_times 2 --resume auto")
    monkeypatch.setattr(entry.report, "write", lambda folder: (folder / "report.html").write_text(""))
    wrong = {"max_difference_float32": 1.0, "max_difference_float64": 1.0, "bound": 1e-5}
    with monkeypatch.context() as patch:
        patch.setattr(deployment.folder, "parity", lambda *_: wrong)
        failed = run(*flags, base=base, code=1)
    assert "error: the removed model differs from the masked one by 1" in failed.err
    assert (failed.dir / "report.html").exists()
    again = run(*flags, base=base)
    assert "nothing to do\nit has no model/: the removed model differs" in again.out
    run("--resume", base=())  # asked for, it is tried again
    assert (failed.dir / "model" / "config.json").exists()
    assert "has no model" not in run(*flags, base=base).out


def test_the_seconds_of_a_state_hold_its_choice_and_its_test(run, monkeypatch):
    def slow(original, seconds):
        return lambda *arguments: (time.sleep(seconds), original(*arguments))[1]

    monkeypatch.setattr(entry, "choose_target", slow(entry.choose_target, 0.4))
    monkeypatch.setattr(Run, "end_state", slow(Run.end_state, 0.2))
    started = time.perf_counter()
    found = run(*words("--struct imp --pruning_times 2 --epochs 1"))
    seconds = [float(row["seconds"]) for row in rows_of(found.dir / "states.csv")]
    assert seconds[0] > 0.2
    assert seconds[1] > 0.6
    assert sum(seconds) < time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------- bad input


class Explosive:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.fixture
def files(tmp_path):
    """Files that a bad command may name."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "damaged.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    (folder / "code.pt").write_bytes(pickle.dumps({"run": Explosive()}, protocol=2))
    torch.save({"head.weight": torch.ones(1)}, folder / "other.pt")
    torch.save([torch.ones(1)], folder / "list.pt")
    torch.save(vit_micro(num_classes=10).state_dict() | {"norm.bias": torch.ones(25)}, folder / "shape.pt")
    (folder / "plain.txt").write_text("a file, no folder")
    for name in ("damaged", "code", "other"):
        (folder / name).mkdir()
        for file in ("checkpoint.pt", "checkpoint.prev.pt"):
            shutil.copy(folder / f"{name}.pt", folder / name / file)
    return folder


# flags, and what the one line has to name when that is not all of them
BAD = """--rate 1; --rate -0.1; --rate nan; --rate much; --mlp_prune_ratio 1; --fillback_rate 1.5; --momentum 1;
--label_smoothing 1; --decreasing_lr 8,4; --decreasing_lr 4,4; --decreasing_lr 0,4; --decreasing_lr 1.5; --lr 0;
--lr nan; --lr inf; --decreasing_lr half; --epochs 0; --epochs 1.5; --batch_size 0; --pruning_times 0; --print_freq 0;
--workers -1; --score_batches 0; --train_limit 0; --val_fraction 0; --val_fraction 1; --val_fraction 0.9999; --gpu -1;
--seed -1; --seed 99999999999999999999; --weight_decay -1; --warmup -1; --clip_grad 0; --reg_granularity_prune 0;
--exponents 0; --reg_finish 0; --reg_finish 1.1; --prune_type rewind_lt --rewind_epoch 2 -> --rewind_epoch 2;
--rewind_epoch -1; --vit_structured --min_units 5 -> --min_units 5; --min_units -1; --dataset mnist; --arch vit_huge;
--criteria taylor; --vit_structured --vit_prune_target mlp --min_units 49 -> --min_units 49;
--img_size 17 -> img_size 17; --img_size 0; --patch_size 5 -> patch_size 5; --patch_size 0; --struct hard;
--prune_type nothing; --RST_schedule y; --struct oneshot; --prune_type pt; --reg_clock state;
--vit_structured --rank_by score_per_mac -> --rank_by score_per_mac; --round_to 0; --round_to -8;
--vit_structured --vit_prune_target mlp --round_to 49 -> --round_to 49;
--vit_structured --vit_prune_target mlp --round_to 20 --min_units 41 -> --round_to 20 and --min_units 41;
--arch res20s --round_to 17 -> --round_to 17; --device cuda; --amp fp16; --resume;
--frobnicate 3 -> --frobnicate; --epoch 3 -> --epoch; --checkpoint_every 0; --accum_steps 0;
--resume --save_dir {files}/none -> {files}/none; --resume --save_dir {files}/damaged -> {files}/damaged;
--resume --save_dir {files}/code -> {files}/code; --resume --save_dir {files}/other -> {files}/other;
--checkpoint {files}/none.pt -> {files}/none.pt; --checkpoint {files}/damaged.pt -> {files}/damaged.pt;
--checkpoint {files}/code.pt -> {files}/code.pt; --checkpoint {files}/other.pt -> {files}/other.pt;
--init {files}/none.pt; --init {files}/damaged.pt -> {files}/damaged.pt; --init {files}/code.pt -> {files}/code.pt;
--init {files}/list.pt -> {files}/list.pt; --init {files}/other.pt; --init {files}/shape.pt;
--init {files}/plain.txt -> {files}/plain.txt; --init {files}/none.safetensors -> {files}/none.safetensors;
--pretrained {files}/none.pt -> pretrained {files}/none.pt;
--pretrained {files}/damaged.pt -> pretrained {files}/damaged.pt;
--pretrained {files}/shape.pt -> pretrained {files}/shape.pt; --save_dir {files}/plain.txt; --exp_name ../../x;
--save_dir {files}/plain.txt/below; --data {files}/none --dataset fashionmnist -> {files}/none;
--data {files}/plain.txt --dataset cifar10 -> {files}/plain.txt"""


@pytest.fixture
def no_network(monkeypatch):
    def blocked(*_, **__):
        raise OSError("the test has no network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, blocked)


def tree(folder):
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", [case.strip() for case in BAD.split(";")])
def test_bad_input_is_one_line_that_names_it(case, files, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags, _, named = case.format(files=files).partition("->")
    base = () if "--resume" in flags or "--checkpoint " in flags else MICRO
    before = tree(files)
    capsys.readouterr()
    assert call([*base, *words(flags)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    # numbers may be shown as they were read: -0.1, 1.5, 1
    pattern = ".*".join(re.escape(part) + r"\b" for part in words(named or flags))
    assert re.search(pattern, err), err
    assert os.listdir() == []  # nothing is left behind, and no code of a checkpoint has run
    assert tree(files) == before


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashionmnist"])
def test_no_network_and_no_data_on_disk(name, capsys):
    pytest.importorskip("torchvision")
    started = time.perf_counter()
    assert call(["--dataset", name, "--device", "cpu", "--save_dir", "out"]) == 2
    assert time.perf_counter() - started < 20  # at once: no waiting for time-outs or retries
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert re.search(f"--dataset {name}.*data", err)
    assert os.listdir() == []


# ------------------------------------------------------------------------------------------------- a loss that explodes


def test_a_loss_that_is_not_finite_stops_the_run(run):
    done = run("--lr", "1e30", *BOTH, code=1)
    assert done.err.count("\n") == 1, done.err
    assert "not finite at step 1 of state 0" in done.err  # the first step's loss is still fine
    assert "there is no checkpoint yet; start anew with a lower --lr or --clip_grad 1\n" in done.err
    assert not (done.dir / "checkpoint.pt").exists()
    assert not (done.dir / "metrics.jsonl").exists()


def test_the_last_good_checkpoint_stays(run, around):
    def explode(training):
        if (training.progress.state, training.progress.step) == (1, 4):
            with torch.no_grad():
                training.model.head.weight.fill_(math.inf)

    around("step", before=explode)
    done = run(code=1)
    assert "step 4 of state 1; the last checkpoint is good; start anew with a lower --lr or --clip_grad 1" in done.err
    checkpoint = load(done.dir / "checkpoint.pt")
    assert (checkpoint["run"]["state"], checkpoint["run"]["step"]) == (1, 3)
    assert all(tensor.isfinite().all() for tensor in checkpoint["weights"].values())
    assert len(metrics(done.dir)) == 3


def test_a_first_loss_that_is_not_finite_is_not_the_learning_rates_fault(run, around):
    around("build", after=lambda training: training.model.head.bias.data.fill_(math.nan))
    done = run(code=1)
    assert "not finite at step 0 of state 0; nothing has trained yet: look at the initial weights\n" in done.err
    assert "--lr" not in done.err


@pytest.mark.parametrize("method", ["imp", "rsst --vit_structured --vit_prune_target both"])
def test_weights_that_explode_in_the_last_step_stop_the_run_too(method, run):
    """One step in the state: its loss was fine, its weights are not, and no further loss of this state shows it."""
    done = run(*words(f"--lr 1e38 --train_limit 20 --epochs 1 --struct {method}"), code=1)
    assert done.err.count("\n") == 1, done.err
    assert "finite" in done.err


# ------------------------------------------------------------------------------------------------ the real command line


@pytest.mark.parametrize(
    "method", ["rsst", *(pytest.param(method, marks=pytest.mark.slow) for method in
                         ("refill", "imp", "dense", "oneshot --vit_structured"))]
)  # fmt: skip
def test_smoke_through_the_real_command_line(method, tmp_path):
    flags = "--dataset digits --img_size 8 --train_limit 40 --batch_size 20 --epochs 1 --pruning_times 2 --rate 0.34"
    fixed = ("--device", "cpu", "--amp", "off", "--save_dir", tmp_path / "run")
    argv = [sys.executable, SCRIPT, *words(flags), *map(str, fixed), "--struct", *words(method)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    rows = rows_of(tmp_path / "run" / "states.csv")
    assert len(rows) == (1 if method == "dense" else 2)
    if method in ("rsst", "refill", "imp"):
        assert float(rows[1]["density"]) == round(2_654_208 * 0.66) / 2_654_208
    elif method != "dense":
        assert rows[1]["heads"] == "9"  # floor(3 x 0.66) = 1 of three in each of nine blocks
    assert "[ViT Sparsity Report]" in done.stdout
    assert "blocks.*.mlp.fc2 (9)                   | Sparsity: " in done.stdout
    left = set(os.listdir(tmp_path / "run"))
    assert left >= {*FILES, "model", "report.md", "plots"}
    assert not [name for name in left if name.startswith(".")]
    exported = {"model.safetensors", "config.json", "parity.json", "README.md"}
    assert set(os.listdir(tmp_path / "run" / "model")) >= exported
    assert os.listdir() == []
