"""Laws of sensitivity: curves measured layer by layer, the least loss that a budget allows, the same after a kill."""

import copy
import itertools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import BOTH, MICRO, assert_same_tensors, call, clones, furnish, load, log_of, make_run, runner, wrap

import main_imp_fillback as entry
from engine.choose import choose_target
from engine.sensitivity import sensitivity_curves
from pruning.budget import counts_by_value
from pruning.curves import loss_values, lower_hull, probed_counts
from pruning.removal import remove_units
from utils import RunError


# ------------------------------------------------------------------------------------------------ from curves to counts
@st.composite
def convex_layers(draw, unit_costs):
    """{key: (levels, loss by count)} of up to 3 layers, losses whole numbers, and what a unit of each costs."""
    layers = {}
    for layer in range(draw(st.integers(1, 3))):
        units, floor = draw(st.integers(1, 5)), draw(st.integers(0, 1))
        steps = sorted(draw(st.lists(st.integers(-3, 30), min_size=units - floor, max_size=units - floor)))
        losses = list(itertools.accumulate(steps, initial=0))
        layers[f"layer{layer}"] = (list(range(units, floor - 1, -1)), losses, draw(unit_costs))
    return layers


def budget_of(layers):
    levels = {key: levels for key, (levels, _, _) in layers.items()}
    units = {key: unit for key, (_, _, unit) in layers.items()}
    curves = {key: list(zip(steps, losses, strict=True)) for key, (steps, losses, _) in layers.items()}
    loss = {(key, count): value for key, curve in curves.items() for count, value in curve}

    def cost(counts):
        return sum(unit * counts.get(key, levels[key][0]) for key, unit in units.items())

    def total(counts):
        return sum(loss[key, count] for key, count in counts.items())

    ways = [dict(zip(levels, way, strict=True)) for way in itertools.product(*levels.values())]
    return levels, cost, total, loss_values(curves, levels, cost), ways


@settings(max_examples=60, deadline=None)
@given(convex_layers(st.just(1)), st.integers(0, 15))
def test_convex_curves_give_the_least_loss_of_all_ways_to_keep_so_many(layers, limit):
    levels, cost, total, values, ways = budget_of(layers)
    found = counts_by_value(values, levels, cost, limit)
    assert all(found[key] in levels[key] for key in levels)
    assert cost(found) == min(max(limit, min(map(cost, ways))), cost({}))  # between the floors and everything
    assert total(found) == min(total(way) for way in ways if cost(way) == cost(found))


@settings(max_examples=60, deadline=None)
@given(convex_layers(st.sampled_from([1, 3])), st.integers(0, 45))
def test_where_costs_differ_the_steps_go_along_the_least_loss(layers, limit):
    """At the costs that they pass through; between, what is left below the limit is less than the next unit."""
    levels, cost, total, values, ways = budget_of(layers)
    found = counts_by_value(values, levels, cost, limit)
    if cost(found) > limit:
        assert found == {key: steps[-1] for key, steps in levels.items()}
        return
    larger = [{**found, key: found[key] + 1} for key in levels if found[key] < levels[key][0]]
    assert all(cost(way) > limit for way in larger)
    order = sorted(
        ((value, key) for key, steps in values.items() for value in steps), key=lambda e: (e[0], -ord(e[1][-1]))
    )
    counts = {key: steps[0] for key, steps in levels.items()}
    for _, key in order:
        counts[key] -= 1
        found = counts_by_value(values, levels, cost, cost(counts))
        assert total(found) == min(total(way) for way in ways if cost(way) == cost(counts))


