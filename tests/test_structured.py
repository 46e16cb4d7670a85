"""Laws of structured pruning: scores, choice, masks and removal of heads and neurons, each against plain loops."""

import copy
import gc
import logging
import math
from fractions import Fraction
from functools import partial

import pytest
import timm
import torch
from references import assert_same_function, assert_same_tensors, clones, cross_entropy_sum, random_masks
from timm.layers import Attention as TimmAttention
from timm.layers import DiffAttention, GatedMlp
from timm.layers import Mlp as TimmMlp
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import nn

# isort: split
from references import masked_by_hand, masks_by_hand, unit_scores, vit_places

import vit_pruning_utils as vit
import vit_structured_pruning as structured
from cli.parse import parse_args
from engine.allocation import allocation_of
from families.vit import VIT
from models.vit import vit_tiny
from vit_pruning_utils import prune_model_custom_fillback_vit_by_head as fillback_by_head
from vit_pruning_utils_head_mlp import mark_removed, rank_units
from vit_pruning_utils_head_mlp import prune_model_custom_fillback_vit_head_and_mlp as fillback_head_and_mlp
from vit_structured_pruning import compute_mlp_neuron_importance as neuron_scores
from vit_structured_pruning import compute_vit_head_importance as head_scores
from vit_structured_pruning import remove_units, score_units, select_units, vit_cost, vit_units
from vit_structured_pruning import structured_prune_mlp_neurons as prune_neurons
from vit_structured_pruning import structured_prune_vit_heads as prune_heads

