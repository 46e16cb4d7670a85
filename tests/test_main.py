"""Laws of a run: what it leaves, where its states start, what never moves, and that it can be broken off anywhere.

Runs are real ones through `main([...])`: scikit-learn's digits and a Vision Transformer of two small blocks.
"""

import csv
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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from micro import DEPTH, DIM, HEAD_DIM, HEADS, HIDDEN, TOKENS, call, masks_of, runner, vit_micro

import main_imp_fillback as entry
from vit_structured_pruning import scatter_tensors

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "main_imp_fillback.py"

# The micro model, and what its parts hold by hand.
HEAD_WEIGHTS, NEURON_WEIGHTS = 4 * DIM * HEAD_DIM, 2 * DIM
PRUNABLE = DEPTH * (HEADS * HEAD_WEIGHTS + HIDDEN * NEURON_WEIGHTS)
PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LAYERS = [f"blocks.{block}.{part}" for block in range(DEPTH) for part in PARTS]
TIMES = ("seconds", "images_per_second")

words = str.split
BASE = words(
    "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.3 --no-export"
)
STEPS = 3  # an epoch
BOTH = ("--vit_structured", "--vit_prune_target", "both")


@pytest.fixture(autouse=True)
def _in_house(house):
    pass


@pytest.fixture
def run(tmp_path, capsys):
    return runner(tmp_path, capsys, BASE)


@pytest.fixture
def watch(around):
    """watch.before("train_step", f) and watch.after(...): f(job, *arguments) around methods of the run."""
    jobs = []
    around("__call__", before=lambda job: jobs.append(job))
    return SimpleNamespace(
        jobs=jobs,
        before=lambda method, react: around(method, before=react),
        after=lambda method, react: around(method, after=react),
    )


def label(value):
    """Readable test ids of flags."""
    return " ".join(value) or "plain" if isinstance(value, tuple) else str(value)


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics(folder, drop=()):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in drop} for line in lines]


def log_of(folder):
    return (folder / "run.log").read_text()


def assert_same_tensors(found, expected, skip=()):
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.startswith(tuple(skip)):
            assert torch.equal(found[name], expected[name]), name


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one if one[name].numel())


def dead_rows(layer, kept):
    """Rows of qkv, or of fc1, that belong to units which are gone."""
    if layer.endswith("attn"):
        gone = [head for head in range(HEADS) if head not in kept]
        return [c * DIM + head * HEAD_DIM + i for c in range(3) for head in gone for i in range(HEAD_DIM)]
    return [neuron for neuron in range(HIDDEN) if neuron not in kept]


# ------------------------------------------------------------------------------------------------------ command line

OLDER_COMMAND = words(
    "--dataset cifar100 --arch vit_tiny --struct rsst --criteria l1 --epochs 120 --batch_size 128 --lr 0.001 "
    "--pruning_times 15 --rate 0.15 --RST_schedule exp_custom_exponents --reg_granularity_prune 0.5 --exponents 3 "
    "--save_dir results/vit_tiny_rsst --dry_run"
)


@pytest.fixture
def no_data(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dry run reads no data")

    monkeypatch.setattr(entry, "load_dataset", refuse)


def test_the_older_command_line_prints_its_plan_and_does_nothing(no_data, capsys):
    assert call(OLDER_COMMAND) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert os.listdir() == []
    # 50,000 images less a tenth; 45,000 // 128 steps
    assert "15 states x 120 epochs x 351 steps" in out
    assert "2,714,980 parameters" in out
    assert "2,654,208" in out
    table = [line.split() for line in out.splitlines() if re.match(r" *\d+ +\d+\.\d+%", line)]
    assert [int(line[0]) for line in table] == list(range(15))
    for state, line in enumerate(table):
        left = round(2_654_208 * 0.85**state)
        assert line[1] == f"{100 * left / 2_654_208:.2f}%"
        assert line[2:4] == ["27", "3,456"]
        assert line[4] == f"{2_714_980 - 2_654_208 + left:,}"
        assert float(line[5]) == pytest.approx(0.1877, abs=1e-3)
    assert re.search(r"[\d,]+ MB of disk", out)


@pytest.mark.parametrize("schedule", ["geometric", "linear", "constant"])
def test_the_plan_of_a_structured_run(schedule, no_data, capsys):
    flags = "--vit_structured --vit_prune_target both --rate 0.33 --mlp_prune_ratio 0.3 --pruning_times 4"
    assert call(["--dataset", "cifar10", *words(flags), "--ratio_schedule", schedule, "--dry_run"]) == 0
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if re.match(r" *\d+ +\d+\.\d+%", line)]
    assert len(table) == 4
    for state, line in enumerate(table):
        share = {
            "geometric": lambda ratio, s: 1 - (1 - ratio) ** (s / 3),
            "linear": lambda ratio, s: ratio * s / 3,
            "constant": lambda ratio, s: ratio if s else 0.0,
        }[schedule]
        heads = math.floor(3 * (1 - share(0.33, state)) + 1e-9)
        neurons = math.floor(384 * (1 - share(0.3, state)) + 1e-9)
        assert line[2:4] == [str(9 * heads), f"{9 * neurons:,}"]
        gone = 9 * (3 - heads) * (4 * 192 * 64 + 3 * 64) + 9 * (384 - neurons) * (2 * 192 + 1)
        assert line[4] == f"{2_697_610 - gone:,}"
        left = 9 * heads * 4 * 192 * 64 + 9 * neurons * 2 * 192
        assert line[1] == f"{100 * left / 2_654_208:.2f}%"
    assert table[-1][2:4] == ["18", "2,412"]
    assert os.listdir() == []


OLDER_FLAGS = {
    "--data": ("some/folder", "data"),
    "--dataset": ("cifar10", "dataset"),
    "--arch": ("vit_small", "arch"),
    "--vit_pretrained": (None, "pretrained"),
    "--pretrained": (None, "pretrained"),
    "--seed": ("0", "seed"),
    "--save_dir": ("out", "save_dir"),
    "--exp_name": ("mine", "exp_name"),
    "--gpu": ("1", "gpu"),
    "--init": ("init.pt", "init"),
    "--batch_size": ("64", "batch_size"),
    "--workers": ("8", "workers"),
    "--lr": ("0.1", "lr"),
    "--momentum": ("0.8", "momentum"),
    "--weight_decay": ("0.0005", "weight_decay"),
    "--epochs": ("182", "epochs"),
    "--warmup": ("5", "warmup"),
    "--print_freq": ("50", "print_freq"),
    "--decreasing_lr": ("91,136", "decreasing_lr"),
    "--pruning_times": ("16", "pruning_times"),
    "--rate": ("0.3", "rate"),
    "--prune_type": ("rewind_lt", "prune_type"),
    "--conv1": (None, "prune_patch_embed"),
    "--fc": (None, "fc"),
    "--rewind_epoch": ("3", "rewind_epoch"),
    "--struct": ("refill", "struct"),
    "--fillback_rate": ("0.2", "fillback_rate"),
    "--block_loss_grad": (None, "block_loss_grad"),
    "--RST_schedule": ("x^3", "RST_schedule"),
    "--reg_granularity_prune": ("0.5", "reg_granularity_prune"),
    "--criteria": ("saliency", "criteria"),
    "--exponents": ("3", "exponents"),
    "--vit_structured": (None, "vit_structured"),
    "--vit_prune_target": ("both", "vit_prune_target"),
    "--mlp_prune_ratio": ("0.4", "mlp_prune_ratio"),
    "--sorting_mode": ("global", "sorting_mode"),
}


@pytest.mark.parametrize("flag", OLDER_FLAGS)
def test_each_older_flag_parses(flag):
    value, name = OLDER_FLAGS[flag]
    found = getattr(entry.parse_args([flag] if value is None else [flag, value]), name)
    expected = True if value is None else value
    assert found == (type(found)(expected) if value is not None else expected)


def test_all_older_flags_parse_together():
    argv = [part for flag, (value, _) in OLDER_FLAGS.items() for part in ((flag,) if value is None else (flag, value))]
    args = entry.build_parser().parse_args([*argv, "--resume", "--checkpoint", "checkpoint.pt"])
    assert args.resume is True
    assert args.checkpoint == "checkpoint.pt"
    assert entry.parse_args(argv).epochs == 182


def test_defaults():
    args = entry.parse_args([])
    expected = {
        "dataset": "cifar100",
        "arch": "vit_tiny",
        "data": "data",
        "batch_size": 128,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "epochs": 120,
        "pruning_times": 20,
        "rate": 0.2,
        "prune_type": "lt",
        "struct": "rsst",
        "fillback_rate": 0.0,
        "RST_schedule": "exp_custom_exponents",
        "exponents": 4.0,
        "reg_granularity_prune": 1.0,
        "criteria": "l1",
        "vit_prune_target": "head",
        "sorting_mode": "layer-wise",
        "seed": 42,
        "workers": 4,
        "print_freq": 200,
        "warmup": 20,
        "decreasing_lr": "60,90",
        "rewind_epoch": 24,
        "ratio_schedule": "geometric",
        "reg_form": "decay",
        "reg_finish": 0.25,
        "score_batches": 10,
        "min_units": 1,
        "val_fraction": 0.1,
        "compact_training": True,
        "rank_by": "score",
        "opt": "sgd",
        "sched": "multistep",
        "device": "auto",
        "amp": "auto",
    }
    assert {name: getattr(args, name) for name in expected} == expected
    for switch in ("vit_structured", "fc", "prune_patch_embed", "pretrained", "block_loss_grad", "resume", "dry_run"):
        assert getattr(args, switch) is False