def test_a_hull_spans_what_is_not_convex_and_units_go_along_it():
    curve = [(4, 1.0), (3, 3.0), (2, 3.5), (1, 6.0), (0, 21.0)]
    assert lower_hull(curve) == [(4, 1.0), (2, 3.5), (1, 6.0), (0, 21.0)]
    levels = {"a": [4, 3, 2, 1, 0], "b": [6, 4, 2]}  # heads, and neurons in pairs

    def cost(counts):
        return 10 * counts.get("a", 4) + counts.get("b", 6)

    values = loss_values({"a": curve, "b": [(6, 1.0), (4, 0.5), (2, 1.5)]}, levels, cost)
    # by hand: hull of a rises by 1.25, 1.25, 2.5, 15 a unit of cost 10; b falls by 0.25 and rises by 0.5 a unit of 1
    assert values == {"a": pytest.approx([0.125, 0.125, 0.25, 1.5]), "b": pytest.approx([-0.25, 0.5])}
    assert counts_by_value(values, levels, cost, 44) == {"a": 4, "b": 4}
    assert counts_by_value(values, levels, cost, 36) == {"a": 3, "b": 6}  # the pair that went first fits again
    assert counts_by_value(values, levels, cost, 14) == {"a": 1, "b": 4}
    assert counts_by_value(values, levels, cost, 12) == {"a": 1, "b": 2}
    assert counts_by_value(values, levels, cost, 0) == {"a": 0, "b": 2}


def test_what_costs_nothing_stays():
    levels = {"a": [2, 1], "free": [5, 4, 3], "single": [1]}
    curves = {"a": [(2, 0.0), (1, 9.0)], "free": [(5, 0.0), (3, 0.0)], "single": [(1, 0.0)]}
    values = loss_values(curves, levels, lambda counts: counts.get("a", 2))
    assert values.keys() == {"a"}
    found = counts_by_value(values, levels, lambda counts: counts.get("a", 2), 1)
    assert found == {"a": 1, "free": 5, "single": 1}


def test_few_units_are_probed_one_by_one_and_many_by_eighths():
    assert probed_counts([3, 2, 1]) == [3, 2, 1]
    assert probed_counts(range(384, 0, -1)) == [384, 336, 288, 240, 192, 144, 96, 48, 1]
    # 100 units in multiples of 8, down to 16: nearest to 87.5, 75, .. 12.5
    assert probed_counts([100, *range(96, 15, -8)]) == [100, 88, 72, 64, 48, 40, 24, 16]


# ------------------------------------------------------------------------------------------------------------ the probe
PROBED = (*BOTH, "--ratio_allocation", "sensitivity", "--min_units", 2)


