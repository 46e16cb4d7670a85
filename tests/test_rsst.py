"""Laws of the penalty: its shapes, its dose, the step of the cut, and which weights it touches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsst import SHAPES, Penalty, Ramp, cut_step, predicted_dose

FORMULAS = {
    "x": lambda u, p: u,
    "x^2": lambda u, p: u * u,
    "x^3": lambda u, p: u * u * u,
    "exp": lambda u, p: (math.exp(u) - 1) / (math.e - 1),
    "exp_custom": lambda u, p: (math.exp(u) - 1) / (math.e - 1),
    "exp_custom_exponents": lambda u, p: (math.exp(u**p) - 1) / (math.e - 1),
}
schedules = pytest.mark.parametrize("schedule", sorted(FORMULAS))


def one_ramp(schedule, strength, steps, exponent=4.0):
    return Ramp(schedule, strength, steps, steps, exponent)


# ---------------------------------------------------------------------------------------------- how large it is


def test_the_schedules_are_those_of_the_flags():
    assert set(SHAPES) == set(FORMULAS)


@schedules
@pytest.mark.parametrize("exponent", [1.0, 3.0, 4.0, 5.5])
def test_shapes_run_from_0_to_1_and_match_their_formula(schedule, exponent):
    shape = SHAPES[schedule]
    assert shape(0.0, exponent) == 0.0
    assert shape(1.0, exponent) == pytest.approx(1.0, abs=1e-15)
    grid = [i / 200 for i in range(201)]
    values = [shape(u, exponent) for u in grid]
    assert values == sorted(values)
    assert len(set(values)) > 100  # it rises, it does not jump
    for u, value in zip(grid, values, strict=True):
        assert value == pytest.approx(FORMULAS[schedule](u, exponent), rel=1e-12, abs=1e-15)


@schedules
@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_lambda_rises_from_0_to_g_and_stops(schedule, strength, steps):
    ramp = one_ramp(schedule, strength, steps)
    values = [ramp.value(step) for step in range(steps + 2)]
    assert values[0] == 0.0  # before the first step
    assert values[-1] == 0.0  # after the last one
    assert values[steps] == pytest.approx(strength, rel=1e-12)
    assert values[:-1] == sorted(values[:-1])
    for step in range(1, steps + 1):
        assert values[step] == pytest.approx(strength * FORMULAS[schedule](step / steps, 4.0), rel=1e-12)


@schedules
@settings(max_examples=40, deadline=None)
@given(strength=st.floats(0.01, 5), steps=st.integers(1, 400), exponent=st.floats(0.5, 8))
def test_exponents_add_up_to_20_g(schedule, strength, steps, exponent):
    ramp = one_ramp(schedule, strength, steps, exponent)
    exponents = [ramp.exponent_at(step) for step in range(1, steps + 1)]
    assert math.fsum(exponents) == pytest.approx(20 * strength, rel=1e-9)
    assert ramp.dose(0) == 0.0
    assert ramp.dose(steps) == pytest.approx(20 * strength, rel=1e-9)
    assert ramp.dose(steps + 5) == ramp.dose(steps)  # nothing is applied after the cut
    assert ramp.exponent_at(0) == ramp.exponent_at(steps + 1) == 0.0


@schedules
def test_exponents_and_dose_match_the_formula_of_the_specification(schedule):
    strength, steps, exponent = 0.7, 13, 3.0
    ramp = one_ramp(schedule, strength, steps, exponent)
    shapes = [FORMULAS[schedule](k / steps, exponent) for k in range(1, steps + 1)]
    done = 0.0
    for k in range(1, steps + 1):
        expected = 20 * strength * shapes[k - 1] / math.fsum(shapes)
        done += expected
        assert ramp.exponent_at(k) == pytest.approx(expected, rel=1e-10)
        assert ramp.dose(k) == pytest.approx(done, rel=1e-10)


def test_the_older_clock_restarts_each_epoch():
    sawtooth = Ramp("x^2", 2.0, 12, 4, 4.0)
    teeth = [2.0 * (k / 4) ** 2 for k in (1, 2, 3, 4)]
    assert [sawtooth.value(step) for step in range(1, 13)] == pytest.approx(teeth * 3, rel=1e-12)
    assert sawtooth.value(13) == 0.0
    # an unfinished epoch at the end of a state that is cut within one
    assert [Ramp("x", 1.0, 6, 4).value(step) for step in (4, 5, 6, 7)] == [1.0, 0.25, 0.5, 0.0]


# ------------------------------------------------------------------------------------------------- when it cuts


@pytest.mark.parametrize(
    ("total", "per_epoch", "finish", "expected"),
    [
        (100, 10, 0.25, 30),  # 25 lies between 20 and 30: the later border, 5 < 10 steps away
        (100, 10, 0.24, 20),
        (120, 10, 0.25, 30),  # on a border already
        (1000, 250, 0.25, 250),
        (4000, 1000, 0.3, 1000),  # 1200 moves by 200 < 400
        (4000, 1000, 0.36, 1440),  # 1440 would move by 440 >= 400
        (4000, 1000, 0.35, 1400),  # by exactly a tenth: stays
        (4000, 1000, 0.375, 1500),  # a tie between 1000 and 2000, both 500 away: stays
        (1000, 20, 0.01, 20),  # the nearest border is 0: never 0, and 20 is near enough
        (1000, 100, 0.001, 100),  # 1 moves by 99 < 100
        (1000, 200, 0.05, 50),  # 200 is too far
        (100, 10, 1.0, 100),
        (7, 7, 1.0, 7),
        (3, 3, 0.25, 1),  # one epoch of three steps: round(0.75)
        (1, 1, 0.25, 1),  # at least one step
        (2, 1, 0.1, 1),
        (4, 1, 0.25, 1),
    ],
)
def test_cut_step_by_hand(total, per_epoch, finish, expected):
    assert cut_step(total, per_epoch, finish) == expected


@settings(max_examples=400, deadline=None)
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


def make_optimizer(name, parameters):
    if name == "sgd":
        return torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9, weight_decay=0.0)
    return torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.0)


def shrink_over_a_state(optimizer_name, ramp, autocast=False, seed=0):
    """A state with zero gradients: the optimizer steps, then the penalty acts. Returns before, after, doomed."""
    parameters, doomed = weights_and_doomed(seed)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = make_optimizer(optimizer_name, parameters)
    penalty = Penalty(parameters, doomed)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for step in range(1, ramp.steps + 1):
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            penalty.set_(ramp.exponent_at(step))
            penalty.shrink_(ramp.parts)
    return before, {name: parameter.detach() for name, parameter in parameters.items()}, doomed


@schedules
@pytest.mark.parametrize("steps", [40, 400])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_doomed_weights_shrink_by_exp_20_g(schedule, steps, optimizer):
    for strength in (0.1, 1.0):
        before, after, doomed = shrink_over_a_state(optimizer, one_ramp(schedule, strength, steps))
        for name, mask in doomed.items():
            gone = mask.bool()
            assert torch.equal(after[name][~gone], before[name][~gone])  # kept weights keep their bits
            ratio = after[name][gone].double() / before[name][gone].double()
            expected = torch.full_like(ratio, math.exp(-20 * strength))
            torch.testing.assert_close(ratio, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
@pytest.mark.parametrize("schedule", ["x", "exp_custom_exponents"])
def test_the_factor_holds_in_short_states_too(schedule, steps):
    """A step with a large exponent: 1 - (1 - factor) in float32 would lose the factor's digits."""
    before, after, doomed = shrink_over_a_state("sgd", one_ramp(schedule, 1.0, steps))
    gone = doomed["a.weight"].bool()
    ratio = after["a.weight"][gone].double() / before["a.weight"][gone].double()
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.exp(-20)), rtol=1e-5, atol=0)


