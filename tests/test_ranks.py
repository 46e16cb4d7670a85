"""Heads of fewer dimensions: the same function at full rank, the best pair of any rank below, balanced, plain timm."""

import math
from functools import partial

import pytest
import timm
import torch
from test_repair import MODELS, OURS, SIZE, built, images_of, seen_at
from timm.layers import Attention
from torch import nn

from families import family_of
from pruning.ranks import narrow_ranks, rank_problem
from pruning.units import LayoutError, count_parameters

TIMM = partial(timm.models.vision_transformer.VisionTransformer, img_size=SIZE, patch_size=8, num_classes=5, depth=2)
PLAIN = {
    **{name: MODELS[name] for name in ("ours", "BEiT", "SwiGLU", "parallel things", "Swin", "Swin other widths")},
    "timm's": partial(TIMM, embed_dim=24, num_heads=3, init_values=0.5),
    "without biases": partial(TIMM, embed_dim=24, num_heads=3, qkv_bias=False, proj_bias=False),
}


@pytest.fixture(params=PLAIN.values(), ids=PLAIN)
def model(request, add_noise):
    return built(request.param, add_noise)


def narrowed(model, rank, images=None):
    family = family_of(model)
    images = images_of(model) if images is None else images
    return narrow_ranks(model, family.units(model), family.branches(model), images, rank)


def attentions(model):
    return {key: (module, branch) for key, module, branch in family_of(model).branches(model) if branch.kind == "head"}


def by_head(attn, branch, x):
    """q, k, v [tokens, heads, d] of tokens [n, D], by hand from one layer of weights."""
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return nn.functional.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, branch.count(attn), -1)).unbind(-3)


@torch.no_grad()
def test_at_full_rank_it_is_the_same_function_in_balanced_factors(model):
    width = {key: branch.width(module) for key, (module, branch) in attentions(model).items()}
    small, kept = narrowed(model, width)
    images = images_of(model, 2)
    assert (small(images) - model(images)).abs().max() < 1e-9 * max(1, float(model(images).abs().max()))
    assert kept.keys() == width.keys()
    assert all(share.qk == pytest.approx(1) and share.vo == pytest.approx(1) for share in kept.values())


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2])
def test_balanced_factors_have_equal_norms_on_both_sides_of_usual_size(model, rank):
    small, kept = narrowed(model, rank)
    for key, (attn, branch) in attentions(small).items():
        q, k, v = (part.movedim(1, 0) for part in rows_and_biases(attn, branch))  # [heads, r, D + 1]
        for left, right in ((q, k), (v, attn.proj.weight.unflatten(1, (-1, rank)).permute(1, 2, 0))):
            assert (left @ left.mT - right @ right.mT).abs().max() < 1e-9
        median, largest = kept[key].after
        assert largest < 6 * kept[key].before[0]
        assert median > 0


def rows_and_biases(attn, branch):
    """[r, heads, D + 1] of q, k and v."""
    eye = torch.eye(attn.qkv.in_features).double()
    origin = by_head(attn, branch, torch.zeros_like(eye[:1]))
    return [
        torch.cat([part - zero, zero]).permute(2, 1, 0)
        for part, zero in zip(by_head(attn, branch, eye), origin, strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 3])
def test_the_pair_of_queries_and_keys_is_the_best_of_its_rank(model, rank):
    images = images_of(model, 3)
    small, kept = narrowed(model, rank, images)
    (key, (attn, branch)), *_ = attentions(model).items()  # the first one: nothing is narrowed in front of it
    slim = small.get_submodule(key)
    x = inputs_of(model, key, images)
    (q, k, _), (new_q, new_k, _) = by_head(attn, branch, x), by_head(slim, branch, x)
    k, new_k = k - k.mean(-3, keepdim=True), new_k - new_k.mean(-3, keepdim=True)  # of each image or window
    for head in range(branch.count(attn)):
        old, new = (
            scale * a[..., head, :].flatten(0, -2) @ b[..., head, :].flatten(0, -2).T
            for scale, a, b in ((attn.scale, q, k), (slim.scale, new_q, new_k))
        )
        u, s, vt = torch.linalg.svd(old, full_matrices=False)
        best = s[rank:].norm()
        # to what is added to eigenvalues
        assert best * (1 - 1e-9) <= (old - new).norm() <= best * (1 + 1e-3) + 1e-5 * s.norm()


