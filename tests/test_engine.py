"""Laws of the method: how many weights and units a state keeps, the penalty, where states start, what dead weights do,
compact against masked training, the learning rate, and what is chosen.

Runs of the micro model that are made once (RUNS in micro.py), and functions of the engine by themselves.
"""

import gc
import itertools
import math
import re
import weakref
from types import SimpleNamespace

import micro
import pytest
import torch
from micro import (
    BOTH,
    DEPTH,
    HEADS,
    HIDDEN,
    LAYERS,
    MICRO,
    PRUNABLE,
    RUNS,
    SHARES,
    STEPS,
    TIMES,
    WHOLE,
    log_of,
    rows_of,
)
from safetensors.torch import save_file

# isort: split
from micro import assert_same_tensors, dead_rows, flags_of, largest_difference, load, masked, metrics, record, surviving

import main_imp_fillback as entry
import rsst
from engine.choose import choose_target
from engine.model import first_model
from engine.optimizer import Schedule, make_optimizer, set_rate
from engine.run import enforce
from engine.training import StateTraining
from vit_pruning_utils_head_mlp import target_ratios
from vit_structured_pruning import CRITERIA

words = str.split


@pytest.fixture
def run(house, tmp_path, capsys):
    return micro.runner(tmp_path, capsys, MICRO)


def column(folder, name):
    return [float(row[name]) for row in rows_of(folder / "states.csv")]


# ------------------------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("target", ["head", "mlp", "both"])
@pytest.mark.parametrize("neurons", [None, 0.0, 0.7])
def test_neurons_go_by_their_own_ratio_or_else_by_that_of_heads(target, neurons):
    ratios = {"head": 0.3, "neuron": 0.3 if neurons is None else neurons}
    kinds = {"head": ["head"], "mlp": ["neuron"], "both": ["head", "neuron"]}[target]
    assert target_ratios(target, 0.3, neurons) == {kind: ratios[kind] for kind in kinds}


def kept_of(count, share):
    return max(1, math.floor(count * (1 - share) + 1e-9))


@pytest.mark.parametrize(("name", "rate", "returned"), [
    ("rsst", 0.3, 0), ("imp", 0.3, 0), ("rsst pretrained", 0.3, 0), ("refill", 0.15, 0.4),
    ("refill finetuned", 0.3, 0.4),
])  # fmt: skip
def test_elementwise_densities_are_exact(name, rate, returned, done):
    seen = done(name)
    patches = name == "rsst pretrained"  # --conv1
    names = [*LAYERS, "patch_embed.proj"] if patches else LAYERS
    total = PRUNABLE + patches * micro.PATCH_EMBED
    units, steps = rows_of(seen.dir / "units.csv"), seen.args["epochs"] * STEPS
    for state, row in enumerate(rows_of(seen.dir / "states.csv")):
        left, now = round(total * (1 - rate) ** state), seen.steps[state, steps]
        # what fillback returns does not count as left by the element-wise step
        assert sum(int(mask.sum()) for mask in now.elementwise.values()) == left
        trained = left + sum(int(int((mask == 0).sum()) * returned + 1e-9) for mask in now.elementwise.values())
        assert float(row["density"]) == trained / total
        assert int(row["parameters"]) == WHOLE - (total - trained)
        assert (int(row["heads"]), int(row["neurons"])) == (DEPTH * HEADS, DEPTH * HIDDEN)
        prunes = f"state {state} prunes to density {100 * left / total:.2f}%, trains {100 * trained / total:.2f}%"
        assert (prunes in seen.log) == (state > 0)
        rows = [row for row in units if row["state"] == str(state)]
        assert {row["layer"]: row["kind"] for row in rows} == dict.fromkeys(names, "weight")
        assert sum(int(row["kept"]) for row in rows) == trained
    assert f"Remaining weights: {100 * trained / total:.2f}%" in seen.out
    for weights in (seen.ends[state], load(seen.dir / "best.pt")["weights"]):
        # what is returned starts at zero there, and the start may be selected
        assert trained - surviving(weights, names) in ([0] if name != "refill finetuned" else range(trained - left + 1))
        assert (weights["patch_embed.proj.weight"] == 0).any() == patches