@pytest.mark.parametrize(
    ("epochs", "warmup", "milestones", "rewind"), [(60, 10, "30,45", 12), (7, 1, "3,5", 1), (2, 0, "1", 0)]
)
def test_what_is_left_to_itself_scales_with_the_epochs(epochs, warmup, milestones, rewind):
    args = entry.parse_args(["--epochs", str(epochs)])
    assert (args.warmup, args.decreasing_lr, args.rewind_epoch) == (warmup, milestones, rewind)
    by_hand = entry.parse_args(words("--epochs 60 --warmup 0 --decreasing_lr 5,70 --rewind_epoch 0"))
    assert (by_hand.warmup, by_hand.decreasing_lr, by_hand.rewind_epoch) == (0, "5,70", 0)


def test_other_defaults_of_forms_and_methods():
    assert entry.parse_args(["--reg_form", "gradient"]).reg_finish == 1.0
    assert entry.parse_args(["--struct", "imp", "--vit_structured"]).criteria == "magnitude"
    assert entry.parse_args(["--struct", "imp", "--vit_structured", "--criteria", "l2"]).criteria == "l2"
    assert entry.parse_args(["--struct", "refill", "--vit_structured"]).criteria == "l1"


def test_help_has_its_groups_and_every_flag(capsys):
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    for group in ("run", "data", "model", "training", "pruning", "rsst"):
        assert re.search(rf"^{group}\b.*:$", text, re.MULTILINE), group
    for flag in [*OLDER_FLAGS, "--resume", "--checkpoint"]:
        assert re.search(rf"(^|[\s,\[]){flag}\b", text), flag


def test_a_milestone_or_warm_up_beyond_the_last_epoch_is_a_warning(run):
    done = run("--decreasing_lr", "1,80,120", "--warmup", "3", "--pruning_times", "1")
    assert len(re.findall(r"--decreasing_lr: epoch (80|120) lies beyond", log_of(done.dir))) == 2
    assert "--warmup 3" in log_of(done.dir)


# ---------------------------------------------------------------------------------------------------- what a run leaves

FILES = {
    "args.yaml", "environment.json", "checkpoint.pt", "checkpoint.prev.pt", "best.pt", "init.pt", "metrics.jsonl",
    "metrics.csv", "states.csv", "run.log",
}  # fmt: skip


