"""Laws of masks: exact counts, ties, monotony, refill; each against a loop or a full sort in numpy."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

from models.vit import VisionTransformer
from vit_pruning_utils import (
    check_masks,
    check_sparsity_vit,
    count_kept,
    density,
    elementwise_step,
    extract_mask_vit,
    full_masks,
    is_vit_model,
    magnitude_step,
    prunable_layers,
    prunable_weights,
    prune_model_custom_fillback_vit,
    prune_model_custom_vit,
    pruning_model_vit,
    refill_rows,
    remove_prune_vit,
    structured_masks,
)
from vit_structured_pruning import vit_units

DIM, DEPTH, HEADS, HIDDEN = 12, 2, 3, 24
LAYERS = [
    f"blocks.{block}.{part}" for block in range(DEPTH) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
]
PRUNABLE = DEPTH * (4 * DIM * DIM + 2 * DIM * HIDDEN)


def tiny(seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=8, patch_size=4, num_classes=5, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2
    )


def fixed_batch(images=6):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(images, 3, 8, 8, generator=generator), torch.arange(images) % 5)]


def sorted_reference(weights, masks, keep):
    """The surviving weights in descending order of absolute value, ties in (layer, index) order; the first stay."""
    entries = []
    for layer, (name, mask) in enumerate(masks.items()):
        values, alive = weights[name].double().numpy().ravel(), mask.numpy().ravel() != 0
        entries += [(-abs(values[i]), layer, i) for i in range(len(values)) if alive[i]]
    expected = {name: np.zeros(mask.numel()) for name, mask in masks.items()}
    names = list(masks)
    for _, layer, i in sorted(entries)[: max(0, keep)]:
        expected[names[layer]][i] = 1
    return {name: flat.reshape(masks[name].shape) for name, flat in expected.items()}


def assert_same(masks, expected):
    assert list(masks) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(np.asarray(masks[name]), np.asarray(expected[name]), err_msg=name)


def as_tensors(arrays):
    return {f"layer{i}": torch.tensor(array) for i, array in enumerate(arrays)}


# ------------------------------------------------------------------------------------------- one global threshold


def test_magnitude_step_by_hand():
    weights = as_tensors([[[3.0, -1.0], [0.5, 2.0]], [[-2.0, 4.0]]])
    step = magnitude_step(weights, full_masks(weights), 3)
    # 4, 3, then the two 2.0: the one of the first layer stays although the other one is negative
    assert_same(step, {"layer0": [[1, 0], [0, 1]], "layer1": [[0, 1]]})


# few distinct values, so that ties straddle the threshold and the layers; both zeros
levels = st.sampled_from([0.0, -0.0, 0.25, -0.25, 1.0, -1.0, 1.5])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_magnitude_step_equals_a_full_sort(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
    weights, masks = {}, {}
    for i, (rows, columns) in enumerate(shapes):
        size = rows * columns
        values = data.draw(st.lists(levels, min_size=size, max_size=size))
        alive = data.draw(st.lists(st.sampled_from([0.0, 1.0, 1.0]), min_size=size, max_size=size))
        weights[f"layer{i}"] = torch.tensor(values).reshape(rows, columns)
        masks[f"layer{i}"] = torch.tensor(alive).reshape(rows, columns)
    surviving = count_kept(masks)
    keep = data.draw(st.integers(0, surviving + 2))
    before = copy.deepcopy((weights, masks))
    step = magnitude_step(weights, masks, keep)
    assert count_kept(step) == min(keep, surviving)
    assert_same(step, sorted_reference(weights, masks, keep))
    assert_same(weights, before[0])  # pure
    assert_same(masks, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_step_of_random_weights_equals_a_full_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (40, 30), "b": (7, 11), "c": (16, 3, 2, 2)}
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    masks = {name: (torch.rand(shape, generator=generator) < 0.7).to(dtype) for name, shape in shapes.items()}
    plain = {name: mask.float() for name, mask in masks.items()}
    for keep in (1, 2, 500, count_kept(masks) - 1):
        step = magnitude_step(weights, masks, keep)
        assert {mask.dtype for mask in step.values()} == {dtype}
        step = {name: mask.float() for name, mask in step.items()}
        assert_same(step, sorted_reference({name: weight.float() for name, weight in weights.items()}, plain, keep))


def test_magnitude_step_returns_new_tensors_even_when_nothing_goes():
    weights = as_tensors([[[1.0, 2.0]]])
    masks = full_masks(weights)
    for keep in (2, 3):
        step = magnitude_step(weights, masks, keep)
        step["layer0"].zero_()
        assert count_kept(masks) == 2


def test_channels_last_weights_are_ranked_like_any():
    """Index order is the logical one, whatever the strides (a patch embedding may be channels_last)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (5, 3, 4, 4), generator=generator).float()
    plain = {"conv": weight}
    strided = {"conv": weight.to(memory_format=torch.channels_last)}
    assert not strided["conv"].is_contiguous()
    step = magnitude_step(strided, full_masks(strided), 100)
    assert_same(step, sorted_reference(plain, full_masks(plain), 100))


