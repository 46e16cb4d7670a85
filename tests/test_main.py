"""Laws of a run: what it leaves, where its states start, what never moves, and that it can be broken off anywhere.

Runs are real ones through `main([...])`: scikit-learn's digits and a Vision Transformer of two small blocks. Most are
made once (RUNS) and looked at by many tests.
"""

import csv
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from micro import (
    BOTH,
    DEPTH,
    DIM,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    MICRO,
    STEPS,
    TOKENS,
    WHOLE,
    call,
    masks_of,
    record,
    runner,
    vit_micro,
)  # fmt: skip

import main_imp_fillback as entry
import rsst

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "main_imp_fillback.py"

# What the parts of the micro model hold, by hand.
HEAD_WEIGHTS, NEURON_WEIGHTS = 4 * DIM * HEAD_DIM, 2 * DIM
PRUNABLE = DEPTH * (HEADS * HEAD_WEIGHTS + HIDDEN * NEURON_WEIGHTS)
PATCH_EMBED = 3 * 8 * 8 * DIM
PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LAYERS = [f"blocks.{block}.{part}" for block in range(DEPTH) for part in PARTS]
TIMES = ("seconds", "images_per_second")
words = str.split

RUNS = {
    "rsst": "--struct rsst --init {noisy} --epochs 4 --reg_finish 0.5 --RST_schedule x^2 --reg_granularity_prune 0.4 "
    "--print_freq 1",
    "rsst units": "--struct rsst {both} --fc --init {noisy} --epochs 4 --reg_finish 0.5 --RST_schedule x --rate 0.5 "
    "--weight_decay 0.01 --print_freq 2",
    "rsst adamw": "--struct rsst {both} --rate 0.5 --opt adamw --lr 0.005 --clip_grad 0.5 --no-compact_training "
    "--criteria l2 --reg_finish 0.75 --epochs 4",
    "rsst rewound": "--struct rsst {both} --prune_type rewind_lt --rewind_epoch 1 --fc --criteria saliency --amp bf16",
    "rsst pretrained": "--struct rsst --prune_type pt --pretrained {noisy} --fc --conv1 --verbose",
    "refill": "--struct refill --fillback_rate 0.4 --init {noisy} --rate 0.15 --pruning_times 4",
    "refill rewound": "--struct refill --prune_type rewind_lt --rewind_epoch 1 --fillback_rate 0.4 --opt adamw "
    "--lr 0.01 --weight_decay 0.01",
    "refill finetuned": "--struct refill --prune_type finetune --fillback_rate 0.4 --init {noisy}",
    "refill pretrained": "--struct refill --vit_structured --rate 0.5 --prune_type pt --pretrained {noisy} "
    "--ratio_schedule linear --sched cosine --warmup 1 --criteria remain",
    "refill units": "--struct refill {both} --prune_type finetune --init {noisy} --no-compact_training",
    "imp": "--struct imp --prune_type rewind_lt --rewind_epoch 0 --fc --init {noisy} --decreasing_lr 1,80,120",
    "imp units": "--struct imp --vit_structured --vit_prune_target mlp --ratio_schedule constant",
    "oneshot": "--struct oneshot {both} --rate 0.5 --mlp_prune_ratio 0.3 --no-compact_training",
    "emptied": "--struct rsst {both} --min_units 0 --sorting_mode global --rate 0.9 --mlp_prune_ratio 0.95",
    "no refill": "--struct refill {both} --no-refill --mlp_prune_ratio 0.25",
    "dense": "--struct dense --decreasing_lr 1 --warmup 0",
    "one state": "--pruning_times 1",
}


@pytest.fixture(autouse=True)
def _in_house(house, monkeypatch):
    monkeypatch.setattr(entry.report, "write", lambda _: None)  # pictures take longer than these runs


@pytest.fixture
def run(tmp_path, capsys):
    return runner(tmp_path, capsys, MICRO)


@pytest.fixture(scope="session")
def noisy(tmp_path_factory):
    """A file of initial weights without the zeros and ones that biases and norms start from."""
    generator = torch.Generator().manual_seed(9)
    weights = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in vit_micro().state_dict().items()}
    path = tmp_path_factory.mktemp("noisy") / "noisy.pt"
    torch.save(weights, path)
    return path


@pytest.fixture
def done(seen, noisy):
    """done("imp") -> what was seen of that run of RUNS."""

    def look(name):
        found = seen(*words(RUNS[name].format(noisy=noisy, both=" ".join(BOTH))))
        found.args = yaml.safe_load((found.dir / "args.yaml").read_text())
        return found

    return look


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [float(row[name]) for row in rows_of(folder / "states.csv")]


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


def surviving(weights, names=LAYERS):
    return sum(int((weights[f"{name}.weight"] != 0).sum()) for name in names)