@pytest.mark.parametrize(("name", "target", "schedule", "head_ratio", "neuron_ratio"), [
    ("rsst units", "both", "geometric", 0.5, 0.5), ("refill pretrained", "head", "linear", 0.5, 0),
    ("imp units", "mlp", "constant", 0, 0.3), ("oneshot", "both", "constant", 0.5, 0.3),
])  # fmt: skip
def test_structured_states_keep_what_the_ratios_say(name, target, schedule, head_ratio, neuron_ratio, done):
    seen = done(name)
    for state, row in enumerate(rows_of(seen.dir / "states.csv")):
        heads = kept_of(HEADS, SHARES[schedule](head_ratio, state / 2))
        neurons = kept_of(HIDDEN, SHARES[schedule](neuron_ratio, state / 2))
        assert (int(row["heads"]), int(row["neurons"])) == (DEPTH * heads, DEPTH * neurons)
        weights = DEPTH * (heads * micro.HEAD_WEIGHTS + neurons * micro.NEURON_WEIGHTS)
        assert float(row["density"]) == weights / PRUNABLE
        biases = DEPTH * ((HEADS - heads) * 3 * micro.HEAD_DIM + HIDDEN - neurons)
        assert int(row["parameters"]) == WHOLE - (PRUNABLE - weights) - biases
        macs = DEPTH * (heads * micro.HEAD_MACS + neurons * micro.NEURON_MACS)
        assert int(row["macs"]) == 4 * micro.PATCH_EMBED + macs + micro.DIM * 10
        counts = {"head": (str(heads), str(HEADS)), "neuron": (str(neurons), str(HIDDEN))}
        for unit in rows_of(seen.dir / "units.csv"):
            assert unit["state"] != str(state) or counts[unit["kind"]] == (unit["kept"], unit["total"])
        wanted = {"head": ["attn"], "mlp": ["mlp"], "both": ["attn", "mlp"]}[target]
        layers = sorted(f"blocks.{block}.{part}" for block in range(DEPTH) for part in wanted)
        assert sorted(seen.steps[state, seen.args["epochs"] * STEPS].kept) == layers


def test_a_layer_may_empty_with_min_units_0(done):
    row = rows_of(done("emptied").dir / "states.csv")[2]
    assert int(row["heads"]) == math.floor(DEPTH * HEADS * 0.1 + 1e-9) == 0
    assert int(row["neurons"]) == math.floor(DEPTH * HIDDEN * 0.05 + 1e-9)


def test_the_schedule_warms_up_per_step_and_falls():
    steps = Schedule("multistep", 0.05, 2, (3, 5), 3, 18)
    expected = [0.05 * (k + 1) / 6 for k in range(6)] + [0.05] * 3 + [0.005] * 6 + [0.0005] * 3
    assert [steps.rate(step) for step in range(18)] == pytest.approx(expected)
    cosine = Schedule("cosine", 0.05, 1, (3,), 3, 15)
    expected = [0.05 * (k + 1) / 3 for k in range(3)] + [0.025 * (1 + math.cos(math.pi * k / 12)) for k in range(12)]
    assert [cosine.rate(step) for step in range(15)] == pytest.approx(expected)
    assert Schedule("cosine", 0.05, 5, (), 3, 15).rate(14) == 0.05  # nothing but a warm-up


