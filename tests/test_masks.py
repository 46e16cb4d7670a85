"""Laws of masks: exact counts, monotony, refill, `torch.nn.utils.prune`; each against a loop or a full sort in numpy.

The one global threshold has its own file, test_threshold.py.
"""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import assert_masks, assert_same_tensors, clones, largest, random_masks, unit_scores
from torch.nn.utils import prune

from vit_pruning_utils import check_masks, check_sparsity_vit, count_kept, density, elementwise_step, extract_mask_vit

# isort: split
from vit_pruning_utils import full_masks, prunable_layers, prunable_weights, prune_model_custom_fillback_vit

# isort: split
from vit_pruning_utils import prune_model_custom_vit, pruning_model_vit, refill_rows, remove_prune_vit

# isort: split
from vit_pruning_utils import structured_masks
from vit_structured_pruning import vit_units

DIM, HIDDEN = 12, 24  # of the micro model
LAYERS = [f"blocks.{block}.{part}" for block in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
PRUNABLE = 2 * (4 * DIM * DIM + 2 * DIM * HIDDEN)
EMBEDDING = DIM * 3 * 4 * 4


@pytest.mark.parametrize("rate", [0.15, 0.37, 0.9])
def test_elementwise_steps_are_exact_and_monotone(micro_vit, rate):
    weights = prunable_weights(micro_vit)
    masks = full_masks(weights)
    for k in range(1, 7):
        generator = torch.Generator().manual_seed(k)
        weights = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
        before, masks = masks, elementwise_step(weights, masks, rate, k)
        assert count_kept(masks) == round(PRUNABLE * (1 - rate) ** k)
        assert all(not (masks[name] > before[name]).any() for name in masks)  # pruned weights never come back
        assert density(masks) == round(PRUNABLE * (1 - rate) ** k) / PRUNABLE


def test_elementwise_step_counts_and_ranks_inside_surviving_units_only(micro_vit):
    weights = prunable_weights(micro_vit)
    kept = {"blocks.0.attn": [0, 2], "blocks.1.mlp": list(range(5, HIDDEN))}
    whole = structured_masks(weights, vit_units(micro_vit), kept)
    # by hand: one head of three is a third of qkv and proj, five neurons of 24 are as much of fc1 and fc2
    total = PRUNABLE - 4 * DIM * DIM // 3 - 2 * 5 * DIM
    assert count_kept(whole) == total
    masks = full_masks(weights)
    for k in (1, 2, 3):
        before, masks = masks, elementwise_step(weights, masks, 0.3, k, whole)
        assert_masks(masks, largest(weights, {n: before[n] * whole[n] for n in whole}, round(total * 0.7**k)))


# -------------------------------------------------------------------------------- models under torch.nn.utils.prune
def current(model):
    return {name: module.weight_mask for name, module in prunable_layers(model).items()}


def test_pruning_model_vit_takes_a_fraction_of_what_is_left_each_time(micro_vit):
    left, dense = PRUNABLE, clones(prunable_weights(micro_vit))
    for px in (0.2, 0.5, 0.0, 0.33):
        pruning_model_vit(micro_vit, px)
        left = round(left * (1 - px))
        masks = current(micro_vit)
        assert_masks(masks, largest(dense, full_masks(dense), left))
        assert_same_tensors(prunable_weights(micro_vit), {name: dense[name] * masks[name] for name in dense})
        assert check_sparsity_vit(micro_vit) == pytest.approx(100 * left / PRUNABLE, abs=1e-9)
    assert not hasattr(micro_vit.patch_embed.proj, "weight_mask")
    assert micro_vit(torch.randn(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patch_embed_counts_when_asked(micro_vit, memory_format):
    model = micro_vit.to(memory_format=memory_format)
    assert list(prunable_layers(model)) == LAYERS
    assert list(prunable_layers(model, prune_patch_embed=True)) == ["patch_embed.proj", *LAYERS]
    assert all(module is model.get_submodule(name) for name, module in prunable_layers(model, True).items())
    pruning_model_vit(model, 0.5, prune_patch_embed=True)
    assert 0 < int(model.patch_embed.proj.weight_mask.sum()) < EMBEDDING
    remove_prune_vit(model, prune_patch_embed=True)
    assert "weight" in dict(model.patch_embed.proj.named_parameters())
    zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(model, True).values())
    assert PRUNABLE + EMBEDDING - zeros == round((PRUNABLE + EMBEDDING) / 2)


@pytest.mark.parametrize("px", [-0.1, 1.0, math.nan])
def test_pruning_model_vit_refuses_other_fractions(micro_vit, px):
    with pytest.raises(ValueError, match="px"):
        pruning_model_vit(micro_vit, px)
    assert not prune.is_pruned(micro_vit)


def test_check_sparsity_prints_the_report_and_returns_percent(micro_vit, capsys):
    masks = full_masks(prunable_weights(micro_vit))
    masks["blocks.0.attn.qkv"].view(-1)[:108] = 0  # of 432: 25%
    masks["blocks.1.mlp.fc2"].view(-1)[:36] = 0  # of 288: 12.5%
    prune_model_custom_vit(micro_vit, masks)
    assert check_sparsity_vit(micro_vit) == 93.75  # 144 zeros of 2304 are 6.25%
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
    remove_prune_vit(micro_vit)
    assert check_sparsity_vit(micro_vit) == 93.75  # plain zeros count alike
    micro_vit.patch_embed.proj.weight.data[:6] = 0  # half of 576
    assert check_sparsity_vit(micro_vit, prune_patch_embed=True) == pytest.approx(100 * (1 - 432 / 2880), abs=1e-9)


def test_extract_apply_and_remove_are_one_round_trip(make_micro_vit):
    model = make_micro_vit()
    dense = clones(model.state_dict())
    pruning_model_vit(model, 0.4)
    masks, extracted = clones(current(model)), extract_mask_vit(model.state_dict())
    assert_same_tensors(extracted, {f"{name}.weight_mask": mask for name, mask in masks.items()})
    for mask in extracted.values():
        mask.zero_()  # a copy: the model keeps its own
    assert_same_tensors(current(model), masks)
    for spelling in ("", ".weight_mask"):
        other = make_micro_vit()
        prune_model_custom_vit(other, {name + spelling: mask for name, mask in masks.items()})
        assert_same_tensors(current(other), masks)
        remove_prune_vit(other)
        assert not prune.is_pruned(other)
        assert_same_tensors(other.state_dict(), dense | {f"{n}.weight": dense[f"{n}.weight"] * masks[n] for n in masks})


def test_masks_go_over_masks_and_leave_other_layers_alone(micro_vit):
    layer = micro_vit.blocks[0].mlp.fc1
    dense = layer.weight.detach().clone()
    first, second = torch.ones(HIDDEN, DIM), torch.ones(HIDDEN, DIM)
    first[:4], second[2:6] = 0, 0
    for mask in (first, second):
        prune_model_custom_vit(micro_vit, {"blocks.0.mlp.fc1": mask})
    assert torch.equal(layer.weight_mask, second)
    assert torch.equal(layer.weight.detach(), dense * first * second)
    assert len(layer._forward_pre_hooks) == 1
    assert [name for name, m in prunable_layers(micro_vit).items() if prune.is_pruned(m)] == ["blocks.0.mlp.fc1"]


@pytest.mark.parametrize(("name", "mask", "says"), [
    ("blocks.0.attn.qkv", torch.full((36, 12), 0.5), "blocks.0.attn.qkv: .*other than 0 and 1"),
    ("blocks.0.attn.qkv", torch.full((36, 12), math.nan), "blocks.0.attn.qkv: .*other than 0 and 1"),
    ("blocks.0.attn.qkv.weight_mask", torch.ones(12, 36), r"blocks.0.attn.qkv: shape \(12, 36\)"),
    ("blocks.2.attn.qkv", torch.ones(36, 12), "blocks.2.attn.qkv: .*no such"),
    ("patch_embed.proj", torch.ones(12, 3, 4, 4), "patch_embed.proj: .*no such"),
])  # fmt: skip
def test_masks_from_outside_are_checked(micro_vit, name, mask, says):
    with pytest.raises(ValueError, match=says):
        prune_model_custom_vit(micro_vit, {name: mask})
    assert not prune.is_pruned(micro_vit)


def test_check_masks_normalises_names_and_types(micro_vit):
    masks = {"blocks.0.mlp.fc2.weight_mask": torch.ones(DIM, HIDDEN, dtype=torch.bool)}
    ((name, mask),) = check_masks(masks, prunable_weights(micro_vit)).items()
    assert (name, mask.dtype) == ("blocks.0.mlp.fc2", torch.float32)


# ---------------------------------------------------------------------------------------------------------- refill
def refill_reference(mask, scores, rate):
    """Row by row, best first, from the first column on, one weight at a time."""
    flat = mask.double().numpy().reshape(len(mask), -1).copy()
    budget = int((flat == 0).sum() * rate + 1e-9)
    for row in sorted(range(len(flat)), key=lambda r: (-float(scores[r]), r)):
        for column in range(flat.shape[1]):
            if budget and flat[row, column] == 0:
                flat[row, column] = 1
                budget -= 1
    return flat.reshape(mask.shape)


def test_refill_rows_by_hand():
    masks = {"a": torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])}
    before, scores = clones(masks), {"a": torch.tensor([1.0, 5.0, 1.0], dtype=torch.float64)}
    # six pruned; half of them are three: both of row 1, then the first pruned one of row 0 (ties: its own order)
    assert_masks(refill_rows(masks, scores, 0.5), {"a": [[1, 1, 0], [1, 1, 1], [1, 0, 0]]})
    assert_same_tensors(masks, before)
    # 0.29 * 100 is 28.999999999999996
    assert count_kept(refill_rows({"a": torch.zeros(10, 10)}, {"a": torch.arange(10.0)}, 0.29)) == 29


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (1, 6), (6, 1), (5, 4), (4, 3, 2, 2)]),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.7, 1.0]),
)
def test_refill_rows_equals_a_loop(shape, channels_last, seed, rate):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(shape, generator=generator) < 0.5).float()
    scores = torch.tensor([0.0, 1.0, 2.0, -math.inf, 1e-300], dtype=torch.float64)
    scores = scores[torch.randint(5, shape[:1], generator=generator)]
    given_mask = mask.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else mask
    assert_masks(refill_rows({"a": given_mask}, {"a": scores}, rate), {"a": refill_reference(mask, scores, rate)})