@pytest.mark.parametrize("rate", [0.15, 0.2, 0.37, 0.9])
def test_elementwise_steps_are_exact_and_monotone(rate):
    weights = prunable_weights(tiny())
    masks = full_masks(weights)
    for k in range(1, 7):
        generator = torch.Generator().manual_seed(k)
        weights = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
        before, masks = masks, elementwise_step(weights, masks, rate, k)
        assert count_kept(masks) == round(PRUNABLE * (1 - rate) ** k)
        assert all(not (masks[name] > before[name]).any() for name in masks)  # pruned weights never come back
        assert density(masks) == round(PRUNABLE * (1 - rate) ** k) / PRUNABLE


def test_elementwise_step_counts_and_ranks_inside_surviving_units_only():
    model = tiny()
    weights = prunable_weights(model)
    kept = {"blocks.0.attn": [0, 2], "blocks.1.mlp": list(range(5, HIDDEN))}
    whole = structured_masks(weights, vit_units(model), kept)
    # by hand: one head of three is a third of qkv and proj, five neurons of 24 are as much of fc1 and fc2
    total = PRUNABLE - 4 * DIM * DIM // 3 - 2 * 5 * DIM
    assert count_kept(whole) == total
    masks = full_masks(weights)
    for k in (1, 2, 3):
        before, masks = masks, elementwise_step(weights, masks, 0.3, k, whole)
        keep = round(total * 0.7**k)
        assert count_kept(masks) == keep
        inside = {name: before[name] * whole[name] for name in whole}
        assert_same(masks, sorted_reference(weights, inside, keep))


# -------------------------------------------------------------------------------- models under torch.nn.utils.prune


def current(model):
    return {name: module.weight_mask for name, module in prunable_layers(model).items()}


def test_pruning_model_vit_takes_a_fraction_of_what_is_left_each_time():
    model, left = tiny(), PRUNABLE
    dense = {name: weight.clone() for name, weight in prunable_weights(model).items()}
    alive = full_masks(dense)
    for px in (0.2, 0.5, 0.0, 0.33):
        pruning_model_vit(model, px)
        left = round(left * (1 - px))
        expected = sorted_reference(dense, alive, left)
        assert_same(current(model), expected)
        alive = {name: torch.tensor(mask) for name, mask in expected.items()}
        for name, weight in prunable_weights(model).items():
            assert torch.equal(weight, dense[name] * alive[name])
        assert check_sparsity_vit(model) == pytest.approx(100 * left / PRUNABLE, abs=1e-9)
    assert not hasattr(model.patch_embed.proj, "weight_mask")
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_patch_embed_counts_when_asked():
    model = tiny()
    embedding = model.patch_embed.proj.weight.numel()
    assert embedding == DIM * 3 * 4 * 4
    assert list(prunable_layers(model)) == LAYERS
    assert list(prunable_layers(model, prune_patch_embed=True)) == ["patch_embed.proj", *LAYERS]
    for name, module in prunable_layers(model, True).items():
        assert module is model.get_submodule(name)
    pruning_model_vit(model, 0.5, prune_patch_embed=True)
    kept = int(model.patch_embed.proj.weight_mask.sum()) + count_kept(current(model))
    assert kept == round((PRUNABLE + embedding) / 2)
    assert 0 < int(model.patch_embed.proj.weight_mask.sum()) < embedding
    remove_prune_vit(model, prune_patch_embed=True)
    assert "weight" in dict(model.patch_embed.proj.named_parameters())
    assert int((model.patch_embed.proj.weight != 0).sum()) + sum(
        int((weight != 0).sum()) for weight in prunable_weights(model).values()
    ) == round((PRUNABLE + embedding) / 2)