def test_optimizer_and_autocast_make_no_difference_to_the_factor():
    ramp = one_ramp("exp_custom_exponents", 0.5, 60)
    _, reference, _ = shrink_over_a_state("sgd", ramp)
    for optimizer, autocast in (("adamw", False), ("sgd", True), ("adamw", True)):
        _, after, _ = shrink_over_a_state(optimizer, ramp, autocast)
        for name in reference:
            assert torch.equal(after[name], reference[name]), (name, optimizer, autocast)


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
    penalty.set_(0.0)
    penalty.shrink_()
    assert parameters["w"].tolist() == pytest.approx([1.0, -0.5, 1.0], rel=1e-6)


def test_residual_of_a_state_that_goes_on_refers_to_its_start():
    parameters = {"w": torch.nn.Parameter(torch.tensor([3.0, 4.0, 9.0]))}
    doomed = {"w": torch.tensor([1.0, 1.0, 0.0])}
    assert Penalty(parameters, doomed).start_norm == 5.0
    resumed = Penalty(parameters, doomed, start_norm=50.0)
    assert resumed.start_norm == 50.0
    assert resumed.residual() == pytest.approx(0.1, rel=1e-12)


def test_without_doomed_weights_there_is_no_penalty():
    parameters = {"w": torch.nn.Parameter(torch.ones(3))}
    for penalty in (Penalty(parameters, {}), Penalty(parameters, {"w": torch.zeros(3)})):
        assert not penalty
        assert penalty.residual() == 0.0
        penalty.set_(5.0)
        penalty.shrink_()
        assert parameters["w"].tolist() == [1, 1, 1]
    assert Penalty(parameters, {"w": torch.tensor([0.0, 1.0, 0.0])})


def test_doomed_zeros_have_residual_0():
    parameters = {"w": torch.nn.Parameter(torch.zeros(3))}
    penalty = Penalty(parameters, {"w": torch.ones(3)})
    assert penalty.start_norm == 0.0
    assert penalty.residual() == 0.0


def test_the_gradient_form_adds_lambda_w_to_doomed_weights_only():
    parameters, doomed = weights_and_doomed()
    gradients = {name: torch.randn(parameter.shape) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    penalty = Penalty(parameters, doomed)
    penalty.set_(0.3)
    penalty.add_to_gradients_()
    for name, parameter in parameters.items():
        gone = doomed[name].bool()
        assert torch.equal(parameter.grad[~gone], gradients[name][~gone])
        expected = gradients[name][gone].double() + 0.3 * values[name][gone].double()
        torch.testing.assert_close(parameter.grad[gone].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter.detach(), values[name])  # gradients change, weights do not


def test_block_gradients_takes_the_loss_from_doomed_weights_only():
    parameters, doomed = weights_and_doomed()
    gradients = {name: torch.randn(parameter.shape) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    parameters["b.weight"].grad = None  # a branch without a gradient is no obstacle
    Penalty(parameters, doomed).block_gradients_()
    assert parameters["b.weight"].grad is None
    for name in ("a.weight", "a.bias", "c.weight"):
        gone = doomed[name].bool()
        assert torch.equal(parameters[name].grad[~gone], gradients[name][~gone])
        assert not parameters[name].grad[gone].any()


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


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("period", [100, 2000])
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
