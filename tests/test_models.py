"""Laws of models/: counts by hand, names and values interchangeable with timm's, geometry that cannot be, refused."""

import pytest
import torch
from micro import call
from timm.models.vision_transformer import VisionTransformer as TimmVit

from models import BUILDERS, build_model, resnet, vit
from models.vit import VisionTransformer, vit_tiny
from vit_structured_pruning import count_vit_parameters, prune_attention_heads_hard, prune_mlp_neurons_hard

# name: img, patch, dim, depth, heads, mlp ratio, classes, parameters, forward GMACs, prunable weights (SPEC 3)
TABLE = {
    "vit_mini": (32, 4, 96, 6, 3, 2, 10, 460_906, "0.0339", 442_368),
    "vit_tiny": (32, 4, 192, 9, 3, 2, 10, 2_697_610, "0.1877", 2_654_208),
    "vit_small": (32, 4, 384, 12, 6, 4, 10, 21_342_346, "1.4203", 21_233_664),
    "vit_base": (32, 4, 768, 12, 12, 4, 10, 85_152_010, "5.6010", 84_934_656),
    "vit_small_imagenet": (224, 16, 384, 12, 6, 4, 1000, 22_050_664, "4.5989", 21_233_664),
    "vit_base_imagenet": (224, 16, 768, 12, 12, 4, 1000, 86_567_656, "17.5638", 84_934_656),
    "vit_large_imagenet": (224, 16, 1024, 24, 16, 4, 1000, 304_326_632, "61.5547", 301_989_888),
}


def gigamacs_by_hand(patches, patch, dim, classes, attention_widths, neurons):
    tokens = patches + 1
    total = patches * 3 * patch * patch * dim + dim * classes
    for A, H in zip(attention_widths, neurons, strict=True):
        total += 3 * tokens * dim * A + 2 * tokens * tokens * A + tokens * A * dim + 2 * tokens * dim * H
    return f"{total / 1e9:.4f}"