def test_the_learning_rate_starts_anew_in_every_state(done):
    assert [s.rate for s in done("refill units").steps.values()] == pytest.approx(([0.05] * 3 + [0.005] * 3) * 3)
    # the milestone of a dense run moves from epoch 1 to 3
    assert [row["lr"] for row in metrics(done("dense").dir)] == pytest.approx([0.05] * 3 + [0.005] * 3)
    cosine = [0.05 * (k + 1) / 3 for k in range(3)] + [0.025 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    assert [s.rate for s in done("refill pretrained").steps.values()] == pytest.approx(cosine * 3)
    assert [row["lr"] for row in metrics(done("refill pretrained").dir)] == pytest.approx([cosine[2], cosine[5]] * 3)


# ----------------------------------------------------------------------------------------------------------- penalty


def batch_lines(log, state):
    """{step of the state, from 1: the note of its line in run.log}, where every batch has a line."""
    found = re.findall(rf" state {state} epoch (\d+)/\d+ batch (\d+)/{STEPS} (.*)", log)
    return {(int(epoch) - 1) * STEPS + int(batch): note for epoch, batch, note in found}


def test_log_and_penalty_csv_have_lambda_dose_and_residual_of_every_step_to_the_cut(done):
    """12 steps, half of them to the cut, strength 0.4, x^2; only weights are doomed in an element-wise run."""
    seen, cut = done("rsst"), 6
    shapes = [(k / cut) ** 2 for k in range(1, cut + 1)]
    assert len(batch_lines(seen.log, 0)) == 12
    assert not any("lambda" in note for note in batch_lines(seen.log, 0).values())
    for state in (1, 2):
        lines, start = batch_lines(seen.log, state), seen.starts[state]
        rows = [row for row in rows_of(seen.dir / "penalty.csv") if row["state"] == str(state)]
        doomed = {f"{name}.weight": start.masks[name] - start.target[name] for name in LAYERS}

        def norm(weights, doomed=doomed):
            return math.sqrt(sum(float((weights[n].double() * gone).square().sum()) for n, gone in doomed.items()))

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
    again = record(tmp_path / "again", [*MICRO, *flags_of("rsst", seen.args["init"])])
    assert not (again.dir / "penalty.csv").exists()
    assert_same_tensors(again.ends[2], seen.ends[2])
    assert metrics(again.dir, TIMES) == metrics(seen.dir, TIMES)


@pytest.mark.parametrize("steps", [1, 6, 49, 50, 51, 99, 100, 1001])
def test_the_penalty_is_recorded_fifty_times_or_at_every_step_and_at_the_last(steps):
    ramp = rsst.Ramp("x", 1.0, steps, steps)
    recorded = [step for step in range(1, steps + 1) if ramp.is_recorded(step)]
    assert min(steps, 50) <= len(recorded) <= 101
    assert recorded[-1] == steps
    gaps = [b - a for a, b in itertools.pairwise([0, *recorded])]
    assert max(gaps) <= max(1, steps / 50)


# what is left of the doomed weights; in the gradient form without momentum each step multiplies by 1 - lr lambda
ALONE = {
    "--RST_schedule x --reg_granularity_prune 0.2 --reg_finish 0.5": math.exp(-4),
    "--reg_granularity_prune 0.2 --opt adamw --amp bf16 --vit_structured --vit_prune_target both": math.exp(-4),
    # one step does it all: in float32, 1 - (1 - exp(-16)) would keep few of its digits
    "--reg_granularity_prune 0.8 --reg_finish 0.01": math.exp(-16),
    "--reg_granularity_prune 0.1 --reg_finish 0.5": math.exp(-2),
    "--reg_form gradient --reg_clock state --RST_schedule x --momentum 0":
        math.prod(1 - rate * k / 6 for k, rate in zip(range(1, 7), [0.05] * 3 + [0.005] * 3, strict=True)),
}  # fmt: skip


@pytest.mark.parametrize("flags", ALONE)
def test_without_the_loss_doomed_weights_shrink_by_the_penalty_alone(flags, run):
    done = run(*words("--struct rsst --block_loss_grad --weight_decay 0 --pruning_times 2"), *words(flags))
    factor = ALONE[flags]
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
    assert float(rows_of(done.dir / "states.csv")[1]["density"]) == round(PRUNABLE * 0.7) / PRUNABLE


def test_the_dose_of_adamw_is_unknown(run):
    flags = "--struct rsst --reg_form gradient --opt adamw --lr 0.001 --print_freq 1 --pruning_times 2 --epochs 1"
    done = run(*words(flags))
    assert "dose is unknown" in log_of(done.dir)
    assert "predicted dose" not in log_of(done.dir)
    assert re.search(r"lambda \S+  dose unknown  residual", log_of(done.dir))


# --------------------------------------------------------------------------------------------------- where states start


@pytest.mark.parametrize(("name", "rewind", "classifier"), [
    ("rsst", "start", "kept"), ("rsst units", "start", "rewound"), ("rsst rewound", "epoch 1", "rewound"),
    ("rsst pretrained", "start", "rewound"), ("refill", "start", "kept"), ("refill rewound", "epoch 1", "kept"),
    ("refill pretrained", "start", "kept"), ("refill units", "trained", "kept"),
    ("imp", "start", "rewound"),  # --rewind_epoch 0
])  # fmt: skip
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
    theirs = [*run.dense.state_dict().values(), *seen.training.model.parameters()]
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in theirs}
    assert (seen.dir / "rewind.pt").exists() == (rewind == "epoch 1")
    if rewind == "epoch 1":
        assert_same_tensors(load(seen.dir / "rewind.pt"), expected)


