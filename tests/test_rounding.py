"""Laws of `--round_to`: what a layer keeps is the nearest multiple, a pool as nearly what it kept without."""

import itertools
import math

import pytest
import torch
from micro import call, rows_of, vit_micro
from test_cnn import res_micro

import models
from cli.parse import parse_args
from engine.model import make_model, units_of_run
from families import family_of
from pruning.ranking import keep_count, mark_removed, rank_units, select_filters, select_units
from pruning.rounding import fit_counts, fitting_count

words = str.split


@pytest.mark.parametrize(("wanted", "count", "available", "minimum", "round_to", "keeps"), [
    (13, 24, 24, 1, 1, 13), (13, 24, 24, 1, 8, 16), (11, 24, 24, 1, 8, 8),
    (12, 24, 24, 1, 8, 16),  # a tie goes up
    (1, 24, 24, 1, 3, 3),  # but one is nearer to 0
    (1, 24, 24, 0, 3, 0),
    (3, 24, 24, 9, 8, 16),  # never below what min_units asks for
    (23, 24, 16, 1, 8, 16),  # never above what is left
    (21, 24, 21, 1, 8, 16), (20, 21, 21, 1, 8, 16),
    (21, 21, 21, 1, 8, 21),  # whole stays whole
    (5, 7, 7, 1, 8, 7),  # no multiple fits
    (2, 24, 5, 1, 8, 5),
])  # fmt: skip
def test_a_layer_keeps_the_nearest_multiple(wanted, count, available, minimum, round_to, keeps):
    assert fitting_count(wanted, count, available, minimum, round_to) == keeps


def levels(count, available, minimum, round_to):
    """All counts that a layer may keep."""
    found = [n for n in range(minimum, available + 1) if n % round_to == 0]
    return sorted({*found, count} if available == count else found) or [available]