ALL_CRITERIA = ["remain", "magnitude", "l1", "l2", "saliency", "obs", "random"]
SORTING = ["layer-wise", "global"]
HEADS, WIDTH, NEURONS, DEPTH = 3, 4, 24, 2  # of the micro model
MICRO = {"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 12, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
KEPT = {  # of a micro model with three blocks
    "blocks.0.attn": [0, 2], "blocks.0.mlp": [1, 2, 5, 11, 23], "blocks.1.attn": [1], "blocks.1.mlp": [],
    "blocks.2.attn": [], "blocks.2.mlp": list(range(24)),
}  # fmt: skip


# ------------------------------------------------------------------------------------- references and helpers
def head_rows(head):
    return [part * HEADS * WIDTH + head * WIDTH + i for part in range(3) for i in range(WIDTH)]


def kept_units(model, masks):
    """{units key: ids} read off weight masks, whose units must be whole or gone, alike in both layers of a branch."""
    kept = {
        key: [unit for unit, ids in enumerate(rows) if masks[layer][ids].any()]
        for key, (layer, rows, *_) in vit_places(model).items()
    }
    by_hand = masks_by_hand(model, kept)
    assert_same(masks, {name: by_hand[f"{name}.weight"] for name in masks})
    return kept


def total_kept(kept, branch):
    return sum(len(ids) for key, ids in kept.items() if key.endswith(branch))


def head_and_mlp(model, masks, batches, heads, neurons, criteria="magnitude", sorting_mode="layer-wise"):
    return fillback_head_and_mlp(
        model, masks, batches, None, None, criteria, heads, neurons, return_mask_only=True, sorting_mode=sorting_mode
    )


def some_masks(model, seed=0, density=0.6):
    return random_masks(vit.prunable_weights(model), density, seed)


def state_of(model):
    """All that a scorer must leave as it was."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return {
        "tensors": clones(model.state_dict()),
        "weights": {name: m.weight.detach().clone() for name, m in modules.items() if hasattr(m, "weight")},
        "modules": {n: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
        "grads": {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None},
        "identity": {name: (p.data_ptr(), p.requires_grad) for name, p in parameters.items()},
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


# -------------------------------------------------------------------------------------- how many units stay
@pytest.mark.parametrize(("sorting_mode", "neurons"), [("layer-wise", 2412), ("global", 2419)])
def test_reference_numbers_to_the_last_weight(sorting_mode, neurons):
    model = vit_tiny(num_classes=10)
    masks = head_and_mlp(model, vit.full_masks(vit.prunable_weights(model)), None, 0.33, 0.3, "random", sorting_mode)
    zeros = {name: int((mask == 0).sum()) for name, mask in masks.items()}
    attention = [name for name in masks if ".attn." in name]
    assert (len(masks), len(attention), sum(mask.numel() for mask in masks.values())) == (36, 18, 2_654_208)
    assert sum(masks[name].numel() for name in attention) == 1_327_104
    # 27 * 0.67 = 18.09 heads; 384 * 0.7 = 268.8 of a layer or 3,456 * 0.7 = 2,419.2 of the pool
    assert sum(zeros[name] for name in attention) == 9 * 4 * 64 * 192 == 442_368
    assert sum(zeros.values()) - 442_368 == (3456 - neurons) * 2 * 192
    if sorting_mode == "layer-wise":
        assert sum(zeros.values()) == 843_264
        assert {int(masks[f"blocks.{i}.mlp.fc1"].any(1).sum()) for i in range(9)} == {268}
        prune_heads(model, head_scores(model, "magnitude"), 0.33)
        assert structured.count_vit_parameters(model) == sum(p.numel() for p in model.parameters()) == 2_253_514


def test_keep_count_is_exact():
    for count in (3, 6, 10, 12, 16, 27, 384, 3456):
        for ratio in ("0", "0.05", "0.3", "0.33", "0.5", "0.67", "0.9", "0.99"):
            for minimum in (0, 1, 2):
                expected = max(minimum, math.floor(count * (1 - Fraction(ratio))))
                assert structured.keep_count(count, float(ratio), minimum) == expected
    assert structured.keep_count(3, 0.99) == 1


def test_min_units_is_kept_in_every_layer_and_zero_may_empty_one():
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    assert select_units(scores, 0.5, "global", 2) == {"a": [2, 3], "b": [2, 3]}
    assert select_units(scores, 0.5, "global") == {"a": [3], "b": [1, 2, 3]}
    assert select_units(scores, 0.5, "global", 0) == {"a": [], "b": [0, 1, 2, 3]}
    assert select_units(scores, 0.9, "global", 2) == {"a": [2, 3], "b": [2, 3]}
    assert select_units(scores, 0.9, "layer-wise", 0) == {"a": [], "b": []}
    assert select_units(scores, 0.9, "layer-wise", 3) == {"a": [1, 2, 3], "b": [1, 2, 3]}
    with pytest.raises(ValueError, match="columnwise"):
        select_units(scores, 0.3, "columnwise")
    with pytest.raises(ValueError, match="cubic"):
        structured.scheduled_ratio("cubic", 0.3, 1, 2)


# -------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("criteria", ["remain", "magnitude", "l1", "l2", "saliency"])
@pytest.mark.parametrize(("pruned", "trained"), [(False, None), (True, None), (True, "plain"), (False, "pairs")])
def test_scores_equal_the_loop_and_nothing_changes(make_micro_vit, make_batch, criteria, pruned, trained):
    """In float32: the model's own activations, summed in float64, give the scores to the last digits."""
    model, scored = make_micro_vit(), make_micro_vit(seed=7 if trained else 0)
    given_masks = some_masks(model, seed=1)
    if pruned:
        vit.prune_model_custom_vit(model, some_masks(model, seed=3))
    if trained == "pairs" or (pruned and not trained):
        vit.prune_model_custom_vit(scored, some_masks(model, seed=3))
    trained_weight = clones(scored.state_dict()) if trained else None
    vit.remove_prune_vit(scored)
    for name, parameter in list(model.named_parameters())[::2]:
        parameter.grad = torch.full_like(parameter, len(name))
    model.train().blocks[1].eval()
    model.pos_embed.requires_grad_(False)
    batches = [make_batch(5, seed=1), make_batch(3, seed=2)]
    batches[1][0].requires_grad_()
    loss = partial(nn.functional.cross_entropy, reduction="sum")  # the same digits; others are tried below
    expected = unit_scores(scored, criteria, vit_places(scored), given_masks, batches, loss)

    before, random_state = state_of(model), torch.get_rng_state()
    given = [given_masks, trained_weight or {}, {str(i): images for i, (images, _) in enumerate(batches)}]
    untouched = [clones(tensors) for tensors in given]
    for branch, compute in (("attn", head_scores), ("mlp", neuron_scores)):
        scores = compute(model, criteria, given_masks, trained_weight, iter(batches))
        assert list(scores) == [0, 1]
        for layer, values in scores.items():
            reference = torch.tensor(expected[f"blocks.{layer}.{branch}"], dtype=torch.float64)
            torch.testing.assert_close(values, reference, rtol=1e-12, atol=1e-14)
            assert reference.std() > 0.01 * reference.mean()  # scores that differ, or agreement says little
    assert_same(before, state_of(model))
    for tensors, same in zip(given, untouched, strict=True):
        assert_same_tensors(tensors, same)
    assert [(images.requires_grad, images.grad) for images, _ in batches] == [(False, None), (True, None)]
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("criteria", ["l2", "saliency"])
def test_scores_are_taken_in_eval_mode(one_batch, add_noise, criteria):
    model = add_noise(TimmVit(**MICRO, pos_drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5), scale=0.3).eval()
    expected = score_units(model, vit_units(model), criteria, batches=one_batch)
    assert_same(score_units(model.train(), vit_units(model), criteria, batches=one_batch), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_saliency_takes_another_loss(make_micro_vit, make_batch, reduction):
    model = make_micro_vit(dtype=torch.float64)
    batches = [make_batch(4, seed=3, dtype=torch.float64), make_batch(2, seed=4, dtype=torch.float64)]

    def smoothed_sum(logits, labels):
        uniform = sum((torch.logsumexp(row, 0) - row).mean() for row in logits)
        return 0.8 * cross_entropy_sum(logits, labels) + 0.2 * uniform

    expected = unit_scores(model, "saliency", vit_places(model), batches=batches, loss=smoothed_sum)
    loss = nn.CrossEntropyLoss(label_smoothing=0.2, reduction=reduction)
    scores = head_scores(model, "saliency", train_loader=batches, criterion=loss)
    for layer in range(DEPTH):
        assert scores[layer].tolist() == pytest.approx(expected[f"blocks.{layer}.attn"], rel=1e-9)


def test_random_is_a_function_of_the_seed(micro_vit):
    first, default, other = (neuron_scores(micro_vit, "random", **s) for s in ({"seed": 0}, {}, {"seed": 1}))
    torch.manual_seed(5)
    assert_same(first, neuron_scores(micro_vit, "random", seed=0))
    assert_same(first, default)
    assert len({*first[0].tolist(), *first[1].tolist(), *other[0].tolist()}) == 3 * NEURONS
    assert all(0 <= score < 1 for score in first[0].tolist())


@pytest.mark.parametrize("criteria", ["l1", "saliency"])
def test_memory_does_not_grow_with_the_batches_and_only_ten_are_read(micro_vit, make_batch, criteria):
    alive = []

    def stream():
        for seed in range(15):
            gc.collect()
            alive.append(sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor))
            yield make_batch(images=4, seed=seed)

    gc.collect()
    gc.freeze()  # only what scoring makes is looked through, which is quick
    try:
        score_units(micro_vit, vit_units(micro_vit), criteria, batches=stream(), max_batches=8)
    finally:
        gc.unfreeze()
    assert len(alive) == 8
    assert alive[3] > 4 * 3 * 8 * 8  # it does see tensors: at least the images of the batch before
    assert max(alive[3:]) <= max(alive[:3])  # from the third batch on all is as it was
    batches = iter([make_batch(seed=seed) for seed in range(12)])
    head_scores(micro_vit, criteria, train_loader=batches)
    assert len(list(batches)) == 2  # ten were read, no more were asked for


def test_an_error_while_scoring_leaves_the_model_as_it_was(micro_vit, make_batch):
    def broken():
        yield make_batch()
        raise OSError("disk gone")

    before = state_of(micro_vit.train())
    other = {name: tensor + 1 for name, tensor in micro_vit.state_dict().items()}
    with pytest.raises(OSError, match="disk gone"):
        head_scores(micro_vit, "saliency", trained_weight=other, train_loader=broken())
    assert_same(before, state_of(micro_vit))


@pytest.mark.parametrize("compute", [head_scores, neuron_scores])
def test_a_criterion_that_lacks_its_input_raises(micro_vit, one_batch, compute):
    with pytest.raises(ValueError, match=r"remain.*mask"):
        compute(micro_vit, "remain", train_loader=one_batch)
    with pytest.raises(ValueError, match="saliency.*train_loader"):
        compute(micro_vit, "saliency", current_mask=some_masks(micro_vit))
    with pytest.raises(ValueError, match="remain.*missing"):
        compute(micro_vit, "remain", current_mask={"blocks.0.attn.proj": torch.ones(12, 12)})
    with pytest.raises(ValueError, match="unknown") as caught:
        compute(micro_vit, "l3")
    assert all(name in str(caught.value) for name in ALL_CRITERIA)
    with pytest.raises(ValueError, match="empty"):
        compute(micro_vit, "l1", train_loader=[])


@pytest.mark.parametrize("criteria", ["l1", "l2"])
def test_activation_criteria_without_data_score_weights_and_say_so_once(micro_vit, one_batch, criteria, caplog):
    with caplog.at_level(logging.INFO):
        head_scores(micro_vit, criteria, train_loader=one_batch)
        assert not caplog.records
        heads = head_scores(micro_vit, criteria)
    (record,) = caplog.records
    assert f"criterion {criteria}: no data given, scoring weights" in record.getMessage()
    neurons, expected = neuron_scores(micro_vit, criteria), unit_scores(micro_vit, criteria, vit_places(micro_vit))
    for layer in range(DEPTH):
        assert heads[layer].tolist() == pytest.approx(expected[f"blocks.{layer}.attn"], rel=1e-12)
        assert neurons[layer].tolist() == pytest.approx(expected[f"blocks.{layer}.mlp"], rel=1e-12)


@pytest.mark.parametrize("suffix", ["", ".weight_mask"])
@pytest.mark.parametrize("sorting_mode", SORTING)
def test_a_unit_all_zero_in_the_mask_is_never_chosen(micro_vit, one_batch, sorting_mode, suffix):
    masks = vit.full_masks(vit.prunable_weights(micro_vit))
    masks["blocks.0.attn.qkv"][head_rows(1)] = 0
    masks["blocks.1.mlp.fc1"][:20] = 0
    with torch.no_grad():  # the best by weight, were they not gone
        micro_vit.blocks[0].attn.qkv.weight[head_rows(1)] *= 100
        micro_vit.blocks[1].mlp.fc1.weight[:20] *= 100
    named = {f"{name}{suffix}": mask for name, mask in masks.items()}
    for criteria in ("remain", "magnitude", "saliency", "random"):
        for ratio in (0.0, 0.34, 0.5):
            kept = kept_units(
                micro_vit, head_and_mlp(micro_vit, named, one_batch, ratio, ratio, criteria, sorting_mode)
            )
            assert 1 not in kept["blocks.0.attn"]
            assert set(kept["blocks.1.mlp"]) <= set(range(20, 24))
            assert min(map(len, kept.values())) >= 1
    masks["blocks.0.attn.qkv"][head_rows(1)[-1], 3] = 1  # one element left is enough
    assert head_scores(micro_vit, "remain", named)[0].tolist() == [144, 1, 144]


def test_a_user_adds_a_criterion_with_one_line(micro_vit, monkeypatch):
    monkeypatch.setitem(structured.CRITERIA, "largest", lambda weights: weights.abs().amax(1))
    scores = head_scores(micro_vit, "largest")
    for layer in range(DEPTH):
        weight = micro_vit.blocks[layer].attn.qkv.weight
        assert scores[layer].tolist() == [weight[head_rows(head)].abs().max().item() for head in range(HEADS)]
    kept = kept_units(micro_vit, head_and_mlp(micro_vit, some_masks(micro_vit), None, 0.5, 0.5, "largest"))
    rows = micro_vit.blocks[1].mlp.fc1.weight.abs().amax(1).tolist()
    assert kept["blocks.1.mlp"] == sorted(sorted(range(24), key=lambda unit: -rows[unit])[:12])


def test_a_score_that_is_not_a_number_is_refused(micro_vit):
    micro_vit.blocks[1].attn.qkv.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="blocks.1.attn is not a number"):
        head_scores(micro_vit, "magnitude")