def assert_whole(done, states, epochs):
    """The files of a finished run, each epoch once and in order, and everything loads safely."""
    present = set(os.listdir(done.dir))
    assert present >= FILES
    assert not [name for name in present if name.startswith(".") or name.endswith(".tmp") or "new" in name]
    assert [(row["state"], row["epoch"]) for row in metrics(done.dir)] == list(
        itertools.product(range(states), range(epochs))
    )
    table = rows_of(done.dir / "metrics.csv")
    assert len(table) == states * epochs
    for line, row in zip(table, metrics(done.dir), strict=True):
        assert line.keys() == row.keys()
        assert {key: float(value) for key, value in line.items()} == pytest.approx(row, rel=1e-12)
    assert [row["state"] for row in rows_of(done.dir / "states.csv")] == [str(state) for state in range(states)]
    for name in ("checkpoint.pt", "checkpoint.prev.pt", "best.pt", "init.pt"):
        assert load(done.dir / name)
    flags = yaml.safe_load((done.dir / "args.yaml").read_text())
    assert flags["dataset"] == "digits"
    environment = json.loads((done.dir / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ or environment["versions"]["torch"]
    assert (environment["device"], environment["precision"]) == (
        "cpu",
        {"off": "float32", "bf16": "bf16"}[flags["amp"]],
    )
    assert "commit" in environment
    assert os.listdir() == []  # nothing anywhere else
    best = load(done.dir / "best.pt")
    last = [row for row in metrics(done.dir) if row["state"] == states - 1]
    assert best["state"] == states - 1
    assert best["accuracy"] == last[best["epoch"]]["val_accuracy"]


@pytest.mark.parametrize("method", ["rsst", "refill", "imp"])
@pytest.mark.parametrize("rate", [0.3, 0.15])
def test_elementwise_densities_are_exact(method, rate, run, watch):
    inits = []
    watch.after("start", lambda job: inits.append(sha(job.save_dir / "init.pt")))
    watch.after("end_epoch", lambda job, epoch: inits.append(sha(job.save_dir / "init.pt")))
    done = run("--struct", method, "--rate", rate, "--pruning_times", 4, "--print_freq", 1)
    assert_whole(done, states=4, epochs=2)
    assert len(set(inits)) == 1
    for state, row in enumerate(rows_of(done.dir / "states.csv")):
        left = round(PRUNABLE * (1 - rate) ** state)
        assert float(row["density"]) == left / PRUNABLE
        assert int(row["parameters"]) == 14_818 - (PRUNABLE - left)
        assert (int(row["heads"]), int(row["neurons"])) == (DEPTH * HEADS, DEPTH * HIDDEN)
    weights = load(done.dir / "checkpoint.pt")["weights"]
    assert sum(int((weights[f"{name}.weight"] != 0).sum()) for name in LAYERS) == round(PRUNABLE * (1 - rate) ** 3)
    assert f"Remaining weights: {100 * round(PRUNABLE * (1 - rate) ** 3) / PRUNABLE:.2f}%" in done.out
    # the best model of the last state has that state's density, too
    weights = load(done.dir / "best.pt")["weights"]
    assert sum(int((weights[f"{name}.weight"] != 0).sum()) for name in LAYERS) == round(PRUNABLE * (1 - rate) ** 3)


def test_dense_trains_one_schedule_over_all_states(run):
    done = run("--struct", "dense", "--decreasing_lr", "1", "--warmup", "0", "--pruning_times", "3")
    assert_whole(done, states=1, epochs=6)
    assert [float(row["density"]) for row in rows_of(done.dir / "states.csv")] == [1.0]
    # the milestone moves from 1 to 3
    assert [row["lr"] for row in metrics(done.dir)] == pytest.approx([0.05] * 3 + [0.005] * 3)


def test_one_state_trains_dense_and_says_so(run):
    done = run("--pruning_times", "1")
    assert_whole(done, states=1, epochs=2)
    assert "trains dense" in log_of(done.dir)
    assert [float(row["density"]) for row in rows_of(done.dir / "states.csv")] == [1.0]


def asked(schedule, ratio, state, states):
    if state == 0:
        return 0.0
    progress = state / (states - 1)
    return {"geometric": 1 - (1 - ratio) ** progress, "linear": ratio * progress, "constant": ratio}[schedule]


def kept_of(count, share):
    return max(1, math.floor(count * (1 - share) + 1e-9))


@pytest.mark.parametrize("target", ["head", "mlp", "both"])
@pytest.mark.parametrize("method", ["rsst", "refill", "imp", "oneshot"])
def test_structured_states_keep_what_the_ratios_say(method, target, run):
    schedule = {"rsst": "geometric", "refill": "linear", "imp": "constant", "oneshot": "geometric"}[method]
    flags = ["--struct", method, "--vit_structured", "--vit_prune_target", target, "--ratio_schedule", schedule]
    ratio = {"head": 0.5, "neuron": 0.3}
    if target == "mlp":
        flags += ["--rate", "0.3"]  # the neurons' when --mlp_prune_ratio is not given
    else:
        flags += ["--rate", "0.5", "--mlp_prune_ratio", "0.3"]
    done = run(*flags)
    assert_whole(done, states=3, epochs=2)
    schedule = "constant" if method == "oneshot" else schedule
    for state, row in enumerate(rows_of(done.dir / "states.csv")):
        heads = HEADS if target == "mlp" else kept_of(HEADS, asked(schedule, ratio["head"], state, 3))
        neurons = HIDDEN if target == "head" else kept_of(HIDDEN, asked(schedule, ratio["neuron"], state, 3))
        assert int(row["heads"]) == DEPTH * heads
        assert int(row["neurons"]) == DEPTH * neurons
        assert float(row["density"]) == DEPTH * (heads * HEAD_WEIGHTS + neurons * NEURON_WEIGHTS) / PRUNABLE
        gone = DEPTH * ((HEADS - heads) * (HEAD_WEIGHTS + 3 * HEAD_DIM) + (HIDDEN - neurons) * (NEURON_WEIGHTS + 1))
        assert int(row["parameters"]) == 14_818 - gone
        attention = 3 * TOKENS * DIM * HEAD_DIM + 2 * TOKENS * TOKENS * HEAD_DIM + TOKENS * HEAD_DIM * DIM
        macs = 4 * 3 * 64 * DIM + DEPTH * (heads * attention + neurons * 2 * TOKENS * DIM) + DIM * 10
        assert int(row["macs"]) == macs
    # whole units are zero, and survivors are whole, in what the run ends with
    weights, kept = load(done.dir / "checkpoint.pt")["weights"], load(done.dir / "best.pt")["kept"]
    wanted = {"head": ["attn"], "mlp": ["mlp"], "both": ["attn", "mlp"]}[target]
    assert sorted(kept) == sorted(f"blocks.{block}.{part}" for block in range(DEPTH) for part in wanted)
    for layer, ids in kept.items():
        rows, columns = ("qkv", "proj") if layer.endswith("attn") else ("fc1", "fc2")
        dead = dead_rows(layer, ids)
        assert len(ids) < (HEADS if rows == "qkv" else HIDDEN)
        assert not weights[f"{layer}.{rows}.weight"][dead].any()
        assert not weights[f"{layer}.{rows}.bias"][dead].any()
        dead_columns = [row for row in dead if row < weights[f"{layer}.{columns}.weight"].shape[1]]
        assert not weights[f"{layer}.{columns}.weight"][:, dead_columns].any()
        alive = [row for row in range(len(weights[f"{layer}.{rows}.weight"])) if row not in dead]
        assert (weights[f"{layer}.{rows}.weight"][alive] != 0).all()
    if target != "both":
        other = "mlp.fc1" if target == "head" else "attn.qkv"
        assert all((weights[f"blocks.{block}.{other}.weight"] != 0).all() for block in range(DEPTH))


def test_structured_imp_scores_magnitude_unless_told_otherwise(run):
    done = run("--struct", "imp", *BOTH, "--pruning_times", "2", "--epochs", "1")
    assert "prunes by magnitude" in log_of(done.dir)
    assert yaml.safe_load((done.dir / "args.yaml").read_text())["criteria"] == "magnitude"


def test_the_learning_rate_warms_up_and_falls(run, watch):
    rates = []
    watch.after(
        "train_step", lambda job, *_: rates.append({float(group["lr"]) for group in job.optimizer.param_groups})
    )
    run("--epochs", "6", "--warmup", "2", "--decreasing_lr", "3,5", "--pruning_times", "2")
    state = [0.05 * (k + 1) / 6 for k in range(6)] + [0.05] * 3 + [0.005] * 6 + [0.0005] * 3
    assert all(len(found) == 1 for found in rates)
    assert [found.pop() for found in rates] == pytest.approx(state * 2, rel=1e-6)  # restarts in every state


def test_the_cosine_schedule(run):
    done = run("--epochs", "5", "--warmup", "1", "--sched", "cosine", "--pruning_times", "2")
    # at the last step of each epoch: step 2, 5, 8, ... of 15, the first 3 of which warm up
    cosine = [0.025 * (1 + math.cos(math.pi * (step - 3) / 12)) for step in (5, 8, 11, 14)]
    assert [row["lr"] for row in metrics(done.dir)] == pytest.approx(([0.05] + cosine) * 2, rel=1e-9)


def batch_lines(folder, state):
    """{step of the state, from 1: the note of its line in run.log}, where every batch has a line."""
    found = re.findall(rf" state {state} epoch (\d+)/\d+ batch (\d+)/{STEPS} (.*)", log_of(folder))
    return {(int(epoch) - 1) * STEPS + int(batch): note for epoch, batch, note in found}


@pytest.mark.parametrize("structured", [(), BOTH], ids=label)
def test_run_log_has_lambda_dose_and_residual_at_every_print_freq(structured, run):
    flags = words("--print_freq 1 --epochs 4 --reg_finish 0.5 --RST_schedule x^2 --reg_granularity_prune 0.4")
    done = run("--struct", "rsst", *structured, *flags)
    cut = 6  # half of 12 steps
    shapes = [(k / cut) ** 2 for k in range(1, cut + 1)]
    assert len(batch_lines(done.dir, 0)) == 12
    assert not any("lambda" in note for note in batch_lines(done.dir, 0).values())
    for state in (1, 2):
        lines = batch_lines(done.dir, state)
        assert sorted(lines) == list(range(1, 13))
        for step in range(1, cut + 1):
            found = re.search(r"lambda (\S+)  dose (\S+)  residual (\S+)", lines[step])
            assert found[1] == f"{0.4 * shapes[step - 1]:.4g}"
            assert float(found[2]) == pytest.approx(20 * 0.4 * sum(shapes[:step]) / sum(shapes), rel=6e-3)
            assert 0 < float(found[3]) <= 1.1
        assert not any("lambda" in lines[step] for step in range(cut + 1, 13))
        cuts = [line for line in log_of(done.dir).splitlines() if f"cut at step {cut}:" in line]
    assert len(cuts) == 2
    # print_freq 2 of batches 1, 2, 3: the second one of each epoch
    sparse = run("--struct", "rsst", *structured, *flags, "--print_freq", "2", name="sparse")
    assert sorted(batch_lines(sparse.dir, 1)) == [2, 5, 8, 11]


@pytest.mark.parametrize("precision", ["off", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("structured", [(), BOTH], ids=label)
def test_without_the_loss_doomed_weights_shrink_by_exp_20_g(structured, optimizer, precision, run):
    """The penalty's law in a real run: --block_loss_grad and no weight decay leave nothing but the penalty."""
    flags = words("--block_loss_grad --weight_decay 0 --epochs 4 --reg_finish 0.5 --RST_schedule x --pruning_times 2")
    strength = ("--reg_granularity_prune", "0.2")
    done = run("--struct", "rsst", *structured, *flags, *strength, "--opt", optimizer, "--amp", precision)
    residual = float(rows_of(done.dir / "states.csv")[1]["residual"])
    assert residual == pytest.approx(math.exp(-20 * 0.2), rel=1e-4)
    assert "residual above" not in log_of(done.dir)


def test_the_law_holds_when_one_step_does_it_all(run):
    """In float32, 1 - (1 - exp(-16)) would keep few of its digits."""
    flags = "--block_loss_grad --weight_decay 0 --reg_finish 0.01 --reg_granularity_prune 0.8 --pruning_times 2"
    done = run("--struct", "rsst", *words(flags))
    assert "cut at step 1:" in log_of(done.dir)
    assert float(rows_of(done.dir / "states.csv")[1]["residual"]) == pytest.approx(math.exp(-16), rel=1e-4)


def test_a_large_residual_is_warned_about(run):
    flags = "--block_loss_grad --weight_decay 0 --reg_finish 0.5 --reg_granularity_prune 0.1 --pruning_times 2"
    done = run("--struct", "rsst", *words(flags))
    assert float(rows_of(done.dir / "states.csv")[1]["residual"]) == pytest.approx(math.exp(-2), rel=1e-4)
    assert "residual above 0.1" in log_of(done.dir)


def test_selection_is_among_epochs_that_end_after_the_cut(run, watch):
    accuracies = []

    def falling(job, *_):  # the best accuracies come before the cut
        row = job.run.history[-1]
        accuracies.append((row["state"], row["epoch"], bool(job.penalty)))

    watch.after("end_epoch", falling)
    done = run("--struct", "rsst", "--epochs", "4", "--reg_finish", "0.75")
    doomed = [(state, epoch) for state, epoch, penalty in accuracies if penalty]
    assert doomed == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for row in rows_of(done.dir / "states.csv")[1:]:
        assert int(row["best_epoch"]) >= 2
        allowed = [m["val_accuracy"] for m in metrics(done.dir) if m["state"] == int(row["state"]) and m["epoch"] >= 2]
        assert float(row["best_accuracy"]) == max(allowed)
        assert float(row["accuracy_trained"]) == allowed[-1]


# --------------------------------------------------------------------------------------------------- where states start


@pytest.fixture
def starts(watch):
    """For each state: weights and masks when it starts to train, and the trained weights of the one before."""
    found = {}
    trained = {}

    def at_end(job):
        trained[job.run.state - 1] = clones(job.dense.state_dict())

    def at_start(job):
        if job.run.step == 0 and job.run.state not in found:
            found[job.run.state] = SimpleNamespace(
                weights=clones(job.dense.state_dict()),
                masks=clones(job.run.masks),
                target=clones(job.run.target),
                elementwise=clones(job.run.elementwise),
                kept={key: list(ids) for key, ids in job.run.kept.items()},
                trained=trained.get(job.run.state - 1),
            )

    watch.after("end_state", at_end)
    watch.after("set_up_training", at_start)
    return found


def masked(weights, masks, kept):
    """weights x mask, with the biases of units that are gone, by hand."""
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for name, mask in masks.items():
        expected[f"{name}.weight"] *= mask
    for layer, ids in kept.items():
        rows = "qkv" if layer.endswith("attn") else "fc1"
        expected[f"{layer}.{rows}.bias"][dead_rows(layer, ids)] = 0
    return expected


@pytest.fixture
def noisy_init(tmp_path):
    """Initial weights without the zeros and ones that biases and norms start from."""
    generator = torch.Generator().manual_seed(9)
    weights = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in vit_micro().state_dict().items()}
    path = tmp_path / "noisy.pt"
    torch.save(weights, path)
    return path, weights


@pytest.mark.parametrize("method", [("refill",), ("rsst",), ("refill", *BOTH), ("rsst", *BOTH)], ids=label)
@pytest.mark.parametrize(
    ("prune_type", "classifier"),
    [("lt", "kept"), ("lt", "rewound"), ("rewind_lt", "kept"), ("rewind_lt", "rewound"), ("pt", "kept")]
    + [("pt", "rewound"), ("finetune", "kept")],
)
def test_states_start_from_rewind_weights_under_masks(prune_type, classifier, method, run, starts, watch, noisy_init):
    path, noisy = noisy_init
    source = ("--pretrained", path) if prune_type == "pt" else ("--init", path)
    rewound = {}
    watch.after(
        "end_epoch",
        lambda job, epoch: rewound.update({epoch: clones(job.dense.state_dict())}) if job.run.state == 0 else None,
    )
    rewind_values = []
    watch.after("end_epoch", lambda job, _: rewind_values.append((job.run.history[-1], clones(job.rewind_weights))))
    flags = ["--struct", *method, "--prune_type", prune_type, *source, "--epochs", "3", "--rewind_epoch", "2"]
    done = run(*flags, *(["--fc"] if classifier == "rewound" else []))

    rewind = {"lt": noisy, "pt": noisy, "rewind_lt": rewound[1], "finetune": None}[prune_type]
    assert_same_tensors(load(done.dir / "init.pt"), noisy)
    assert_same_tensors(starts[0].weights, noisy)
    for state in (1, 2):
        now = starts[state]
        start = now.trained if rewind is None else {**rewind}
        if rewind is not None and classifier == "kept":
            start |= {name: now.trained[name] for name in ("head.weight", "head.bias")}
            assert not torch.equal(now.trained["head.weight"], rewind["head.weight"])
        assert_same_tensors(now.weights, masked(start, now.masks, now.kept))
        if method[0] == "rsst":
            # what the state before ended with is what is enforced now; what it aims at goes later
            before = starts[state - 1].target
            assert_same_tensors(now.masks, before)
            assert any((now.target[name] < now.masks[name]).any() for name in now.masks)
        else:
            assert_same_tensors(now.masks, now.target)

    # the rewind weights never change, and nothing that trains shares their storage
    job = watch.jobs[0]
    expected = rewind or noisy
    assert_same_tensors(job.rewind_weights, expected)
    for row, values in rewind_values:
        if prune_type != "rewind_lt" or row["state"] > 0 or row["epoch"] >= 1:
            assert_same_tensors(values, expected)
    mine = {tensor.untyped_storage().data_ptr() for tensor in job.rewind_weights.values()}
    theirs = {
        tensor.untyped_storage().data_ptr() for tensor in [*job.dense.state_dict().values(), *job.model.parameters()]
    }
    assert not mine & theirs
    assert (done.dir / "rewind.pt").exists() == (prune_type == "rewind_lt")
    if prune_type == "rewind_lt":
        assert_same_tensors(load(done.dir / "rewind.pt"), expected)


def test_rewinding_to_epoch_0_is_rewinding_to_the_start(run, starts, noisy_init):
    path, noisy = noisy_init
    run("--struct", "imp", "--prune_type", "rewind_lt", "--rewind_epoch", "0", "--init", path, "--fc")
    assert_same_tensors(starts[1].weights, masked(noisy, starts[1].masks, {}))


@pytest.mark.parametrize("method", ["refill", "rsst"])
@pytest.mark.parametrize("prune_type", ["lt", "finetune"])
def test_what_fillback_returns(method, prune_type, run, starts, noisy_init):
    path, noisy = noisy_init
    done = run("--struct", method, "--prune_type", prune_type, "--fillback_rate", "0.4", "--init", path, "--fc")
    rows = rows_of(done.dir / "states.csv")
    for state in (1, 2):
        now, left = starts[state], round(PRUNABLE * 0.7**state)
        # Refill never feeds the element-wise mask
        assert sum(int(mask.sum()) for mask in now.elementwise.values()) == left
        returned = sum(int((mask == 0).sum() * 0.4 + 1e-9) for mask in now.elementwise.values())
        assert float(rows[state]["density"]) == (left + returned) / PRUNABLE
        assert f"to density {100 * left / PRUNABLE:.2f}%, trains {100 * (left + returned) / PRUNABLE:.2f}%" in done.out
        for name, mask in now.masks.items():
            weight = now.weights[f"{name}.weight"]
            back = (now.target[name] == 1) & (now.elementwise[name] == 0)
            assert back.any()
            assert (mask[back] == 1).all()
            if prune_type == "lt":
                assert torch.equal(weight, noisy[f"{name}.weight"] * mask)
            elif method == "refill":
                assert not weight[back].any()  # 0 under finetune
                kept = now.elementwise[name] == 1
                assert torch.equal(weight[kept], now.trained[f"{name}.weight"][kept])


@pytest.mark.parametrize("method", ["refill", "rsst"])
def test_refilled_weights_do_not_return_to_the_elementwise_mask(method, run, starts, watch):
    """However large they grow: here they end state 1 as the largest of all."""

    grown = []

    def grow(job):
        if job.run.state == 2:  # state 1 is done
            for name, mask in job.run.elementwise.items():
                back = (mask == 0) & (job.run.masks[name] == 1)
                job.dense.get_parameter(f"{name}.weight").detach()[back] = 9.0
                grown.append(int(back.sum()))

    watch.after("end_state", grow)
    run("--struct", method, "--fillback_rate", "0.4")
    for name, mask in starts[2].elementwise.items():
        assert not (mask > starts[1].elementwise[name]).any()
    assert min(grown) > 0


# ------------------------------------------------------------------------------------------------ bits and seeds


def outcome(done):
    """All that a run ends with but the times."""
    checkpoint = load(done.dir / "checkpoint.pt")
    states = [
        {key: value for key, value in row.items() if key != "seconds"} for row in rows_of(done.dir / "states.csv")
    ]
    return SimpleNamespace(
        weights=checkpoint["weights"],
        best=load(done.dir / "best.pt"),
        masks={name: torch.from_numpy(mask) for name, mask in masks_of(checkpoint, "masks").items()},
        kept=checkpoint["run"]["kept"],
        metrics=metrics(done.dir, drop=TIMES),
        states=states,
    )


def assert_same_outcome(one, other):
    assert_same_tensors(one.weights, other.weights)
    assert_same_tensors(one.best["weights"], other.best["weights"])
    assert_same_tensors(one.masks, other.masks)
    assert {k: v for k, v in one.best.items() if k != "weights"} == {
        k: v for k, v in other.best.items() if k != "weights"
    }
    assert (one.kept, one.metrics, one.states) == (other.kept, other.metrics, other.states)


@pytest.mark.parametrize(
    ("seed", "structured"), [(0, ()), (7, ()), (0, (*BOTH, "--criteria", "random"))], ids=["0", "7", "0 structured"]
)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(seed, structured, run):
    first = outcome(run("--seed", seed, *structured, name="first"))
    torch.rand(3)  # whatever came before the run has no say
    np.random.rand(3)
    assert_same_outcome(outcome(run("--seed", seed, *structured, name="again")), first)
    other = outcome(run("--seed", seed + 1, *structured, name="other"))
    assert largest_difference(other.weights, first.weights) > 1e-3
    assert other.metrics != first.metrics


def test_the_seed_orders_the_batches_too(run, noisy_init):
    ends = [
        outcome(run("--seed", seed, "--init", noisy_init[0], "--pruning_times", "1", name=f"seed{seed}"))
        for seed in (0, 1)
    ]
    assert largest_difference(ends[0].weights, ends[1].weights) > 1e-4


def test_seed_0_is_a_seed_of_its_own(run):
    zero = outcome(run("--seed", "0", "--pruning_times", "1", name="zero"))
    default = outcome(run("--pruning_times", "1", name="default"))
    answer = outcome(run("--seed", "42", "--pruning_times", "1", name="answer"))
    assert largest_difference(zero.weights, default.weights) > 1e-3
    assert_same_outcome(default, answer)


# -------------------------------------------------------------------------------------------- dead weights stay dead


@pytest.mark.parametrize("optimizer", [("sgd",), ("adamw", "--lr", "0.01")], ids=label)
@pytest.mark.parametrize("method", ["imp", "refill", "rsst"])
@pytest.mark.parametrize("structured", [False, True])
def test_masked_weights_are_zero_after_every_step(structured, method, optimizer, run, watch):
    checked = []

    def check(job, *_):
        dead = 0
        for name, mask in job.run.masks.items():
            weight = job.dense.get_parameter(f"{name}.weight")
            assert not weight[mask == 0].any()
            dead += int((mask == 0).sum())
            stays = job.run.target[name] == 1
            assert (weight[stays] != 0).float().mean() > 0.99  # it is the mask that zeroes, and nothing else
        for layer, ids in job.run.kept.items():
            bias = job.dense.get_parameter(f"{layer}.{'qkv' if layer.endswith('attn') else 'fc1'}.bias")
            assert not bias[dead_rows(layer, ids)].any()
        checked.append((job.run.state, dead))

    watch.after("train_step", check)
    flags = (*BOTH, "--no-compact_training") if structured else ()
    run("--struct", method, *flags, "--opt", *optimizer, "--weight_decay", "0.01", "--epochs", "4")
    assert len(checked) == 3 * 4 * STEPS
    for state in range(3):
        dead = [count for s, count in checked if s == state]
        if state == 0:
            assert set(dead) == {0}
        elif method == "rsst":  # cut after the third of twelve steps
            assert dead[0] == dead[2] < dead[3] == dead[-1]
        else:
            assert dead[0] == dead[-1] > 0


def test_doomed_units_live_until_the_cut_and_their_biases_die_with_them(run, watch, noisy_init):
    norms = {}

    def look(job, epoch, batch):
        if job.run.state == 1:
            gone = 0.0
            for layer, ids in job.run.target_kept.items():
                rows = "qkv" if layer.endswith("attn") else "fc1"
                for leaf in ("weight", "bias"):
                    parameter = job.dense.get_parameter(f"{layer}.{rows}.{leaf}").detach()
                    gone += float(parameter[dead_rows(layer, ids)].abs().sum())
                    if job.run.step > 6:
                        assert not parameter[dead_rows(layer, ids)].any()
            norms[job.run.step] = gone

    watch.after("train_step", look)
    flags = words("--no-compact_training --epochs 4 --reg_finish 0.5 --RST_schedule x --pruning_times 2")
    run("--struct", "rsst", *BOTH, *flags, "--init", noisy_init[0])
    values = [norms[step] for step in range(1, 13)]
    assert all(a > b > 0 for a, b in itertools.pairwise(values[:6]))  # they fade
    assert values[6:] == [0.0] * 6


@pytest.mark.parametrize("method", ["imp", "refill", "rsst"])
def test_gradients_are_masked_before_they_are_clipped(method, run, watch, monkeypatch):
    raw, clipped, wrong = [], [], []

    def remember(job):
        raw.append({name: p.grad.clone() for name, p in job.model.named_parameters()})

    clip = torch.nn.utils.clip_grad_norm_

    def listen(parameters, max_norm, *arguments, **options):
        norm = clip(parameters, max_norm, *arguments, **options)
        clipped.append((float(norm), max_norm))
        return norm

    def norm_of(gradients):
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))

    def compare(job, *_):
        alive = {**raw[-1]}
        for name, mask in job.run.masks.items():
            alive[f"{name}.weight"] = alive[f"{name}.weight"] * mask
        assert clipped[-1] == (pytest.approx(norm_of(alive), rel=1e-5), 0.3)
        wrong.append(norm_of(raw[-1]) / norm_of(alive) - 1)

    watch.before("mask_gradients", remember)
    watch.after("train_step", compare)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", listen)
    run("--struct", method, "--clip_grad", "0.3", "--epochs", "4", "--rate", "0.5")
    assert len(clipped) == len(raw) == 3 * 4 * STEPS
    assert max(wrong) > 1e-3  # dead weights would have had a say


# --------------------------------------------------------------------------------------------------- RSST and Refill


def end_of_states(run, watch, *flags, name):
    found = []

    def remember(job):
        if job.save_dir.name == name:
            found.append(clones(job.dense.state_dict()))

    watch.after("end_state", remember)
    done = run(*flags, name=name)
    return done, found


@pytest.mark.parametrize("sorting", ["layer-wise", "global"])
def test_with_lt_and_a_constant_ratio_rsst_equals_refill_from_state_2_on(sorting, run, watch):
    flags = (*BOTH, "--ratio_schedule", "constant", "--fc", "--sorting_mode", sorting, "--pruning_times", "4")
    done, states = end_of_states(run, watch, "--struct", "rsst", *flags, name="rsst")
    _, refill = end_of_states(run, watch, "--struct", "refill", *flags, name="refill")
    assert_same_tensors(states[0], refill[0])
    assert largest_difference(states[1], refill[1]) > 0
    for state in (2, 3):
        assert_same_tensors(states[state], refill[state])
    assert "bit for bit" in log_of(done.dir)


def test_with_a_growing_ratio_rsst_differs_from_refill(run, watch):
    flags = (*BOTH, "--ratio_schedule", "geometric", "--rate", "0.6", "--fc")
    done, states = end_of_states(run, watch, "--struct", "rsst", *flags, name="rsst")
    _, refill = end_of_states(run, watch, "--struct", "refill", *flags, name="refill")
    assert largest_difference(states[2], refill[2]) > 1e-6
    assert "bit for bit" not in log_of(done.dir)


def test_without_fc_all_but_the_classifier_starts_equal(run, starts):
    flags = (*BOTH, "--ratio_schedule", "constant")
    done = run("--struct", "rsst", *flags, name="rsst")
    rsst_start = starts.pop(2)
    starts.clear()
    run("--struct", "refill", *flags, name="refill")
    assert_same_tensors(rsst_start.weights, starts[2].weights, skip=("head.",))
    assert not torch.equal(rsst_start.weights["head.weight"], starts[2].weights["head.weight"])
    assert "classifier" in log_of(done.dir)
    assert "bit for bit" not in log_of(done.dir)


# --------------------------------------------------------------------------------------------------- compact training


def dense_shaped(job):
    return clones(scatter_tensors(job.model.state_dict(), job.units, job.model_kept))


def trace(run, watch, *flags, name):
    """Weights in dense shapes after every step, by (state, step), and the width of what trained."""
    found, width = {}, {}

    def remember(job, *_):
        if job.save_dir.name == name:
            key = (job.run.state, job.run.step)
            found[key] = dense_shaped(job)
            width[key] = sum(parameter.numel() for parameter in job.model.parameters())

    watch.after("train_step", remember)
    done = run(*flags, name=name)
    return found, width, done


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["rsst", "refill"])
@pytest.mark.parametrize("optimizer", [("sgd",), ("adamw", "--lr", "0.002")], ids=label)
def test_compact_and_masked_training_agree_in_float64(optimizer, method, run, watch):
    flags = words("--criteria magnitude --epochs 4 --clip_grad 0.3 --weight_decay 0.01 --rate 0.5 --reg_finish 0.5")
    flags = ("--struct", method, *BOTH, *flags, "--opt", *optimizer)
    compact, width, small = trace(run, watch, *flags, "--compact_training", name="compact")
    watched, _, large = trace(run, watch, *flags, "--no-compact_training", name="masked")
    assert compact.keys() == watched.keys() == set(itertools.product(range(3), range(1, 13)))
    for key in watched:
        assert largest_difference(compact[key], watched[key]) < 1e-9, key
    assert width[0, 1] == 14_818
    assert width[1, 12] < 12_000
    assert (width[1, 6] == 14_818) == (method == "rsst")  # until the cut
    for one, other in zip(metrics(small.dir, TIMES), metrics(large.dir, TIMES), strict=True):
        assert one == pytest.approx(other, abs=1e-9)
    assert largest_difference(load(small.dir / "best.pt")["weights"], load(large.dir / "best.pt")["weights"]) < 1e-9
    moved = largest_difference(watched[2, 12], watched[2, 1])
    assert moved > 1e-3  # they agree on something


