"""Laws of budgets: what is left costs what was asked, by one ranking or one share; a file's counts are reached."""

import itertools
import json

import pytest
import torch
import yaml
from micro import BOTH, HEADS, HIDDEN, MICRO, WHOLE, assert_same_tensors, clones, log_of, make_run, rows_of, runner

# isort: split
from micro import vit_micro
from test_cnn import res_micro

import export
import main_imp_fillback as entry
import models
from cli.parse import parse_args
from engine import latency
from engine.choose import choose_target
from families import family_of
from pruning.budget import best_units, global_counts, levels_of, scheduled_counts, uniform_counts
from pruning.ranking import mark_removed
from utils import RunError

words = str.split
RULES = {"global": global_counts, "uniform": uniform_counts}


def random_scores(units, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(group.count, generator=generator, dtype=torch.float64) for key, group in units.items()}


def cost_of(model, name):
    family = family_of(model)
    return lambda counts: family.cost(model, {key: range(count) for key, count in counts.items()})[name]


# ----------------------------------------------------------------------------------------------------- pure arithmetic
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["macs", "parameters"])
@pytest.mark.parametrize("build", [vit_micro, res_micro], ids=["heads and neurons", "filters"])
def test_a_budget_is_met_by_states_that_only_take_away(build, name, rule):
    """What is left never exceeds the limit, and no unit more would have fit; what is gone stays gone."""
    model = build()
    units, cost = family_of(model).units(model), cost_of(model, name)
    kept = {key: range(group.count) for key, group in units.items()}
    for state, share in enumerate((0.85, 0.7, 0.55)):
        scores = mark_removed(random_scores(units, state), kept)
        levels = levels_of(units, scores)
        counts = RULES[rule](scores, levels, cost, share * cost({}))
        assert cost(counts) <= share * cost({})
        for key, steps in levels.items():
            if counts[key] < steps[0]:
                assert cost(counts | {key: counts[key] + 1}) > share * cost({}), key
        if build is vit_micro:
            assert cost(counts) > (share - 0.01) * cost({})
        now = best_units(scores, counts)
        for key, ids in now.items():
            assert set(ids) <= set(kept[key])
            assert len(ids) == counts[key] >= 1
        kept = now


def test_one_share_meets_its_budget_also_where_heads_are_coarse_and_neurons_have_gone():
    """A head of this model is 2.8% of its MACs, and what earlier states took cannot fill the rest."""
    model = models.build_model("vit_mini", 10, 28, patch_size=7)
    units, cost = family_of(model).units(model), cost_of(model, "macs")
    kept = {key: range(group.count) for key, group in units.items()}
    for state in range(1, 12):
        limit = 0.514 ** (state / 11) * cost({})
        scores = mark_removed({key: torch.zeros(group.count) for key, group in units.items()}, kept)
        counts = uniform_counts(scores, levels_of(units, scores), cost, limit)
        assert 0.99 * limit < cost(counts) <= limit, state
        kept = best_units(scores, counts)


def test_filters_that_save_nothing_stay():
    model = res_micro(projected=True)
    units, cost = family_of(model).units(model), cost_of(model, "macs")
    scores = random_scores(units)
    for rule in RULES.values():
        counts = rule(scores, levels_of(units, scores), cost, 0.6 * cost({}))
        fixed = [key for key, group in units.items() if not group.removable]
        assert fixed
        assert all(counts[key] == units[key].count for key in fixed)


COSTS = {"a": 3, "b": 5, "c": 1}


def linear(counts):
    return 10 + sum(COSTS[key] * count for key, count in counts.items())


def sizes(counts):
    return {key: torch.zeros(count, dtype=torch.float64) for key, count in counts.items()}


def total(left):
    return linear({key: len(ids) for key, ids in left.items()})


def greedy(scores, minimum, limit, closed=()):
    """The order by hand: one unit after the other, the worst per cost of all; then what fits comes back. While more
    than 1% is free, the same without what the last layer gave away from its last unit on."""
    pool = [(value / COSTS[key], key, unit) for key, values in scores.items() for unit, value in enumerate(values)]
    pool = [entry for entry in pool if entry[2] not in sorted(range(4), key=lambda i: -scores[entry[1]][i])[:minimum]]
    left, gone = {key: {0, 1, 2, 3} for key in scores}, []
    for value, key, unit in sorted(pool):
        if total(left) <= limit:
            break
        if not any(key == name and value >= from_here for name, from_here in closed):
            left[key].remove(unit)
            gone.append((key, unit))
            last = key, value
    if total(left) > limit:
        return None
    for key, unit in reversed(gone):
        if total(left | {key: left[key] | {unit}}) <= limit:
            left[key] = left[key] | {unit}
    if gone and total(left) < 0.99 * limit:
        other = greedy(scores, minimum, limit, (*closed, last))
        if other and total(other) > total(left):
            return other
    return {key: sorted(ids) for key, ids in left.items()}