# ---------------------------------------------------------------------------------------- ties and ranking
def test_ties_keep_the_first_in_layer_and_index_order():
    scores = {
        "a": torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64),
        "b": torch.tensor([2.0, 1.0, 1.0, 2.0], dtype=torch.float64),
    }
    for left, expected in {3: ([0, 1, 2], [0, 1, 3]), 2: ([1, 2], [0, 3]), 1: ([1], [0])}.items():
        assert select_units(scores, 1 - left / 4) == dict(zip("ab", expected, strict=True))
    pooled = {7: ([0, 1, 2, 3], [0, 1, 3]), 6: ([0, 1, 2, 3], [0, 3]), 5: ([0, 1, 2], [0, 3]), 3: ([1, 2], [0])}
    for left, expected in pooled.items():
        assert select_units(scores, 1 - left / 8, "global") == dict(zip("ab", expected, strict=True))
    # enough equal scores for an unstable sort to shuffle them
    scores = {key: torch.full((2000,), 0.5, dtype=torch.float64) for key in "ab"}
    scores["b"][1990] = 0.75
    assert select_units(scores, 0.4) == {"a": list(range(1200)), "b": [*range(1199), 1990]}
    assert select_units(scores, 0.4, "global") == {"a": list(range(2000)), "b": [*range(399), 1990]}