def probed(run):
    """Curves of the run's network, by scores that rank units backwards, down to one unit a layer."""
    scores = {key: torch.arange(group.count, dtype=torch.float64) for key, group in run.units.items()}
    levels = {key: list(range(group.count, 0, -1)) for key, group in run.units.items()}
    return sensitivity_curves(run, scores, levels)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run before its first pruning, its weights noisy enough for each unit to matter."""
    folder = tmp_path_factory.mktemp("sensitivity")
    with pytest.MonkeyPatch.context() as patch:
        furnish(patch, folder)
        run = make_run(folder / "run", *PROBED, "--rate", 0.5, "--mlp_prune_ratio", 0.4, "--score_batches", 2)
    generator = torch.Generator().manual_seed(0)
    for parameter in run.dense.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    run.progress.state, run.noisy = 2, clones(run.dense.state_dict())
    yield run
    run.close()


def test_a_curve_is_the_loss_of_the_network_with_those_units_cut_out(run):
    before = clones(run.dense.state_dict())
    curves = probed(run)
    assert_same_tensors(run.dense.state_dict(), before)
    batches = list(run.round.data.sequential())[:2]  # all in stored order, of which two batches are asked for
    images, labels = (torch.cat(of) for of in zip(*batches, strict=True))
    assert {key: [count for count, _ in curve] for key, curve in curves.items()} == {
        f"blocks.{block}.{layer}": counts
        for block in range(2)
        for layer, counts in (("attn", [4, 3, 2, 1]), ("mlp", [48, 42, 36, 30, 24, 18, 12, 6, 1]))
    }
    for key, curve in curves.items():
        for count, loss in curve:
            total = run.units[key].count
            small = remove_units(copy.deepcopy(run.dense), run.units, {key: list(range(total - count, total))}).eval()
            with torch.no_grad():
                assert loss == pytest.approx(float(F.cross_entropy(small(images), labels)), rel=1e-5)
    (row,) = json.loads((run.save_dir / "sensitivity.json").read_text())["states"]
    assert (row["state"], row["images"], row["layers"][0]["left"]) == (2, 40, [4, 3, 2, 1])
    whole = (run.dense.eval()(images).argmax(1) == labels).double().mean()
    assert {layer["accuracy"][0] for layer in row["layers"]} == {float(whole)}


def test_what_was_measured_of_these_weights_is_read_and_of_others_measured_again(run, monkeypatch):
    first, path = probed(run), run.save_dir / "sensitivity.json"
    content = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(run.dense, "forward", lambda images: pytest.fail("measured"))
        assert probed(run) == first
    path.write_text(content[: len(content) // 2])  # half a file is none
    assert probed(run) == first
    assert path.read_text() == content
    weight = run.dense.blocks[0].mlp.fc1.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert probed(run) != first
    with torch.no_grad():
        weight[0, 0] = math.nan
    with pytest.raises(RunError, match="state 2: .*not finite"):
        probed(run)


def test_what_a_layer_can_spare_goes_and_layers_that_miss_it_stay(run):
    """The MLP of block 1 gives nothing, so that its neurons go before any that block 0 misses; 40% do."""
    run.dense.load_state_dict(run.noisy)
    with torch.no_grad():
        run.dense.blocks[1].mlp.fc2.weight.zero_()
    masks, kept = choose_target(run)
    (row,) = json.loads((run.save_dir / "sensitivity.json").read_text())["states"]
    curves = {layer["layer"]: list(zip(layer["loss"], layer["left"], strict=True)) for layer in row["layers"]}
    assert len({loss for loss, _ in curves["blocks.1.mlp"]}) == 1
    best = min(curves["blocks.0.mlp"])[1]  # fewer neurons of block 0 can be better than all
    expected = {"blocks.0.mlp": best, "blocks.1.mlp": 57 - best}  # 57 = floor(96 x 0.6)
    assert {key: len(ids) for key, ids in kept.items() if "mlp" in key} == expected
    assert sum(len(ids) for key, ids in kept.items() if "attn" in key) == 4
    assert min(len(ids) for ids in kept.values()) >= 2
    assert int(masks["blocks.1.mlp.fc1"].any(1).sum()) == 57 - best


def test_a_killed_run_chooses_again_what_it_chose(tmp_path, capsys, monkeypatch):
    furnish(monkeypatch, tmp_path)
    monkeypatch.setattr(entry.report, "write", lambda _: None)
    run = runner(tmp_path, capsys, [*MICRO, "--wandb_mode", "disabled", *PROBED, "--target_macs", 0.6])
    whole, killed = run("--struct", "refill", name="whole"), tmp_path / "killed"
    *_, share = re.findall(r"budget: ([\d.]+) of the MACs", log_of(whole.dir))
    assert 0.59 < float(share) <= 0.6

    def die(training):
        if training.progress.state == 1:
            raise InterruptedError

    with monkeypatch.context() as patch:
        wrap(patch, "build", before=die)
        with pytest.raises(InterruptedError):
            run("--struct", "refill", name="killed")
    assert call(["--resume", "--save_dir", killed]) == 0
    assert log_of(killed).count("the curves of state 1 are those in sensitivity.json") == 1
    for name in ("sensitivity.json", "units.csv"):
        assert (killed / name).read_bytes() == (whole.dir / name).read_bytes()
    assert_same_tensors(load(killed / "best.pt")["weights"], load(whole.dir / "best.pt")["weights"])


def test_a_plan_says_that_counts_depend_on_the_probe(capsys, tmp_path, monkeypatch):
    furnish(monkeypatch, tmp_path)
    for target in ((), ("--target_params", 0.7)):
        assert call([*MICRO, *PROBED, *target, "--sorting_mode", "global", "--dry_run"]) == 0
        out = capsys.readouterr().out
        assert "sensitivity probe of each state decides" in out
    assert call([*MICRO, "--ratio_allocation", "sensitivity", "--dry_run"]) == 0
    assert "sensitivity probe" not in capsys.readouterr().out