def test_the_global_order_is_that_of_a_reference():
    generator = torch.Generator().manual_seed(1)
    for draw in range(150):
        scores = {key: torch.rand(4, generator=generator, dtype=torch.float64) for key in COSTS}
        minimum, limit = draw % 3, 10 + 36 * float(torch.rand((), generator=generator))
        levels = {key: list(range(4, minimum - 1, -1)) for key in COSTS}
        kept = best_units(scores, global_counts(scores, levels, linear, limit))
        reference = greedy({key: value.tolist() for key, value in scores.items()}, minimum, limit)
        assert kept == (reference or best_units(scores, dict.fromkeys(COSTS, minimum)))


def test_of_equal_scores_per_cost_the_first_stays():
    scores = {"a": torch.full((4,), 3.0), "b": torch.full((4,), 5.0), "c": torch.full((4,), 1.0)}
    levels = {key: [4, 3, 2, 1] for key in COSTS}
    counts = global_counts(scores, levels, linear, linear({"a": 4, "b": 3, "c": 1}))
    assert counts == {"a": 4, "b": 3, "c": 1}
    assert best_units(scores, counts)["c"] == [0]


def test_uniform_gives_all_layers_one_share():
    """Within half a step, and what fills the rest; scores of one layer being large changes nothing."""
    totals = {"a": 40, "b": 24, "c": 64}
    scores = {
        key: torch.rand(count, dtype=torch.float64) * (1000 if key == "a" else 1) for key, count in totals.items()
    }
    levels = {key: list(range(count, 0, -1)) for key, count in totals.items()}
    for limit in range(40, 310, 13):
        counts = uniform_counts(scores, levels, linear, limit)
        assert limit - 1 < linear(counts) <= limit
        filled = {key: 5 / cost for key, cost in COSTS.items()}  # no more than one of the costliest unit
        lowest = [(counts[key] - 0.5 - filled[key]) / count for key, count in totals.items()]
        assert max(lowest) <= min((counts[key] + 0.5) / count for key, count in totals.items())


@pytest.mark.parametrize("rule", RULES)
def test_counts_are_multiples_and_heads_are_left_alone(rule):
    model = vit_micro()
    units, cost = family_of(model).units(model), cost_of(model, "macs")
    scores = random_scores(units)
    counts = RULES[rule](scores, levels_of(units, scores, 2, 5), cost, 0.6 * cost({}))
    for key, group in units.items():
        assert counts[key] == group.count or group.kind == "head" or (counts[key] % 5 == 0 and counts[key] >= 5)
        assert counts[key] >= 2
    assert len({counts[key] for key in units}) > 1


def test_a_file_is_reached_on_the_schedule_of_each_layer():
    wanted, totals = {"a": 3, "b": 0, "c": 8}, {"a": 12, "b": 5, "c": 8}
    found = [scheduled_counts(wanted, totals, "linear", state, 4) for state in (1, 2, 3)]
    assert found == [{"a": 9, "b": 3, "c": 8}, {"a": 6, "b": 1, "c": 8}, wanted]
    assert scheduled_counts(wanted, totals, "constant", 1, 4) == wanted
    for count, total in itertools.product(range(30), (30, 49)):
        assert scheduled_counts({"a": count}, {"a": total}, "geometric", 6, 7) == {"a": count}


