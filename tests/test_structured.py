"""Laws of structured pruning: scores, choice, masks and removal of heads and neurons, each against plain loops."""

import copy
import gc
import inspect
import logging
import math
from fractions import Fraction
from functools import partial

import pytest
import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import Mlp as TimmMlp
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import nn
from torch.nn.utils import prune

from models.vit import vit_tiny
from vit_pruning_utils import (
    extract_mask_vit,
    is_vit_model,
    prunable_weights,
    prune_model_custom_fillback_vit_by_head,
    prune_model_custom_vit,
    pruning_model_vit,
    structured_masks,
)
from vit_pruning_utils_head_mlp import mark_removed, prune_model_custom_fillback_vit_head_and_mlp, rank_units
from vit_structured_pruning import (
    CRITERIA,
    LayoutError,
    check_vit_structure,
    compute_mlp_neuron_importance,
    compute_vit_head_importance,
    count_vit_parameters,
    keep_count,
    layout_problem,
    plan_structured,
    prune_attention_heads_hard,
    prune_mlp_neurons_hard,
    remove_units,
    scatter_tensors,
    scheduled_ratio,
    score_units,
    select_units,
    slice_tensors,
    structured_prune_mlp_neurons,
    structured_prune_vit_heads,
    unit_masks,
    vit_cost,
    vit_units,
)