def test_a_pool_keeps_as_many_as_it_can_of_what_was_wanted():
    """Against all combinations: no choice of multiples comes nearer; of two equally near, the larger one is taken."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(200):
        round_to, minimum, counts = draw(2, 6), draw(0, 3), {key: 5 * draw(2, 6) for key in "abc"}
        counts = {key: count // round_to * round_to for key, count in counts.items()}
        wanted = {key: draw(minimum, count + 1) for key, count in counts.items()}
        kept = fit_counts(wanted, counts, counts, minimum, round_to)
        choices = [levels(counts[key], counts[key], minimum, round_to) for key in wanted]
        total = sum(wanted.values())
        nearest = min(abs(sum(choice) - total) for choice in itertools.product(*choices))
        assert abs(sum(kept.values()) - total) == nearest
        best = max(sum(choice) for choice in itertools.product(*choices) if abs(sum(choice) - total) == nearest)
        assert sum(kept.values()) == best
        assert all(kept[key] in choice for key, choice in zip(wanted, choices, strict=True))


def test_quota_moves_first_where_a_layer_is_farthest_from_its_wish():
    counts = {"a": 32, "b": 32, "c": 32}
    assert fit_counts({"a": 11, "b": 10, "c": 11}, counts, counts, 1, 8) == {"a": 16, "b": 8, "c": 8}
    assert fit_counts({"a": 13, "b": 12, "c": 13}, counts, counts, 1, 8) == {"a": 16, "b": 8, "c": 16}
    # a sum that is 33 too small is near enough where a step of b costs 80; one that is 44 too large is not
    counts, costs = {"a": 32, "b": 32}, {"a": 1, "b": 10}
    assert fit_counts({"a": 11, "b": 11}, counts, counts, 1, 8, costs) == {"a": 8, "b": 8}
    assert fit_counts({"a": 12, "b": 3}, counts, counts, 9, 8, costs) == {"a": 16, "b": 16}  # at least 9 each
    assert fit_counts({"a": 20, "b": 20}, counts, counts, 1, 8, costs) == {"a": 24, "b": 16}


@pytest.mark.parametrize("sorting_mode", ["layer-wise", "global"])
def test_the_best_stay_and_states_only_take_away(sorting_mode):
    scores = {key: torch.rand(32, generator=torch.Generator().manual_seed(i)) + i / 3 for i, key in enumerate("abc")}
    plain = dict.fromkeys("abc", range(32))
    kept = dict.fromkeys("abc", list(range(32)))
    for ratio in (0.0, 0.1, 0.3, 0.5, 0.55, 0.8, 0.97):
        plain = select_units(mark_removed(scores, plain), ratio, sorting_mode)
        before, kept = kept, select_units(mark_removed(scores, kept), ratio, sorting_mode, round_to=8)
        assert all(set(kept[key]) <= set(before[key]) for key in scores)
        for key, ids in kept.items():
            assert len(ids) % 8 == 0
            assert ids == sorted(scores[key].argsort(descending=True)[: len(ids)].tolist())
            if sorting_mode == "layer-wise":
                assert len(ids) == max(8, math.floor(keep_count(32, ratio) / 8 + 0.5) * 8)
            else:
                assert abs(len(ids) - len(plain[key])) < 16
        if sorting_mode == "global":
            assert abs(sum(map(len, kept.values())) - max(24, keep_count(96, ratio))) <= 4


def test_by_cost_heads_stay_and_the_macs_are_as_near_as_a_step_allows():
    model = vit_micro(num_heads=6, mlp_ratio=4)
    family = family_of(model)
    units = family.units(model)
    scores = {
        key: torch.rand(group.count, generator=torch.Generator().manual_seed(i)).double()
        for i, (key, group) in enumerate(units.items())
    }
    for ratio in (0.2, 0.35, 0.5):
        ratios = {"head": ratio, "neuron": ratio}
        exact, kept = (rank_units(model, units, scores, ratios, "global", 1, "score_per_mac", n) for n in (1, 8))
        macs = [family.cost(model, ids)["macs"] for ids in (exact, kept)]
        step = 8 * max(group.macs(model, group) for group in units.values() if group.kind == "neuron")
        assert abs(macs[0] - macs[1]) <= step / 2
        for key, group in units.items():
            if group.kind == "head":
                assert kept[key] == exact[key]
            else:
                assert len(kept[key]) % 8 == 0
                assert kept[key] == sorted(scores[key].argsort(descending=True)[: len(kept[key])].tolist())


def test_filters_by_density():
    masks = {"a": torch.zeros(32, 4), "b": torch.zeros(32, 4)}
    masks["a"][:, :1] = 1  # a quarter of 32 is 8
    masks["b"][:13] = 1  # 13 filters whole
    scores = {"a": torch.arange(32.0), "b": torch.cat([torch.arange(13.0), torch.full((19,), -math.inf)])}
    assert select_filters(masks, scores, 0.0, 8) == {"a": list(range(24, 32)), "b": list(range(5, 13))}
    assert select_filters(masks, scores, 0.2, 8) == {"a": list(range(16, 32)), "b": list(range(5, 13))}
    assert select_filters(masks, scores, 0.0) == {"a": list(range(24, 32)), "b": list(range(13))}


RUNS = {
    "vit": "--arch vit_micro --struct rsst --vit_structured --vit_prune_target both --sorting_mode global --rate 0.5",
    "cnn": "--arch res_micro --struct refill --rate 0.3 --img_size 8 --lr 0.05",
}


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_plan_and_run_count_alike(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.BUILDERS, "res_micro", res_micro)
    folder = tmp_path / "run"
    argv = "--dataset digits --device cpu --amp off --train_limit 40 --batch_size 20 --epochs 1 --no-export"
    argv = [*words(f"{argv} {flags} --pruning_times 3 --round_to 4"), "--save_dir", folder]
    assert call([*argv, "--dry_run"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    planned = [row[2:-3] for row in table if row and row[0].isdigit() and row[1].endswith("%")]
    assert call(argv) == 0, capsys.readouterr().err
    rows = rows_of(folder / "units.csv")
    states = rows_of(folder / "states.csv")
    names = [name for name in ("heads", "neurons", "filters") if name in states[0]]
    assert planned == [[f"{int(state[name]):,}" for name in names] for state in states]
    assert int(states[0][names[-1]]) > int(states[1][names[-1]]) > 0
    for row in rows:
        multiple = row["kind"] == "head" or int(row["kept"]) % 4 == 0
        assert multiple or row["state"] == "0"
    assert any(int(row["kept"]) % 4 for row in rows if row["kind"] == "head") == ("vit" in flags)
    # the run goes on by its own flags
    assert call(["--save_dir", folder, "--resume", "--round_to", 8]) == 2
    assert "--round_to 8" in capsys.readouterr().err


@pytest.mark.usefixtures("house")
def test_what_nothing_goes_by_is_noted():
    for flags, noted in {
        "--arch vit_micro": True,
        "--arch vit_micro --vit_structured": True,  # heads only
        "--arch vit_micro --vit_structured --vit_prune_target both": False,
        "--arch res20s": False,
        "--arch res20s --struct imp": True,
    }.items():
        args = parse_args(words(f"{flags} --dataset digits --round_to 8"))
        for _ in range(2):
            units_of_run(args, make_model(args))
        assert sum("--round_to 8" in note for note in args.notes) == noted, flags