# ------------------------------------------------------------------------------------------------------------ in runs
@pytest.fixture
def run(house, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(models.BUILDERS, "res_micro", res_micro)
    monkeypatch.setattr(entry, "write_report", lambda _: None)  # pictures take longer than these runs
    monkeypatch.setattr(export, "size_table", lambda *_: "")
    base = [flag for flag in MICRO if flag not in ("--no-export", "--rate", "0.3")]
    return runner(tmp_path, capsys, [*base, "--epochs", "1"])


def by_layer(folder):
    rows = rows_of(folder / "units.csv")
    return {row["layer"]: int(row["kept"]) for row in rows if row["state"] == rows[-1]["state"]}


@pytest.mark.parametrize(("flags", "name", "share"), [
    ("--vit_structured --vit_prune_target both --target_macs 0.5", "macs", 0.5),
    ("--arch res_micro --target_params 0.6 --ratio_allocation global", "parameters", 0.6),
], ids=["heads and neurons", "filters"])  # fmt: skip
def test_a_run_ends_within_its_budget_and_exports_without_loss(flags, name, share, run):
    """Another run reaches the same counts by the units.csv of this one."""
    done = run(*words(flags), name="first")
    rows = rows_of(done.dir / "states.csv")
    whole, left = int(rows[0][name]), [int(row[name]) / int(rows[0][name]) for row in rows]
    assert left == sorted(left, reverse=True)
    assert left[1] <= share**0.5 * (1 + 1e-9)
    assert share - 0.01 < left[2] <= share
    assert f"budget: {left[2]:.4f} of the " in log_of(done.dir)
    small = export.load(done.dir / "model")
    assert family_of(small).cost(small, {})[name] == left[2] * whole
    proof = json.loads((done.dir / "model" / "parity.json").read_text())
    assert proof["max_difference_float64"] <= proof["bound"]
    without = flags.partition(" --target")[0]
    again = run(*words(without), "--ratio_allocation", done.dir / "units.csv", "--seed", 7, name="again")
    assert by_layer(again.dir) == by_layer(done.dir)
    assert yaml.safe_load((again.dir / "args.yaml").read_text())["unit_counts"] == by_layer(done.dir)


def test_a_file_of_counts_is_reached_and_goes_along_when_the_run_is_resumed(run, tmp_path):
    """Layers that it does not name stay whole; nobody needs the file a second time."""
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"blocks.0.attn": 1, "blocks.1.mlp": 7}))
    flags = [*BOTH, "--ratio_allocation", path, "--ratio_schedule", "constant", "--pruning_times", 2]
    done = run(*flags)
    wanted = {"blocks.0.attn": 1, "blocks.0.mlp": HIDDEN, "blocks.1.attn": HEADS, "blocks.1.mlp": 7}
    assert by_layer(done.dir) == wanted
    path.unlink()
    run("--resume", "--pruning_times", 3, base=[])
    assert len(rows_of(done.dir / "states.csv")) == 3
    assert by_layer(done.dir) == wanted


def test_a_growing_budget_of_filters_takes_no_more_states(run):
    run("--arch", "res_micro", "--target_macs", 0.6, "--pruning_times", 2)
    assert "--pruning_times 3" in run("--resume", "--pruning_times", 3, base=[], code=2).err


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_without_a_target_the_allocation_is_the_sorting_mode(allocation, house):
    base = [*MICRO, "--vit_structured"]
    args = parse_args([*base, "--ratio_allocation", allocation])
    assert args.sorting_mode == {"uniform": "layer-wise", "global": "global"}[allocation]
    assert args.notes == []
    assert parse_args([*MICRO, "--ratio_allocation", allocation]).notes[-1].startswith("--ratio_allocation: has no")


def test_flags_that_a_target_leaves_without_effect_are_noted(house):
    flags = "--target_macs 0.5 --rate 0.4 --mlp_prune_ratio 0.2 --rank_by score_per_mac --sorting_mode global"
    notes = parse_args([*MICRO, *BOTH, *words(flags)]).notes
    assert [note.partition(":")[0] for note in notes] == ["--rate", "--mlp_prune_ratio", "--rank_by"]
    kept = parse_args([*MICRO, *BOTH, *words("--target_macs 0.5 --rate 0.4 --no-refill")]).notes
    assert kept == []  # single weights go by it


def test_the_plan_shows_the_budget(run):
    for flags, remark in (("", "may differ"), (" --ratio_allocation global", "up to the scores")):
        out = run(*BOTH, *words(f"--target_params 0.5{flags}"), "--dry_run").out
        rows = [words(line) for line in out.splitlines() if line.strip()[:1].isdigit() and "%" in line]
        left = [int(row[4].replace(",", "")) / WHOLE for row in rows]
        assert left[0] == 1
        assert 0.99 * 0.5**0.5 < left[1] <= 0.5**0.5
        assert 0.495 < left[2] <= 0.5
        assert remark in out
    out = run(*BOTH, "--target_latency_ms", 3, "--dry_run").out
    assert "Milliseconds are measured when the run starts" in out