def hand_macs(kind, tokens=5, width=WIDTH, dim=12):
    """SPEC 3's formula, per unit: q, k, v and projection, scores and weighted sum; two rows for a neuron."""
    return 4 * tokens * width * dim + 2 * tokens * tokens * width if kind == "head" else 2 * tokens * dim


def cheapest_first(scores, ratios, min_units, cost):
    """Units go by score per MAC, of equal ones the last in (layer, unit) order, until the MACs of both quotas are gone
    or every layer is down to `min_units`; returns what is left, what went, the quota and the cost of the last one."""
    kinds = {key: "head" if key.endswith("attn") else "neuron" for key in scores}
    quota, last, entries, counted = 0, 0, [], {}
    for kind, ratio in ratios.items():
        counts = [len(values) for key, values in scores.items() if kinds[key] == kind]
        stay = max(len(counts) * min_units, math.floor(sum(counts) * (1 - Fraction(str(ratio)))))
        counted[kind] = ratio > 0  # 0 means leave alone
        quota += (sum(counts) - stay) * cost[kind]
    for place, (key, values) in enumerate(scores.items()):
        entries += [
            (value / cost[kinds[key]], -place, -unit, key)
            for unit, value in enumerate(values.tolist())
            if counted[kinds[key]]
        ]
    left = {key: list(range(len(values))) for key, values in scores.items()}
    removed = 0
    for value, _, unit, key in sorted(entries):
        gone = value == -math.inf  # units of earlier states have paid already
        if gone or (removed < quota and len(left[key]) > min_units):
            left[key].remove(-unit)
            last = cost[kinds[key]]
            removed += last
    return left, removed, quota, last


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("min_units", "ratios"), [(1, (0.3, 0.3)), (1, (0.0, 0.3)), (2, (0.5, 0.9)), (0, (0.9, 0.9))])
def test_score_per_mac_equals_a_loop(make_micro_vit, tied, min_units, ratios):
    model = make_micro_vit(num_heads=6)
    units, generator = vit_units(model), torch.Generator().manual_seed(3)
    ratios = dict(zip(("head", "neuron"), ratios, strict=True))
    cost = {"head": hand_macs("head", width=2), "neuron": hand_macs("neuron")}
    # a head costs about five neurons here; the factor lets either kind come first, and ties cross kinds
    scores = {}
    for key, group in units.items():
        values = torch.rand(group.count, generator=generator, dtype=torch.float64)
        scores[key] = (values * 3).ceil() * cost[group.kind] if tied else values * (3 if group.kind == "head" else 1)
    before = clones(scores)
    kept = rank_units(model, units, scores, ratios, "global", min_units, "score_per_mac")
    expected, removed, quota, last = cheapest_first(scores, ratios, min_units, cost)
    assert kept == expected
    assert vit_cost(model, {})["macs"] - vit_cost(model, kept)["macs"] == removed
    assert quota <= removed < quota + last
    # a later state goes on from there
    ratios = {kind: ratio and min(0.95, ratio + 0.04) for kind, ratio in ratios.items()}
    marked = mark_removed(scores, kept)
    assert_same(before, scores)
    later = rank_units(model, units, marked, ratios, "global", min_units, "score_per_mac")
    assert later == cheapest_first(marked, ratios, min_units, cost)[0]