@pytest.mark.parametrize("method", ["rsst", "refill"])
def test_compact_and_masked_training_start_alike_in_float32(method, run, watch):
    flags = ("--struct", method, *BOTH, "--clip_grad", "0.3", "--epochs", "4", "--pruning_times", "2", "--rate", "0.5")
    compact, _, _ = trace(run, watch, *flags, "--compact_training", name="compact")
    masked_, _, _ = trace(run, watch, *flags, "--no-compact_training", name="masked")
    cut = 3 if method == "rsst" else 0
    assert_same_tensors(compact[0, 12], masked_[0, 12])
    for step in range(1, cut + 4):
        assert largest_difference(compact[1, step], masked_[1, step]) < 1e-5, step


@pytest.mark.parametrize("compact", ["--compact_training", "--no-compact_training"])
@pytest.mark.parametrize("optimizer", [("sgd",), ("adamw", "--lr", "0.002")], ids=label)
def test_optimizer_state_goes_through_the_cut(optimizer, compact, run, monkeypatch):
    """Survivors keep their moments, what is cut loses them."""
    original = entry.PruneRetrain.cut
    compared = []

    def state_of(job):
        return {
            name: {key: torch.as_tensor(value).clone() for key, value in job.optimizer.state[parameter].items()}
            for name, parameter in job.model.named_parameters()
        }

    def cut(job):
        before = state_of(job)
        original(job)
        after = state_of(job)
        assert before.keys() == after.keys()
        for name, entries in before.items():
            layer, _, rest = name.rpartition(".")[0].rpartition(".")
            kept = job.run.kept.get(layer)
            for key, dense in entries.items():
                expected = dense.clone()
                if kept is not None and dense.ndim and not (rest in ("proj", "fc2") and name.endswith("bias")):
                    dim = 1 if rest in ("proj", "fc2") else 0
                    dead = [row for row in dead_rows(layer, kept) if row < dense.shape[dim]]
                    if compact == "--compact_training":
                        alive = [row for row in range(dense.shape[dim]) if row not in dead]
                        expected = dense.index_select(dim, torch.tensor(alive))
                    else:
                        expected.index_fill_(dim, torch.tensor(dead), 0)
                    assert dense.index_select(dim, torch.tensor(dead)).any()
                assert torch.equal(after[name][key], expected), (name, key)
                compared.append(key)

    monkeypatch.setattr(entry.PruneRetrain, "cut", cut)
    run("--struct", "rsst", *BOTH, compact, "--opt", *optimizer, "--pruning_times", "2", "--rate", "0.5")
    moments = {"momentum_buffer"} if optimizer == ("sgd",) else {"exp_avg", "exp_avg_sq", "step"}
    assert set(compared) == moments