def test_patch_embed_in_channels_last_can_be_pruned():
    model = tiny().to(memory_format=torch.channels_last)
    pruning_model_vit(model, 0.5, prune_patch_embed=True)
    kept = int(model.patch_embed.proj.weight_mask.sum()) + count_kept(current(model))
    assert kept == round((PRUNABLE + DIM * 48) / 2)


@pytest.mark.parametrize("px", [-0.1, 1.0, 1.5, math.nan])
def test_pruning_model_vit_refuses_other_fractions(px):
    model = tiny()
    with pytest.raises(ValueError, match="px"):
        pruning_model_vit(model, px)
    assert not prune.is_pruned(model)


def test_check_sparsity_prints_the_report_and_returns_percent(capsys):
    model = tiny()
    masks = full_masks(prunable_weights(model))
    masks["blocks.0.attn.qkv"].view(-1)[:108] = 0  # of 432: 25%
    masks["blocks.1.mlp.fc2"].view(-1)[:36] = 0  # of 288: 12.5%
    prune_model_custom_vit(model, masks)
    capsys.readouterr()
    percent = check_sparsity_vit(model)
    # 144 zeros of 2304 are 6.25%
    assert capsys.readouterr().out.splitlines() == [
        "[ViT Sparsity Report]",
        "blocks.0.attn.qkv.weight_mask          | Sparsity: 25.00%",
        "blocks.0.attn.proj.weight_mask         | Sparsity: 0.00%",
        "blocks.0.mlp.fc1.weight_mask           | Sparsity: 0.00%",
        "blocks.0.mlp.fc2.weight_mask           | Sparsity: 0.00%",
        "blocks.1.attn.qkv.weight_mask          | Sparsity: 0.00%",
        "blocks.1.attn.proj.weight_mask         | Sparsity: 0.00%",
        "blocks.1.mlp.fc1.weight_mask           | Sparsity: 0.00%",
        "blocks.1.mlp.fc2.weight_mask           | Sparsity: 12.50%",
        "Overall sparsity: 6.25%",
        "Remaining weights: 93.75%",
    ]
    assert percent == 93.75
    remove_prune_vit(model)
    assert check_sparsity_vit(model) == 93.75  # plain zeros count alike
    with torch.no_grad():
        model.patch_embed.proj.weight[:6] = 0  # half of 576
    assert check_sparsity_vit(model, prune_patch_embed=True) == pytest.approx(100 * (1 - 432 / 2880), abs=1e-9)


def test_extract_apply_and_remove_are_one_round_trip():
    model = tiny()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruning_model_vit(model, 0.4)
    extracted = extract_mask_vit(model.state_dict())
    assert list(extracted) == [f"{name}.weight_mask" for name in LAYERS]
    masks = {name: mask.clone() for name, mask in current(model).items()}
    for name, mask in extracted.items():
        assert torch.equal(mask, masks[name.removesuffix(".weight_mask")])
        mask.zero_()  # a copy: the model keeps its own
    assert_same(current(model), masks)

    for spelling in ("", ".weight_mask"):
        other = tiny()
        prune_model_custom_vit(other, {name + spelling: mask for name, mask in masks.items()})
        assert_same(current(other), masks)
        remove_prune_vit(other)
        assert set(other.state_dict()) == set(dense)
        assert not prune.is_pruned(other)
        for name, tensor in other.state_dict().items():
            mask = masks.get(name.removesuffix(".weight"), 1) if name.endswith(".weight") else 1
            assert torch.equal(tensor, dense[name] * mask), name


