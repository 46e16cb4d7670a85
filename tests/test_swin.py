"""Heads and neurons of timm's Swin and SwinV2: what belongs to each in windows, what it costs, and that it can go."""

import copy

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from families.swin import SWIN
from pruning.removal import remove_units, scatter_tensors, slice_tensors
from pruning.units import count_parameters, unit_masks

CLASSES = 5
SMALL = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "mlp_ratio": 2, "drop_path_rate": 0.0}
SMALL |= {"window_size": 4, "patch_size": 2, "num_classes": CLASSES}
PADDED = {"img_size": 36, "patch_size": 4, "window_size": 4}  # 9 x 9 tokens, then 5 x 5


def build(kind, **options):
    return kind(**{**SMALL, **options})


MODELS = {
    "Swin": lambda: build(SwinTransformer),
    "Swin padded": lambda: build(SwinTransformer, **PADDED),
    "Swin other widths": lambda: build(SwinTransformer, head_dim=6, qkv_bias=False, window_size=(4, 2)),
    "SwinV2": lambda: build(SwinTransformerV2),
    "SwinV2 padded": lambda: build(SwinTransformerV2, **PADDED),
    "SwinV2 without bias": lambda: build(SwinTransformerV2, qkv_bias=False),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request, add_noise):
    torch.manual_seed(0)
    return add_noise(request.param(), scale=0.2).double().eval()


def images_of(model, number=2, dtype=torch.float64):
    size = model.patch_embed.img_size[0]
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


KEPT = {
    "random": lambda group, order: order[: 1 + len(order) // 2],
    "one": lambda group, order: order[:1],
    "none": lambda group, order: order[: group.layer - 1 if group.layer else 0],
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
    units = SWIN.units(model)
    kept = kept_of(units, which)
    cost, zeroed = SWIN.cost(model, kept), masked(model, units, kept)
    small, images = remove_units(copy.deepcopy(zeroed), units, kept), images_of(model)
    expected = zeroed(images)
    assert (expected - model(images)).abs().max() > 1e-3
    assert (small(images) - expected).abs().max() < 1e-12
    assert (copy.deepcopy(small)(images) - expected).abs().max() < 1e-12
    assert cost["parameters"] == count_parameters(small)
    assert cost == SWIN.cost(small, {})
    assert {key: group.count for key, group in SWIN.units(small).items()} == {k: len(ids) for k, ids in kept.items()}
    sliced = slice_tensors(zeroed.state_dict(), units, kept)
    assert {name: t.shape for name, t in sliced.items()} == {name: t.shape for name, t in small.state_dict().items()}
    for name, tensor in scatter_tensors(sliced, units, kept).items():
        assert torch.equal(tensor, zeroed.state_dict()[name]), name