ALL_CRITERIA = ["remain", "magnitude", "l1", "l2", "saliency", "random"]
SCHEDULES = ["geometric", "linear", "constant"]
HEADS, WIDTH, NEURONS, DEPTH = 3, 4, 24, 2  # of the micro model
MICRO = {"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 12, "depth": 3, "num_heads": 3, "mlp_ratio": 2}


# ------------------------------------------------------------------------------------- references and helpers


def head_rows(head, heads=HEADS, width=WIDTH):
    """Rows of attn.qkv that belong to a head, by hand: q rows, then k rows, then v rows."""
    return [part * heads * width + head * width + i for part in range(3) for i in range(width)]


def head_columns(head, width=WIDTH):
    return list(range(head * width, (head + 1) * width))


def masks_by_hand(model, kept, biases=False):
    """0/1 masks by parameter name for {units key: kept ids}, element by element."""
    masks = {}
    for key, ids in kept.items():
        module = model.get_submodule(key)
        if key.endswith("attn"):
            heads, width = module.num_heads, module.head_dim
            rows = [row for head in ids for row in head_rows(head, heads, width)]
            columns = [column for head in ids for column in head_columns(head, width)]
            first, second = "qkv", "proj"
        else:
            rows = columns = list(ids)
            first, second = "fc1", "fc2"
        incoming = torch.zeros_like(getattr(module, first).weight)
        outgoing = torch.zeros_like(getattr(module, second).weight)
        bias = torch.zeros_like(getattr(module, first).bias)
        for row in rows:
            incoming[row] = 1
            bias[row] = 1
        for column in columns:
            outgoing[:, column] = 1
        masks |= {f"{key}.{first}.weight": incoming, f"{key}.{second}.weight": outgoing}
        if biases:
            masks[f"{key}.{first}.bias"] = bias
    return masks


def kept_units(masks, heads, depth):
    """{units key: ids} read off weight masks, which must be all 0 or all 1 per unit and agree within a layer."""
    kept = {}
    for layer in range(depth):
        for branch, first, second, count in (("attn", "qkv", "proj", heads), ("mlp", "fc1", "fc2", None)):
            key = f"blocks.{layer}.{branch}"
            incoming, outgoing = masks[f"{key}.{first}"], masks[f"{key}.{second}"]
            count = count or len(incoming)
            width = outgoing.shape[1] // count
            ids = []
            for unit in range(count):
                rows = head_rows(unit, count, width) if branch == "attn" else [unit]
                share = torch.cat([incoming[rows].flatten(), outgoing[:, head_columns(unit, width)].flatten()])
                assert share.min() == share.max(), f"{key} unit {unit} is neither whole nor gone"
                assert share[0] in (0, 1)
                if share[0]:
                    ids.append(unit)
            kept[key] = ids
    return kept


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def reference_forward(weights, images):
    """The micro model written out with a loop per patch and per head; returns logits and what scores look at.

    Activations by layer: "qkv" is {(part, head): [B, N, d]}, "z" the input of proj, "fc1", "h" the input of fc2.
    """
    patches = []
    for top in (0, 4):
        for left in (0, 4):
            pixels = images[:, :, top : top + 4, left : left + 4].reshape(len(images), -1)
            kernel = weights["patch_embed.proj.weight"].reshape(12, -1)
            patches.append(pixels @ kernel.T + weights["patch_embed.proj.bias"])
    x = torch.stack([weights["cls_token"][0].expand(len(images), 12), *patches], dim=1) + weights["pos_embed"]
    seen = []
    for layer in range(DEPTH):
        w = {name[len(f"blocks.{layer}.") :]: value for name, value in weights.items() if f"blocks.{layer}." in name}
        normed = layer_norm(x, w["norm1.weight"], w["norm1.bias"])
        qkv, heads = {}, []
        for head in range(HEADS):
            for part in range(3):
                rows = slice(part * 12 + head * WIDTH, part * 12 + (head + 1) * WIDTH)
                qkv[part, head] = normed @ w["attn.qkv.weight"][rows].T + w["attn.qkv.bias"][rows]
            logits = qkv[0, head] @ qkv[1, head].transpose(1, 2) / math.sqrt(WIDTH)
            weight = (logits - logits.amax(-1, keepdim=True)).exp()
            heads.append(weight / weight.sum(-1, keepdim=True) @ qkv[2, head])
        z = torch.cat(heads, dim=-1)
        x = x + z @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        fc1 = layer_norm(x, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
        h = fc1 * 0.5 * (1 + torch.erf(fc1 / math.sqrt(2)))
        x = x + h @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
        seen.append({"qkv": qkv, "z": z, "fc1": fc1, "h": h})
    x = layer_norm(x, weights["norm.weight"], weights["norm.bias"])
    return x[:, 0] @ weights["head.weight"].T + weights["head.bias"], seen


def cross_entropy_sum(logits, labels):
    return sum(torch.logsumexp(row, 0) - row[label] for row, label in zip(logits, labels, strict=True))


def reference_scores(criteria, weights, masks, batches, summed_loss=cross_entropy_sum):
    """{units key: list of scores} of the micro model by SPEC 5.2's table, one unit at a time."""
    scores = {f"blocks.{i}.{branch}": [] for i in range(DEPTH) for branch in ("attn", "mlp")}
    if criteria in ("remain", "magnitude"):
        for layer in range(DEPTH):
            for unit in range(HEADS + NEURONS):
                is_head = unit < HEADS
                name = f"blocks.{layer}.attn.qkv" if is_head else f"blocks.{layer}.mlp.fc1"
                source = masks[name] if criteria == "remain" else weights[f"{name}.weight"].abs()
                total = 0.0
                for row in head_rows(unit) if is_head else [unit - HEADS]:
                    for element in source[row].tolist():
                        total += element
                scores[name.rpartition(".")[0]].append(total)
        return scores
    sums = {key: [0.0] * (HEADS if key.endswith("attn") else NEURONS) for key in scores}
    seen_images = 0
    for images, labels in batches:
        images = images.double().detach().requires_grad_()
        logits, seen = reference_forward(weights, images)
        places = [seen[layer][place] for layer in range(DEPTH) for place in ("z", "h")]
        loss = summed_loss(logits, labels)
        gradients = iter(torch.autograd.grad(loss, places)) if criteria == "saliency" else None
        for layer in range(DEPTH):
            if criteria == "saliency":
                taylor = [(seen[layer][place] * next(gradients)).detach() for place in ("z", "h")]
            for image in range(len(images)):
                for unit in range(HEADS):
                    if criteria == "saliency":
                        value = abs(taylor[0][image][:, head_columns(unit)].sum().item())
                    else:
                        parts = torch.stack([seen[layer]["qkv"][part, unit][image] for part in range(3)]).detach()
                        value = (parts.abs() if criteria == "l1" else parts**2).mean().item()
                    sums[f"blocks.{layer}.attn"][unit] += value
                for unit in range(NEURONS):
                    if criteria == "saliency":
                        value = abs(taylor[1][image][:, unit].sum().item())
                    else:
                        output = seen[layer]["fc1"][image][:, unit].detach()
                        value = (output.abs() if criteria == "l1" else output**2).mean().item()
                    sums[f"blocks.{layer}.mlp"][unit] += value
        seen_images += len(images)
    finish = math.sqrt if criteria == "l2" else float
    return {key: [finish(value / seen_images) for value in values] for key, values in sums.items()}


def plain(model):
    """float64 weights as the forward pass sees them."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for name in [name for name in weights if name.endswith("_orig")]:
        stem = name.removesuffix("_orig")
        weights[stem] = weights.pop(name) * dict(model.named_buffers())[f"{stem}_mask"].double()
    return weights


def as_pairs(weights, masks):
    """A state dict as `torch.nn.utils.prune` stores it."""
    pairs = dict(weights)
    for name, mask in masks.items():
        pairs[f"{name}.weight_orig"] = pairs.pop(f"{name}.weight")
        pairs[f"{name}.weight_mask"] = mask
    return pairs


def random_masks(model, seed=0, density=0.6):
    generator = torch.Generator().manual_seed(seed)
    weights = prunable_weights(model)
    return {name: (torch.rand(w.shape, generator=generator) < density).to(w) for name, w in weights.items()}


def state_of(model):
    """All that a scorer must leave as it was."""
    modules = dict(model.named_modules())
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "weights": {name: m.weight.detach().clone() for name, m in modules.items() if hasattr(m, "weight")},
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: p.data_ptr() for name, p in model.named_parameters()},
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


def frozen(*dictionaries):
    """Clones, to compare inputs with after a call."""
    return [{name: tensor.clone() for name, tensor in d.items()} for d in dictionaries]


def total_kept(kept, branch):
    return sum(len(ids) for key, ids in kept.items() if key.endswith(branch))


def head_and_mlp(model, masks, batches, heads, neurons, criteria="magnitude", sorting_mode="layer-wise"):
    return prune_model_custom_fillback_vit_head_and_mlp(
        model, masks, batches, None, None, criteria, heads, neurons, return_mask_only=True, sorting_mode=sorting_mode
    )


# ------------------------------------------------------------------------------------ the reference numbers


@pytest.mark.parametrize("criteria", ALL_CRITERIA)
def test_reference_numbers_to_the_last_weight(criteria, make_batch, add_noise):
    torch.manual_seed(0)
    model = add_noise(vit_tiny(num_classes=10), scale=0.02)
    elementwise = random_masks(model, density=0.5)
    loader = [make_batch(images=2, img_size=32, classes=10)]
    masks = head_and_mlp(model, elementwise, loader, 0.33, 0.3, criteria)
    assert len(masks) == 36
    zeros = {name: int((mask == 0).sum()) for name, mask in masks.items()}
    sizes = {name: mask.numel() for name, mask in masks.items()}
    attention = [name for name in masks if ".attn." in name]
    assert len(attention) == 18
    assert sum(sizes[name] for name in attention) == 1_327_104
    assert sum(sizes.values()) == 2_654_208
    assert sum(zeros[name] for name in attention) == 442_368
    assert sum(zeros.values()) - sum(zeros[name] for name in attention) == 400_896
    assert sum(zeros.values()) == 843_264
    kept = kept_units(masks, heads=3, depth=9)
    assert (total_kept(kept, "attn"), total_kept(kept, "mlp")) == (18, 2412)
    assert {len(kept[f"blocks.{i}.attn"]) for i in range(9)} == {2}
    assert {len(kept[f"blocks.{i}.mlp"]) for i in range(9)} == {268}
    assert [round(100 * part / whole, 2) for part, whole in ((442_368, 1_327_104), (400_896, 1_327_104))] == [
        33.33,
        30.21,
    ]


def test_global_totals_of_vit_tiny():
    model = vit_tiny(num_classes=10)
    masks = head_and_mlp(model, random_masks(model), None, 0.33, 0.3, sorting_mode="global")
    kept = kept_units(masks, heads=3, depth=9)
    # 27 * 0.67 = 18.09 and 3,456 * 0.7 = 2,419.2
    assert (total_kept(kept, "attn"), total_kept(kept, "mlp")) == (18, 2419)
    assert min(map(len, kept.values())) >= 1


@pytest.mark.parametrize("count", [3, 6, 12, 16, 27, 384, 3456])
@pytest.mark.parametrize("ratio", ["0", "0.05", "0.3", "0.33", "0.5", "0.67", "0.9", "0.99"])
def test_keep_count_is_exact(count, ratio):
    for minimum in (0, 1, 2):
        expected = max(minimum, math.floor(count * (1 - Fraction(ratio))))
        assert keep_count(count, float(ratio), minimum) == expected


def test_keep_count_examples():
    assert keep_count(3, 0.33) == 2
    assert keep_count(384, 0.3) == 268
    assert keep_count(6, 0.5) == 3
    assert keep_count(3, 0.99) == 1
    assert keep_count(3, 0.99, 0) == 0


# ---------------------------------------------------------------------------------------- one-shot helpers


@pytest.mark.parametrize(
    ("heads", "ratio", "lost"), [(3, 0.33, 1), (3, 0.5, 1), (3, 0.67, 2), (6, 0.33, 2), (3, 0.99, 2), (3, 0, 0)]
)
def test_one_shot_examples(make_micro_vit, heads, ratio, lost):
    model = make_micro_vit(num_heads=heads)
    scores = {layer: torch.rand(heads, dtype=torch.float64) for layer in range(DEPTH)}
    kept = structured_prune_vit_heads(model, scores, ratio)
    for layer, values in scores.items():
        best = sorted(range(heads), key=lambda unit: -values[unit].item())[: heads - lost]
        assert kept[layer] == sorted(best)
        assert model.blocks[layer].attn.num_heads == heads - lost
    assert torch.isfinite(model(torch.randn(2, 3, 8, 8))).all()


@pytest.mark.parametrize("ratio", ["0.05", "0.1", "0.25", "0.3", "0.33", "0.5", "0.625", "0.67", "0.9", "0.99"])
def test_one_shot_removes_the_nearest_number_ties_down(make_micro_vit, ratio):
    model = make_micro_vit()
    kept = structured_prune_mlp_neurons(model, {0: torch.arange(24.0), 1: torch.arange(24.0)}, float(ratio))
    exact = 24 * Fraction(ratio)
    lost = min(23, math.ceil(exact - Fraction(1, 2)))  # 0.5 rounds down
    assert kept == {0: list(range(lost, 24)), 1: list(range(lost, 24))}
    assert [block.mlp.fc1.out_features for block in model.blocks] == [24 - lost] * 2


def test_one_shot_ratio_per_layer_and_only_the_layers_given(make_micro_vit):
    model = make_micro_vit(num_heads=6, depth=3)
    importance = {0: torch.arange(6.0), 2: -torch.arange(6.0)}
    assert structured_prune_vit_heads(model, importance, {0: 0.33, 2: 0.67}) == {0: [2, 3, 4, 5], 2: [0, 1]}
    assert [block.attn.num_heads for block in model.blocks] == [4, 6, 2]
    importance = {0: torch.arange(24.0), 1: torch.arange(24.0), 2: torch.arange(24.0)}
    structured_prune_mlp_neurons(model, importance, {0: 0.5, 1: 0.0, 2: 0.25})
    assert [block.mlp.fc2.in_features for block in model.blocks] == [12, 24, 18]


def test_one_shot_parameters_of_vit_tiny():
    model = vit_tiny(num_classes=10)
    structured_prune_vit_heads(model, compute_vit_head_importance(model, "magnitude"), 0.33)
    assert count_vit_parameters(model) == sum(p.numel() for p in model.parameters()) == 2_253_514


def test_one_shot_refuses_bad_input_before_it_touches_the_model(make_micro_vit):
    model = make_micro_vit()
    before = state_of(model)
    for ratio in (1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="ratio"):
            structured_prune_vit_heads(model, {0: torch.ones(3)}, ratio)
    with pytest.raises(ValueError, match="3 heads"):
        structured_prune_vit_heads(model, {0: torch.ones(3), 1: torch.ones(4)}, 0.5)
    assert_same(before, state_of(model))


def test_surgery_on_a_model_under_torch_prune_works_or_refuses(make_micro_vit, one_batch):
    """Never a model that is half cut: either its logits are those of the masked model, or nothing happened."""
    model, masked = make_micro_vit(), make_micro_vit()
    for vit in (model, masked):
        pruning_model_vit(vit, 0.3)
    mask = masks_by_hand(masked, {"blocks.0.attn": [0, 2]})["blocks.0.attn.proj.weight"]
    prune.custom_from_mask(masked.blocks[0].attn.proj, "weight", mask)
    before = state_of(model)
    try:
        prune_attention_heads_hard(model.blocks[0].attn, [1])
    except ValueError:
        assert_same(before, state_of(model))
    else:
        torch.testing.assert_close(model(one_batch[0][0]), masked(one_batch[0][0]))


# -------------------------------------------------------------------------------- ratios over the states


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scheduled_ratio_by_hand(schedule):
    for state in range(1, 5):
        expected = {"geometric": 1 - 0.5 ** (state / 4), "linear": 0.125 * state, "constant": 0.5}[schedule]
        assert scheduled_ratio(schedule, 0.5, state, 5) == pytest.approx(expected, abs=1e-12)
    for ratio in (0.0, 0.3, 0.33, 0.9):
        ramp = [scheduled_ratio(schedule, ratio, state, 5) for state in range(1, 5)]
        assert ramp == sorted(ramp)
        assert ramp[-1] == pytest.approx(ratio, abs=1e-12)
    assert scheduled_ratio(schedule, 0.3, 1, 2) == pytest.approx(0.3)


def test_unknown_schedule_and_sorting_are_refused():
    with pytest.raises(ValueError, match="cubic"):
        scheduled_ratio("cubic", 0.3, 1, 2)
    with pytest.raises(ValueError, match="columnwise"):
        select_units({"a": torch.ones(3)}, 0.3, "columnwise")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sorting_mode", ["layer-wise", "global"])
@pytest.mark.parametrize("rank_by", ["score", "score_per_mac"])
def test_half_of_six_heads_over_five_states(make_micro_vit, schedule, sorting_mode, rank_by):
    model = make_micro_vit(num_heads=6, depth=4)
    units = vit_units(model, ("head",))
    generator = torch.Generator().manual_seed(1)
    kept = {key: list(range(6)) for key in units}
    for state in range(1, 5):
        # new scores in each state, as training would give them
        scores = {key: torch.rand(6, generator=generator, dtype=torch.float64) for key in units}
        ratio = scheduled_ratio(schedule, 0.5, state, 5)
        now = rank_units(model, units, mark_removed(scores, kept), {"head": ratio}, sorting_mode, rank_by=rank_by)
        assert all(set(now[key]) <= set(kept[key]) for key in units)  # removed stays removed
        if sorting_mode == "layer-wise":
            # floor(6 (1 - r)) for r = 0.159, 0.293, 0.405, 0.5 and 0.125, 0.25, 0.375, 0.5
            left = {"geometric": [5, 4, 3, 3], "linear": [5, 4, 3, 3], "constant": [3] * 4}[schedule][state - 1]
            assert {len(ids) for ids in now.values()} == {left}
        else:
            # floor(24 (1 - r))
            left = {"geometric": [20, 16, 14, 12], "linear": [21, 18, 15, 12], "constant": [12] * 4}[schedule]
            assert total_kept(now, "attn") == left[state - 1]
        kept = now
    assert total_kept(kept, "attn") == 12
    if sorting_mode == "global":
        assert len({len(ids) for ids in kept.values()}) > 1  # or it would be layer-wise


def test_mark_removed_marks_what_is_not_kept_and_copies():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([1.0, 2.0])}
    before = frozen(scores)[0]
    marked = mark_removed(scores, {"a": [2, 0]})
    assert marked["a"].tolist() == [3.0, -math.inf, 2.0]
    assert marked["b"].tolist() == [1.0, 2.0]
    assert_same(before, scores)


def test_ninety_percent_global_leaves_a_head_in_every_layer_and_the_model_runs(make_micro_vit, one_batch):
    model = make_micro_vit(num_heads=12, depth=5, dtype=torch.float64).eval()
    with torch.no_grad():
        model.blocks[3].attn.qkv.weight.mul_(1000)  # the best twelve of sixty are all here
    masks = head_and_mlp(model, random_masks(model), None, 0.9, 0.0, sorting_mode="global")
    kept = kept_units(masks, heads=12, depth=5)
    assert [len(kept[f"blocks.{i}.attn"]) for i in range(5)] == [1, 1, 1, 2, 1]
    small = remove_units(copy.deepcopy(model), vit_units(model), kept)
    prune_model_custom_vit(model, masks)
    images = one_batch[0][0].double()
    torch.testing.assert_close(small(images), model(images), rtol=0, atol=1e-12)


def test_min_units_is_kept_in_every_layer_and_zero_may_empty_one():
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    assert select_units(scores, 0.5, "global", 2) == {"a": [2, 3], "b": [2, 3]}
    assert select_units(scores, 0.5, "global", 1) == {"a": [3], "b": [1, 2, 3]}
    assert select_units(scores, 0.5, "global", 0) == {"a": [], "b": [0, 1, 2, 3]}
    assert select_units(scores, 0.9, "global", 2) == {"a": [2, 3], "b": [2, 3]}
    assert select_units(scores, 0.9, "layer-wise", 0) == {"a": [], "b": []}
    assert select_units(scores, 0.9, "layer-wise", 3) == {"a": [1, 2, 3], "b": [1, 2, 3]}


@pytest.mark.parametrize("criteria", ALL_CRITERIA)
@pytest.mark.parametrize("sorting_mode", ["layer-wise", "global"])
def test_a_target_of_one_kind_leaves_the_other_whole(micro_vit, one_batch, criteria, sorting_mode):
    masks = random_masks(micro_vit)
    heads_only = head_and_mlp(micro_vit, masks, one_batch, 0.5, 0.0, criteria, sorting_mode)
    neurons_only = head_and_mlp(micro_vit, masks, one_batch, 0.0, 0.3, criteria, sorting_mode)
    assert all(mask.all() for name, mask in heads_only.items() if ".mlp." in name)
    assert all(mask.all() for name, mask in neurons_only.items() if ".attn." in name)
    # 3 * 0.5 = 1.5 and 6 * 0.5 = 3; 24 * 0.7 = 16.8 and 48 * 0.7 = 33.6
    heads = total_kept(kept_units(heads_only, HEADS, DEPTH), "attn")
    neurons = total_kept(kept_units(neurons_only, HEADS, DEPTH), "mlp")
    assert (heads, neurons) == ((2, 32) if sorting_mode == "layer-wise" else (3, 33))
    by_head = partial(prune_model_custom_fillback_vit_by_head, criteria=criteria, return_mask_only=True)
    if sorting_mode == "layer-wise":
        assert_same(by_head(micro_vit, masks, one_batch, None, None, prune_ratio=0.5), heads_only)


@pytest.mark.parametrize("criteria", ALL_CRITERIA)
@pytest.mark.parametrize("rank_by", ["score", "score_per_mac"])
@pytest.mark.parametrize("sorting_mode", ["layer-wise", "global"])
def test_both_with_head_ratio_zero_equals_neurons_alone(micro_vit, one_batch, criteria, rank_by, sorting_mode):
    units = {"both": vit_units(micro_vit), "mlp": vit_units(micro_vit, ("neuron",))}
    masks = random_masks(micro_vit)
    scores = {
        target: score_units(micro_vit, group, criteria, mask=masks, batches=one_batch)
        for target, group in units.items()
    }
    rank = partial(rank_units, micro_vit, sorting_mode=sorting_mode, rank_by=rank_by)
    both = rank(units["both"], scores["both"], {"head": 0.0, "neuron": 0.3})
    alone = rank(units["mlp"], scores["mlp"], {"neuron": 0.3})
    assert {key: ids for key, ids in both.items() if key.endswith("mlp")} == alone
    assert all(both[f"blocks.{layer}.attn"] == [0, 1, 2] for layer in range(DEPTH))


# -------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("criteria", ["remain", "magnitude", "l1", "l2", "saliency"])
@pytest.mark.parametrize("pruned", [False, True], ids=["plain", "under torch.prune"])
@pytest.mark.parametrize("trained", [None, "plain", "pairs"])
def test_scores_equal_the_loop_and_nothing_changes(make_micro_vit, make_batch, criteria, pruned, trained):
    model = make_micro_vit(dtype=torch.float64)
    other = make_micro_vit(seed=7, dtype=torch.float64).state_dict()
    given_masks, trained_masks = random_masks(model, seed=1), random_masks(model, seed=2)
    if pruned:
        prune_model_custom_vit(model, random_masks(model, seed=3))
    for name, parameter in list(model.named_parameters())[::2]:
        parameter.grad = torch.full_like(parameter, len(name))
    model.train()
    model.blocks[1].eval()
    model.pos_embed.requires_grad_(False)
    batches = [make_batch(5, seed=1, dtype=torch.float64), make_batch(3, seed=2, dtype=torch.float64)]

    weights = plain(model)
    trained_weight = None
    if trained == "plain":
        trained_weight, weights = dict(other), other
    elif trained == "pairs":
        trained_weight = as_pairs(other, trained_masks)
        weights = dict(other)
        for name, mask in trained_masks.items():
            weights[f"{name}.weight"] = other[f"{name}.weight"] * mask
    expected = reference_scores(criteria, weights, given_masks, batches)

    before, random_state = state_of(model), torch.get_rng_state()
    inputs = frozen(given_masks, trained_weight or {}, dict(enumerate(images for images, _ in batches)))
    arguments = {"current_mask": given_masks, "trained_weight": trained_weight, "train_loader": batches}
    for branch, compute in (("attn", compute_vit_head_importance), ("mlp", compute_mlp_neuron_importance)):
        scores = compute(model, criteria, **arguments)
        assert list(scores) == [0, 1]
        for layer, values in scores.items():
            assert values.dtype == torch.float64
            reference = torch.tensor(expected[f"blocks.{layer}.{branch}"], dtype=torch.float64)
            torch.testing.assert_close(values, reference, rtol=1e-9, atol=1e-12)
            assert reference.std() > 0.01 * reference.mean()  # scores that differ, or agreement says little
    assert_same(before, state_of(model))
    for kept, given in zip(
        inputs, (given_masks, trained_weight or {}, dict(enumerate(x for x, _ in batches))), strict=True
    ):
        assert_same(kept, given)
    assert torch.equal(random_state, torch.get_rng_state())


def test_reference_forward_is_the_model(make_micro_vit, make_batch):
    """The loop that scores are compared with computes what the model does."""
    model, (images, _) = make_micro_vit(dtype=torch.float64), make_batch(dtype=torch.float64)
    torch.testing.assert_close(reference_forward(plain(model), images)[0], model(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("criteria", ALL_CRITERIA)
def test_batches_passed_in_stay_as_they_are(micro_vit, make_batch, criteria):
    (images, labels), (tracked, _) = make_batch(), make_batch()
    tracked.requires_grad_()
    loader = [(images, labels), (tracked, labels)]
    compute_vit_head_importance(micro_vit, criteria, current_mask=random_masks(micro_vit), train_loader=loader)
    assert [x.requires_grad for x, _ in loader] == [False, True]
    assert images.grad is None
    assert tracked.grad is None


def test_scores_are_of_the_trained_weights_not_of_the_models(make_micro_vit, one_batch):
    rewound, trained = make_micro_vit(seed=0), make_micro_vit(seed=1)
    for criteria in ("magnitude", "l1", "l2", "saliency"):
        scored = compute_vit_head_importance(rewound, criteria, None, trained.state_dict(), one_batch)
        direct = compute_vit_head_importance(trained, criteria, None, None, one_batch)
        rewound_scores = compute_vit_head_importance(rewound, criteria, None, None, one_batch)
        for layer in range(DEPTH):
            assert torch.equal(scored[layer], direct[layer])
            assert not torch.allclose(scored[layer], rewound_scores[layer])


def test_accumulation_is_in_float64(micro_vit, make_batch):
    """A float32 model: its own activations, summed here in float64, give the scores to the last digits."""
    batches = [make_batch(images=50, seed=seed) for seed in range(3)]
    seen = []
    handle = micro_vit.blocks[1].mlp.fc1.register_forward_hook(lambda _, __, out: seen.append(out.detach().double()))
    with torch.no_grad():
        for images, _ in batches:
            micro_vit(images)
    handle.remove()
    scores = compute_mlp_neuron_importance(micro_vit, "l1", train_loader=batches)[1]
    torch.testing.assert_close(scores, torch.cat(seen).abs().mean((0, 1)), rtol=1e-13, atol=0)
    magnitude = compute_mlp_neuron_importance(micro_vit, "magnitude")[1]
    expected = [sum(abs(x) for x in row) for row in micro_vit.blocks[1].mlp.fc1.weight.tolist()]
    torch.testing.assert_close(magnitude, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("criteria", ["l1", "l2", "saliency"])
def test_scores_are_taken_in_eval_mode(one_batch, add_noise, criteria):
    model = add_noise(TimmVit(**MICRO, pos_drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5), scale=0.3).eval()
    expected = score_units(model, vit_units(model), criteria, batches=one_batch)
    model.train()
    assert_same(score_units(model, vit_units(model), criteria, batches=one_batch), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_saliency_takes_another_loss(make_micro_vit, make_batch, reduction):
    model = make_micro_vit(dtype=torch.float64)
    batches = [make_batch(4, seed=3, dtype=torch.float64), make_batch(2, seed=4, dtype=torch.float64)]

    def smoothed_sum(logits, labels):
        uniform = sum((torch.logsumexp(row, 0) - row).mean() for row in logits)
        return 0.8 * cross_entropy_sum(logits, labels) + 0.2 * uniform

    expected = reference_scores("saliency", plain(model), None, batches, smoothed_sum)
    loss = nn.CrossEntropyLoss(label_smoothing=0.2, reduction=reduction)
    scores = compute_vit_head_importance(model, "saliency", train_loader=batches, criterion=loss)
    for layer in range(DEPTH):
        torch.testing.assert_close(scores[layer].tolist(), expected[f"blocks.{layer}.attn"], rtol=1e-9, atol=1e-12)


def test_random_is_a_function_of_the_seed(micro_vit):
    first, again, other = (compute_mlp_neuron_importance(micro_vit, "random", seed=seed) for seed in (0, 0, 1))
    default = compute_mlp_neuron_importance(micro_vit, "random")
    for layer in range(DEPTH):
        assert torch.equal(first[layer], again[layer])
        assert torch.equal(first[layer], default[layer])
        assert not torch.equal(first[layer], other[layer])
        assert len(set(first[layer].tolist())) == NEURONS
        assert first[layer].min() >= 0
        assert first[layer].max() < 1
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(5)
    assert torch.equal(compute_mlp_neuron_importance(micro_vit, "random", seed=0)[0], first[0])


@pytest.mark.parametrize("criteria", ["l1", "l2", "saliency"])
def test_memory_does_not_grow_with_the_batches_and_only_ten_are_read(micro_vit, make_batch, criteria):
    alive, taken = [], 0

    def stream():
        nonlocal taken
        for seed in range(40):
            gc.collect()
            alive.append(sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor))
            taken += 1
            yield make_batch(images=4, seed=seed)

    gc.collect()
    gc.freeze()  # only what scoring makes is looked through, which is quick
    try:
        score_units(micro_vit, vit_units(micro_vit), criteria, batches=stream(), max_batches=25)
    finally:
        gc.unfreeze()
    assert taken == 25
    assert alive[3] > 4 * 3 * 8 * 8  # it does see tensors: at least the images of the batch before
    assert max(alive[3:]) <= max(alive[:3])  # from the third batch on all is as it was
    batches = iter([make_batch(seed=seed) for seed in range(12)])
    compute_vit_head_importance(micro_vit, criteria, train_loader=batches)
    assert len(list(batches)) == 2  # ten were read, no more were asked for


@pytest.mark.parametrize("criteria", ["l1", "saliency"])
def test_an_error_while_scoring_leaves_the_model_as_it_was(micro_vit, make_batch, criteria):
    def broken():
        yield make_batch()
        raise OSError("disk gone")

    micro_vit.train()
    before = state_of(micro_vit)
    other = {name: tensor + 1 for name, tensor in micro_vit.state_dict().items()}
    with pytest.raises(OSError, match="disk gone"):
        compute_vit_head_importance(micro_vit, criteria, trained_weight=other, train_loader=broken())
    assert_same(before, state_of(micro_vit))


# ------------------------------------------------------------------------------- criteria and their inputs


@pytest.mark.parametrize("compute", [compute_vit_head_importance, compute_mlp_neuron_importance])
def test_a_criterion_that_lacks_its_input_raises(micro_vit, one_batch, compute):
    with pytest.raises(ValueError, match=r"remain.*mask"):
        compute(micro_vit, "remain", train_loader=one_batch)
    with pytest.raises(ValueError, match="saliency"):
        compute(micro_vit, "saliency", current_mask=random_masks(micro_vit))
    with pytest.raises(ValueError, match="remain"):
        compute(micro_vit, "remain", current_mask={"blocks.0.attn.proj": torch.ones(12, 12)})
    with pytest.raises(ValueError, match="unknown") as caught:
        compute(micro_vit, "l3")
    assert all(name in str(caught.value) for name in ALL_CRITERIA)
    for criteria in ("l1", "l2", "saliency"):
        with pytest.raises(ValueError, match="empty"):
            compute(micro_vit, criteria, train_loader=[])


def test_saliency_without_data_raises_in_the_fillback_functions(micro_vit):
    masks = random_masks(micro_vit)
    with pytest.raises(ValueError, match="saliency"):
        head_and_mlp(micro_vit, masks, None, 0.3, 0.3, "saliency")
    with pytest.raises(ValueError, match="saliency"):
        prune_model_custom_fillback_vit_by_head(micro_vit, masks, None, None, None, "saliency")


@pytest.mark.parametrize("criteria", ["l1", "l2"])
def test_activation_criteria_without_data_score_weights_and_say_so_once(micro_vit, caplog, criteria):
    with caplog.at_level(logging.INFO):
        heads = compute_vit_head_importance(micro_vit, criteria)
    assert len(caplog.records) == 1
    assert criteria in caplog.records[0].getMessage()
    neurons = compute_mlp_neuron_importance(micro_vit, criteria)
    weights = plain(micro_vit)
    power = {"l1": abs, "l2": lambda x: x * x}[criteria]
    for layer in range(DEPTH):
        rows = weights[f"blocks.{layer}.attn.qkv.weight"].tolist()
        by_hand = [sum(power(x) for row in head_rows(head) for x in rows[row]) for head in range(HEADS)]
        assert heads[layer].tolist() == pytest.approx(by_hand, rel=1e-12)
        rows = weights[f"blocks.{layer}.mlp.fc1.weight"].tolist()
        assert neurons[layer].tolist() == pytest.approx([sum(map(power, row)) for row in rows], rel=1e-12)


def test_activation_criteria_with_data_do_not_say_that_they_score_weights(micro_vit, one_batch, caplog):
    with caplog.at_level(logging.INFO):
        compute_vit_head_importance(micro_vit, "l1", train_loader=one_batch)
    assert not caplog.records


@pytest.mark.parametrize("criteria", ALL_CRITERIA)
@pytest.mark.parametrize("sorting_mode", ["layer-wise", "global"])
@pytest.mark.parametrize("suffix", ["", ".weight_mask"])
def test_a_unit_all_zero_in_the_mask_is_never_chosen(micro_vit, one_batch, criteria, sorting_mode, suffix):
    masks = {name: torch.ones_like(weight) for name, weight in prunable_weights(micro_vit).items()}
    masks["blocks.0.attn.qkv"][head_rows(1)] = 0
    masks["blocks.1.mlp.fc1"][:20] = 0
    with torch.no_grad():  # the best by weight, were they not gone
        micro_vit.blocks[0].attn.qkv.weight[head_rows(1)] *= 100
        micro_vit.blocks[1].mlp.fc1.weight[:20] *= 100
    named = {f"{name}{suffix}": mask for name, mask in masks.items()}
    for ratio in (0.0, 0.34, 0.5):
        kept = kept_units(head_and_mlp(micro_vit, named, one_batch, ratio, ratio, criteria, sorting_mode), HEADS, DEPTH)
        assert 1 not in kept["blocks.0.attn"]
        assert set(kept["blocks.1.mlp"]) <= set(range(20, 24))
        assert min(map(len, kept.values())) >= 1
    scores = compute_vit_head_importance(micro_vit, criteria, named, None, one_batch)
    assert (scores[0] == -math.inf).tolist() == [False, True, False]


def test_one_element_left_is_enough_to_be_chosen(micro_vit):
    masks = {name: torch.ones_like(weight) for name, weight in prunable_weights(micro_vit).items()}
    masks["blocks.0.attn.qkv"][head_rows(1)] = 0
    masks["blocks.0.attn.qkv"][head_rows(1)[-1], 3] = 1
    assert compute_vit_head_importance(micro_vit, "remain", masks)[0].tolist() == [144, 1, 144]
    assert kept_units(head_and_mlp(micro_vit, masks, None, 0.0, 0.0), HEADS, DEPTH)["blocks.0.attn"] == [0, 1, 2]


def test_a_user_adds_a_criterion_with_one_line(micro_vit, monkeypatch):
    monkeypatch.setitem(CRITERIA, "largest", lambda weights: weights.abs().amax(1))
    scores = compute_vit_head_importance(micro_vit, "largest")
    for layer in range(DEPTH):
        weight = micro_vit.blocks[layer].attn.qkv.weight
        assert scores[layer].tolist() == [weight[head_rows(head)].abs().max().item() for head in range(HEADS)]
    kept = kept_units(head_and_mlp(micro_vit, random_masks(micro_vit), None, 0.5, 0.5, "largest"), HEADS, DEPTH)
    rows = micro_vit.blocks[1].mlp.fc1.weight.abs().amax(1).tolist()
    assert kept["blocks.1.mlp"] == sorted(sorted(range(24), key=lambda unit: -rows[unit])[:12])


def test_a_score_that_is_not_a_number_is_refused(make_micro_vit):
    model = make_micro_vit()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="blocks.1.attn"):
        compute_vit_head_importance(model, "magnitude")


# ---------------------------------------------------------------------------------------------------- ties


def test_ties_keep_the_first_in_layer_and_index_order():
    scores = {
        "a": torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64),
        "b": torch.tensor([2.0, 1.0, 1.0, 2.0], dtype=torch.float64),
    }
    keep = {3: {"a": [0, 1, 2], "b": [0, 1, 3]}, 2: {"a": [1, 2], "b": [0, 3]}, 1: {"a": [1], "b": [0]}}
    for left, expected in keep.items():
        assert select_units(scores, 1 - left / 4) == expected
    pooled = {
        7: {"a": [0, 1, 2, 3], "b": [0, 1, 3]},
        6: {"a": [0, 1, 2, 3], "b": [0, 3]},
        5: {"a": [0, 1, 2], "b": [0, 3]},
        4: {"a": [1, 2], "b": [0, 3]},
        3: {"a": [1, 2], "b": [0]},
        2: {"a": [1], "b": [0]},
    }
    for left, expected in pooled.items():
        assert select_units(scores, 1 - left / 8, "global") == expected
    assert select_units(scores, 7 / 8, "global", 0) == {"a": [1], "b": []}


@pytest.mark.parametrize("sorting_mode", ["layer-wise", "global"])
def test_many_ties(sorting_mode):
    """Enough equal scores for an unstable sort to shuffle them."""
    scores = {key: torch.full((2000,), 0.5, dtype=torch.float64) for key in "ab"}
    scores["b"][1990] = 0.75
    kept = select_units(scores, 0.4, sorting_mode)
    if sorting_mode == "layer-wise":
        assert kept == {"a": list(range(1200)), "b": [*range(1199), 1990]}
    else:
        assert kept == {"a": list(range(2000)), "b": [*range(399), 1990]}


def test_ties_in_score_per_mac_remove_the_last_first(make_micro_vit):
    model = make_micro_vit()
    units = vit_units(model)
    head, neuron = hand_macs("head"), hand_macs("neuron")
    scores = {
        key: torch.full((group.count,), float(head if group.kind == "head" else neuron), dtype=torch.float64)
        for key, group in units.items()
    }
    rank = partial(rank_units, model, units, sorting_mode="global", rank_by="score_per_mac")
    # floor(6 * 0.66) = 3 heads stay: the last three go, but one per layer stays
    kept = rank(scores, {"head": 0.34})
    assert kept == {"blocks.0.attn": [0, 1], "blocks.1.attn": [0]}
    kept = rank(scores, {"neuron": 0.5})
    assert kept == {"blocks.0.mlp": list(range(23)), "blocks.1.mlp": [0]}


def test_ties_across_kinds_keep_the_earlier_layer(make_micro_vit):
    """blocks.0.mlp comes before blocks.1.attn, so of equal values the head of block 1 goes first."""
    model = make_micro_vit()
    units = vit_units(model)
    macs = {"head": hand_macs("head"), "neuron": hand_macs("neuron")}
    scores = {key: torch.full((g.count,), 9.0 * macs[g.kind], dtype=torch.float64) for key, g in units.items()}
    scores["blocks.0.mlp"][:] = macs["neuron"]
    scores["blocks.1.attn"][0] = macs["head"]
    # the quota is one head (floor(6 * 0.9) = 5) and one neuron (floor(48 * 0.99) = 47)
    ratios = {"head": 0.1, "neuron": 0.01}
    kept = rank_units(model, units, scores, ratios, sorting_mode="global", rank_by="score_per_mac")
    assert kept == {
        "blocks.0.attn": [0, 1, 2],
        "blocks.0.mlp": list(range(23)),
        "blocks.1.attn": [1, 2],
        "blocks.1.mlp": list(range(24)),
    }


def tied_model(make_micro_vit):
    """Heads 0 and 2 of each block weigh the same, so do all neurons but two."""
    model = make_micro_vit()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[head_rows(2)] = -block.attn.qkv.weight[head_rows(0)]
            block.attn.qkv.weight[head_rows(1)] *= 0.01
            block.mlp.fc1.weight[:] = block.mlp.fc1.weight[0].clone()
            block.mlp.fc1.weight[7] *= 2
            block.mlp.fc1.weight[20] *= 3
    return model


def test_mask_selection_and_surgery_agree_on_ties(make_micro_vit):
    model = tied_model(make_micro_vit)
    masks = {name: torch.ones_like(weight) for name, weight in prunable_weights(model).items()}
    # one-shot and target round alike here: 3 heads at 0.66 keep 1, 24 neurons at 0.75 keep 6
    expected = {0: [0], 1: [0]}, {0: [0, 1, 2, 3, 7, 20], 1: [0, 1, 2, 3, 7, 20]}
    by_mask = kept_units(head_and_mlp(model, masks, None, 0.66, 0.75), HEADS, DEPTH)
    scores = score_units(model, vit_units(model), "magnitude")
    assert scores["blocks.0.attn"][0] == scores["blocks.0.attn"][2]
    by_choice = select_units(scores, 0.75)
    small = copy.deepcopy(model)
    heads = structured_prune_vit_heads(small, compute_vit_head_importance(model, "magnitude"), 0.67)
    neurons = structured_prune_mlp_neurons(small, compute_mlp_neuron_importance(model, "magnitude"), 0.75)
    for layer in range(DEPTH):
        assert (
            by_mask[f"blocks.{layer}.attn"] == by_choice[f"blocks.{layer}.attn"] == heads[layer] == expected[0][layer]
        )
        assert (
            by_mask[f"blocks.{layer}.mlp"] == by_choice[f"blocks.{layer}.mlp"] == neurons[layer] == expected[1][layer]
        )
        assert torch.equal(small.blocks[layer].attn.qkv.weight, model.blocks[layer].attn.qkv.weight[head_rows(0)])
        assert torch.equal(small.blocks[layer].mlp.fc2.weight, model.blocks[layer].mlp.fc2.weight[:, neurons[layer]])
    pooled = kept_units(head_and_mlp(model, masks, None, 0.0, 0.9, sorting_mode="global"), HEADS, DEPTH)
    assert total_kept(pooled, "mlp") == 4  # floor(48 * 0.1)
    assert pooled == {**pooled, **select_units({k: scores[k] for k in pooled if "mlp" in k}, 0.9, "global")}


# ----------------------------------------------------------------------------------------- ranking by cost


def hand_macs(kind, tokens=5, width=WIDTH, dim=12):
    """SPEC 3's formula, per unit: q, k, v and projection, scores and weighted sum; two rows for a neuron."""
    return 4 * tokens * width * dim + 2 * tokens * tokens * width if kind == "head" else 2 * tokens * dim


def greedy_by_cost(model, scores, ratios, min_units):
    """Take the cheapest-scoring unit of a layer that may still lose one, until the MACs of both quotas are gone."""
    tokens = model.patch_embed.num_patches + 1
    heads = model.blocks[0].attn.num_heads
    cost = {
        "head": hand_macs("head", tokens, 12 // heads),
        "neuron": hand_macs("neuron", tokens),
    }
    kinds = {key: "head" if key.endswith("attn") else "neuron" for key in scores}
    quota = 0
    for kind, ratio in ratios.items():
        pool = [key for key in scores if kinds[key] == kind]
        count = sum(len(scores[key]) for key in pool)
        stay = max(len(pool) * min_units, math.floor(count * (1 - Fraction(str(ratio)))))
        quota += (count - stay) * cost[kind]
    left = {key: [u for u in range(len(s)) if s[u] != -math.inf] for key, s in scores.items() if kinds[key] in ratios}
    removed = sum((len(scores[key]) - len(ids)) * cost[kinds[key]] for key, ids in left.items())
    last = 0
    while removed < quota:
        best = None
        for key, ids in left.items():
            if len(ids) > min_units:
                for unit in ids:
                    value = scores[key][unit].item() / cost[kinds[key]]
                    if best is None or value <= best[0]:  # of equal ones the last goes
                        best = (value, key, unit)
        if best is None:
            break
        left[best[1]].remove(best[2])
        last = cost[kinds[best[1]]]
        removed += last
    return left, removed, quota, last


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("min_units", [0, 1, 2])
@pytest.mark.parametrize(("head_ratio", "mlp_ratio"), [(0.3, 0.3), (0.67, 0.5), (0.5, 0.9), (0.9, 0.9)])
def test_score_per_mac_equals_a_greedy_loop(make_micro_vit, seed, min_units, head_ratio, mlp_ratio):
    model = make_micro_vit(num_heads=6, depth=3)
    units = vit_units(model)
    generator = torch.Generator().manual_seed(seed)
    ratios = {"head": head_ratio, "neuron": mlp_ratio}
    # a head costs about three neurons here, so that either kind can come first
    scores = {
        key: torch.rand(group.count, generator=generator, dtype=torch.float64) * (3 if group.kind == "head" else 1)
        for key, group in units.items()
    }
    before = frozen(scores)[0]
    kept = rank_units(model, units, scores, ratios, "global", min_units, "score_per_mac")
    expected, removed, quota, last = greedy_by_cost(model, scores, ratios, min_units)
    assert kept == expected
    assert_same(before, scores)
    assert all(len(ids) >= min_units for ids in kept.values())
    full, left = vit_cost(model, {}), vit_cost(model, kept)
    assert full["macs"] - left["macs"] == removed
    assert quota <= removed < quota + last
    # a later state goes on from there
    ratios = {kind: min(0.95, ratio + 0.04) for kind, ratio in ratios.items()}
    marked = mark_removed(scores, kept)
    later = rank_units(model, units, marked, ratios, "global", min_units, "score_per_mac")
    assert later == greedy_by_cost(model, marked, ratios, min_units)[0]
    assert all(set(later[key]) <= set(kept[key]) for key in units)


# ------------------------------------------------------------------------- the functions scripts call


@pytest.mark.parametrize("pruned", [False, True], ids=["plain", "under torch.prune"])
@pytest.mark.parametrize("loader", ["one batch", "none"])
@pytest.mark.parametrize("which", ["by head", "head and mlp", "global"])
def test_functions_as_scripts_call_them(make_micro_vit, one_batch, which, loader, pruned):
    model = make_micro_vit(seed=1)
    init = make_micro_vit(seed=2).state_dict()
    pruning_model_vit(model, 0.3)
    mask_dict = extract_mask_vit(model.state_dict())
    assert all(name.endswith(".weight_mask") for name in mask_dict)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not pruned:
        model = make_micro_vit(seed=1)
    batches = one_batch if loader == "one batch" else None
    before = state_of(model)
    inputs = frozen(mask_dict, trained, init, {"images": one_batch[0][0], "labels": one_batch[0][1]})

    if which == "by head":
        call = partial(prune_model_custom_fillback_vit_by_head, criteria="l1", prune_ratio=0.34)
        left = {"attn": 2, "mlp": 48}
    else:
        mode = "global" if which == "global" else "layer-wise"
        call = partial(
            prune_model_custom_fillback_vit_head_and_mlp, head_prune_ratio=0.34, mlp_prune_ratio=0.3, sorting_mode=mode
        )
        # 3 * 0.66 = 1.98, 24 * 0.7 = 16.8; pooled 6 * 0.66 = 3.96, 48 * 0.7 = 33.6
        left = {"attn": 3, "mlp": 33} if mode == "global" else {"attn": 2, "mlp": 32}
    masks = call(model, mask_dict, batches, trained, init, return_mask_only=True)
    assert_same(before, state_of(model))
    assert list(masks) == [name.removesuffix(".weight_mask") for name in mask_dict]
    kept = kept_units(masks, HEADS, DEPTH)
    assert {branch: total_kept(kept, branch) for branch in left} == left

    bare = {name.removesuffix(".weight_mask"): mask for name, mask in mask_dict.items()}
    assert_same(masks, call(model, bare, batches, trained, init, return_mask_only=True))

    returned = call(model, mask_dict, batches, trained, init)
    assert returned is model
    for name, mask in masks.items():
        module = returned.get_submodule(name)
        assert prune.is_pruned(module)
        assert torch.equal(module.weight_orig, init[f"{name}.weight"])
        assert torch.equal(module.weight_mask, mask)
        assert torch.equal(module.weight, init[f"{name}.weight"] * mask)
    state = returned.state_dict()
    rest = [name for name in init if name.removesuffix(".weight") not in masks]
    assert all(torch.equal(state[name], init[name]) for name in rest)
    for tensor in returned.parameters():
        tensor.data.add_(1)  # training it must not reach what was passed in
    given = (mask_dict, trained, init, {"images": one_batch[0][0], "labels": one_batch[0][1]})
    for old, new in zip(inputs, given, strict=True):
        assert_same(old, new)


def test_default_ratio_is_a_fifth_of_all_units(make_micro_vit):
    model = make_micro_vit(num_heads=12)
    masks = random_masks(model)
    for call in (prune_model_custom_fillback_vit_by_head, prune_model_custom_fillback_vit_head_and_mlp):
        kept = kept_units(call(model, masks, None, None, None, return_mask_only=True), heads=12, depth=DEPTH)
        assert [len(kept[f"blocks.{layer}.attn"]) for layer in range(DEPTH)] == [9, 9]  # floor(12 * 0.8)


def test_fillback_functions_use_the_trained_weights(make_micro_vit):
    model, trained = make_micro_vit(seed=0), make_micro_vit(seed=3).state_dict()
    masks = {name: torch.ones_like(weight) for name, weight in prunable_weights(model).items()}
    call = partial(prune_model_custom_fillback_vit_head_and_mlp, criteria="magnitude", return_mask_only=True)
    kept = kept_units(call(model, masks, None, trained, None, mlp_prune_ratio=0.5), HEADS, DEPTH)
    for layer in range(DEPTH):
        scores = trained[f"blocks.{layer}.mlp.fc1.weight"].double().abs().sum(1).tolist()
        assert kept[f"blocks.{layer}.mlp"] == sorted(sorted(range(24), key=lambda unit: -scores[unit])[:12])


def test_bad_masks_and_ratios_are_refused(micro_vit):
    good = random_masks(micro_vit)
    for bad in (
        {**good, "blocks.9.attn.qkv": torch.ones(36, 12)},
        {**good, "blocks.0.attn.qkv": torch.ones(12, 12)},
        {**good, "blocks.0.attn.qkv": torch.full((36, 12), 0.5)},
    ):
        with pytest.raises(ValueError, match="mask"):
            head_and_mlp(micro_vit, bad, None, 0.3, 0.3)
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match="ratio"):
            head_and_mlp(micro_vit, good, None, ratio, 0.3)
        with pytest.raises(ValueError, match="ratio"):
            head_and_mlp(micro_vit, good, None, 0.3, ratio)
        with pytest.raises(ValueError, match="ratio"):
            prune_model_custom_fillback_vit_by_head(micro_vit, good, None, None, None, "l1", ratio)


# ------------------------------------------------------------------------------------- removal is lossless

KEPT = {
    "blocks.0.attn": [0, 2],
    "blocks.0.mlp": [1, 2, 5, 11, 23],
    "blocks.1.attn": [1],
    "blocks.1.mlp": [],
    "blocks.2.attn": [],
    "blocks.2.mlp": list(range(24)),
}


def apply_by_hand(model, masks):
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask)
    return masked


def assert_same_function(masked, small, images):
    with torch.no_grad():
        expected, found = masked(images), small(images)
    limit = 1e-12 if images.dtype == torch.float64 else 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zeroed", ["whole units", "only proj and fc2 columns"])
def test_removed_units_change_no_logit(make_micro_vit, make_batch, dtype, zeroed):
    model, images = make_micro_vit(depth=3, dtype=dtype).eval(), make_batch(dtype=dtype)[0]
    masks = masks_by_hand(model, KEPT, biases=True)
    if zeroed != "whole units":
        masks = {name: mask for name, mask in masks.items() if "proj" in name or "fc2" in name}
    masked = apply_by_hand(model, masks)
    assert (masked(images) - model(images)).abs().max() > 1e-3  # the units mattered
    small = remove_units(copy.deepcopy(masked), vit_units(masked), KEPT)
    assert_same_function(masked, small, images)
    for layer, block in enumerate(small.blocks):
        heads, neurons = len(KEPT[f"blocks.{layer}.attn"]), len(KEPT[f"blocks.{layer}.mlp"])
        assert (block.attn.num_heads, block.attn.head_dim, block.attn.scale) == (heads, 4, 0.5)
        assert block.attn.qkv.weight.shape == (12 * heads, 12)
        assert block.attn.qkv.bias.shape == (12 * heads,)
        assert block.attn.proj.weight.shape == (12, 4 * heads)
        assert block.mlp.fc1.weight.shape == (neurons, 12)
        assert block.mlp.fc1.bias.shape == (neurons,)
        assert block.mlp.fc2.weight.shape == (12, neurons)
        assert block.attn.qkv.out_features == 12 * heads
        assert block.mlp.fc2.in_features == neurons


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_pruning_by_id_changes_no_logit(make_micro_vit, make_batch, dtype):
    model, images = make_micro_vit(dtype=dtype).eval(), make_batch(dtype=dtype)[0]
    kept = {"blocks.0.attn": [1], "blocks.1.attn": [0, 2], "blocks.0.mlp": [3, 7], "blocks.1.mlp": [*range(1, 24)]}
    masked = apply_by_hand(model, masks_by_hand(model, kept, biases=True))
    small = copy.deepcopy(masked)
    prune_attention_heads_hard(small.blocks[0].attn, [2, 0])
    prune_attention_heads_hard(small.blocks[1].attn, torch.tensor([1]))
    prune_mlp_neurons_hard(small.blocks[0].mlp, {i for i in range(24) if i not in (3, 7)})
    prune_mlp_neurons_hard(small.blocks[1].mlp, [0])
    assert_same_function(masked, small, images)
    assert [row["neurons"] for row in check_vit_structure(small)] == [2, 23]
    # again, on what is left: ids count anew
    again = copy.deepcopy(small)
    with torch.no_grad():
        again.blocks[1].attn.proj.weight[:, 4:] = 0  # what was head 2
    prune_attention_heads_hard(small.blocks[1].attn, [1])
    assert_same_function(again, small, images)


def test_removal_follows_the_kept_units_weights(micro_vit):
    model = copy.deepcopy(micro_vit)
    remove_units(model, vit_units(model), {"blocks.1.attn": [0, 2], "blocks.1.mlp": [4, 9]})
    old, new = micro_vit.blocks[1], model.blocks[1]
    rows, columns = sorted(head_rows(0) + head_rows(2)), head_columns(0) + head_columns(2)
    assert torch.equal(new.attn.qkv.weight, old.attn.qkv.weight[rows])
    assert torch.equal(new.attn.qkv.bias, old.attn.qkv.bias[rows])
    assert torch.equal(new.attn.proj.weight, old.attn.proj.weight[:, columns])
    assert torch.equal(new.attn.proj.bias, old.attn.proj.bias)
    assert torch.equal(new.mlp.fc1.weight, old.mlp.fc1.weight[[4, 9]])
    assert torch.equal(new.mlp.fc1.bias, old.mlp.fc1.bias[[4, 9]])
    assert torch.equal(new.mlp.fc2.weight, old.mlp.fc2.weight[:, [4, 9]])
    assert_same(micro_vit.blocks[0].state_dict(), model.blocks[0].state_dict())


@pytest.mark.parametrize("ids", [[3], [-1], [0, 7]])
def test_ids_out_of_range_raise_and_nothing_is_removed(micro_vit, ids):
    before = state_of(micro_vit)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        prune_attention_heads_hard(micro_vit.blocks[0].attn, ids)
    with pytest.raises(ValueError, match=r"0\.\.23"):
        prune_mlp_neurons_hard(micro_vit.blocks[0].mlp, [i * 24 for i in ids])
    assert_same(before, state_of(micro_vit))


def test_unit_masks_are_those_by_hand(make_micro_vit):
    model = make_micro_vit(depth=3)
    units, tensors = vit_units(model), dict(model.named_parameters())
    assert_same(unit_masks(units, KEPT, tensors), masks_by_hand(model, KEPT, biases=True))
    only = {"blocks.1.mlp": [0, 5]}
    assert_same(unit_masks(units, only, tensors), masks_by_hand(model, only, biases=True))
    weights = prunable_weights(model)
    whole = {f"{name}.weight": torch.ones_like(weight) for name, weight in weights.items()}
    expected = {**whole, **masks_by_hand(model, only)}
    assert_same(
        {f"{name}.weight": mask for name, mask in structured_masks(weights, units, only).items()},
        expected,
    )


def test_slice_and_scatter_are_inverses_on_kept_units(make_micro_vit):
    model = make_micro_vit(depth=3)
    units, tensors = vit_units(model), dict(model.state_dict())
    before = frozen(tensors)[0]
    small = slice_tensors(tensors, units, KEPT)
    masks = masks_by_hand(model, KEPT, biases=True)
    dense = scatter_tensors(small, units, KEPT)
    assert_same(dense, {name: tensor * masks.get(name, torch.ones(())) for name, tensor in tensors.items()})
    assert_same(slice_tensors(dense, units, KEPT), small)
    assert_same(small, dict(remove_units(copy.deepcopy(model), units, KEPT).state_dict()))
    for tensor in (*small.values(), *dense.values()):
        tensor.add_(1)  # copies, not views
    assert_same(before, tensors)
    # optimizer state that holds only some of the parameters
    some = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.0.mlp")}
    kept = {"blocks.0.mlp": [2, 3]}
    assert slice_tensors(some, units, kept)["blocks.0.mlp.fc2.weight"].shape == (12, 2)
    assert scatter_tensors(slice_tensors(some, units, kept), units, kept).keys() == some.keys()


# ---------------------------------------------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def timm_vit():
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4).eval()