def test_a_partial_mask_set_leaves_the_other_layers_alone():
    model = tiny()
    prune_model_custom_vit(model, {"blocks.1.mlp.fc1": torch.zeros(HIDDEN, DIM)})
    pruned = [name for name, module in prunable_layers(model).items() if prune.is_pruned(module)]
    assert pruned == ["blocks.1.mlp.fc1"]
    assert not prunable_weights(model)["blocks.1.mlp.fc1"].any()


def test_masks_can_be_applied_over_masks():
    model = tiny()
    dense = model.blocks[0].mlp.fc1.weight.detach().clone()
    first, second = torch.ones(HIDDEN, DIM), torch.ones(HIDDEN, DIM)
    first[:4], second[2:6] = 0, 0
    prune_model_custom_vit(model, {"blocks.0.mlp.fc1": first})
    prune_model_custom_vit(model, {"blocks.0.mlp.fc1": second})
    layer = model.blocks[0].mlp.fc1
    assert torch.equal(layer.weight_mask, second)
    assert torch.equal(layer.weight.detach(), dense * first * second)
    assert len(layer._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("name", "mask", "says"),
    [
        ("blocks.0.attn.qkv", torch.full((36, 12), 0.5), "blocks.0.attn.qkv: .*other than 0 and 1"),
        ("blocks.0.attn.qkv", torch.full((36, 12), 2.0), "blocks.0.attn.qkv: .*other than 0 and 1"),
        ("blocks.0.attn.qkv", torch.full((36, 12), math.nan), "blocks.0.attn.qkv: .*other than 0 and 1"),
        ("blocks.0.attn.qkv.weight_mask", torch.ones(12, 36), r"blocks.0.attn.qkv: shape \(12, 36\)"),
        ("blocks.2.attn.qkv", torch.ones(36, 12), "blocks.2.attn.qkv: .*no such"),
        ("patch_embed.proj", torch.ones(12, 3, 4, 4), "patch_embed.proj: .*no such"),
        ("head", torch.ones(5, 12), "head: .*no such"),
    ],
)
def test_masks_from_outside_are_checked(name, mask, says):
    model = tiny()
    with pytest.raises(ValueError, match=says):
        check_masks({name: mask}, prunable_weights(model))
    with pytest.raises(ValueError, match=says):
        prune_model_custom_vit(model, {name: mask})
    assert not prune.is_pruned(model)


def test_check_masks_normalises_names_and_types():
    weights = prunable_weights(tiny())
    checked = check_masks({"blocks.0.mlp.fc2.weight_mask": torch.ones(DIM, HIDDEN, dtype=torch.bool)}, weights)
    assert list(checked) == ["blocks.0.mlp.fc2"]
    assert checked["blocks.0.mlp.fc2"].dtype == torch.float32


def test_is_vit_model():
    assert is_vit_model(tiny())
    assert not is_vit_model(torch.nn.Sequential(torch.nn.Linear(2, 2)))


# ---------------------------------------------------------------------------------------------------------- refill


def refill_reference(mask, scores, rate):
    """Row by row, best first, from the first column on, one weight at a time."""
    mask = mask.double().numpy()
    flat = mask.reshape(mask.shape[0], -1).copy()
    budget = int((flat == 0).sum() * rate + 1e-9)
    for row in sorted(range(len(flat)), key=lambda r: (-float(scores[r]), r)):
        for column in range(flat.shape[1]):
            if budget and flat[row, column] == 0:
                flat[row, column] = 1
                budget -= 1
    return flat.reshape(mask.shape)


