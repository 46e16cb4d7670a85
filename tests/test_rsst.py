"""Laws of the penalty: its shapes, its dose, the step of the cut, and which weights it touches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsst import SHAPES, Penalty, Ramp, cut_step, predicted_dose

FORMULAS = {
    "x": lambda u, p: u, "x^2": lambda u, p: u * u, "x^3": lambda u, p: u * u * u,
    "exp": lambda u, p: (math.exp(u) - 1) / (math.e - 1), "exp_custom": lambda u, p: (math.exp(u) - 1) / (math.e - 1),
    "exp_custom_exponents": lambda u, p: (math.exp(u**p) - 1) / (math.e - 1),
}  # fmt: skip
schedules = pytest.mark.parametrize("schedule", sorted({*SHAPES, *FORMULAS}))


# ---------------------------------------------------------------------------------------------- how large it is
@schedules
@pytest.mark.parametrize(("strength", "steps", "exponent"), [(0.7, 13, 3.0), (3.0, 100, 4.0), (1.0, 1, 5.5)])
def test_lambda_exponents_and_dose_match_the_formulas_of_the_specification(schedule, strength, steps, exponent):
    ramp = Ramp(schedule, strength, steps, steps, exponent)
    shapes = [FORMULAS[schedule](k / steps, exponent) for k in range(1, steps + 1)]
    done = 0.0
    for k, shape in enumerate(shapes, 1):
        done += 20 * strength * shape / math.fsum(shapes)
        assert ramp.value(k) == pytest.approx(strength * shape, rel=1e-12)
        assert ramp.exponent_at(k) == pytest.approx(20 * strength * shape / math.fsum(shapes), rel=1e-10)
        assert ramp.dose(k) == pytest.approx(done, rel=1e-10)
    assert ramp.dose(steps) == pytest.approx(20 * strength, rel=1e-12)
    # nothing before the first step and after the last
    assert ramp.value(0) == ramp.value(steps + 1) == ramp.exponent_at(0) == ramp.exponent_at(steps + 1) == 0.0
    assert (ramp.dose(0), ramp.dose(steps + 5)) == (0.0, ramp.dose(steps))
    assert Ramp("exp_custom_exponents", 1.0, 4, 4).exponent == 4.0


def test_the_older_clock_restarts_each_epoch():
    teeth = [2.0 * (k / 4) ** 2 for k in (1, 2, 3, 4)]
    values = [Ramp("x^2", 2.0, 12, 4).value(step) for step in range(1, 14)]
    assert values == pytest.approx([*teeth * 3, 0.0], rel=1e-12)
    # an unfinished epoch at the end of a state that is cut within one
    assert [Ramp("x", 1.0, 6, 4).value(step) for step in (4, 5, 6, 7)] == [1.0, 0.25, 0.5, 0.0]


# ------------------------------------------------------------------------------------------------- when it cuts
@pytest.mark.parametrize(("total", "per_epoch", "finish", "expected"), [
    (100, 10, 0.25, 30),  # 25 lies between 20 and 30: the later border, 5 < 10 steps away
    (100, 10, 0.24, 20), (1000, 250, 0.25, 250),
    (4000, 1000, 0.3, 1000),  # 1200 moves by 200 < 400
    (4000, 1000, 0.36, 1440),  # 1440 would move by 440 >= 400
    (4000, 1000, 0.35, 1400),  # by exactly a tenth: stays
    (1000, 20, 0.01, 20),  # the nearest border is 0: never 0, and 20 is near enough
    (1000, 200, 0.05, 50),  # 200 is too far
    (7, 7, 1.0, 7),
    (3, 3, 0.25, 1),  # one epoch of three steps: round(0.75)
    (2, 1, 0.1, 1),  # at least one step
])  # fmt: skip
def test_cut_step_by_hand(total, per_epoch, finish, expected):
    assert cut_step(total, per_epoch, finish) == expected


@settings(max_examples=100, deadline=None)
@given(epochs=st.integers(1, 60), per_epoch=st.integers(1, 300), finish=st.floats(0.001, 1.0))
def test_cut_step_laws(epochs, per_epoch, finish):
    total = epochs * per_epoch
    wanted = max(1, round(finish * total))
    step = cut_step(total, per_epoch, finish)
    assert 1 <= step <= total
    borders = [per_epoch * epoch for epoch in range(1, epochs + 1)]
    # nearest border, the later one of a tie
    nearest = min(borders, key=lambda border: (abs(border - wanted), -border))
    assert step == (nearest if 10 * abs(nearest - wanted) < total else wanted)


# ------------------------------------------------------------------------------------------- what it does to weights
def weights_and_doomed(seed=0, dtype=torch.float32):
    """Two weights and a bias, some of whose elements are doomed, and one parameter without any."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (8, 6), "a.bias": (8,), "b.weight": (5, 4), "c.weight": (3, 3)}
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in shapes.items()
    }
    doomed = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    doomed["a.weight"][2:5] = 1
    doomed["a.bias"][2:5] = 1
    doomed["b.weight"][:, 1] = 1
    return parameters, doomed


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("schedule", "strength", "steps"), [
    ("x", 1.0, 1), ("exp_custom_exponents", 1.0, 2), ("exp", 1.0, 10), ("x^2", 0.1, 40), ("x^3", 1.0, 300),
])  # fmt: skip
def test_doomed_weights_shrink_by_exp_20_g(schedule, strength, steps, optimizer, autocast):
    """A state with zero gradients: the optimizer steps, then the penalty acts."""
    parameters, doomed = weights_and_doomed()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    training = optimizer(parameters.values(), lr=0.1, weight_decay=0.0)
    ramp, penalty = Ramp(schedule, strength, steps, steps), Penalty(parameters, doomed)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for step in range(1, steps + 1):
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            training.step()
            penalty.set_(ramp.exponent_at(step))
            penalty.shrink_(ramp.parts)
    for name, mask in doomed.items():
        gone, after = mask.bool(), parameters[name].detach()
        assert torch.equal(after[~gone], before[name][~gone])  # kept weights keep their bits
        ratio = after[gone].double() / before[name][gone].double()
        torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(-20 * strength)), rtol=1e-5, atol=0)