@pytest.mark.parametrize("criteria", ALL_CRITERIA)
def test_a_timm_vit_goes_through_the_same_functions(timm_vit, make_batch, add_noise, criteria):
    model = add_noise(copy.deepcopy(timm_vit), scale=0.02)
    loader = [make_batch(images=2, img_size=32, classes=10)]
    assert is_vit_model(model)
    init = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    elementwise = random_masks(model)
    before = state_of(model)
    masks = head_and_mlp(model, elementwise, loader, 0.33, 0.3, criteria)
    assert_same(before, state_of(model))
    kept = kept_units(masks, heads=3, depth=12)
    assert (total_kept(kept, "attn"), total_kept(kept, "mlp")) == (24, 12 * 537)  # 768 * 0.7 = 537.6
    by_head = prune_model_custom_fillback_vit_by_head(
        model, elementwise, loader, init, init, criteria, 0.33, return_mask_only=True
    )
    assert total_kept(kept_units(by_head, heads=3, depth=12), "attn") == 24
    returned = prune_model_custom_fillback_vit_head_and_mlp(
        model, elementwise, loader, None, init, criteria, 0.33, 0.3
    ).eval()
    small = copy.deepcopy(timm_vit)
    small.load_state_dict(init)
    remove_units(small, vit_units(small), kept)
    assert_same_function(returned, small, loader[0][0])