@pytest.mark.parametrize("trained_as", ["plain", "pairs"])
@pytest.mark.parametrize(("criteria", "with_data", "rate"), [
    ("remain", True, 0.5), ("magnitude", True, 0.1), ("l1", True, 0.0), ("l1", True, 0.5), ("l2", True, 0.5),
    ("saliency", True, 0.5), ("saliency", True, 1.0), ("l1", False, 0.1), ("l2", False, 0.5),
])  # fmt: skip
def test_fillback_equals_an_independent_ranking(make_micro_vit, one_batch, criteria, with_data, rate, trained_as):
    model, loader = make_micro_vit(0), one_batch if with_data else None
    scored, init = make_micro_vit(1), make_micro_vit(2).state_dict()
    plain = random_masks(prunable_weights(model), seed=4)
    plain["blocks.0.mlp.fc1"][7] = 0  # a row without a survivor comes last, whatever it scores
    masks, trained = plain, clones(scored.state_dict())
    if trained_as == "pairs":  # weight_orig with weight_mask, and the other spelling
        masks = {f"{name}.weight_mask": mask for name, mask in plain.items()}
        prune_model_custom_vit(scored, masks)
        trained = clones(scored.state_dict())
        assert "blocks.0.mlp.fc1.weight_orig" in trained
        remove_prune_vit(scored)
    inputs = copy.deepcopy((model.state_dict(), masks, trained, init))
    places = {name: (name, [[row] for row in range(len(mask))]) for name, mask in plain.items()}
    scores = unit_scores(scored, criteria, places, plain, loader)
    scores["blocks.0.mlp.fc1"][7] = -math.inf
    expected = {name: refill_reference(plain[name], scores[name], rate) for name in plain}

    def call(**options):
        return prune_model_custom_fillback_vit(model, masks, loader, trained, init, criteria, rate, **options)

    result = call(return_mask_only=True)
    if criteria == "saliency":
        # q.dL/dq = k.dL/dk for every channel of a head (both sum dL/dS q k over the scores S): an exact tie, broken by
        # rounding alone, so that of qkv only the number can be asked for
        for name in [name for name in plain if name.endswith("qkv")]:
            assert int(result[name].sum()) == int(expected[name].sum())
            assert not (result[name] < plain[name]).any()
            expected[name] = result[name].numpy()
    assert_masks(result, expected)
    for now, then in zip((model.state_dict(), masks, trained, init), inputs, strict=True):
        assert_same_tensors(now, then)  # the model and every dictionary stay as they were

    assert call() is model
    assert_masks(current(model), expected)
    for name, module in prunable_layers(model).items():
        assert torch.equal(module.weight.detach(), init[f"{name}.weight"] * torch.tensor(expected[name]).float())
    assert torch.equal(model.head.weight, init["head.weight"])
    for now, then in zip((masks, trained, init), inputs[1:], strict=True):
        assert_same_tensors(now, then)


def test_fillback_at_random_gives_other_rows_in_each_layer(micro_vit):
    masks = {name: torch.zeros_like(weight) for name, weight in prunable_weights(micro_vit).items()}
    for mask in masks.values():
        mask[:, 0] = 1  # no row is without a survivor
    state = micro_vit.state_dict()
    result = prune_model_custom_fillback_vit(micro_vit, masks, None, state, state, "random", 0.5, True)
    whole = {tuple(np.flatnonzero(mask.all(1).numpy())) for mask in result.values()}
    assert {len(rows) for rows in whole} == {len(mask) // 2 for mask in result.values()}
    assert len(whole) > 4  # not the same rows everywhere, nor the first ones


@pytest.mark.parametrize(("criteria", "rate", "says"), [("l1", -0.1, "fillback_rate"), ("l1", 1.01, "fillback_rate"),
                                                       ("saliency", 0.5, "saliency")])  # fmt: skip
def test_fillback_refuses_other_rates_and_missing_data(micro_vit, criteria, rate, says):
    state = micro_vit.state_dict()
    with pytest.raises(ValueError, match=says):
        prune_model_custom_fillback_vit(
            micro_vit, full_masks(prunable_weights(micro_vit)), None, state, state, criteria, rate
        )