def test_a_budget_is_a_share_of_the_dense_network_that_merges_no_tokens(run):
    def left(*flags):
        out = run(*words("--arch vit_mini --img_size 28 --pruning_times 2 --dry_run"), *BOTH, *words(*flags)).out
        return float(out.split("About")[0].split(" G")[-2].split()[-1])

    assert left("--token_merge 4 --min_units 3 --rate 0") < 0.9 * left("--rate 0")
    assert left("--token_merge 4 --target_macs 0.5") == left("--target_macs 0.5") == round(left("--rate 0") / 2, 4)


# ------------------------------------------------------------------------------------------------------- milliseconds

MEASURED = {"a": {"counts": [0, 2, 4], "ms": [0, 2, 8]}, "b": {"counts": [1, 5], "ms": [1, 4]}}
TABLE = {"dense_ms": 14.0, "base_ms": 2.0, "layers": MEASURED, "states": {}}


def test_between_measured_counts_the_cost_is_linear():
    cost = latency.table_cost(TABLE)
    assert cost({}) == TABLE["dense_ms"]
    assert cost({"a": 3}) == 2 + 5 + 4
    assert cost({"a": 1, "b": 2}) == 2 + 1 + 1.75


def test_the_scale_of_the_table_is_corrected_until_the_real_network_is_near_enough():
    """A network that takes 1 ms and 1.5 times what the table says of a machine that is no table."""
    scores, levels = {"a": torch.arange(40.0)}, {"a": list(range(40, 0, -1))}

    def cost(counts):
        return 0.1 * counts["a"] if counts else 4.0

    def allocate(limit):
        return global_counts(scores, levels, cost, limit)

    record = latency.meet(3.0, allocate, cost, lambda counts: 1 + 1.5 * cost(counts))
    assert [one["limit_ms"] for one in record["tried"][:2]] == [3.0, 3.0 * 3.0 / 5.5]
    assert abs(record["measured_ms"] - 3.0) <= 0.15
    assert 1 + 1.5 * cost(allocate(record["limit_ms"])) == record["measured_ms"]
    noise = iter([9.0, 4.0, 5.0])
    assert latency.meet(3.0, allocate, cost, lambda _: next(noise), rounds=3)["measured_ms"] == 4.0


def test_a_resumed_run_takes_what_was_measured_before(house, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.allocation.Timed.measure", lambda *_: None)  # here it takes what the table says
    run = make_run(tmp_path / "run", *BOTH, *words("--target_latency_ms 9 --struct refill"))
    layers = {
        key: {"counts": [1, group.count], "ms": [1.0, 1.0 + (2.0 if group.kind == "head" else 3.0)]}
        for key, group in run.units.items()
    }
    table = {**TABLE, "layers": layers}  # dense_ms is 2 + 2 * 3 + 2 * 4
    table["dense_ms"] = 16.0
    latency.write_table(run.save_dir, table)
    run.progress.state = 2
    measured = iter([(1.5, 2.0), (1.1, 2.0)])  # 12 ms where the dense network takes 16, then near enough
    monkeypatch.setattr(latency, "small_ms", lambda *_: next(measured))
    first = choose_target(run)
    record = latency.read_table(run.save_dir)["states"]["2"]
    assert (record["asked_ms"], record["measured_ms"], len(record["tried"])) == (9.0, 8.8, 2)
    assert choose_target(run)[1] == first[1]  # nothing is left to be measured
    counts = {key: len(ids) for key, ids in first[1].items()}
    assert 0.95 * record["limit_ms"] < latency.table_cost(table)(counts) <= record["limit_ms"]
    (run.save_dir / latency.FILE).write_text("{")
    with pytest.raises(RunError, match="damaged .*; delete it"):
        choose_target(run)
    run.close()


def test_a_table_is_measured_with_real_modules():
    """Each layer at its own counts, those of equal shape once; the network and what is drawn later are as before."""
    for model in (vit_micro(), res_micro()):
        units = family_of(model).units(model)
        before, state = clones(model.state_dict()), torch.get_rng_state()
        table = latency.measure_table(model, units, 2, dict.fromkeys(units, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert_same_tensors(model.state_dict(), before)
        assert latency.table_cost(table)({}) == pytest.approx(table["dense_ms"])
        for key, group in units.items():
            counts, ms = table["layers"][key]["counts"], table["layers"][key]["ms"]
            assert (counts[0], counts[-1]) == (1, group.count)
            assert 0 < ms[0] <= ms[-1]
            assert ms == sorted(ms)
    assert table["layers"]["layer2.1.conv1"]["ms"] != table["layers"]["layer2.0.conv1"]["ms"]