def test_one_shot_helpers_and_counts_on_a_timm_vit(timm_vit, make_batch, capsys):
    model = copy.deepcopy(timm_vit)
    full = count_vit_parameters(model)
    scores = compute_vit_head_importance(model, "l1", train_loader=[make_batch(images=2, img_size=32)])
    kept = structured_prune_vit_heads(model, scores, {layer: 0.33 if layer else 0.67 for layer in range(12)})
    assert [len(ids) for ids in kept.values()] == [1] + [2] * 11
    # a head of 64 in dimension 192: 3 * 64 rows and biases, 64 columns of proj
    assert full - count_vit_parameters(model) == 13 * (3 * 64 * 192 + 3 * 64 + 64 * 192)
    neurons = compute_mlp_neuron_importance(model, "magnitude")
    structured_prune_mlp_neurons(model, neurons, 0.5)
    assert [row["heads"] for row in check_vit_structure(model)] == [1] + [2] * 11
    assert {block.mlp.fc1.out_features for block in model.blocks} == {384}
    assert model(make_batch(images=2, img_size=32)[0]).shape == (2, 10)


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.5}, {"qk_norm": True}, {"reg_tokens": 4}, {"qkv_bias": False}, {"global_pool": "avg"}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_timm_variants_that_are_fine_lose_no_logit(options, make_batch, add_noise):
    model = add_noise(TimmVit(**MICRO, **options), scale=0.3).double().eval()
    assert layout_problem(model) is None
    images = make_batch(dtype=torch.float64)[0]
    columns = {}
    for layer, block in enumerate(model.blocks):
        proj, fc2 = torch.zeros_like(block.attn.proj.weight), torch.zeros_like(block.mlp.fc2.weight)
        for head in KEPT[f"blocks.{layer}.attn"]:
            proj[:, head_columns(head)] = 1
        fc2[:, KEPT[f"blocks.{layer}.mlp"]] = 1
        columns |= {f"blocks.{layer}.attn.proj.weight": proj, f"blocks.{layer}.mlp.fc2.weight": fc2}
    masked = apply_by_hand(model, columns)
    small = remove_units(copy.deepcopy(masked), vit_units(masked), KEPT)
    assert_same_function(masked, small, images)
    tokens = 5 + options.get("reg_tokens", 0)
    rest = 4 * 3 * 4 * 4 * 12 + 12 * 5
    heads, neurons = (sum(len(KEPT[f"blocks.{i}.{branch}"]) for i in range(3)) for branch in ("attn", "mlp"))
    expected = rest + heads * hand_macs("head", tokens) + neurons * hand_macs("neuron", tokens)
    assert vit_cost(model, KEPT)["macs"] == vit_cost(small, {})["macs"] == expected


