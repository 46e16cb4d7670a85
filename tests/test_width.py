"""A narrower residual stream: the same function at full width, close below, a plain timm model of that width."""

from functools import partial

import pytest
import torch
from test_ranks import TIMM
from test_repair import MODELS, OURS, built, images_of, seen_at
from timm.layers import Attention, SwiGLU
from torch import nn

from families import family_of
from pruning.units import LayoutError, count_parameters
from pruning.width import narrow_width

DIM = 24
timm_vit = partial(TIMM, embed_dim=DIM, num_heads=3)
WIDE = {
    "ours": partial(OURS, init_values=0.5, mlp_ratio=2),
    "timm's": partial(timm_vit, init_values=0.5),
    "registers, pooled": partial(timm_vit, reg_tokens=2, global_pool="avg", fc_norm=True),
    "pooled behind the norm": partial(timm_vit, global_pool="avg", fc_norm=False),
    "SwiGLU": partial(timm_vit, mlp_layer=SwiGLU),
    "norms of q and k": partial(timm_vit, qk_norm=True),
}


@pytest.fixture(params=WIDE.values(), ids=WIDE)
def model(request, add_noise):
    return built(request.param, add_noise)


def width_of(model):
    return model.norm.weight.numel() if isinstance(model.norm, nn.LayerNorm) else model.fc_norm.weight.numel()


@torch.no_grad()
def test_at_full_width_it_is_the_same_function(model):
    images = images_of(model)
    small, share = narrow_width(model, width_of(model), images)
    assert (small(images) - model(images)).abs().max() < 1e-9 * max(1, float(model(images).abs().max()))
    assert share == pytest.approx(1)


@torch.no_grad()
def test_the_wider_the_closer(model):
    images, wide = images_of(model), width_of(model)
    errors = []
    for width in (wide // 2, wide - 2, wide):
        small, share = narrow_width(model, width, images)
        assert 0 < share <= 1 + 1e-12
        errors.append(float((small(images) - model(images)).square().mean()))
        assert all(tensor.isfinite().all() for tensor in small.state_dict().values())
        assert {norm.normalized_shape for norm in norms_of(small, wide)} == {(width,)}
    assert errors == sorted(errors, reverse=True)


def norms_of(model, _):
    inner = [norm for block in model.blocks for norm in (block.norm1, block.norm2)]
    return inner + [norm for norm in (model.norm, getattr(model, "fc_norm", None)) if isinstance(norm, nn.LayerNorm)]


@torch.no_grad()
def test_a_stream_that_uses_few_directions_loses_nothing(add_noise):
    model = built(partial(timm_vit, init_values=None), add_noise)
    basis = torch.linalg.qr(torch.randn(DIM, 7, generator=torch.Generator().manual_seed(0)).double()).Q
    onto = basis @ basis.T
    for name in ("pos_embed", "cls_token"):
        getattr(model, name).copy_(getattr(model, name) @ onto)
    for layer in (model.patch_embed.proj, *(part for b in model.blocks for part in (b.attn.proj, b.mlp.fc2))):
        layer.weight.copy_(torch.tensordot(onto, layer.weight, 1))
        layer.bias.copy_(onto @ layer.bias)
    images = images_of(model)
    small, share = narrow_width(model, 8, images)
    assert share == pytest.approx(1)
    assert (small(images) - model(images)).abs().max() < 1e-5
    # the first reader is that of the regression on calibration images
    assert (narrow_width(model, 6, images)[0](images) - model(images)).abs().max() > 1e-3


@torch.no_grad()
def test_the_first_reader_is_solved_for_by_least_squares(add_noise):
    model = built(WIDE["timm's"], add_noise)
    images = images_of(model)
    small, _ = narrow_width(model, 12, images)
    _, wanted = seen_at(model, "blocks.0.attn.qkv", images)
    rows, found = seen_at(small, "blocks.0.attn.qkv", images)
    system = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    best = system @ torch.linalg.lstsq(system, wanted, driver="gelsd").solution
    assert (found - wanted).norm() == pytest.approx(float((best - wanted).norm()), rel=1e-6)


@torch.no_grad()
def test_plain_timm_loads_the_result(add_noise):
    model = built(WIDE["timm's"], add_noise)
    small, _ = narrow_width(model, 12, images_of(model))
    eps = small.norm.eps
    assert eps == pytest.approx(2 * model.norm.eps)
    plain = TIMM(embed_dim=12, num_heads=3, mlp_ratio=8, norm_layer=partial(nn.LayerNorm, eps=eps))
    for block in plain.blocks:
        block.attn = Attention(12, 3, attn_head_dim=8, qkv_bias=True)
    plain = plain.double().eval()
    plain.load_state_dict(small.state_dict())
    images = images_of(model, 2)
    assert (plain(images) - small(images)).abs().max() < 1e-12
    assert count_parameters(plain) < count_parameters(model)
    assert len(family_of(small).units(small)) == len(family_of(model).units(model))


@pytest.mark.parametrize("name", ["BEiT", "EVA post-norm", "Swin", "ResNet", "parallel attention and MLP", "gated"])
def test_streams_that_cannot_be_turned_are_refused(name, add_noise):
    model = built(MODELS[name], add_noise)
    with pytest.raises(LayoutError, match="width: "):
        narrow_width(model, 8, images_of(model, 1))


def test_bad_calls_are_refused_in_a_line(add_noise):
    model = built(WIDE["ours"], add_noise)
    for width in (1, 13):
        with pytest.raises(ValueError, match="must lie in 2 .. 12"):
            narrow_width(model, width, images_of(model, 1))
    with pytest.raises(ValueError, match="no calibration images"):
        narrow_width(model, 8, [])