# ------------------------------------------------------------------------- the functions scripts call
@pytest.mark.parametrize(("which", "pruned"), [("by head", True), ("layer-wise", False), ("global", True)])
def test_functions_as_scripts_call_them(make_micro_vit, one_batch, which, pruned):
    model, init = make_micro_vit(seed=1), make_micro_vit(seed=2).state_dict()
    vit.pruning_model_vit(model, 0.3)
    mask_dict, trained = vit.extract_mask_vit(model.state_dict()), clones(model.state_dict())
    scored = make_micro_vit(seed=1)
    vit.prune_model_custom_vit(scored, mask_dict)
    vit.remove_prune_vit(scored)
    if not pruned:
        model = make_micro_vit(seed=3)
    before = state_of(model)
    given = [mask_dict, trained, init, {"images": one_batch[0][0], "labels": one_batch[0][1]}]
    inputs = [clones(tensors) for tensors in given]
    call, ratios = partial(fillback_by_head, prune_ratio=0.34), {"attn": 0.34, "mlp": 0.0}
    if which != "by head":
        ratios["mlp"] = 0.3
        call = partial(fillback_head_and_mlp, head_prune_ratio=0.34, mlp_prune_ratio=0.3, sorting_mode=which)

    masks = call(model, mask_dict, one_batch, trained, init, return_mask_only=True)
    assert_same(before, state_of(model))
    assert [f"{name}.weight_mask" for name in masks] == list(mask_dict)
    scores, expected = unit_scores(scored, "l1", vit_places(scored), batches=one_batch), {}
    for branch, ratio in ratios.items():
        pool = {key: torch.tensor(values) for key, values in scores.items() if key.endswith(branch)}
        expected |= select_units(pool, ratio, "global" if which == "global" else "layer-wise")
    assert kept_units(model, masks) == expected
    bare = {name.removesuffix(".weight_mask"): mask for name, mask in mask_dict.items()}
    assert_same(masks, call(model, bare, one_batch, trained, init, return_mask_only=True))

    assert call(model, mask_dict, one_batch, trained, init) is model
    for name, mask in masks.items():
        module = model.get_submodule(name)
        assert torch.equal(module.weight_orig, init[f"{name}.weight"])
        assert torch.equal(module.weight_mask, mask)
        assert torch.equal(module.weight, init[f"{name}.weight"] * mask)
    rest = [name for name in init if name.removesuffix(".weight") not in masks]
    assert all(torch.equal(model.state_dict()[name], init[name]) for name in rest)
    for tensor in model.parameters():
        tensor.data.add_(1)  # training it must not reach what was passed in
    for old, new in zip(inputs, given, strict=True):
        assert_same(old, new)


def test_default_ratio_is_a_fifth_of_all_units(make_micro_vit):
    model = make_micro_vit(num_heads=12)
    masks = vit.full_masks(vit.prunable_weights(model))
    for call, neurons in ((fillback_by_head, 24), (fillback_head_and_mlp, 19)):  # floor(12 * 0.8), floor(24 * 0.8)
        kept = kept_units(model, call(model, masks, None, None, None, return_mask_only=True))
        assert (total_kept(kept, "attn"), total_kept(kept, "mlp")) == (2 * 9, 2 * neurons)


def test_bad_masks_and_ratios_are_refused(micro_vit):
    good = some_masks(micro_vit)
    for call in (fillback_head_and_mlp, fillback_by_head):
        for bad in ({"blocks.9.attn.qkv": torch.ones(36, 12)}, {"blocks.0.attn.qkv": torch.full((36, 12), 0.5)}):
            with pytest.raises(ValueError, match="mask"):
                call(micro_vit, {**good, **bad}, None, None, None)
    for ratio in (-0.1, 1.0):
        for ratios in ((ratio, 0.3), (0.3, ratio)):
            with pytest.raises(ValueError, match="ratio"):
                head_and_mlp(micro_vit, good, None, *ratios)
        with pytest.raises(ValueError, match="ratio"):
            fillback_by_head(micro_vit, good, None, None, None, "l1", ratio)