def dead_rows(layer, kept):
    """Rows of qkv, or of fc1, that belong to units which are gone."""
    if layer.endswith("attn"):
        gone = [head for head in range(HEADS) if head not in kept]
        return [c * DIM + head * HEAD_DIM + i for c in range(3) for head in gone for i in range(HEAD_DIM)]
    return [neuron for neuron in range(HIDDEN) if neuron not in kept]


def masked(weights, masks, kept):
    """weights x mask, with the biases of units that are gone, by hand."""
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for name, mask in masks.items():
        expected[f"{name}.weight"] *= mask
    for layer, ids in kept.items():
        rows = "qkv" if layer.endswith("attn") else "fc1"
        expected[f"{layer}.{rows}.bias"][dead_rows(layer, ids)] = 0
    return expected


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


SHARES = {
    "geometric": lambda ratio, progress: 1 - (1 - ratio) ** progress,
    "linear": lambda ratio, progress: ratio * progress,
    "constant": lambda ratio, progress: ratio if progress else 0.0,
}


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
        reg_form decay, reg_finish 0.25, score_batches 10, min_units 1, val_fraction 0.1, compact_training True,
        rank_by score, opt sgd, sched multistep, device auto, amp auto, refill True, export True, accum_steps 1,
        vit_structured False, fc False, prune_patch_embed False, pretrained False, block_loss_grad False,
        resume False, dry_run False, decreasing_lr 60|90, clip_grad None, compile None"""
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


def test_help_has_its_groups_and_every_flag(capsys):
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    for group in ("run", "data", "model", "training", "pruning", "rsst", "tracking"):
        assert re.search(rf"^{group}\b.*:$", text, re.MULTILINE), group
    for flag in [*(words(flag)[0] for flag, _ in OLDER_FLAGS), "--resume", "--checkpoint"]:
        assert re.search(rf"(^|[\s,\[]){flag}\b", text), flag


@pytest.mark.parametrize("module", ["main_imp_fillback", "conftest"])
def test_threads_that_wait_do_not_spin_unless_the_user_wants_it(module, tmp_path):
    """The variable is read when torch loads; here its place is taken by a file that tells what it finds and ends."""
    (tmp_path / "torch.py").write_text("import os, sys\nsys.exit(os.environ['OMP_WAIT_POLICY'])\n")
    paths = os.pathsep.join(map(str, [REPOSITORY, REPOSITORY / "tests"]))
    for given, found in ((None, "passive"), ("active", "active")):
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": given}
        environment = {name: value for name, value in environment.items() if value is not None}
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], cwd=tmp_path, capture_output=True, text=True, env=environment
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
    assert present - {"run.lock", "tracking.json"} == FILES | {file for file, there in optional.items() if there}
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
    precision = {"off": "float32", "bf16": "bf16"}[args["amp"]]
    assert (environment["device"], environment["precision"]) == ("cpu", precision)
    # the best of the last state, among epochs that end when nothing is doomed any more
    best, ends = load(folder / "best.pt"), [row for row in rows if row["state"] == states - 1]
    assert best["state"] == states - 1
    assert best["accuracy"] == ends[best["epoch"]]["val_accuracy"] == float(table[-1]["best_accuracy"])
    assert_same_tensors(best["weights"], seen.epochs[states - 1, best["epoch"]].weights)
    for (state, epoch), ended in seen.epochs.items():
        allowed = [row for row in rows if row["state"] == state and row["epoch"] <= epoch]
        allowed = [row["val_accuracy"] for row in allowed if not seen.epochs[state, row["epoch"]].penalised]
        assert ended.best.get("accuracy") == max(allowed, default=None)
    for state, row in enumerate(table):
        assert float(row["accuracy_trained"]) == rows[(state + 1) * epochs - 1]["val_accuracy"]
    # the checkpoint goes on from the last weights, whatever was tested
    assert_same_tensors(load(folder / "checkpoint.pt")["weights"], seen.ends[states - 1])
    assert f"state {states - 1} done: density {100 * float(table[-1]['density']):.2f}%" in seen.log


def asked(schedule, ratio, state, states):
    return SHARES[schedule](ratio, state / (states - 1))


def kept_of(count, share):
    return max(1, math.floor(count * (1 - share) + 1e-9))


@pytest.mark.parametrize(
    ("name", "rate", "returned"),
    [("rsst", 0.3, 0), ("refill", 0.15, 0.4), ("imp", 0.3, 0), ("refill finetuned", 0.3, 0.4), ("one state", 0.3, 0)]
    + [("dense", 0.3, 0), ("rsst pretrained", 0.3, 0)],
)
def test_elementwise_densities_are_exact(name, rate, returned, done):
    seen = done(name)
    names = [*LAYERS, "patch_embed.proj"] if name == "rsst pretrained" else LAYERS  # --conv1
    total = PRUNABLE + PATCH_EMBED * (len(names) > len(LAYERS))
    assert sum(mask.numel() for mask in seen.starts[0].masks.values()) == total
    for state, row in enumerate(rows_of(seen.dir / "states.csv")):
        left, now = round(total * (1 - rate) ** state), seen.steps[state, max(s for t, s in seen.steps if t == state)]
        # what fillback returns does not count as left by the element-wise step
        assert sum(int(mask.sum()) for mask in now.elementwise.values()) == left
        trained = left + sum(int(int((mask == 0).sum()) * returned + 1e-9) for mask in now.elementwise.values())
        assert float(row["density"]) == trained / total
        assert int(row["parameters"]) == WHOLE - (total - trained)
        assert (int(row["heads"]), int(row["neurons"])) == (DEPTH * HEADS, DEPTH * HIDDEN)
        assert f"state {state} prunes to density {100 * left / total:.2f}%, trains {100 * trained / total:.2f}%" in (
            seen.log if state else f"state 0 prunes to density {100:.2f}%, trains {100:.2f}%"
        )
    assert f"Remaining weights: {100 * trained / total:.2f}%" in seen.out
    for file, key in (("checkpoint.pt", "weights"), ("best.pt", "weights")):
        weights = load(seen.dir / file)[key]
        assert surviving(weights, names) <= trained
        assert (weights["patch_embed.proj.weight"] == 0).any() == (len(names) > len(LAYERS))
    if name != "refill finetuned":
        assert surviving(seen.ends[state], names) == trained
    units = rows_of(seen.dir / "units.csv")
    assert sum(int(row["kept"]) for row in units if int(row["state"]) == state) == trained
    assert {row["kind"] for row in units} == {"weight"}


UNITS = [("rsst units", "both", "geometric", 0.5, 0.5), ("refill pretrained", "head", "linear", 0.5, 0),
         ("imp units", "mlp", "constant", 0, 0.3), ("oneshot", "both", "constant", 0.5, 0.3)]  # fmt: skip


@pytest.mark.parametrize(("name", "target", "schedule", "head_ratio", "neuron_ratio"), UNITS)
def test_structured_states_keep_what_the_ratios_say(name, target, schedule, head_ratio, neuron_ratio, done):
    seen = done(name)
    for state, row in enumerate(rows_of(seen.dir / "states.csv")):
        heads = kept_of(HEADS, asked(schedule, head_ratio, state, 3))
        neurons = kept_of(HIDDEN, asked(schedule, neuron_ratio, state, 3))
        assert (int(row["heads"]), int(row["neurons"])) == (DEPTH * heads, DEPTH * neurons)
        assert float(row["density"]) == DEPTH * (heads * HEAD_WEIGHTS + neurons * NEURON_WEIGHTS) / PRUNABLE
        gone = DEPTH * ((HEADS - heads) * (HEAD_WEIGHTS + 3 * HEAD_DIM) + (HIDDEN - neurons) * (NEURON_WEIGHTS + 1))
        assert int(row["parameters"]) == WHOLE - gone
        attention = 3 * TOKENS * DIM * HEAD_DIM + 2 * TOKENS * TOKENS * HEAD_DIM + TOKENS * HEAD_DIM * DIM
        macs = 4 * PATCH_EMBED + DEPTH * (heads * attention + neurons * 2 * TOKENS * DIM) + DIM * 10
        assert int(row["macs"]) == macs
        units = [row for row in rows_of(seen.dir / "units.csv") if int(row["state"]) == state]
        assert {(row["kind"], row["kept"], row["total"]) for row in units} == {
            ("head", str(heads), str(HEADS)), ("neuron", str(neurons), str(HIDDEN))
        } - ({("neuron", str(neurons), str(HIDDEN))} if target == "head" else set()) - (
            {("head", str(heads), str(HEADS))} if target == "mlp" else set()
        )  # fmt: skip
    # whole units are zero, and survivors are whole, in what the run ends with
    weights, kept = load(seen.dir / "checkpoint.pt")["weights"], load(seen.dir / "best.pt")["kept"]
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


def test_a_layer_may_empty_with_min_units_0(done):
    row = rows_of(done("emptied").dir / "states.csv")[2]
    assert int(row["heads"]) == math.floor(DEPTH * HEADS * 0.1 + 1e-9) == 0
    assert int(row["neurons"]) == math.floor(DEPTH * HIDDEN * 0.05 + 1e-9)


def test_the_log_says_by_what_is_pruned_and_what_has_no_effect(done):
    criteria = {"rsst units": "l1", "rsst adamw": "l2", "rsst rewound": "saliency", "refill pretrained": "remain"}
    for name, criterion in {**criteria, "imp units": "magnitude"}.items():
        assert done(name).args["criteria"] == criterion
        assert f"state 2 prunes by {criterion}:" in done(name).log
    for name in ("dense", "one state"):
        assert "trains dense" in done(name).log
        assert column(done(name).dir, "density") == [1.0]
    assert len(re.findall(r"--decreasing_lr: epoch (80|120) lies beyond", done("imp").log)) == 2
    assert "--warmup 3" in entry.parse_args(words("--epochs 2 --warmup 3")).notes[-1]


def test_the_learning_rate_starts_anew_in_every_state(done):
    """The shape itself is a law of the schedule; see test_engine.py."""
    milestones = [0.05] * 3 + [0.005] * 3
    assert [step.rate for step in done("refill units").steps.values()] == pytest.approx(milestones * 3, rel=1e-6)
    # the milestone of a dense run moves from epoch 1 to 3
    rates = [row["lr"] for row in metrics(done("dense").dir)]
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 3)
    cosine = [0.05 * (k + 1) / 3 for k in range(3)] + [0.025 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    assert [step.rate for step in done("refill pretrained").steps.values()] == pytest.approx(cosine * 3, rel=1e-6)
    assert [row["lr"] for row in metrics(done("refill pretrained").dir)] == pytest.approx([cosine[2], cosine[5]] * 3)


def test_the_terminal_gets_a_line_per_kind_of_layer_and_the_log_one_per_mask(done):
    seen, verbose = done("rsst"), done("rsst pretrained")
    weights = seen.ends[2]
    per_mask = [rf"{name}\.weight_mask +\| Sparsity: " for name in LAYERS]
    for part in PARTS:
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


# ----------------------------------------------------------------------------------------------------------- penalty


def batch_lines(log, state):
    """{step of the state, from 1: the note of its line in run.log}, where every batch has a line."""
    found = re.findall(rf" state {state} epoch (\d+)/\d+ batch (\d+)/{STEPS} (.*)", log)
    return {(int(epoch) - 1) * STEPS + int(batch): note for epoch, batch, note in found}


def penalty_rows(folder, state):
    return [row for row in rows_of(folder / "penalty.csv") if int(row["state"]) == state]


def test_log_and_penalty_csv_have_lambda_dose_and_residual_of_every_step_to_the_cut(done):
    """12 steps, half of them to the cut, strength 0.4, x^2; only weights are doomed in an element-wise run."""
    seen, cut = done("rsst"), 6
    shapes = [(k / cut) ** 2 for k in range(1, cut + 1)]
    assert len(batch_lines(seen.log, 0)) == 12
    assert not any("lambda" in note for note in batch_lines(seen.log, 0).values())
    for state in (1, 2):
        lines, rows, start = batch_lines(seen.log, state), penalty_rows(seen.dir, state), seen.starts[state]
        doomed = {name: start.masks[name] - start.target[name] for name in LAYERS}

        def norm(weights, doomed=doomed):
            return math.sqrt(
                sum(float((weights[f"{n}.weight"].double() * d).square().sum()) for n, d in doomed.items())
            )

        assert sorted(lines) == list(range(1, 13))
        assert [int(row["step"]) for row in rows] == list(range(1, cut + 1))
        for step, row in enumerate(rows, start=1):
            residual = norm(seen.steps[state, step].weights) / norm(start.weights)
            assert float(row["lambda"]) == pytest.approx(0.4 * shapes[step - 1])
            assert float(row["residual"]) == pytest.approx(residual, rel=1e-5)
            assert float(row["epoch"]) == pytest.approx(step / STEPS)
            strength, dose, logged = re.search(r"lambda (\S+)  dose (\S+)  residual (\S+)", lines[step]).groups()
            assert strength == f"{0.4 * shapes[step - 1]:.4g}"
            assert float(dose) == pytest.approx(20 * 0.4 * sum(shapes[:step]) / sum(shapes), rel=6e-3)
            assert float(logged) == pytest.approx(residual, rel=0.06)
        assert not any("lambda" in lines[step] for step in range(cut + 1, 13))
        state_row = rows_of(seen.dir / "states.csv")[state]
        assert float(state_row["residual"]) == pytest.approx(residual, rel=1e-5)
        said = f"accuracy {100 * float(state_row['accuracy_before_cut']):.2f}% before, "
        said += f"{100 * float(state_row['accuracy_after_cut']):.2f}% after; residual {residual:.2g}"
        assert f"cut at step {cut}: {said}" in seen.log
    assert [row["lambda"] > 0 for row in metrics(seen.dir)] == [False] * 4 + [True, True, False, False] * 2
    # --print_freq 2 of batches 1, 2, 3: the second one of each epoch
    assert sorted(batch_lines(done("rsst units").log, 1)) == [2, 5, 8, 11]


def test_measuring_the_penalty_changes_no_bits(done, tmp_path, monkeypatch):
    seen = done("rsst")
    monkeypatch.setattr(rsst.Ramp, "is_recorded", lambda *_: False)
    again = record(tmp_path / "again", [*MICRO, *words(RUNS["rsst"].format(noisy=seen.args["init"]))])
    assert not (again.dir / "penalty.csv").exists()
    assert_same_tensors(again.ends[2], seen.ends[2])
    assert metrics(again.dir, TIMES) == metrics(seen.dir, TIMES)


ALONE = "--struct rsst --block_loss_grad --weight_decay 0 --pruning_times 2"


@pytest.mark.parametrize(
    ("flags", "factor"),
    [
        ("--RST_schedule x --reg_granularity_prune 0.2 --reg_finish 0.5", math.exp(-4)),
        ("--reg_granularity_prune 0.2 --opt adamw --amp bf16 --vit_structured --vit_prune_target both", math.exp(-4)),
        # one step does it all: in float32, 1 - (1 - exp(-16)) would keep few of its digits
        ("--reg_granularity_prune 0.8 --reg_finish 0.01", math.exp(-16)),
        ("--reg_granularity_prune 0.1 --reg_finish 0.5", math.exp(-2)),
        # the gradient form without momentum: each step multiplies by 1 - lr lambda, the milestone is before the last 3
        ("--reg_form gradient --reg_clock state --RST_schedule x --momentum 0",
         math.prod(1 - rate * (k + 1) / 6 for k, rate in enumerate([0.05] * 3 + [0.005] * 3))),
    ],
)  # fmt: skip
def test_without_the_loss_doomed_weights_shrink_by_the_penalty_alone(flags, factor, run):
    done = run(*words(ALONE), *words(flags))
    assert float(rows_of(done.dir / "states.csv")[1]["residual"]) == pytest.approx(factor, rel=1e-4)
    assert ("residual above 0.1" in log_of(done.dir)) == (factor > 0.1)
    assert ("cut at step 1:" in log_of(done.dir)) == ("0.01" in flags)


@pytest.mark.parametrize(("clock", "strength"), [("epoch", 60.0), ("state", 0.5)])
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
    assert (passes is None) == (strength == 0.5)
    assert found[2] == (f"it passes 5 at step {passes} of 12" if passes else "too little")
    assert ("dose below 5" in log_of(done.dir)) == (passes is None)
    lines = batch_lines(log_of(done.dir), 1)
    for step in range(1, 13):  # to the end of the state
        assert f"lambda {lambdas[step - 1]:.4g}  dose" in lines[step]
    assert "cut at step 12" in log_of(done.dir)
    assert column(done.dir, "density")[1] == round(PRUNABLE * 0.7) / PRUNABLE


def test_the_dose_of_adamw_is_unknown(run):
    flags = "--struct rsst --reg_form gradient --opt adamw --lr 0.001 --print_freq 1 --pruning_times 2 --epochs 1"
    done = run(*words(flags))
    assert "dose is unknown" in log_of(done.dir)
    assert "predicted dose" not in log_of(done.dir)
    assert re.search(r"lambda \S+  dose unknown  residual", log_of(done.dir))


# --------------------------------------------------------------------------------------------------- where states start


@pytest.mark.parametrize(
    ("name", "rewind", "classifier"),
    [
        ("rsst", "noisy", "kept"),
        ("rsst units", "noisy", "rewound"),
        ("rsst rewound", "epoch 1", "rewound"),
        ("rsst pretrained", "noisy", "rewound"),
        ("refill", "noisy", "kept"),
        ("refill rewound", "epoch 1", "kept"),
        ("refill pretrained", "noisy", "kept"),
        ("refill units", "trained", "kept"),
        ("imp", "noisy", "rewound"),  # rewinding to epoch 0 is rewinding to the start
    ],
)
def test_states_start_from_rewind_weights_under_masks(name, rewind, classifier, done, noisy):
    seen = done(name)
    first = load(seen.dir / "init.pt")
    if seen.args["init"] or seen.args["pretrained"]:
        assert_same_tensors(first, load(noisy))
    assert_same_tensors(seen.starts[0].weights, first)
    expected = seen.epochs[0, 0].weights if rewind == "epoch 1" else first
    for state in range(1, len(seen.starts)):
        now, trained = seen.starts[state], seen.ends[state - 1]
        start = dict(trained) if rewind == "trained" else dict(expected)
        if classifier == "kept" and rewind != "trained":
            assert not torch.equal(trained["head.weight"], expected["head.weight"])
            start |= {name: trained[name] for name in ("head.weight", "head.bias")}
        assert_same_tensors(now.weights, masked(start, now.masks, now.kept))
        if seen.args["struct"] == "rsst":
            # what the state before ended with is what is enforced now; what is doomed goes later
            assert_same_tensors(now.masks, seen.starts[state - 1].target)
            assert any((now.target[layer] < now.masks[layer]).any() for layer in now.masks)
        else:
            assert_same_tensors(now.masks, now.target)

    # the rewind weights never change, and nothing that trains shares their storage
    for (state, epoch), ended in seen.epochs.items():
        if rewind != "epoch 1" or (state, epoch) >= (0, 1):
            assert_same_tensors(ended.rewind, expected)
    run = seen.run
    mine = {tensor.untyped_storage().data_ptr() for tensor in run.rewind_weights.values()}
    theirs = [*run.dense.state_dict().values(), *run.training.model.parameters()]
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in theirs}
    assert (seen.dir / "rewind.pt").exists() == (rewind == "epoch 1")
    if rewind == "epoch 1":
        assert_same_tensors(load(seen.dir / "rewind.pt"), expected)


def test_what_fillback_returns(done, noisy):
    """Under finetune it starts at zero, else where rewound weights start; how much it is, is tested above."""
    for name, start in (("refill", load(noisy)), ("refill rewound", None), ("refill finetuned", None)):
        seen = done(name)
        for state in (1, 2):
            now = seen.starts[state]
            for layer, mask in now.masks.items():
                weight, back = now.weights[f"{layer}.weight"], (mask == 1) & (now.elementwise[layer] == 0)
                assert back.any()
                if name == "refill finetuned":
                    assert not weight[back].any()
                    kept = now.elementwise[layer] == 1
                    assert torch.equal(weight[kept], seen.ends[state - 1][f"{layer}.weight"][kept])
                elif start:
                    assert torch.equal(weight, start[f"{layer}.weight"] * mask)


def test_no_refill_keeps_the_elementwise_mask_inside_survivors(done):
    seen = done("no refill")
    for state in (1, 2):
        now = seen.starts[state]
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
        assert column(seen.dir, "density")[state] == density


# -------------------------------------------------------------------------------------------- dead weights stay dead


@pytest.mark.parametrize("name", RUNS)
def test_masked_weights_are_zero_after_every_step(name, done):
    seen, dead = done(name), {}
    for key, now in seen.steps.items():
        dead[key] = 0
        for layer, mask in now.masks.items():
            weight = now.weights[f"{layer}.weight"]
            assert not weight[mask == 0].any(), key
            dead[key] += int((mask == 0).sum())
            stays = now.target[layer] == 1
            assert (weight[stays] != 0).float().sum() >= 0.99 * stays.sum()  # it is the mask that zeroes, nothing else
        for layer, ids in now.kept.items():
            bias = now.weights[f"{layer}.{'qkv' if layer.endswith('attn') else 'fc1'}.bias"]
            assert not bias[dead_rows(layer, ids)].any()
        assert now.types == {torch.float32}  # with --amp, too
    states = max(state for state, _ in dead)
    steps = max(step for _, step in dead)
    for state in range(states + 1):
        counts = [dead[state, step] for step in range(1, steps + 1)]
        if state == 0:
            assert set(counts) == {0}
        elif seen.args["struct"] == "rsst":  # the step that is the last before the cut still has them
            cut = int(re.findall(r"cut at step (\d+):", seen.log)[state - 1])
            assert cut == {"rsst": 6, "rsst units": 6, "rsst adamw": 9}.get(name, 2)
            assert counts[0] == counts[cut - 1] < counts[cut] == counts[-1]
        else:
            assert counts[0] == counts[-1] > 0


def test_doomed_units_live_until_the_cut_and_their_biases_die_with_them(done):
    """While the penalty grows they fade, weights and biases."""
    seen = done("rsst units")
    for state in (1, 2):
        norms = []
        for step in range(1, 13):
            now, gone = seen.steps[state, step], 0.0
            for layer, ids in seen.starts[state].target_kept.items():
                rows = "qkv" if layer.endswith("attn") else "fc1"
                for leaf in ("weight", "bias"):
                    gone += float(now.weights[f"{layer}.{rows}.{leaf}"][dead_rows(layer, ids)].abs().sum())
            norms.append(gone)
        assert all(a > b > 0 for a, b in itertools.pairwise(norms[:6]))
        assert norms[6:] == [0.0] * 6


# --------------------------------------------------------------------------------------------------- RSST and Refill


def test_with_lt_and_a_constant_ratio_rsst_equals_refill_from_state_2_on(seen):
    for flags, note in ((("--fc", "--sorting_mode", "global"), "bit for bit"), ((), "only by the classifier")):
        flags = (*BOTH, "--ratio_schedule", "constant", *flags)
        rsst_run, refill = (seen("--struct", struct, *flags) for struct in ("rsst", "refill"))
        assert_same_tensors(rsst_run.ends[0], refill.ends[0])
        assert largest_difference(rsst_run.ends[1], refill.ends[1]) > 0
        assert note in rsst_run.log
        assert ("bit for bit" in rsst_run.log) == ("--fc" in flags)
        if "--fc" in flags:
            assert_same_tensors(rsst_run.ends[2], refill.ends[2])
        else:
            starts = rsst_run.starts[2].weights, refill.starts[2].weights
            assert_same_tensors(*starts, skip=("head.",))
            assert not torch.equal(starts[0]["head.weight"], starts[1]["head.weight"])


def test_with_a_growing_ratio_rsst_differs_from_refill(seen):
    flags = (*BOTH, "--ratio_schedule", "geometric", "--rate", "0.6", "--fc")
    rsst_run, refill = (seen("--struct", struct, *flags) for struct in ("rsst", "refill"))
    assert largest_difference(rsst_run.ends[2], refill.ends[2]) > 1e-6
    assert "bit for bit" not in rsst_run.log


# --------------------------------------------------------------------------------------------------- compact training


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("method", "optimizer"), [("rsst", "adamw --lr 0.002"), ("refill", "sgd")])
def test_compact_and_masked_training_agree_in_float64(method, optimizer, seen):
    flags = words("--criteria magnitude --epochs 4 --clip_grad 0.3 --weight_decay 0.01 --rate 0.5 --reg_finish 0.5")
    flags = ("--struct", method, *BOTH, *flags, "--opt", *words(optimizer))
    compact, whole = seen(*flags, "--compact_training"), seen(*flags, "--no-compact_training")
    assert compact.steps.keys() == whole.steps.keys() == set(itertools.product(range(3), range(1, 13)))
    for key, step in whole.steps.items():
        assert largest_difference(compact.steps[key].weights, step.weights) < 1e-9, key
        assert step.width == WHOLE
    width = {key: step.width for key, step in compact.steps.items()}
    assert width[0, 1] == WHOLE
    assert width[1, 12] < 12_000
    assert (width[1, 6] == WHOLE) == (method == "rsst")  # until the cut
    for one, other in zip(metrics(compact.dir, TIMES), metrics(whole.dir, TIMES), strict=True):
        assert one == pytest.approx(other, abs=1e-9)
    assert largest_difference(load(compact.dir / "best.pt")["weights"], load(whole.dir / "best.pt")["weights"]) < 1e-9
    assert largest_difference(whole.steps[2, 12].weights, whole.steps[2, 1].weights) > 1e-3  # they agree on something


def test_compact_and_masked_training_start_alike_in_float32(done, seen, noisy):
    flags = words(RUNS["rsst units"].format(noisy=noisy, both=" ".join(BOTH)))
    compact, whole = done("rsst units"), seen(*flags, "--no-compact_training")
    assert_same_tensors(compact.steps[0, 12].weights, whole.steps[0, 12].weights)
    for step in range(1, 9):  # the cut comes after the sixth
        assert largest_difference(compact.steps[1, step].weights, whole.steps[1, step].weights) < 1e-5, step


@pytest.mark.parametrize(
    ("name", "entries", "compact"),
    [("rsst adamw", {"exp_avg", "exp_avg_sq", "step"}, False), ("rsst units", {"momentum_buffer"}, True)],
)
def test_optimizer_state_goes_through_the_cut(name, entries, compact, done):
    """Survivors keep their moments, what is cut loses them."""
    seen = done(name)
    (before, after), kept = seen.cuts[1], seen.starts[1].target_kept
    assert before.keys() == after.keys()
    for parameter, found in before.items():
        assert found.keys() == entries
        layer, _, part = parameter.rpartition(".")[0].rpartition(".")
        for entry_name, dense in found.items():
            expected = dense.clone()
            if layer in kept and dense.ndim and not (part in ("proj", "fc2") and parameter.endswith("bias")):
                dim = 1 if part in ("proj", "fc2") else 0
                dead = [row for row in dead_rows(layer, kept[layer]) if row < dense.shape[dim]]
                assert dense.index_select(dim, torch.tensor(dead)).any()
                if compact:
                    alive = [row for row in range(dense.shape[dim]) if row not in dead]
                    expected = dense.index_select(dim, torch.tensor(alive))
                else:
                    expected.index_fill_(dim, torch.tensor(dead), 0)
            assert torch.equal(after[parameter][entry_name], expected), (parameter, entry_name)


def test_oneshot_removes_the_units_whatever_compact_training_says(done):
    width = {key: step.width for key, step in done("oneshot").steps.items()}
    assert width[0, 1] == WHOLE
    assert {width[state, step] for state in (1, 2) for step in range(1, 7)} == {width[2, 6]}
    assert width[2, 6] < WHOLE


def test_bf16_differs_from_float32_in_training_only(done, seen):
    half = done("rsst rewound")
    whole = seen(*words(RUNS["rsst rewound"].format(both=" ".join(BOTH)).replace("bf16", "off")))
    assert_same_tensors(load(half.dir / "init.pt"), load(whole.dir / "init.pt"))
    assert metrics(half.dir, TIMES) != metrics(whole.dir, TIMES)


# ------------------------------------------------------------------------------------------------ bits and seeds


def outcome(folder):
    """All that a run ends with but the times."""
    checkpoint, best = load(folder / "checkpoint.pt"), load(folder / "best.pt")
    tables = {name: rows_of(folder / name) for name in ("states.csv", "units.csv")}
    tables["penalty.csv"] = rows_of(folder / "penalty.csv") if (folder / "penalty.csv").exists() else []
    for row in tables["states.csv"]:
        del row["seconds"]
    masks = {name: torch.from_numpy(mask) for name, mask in masks_of(checkpoint, "masks").items()}
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
    for one, two in ((first, other), (default, other)):  # the order of the images, and what is drawn to augment them
        same = [
            torch.equal(*pair) for pair in zip(*(run.run.train_data.batch(0, 0, 0) for run in (one, two)), strict=True)
        ]
        assert same == [two is not other or one is default] * 2


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
        assert f"--resume --save_dir {done.dir}" in done.err
        return done

    return start


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("rsst", (0, 1, 0)),
        ("rsst", (2, 2, 1)),  # within an epoch
        ("rsst units", (1, 0, 0)),  # before anything of the state is trained
        ("rsst units", (1, 1, 0)),  # before the cut
        ("rsst units", (1, 3, 0)),  # after it
        ("rsst adamw", (2, 2, 0)),
        ("rsst adamw", (1, 3, 0)),
        ("rsst rewound", (0, 1, 0)),
        ("refill rewound", (1, 0, 0)),
        ("refill units", (2, 1, 0)),
    ],
)
def test_a_broken_run_ends_with_the_bits_of_an_unbroken_one(name, point, done, broken, run, noisy):
    whole = done(name)
    half = broken(point, *words(RUNS[name].format(noisy=noisy, both=" ".join(BOTH))))
    state, epoch, _ = point
    assert len(metrics(half.dir)) == whole.args["epochs"] * state + epoch
    run("--resume", name="broken", base=())
    assert_same_outcome(half.dir, whole.dir)


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


@pytest.mark.parametrize("flag", ["--lr 0.5", "--rate 0.4", "--seed 1", "--struct imp", "--fc"])
def test_resume_with_another_flag_is_refused_by_name(flag, run, copied):
    before = digests(copied)
    refused = run("--resume", *words(flag), name="copied", base=(), code=2)
    assert refused.err.count("\n") == 1
    assert all(part in refused.err for part in words(flag))
    assert digests(copied) == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before(done, run, broken, noisy):
    half = broken((1, 2, 0), *words(RUNS["rsst"].format(noisy=noisy)))
    latest = half.dir / "checkpoint.pt"
    latest.write_bytes(latest.read_bytes()[: latest.stat().st_size // 2])
    again = run("--resume", name="broken", base=())
    assert "resumed at state 1, step 3 of 12" in log_of(again.dir)
    assert_same_outcome(again.dir, done("rsst").dir)


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
    jobs = []
    wrapped = entry.prune_and_retrain
    entry_flags = ("--dataset", "folder", "--data", tmp_path / "data", *words("--img_size 16 --workers 0 --struct imp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "prune_and_retrain", lambda run: (jobs.append(run), wrapped(run)))
        found = run(*entry_flags, *words("--train_limit 80 --pruning_times 2 --val_fraction 0.3"))

    def shares(data, weights):
        model = vit_micro(num_classes=20, img_size=16).eval()
        model.load_state_dict(weights)
        ranks = []
        for images, labels in data.sequential():
            for logits, truth in zip(model(images).tolist(), labels.tolist(), strict=True):
                ranks.append(sorted(range(20), key=lambda c: -logits[c]).index(truth))
        return [sum(rank < best for rank in ranks) / len(ranks) for best in (1, 5)]

    (job,), rows, table = jobs, metrics(found.dir), rows_of(found.dir / "states.csv")
    last, test = (shares(data, weights) for data, weights in (
        (job.val_data, load(found.dir / "checkpoint.pt")["weights"]), (job.test_data, load(found.dir / "best.pt")["weights"])
    ))  # fmt: skip
    assert [rows[-1]["val_accuracy"], rows[-1]["val_top5"]] == last
    assert [float(table[-1]["test_accuracy"]), float(table[-1]["test_top5"])] == test
    assert last[1] > last[0]
    assert f"val {100 * last[0]:.2f}% (top-5 {100 * last[1]:.2f}%)" in log_of(found.dir)
    assert f"test {100 * test[0]:.2f}% (top-5 {100 * test[1]:.2f}%)" in log_of(found.dir)
    # with 10 classes five guesses say little
    few = done("imp")
    assert "top5" not in (few.dir / "metrics.jsonl").read_text() + (few.dir / "states.csv").read_text()
    assert "top-5" not in few.out