def test_what_fillback_returns_starts_at_zero_under_finetune(done):
    """Else it starts from the rewind weights, as above."""
    seen = done("refill finetuned")
    for state in (1, 2):
        now = seen.starts[state]
        for layer, mask in now.masks.items():
            weight, stays = now.weights[f"{layer}.weight"], now.elementwise[layer]
            back, kept = mask > stays, stays == 1
            assert back.any()
            assert not weight[back].any()
            assert torch.equal(weight[kept], seen.ends[state - 1][f"{layer}.weight"][kept])


def test_no_refill_keeps_the_elementwise_mask_inside_survivors(done):
    seen = done("no refill")
    for state in (1, 2):
        now = seen.starts[state]
        for name, mask in now.masks.items():
            assert not (mask > now.elementwise[name]).any()
        # units of the state before count; a removed unit is pruned
        heads, neurons = ((HEADS, HIDDEN), (kept_of(HEADS, 1 - 0.7**0.5), kept_of(HIDDEN, 1 - 0.75**0.5)))[state - 1]
        total = DEPTH * (heads * micro.HEAD_WEIGHTS + neurons * micro.NEURON_WEIGHTS)
        assert sum(int(mask.sum()) for mask in now.elementwise.values()) == round(total * 0.7**state)
        for block in range(DEPTH):
            dead = dead_rows("attn", now.kept[f"blocks.{block}.attn"])
            alive = [row for row in range(3 * micro.DIM) if row not in dead]
            layer = f"blocks.{block}.attn.qkv"
            assert torch.equal(now.masks[layer][alive], now.elementwise[layer][alive])
        density = sum(int(mask.sum()) for mask in now.masks.values()) / PRUNABLE
        assert float(rows_of(seen.dir / "states.csv")[state]["density"]) == density


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
            rows, columns = ("attn.qkv", "attn.proj") if layer.endswith("attn") else ("mlp.fc1", "mlp.fc2")
            block, gone = layer.rpartition(".")[0], dead_rows(layer, ids)
            inputs = [row for row in gone if row < now.masks[f"{block}.{columns}"].shape[1]]
            assert not now.weights[f"{block}.{rows}.bias"][gone].any()
            assert not now.masks[f"{block}.{rows}"][gone].any()
            assert not now.masks[f"{block}.{columns}"][:, inputs].any()
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
    def pair(*flags):
        return [seen("--struct", struct, *BOTH, "--rate", "0.6", *flags) for struct in ("rsst", "refill")]

    ours, refill = pair("--ratio_schedule", "constant", "--fc", "--sorting_mode", "global")
    assert_same_tensors(ours.ends[0], refill.ends[0])
    assert largest_difference(ours.ends[1], refill.ends[1]) > 0
    assert_same_tensors(ours.ends[2], refill.ends[2])
    assert "bit for bit" in ours.log
    # without --fc all but the classifier starts equal
    ours, refill = pair("--ratio_schedule", "constant")
    assert_same_tensors(ours.starts[2].weights, refill.starts[2].weights, skip=("head.",))
    assert not torch.equal(ours.starts[2].weights["head.weight"], refill.starts[2].weights["head.weight"])
    assert "only by the classifier" in ours.log
    assert "bit for bit" not in ours.log
    # a growing ratio lets RSST act
    ours, refill = pair("--ratio_schedule", "geometric", "--fc")
    assert largest_difference(ours.ends[2], refill.ends[2]) > 1e-6
    assert "bit for bit" not in ours.log


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
    compact, whole = done("rsst units"), seen(*flags_of("rsst units", noisy), "--no-compact_training")
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


