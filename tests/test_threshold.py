"""The one global threshold against a stable sort in NumPy: any float type, ties, holes, both ways of computing it."""

import copy
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import assert_masks, assert_same_tensors, largest

from vit_pruning_utils import count_kept, full_masks, magnitude_step

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def both_ways(weights, masks, keep):
    """The host's way, and the accelerator's, run on CPU tensors."""
    host = magnitude_step(weights, masks, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect.getmodule(magnitude_step), "_on_host", lambda tensor: False)
        accelerator = magnitude_step(weights, masks, keep)
    assert_same_tensors(accelerator, host)
    return host


def assert_sorts(weights, masks, keep):
    step = both_ways(weights, masks, keep)
    assert_masks(step, largest(weights, masks, keep))
    return step


@st.composite
def cases(draw, dtype):
    smallest = torch.finfo(dtype).smallest_normal
    special = st.sampled_from([0.0, -0.0, smallest, -smallest / 2, smallest / 4, np.inf, -np.inf, 1.0, -1.0, 1.5])
    values = st.one_of(special, special, st.floats())
    weights, masks = {}, {}
    for i, size in enumerate(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 12]), min_size=1, max_size=4))):
        drawn = draw(st.lists(values, min_size=size, max_size=size))
        alive = draw(st.lists(st.sampled_from([0, 1, 1]), min_size=size, max_size=size))
        weights[f"layer{i}"] = torch.tensor(drawn, dtype=torch.float64).to(dtype).reshape(1, size)
        masks[f"layer{i}"] = torch.tensor(alive).to(dtype).reshape(1, size)
    surviving = count_kept(masks)
    keep = draw(st.sampled_from([0, 1, surviving - 1, surviving, surviving + 3]) | st.integers(0, surviving))
    return weights, masks, keep


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_float_type_equals_a_stable_sort(dtype, data):
    weights, masks, keep = data.draw(cases(dtype))
    before = copy.deepcopy((weights, masks))
    step = assert_sorts(weights, masks, keep)
    assert count_kept(step) == min(max(keep, 0), count_kept(masks))
    for name, mask in masks.items():
        assert (step[name].dtype, step[name].shape) == (dtype, mask.shape)
        assert step[name].data_ptr() != mask.data_ptr() or mask.numel() == 0
        torch.testing.assert_close(weights[name], before[0][name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(mask, before[1][name])


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
    density=st.sampled_from([0.01, 0.5, 1.0]),
    fraction=st.sampled_from([1e-4, 0.2, 0.5, 0.8, 0.999]),
)
def test_many_weights_equal_a_stable_sort(seed, dtype, spread, density, fraction):
    """More weights than the sample holds, so that brackets are guessed and whole pieces lie between layers' ends."""
    generator = torch.Generator().manual_seed(seed)
    weights, masks = {}, {}
    for i, shape in enumerate([(130, 101), (1, 1), (3000,), (16, 3, 5, 5), (150, 111)]):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[f"layer{i}"] = (0.02 + spread * noise).to(dtype)
        masks[f"layer{i}"] = (torch.rand(shape, generator=generator) < density).to(dtype)
    assert_sorts(weights, masks, round(count_kept(masks) * fraction))


def test_pieces_of_one_layer_join_seamlessly():
    """A layer longer than the host's pieces of 2^17, ties on both sides of the border."""
    piece = 2**17
    weights = {"a": torch.full((2 * piece + 5,), 0.25), "b": torch.full((9,), -0.25)}
    weights["a"][piece - 3] = 0.5
    weights["b"][2] = -0.5
    masks = full_masks(weights)
    masks["a"][piece - 2] = 0
    step = both_ways(weights, masks, piece + 4)
    # both 0.5, and piece + 2 of the 0.25 from the start: one position of them is the 0.5, one is pruned
    expected = torch.zeros(2 * piece + 5)
    expected[: piece + 4] = 1
    expected[piece - 2] = 0
    assert torch.equal(step["a"], expected)
    assert step["b"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("outliers", [1e-3, 1e3], ids=["far above", "far below"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_that_misleads_costs_nothing_but_time(outliers, dtype):
    """Every sampled weight (of 2^16 each fourth from the third on) is an outlier that hides the threshold."""
    generator = torch.Generator().manual_seed(0)
    weight = 1 + torch.rand(2**16, generator=generator, dtype=torch.float64)
    weight[2::4] = outliers
    weights = {"a": weight.to(dtype)}
    assert_sorts(weights, full_masks(weights), 2**13 if outliers < 1 else 2**15)


def test_digits_and_types_decide_by_value():
    weights = {"a": torch.tensor([1.0, 1.0 + 2**-50, 1.0 + 2**-51, 1.0], dtype=torch.float64)}
    assert both_ways(weights, full_masks(weights), 2)["a"].tolist() == [0, 1, 1, 0]
    # float16 would round 1 + 2^-12 to 1 and 2^17 to infinity
    weights = {
        "a": torch.tensor([1.0, 3.0, -(2.0**-20)], dtype=torch.float16),
        "b": torch.tensor([-(2.0**17), 1.0, 2.0**-19], dtype=torch.bfloat16),
        "c": torch.tensor([1 + 2**-12, 2.0**18, 2.0**-21], dtype=torch.float32),
    }
    for keep in range(10):
        step = assert_sorts(weights, full_masks(weights), keep)
        assert [mask.dtype for mask in step.values()] == [weight.dtype for weight in weights.values()]


def test_strides_follow_the_logical_order():
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-2, 3, (6, 5, 4, 4), generator=generator).float()
    holes = (torch.rand(values.shape, generator=generator) < 0.7).float()
    weights = {"conv": values.to(memory_format=torch.channels_last), "linear": values[:, :, 0, 0].T}
    masks = {"conv": holes, "linear": holes[:, :, 1, 1].T}
    for keep in (50, 120, 300):
        assert_sorts(weights, masks, keep)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_keep_their_own_type(dtype):
    weights = {"a": torch.tensor([3.0, -4.0, 1.0, 2.0], requires_grad=True)}
    for keep, expected in ((2, [1, 1, 0, 0]), (3, [1, 1, 0, 1]), (0, [0] * 4)):
        step = both_ways(weights, {"a": torch.tensor([1, 1, 0, 1]).to(dtype)}, keep)
        assert (step["a"].dtype, step["a"].tolist()) == (dtype, expected)
        assert not step["a"].requires_grad
    assert magnitude_step({}, {}, 3) == {}