# ---------------------------------------------------------------------------------------- one-shot helpers
@pytest.mark.parametrize("ratio", ["0", "0.1", "0.25", "0.3", "0.33", "0.5", "0.625", "0.67", "0.9", "0.99"])
def test_one_shot_removes_the_nearest_number_ties_down(make_micro_vit, ratio):
    model = make_micro_vit()
    for prune_once, count in ((prune_heads, 3), (prune_neurons, 24)):
        lost = min(count - 1, math.ceil(count * Fraction(ratio) - Fraction(1, 2)))  # 0.5 rounds down
        kept = prune_once(model, {0: torch.arange(float(count)), 1: -torch.arange(float(count))}, float(ratio))
        assert kept == {0: list(range(lost, count)), 1: list(range(count - lost))}
        for block in model.blocks:
            assert (block.attn.num_heads if count == 3 else block.mlp.fc1.out_features) == count - lost


def test_one_shot_ratio_per_layer_and_only_the_layers_given(make_micro_vit):
    # of equal scores the first stay
    assert prune_neurons(make_micro_vit(), {1: torch.ones(24)}, 0.75) == {1: [0, 1, 2, 3, 4, 5]}
    model = make_micro_vit(num_heads=6, depth=3)
    importance = {0: torch.arange(6.0), 2: -torch.arange(6.0)}
    assert prune_heads(model, importance, {0: 0.33, 2: 0.67}) == {0: [2, 3, 4, 5], 2: [0, 1]}
    prune_neurons(model, {i: torch.arange(24.0) for i in range(3)}, {0: 0.5, 1: 0.0, 2: 0.25})
    rows = structured.check_vit_structure(model)
    assert [(row["heads"], row["neurons"]) for row in rows] == [(4, 12), (6, 24), (2, 18)]


def test_one_shot_refuses_bad_input_before_it_touches_the_model(micro_vit):
    before = state_of(micro_vit)
    for ratio in (1.0, -0.1):
        with pytest.raises(ValueError, match="ratio"):
            prune_heads(micro_vit, {0: torch.ones(3)}, ratio)
    with pytest.raises(ValueError, match="3 heads"):
        prune_heads(micro_vit, {0: torch.ones(3), 1: torch.ones(4)}, 0.5)
    for ids in ([3], [-1], [0, 7]):
        with pytest.raises(ValueError, match=r"0\.\.2"):
            structured.prune_attention_heads_hard(micro_vit.blocks[0].attn, ids)
        with pytest.raises(ValueError, match=r"0\.\.23"):
            structured.prune_mlp_neurons_hard(micro_vit.blocks[0].mlp, [i * 24 for i in ids])
    assert_same(before, state_of(micro_vit))
    vit.pruning_model_vit(micro_vit, 0.3)  # a model under torch.nn.utils.prune would be half cut
    before = state_of(micro_vit)
    with pytest.raises(ValueError, match="remove_prune_vit"):
        structured.prune_attention_heads_hard(micro_vit.blocks[0].attn, [1])
    assert_same(before, state_of(micro_vit))


# ------------------------------------------------------------------------------------- removal is lossless
@pytest.mark.parametrize("only_columns", [False, True])
def test_removed_units_change_no_logit_and_count_as_planned(make_micro_vit, make_batch, only_columns, capsys):
    model, images = make_micro_vit(depth=3).eval(), make_batch()[0]
    masks = masks_by_hand(model, KEPT)
    if only_columns:
        masks = {name: mask for name, mask in masks.items() if "proj" in name or "fc2" in name}
    masked, cost = masked_by_hand(model, masks), vit_cost(model, KEPT)
    assert (masked(images) - model(images)).abs().max() > 1e-3  # the units mattered
    small = remove_units(copy.deepcopy(masked), vit_units(masked), KEPT)
    assert_same_function(masked, small, images)
    rows = structured.check_vit_structure(small)
    for layer, (block, row) in enumerate(zip(small.blocks, rows, strict=True)):
        heads, neurons = len(KEPT[f"blocks.{layer}.attn"]), len(KEPT[f"blocks.{layer}.mlp"])
        assert row == {"layer": layer, "heads": heads, "head_dim": 4, "neurons": neurons}
        assert (block.attn.num_heads, block.attn.head_dim, block.attn.scale) == (heads, 4, 0.5)
        shapes = ((12 * heads, 12), (12, 4 * heads), (neurons, 12), (12, neurons))
        linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        for linear, shape in zip(linears, shapes, strict=True):
            assert linear.weight.shape == (linear.out_features, linear.in_features) == shape
            assert linear.bias.shape == shape[:1]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:-1] == [f"blocks.{r['layer']} | {r['heads']} heads of 4 | {r['neurons']} neurons" for r in rows]
    parameters = sum(parameter.numel() for parameter in small.parameters())
    assert lines[-1] == f"total | 3 heads | 29 neurons | {parameters:,} parameters"
    macs = 4 * 3 * 4 * 4 * 12 + 12 * 5 + 3 * hand_macs("head") + 29 * hand_macs("neuron")
    assert cost == {"heads": 3, "neurons": 29, "parameters": parameters, "macs": macs} == vit_cost(small, {})
    partly = vit_cost(model, {"blocks.1.attn": [0]})
    assert (partly["heads"], partly["neurons"]) == (7, 72)
    vit.pruning_model_vit(model, 0.3)
    assert vit_cost(model, KEPT) == cost