# --------------------------------------------------------------------------- functions of the engine by themselves


@pytest.fixture
def make(house, tmp_path):
    """make("--struct", "imp") -> a run before its first state."""
    made = []

    def build(*flags):
        made.append(micro.make_run(tmp_path / f"run{len(made)}", *flags))
        return made[-1]

    yield build
    for run in made:
        run.close()


def choose(run, state):
    """Choose for a state whose predecessor kept what was chosen before."""
    run.progress.state = state
    target = choose_target(run)
    run.progress.masks, run.progress.kept = run.progress.target, run.progress.target_kept = target
    return target


@pytest.mark.parametrize("method", ["refill", "rsst"])
def test_refilled_weights_do_not_return_to_the_elementwise_mask(method, make):
    """However large they grow: here they end state 1 as the largest of all."""
    run = make("--struct", method, "--fillback_rate", "0.4")
    masks, _ = choose(run, 1)
    first = run.progress.elementwise
    for name, mask in masks.items():
        back = mask > first[name]
        assert int(back.sum()) == int(int((first[name] == 0).sum()) * 0.4 + 1e-9) > 0
        run.dense.get_parameter(f"{name}.weight").detach()[back] = 9.0
    choose(run, 2)
    assert not any((mask > first[name]).any() for name, mask in run.progress.elementwise.items())


@pytest.mark.parametrize("sorting", ["layer-wise", "global"])
def test_a_removed_unit_stays_removed_under_a_criterion_of_ones_own(sorting, make, monkeypatch):
    """The smallest units are the best ones here, and nothing is smaller than a removed one."""
    monkeypatch.setitem(CRITERIA, "smallest", lambda w: -w.abs().sum(1))
    run = make(*BOTH, *words("--criteria smallest --rate 0.6 --pruning_times 4 --sorting_mode"), sorting)
    before = run.progress.kept
    for state in (1, 2, 3):
        masks, kept = choose(run, state)
        enforce(run.dense, run.parameter_masks(masks, kept))  # removed ones are zero, the smallest of all
        assert all(set(kept[layer]) <= set(before[layer]) for layer in before)
        before = kept
    count = sum(map(len, kept.values()))
    assert count == (DEPTH * (1 + 19) if sorting == "layer-wise" else 3 + 38)


def test_score_per_mac_removes_the_macs_of_both_quotas(make):
    flags = words("--rank_by score_per_mac --sorting_mode global --rate 0.5 --mlp_prune_ratio 0.5 --criteria magnitude")
    _, kept = choose(make(*BOTH, *flags), 2)
    gone = sum((HEADS - len(ids)) * micro.HEAD_MACS for layer, ids in kept.items() if layer.endswith("attn"))
    gone += sum((HIDDEN - len(ids)) * micro.NEURON_MACS for layer, ids in kept.items() if layer.endswith("mlp"))
    quota = DEPTH * (HEADS // 2 * micro.HEAD_MACS + HIDDEN // 2 * micro.NEURON_MACS)
    assert quota <= gone < quota + micro.HEAD_MACS


def test_global_sorting_leaves_each_layer_a_unit(make):
    run = make("--struct", "refill", *BOTH, *words("--sorting_mode global --rate 0.9 --mlp_prune_ratio 0.99"))
    with torch.no_grad():  # all that is large is in one layer
        run.dense.blocks[0].attn.qkv.weight.mul_(100)
        run.dense.blocks[0].mlp.fc1.weight.mul_(100)
    _, kept = choose(run, 2)
    assert [len(kept[f"blocks.{block}.{part}"]) for block in (0, 1) for part in ("attn", "mlp")] == [1] * 4


def test_no_refill_leaves_untargeted_layers_whole(make):
    masks, _ = choose(make(*words("--struct refill --vit_structured --vit_prune_target head --no-refill")), 2)
    assert all(mask.all() == (".mlp." in name) for name, mask in masks.items())


@pytest.mark.parametrize("method", ["imp", "rsst"])
def test_gradients_are_masked_before_they_are_clipped(method, make, around, monkeypatch):
    raw, clipped, wrong = [], [], []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *arguments: clipped.append((float(clip(*arguments)), arguments[1]))
    )
    around("mask_gradients", before=lambda t: raw.append({n: p.grad.clone() for n, p in t.model.named_parameters()}))

    def norm(gradients):
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))

    run = make("--struct", method, "--clip_grad", "0.3", "--rate", "0.5")
    masks, _ = choose(run, 1)
    run.begin_state()
    run.progress.state = 1
    training = StateTraining(run)
    for _ in range(STEPS):
        training.step()
        alive = raw[-1] | {f"{name}.weight": raw[-1][f"{name}.weight"] * mask for name, mask in masks.items()}
        assert clipped[-1] == (pytest.approx(norm(alive), rel=1e-5), 0.3)
        wrong.append(norm(raw[-1]) / norm(alive) - 1)
    assert len(clipped) == STEPS
    assert max(wrong) > 1e-3  # dead weights would have had a say