def test_oneshot_removes_the_units_whatever_compact_training_says(run, watch):
    _, width, _ = trace(run, watch, "--struct", "oneshot", *BOTH, "--no-compact_training", name="run")
    assert width[0, 1] == 14_818
    assert {width[state, step] for state in (1, 2) for step in range(1, 7)} == {width[2, 6]}
    assert width[2, 6] < 14_818


# ---------------------------------------------------------------------------------------------------- break and resume


@pytest.fixture
def broken(run, watch):
    """Run until (state, epoch, batch) is about to train, as if Ctrl-C came there; exit code 130."""
    where = []

    def stop(job, epoch, batch):
        if where and (job.run.state, epoch, batch) == where[0]:
            where.clear()
            raise KeyboardInterrupt

    watch.before("train_step", stop)

    def start(point, *flags, name="broken"):
        where.append(point)
        done = run(*flags, name=name, code=130)
        assert not where
        return done

    return start


RESUMABLE = {
    "elementwise": ("--struct", "rsst"),
    "structured": ("--struct", "rsst", *BOTH, "--rate", "0.5"),
    "adamw": ("--struct", "rsst", *BOTH, "--rate", "0.5", "--opt", "adamw", "--lr", "0.005", "--clip_grad", "0.5"),
    "rewind": ("--struct", "refill", "--fillback_rate", "0.3", "--prune_type", "rewind_lt", "--rewind_epoch", "1"),
    "gradient": words("--struct rsst --reg_form gradient --reg_granularity_prune 20 --fillback_rate 0.2"),
}  # fmt: skip
WHOLE = {}  # outcome of each kind's unbroken run, made once
POINTS = {
    "dense": (0, 1, 0),
    "between states": (1, 0, 0),
    "before the cut": (1, 1, 0),
    "after the cut": (1, 3, 0),
    "within an epoch": (2, 2, 1),
}