def test_shrink_by_hand():
    parameters = {"w": torch.nn.Parameter(torch.tensor([1.0, -2.0, 4.0]))}
    penalty = Penalty(parameters, {"w": torch.tensor([0.0, 1.0, 1.0])})
    assert penalty.start_norm == pytest.approx(math.sqrt(20), rel=1e-12)
    assert penalty.residual() == 1.0
    penalty.set_(math.log(4))
    penalty.shrink_()
    assert parameters["w"].tolist() == pytest.approx([1.0, -0.5, 1.0], rel=1e-6)
    assert penalty.norm() == pytest.approx(math.sqrt(1.25), rel=1e-6)
    assert penalty.residual() == pytest.approx(0.25, rel=1e-6)
    # the residual of a state that goes on refers to its start
    assert Penalty(parameters, {"w": torch.tensor([0.0, 1.0, 0.0])}, start_norm=5.0).residual() == pytest.approx(0.1)


def test_without_doomed_weights_there_is_no_penalty():
    parameters = {"w": torch.nn.Parameter(torch.ones(3))}
    for penalty in (Penalty(parameters, {}), Penalty(parameters, {"w": torch.zeros(3)})):
        assert not penalty
        assert penalty.residual() == 0.0
        penalty.set_(5.0)
        penalty.shrink_()
        assert parameters["w"].tolist() == [1, 1, 1]
    assert Penalty(parameters, {"w": torch.tensor([0.0, 1.0, 0.0])})
    zeros = Penalty({"w": torch.zeros(3)}, {"w": torch.ones(3)})
    assert (zeros.start_norm, zeros.residual()) == (0.0, 0.0)


def test_the_gradient_form_and_blocking_touch_doomed_weights_only():
    parameters, doomed = weights_and_doomed()
    gradients = {name: torch.randn(parameter.shape) for name, parameter in parameters.items()}
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    penalty = Penalty(parameters, doomed)

    def changed(act):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        act()
        for name, parameter in parameters.items():
            gone = doomed[name].bool()
            assert torch.equal(parameter.grad[~gone], gradients[name][~gone])
            assert torch.equal(parameter.detach(), values[name])  # gradients change, weights do not
            yield name, gone, parameter.grad[gone]

    penalty.set_(0.3)
    for name, gone, found in changed(penalty.add_to_gradients_):
        expected = gradients[name][gone].double() + 0.3 * values[name][gone].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert not any(found.any() for *_, found in changed(penalty.block_gradients_))
    parameters["b.weight"].grad = None  # a branch without a gradient is no obstacle
    penalty.block_gradients_()
    assert parameters["b.weight"].grad is None


# ------------------------------------------------------------------------------------------ dose of the gradient form
@schedules
@pytest.mark.parametrize("period", [5, 20])
def test_predicted_dose_equals_an_independent_sum(schedule, period):
    rates = [0.1 / (1 + k) for k in range(20)]
    ramp = Ramp(schedule, 0.8, 20, period, 3.0)
    doses = predicted_dose(ramp, rates, momentum=0.9)
    assert len(doses) == 21
    assert doses[0] == 0.0
    for last in range(1, 21):
        terms = [
            rates[k - 1] * 0.8 * FORMULAS[schedule](((k - 1) % period + 1) / period, 3.0) / (1 - 0.9)
            for k in range(1, last + 1)
        ]
        assert doses[last] == pytest.approx(math.fsum(terms), rel=1e-9)


@pytest.mark.parametrize(("momentum", "period"), [(0.0, 100), (0.5, 2000), (0.9, 100)])
def test_sgd_without_a_loss_shrinks_by_the_predicted_dose(momentum, period):
    """SGD with v <- m v + l w, w <- w - lr v on the penalty alone.

    With a = lr l the slow root of r^2 - (1 + m - a) r + m is 1 - d, d = a/(1-m) + m a^2/(1-m)^3 + ..., so the dose
    per step is a/(1-m) times 1 + m a/(1-m)^2 + d/2 + ... . At the largest lambda here a/(1-m) = 0.005: the terms are
    0.005 m/(1-m) <= 0.045 and 0.0025. The buffer also lags m/(1-m) <= 9 steps behind, at most 9 x 0.005 = 0.045 of
    a dose of 5, 0.01. All together stay below 0.06.
    """
    steps, rate, strength = 2000, 0.01, 0.5 * (1 - momentum)
    ramp = Ramp("x", strength, steps, period)
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    penalty = Penalty({"w": weight}, {"w": torch.tensor([1.0, 0.0])})
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=momentum)
    for step in range(1, steps + 1):
        weight.grad = torch.zeros_like(weight)
        penalty.set_(ramp.value(step))
        penalty.add_to_gradients_()
        optimizer.step()
    predicted = predicted_dose(ramp, [rate] * steps, momentum)[-1]
    # sum of k/period over the state, by hand
    assert predicted == pytest.approx(0.005 * steps * (period + 1) / (2 * period), rel=1e-9)
    assert -math.log(weight[0].item()) == pytest.approx(predicted, rel=0.06)
    assert weight[1].item() == 1.0