def with_gated_attention():
    model = TimmVit(**MICRO)
    if "gated" not in inspect.signature(TimmAttention).parameters:
        pytest.skip("this timm has no gated attention")
    model.blocks[1].attn = TimmAttention(12, num_heads=3, qkv_bias=True, gated=True)
    return model


def with_attention_norm():
    model = TimmVit(**MICRO)
    model.blocks[1].attn = TimmAttention(12, num_heads=3, qkv_bias=True, scale_norm=True, norm_layer=nn.LayerNorm)
    return model


def with_mlp_norm():
    model = TimmVit(**MICRO)
    model.blocks[1].mlp = TimmMlp(12, 24, norm_layer=nn.LayerNorm)
    return model


REFUSED = {
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "blocks"),
    "convnext": (lambda: timm.create_model("convnext_atto"), "blocks"),
    "packed SwiGLU (DINOv2 giant)": (lambda: timm.create_model("vit_giant_patch14_reg4_dinov2"), "SwiGLU"),
    "SwiGLU": (lambda: TimmVit(**MICRO, mlp_layer=SwiGLU), "mlp"),
    "gated attention": (with_gated_attention, "gate"),
    "norm after attention": (with_attention_norm, "norm"),
    "norm in the MLP": (with_mlp_norm, "norm"),
    "BEiT": (lambda: timm.create_model("beit_base_patch16_224"), "attn"),
    "relative positions per head": (lambda: timm.create_model("vit_relpos_small_patch16_224"), "attn"),
    "EVA's own q and v biases": (lambda: timm.create_model("eva_giant_patch14_224"), "attn"),
    "rotary attention": (lambda: timm.create_model("vit_small_patch16_rope_224"), "attn"),
    "SAM's windows": (lambda: timm.create_model("samvit_base_patch16"), "attn"),
    "a plain network": (lambda: nn.Sequential(nn.Linear(3, 3)), "blocks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_blocks_are_refused_with_the_reason(name):
    build, word = REFUSED[name]
    with torch.device("meta"):
        model = build()
    reason = layout_problem(model)
    assert reason is not None
    assert type(model).__name__ in reason
    assert word in reason
    assert not is_vit_model(model)
    for call in (vit_units, check_vit_structure, partial(compute_vit_head_importance, criteria="random")):
        with pytest.raises(LayoutError) as caught:
            call(model)
        assert str(caught.value) == reason


def test_layers_that_disagree_are_refused(micro_vit):
    micro_vit.blocks[1].attn.proj = nn.Linear(8, 12)
    with pytest.raises(LayoutError, match=r"blocks\.1\.attn"):
        check_vit_structure(micro_vit)


# ------------------------------------------------------------------------------------------------- counts


def test_check_vit_structure_prints_and_returns_the_rows(make_micro_vit, capsys):
    model = make_micro_vit(depth=3)
    remove_units(model, vit_units(model), KEPT)
    rows = check_vit_structure(model)
    counts = [(2, 5), (1, 0), (0, 24)]
    assert rows == [
        {"layer": layer, "heads": heads, "head_dim": 4, "neurons": neurons}
        for layer, (heads, neurons) in enumerate(counts)
    ]
    lines = capsys.readouterr().out.splitlines()
    for layer, (heads, neurons) in enumerate(counts):
        (line,) = [line for line in lines if line.startswith(f"blocks.{layer}")]
        assert f"{heads} heads of 4" in line
        assert f"{neurons} neurons" in line
    assert "3 heads" in lines[-1]
    assert "29 neurons" in lines[-1]
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in lines[-1]


def test_vit_cost_equals_a_physically_reduced_model(make_micro_vit):
    model = make_micro_vit(depth=3)
    before = state_of(model)
    cost = vit_cost(model, KEPT)
    assert_same(before, state_of(model))
    small = remove_units(copy.deepcopy(model), vit_units(model), KEPT)
    macs = 4 * 3 * 4 * 4 * 12 + 12 * 5 + 3 * hand_macs("head") + 29 * hand_macs("neuron")
    parameters = sum(p.numel() for p in small.parameters())
    expected = {"heads": 3, "neurons": 29, "parameters": parameters, "macs": macs}
    assert cost == expected == vit_cost(small, {})
    # a head holds 3 * 4 rows with biases and 4 columns, a neuron 12 + 1 + 12
    assert count_vit_parameters(model) - cost["parameters"] == 6 * (12 * 12 + 12 + 48) + 43 * 25
    partly = vit_cost(model, {"blocks.1.attn": [0]})
    assert (partly["heads"], partly["neurons"]) == (7, 72)


def test_vit_cost_of_a_model_under_torch_prune(make_micro_vit):
    model = make_micro_vit()
    expected = vit_cost(model, {"blocks.0.attn": [0]})
    pruning_model_vit(model, 0.3)
    assert vit_cost(model, {"blocks.0.attn": [0]}) == expected


@pytest.mark.parametrize("sorting_mode", ["layer-wise", "global"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("ratios", "min_units"),
    [
        ({"head": 0.33, "neuron": 0.3}, 1),
        ({"head": 0.5}, 1),
        ({"neuron": 0.9}, 2),
        ({"head": 0.9, "neuron": 0.99}, 0),
        ({"head": 0.9, "neuron": 0.99}, 1),
    ],
)
def test_the_plan_is_what_the_ranking_gives(make_micro_vit, sorting_mode, schedule, ratios, min_units):
    model = make_micro_vit(num_heads=6, depth=3)
    units = vit_units(model)
    plan = plan_structured(model, ratios, 4, schedule, sorting_mode, min_units)
    assert [row["state"] for row in plan] == [0, 1, 2, 3]
    assert {name: plan[0][name] for name in ("heads", "neurons", "parameters", "density")} == {
        "heads": 18,
        "neurons": 72,
        "parameters": count_vit_parameters(model),
        "density": 1.0,
    }
    generator = torch.Generator().manual_seed(3)
    kept = {key: list(range(group.count)) for key, group in units.items()}
    weights = prunable_weights(model)
    for row in plan[1:]:
        scores = {key: torch.rand(group.count, generator=generator) for key, group in units.items()}
        now = {kind: scheduled_ratio(schedule, ratio, row["state"], 4) for kind, ratio in ratios.items()}
        kept |= rank_units(model, units, mark_removed(scores, kept), now, sorting_mode, min_units)
        small = remove_units(copy.deepcopy(model), units, kept)
        masks = structured_masks(weights, units, kept)
        assert row["heads"] == total_kept(kept, "attn")
        assert row["neurons"] == total_kept(kept, "mlp")
        assert row["parameters"] == sum(p.numel() for p in small.parameters())
        assert row["macs"] == vit_cost(small, {})["macs"]
        ones = sum(int(mask.sum()) for mask in masks.values())
        assert row["density"] == pytest.approx(ones / sum(mask.numel() for mask in masks.values()), abs=1e-12)


def test_plan_of_vit_tiny_ends_at_the_reference_numbers():
    with torch.device("meta"):
        model = vit_tiny(num_classes=10)
    row = plan_structured(model, {"head": 0.33, "neuron": 0.3}, 3)[-1]
    assert (row["heads"], row["neurons"]) == (18, 2412)
    assert row["density"] == pytest.approx(1 - 843_264 / 2_654_208, abs=1e-12)
    # biases go too: 9 heads of 192 rows, 1,044 neurons
    assert row["parameters"] == 2_697_610 - 843_264 - 9 * 192 - 1_044
    assert len(plan_structured(model, {"head": 0.33}, 1)) == 1
