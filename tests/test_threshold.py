"""The one global threshold against a stable sort in NumPy: any float type, ties, holes, both ways of computing it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import threshold
from vit_pruning_utils import count_kept, full_masks, magnitude_step

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def stable_sort(weights, masks, keep):
    """The first `keep` survivors of a stable sort by descending absolute value; float64 holds every type exactly."""
    alive = np.concatenate([mask.float().numpy().ravel() != 0 for mask in masks.values()])
    values = np.abs(np.concatenate([weights[name].double().numpy().ravel() for name in masks]))
    positions = np.flatnonzero(alive)
    order = np.argsort(-values[positions], kind="stable")
    flat = np.zeros(len(values))
    flat[positions[order[: max(0, keep)]]] = 1
    ends = np.cumsum([mask.numel() for mask in masks.values()])[:-1]
    return {name: part.reshape(masks[name].shape) for name, part in zip(masks, np.split(flat, ends), strict=True)}


def assert_masks(masks, expected):
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask.double().numpy(), expected[name], err_msg=name)


@pytest.fixture(params=["host", "accelerator"])
def way(request, monkeypatch):
    """The accelerator's way, run on CPU tensors, beside the host's."""
    if request.param == "accelerator":
        monkeypatch.setattr(threshold, "_on_host", lambda tensor: False)
    return request.param


def both_ways(weights, masks, keep):
    host = magnitude_step(weights, masks, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_on_host", lambda tensor: False)
        accelerator = magnitude_step(weights, masks, keep)
    assert_masks(accelerator, {name: mask.double().numpy() for name, mask in host.items()})
    return host


@st.composite
def cases(draw, dtype):
    smallest = torch.finfo(dtype).smallest_normal
    special = st.sampled_from([0.0, -0.0, smallest, -smallest / 2, smallest / 4, np.inf, -np.inf, 1.0, -1.0, 1.5])
    values = st.one_of(special, special, st.floats(allow_nan=False))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 12]), min_size=1, max_size=4))
    weights, masks = {}, {}
    for i, size in enumerate(sizes):
        drawn = draw(st.lists(values, min_size=size, max_size=size))
        alive = draw(st.lists(st.sampled_from([0, 1, 1]), min_size=size, max_size=size))
        weights[f"layer{i}"] = torch.tensor(drawn, dtype=torch.float64).to(dtype).reshape(1, size)
        masks[f"layer{i}"] = torch.tensor(alive).to(dtype).reshape(1, size)
    surviving = count_kept(masks)
    keep = draw(st.sampled_from([0, 1, surviving - 1, surviving, surviving + 3]) | st.integers(0, surviving))
    return weights, masks, keep


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_float_type_equals_a_stable_sort(dtype, data):
    weights, masks, keep = data.draw(cases(dtype))
    before = copy.deepcopy((weights, masks))
    step = both_ways(weights, masks, keep)
    assert count_kept(step) == min(max(keep, 0), count_kept(masks))
    assert_masks(step, stable_sort(weights, masks, keep))
    for name in masks:
        assert step[name].dtype == dtype
        assert step[name].shape == masks[name].shape
        assert step[name].data_ptr() != masks[name].data_ptr() or masks[name].numel() == 0
        assert torch.equal(weights[name], before[0][name])
        assert torch.equal(masks[name], before[1][name])


@settings(max_examples=40, deadline=None)
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
    keep = round(count_kept(masks) * fraction)
    assert_masks(both_ways(weights, masks, keep), stable_sort(weights, masks, keep))


def test_pieces_of_one_layer_join_seamlessly(monkeypatch):
    """A layer longer than a piece, ties on both sides of the border."""
    piece = threshold._Keys(torch.ones(1), torch.ones(1), torch.float32).piece
    weights = {"a": torch.full((2 * piece + 5,), 0.25), "b": torch.full((9,), -0.25)}
    weights["a"][piece - 3] = 0.5
    weights["b"][2] = -0.5
    masks = full_masks(weights)
    masks["a"][piece - 2] = 0
    keep = piece + 4
    step = both_ways(weights, masks, keep)
    # both 0.5, and piece + 2 of the 0.25 from the start: one position of them is the 0.5, one is pruned
    expected = torch.zeros(2 * piece + 5)
    expected[: piece + 4] = 1
    expected[piece - 2] = 0
    assert torch.equal(step["a"], expected)
    assert step["b"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("direction", ["far above", "far below"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_that_misleads_costs_nothing_but_time(direction, dtype, way):
    """Every sampled weight is an outlier: the threshold lies outside what the sample promises."""
    stride = 4
    size = stride * threshold._SAMPLE
    generator = torch.Generator().manual_seed(0)
    weight = 1 + torch.rand(size, generator=generator, dtype=torch.float64)
    weight[stride // 2 :: stride] = 1e-3 if direction == "far above" else 1e3
    weights = {"a": weight.to(dtype)}
    keep = size // 8 if direction == "far above" else size // 2
    low, high = threshold._bracket([threshold._Keys(weights["a"], torch.ones(size), dtype)], keep)
    cut = np.sort(weights["a"].double().numpy())[::-1][keep - 1]
    promised = torch.tensor([low, high]).to(threshold._INTEGERS[dtype.itemsize]).view(dtype).double()
    assert not promised[0] <= cut <= promised[1]
    assert_masks(magnitude_step(weights, full_masks(weights), keep), stable_sort(weights, full_masks(weights), keep))


def test_float64_digits_beyond_float32_decide(way):
    weights = {"a": torch.tensor([1.0, 1.0 + 2**-50, 1.0 + 2**-51, 1.0], dtype=torch.float64)}
    assert magnitude_step(weights, full_masks(weights), 2)["a"].tolist() == [0, 1, 1, 0]


def test_layers_of_different_types_are_ranked_by_value(way):
    # float16 would round 1 + 2^-12 to 1 and 2^17 to infinity
    weights = {
        "a": torch.tensor([1.0, 3.0, -(2.0**-20)], dtype=torch.float16),
        "b": torch.tensor([-(2.0**17), 1.0, 2.0**-19], dtype=torch.bfloat16),
        "c": torch.tensor([1 + 2**-12, 2.0**18, 2.0**-21], dtype=torch.float32),
    }
    masks = full_masks(weights)
    for keep in range(10):
        step = magnitude_step(weights, masks, keep)
        assert_masks(step, stable_sort(weights, masks, keep))
        assert [mask.dtype for mask in step.values()] == [weight.dtype for weight in weights.values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_larger_than_infinity(dtype, way):
    weights = {
        "a": torch.tensor([np.inf, 1.0, np.nan], dtype=dtype),
        "b": torch.tensor([-np.nan, -np.inf], dtype=dtype),
    }
    masks = full_masks(weights)
    expected = [[[0, 0, 1], [0, 0]], [[0, 0, 1], [1, 0]], [[1, 0, 1], [1, 0]], [[1, 0, 1], [1, 1]]]
    for keep, rows in enumerate(expected, start=1):
        assert [mask.tolist() for mask in magnitude_step(weights, masks, keep).values()] == rows
    masks["a"][2] = 0  # a pruned NaN stays pruned
    assert [mask.tolist() for mask in magnitude_step(weights, masks, 2).values()] == [[1, 0, 0], [1, 0]]


def test_pruned_zeros_do_not_come_back(way):
    """Removed weights are zeros like any other: only those that survive may fill the last places."""
    weights = {"a": torch.tensor([0.0, -0.0, 5.0, 0.0, 0.0])}
    masks = {"a": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])}
    assert magnitude_step(weights, masks, 2)["a"].tolist() == [0, 1, 1, 0, 0]


def test_strides_follow_the_logical_order(way):
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-2, 3, (6, 5, 4, 4), generator=generator).float()
    holes = (torch.rand(values.shape, generator=generator) < 0.7).float()
    weights = {"conv": values.to(memory_format=torch.channels_last), "linear": values[:, :, 0, 0].T}
    masks = {"conv": holes, "linear": holes[:, :, 1, 1].T}
    for keep in (50, 120, 300):
        assert_masks(magnitude_step(weights, masks, keep), stable_sort(weights, masks, keep))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_keep_their_own_type(dtype, way):
    weights = {"a": torch.tensor([3.0, -4.0, 1.0, 2.0], requires_grad=True)}
    step = magnitude_step(weights, {"a": torch.tensor([1, 1, 0, 1]).to(dtype)}, 2)
    assert step["a"].dtype == dtype
    assert step["a"].tolist() == [1, 1, 0, 0]
    assert not step["a"].requires_grad


def test_no_layers_and_nothing_left(way):
    assert magnitude_step({}, {}, 3) == {}
    weights = {"a": torch.ones(3), "b": torch.ones(0, 4)}
    masks = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for keep in (-1, 0, 2):
        step = magnitude_step(weights, masks, keep)
        assert count_kept(step) == 0
        assert step["b"].shape == (0, 4)