def test_refill_rows_by_hand():
    masks = {"a": torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])}
    scores = {"a": torch.tensor([1.0, 5.0, 1.0], dtype=torch.float64)}
    # six pruned; half of them are three: both of row 1, then the first pruned one of row 0 (ties: its own order)
    refilled = refill_rows(masks, scores, 0.5)
    assert_same(refilled, {"a": [[1, 1, 0], [1, 1, 1], [1, 0, 0]]})
    assert_same(masks, {"a": [[0, 1, 0], [0, 0, 1], [1, 0, 0]]})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_refill_rows_equals_a_loop(data):
    masks, scores = {}, {}
    for name in ("a", "b"):
        rows, columns = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
        bits = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=rows * columns, max_size=rows * columns))
        masks[name] = torch.tensor(bits).reshape(rows, columns)
        row_scores = st.sampled_from([0.0, 1.0, 2.0, -math.inf, 1e-300])
        scores[name] = torch.tensor(data.draw(st.lists(row_scores, min_size=rows, max_size=rows)), dtype=torch.float64)
    rate = data.draw(st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5, 0.7, 1.0]))
    refilled = refill_rows(masks, scores, rate)
    assert_same(refilled, {name: refill_reference(masks[name], scores[name], rate) for name in masks})
    for name, mask in masks.items():
        pruned = int((mask == 0).sum())
        assert int(refilled[name].sum() - mask.sum()) == int(pruned * rate + 1e-9)


def test_refill_budget_survives_floating_point():
    # 0.29 * 100 is 28.999999999999996
    masks = {"a": torch.zeros(10, 10)}
    assert count_kept(refill_rows(masks, {"a": torch.arange(10.0)}, 0.29)) == 29


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_refill_rows_of_a_convolution(memory_format):
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(6, 3, 4, 4, generator=generator) < 0.5).float()
    scores = torch.randn(6, generator=generator, dtype=torch.float64)
    refilled = refill_rows({"conv": mask.to(memory_format=memory_format)}, {"conv": scores}, 0.4)
    assert_same(refilled, {"conv": refill_reference(mask, scores, 0.4)})


def row_scores(model, masks, trained, loader, criteria):
    """Scores of output rows by plain numpy on the trained weights; activations through hooks of the test's own."""
    if criteria == "remain":
        return {name: mask.flatten(1).sum(1).numpy() for name, mask in masks.items()}
    if criteria == "magnitude" or loader is None:
        power = 2 if criteria == "l2" else 1
        return {name: (np.abs(trained[f"{name}.weight"].double().numpy()) ** power).sum(1) for name in masks}
    scored = copy.deepcopy(model)
    scored.load_state_dict(trained)
    scored.double().eval()
    seen = {name: [] for name in masks}
    for name in masks:
        scored.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen[name].append(out))
    totals = dict.fromkeys(masks, 0)
    for images, labels in loader:
        for activations in seen.values():
            activations.clear()
        loss = torch.nn.functional.cross_entropy(scored(images.double()), labels, reduction="sum")
        for name in masks:
            out = seen[name][0]  # [images, tokens, rows]
            if criteria == "saliency":
                (gradient,) = torch.autograd.grad(loss, out, retain_graph=True)
                value = (out * gradient).sum(1).abs().sum(0)
            else:
                value = (out.abs() if criteria == "l1" else out.square()).mean(1).sum(0)
            totals[name] = totals[name] + value.detach().numpy()
    images = sum(len(images) for images, _ in loader)
    return {name: (total / images) ** (0.5 if criteria == "l2" else 1) for name, total in totals.items()}


def elementwise_masks(model, seed=4):
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: (torch.rand(weight.shape, generator=generator) < 0.6).float()
        for name, weight in prunable_weights(model).items()
    }
    masks["blocks.0.mlp.fc1"][7] = 0  # a row without a survivor comes last, whatever it scores
    return masks


