"""How strongly a state trains: schedules with a floor, decay by layer, mixing, averages, teachers. All of it is off by
default, goes through masks, cuts and small networks, and goes on to the same bits after a stop."""

import math

import pytest
import torch
from micro import DEPTH, MICRO, call, make_run, vit_micro

import main_imp_fillback as entry
from engine.optimizer import Schedule, layer_scales, parameter_groups


def parse(*flags):
    return entry.parse_args([*MICRO, *map(str, flags)])


@pytest.fixture
def refused(house, capsys):
    """refused(flags, words): the command ends in one line that holds the words, before any work."""

    def check(flags, *words):
        capsys.readouterr()
        assert call([*MICRO, *flags.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        for word in words:
            assert word in line

    return check


# -------------------------------------------------------------------------------------------------- learning rates


def test_a_cosine_with_a_floor_is_there_at_the_last_step():
    floor, lr = 0.002, 0.05
    rates = [Schedule("cosine", lr, 1, (), 3, 15, floor).rate(step) for step in range(15)]
    expected = [lr / 3, 2 * lr / 3, lr]
    expected += [floor + (lr - floor) * (1 + math.cos(math.pi * k / 11)) / 2 for k in range(12)]
    assert rates == pytest.approx(expected)
    assert rates[-1] == floor
    assert Schedule("cosine", lr, 4, (), 3, 13, floor).rate(12) == floor  # one step is left after the warm-up


def test_every_state_ends_at_the_floor(seen):
    run = seen("--struct", "refill", "--sched", "cosine", "--min_lr", "0.01", "--warmup", "0", "--pruning_times", "2")
    last = 2 * 3
    assert [run.steps[state, last].rate for state in (0, 1)] == pytest.approx([0.01, 0.01])
    assert run.steps[1, 1].rate == pytest.approx(0.05)


def test_layer_decay_by_hand_on_three_blocks():
    model = vit_micro(depth=3)
    scales = layer_scales(dict(model.named_parameters()), 3, 0.5)
    expected = {"patch_embed": 0.0625, "cls_token": 0.0625, "pos_embed": 0.0625, "norm": 1.0, "head": 1.0}
    for name, scale in scales.items():
        parts = name.split(".")
        by_hand = {"0": 0.125, "1": 0.25, "2": 0.5}[parts[1]] if parts[0] == "blocks" else expected[parts[0]]
        assert scale == by_hand, name


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize("flags", [(), ("--layer_decay", "0.5")])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(flags):
    model, args = vit_micro(depth=3), parse("--weight_decay", "0.1", *flags)
    groups = parameter_groups(args, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    scales = layer_scales(names.values(), 3, 0.5 if flags else 1.0)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            matrix = name.endswith("weight") and "norm" not in name
            assert (group["weight_decay"], group["scale"]) == (0.1 if matrix else 0.0, scales[name]), name


def test_layer_decay_slows_early_layers_in_a_run(house, tmp_path):
    moved = {}
    for flags in ((), ("--layer_decay", "0.5")):
        run = make_run(tmp_path / "run", "--momentum", "0", "--weight_decay", "0", "--warmup", "0", *flags)
        run.begin_state()
        training, before = run.set_up_state(), {n: p.detach().clone() for n, p in run.dense.named_parameters()}
        training.step()
        moved[flags] = {name: p.detach() - before[name] for name, p in run.dense.named_parameters()}
        run.close()
    full, slow = moved.values()
    for name in ("pos_embed", "blocks.0.mlp.fc1.weight", f"blocks.{DEPTH - 1}.attn.qkv.weight", "head.weight"):
        scale = layer_scales([name], DEPTH, 0.5)[name]
        torch.testing.assert_close(slow[name], full[name] * scale, rtol=1e-3, atol=1e-6)


def test_rates_that_cannot_be_are_refused(refused):
    refused("--min_lr 0.01", "--min_lr 0.01", "--sched cosine")
    refused("--sched cosine --min_lr 0.06", "--min_lr 0.06", "[0, --lr]")
    refused("--layer_decay 0", "--layer_decay 0.0", "(0, 1]")
    refused("--layer_decay nan", "--layer_decay nan", "(0, 1]")
    refused("--layer_decay 0.5 --reg_form gradient", "--reg_form decay")
    refused("--layer_decay 0.5 --arch res20s", "--layer_decay 0.5", "res20s")