@pytest.mark.parametrize(
    ("kind", "point"),
    [(kind, point) for kind in ("elementwise", "structured") for point in POINTS]
    + [("adamw", "before the cut"), ("adamw", "after the cut"), ("rewind", "dense"), ("rewind", "between states")]
    + [("gradient", "before the cut"), ("gradient", "between states")],
)
def test_a_broken_run_ends_with_the_bits_of_an_unbroken_one(kind, point, run, broken):
    flags = (*RESUMABLE[kind], "--epochs", "4", "--reg_finish", "0.5")
    if kind not in WHOLE:
        WHOLE[kind] = outcome(run(*flags, name="whole"))
    half = broken(POINTS[point], *flags)
    state, epoch, _ = POINTS[point]
    assert len(metrics(half.dir)) == 4 * state + epoch
    assert half.err.count("\n") == 1
    assert "--resume" in half.err
    again = run("--resume", name="broken", base=())
    assert_same_outcome(outcome(again), WHOLE[kind])
    assert len(metrics(again.dir)) == 12


def test_a_run_can_go_on_from_a_checkpoint_file_and_say_its_flags_again(run, broken, tmp_path, capsys):
    flags = ("--struct", "rsst", *BOTH)
    whole = outcome(run(*flags, name="whole"))
    half = broken((1, 1, 0), *flags)
    assert call(["--checkpoint", half.dir / "checkpoint.pt", *BASE, *flags]) == 0
    assert_same_outcome(outcome(half), whole)


def test_a_finished_run_resumes_to_itself(run):
    done = run("--struct", "refill")
    before = {name: sha(done.dir / name) for name in FILES - {"run.log"}}
    again = run("--resume", base=())
    assert {name: sha(done.dir / name) for name in FILES - {"run.log"}} == before
    assert "Remaining weights" in again.out