# --------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("name", TABLE)
def test_geometry_and_counts_are_those_of_the_table(name, capsys):
    img, patch, dim, depth, heads, ratio, classes, parameters, gigamacs, prunable = TABLE[name]
    with torch.device("meta"):
        model = getattr(vit, name)(num_classes=classes)
        assert BUILDERS[name]().head.out_features == classes
    assert sum(p.numel() for p in model.parameters()) == count_vit_parameters(model) == parameters
    assert model.patch_embed.img_size == (img, img)
    assert model.patch_embed.proj.kernel_size == model.patch_embed.proj.stride == (patch, patch)
    assert model.pos_embed.shape == (1, (img // patch) ** 2 + 1, dim)
    assert len(model.blocks) == depth
    for block in model.blocks:
        assert (block.attn.num_heads, block.attn.head_dim) == (heads, dim // heads)
        assert block.attn.qkv.bias.shape == (3 * dim,)
        assert block.mlp.fc1.weight.shape == (dim * ratio, dim)
        assert (block.norm1.eps, block.norm2.eps, model.norm.eps) == (1e-6, 1e-6, 1e-6)
    assert gigamacs == gigamacs_by_hand((img // patch) ** 2, patch, dim, classes, [dim] * depth, [dim * ratio] * depth)
    dataset = "imagenet" if classes == 1000 else "cifar10"
    assert call(["--dry_run", "--arch", name, "--dataset", dataset, "--pruning_times", 1]) == 0
    plan = capsys.readouterr().out
    assert f"{parameters:,} parameters, {prunable:,} of them prunable weights" in plan
    assert plan.split("About")[0].split()[-2:] == [gigamacs, "G"]


@pytest.mark.parametrize(
    ("flags", "heads", "neurons"),
    [("--rate 0.34 --mlp_prune_ratio 0.3", 1, 268), ("--rate 0.99 --mlp_prune_ratio 0.999 --min_units 0", 0, 0)],
)
def test_macs_of_what_is_left(flags, heads, neurons, capsys):
    units = ["--vit_structured", "--vit_prune_target", "both", "--pruning_times", 2, *flags.split()]
    assert call(["--dry_run", "--dataset", "cifar10", *units]) == 0
    plan = capsys.readouterr().out.split("About")[0].split()
    assert plan[-5:-3] == [str(9 * heads), f"{9 * neurons:,}"]
    assert plan[-2] == gigamacs_by_hand(64, 4, 192, 10, [64 * heads] * 9, [neurons] * 9)


def test_builders_take_other_classes_sizes_and_overrides():
    with torch.device("meta"):
        assert count_vit_parameters(vit_tiny(num_classes=100)) == 2_714_980
        assert vit_tiny(num_classes=10, img_size=28, patch_size=7).patch_embed.num_patches == 16
        for arch in resnet.BUILDERS:
            model = build_model(arch, 7, 28)
            assert (model.fc.out_features, model.img_size, model.pretrained_report) == (7, 28, None)
    assert set(BUILDERS) == {*TABLE, *resnet.BUILDERS}


def test_initial_values():
    torch.manual_seed(0)
    for name, parameter in vit_tiny(num_classes=10, depth=1).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.endswith("bias") and not name.startswith("patch_embed"):
            assert not parameter.any(), name
        elif name == "cls_token":
            assert 0 < parameter.abs().max() < 1e-4
        elif not name.startswith("patch_embed"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_state_dict_goes_strictly_both_ways_and_logits_are_timms(add_noise):
    geometry = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
    ours, theirs, again = (build(**geometry, mlp_ratio=2).eval() for build in (VisionTransformer, TimmVit, TimmVit))
    add_noise(theirs, scale=0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    again.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert ours(images).abs().max() > 0.1  # else equality would say little
        for other in (theirs, again):
            torch.testing.assert_close(ours(images), other(images), rtol=0, atol=1e-5)
        # float64 sees an epsilon or an activation that is only almost timm's
        torch.testing.assert_close(ours.double()(images.double()), theirs.double()(images.double()), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------- emptied branches
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_branch_without_units_is_its_output_bias(make_micro_vit):
    model, tokens = make_micro_vit(), torch.randn(2, 5, 12)
    block, other = model.blocks
    built_empty = type(other.attn)(12, num_heads=0, head_dim=4), type(other.mlp)(12, 0)
    prune_attention_heads_hard(block.attn, [0, 1, 2])
    prune_mlp_neurons_hard(block.mlp, range(24))
    for attention, mlp in ((block.attn, block.mlp), built_empty):
        assert torch.equal(attention(tokens), attention.proj.bias.expand(2, 5, 12))
        assert torch.equal(mlp(tokens), mlp.fc2.bias.expand(2, 5, 12))
    assert torch.equal(block(tokens), tokens + block.attn.proj.bias + block.mlp.fc2.bias)
    logits = model(torch.randn(2, 3, 8, 8))
    logits.sum().backward()
    assert block.attn.proj.bias.grad.abs().sum() > 0
    assert torch.isfinite(logits).all()


def test_width_and_scale_follow_the_head_not_their_number(micro_vit):
    attention = type(micro_vit.blocks[0].attn)(12, num_heads=2, head_dim=4)
    assert attention.scale == 0.5
    assert (attention.qkv.weight.shape, attention.proj.weight.shape) == ((24, 12), (12, 8))


# --------------------------------------------------------------------------------------------- said no early
def test_what_cannot_be_is_refused_with_its_numbers(micro_vit):
    with pytest.raises(ValueError, match=r"30.*7|7.*30"):
        vit_tiny(img_size=30, patch_size=7)
    with pytest.raises(ValueError, match=r"192.*5|5.*192"):
        vit_tiny(num_heads=5)
    with pytest.raises(ValueError, match=r"12x16.*8"):
        micro_vit(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match="vit_huge") as caught:
        build_model("vit_huge", num_classes=10)
    assert all(name in str(caught.value) for name in BUILDERS)
