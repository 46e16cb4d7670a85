"""Laws of budgets: what is left costs what was asked, by one ranking or one share; a file's counts are reached."""

import itertools

import pytest
import torch
from micro import vit_micro
from test_cnn import res_micro

from families import family_of
from pruning.budget import best_units, global_counts, levels_of, scheduled_counts, uniform_counts
from pruning.ranking import mark_removed

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