@pytest.mark.parametrize(
    "flag", [("--lr", "0.5"), ("--rate", "0.4"), ("--seed", "1"), ("--struct", "imp"), ("--fc",)], ids=label
)
def test_resume_with_another_flag_is_refused_by_name(flag, run, broken):
    half = broken((1, 1, 0))
    before = {name: sha(half.dir / name) for name in os.listdir(half.dir)}
    refused = run("--resume", *flag, name="broken", base=(), code=2)
    assert refused.err.count("\n") == 1
    assert all(part in refused.err for part in flag)
    assert {name: sha(half.dir / name) for name in os.listdir(half.dir)} == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, broken):
    flags = ("--struct", "rsst", "--epochs", "4")
    whole = outcome(run(*flags, name="whole"))
    half = broken((1, 2, 0), *flags)
    latest = half.dir / "checkpoint.pt"
    latest.write_bytes(latest.read_bytes()[: latest.stat().st_size // 2])
    again = run("--resume", name="broken", base=())
    assert "resumed at state 1, step 3" in log_of(again.dir)
    assert_same_outcome(outcome(again), whole)


def test_a_changed_rewind_file_is_refused(run, broken):
    half = broken((1, 1, 0))
    weights = load(half.dir / "init.pt")
    weights["head.bias"] += 1
    torch.save(weights, half.dir / "init.pt")
    refused = run("--resume", name="broken", base=(), code=2)
    assert refused.err.count("\n") == 1
    assert "init.pt" in refused.err


def test_save_dir_of_another_run_needs_overwrite(run):
    first = run("--pruning_times", "1")
    before = {name: sha(first.dir / name) for name in FILES}
    refused = run("--pruning_times", "1", "--seed", "5", code=2)
    assert refused.err.count("\n") == 1
    assert str(first.dir) in refused.err
    assert "--overwrite" in refused.err
    assert {name: sha(first.dir / name) for name in FILES} == before
    again = run("--pruning_times", "1", "--epochs", "1", "--seed", "5", "--overwrite")
    assert len(metrics(again.dir)) == 1
    assert yaml.safe_load((again.dir / "args.yaml").read_text())["seed"] == 5
    assert "seed 42" not in log_of(again.dir)


def test_the_default_folder_is_named_after_the_run(capsys):
    flags = [*BASE, "--pruning_times", "1", "--epochs", "1"]
    assert call([*flags, "--criteria", "magnitude", "--vit_structured"]) == 0
    (name,) = os.listdir("results")
    assert re.fullmatch(r"rsst_vit_micro_digits_crit_magnitude_rate_0.3_struct_head_\d{4}_\d{4}", name)
    for _ in range(3):
        assert call([*flags, "--exp_name", "mine"]) == 0
    assert set(os.listdir("results")) == {name, "mine", "mine_2", "mine_3"}


# -------------------------------------------------------------------------------------------------------- more flags


def test_no_refill_keeps_the_elementwise_mask_inside_survivors(run, starts):
    done = run("--struct", "refill", *BOTH, "--no-refill", "--mlp_prune_ratio", "0.25")
    for state in (1, 2):
        now = starts[state]
        for name, mask in now.masks.items():
            assert not (mask > now.elementwise[name]).any()
        # units of the state before count; a removed unit is pruned
        heads, neurons = ((HEADS, HIDDEN), (kept_of(HEADS, 1 - 0.7**0.5), kept_of(HIDDEN, 1 - 0.75**0.5)))[state - 1]
        total = DEPTH * (heads * HEAD_WEIGHTS + neurons * NEURON_WEIGHTS)
        assert sum(int(mask.sum()) for mask in now.elementwise.values()) == round(total * 0.7**state)
        for block in range(DEPTH):
            alive = [row for row in range(3 * DIM) if row not in dead_rows("attn", now.kept[f"blocks.{block}.attn"])]
            layer = f"blocks.{block}.attn.qkv"
            assert torch.equal(now.masks[layer][alive], now.elementwise[layer][alive])
        density = sum(int(mask.sum()) for mask in now.masks.values()) / PRUNABLE
        assert float(rows_of(done.dir / "states.csv")[state]["density"]) == density


def test_no_refill_leaves_untargeted_layers_whole(run, starts):
    run("--struct", "refill", "--vit_structured", "--vit_prune_target", "head", "--no-refill")
    for name, mask in starts[2].masks.items():
        assert mask.all() == (".mlp." in name)


@pytest.mark.parametrize("criteria", ["remain", "l2", "saliency", "random"])
def test_other_criteria_run(criteria, run):
    done = run("--struct", "rsst", *BOTH, "--criteria", criteria, "--epochs", "1")
    assert f"prunes by {criteria}" in log_of(done.dir)
    assert int(rows_of(done.dir / "states.csv")[2]["heads"]) == DEPTH * kept_of(HEADS, 0.3)


@pytest.mark.parametrize("method", ["rsst", "refill"])
@pytest.mark.parametrize("sorting", ["layer-wise", "global"])
def test_a_removed_unit_stays_removed_under_a_criterion_of_ones_own(sorting, method, run, starts, monkeypatch):
    """The smallest units are the best ones here, and nothing is smaller than a removed one."""
    monkeypatch.setitem(entry.CRITERIA, "smallest", lambda weights: -weights.abs().sum(1))
    flags = ("--criteria", "smallest", "--sorting_mode", sorting, "--rate", "0.6", "--pruning_times", "4")
    done = run("--struct", method, *BOTH, *flags)
    kept = [starts[state].kept for state in range(4)] + [load(done.dir / "best.pt")["kept"]]
    for before, after in itertools.pairwise(kept):
        assert all(set(after[layer]) <= set(before[layer]) for layer in before)
    ids = [(layer, unit) for layer, units in kept[-1].items() for unit in units]
    assert len(ids) == (DEPTH * (1 + 19) if sorting == "layer-wise" else 3 + 38)


@pytest.mark.parametrize("method", ["rsst", "refill"])
def test_score_per_mac_removes_the_macs_of_both_quotas(method, run):
    flags = words("--rank_by score_per_mac --sorting_mode global --rate 0.5 --mlp_prune_ratio 0.5")
    done = run("--struct", method, *BOTH, *flags)
    head = 4 * TOKENS * DIM * HEAD_DIM + 2 * TOKENS * TOKENS * HEAD_DIM
    neuron = 2 * TOKENS * DIM
    row = rows_of(done.dir / "states.csv")[2]
    gone = (DEPTH * HEADS - int(row["heads"])) * head + (DEPTH * HIDDEN - int(row["neurons"])) * neuron
    quota = DEPTH * (HEADS // 2 * head + HIDDEN // 2 * neuron)
    assert quota <= gone < quota + head


def test_a_layer_may_empty_with_min_units_0(run):
    flags = words("--min_units 0 --sorting_mode global --rate 0.9 --mlp_prune_ratio 0.95")
    for method in ("rsst", "refill"):
        done = run("--struct", method, *BOTH, *flags, name=method)
        row = rows_of(done.dir / "states.csv")[2]
        assert int(row["heads"]) == math.floor(DEPTH * HEADS * 0.1 + 1e-9) == 0
        assert int(row["neurons"]) == math.floor(DEPTH * HIDDEN * 0.05 + 1e-9)
        assert_whole(done, states=3, epochs=2)


def test_global_sorting_leaves_each_layer_a_unit(run):
    done = run("--struct", "refill", *BOTH, "--sorting_mode", "global", "--rate", "0.9", "--mlp_prune_ratio", "0.99")
    kept = load(done.dir / "best.pt")["kept"]
    assert all(len(ids) >= 1 for ids in kept.values())
    assert int(rows_of(done.dir / "states.csv")[2]["heads"]) == DEPTH


@pytest.mark.parametrize("flag", ["--conv1", "--prune_patch_embed"])
def test_the_patch_embedding_counts_when_asked(flag, run):
    done = run("--struct", "imp", flag)
    total = PRUNABLE + 3 * 64 * DIM
    for state, row in enumerate(rows_of(done.dir / "states.csv")):
        assert float(row["density"]) == round(total * 0.7**state) / total
    weights = load(done.dir / "checkpoint.pt")["weights"]
    names = [*LAYERS, "patch_embed.proj"]
    assert sum(int((weights[f"{name}.weight"] != 0).sum()) for name in names) == round(total * 0.49)
    assert (weights["patch_embed.proj.weight"] == 0).any()
    assert "patch_embed.proj.weight_mask" in done.out


@pytest.mark.parametrize("clock", ["epoch", "state"])
@pytest.mark.parametrize("strength", [0.5, 60.0])
def test_the_gradient_form_logs_the_dose_it_will_reach(clock, strength, run):
    flags = words("--reg_form gradient --epochs 4 --warmup 1 --decreasing_lr 3 --RST_schedule x --print_freq 1")
    chosen = () if clock == "epoch" else ("--reg_clock", "state")  # epoch is the default
    done = run("--struct", "rsst", *flags, *chosen, "--reg_granularity_prune", strength, "--pruning_times", "2")
    rates = [0.05 / 3, 0.1 / 3, 0.05] + [0.05] * 6 + [0.005] * 3
    period = STEPS if clock == "epoch" else 12
    lambdas = [strength * (k % period + 1) / period for k in range(12)]
    doses = list(itertools.accumulate(rate * lam / (1 - 0.9) for rate, lam in zip(rates, lambdas, strict=True)))
    found = re.search(r"predicted dose (\S+) over this state, (.*)", log_of(done.dir))
    assert float(found[1]) == pytest.approx(doses[-1], rel=6e-3)
    passes = next((step for step, dose in enumerate(doses, start=1) if dose >= 5), None)
    if passes:
        assert found[2] == f"it passes 5 at step {passes} of 12"
    assert (passes is None) == (strength == 0.5)
    assert ("dose below 5" in log_of(done.dir)) == (passes is None)
    lines = batch_lines(done.dir, 1)
    for step in range(1, 13):  # to the end of the state
        assert f"lambda {lambdas[step - 1]:.4g}  dose" in lines[step]
    assert "cut at step 12" in log_of(done.dir)
    assert float(rows_of(done.dir / "states.csv")[1]["density"]) == round(PRUNABLE * 0.7) / PRUNABLE


def test_the_dose_of_adamw_is_unknown(run):
    done = run("--struct", "rsst", "--reg_form", "gradient", "--opt", "adamw", "--lr", "0.001", "--print_freq", "1")
    assert "dose is unknown" in log_of(done.dir)
    assert "predicted dose" not in log_of(done.dir)
    assert re.search(r"lambda \S+  dose unknown  residual", log_of(done.dir))


def test_without_the_loss_sgd_shrinks_by_about_the_predicted_dose(run):
    """Momentum off: each step multiplies by 1 - lr lambda exactly, so the residual is their product."""
    flags = (
        "--reg_form gradient --block_loss_grad --weight_decay 0 --momentum 0 --decreasing_lr 3 --warmup 0 --epochs 4"
    )
    done = run("--struct", "rsst", *words(flags), "--RST_schedule", "x", "--reg_clock", "state", "--pruning_times", "2")
    rates = [0.05] * 9 + [0.005] * 3
    product = math.prod(1 - rate * (k + 1) / 12 for k, rate in enumerate(rates))
    assert float(rows_of(done.dir / "states.csv")[1]["residual"]) == pytest.approx(product, rel=1e-4)


def test_blocking_the_loss_leaves_survivors_their_gradient(run, watch):
    seen = []

    def look(job, *_):
        if job.penalty:
            for name, doomed in zip(job.penalty.names, job.penalty.doomed, strict=True):
                gradient = job.model.get_parameter(name).grad
                assert not gradient[doomed == 1].any()
                seen.append(bool(gradient[(doomed == 0)].any()))

    watch.after("mask_weights", look)
    run("--struct", "rsst", "--block_loss_grad", "--epochs", "4")
    assert seen
    assert all(seen)


def test_bf16_runs_and_keeps_weights_in_float32(run, watch):
    types = set()
    watch.after("train_step", lambda job, *_: types.update(p.dtype for p in job.model.parameters()))
    done = run("--struct", "rsst", *BOTH, "--amp", "bf16")
    assert types == {torch.float32}
    assert_whole(done, states=3, epochs=2)
    plain = run("--struct", "rsst", *BOTH, "--amp", "off", name="plain")
    assert largest_difference(load(done.dir / "init.pt"), load(plain.dir / "init.pt")) == 0
    assert metrics(done.dir, TIMES) != metrics(plain.dir, TIMES)


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_initial_weights_from_a_file(nested, run, noisy_init, tmp_path):
    _, noisy = noisy_init
    path = tmp_path / "nested.pt"
    torch.save(noisy if nested is None else {nested: noisy}, path)
    done = run("--init", path, "--pruning_times", "1", "--epochs", "1")
    assert_same_tensors(load(done.dir / "init.pt"), noisy)


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
    weights = vit_micro(num_classes=10).state_dict()
    weights["norm.bias"] = torch.ones(25)
    torch.save(weights, folder / "shape.pt")
    (folder / "plain.txt").write_text("a file, no folder")
    for name in ("damaged", "code", "other"):
        (folder / name).mkdir()
        shutil.copy(folder / f"{name}.pt", folder / name / "checkpoint.pt")
    return folder


# flags, then what the one line has to name
BAD = [
    ("--rate 1", "--rate 1"),
    ("--rate -0.1", "--rate -0.1"),
    ("--rate nan", "--rate nan"),
    ("--rate much", "--rate much"),
    ("--mlp_prune_ratio 1", "--mlp_prune_ratio 1"),
    ("--fillback_rate 1.5", "--fillback_rate 1.5"),
    ("--momentum 1", "--momentum 1"),
    ("--label_smoothing 1", "--label_smoothing 1"),
    ("--decreasing_lr 8,4", "--decreasing_lr 8,4"),
    ("--decreasing_lr 4,4", "--decreasing_lr 4,4"),
    ("--decreasing_lr 0,4", "--decreasing_lr 0,4"),
    ("--decreasing_lr 1.5", "--decreasing_lr 1.5"),
    ("--decreasing_lr half", "--decreasing_lr half"),
    ("--epochs 0", "--epochs 0"),
    ("--epochs 1.5", "--epochs 1.5"),
    ("--batch_size 0", "--batch_size 0"),
    ("--pruning_times 0", "--pruning_times 0"),
    ("--print_freq 0", "--print_freq 0"),
    ("--score_batches 0", "--score_batches 0"),
    ("--train_limit 0", "--train_limit 0"),
    ("--val_fraction 0", "--val_fraction 0"),
    ("--val_fraction 1", "--val_fraction 1"),
    ("--val_fraction 0.9999", "--val_fraction 0.9999"),
    ("--workers -1", "--workers -1"),
    ("--gpu -1", "--gpu -1"),
    ("--seed -1", "--seed -1"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999"),
    ("--lr 0", "--lr 0"),
    ("--lr nan", "--lr nan"),
    ("--lr inf", "--lr inf"),
    ("--weight_decay -1", "--weight_decay -1"),
    ("--warmup -1", "--warmup -1"),
    ("--clip_grad 0", "--clip_grad 0"),
    ("--reg_granularity_prune 0", "--reg_granularity_prune 0"),
    ("--exponents 0", "--exponents 0"),
    ("--reg_finish 0", "--reg_finish 0"),
    ("--reg_finish 1.1", "--reg_finish 1.1"),
    ("--prune_type rewind_lt --rewind_epoch 2", "--rewind_epoch 2"),
    ("--rewind_epoch -1", "--rewind_epoch -1"),
    ("--vit_structured --min_units 5", "--min_units 5"),
    ("--vit_structured --vit_prune_target mlp --min_units 49", "--min_units 49"),
    ("--min_units -1", "--min_units -1"),
    ("--img_size 17", "img_size 17"),
    ("--patch_size 5", "patch_size 5"),
    ("--img_size 0", "--img_size 0"),
    ("--patch_size 0", "--patch_size 0"),
    ("--dataset mnist", "--dataset mnist"),
    ("--arch vit_huge", "--arch vit_huge"),
    ("--criteria taylor", "--criteria taylor"),
    ("--struct hard", "--struct hard"),
    ("--prune_type nothing", "--prune_type nothing"),
    ("--RST_schedule y", "--RST_schedule y"),
    ("--struct oneshot", "--struct oneshot"),
    ("--prune_type pt", "--prune_type pt"),
    ("--reg_clock state", "--reg_clock state"),
    ("--vit_structured --rank_by score_per_mac", "--rank_by score_per_mac"),
    ("--device cuda", "--device cuda"),
    ("--amp fp16", "--amp fp16"),
    ("--resume", "--resume"),
    ("--frobnicate 3", "--frobnicate"),
    ("--epoch 3", "--epoch"),  # no abbreviations: they would change meaning when flags are added
    ("--resume --save_dir {files}/none", "{files}/none"),
    ("--resume --save_dir {files}/damaged", "{files}/damaged"),
    ("--resume --save_dir {files}/code", "{files}/code"),
    ("--resume --save_dir {files}/other", "{files}/other"),
    ("--checkpoint {files}/none.pt", "{files}/none.pt"),
    ("--checkpoint {files}/damaged.pt", "{files}/damaged.pt"),
    ("--checkpoint {files}/code.pt", "{files}/code.pt"),
    ("--checkpoint {files}/other.pt", "{files}/other.pt"),
    ("--init {files}/none.pt", "--init {files}/none.pt"),
    ("--init {files}/damaged.pt", "{files}/damaged.pt"),
    ("--init {files}/code.pt", "{files}/code.pt"),
    ("--init {files}/list.pt", "{files}/list.pt"),
    ("--init {files}/other.pt", "--init {files}/other.pt"),
    ("--init {files}/shape.pt", "--init {files}/shape.pt"),
    ("--init {files}/plain.txt", "{files}/plain.txt"),
    ("--init {files}/none.safetensors", "{files}/none.safetensors"),
    ("--pretrained {files}/none.pt", "pretrained.*{files}/none.pt"),
    ("--pretrained {files}/damaged.pt", "pretrained.*{files}/damaged.pt"),
    ("--pretrained {files}/shape.pt", "pretrained.*{files}/shape.pt"),
    ("--save_dir {files}/plain.txt", "--save_dir {files}/plain.txt"),
    ("--save_dir {files}/plain.txt/below", "--save_dir {files}/plain.txt/below"),
    ("--data {files}/none --dataset fashionmnist", "{files}/none"),
    ("--data {files}/plain.txt --dataset cifar10", "{files}/plain.txt"),
]


def tree(folder):
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture
def no_network(monkeypatch):
    def blocked(*_, **__):
        raise OSError("the test has no network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, blocked)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("flags", "named"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_that_names_it(flags, named, files, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resuming = "--resume" in flags or "--checkpoint" in flags
    argv = flags.format(files=files).split()
    before = tree(files)
    capsys.readouterr()
    assert call(argv if resuming else [*BASE, *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    flag, *value = named.format(files=re.escape(str(files))).split()
    pattern = rf"{flag}\b" + "".join(rf".*{part if 'files' in named else re.escape(part)}" for part in value)
    assert re.search(pattern.replace("-0", "-?0"), err), err
    assert os.listdir() == []  # nothing is left behind, and no code of a checkpoint has run
    assert tree(files) == before


def command(*argv, cwd, env=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=120, env=environment
    )


def test_bad_input_through_the_real_command_line(tmp_path):
    done = command("--rate", "1.2", "--dataset", "digits", cwd=".")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert re.match(r"main_imp_fillback.py: error: .*--rate 1.2", done.stderr)
    assert os.listdir() == []


def test_checkpoints_that_are_all_damaged_are_one_line(tmp_path):
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (tmp_path / name).write_bytes(b"nothing that loads")
    done = command("--resume", "--save_dir", tmp_path, cwd=".")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(tmp_path) in done.stderr


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashionmnist"])
def test_no_network_and_no_data_on_disk(name, capsys):
    pytest.importorskip("torchvision")
    started = time.perf_counter()
    assert call(["--dataset", name, "--device", "cpu", "--save_dir", "out"]) == 2
    assert time.perf_counter() - started < 20  # at once: no waiting for time-outs or retries
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert f"--dataset {name}" in err
    assert "data" in err
    assert os.listdir() == []


# ------------------------------------------------------------------------------------------------- a loss that explodes


@pytest.mark.parametrize("method", [(), BOTH], ids=label)
def test_a_loss_that_is_not_finite_stops_the_run(method, run):
    done = run("--lr", "1e30", *method, code=1)
    assert done.err.count("\n") == 1, done.err
    assert "not finite" in done.err
    assert "step 1 of state 0" in done.err  # the first step's loss is still fine
    assert not (done.dir / "checkpoint.pt").exists()
    assert not (done.dir / "metrics.jsonl").exists()


def test_the_last_good_checkpoint_stays(run, watch):
    def explode(job, epoch, batch):
        if (job.run.state, epoch, batch) == (1, 1, 1):
            with torch.no_grad():
                job.model.head.weight.fill_(math.inf)

    watch.before("train_step", explode)
    done = run(code=1)
    assert "step 4 of state 1" in done.err
    checkpoint = load(done.dir / "checkpoint.pt")
    assert (checkpoint["run"]["state"], checkpoint["run"]["step"]) == (1, 3)
    assert all(tensor.isfinite().all() for tensor in checkpoint["weights"].values())
    assert len(metrics(done.dir)) == 3


@pytest.mark.parametrize("method", [("imp",), ("refill", *BOTH), ("rsst", *BOTH)], ids=label)
def test_weights_that_explode_in_the_last_step_stop_the_run_too(method, run):
    """One step in the state: its loss was fine, its weights are not, and no further loss of this state shows it."""
    done = run("--lr", "1e38", "--struct", *method, "--train_limit", "20", "--epochs", "1", code=1)
    assert done.err.count("\n") == 1, done.err
    assert "finite" in done.err


# ------------------------------------------------------------------------------------------------ the real command line


@pytest.mark.parametrize("method", ["rsst", "refill", "imp", "dense", "oneshot --vit_structured"])
def test_smoke_through_the_real_command_line(method, tmp_path):
    flags = "--dataset digits --img_size 8 --train_limit 40 --batch_size 20 --epochs 1 --pruning_times 2 --rate 0.34"
    fixed = ("--device", "cpu", "--amp", "off", "--save_dir", tmp_path / "run")
    done = command(*words(flags), *fixed, "--struct", *words(method), cwd=".")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = rows_of(tmp_path / "run" / "states.csv")
    assert len(rows) == (1 if method == "dense" else 2)
    if method in ("rsst", "refill", "imp"):
        assert float(rows[1]["density"]) == round(2_654_208 * 0.66) / 2_654_208
    elif method != "dense":
        assert rows[1]["heads"] == "9"  # floor(3 x 0.66) = 1 of three in each of nine blocks
    assert "[ViT Sparsity Report]" in done.stdout
    assert "blocks.8.mlp.fc2.weight_mask           | Sparsity: " in done.stdout
    left = set(os.listdir(tmp_path / "run"))
    assert left >= {*FILES, "model"}
    assert not [name for name in left if name.startswith(".")]
    assert set(os.listdir(tmp_path / "run" / "model")) >= {
        "model.safetensors",
        "config.json",
        "parity.json",
        "README.md",
    }
    assert os.listdir() == []