def test_hard_pruning_by_id_changes_no_logit(make_micro_vit, make_batch):
    model, images = make_micro_vit().eval(), make_batch()[0]
    kept = {"blocks.0.attn": [1], "blocks.1.attn": [0, 2], "blocks.0.mlp": [3, 7], "blocks.1.mlp": [*range(1, 24)]}
    masked = masked_by_hand(model, masks_by_hand(model, kept))
    small = copy.deepcopy(masked)
    structured.prune_attention_heads_hard(small.blocks[0].attn, [2, 0])
    structured.prune_attention_heads_hard(small.blocks[1].attn, torch.tensor([1]))
    structured.prune_mlp_neurons_hard(small.blocks[0].mlp, {i for i in range(24) if i not in (3, 7)})
    structured.prune_mlp_neurons_hard(small.blocks[1].mlp, [0])
    assert_same_function(masked, small, images)
    # again, on what is left: ids count anew
    prune_again = copy.deepcopy(small)
    small.blocks[1].attn.proj.weight.data[:, 4:] = 0  # what was head 2
    structured.prune_attention_heads_hard(prune_again.blocks[1].attn, [1])
    assert_same_function(small, prune_again, images)


def test_unit_masks_slices_and_scatters_are_those_by_hand(make_micro_vit):
    model = make_micro_vit(depth=3)
    units, tensors = vit_units(model), dict(model.state_dict())
    before, masks = clones(tensors), masks_by_hand(model, KEPT)
    assert_same(structured.unit_masks(units, KEPT, dict(model.named_parameters())), masks)
    only = {"blocks.1.mlp": [0, 5]}
    weights, by_hand = vit.prunable_weights(model), masks_by_hand(model, only)
    whole = {name: by_hand.get(f"{name}.weight", torch.ones_like(weight)) for name, weight in weights.items()}
    assert_same(vit.structured_masks(weights, units, only), whole)

    small = structured.slice_tensors(tensors, units, KEPT)
    dense = structured.scatter_tensors(small, units, KEPT)
    assert_same(dense, {name: tensor * masks.get(name, torch.ones(())) for name, tensor in tensors.items()})
    assert_same(structured.slice_tensors(dense, units, KEPT), small)
    assert_same(small, dict(remove_units(copy.deepcopy(model), units, KEPT).state_dict()))
    for tensor in (*small.values(), *dense.values()):
        tensor.add_(1)  # copies, not views
    assert_same(before, tensors)
    # optimizer state that holds only some of the parameters
    some = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.0.mlp")}
    kept = {"blocks.0.mlp": [2, 3]}
    assert structured.slice_tensors(some, units, kept)["blocks.0.mlp.fc2.weight"].shape == (12, 2)
    assert structured.scatter_tensors(structured.slice_tensors(some, units, kept), units, kept).keys() == some.keys()


# ------------------------------------------------------------------------------------------ timm's and others
@pytest.mark.parametrize("options", [
    {}, {"init_values": 0.5, "qk_norm": True, "reg_tokens": 4}, {"qkv_bias": False, "global_pool": "avg"},
], ids=["plain", "more", "less"])  # fmt: skip
def test_timm_vits_go_through_the_same_functions(options, make_batch, add_noise):
    model = add_noise(TimmVit(**MICRO, **options), scale=0.3).double().eval()
    assert vit.is_vit_model(model)
    batch = make_batch(dtype=torch.float64)
    masked = masked_by_hand(model, {n: m for n, m in masks_by_hand(model, KEPT).items() if "proj" in n or "fc2" in n})
    small = remove_units(copy.deepcopy(masked), vit_units(masked), KEPT)
    assert_same_function(masked, small, batch[0])
    tokens = 5 + options.get("reg_tokens", 0)
    macs = 4 * 3 * 4 * 4 * 12 + 12 * 5 + 3 * hand_macs("head", tokens) + 29 * hand_macs("neuron", tokens)
    assert vit_cost(model, KEPT)["macs"] == vit_cost(small, {})["macs"] == macs
    init = clones(model.state_dict())
    arguments = (model, some_masks(model), [batch], init, init, "saliency", 0.34, 0.3)
    kept = kept_units(model, fillback_head_and_mlp(*arguments, return_mask_only=True))
    small = remove_units(copy.deepcopy(model), vit_units(model), kept)
    # masks of torch.nn.utils.prune are of weights: the biases of dead neurons still reach nothing
    torch.testing.assert_close(fillback_head_and_mlp(*arguments)(batch[0]), small(batch[0]), rtol=0, atol=1e-12)