def test_blocking_the_loss_leaves_survivors_their_gradient(make, around):
    found = []

    def look(training):
        for name, doomed in zip(training.penalty.names, training.penalty.doomed, strict=True):
            gradient = training.model.get_parameter(name).grad
            found.append((bool(gradient[doomed == 1].any()), bool(gradient[doomed == 0].any())))

    around("mask_weights", before=look)
    run = make("--struct", "rsst", "--block_loss_grad")
    run.progress.state = 1
    run.begin_state()
    run.doom(choose_target(run))
    training = StateTraining(run)
    training.step()
    assert found == [(False, True)] * len(LAYERS)
    # no gradient outlives a step: it would hold the memory of the graph that it was made in
    assert all(parameter.grad is None for parameter in training.model.parameters())


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize("nested", [None, "state_dict", "model", "safetensors"])
def test_initial_weights_from_a_file(nested, noisy, tmp_path):
    weights, path = load(noisy), tmp_path / ("init.safetensors" if nested == "safetensors" else "init.pt")
    if nested == "safetensors":
        save_file(weights, path)
    else:
        torch.save({nested: weights} if nested else weights, path)
    assert_same_tensors(first_model(entry.parse_args([*MICRO, "--init", str(path)])).state_dict(), weights)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_weight_decay_acts_on_the_weights_of_layers_alone(opt, micro_vit):
    before = {name: value.clone() for name, value in micro_vit.named_parameters()}
    args = SimpleNamespace(opt=opt, momentum=0.9, weight_decay=0.1, compile=None, layer_decay=None)
    optimizer = make_optimizer(args, micro_vit, torch.zeros(()))
    set_rate(optimizer, 0.5)
    for parameter in micro_vit.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in micro_vit.named_parameters():
        matrix = name.endswith(".weight") and value.ndim > 1  # not norms, biases, class token and positions
        torch.testing.assert_close(value, before[name] * (0.95 if matrix else 1), rtol=1e-6, atol=0)


def test_a_state_frees_its_network_and_its_captured_step(run, monkeypatch):
    """By reference counts alone: a CUDA graph's memory does not wait for the garbage collector."""
    alive, build = [], StateTraining.build

    class Captured:  # as `capture.CapturedStep` refers to its function, without a GPU
        def __init__(self, function):
            self.function = function

        def __call__(self, *tensors):
            self.function(*tensors)

    def note(training):
        build(training)
        alive.append((training.progress.state, weakref.ref(training.model), weakref.ref(training.captured)))

    def look(run):
        of_state = [(model(), step()) for state, model, step in alive if state == run.progress.state]
        assert of_state
        assert all(step is None and (model is None or model is run.dense) for model, step in of_state)
        return end(run)

    end = entry.Run.end_state
    monkeypatch.setattr("engine.training.CapturedStep", Captured)
    monkeypatch.setattr("engine.training.StateTraining.build", note)
    monkeypatch.setattr(entry.Run, "end_state", look)
    monkeypatch.setattr(entry, "check_compile", lambda *_: None)
    gc.disable()
    try:
        run("--struct", "rsst", *BOTH, "--pruning_times", 3, "--compile", "graph", "--no-export")
    finally:
        gc.enable()
    assert [state for state, *_ in alive] == [0, 1, 1, 2, 2]  # RSST builds a network again at its cut