@torch.no_grad()
@pytest.mark.parametrize("rank", [2])
def test_proj_is_solved_for_by_least_squares_over_all_heads(model, rank):
    images = images_of(model, 12)
    small, _ = narrowed(model, rank, images)
    (key, (attn, branch)), *_ = attentions(model).items()
    rows, wanted = seen_at(model, f"{key}.proj", images)
    x = inputs_of(model, key, images)
    (_, _, v), (_, _, new_v) = by_head(attn, branch, x), by_head(small.get_submodule(key), branch, x)
    found = torch.zeros_like(wanted)
    reads = []
    for head in range(branch.count(attn)):
        # values of the new basis as functions of the old ones give what proj reads, as attention only averages
        old = torch.cat([v[..., head, :].flatten(0, -2), torch.ones(v[..., 0, 0].numel(), 1)], 1)
        change = torch.linalg.lstsq(old, new_v[..., head, :].flatten(0, -2), driver="gelsd").solution
        z = rows.unflatten(1, (branch.count(attn), -1))[:, head]
        reads.append(torch.cat([z, torch.ones(len(z), 1)], 1) @ change)
    reads = torch.cat(reads, 1)
    slim = small.get_submodule(key)
    found = slim.proj(reads)
    ones = torch.ones(len(reads), 1)
    system = torch.cat([reads, ones], 1) if slim.proj.bias is not None else reads
    best = system @ torch.linalg.lstsq(system, wanted, driver="gelsd").solution
    assert (found - wanted).norm() == pytest.approx(float((best - wanted).norm()), rel=1e-5)


def inputs_of(model, key, images):
    calls = []
    handle = model.get_submodule(key).register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    model(images)
    handle.remove()
    return calls[0]


@torch.no_grad()
def test_plain_timm_loads_the_result(add_noise):
    model = built(PLAIN["timm's"], add_noise)
    small, kept = narrowed(model, 3)
    plain = TIMM(embed_dim=24, num_heads=3, init_values=0.5).double().eval()
    for block in plain.blocks:
        block.attn = Attention(24, 3, attn_head_dim=3, qkv_bias=True).double().eval()
    plain.load_state_dict(small.state_dict())
    images = images_of(model, 2)
    assert (plain(images) - small(images)).abs().max() < 1e-12
    assert count_parameters(plain) == count_parameters(small) < count_parameters(model)
    units = family_of(small).units(small)
    assert {group.contribution.layout.width for group in units.values() if group.kind == "head"} == {3}
    assert all(0 < share.qk < 1 and 0 < share.vo < 1 for share in kept.values())


@torch.no_grad()
def test_directions_that_carry_nothing_go_at_no_error(add_noise):
    model = built(partial(OURS, mlp_ratio=2), add_noise)
    for block in model.blocks:
        rows = block.attn.qkv.weight.view(3, 3, 4, 12), block.attn.qkv.bias.view(3, 3, 4)
        generator = torch.Generator().manual_seed(0)
        for tensor in rows:  # two of four dimensions depend on the others
            mix = torch.randn(3, 3, 2, 2, generator=generator, dtype=torch.float64)
            tensor[:, :, 2:] = (
                (mix @ tensor[:, :, :2].flatten(3)).view_as(tensor[:, :, 2:])
                if tensor.ndim == 4
                else (mix @ tensor[:, :, :2, None])[..., 0]
            )
    images = images_of(model)
    small, _ = narrowed(model, 2, images)
    assert (small(images) - model(images)).abs().max() < 1e-5
    assert (narrowed(model, 1, images)[0](images) - model(images)).abs().max() > 1e-3


@torch.no_grad()
def test_few_images_and_dead_heads_give_finite_weights(model):
    for attn, branch in attentions(model).values():
        branch.units(attn, "", 0)
        attn.qkv.weight.unflatten(0, (3, branch.count(attn), -1))[:, 0] = 0
    small, kept = narrowed(model, 1, images_of(model, 1)[:1])
    assert all(tensor.isfinite().all() for tensor in small.state_dict().values() if tensor.is_floating_point())
    assert all(math.isfinite(share.qk + share.vo) for share in kept.values())


REFUSED = {
    "EVA-02 small": "RoPE",
    "RoPE split": "norms of queries",
    "gated": "a gate",
    "BEiT-3": "a norm in front",
    "SwinV2": "cosine",
    "parallel attention and MLP": "parallel",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_bases_that_are_fixed_are_refused_with_the_reason(name, reason, add_noise):
    model = built(MODELS[name], add_noise)
    assert any(reason in (rank_problem(module) or "") for module, _ in attentions(model).values())
    with pytest.raises(LayoutError, match=reason):
        narrowed(model, 2)


def test_bad_calls_are_refused_in_a_line(add_noise):
    model = built(MODELS["ours"], add_noise)
    for rank in (0, 5):
        with pytest.raises(ValueError, match="must lie in 1 .. 4"):
            narrowed(model, rank)
    with pytest.raises(ValueError, match="no calibration images"):
        narrowed(model, 2, [])
    small, _ = narrowed(model, {"blocks.1.attn": 2})
    assert [block.attn.head_dim for block in small.blocks] == [4, 2]