def micro_timm(path, build, *arguments, **options):
    """A timm ViT one of whose modules is another."""
    model = TimmVit(**MICRO)
    model.set_submodule(path, build(*arguments, **options))
    return model


ATTENTION = partial(micro_timm, "blocks.1.attn", TimmAttention, 12, num_heads=3)
REFUSED = {
    "a plain network": (lambda: nn.Sequential(nn.Linear(3, 3)), "no transformer blocks"),
    "hybrid": (partial(micro_timm, "patch_embed.proj", nn.Linear, 48, 12), "patch embedding"),
    "gMLP": (partial(micro_timm, "blocks.1.mlp", GatedMlp, 12, 24), "blocks.1.mlp is a timm.layers.mlp.GatedMlp"),
    "widths that disagree": (partial(micro_timm, "blocks.1.mlp.fc2", nn.Linear, 12, 12), "blocks.1.mlp gates"),
    "norm after attention": (partial(ATTENTION, scale_norm=True, norm_layer=nn.RMSNorm), "norm after attention"),
    "norm in the MLP": (partial(micro_timm, "blocks.1.mlp", TimmMlp, 12, 24, norm_layer=nn.RMSNorm), "norm inside"),
    "layers that disagree": (partial(micro_timm, "blocks.1.attn.proj", nn.Linear, 8, 12), "blocks.1.attn: qkv and"),
    "another width": (partial(micro_timm, "blocks.1.attn.qkv", nn.Linear, 12, 24), "blocks.1.attn: qkv does not hold"),
    "shared positions": (lambda: Beit(**MICRO, use_shared_rel_pos_bias=True), "rel_pos_bias is one table"),
    "differential attention": (partial(micro_timm, "blocks.1.attn", DiffAttention, 12, 3), "blocks.1.attn: qkv"),
    "grouped queries": (
        lambda: Eva(**MICRO, attn_type="rope", qkv_fused=False, num_kv_heads=1),
        "blocks.0.attn has fewer keys",
    ),
    "SAM's windows": (
        lambda: timm.create_model("samvit_base_patch16", depth=1, embed_dim=12, num_heads=3),
        "attn is a",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_blocks_are_refused_with_the_reason(name):
    build, words = REFUSED[name]
    with torch.device("meta"):
        model = build()
    reason = structured.layout_problem(model)
    assert reason.startswith(type(model).__name__)
    assert words in reason
    assert not vit.is_vit_model(model)
    for call in (vit_units, structured.check_vit_structure, partial(head_scores, criteria="random")):
        with pytest.raises(structured.LayoutError) as caught:
            call(model)
        assert str(caught.value) == reason


# ------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("sorting_mode", SORTING)
@pytest.mark.parametrize(("schedule", "ratios", "min_units"), [
    ("geometric", {"head": 0.33, "neuron": 0.3}, 1), ("linear", {"head": 0.5}, 1), ("constant", {"neuron": 0.9}, 2),
    ("geometric", {"head": 0.9, "neuron": 0.99}, 0), ("linear", {"head": 0.9, "neuron": 0.99}, 1),
])  # fmt: skip
def test_the_plan_is_what_the_ranking_gives(make_micro_vit, sorting_mode, schedule, ratios, min_units, round_to):
    model = make_micro_vit(num_heads=6, depth=3)
    units = vit_units(model)
    target = "both" if len(ratios) == 2 else "head" if "head" in ratios else "mlp"
    flags = f"--vit_structured --vit_prune_target {target} --rate {ratios.get('head', 0)} --pruning_times 4"
    flags += f" --min_units {min_units} --round_to {round_to} --ratio_schedule {schedule} --sorting_mode {sorting_mode}"
    args = parse_args([*flags.split(), *(["--mlp_prune_ratio", str(ratios["neuron"])] if "neuron" in ratios else [])])
    plan = allocation_of(args, VIT, model, {key: units[key] for key in units if units[key].kind in ratios}).plan()
    kept, generator = {key: list(range(group.count)) for key, group in units.items()}, torch.Generator().manual_seed(3)
    for state, row in enumerate(plan):
        if state:
            scores = {key: torch.rand(group.count, generator=generator) for key, group in units.items()}
            now = {kind: structured.scheduled_ratio(schedule, ratio, state, 4) for kind, ratio in ratios.items()}
            options = (sorting_mode, min_units, "score", round_to)
            before, now = kept, rank_units(model, units, mark_removed(scores, kept), now, *options)
            kept = before | now
            assert not any(len(kept[key]) % round_to for key, group in units.items() if group.kind == "neuron")
            assert all(set(kept[key]) <= set(before[key]) for key in units)  # a removed unit stays removed
        assert vit_cost(model, row) == vit_cost(model, kept)
    assert len(plan) == 4