@pytest.mark.parametrize("fillback_rate", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("criteria", "with_data"),
    [
        ("remain", True),
        ("magnitude", True),
        ("l1", True),
        ("l2", True),
        ("saliency", True),
        ("l1", False),
        ("l2", False),
    ],
)
def test_fillback_equals_an_independent_ranking(criteria, with_data, fillback_rate):
    model, loader = tiny(0), fixed_batch() if with_data else None
    trained, init = tiny(1).state_dict(), tiny(2).state_dict()
    masks = elementwise_masks(model)
    inputs = copy.deepcopy((model.state_dict(), masks, trained, init))
    scores = row_scores(model, masks, trained, loader, criteria)
    scores["blocks.0.mlp.fc1"][7] = -math.inf
    expected = {name: refill_reference(masks[name], scores[name], fillback_rate) for name in masks}

    result = prune_model_custom_fillback_vit(
        model, masks, loader, trained, init, criteria, fillback_rate, return_mask_only=True
    )
    if criteria == "saliency":
        # q.dL/dq = k.dL/dk for every channel of a head (both sum dL/dS q k over the scores S): an exact tie, broken by
        # rounding alone, so that of qkv only the number can be asked for
        for name in [name for name in masks if name.endswith("qkv")]:
            assert int(result[name].sum()) == int(expected[name].sum())
            assert not (result[name] < masks[name]).any()
            expected[name] = result[name].numpy()
    assert_same(result, expected)
    for now, then in zip((model.state_dict(), masks, trained, init), inputs, strict=True):
        assert_same(now, then)  # the model and every dictionary stay as they were

    returned = prune_model_custom_fillback_vit(model, masks, loader, trained, init, criteria, fillback_rate)
    assert returned is model
    assert_same(current(model), expected)
    for name, module in prunable_layers(model).items():
        assert torch.equal(module.weight.detach(), init[f"{name}.weight"] * torch.tensor(expected[name]).float())
    assert torch.equal(model.head.weight, init["head.weight"])
    for now, then in zip((masks, trained, init), inputs[1:], strict=True):
        assert_same(now, then)


def test_fillback_at_random_gives_whole_rows_and_exact_counts():
    model = tiny()
    masks = {name: torch.zeros_like(weight) for name, weight in prunable_weights(model).items()}
    for mask in masks.values():
        mask[:, 0] = 1  # no row is without a survivor
    result = prune_model_custom_fillback_vit(
        model, masks, None, model.state_dict(), model.state_dict(), "random", 0.5, return_mask_only=True
    )
    orders = set()
    for mask in result.values():
        width = mask.shape[1]
        full = mask.sum(1) == width
        assert int(mask.sum()) == mask.shape[0] + int(mask.shape[0] * (width - 1) * 0.5 + 1e-9)
        assert int(full.sum()) == mask.shape[0] // 2
        orders.add(tuple(full.tolist()))
    assert len(orders) > 2  # not the same rows everywhere, nor the first ones


def test_fillback_scores_what_was_trained_under_masks():
    """trained_weight as a pruned model's state dict: weight_orig with weight_mask, and both mask spellings."""
    model, trained = tiny(0), tiny(1)
    masks = elementwise_masks(model)
    prune_model_custom_vit(trained, masks)
    pairs = trained.state_dict()
    assert "blocks.0.mlp.fc1.weight_orig" in pairs
    remove_prune_vit(trained)
    spelled = {f"{name}.weight_mask": mask for name, mask in masks.items()}
    arguments = (fixed_batch(), pairs, model.state_dict(), "l1", 0.5, True)
    result = prune_model_custom_fillback_vit(model, spelled, *arguments)
    scores = row_scores(model, masks, trained.state_dict(), fixed_batch(), "l1")
    scores["blocks.0.mlp.fc1"][7] = -math.inf
    assert_same(result, {name: refill_reference(masks[name], scores[name], 0.5) for name in masks})


@pytest.mark.parametrize("rate", [-0.1, 1.01])
def test_fillback_refuses_other_rates(rate):
    model = tiny()
    with pytest.raises(ValueError, match="fillback_rate"):
        prune_model_custom_fillback_vit(
            model, elementwise_masks(model), None, model.state_dict(), model.state_dict(), "l1", rate
        )


def test_fillback_without_its_input_raises():
    model = tiny()
    with pytest.raises(ValueError, match="saliency"):
        prune_model_custom_fillback_vit(
            model, elementwise_masks(model), None, model.state_dict(), model.state_dict(), "saliency", 0.5
        )
