"""Heads and neurons of the ViTs that are not plain: gated MLPs, split or gated attention, RoPE, norms inside, parallel
blocks. Each class of attention and MLP once, in a model of depth 2 from timm's constructors."""

import copy
from functools import partial

import pytest
import torch
from timm.layers import Attention, AttentionRope, GluMlp, LayerNorm, SwiGLU
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

from families import family_of
from pruning.removal import remove_units, scatter_tensors, slice_tensors
from pruning.units import count_parameters, unit_masks

DIM, HEADS, SIZE, CLASSES = 24, 3, 16, 5
MICRO = {"img_size": SIZE, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": CLASSES}

eva = partial(Eva, **MICRO, mlp_ratio=2, use_rot_pos_emb=True)
vit = partial(VisionTransformer, **MICRO, mlp_ratio=2)
dinov3 = partial(
    eva,
    rope_type="dinov3",
    rope_rotate_half=True,
    num_reg_tokens=2,
    use_abs_pos_emb=False,
    use_fc_norm=False,
    global_pool="token",
    init_values=0.5,
)


def parallel(**options):
    return vit(block_fn=partial(ParallelScalingBlock, **options), qkv_bias=options.get("qkv_bias", True))


def with_gate(model, build, **options):
    """A model whose second block's attention has a gate."""
    model.blocks[1].attn = build(DIM, num_heads=HEADS, qkv_bias=True, gated=True, **options)
    return model


MODELS = {
    "EVA-02 small": partial(eva, swiglu_mlp=True),
    "EVA-02 base": partial(eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "EVA-02 CLIP": partial(eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, scale_attn_inner=True),
    "EVA post-norm": partial(eva, use_post_norm=True),
    "DINOv3": partial(dinov3, qkv_bias=False),
    "DINOv3 plus": partial(dinov3, swiglu_mlp=True, swiglu_align_to=8),
    "RoPE": partial(eva, attn_type="rope"),
    "RoPE split": partial(eva, attn_type="rope", qkv_fused=False, qk_norm=True),
    "PE": partial(eva, attn_type="rope", global_pool="map"),
    "gated EVA": lambda: with_gate(eva(), type(eva().blocks[0].attn), scale_norm=False),
    "gated RoPE": lambda: with_gate(eva(attn_type="rope"), AttentionRope, scale_norm=True, norm_layer=LayerNorm),
    "gated": lambda: with_gate(vit(), Attention),
    "SwiGLU": partial(vit, mlp_layer=SwiGLU),
    "packed SwiGLU": partial(vit, mlp_layer=partial(GluMlp, act_layer=nn.SiLU, gate_last=False)),
    "GLU": partial(vit, mlp_layer=GluMlp),
    "BEiT-3": partial(vit, scale_attn_norm=True, scale_mlp_norm=True),
    "BEiT": partial(Beit, **MICRO, mlp_ratio=2, qkv_bias=True, use_rel_pos_bias=True, init_values=0.5),
    "parallel attention and MLP": partial(parallel, init_values=0.5),
    "parallel, MLP bias apart": partial(parallel, qkv_bias=False),
    "parallel, one output": partial(parallel, fuse_out_proj=True),
    "parallel things": partial(vit, block_fn=ParallelThingsBlock, init_values=0.5),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request, add_noise):
    torch.manual_seed(0)
    return add_noise(request.param(), scale=0.2).double().eval()


def images_of(model, number=3):
    return torch.randn(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KEPT = {
    "random": lambda group, order: order[: 1 + len(order) // 2],
    "another": lambda group, order: order[: max(1, len(order) // 4)],
    "one": lambda group, order: order[:1],
    "none": lambda group, order: order[: group.layer],
}


def kept_of(units, which):
    generator = torch.Generator().manual_seed(len(which))
    orders = {key: torch.randperm(group.count, generator=generator).tolist() for key, group in units.items()}
    return {key: sorted(KEPT[which](units[key], order)) for key, order in orders.items()}


@torch.no_grad()
def masked(model, units, kept):
    """A copy whose other units' parts are zero."""
    model = copy.deepcopy(model)
    for name, mask in unit_masks(units, kept, dict(model.named_parameters())).items():
        model.get_parameter(name).mul_(mask)
    return model


@torch.no_grad()
@pytest.mark.parametrize("which", KEPT)
def test_the_removed_model_computes_what_the_masked_one_does(model, which):
    family = family_of(model)
    units = family.units(model)
    kept = kept_of(units, which)
    cost, zeroed = family.cost(model, kept), masked(model, units, kept)
    small, images = remove_units(copy.deepcopy(zeroed), units, kept), images_of(model)
    expected = zeroed(images)
    assert (expected - model(images)).abs().max() > 1e-3
    assert (small(images) - expected).abs().max() < 1e-12
    assert cost["parameters"] == count_parameters(small) == family.cost(small, {})["parameters"]
    assert cost == family.cost(small, {})
    again = {key: list(range(group.count)) for key, group in family.units(small).items()}
    assert {key: len(ids) for key, ids in again.items()} == {key: len(ids) for key, ids in kept.items()}
    tensors = dict(zeroed.state_dict())
    sliced = slice_tensors(tensors, units, kept)
    assert {name: t.shape for name, t in sliced.items()} == {name: t.shape for name, t in small.state_dict().items()}
    for name, tensor in scatter_tensors(sliced, units, kept).items():
        assert torch.equal(tensor, tensors[name]), name
