"""Laws of models/: counts by hand, values interchangeable with timm's, pretrained weights transferred or refused."""

import copy
import logging
import os
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmVit
from timm.models.vision_transformer import checkpoint_filter_fn

from models import BUILDERS, build_model, vit
from models.vit import (
    Attention,
    Mlp,
    PretrainedError,
    VisionTransformer,
    load_pretrained_weights,
    vit_large_imagenet,
    vit_tiny,
)
from vit_pruning_utils import prunable_weights
from vit_structured_pruning import count_vit_parameters, prune_attention_heads_hard, prune_mlp_neurons_hard, vit_macs

# name: img, patch, dim, depth, heads, mlp ratio, classes, parameters, forward GMACs, prunable weights (SPEC 3)
TABLE = {
    "vit_tiny": (32, 4, 192, 9, 3, 2, 10, 2_697_610, "0.1877", 2_654_208),
    "vit_small": (32, 4, 384, 12, 6, 4, 10, 21_342_346, "1.4203", 21_233_664),
    "vit_base": (32, 4, 768, 12, 12, 4, 10, 85_152_010, "5.6010", 84_934_656),
    "vit_small_imagenet": (224, 16, 384, 12, 6, 4, 1000, 22_050_664, "4.5989", 21_233_664),
    "vit_base_imagenet": (224, 16, 768, 12, 12, 4, 1000, 86_567_656, "17.5638", 84_934_656),
    "vit_large_imagenet": (224, 16, 1024, 24, 16, 4, 1000, 304_326_632, "61.5547", 301_989_888),
}
SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
build_timm = partial(TimmVit, **SMALL, mlp_ratio=2.0)
build_ours = partial(VisionTransformer, **SMALL, mlp_ratio=2.0)


def macs_by_hand(patches, patch, dim, classes, attention_widths, neurons):
    tokens = patches + 1
    total = patches * 3 * patch * patch * dim + dim * classes
    for A, H in zip(attention_widths, neurons, strict=True):
        total += 3 * tokens * dim * A + 2 * tokens * tokens * A + tokens * A * dim + 2 * tokens * dim * H
    return total


# --------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", TABLE)
def test_counts_are_those_of_the_table(name):
    img, patch, dim, depth, heads, ratio, classes, parameters, giga_macs, prunable = TABLE[name]
    with torch.device("meta"):
        model = getattr(vit, name)(num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count_vit_parameters(model) == parameters
    assert sum(weight.numel() for weight in prunable_weights(model).values()) == prunable
    assert list(prunable_weights(model)) == [
        f"blocks.{i}.{layer}" for i in range(depth) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    expected = macs_by_hand((img // patch) ** 2, patch, dim, classes, [dim] * depth, [dim * ratio] * depth)
    assert vit_macs(model) == expected
    assert f"{expected / 1e9:.4f}" == giga_macs


@pytest.mark.parametrize("name", TABLE)
def test_geometry_is_that_of_the_table(name):
    img, patch, dim, depth, heads, ratio, classes, *_ = TABLE[name]
    with torch.device("meta"):
        model = build_model(name, num_classes=classes)
    assert model.patch_embed.img_size == (img, img)
    assert model.patch_embed.proj.kernel_size == model.patch_embed.proj.stride == (patch, patch)
    assert model.patch_embed.proj.weight.shape == (dim, 3, patch, patch)
    assert model.pos_embed.shape == (1, (img // patch) ** 2 + 1, dim)
    assert len(model.blocks) == depth
    for block in model.blocks:
        assert (block.attn.num_heads, block.attn.head_dim) == (heads, dim // heads)
        assert block.attn.qkv.bias.shape == (3 * dim,)
        assert block.mlp.fc1.weight.shape == (dim * ratio, dim)
        assert (block.norm1.eps, block.norm2.eps) == (1e-6, 1e-6)
    assert model.norm.eps == 1e-6
    assert model.head.weight.shape == (classes, dim)


def test_builders_default_to_the_classes_of_the_table_and_take_others():
    for name, row in TABLE.items():
        with torch.device("meta"):
            assert BUILDERS[name]().head.out_features == row[6]
    with torch.device("meta"):
        assert count_vit_parameters(vit_tiny(num_classes=100)) == 2_714_980
        assert vit_tiny(num_classes=10, img_size=28, patch_size=7).patch_embed.num_patches == 16
    assert set(vit.CONFIGS) == set(TABLE)


def test_macs_of_given_counts(make_micro_vit):
    model = make_micro_vit(depth=3)
    counts = {"blocks.0.attn": 2, "blocks.0.mlp": 5, "blocks.1.attn": 0, "blocks.2.mlp": 0}
    assert vit_macs(model, counts) == macs_by_hand(4, 4, 12, 5, [8, 0, 12], [5, 24, 0])


def test_macs_of_a_reduced_model(make_micro_vit):
    model = make_micro_vit()
    prune_attention_heads_hard(model.blocks[0].attn, [1])
    prune_mlp_neurons_hard(model.blocks[1].mlp, range(3, 20))
    assert vit_macs(model) == macs_by_hand(4, 4, 12, 5, [8, 12], [24, 7])


def test_initial_values():
    torch.manual_seed(0)
    model = vit_tiny(num_classes=10)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.endswith("bias") and not name.startswith("patch_embed"):
            assert not parameter.any(), name
        elif name == "cls_token":
            assert 0 < parameter.abs().max() < 1e-4
        elif not name.startswith("patch_embed"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


# ------------------------------------------------------------------------------- interchangeable with timm


@pytest.mark.parametrize("direction", ["from timm", "to timm"])
@pytest.mark.parametrize("geometry", ["vit_tiny", "micro"])
def test_state_dict_goes_strictly_both_ways_and_logits_agree(direction, geometry, add_noise):
    size = {"embed_dim": 192, "depth": 9, "num_heads": 3} if geometry == "vit_tiny" else {}
    img = 32 if geometry == "vit_tiny" else 16
    ours = build_ours(**{**size, "img_size": img}).eval()
    theirs = build_timm(**{**size, "img_size": img}).eval()
    source, target = (theirs, ours) if direction == "from timm" else (ours, theirs)
    add_noise(source, scale=0.06)
    target.load_state_dict(source.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(3, 3, img, img, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(images), theirs(images)
        assert a.abs().max() > 0.1  # else equality would say little
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        # float64 sees an epsilon or an activation that is only almost timm's
        torch.testing.assert_close(ours.double()(images.double()), theirs.double()(images.double()), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------- emptied branches


def test_branch_without_units_is_its_output_bias(make_micro_vit):
    model = make_micro_vit()
    block, tokens = model.blocks[0], torch.randn(2, 5, 12)
    prune_attention_heads_hard(block.attn, [0, 1, 2])
    prune_mlp_neurons_hard(block.mlp, range(24))
    for branch, bias in ((block.attn, block.attn.proj.bias), (block.mlp, block.mlp.fc2.bias)):
        assert torch.equal(branch(tokens), bias.expand(2, 5, 12))
    by_hand = tokens + block.attn.proj.bias
    assert torch.equal(block(tokens), by_hand + block.mlp.fc2.bias)
    logits = model(torch.randn(2, 3, 8, 8))
    logits.sum().backward()
    assert block.attn.proj.bias.grad.abs().sum() > 0
    assert torch.isfinite(logits).all()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_built_empty_is_its_output_bias():
    tokens = torch.randn(2, 5, 12)
    attention, mlp = Attention(12, num_heads=0, head_dim=4), Mlp(12, 0)
    assert torch.equal(attention(tokens), attention.proj.bias.expand(2, 5, 12))
    assert torch.equal(mlp(tokens), mlp.fc2.bias.expand(2, 5, 12))


def test_scale_stays_when_heads_go():
    attention = Attention(12, num_heads=2, head_dim=4)
    assert attention.scale == 0.5
    assert attention.qkv.weight.shape == (24, 12)
    assert attention.proj.weight.shape == (12, 8)


# ---------------------------------------------------------------------------------------- said no early


def test_geometry_that_does_not_divide_names_both_numbers():
    with pytest.raises(ValueError, match=r"30.*7|7.*30"):
        vit_tiny(img_size=30, patch_size=7)
    with pytest.raises(ValueError, match=r"192.*5|5.*192"):
        vit_tiny(num_heads=5)


def test_unknown_arch_lists_the_known_ones():
    with pytest.raises(ValueError, match="vit_huge") as caught:
        build_model("vit_huge", num_classes=10)
    assert all(name in str(caught.value) for name in TABLE)


def test_images_of_another_size_are_refused(micro_vit):
    with pytest.raises(ValueError, match=r"12x16.*8"):
        micro_vit(torch.zeros(1, 3, 12, 16))


# ----------------------------------------------------------------------------------- pretrained weights


def write(path, state_dict):
    """As the suffix says; `nested` files hold {"state_dict": ...}."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, path)
    else:
        torch.save({"state_dict": state_dict, "epoch": 3} if "nested" in path.name else state_dict, path)
    return path


FILES = ["w.safetensors", "w.pth", "nested.pth"]


@pytest.mark.parametrize("file", FILES)
def test_file_of_the_same_geometry_gives_timms_logits(tmp_path, file, add_noise):
    theirs = add_noise(build_timm(), scale=0.1).eval()
    ours = build_ours().eval()
    report = load_pretrained_weights(ours, write(tmp_path / file, theirs.state_dict()))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
    assert sorted(report.transferred) == sorted(theirs.state_dict())
    assert report.resampled == report.reinitialised == report.skipped == []


@pytest.mark.parametrize("file", FILES)
def test_file_of_another_geometry_is_resampled_as_timm_does(tmp_path, file, caplog, add_noise):
    theirs = add_noise(build_timm(), scale=0.1).state_dict()
    theirs["fc_norm.weight"] = torch.ones(24)  # has no place here
    path = write(tmp_path / file, theirs)
    ours = build_ours(img_size=18, patch_size=3, num_classes=7)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with caplog.at_level(logging.INFO):
        report = load_pretrained_weights(ours, path)

    # timm's own path for checkpoints, with a timm model of the new geometry
    expected = checkpoint_filter_fn(dict(theirs), build_timm(img_size=18, patch_size=3, num_classes=7))
    after = ours.state_dict()
    resampled, reinitialised = {"pos_embed", "patch_embed.proj.weight"}, {"head.weight", "head.bias"}
    for name, tensor in after.items():
        if name in reinitialised:
            assert torch.equal(tensor, before[name]), name
        elif name in resampled:
            assert not torch.equal(tensor, before[name])
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert (set(report.resampled), set(report.reinitialised)) == (resampled, reinitialised)
    assert report.skipped == ["fc_norm.weight"]
    assert sorted(report.transferred) == sorted(set(after) - resampled - reinitialised)
    lists = report.transferred + report.resampled + report.reinitialised + report.skipped
    assert sorted(lists) == sorted(set(after) | set(theirs))  # complete, and nothing twice
    line = f"{len(after) - 4} tensors transferred, 2 resampled, 2 re-initialised, 1 skipped"
    assert [line in record.getMessage() for record in caplog.records].count(True) == 1
    assert torch.isfinite(ours(torch.randn(2, 3, 18, 18))).all()


def test_only_the_grid_differs(tmp_path, add_noise):
    theirs = add_noise(build_timm(), scale=0.1).state_dict()
    ours = build_ours(img_size=24)
    report = load_pretrained_weights(ours, write(tmp_path / "w.pth", theirs))
    assert report.resampled == ["pos_embed"]
    # bicubic with antialias from 4 x 4 to 6 x 6, the class token's position kept
    grid = theirs["pos_embed"][:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    expected = torch.cat([theirs["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 36, 24)], dim=1)
    torch.testing.assert_close(ours.pos_embed.data, expected, rtol=0, atol=1e-6)
    assert torch.equal(ours.head.weight, theirs["head.weight"])


def test_builders_take_a_file(tmp_path, add_noise):
    theirs = add_noise(build_timm(), scale=0.1).state_dict()
    path = write(tmp_path / "w.safetensors", theirs)
    ours = build_model("vit_tiny", 5, img_size=16, pretrained=str(path), embed_dim=24, depth=2)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["torch", "nested", "pickle", "safetensors"])
def test_a_file_that_carries_code_is_refused_and_not_run(tmp_path, kind):
    marker, path = tmp_path / "ran", tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind in ("torch", "nested"):
        torch.save(Payload(marker) if kind == "torch" else {"state_dict": {"norm.weight": Payload(marker)}}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    ours = build_ours()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(PretrainedError) as caught:
        load_pretrained_weights(ours, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload does work, so the test can fail
    assert marker.exists()


@pytest.mark.parametrize("damage", ["half", "empty", "noise", "missing", "list", "numbers"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, suffix):
    path = write(tmp_path / f"w{suffix}", build_timm().state_dict())
    content = path.read_bytes()
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 8)
    elif damage == "missing":
        path.unlink()
    else:
        torch.save([torch.ones(2)] if damage == "list" else {"norm.weight": 3}, path)  # not safetensors either
    ours = build_ours()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(PretrainedError) as caught:
        load_pretrained_weights(ours, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_weights_that_do_not_fit_are_refused_and_the_model_is_unchanged(tmp_path):
    ours = build_ours()
    before = copy.deepcopy(ours.state_dict())
    wider = write(tmp_path / "wider.pth", build_timm(embed_dim=48).state_dict())
    with pytest.raises(PretrainedError, match="48.*24"):
        load_pretrained_weights(ours, wider)
    stranger = write(tmp_path / "stranger.pth", {"layer1.weight": torch.ones(3)})
    with pytest.raises(PretrainedError, match=r"stranger\.pth"):
        load_pretrained_weights(ours, stranger)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_vit_tiny_has_no_public_weights_says_so_and_goes_on(caplog):
    with caplog.at_level(logging.WARNING):
        model = vit_tiny(num_classes=10, pretrained=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "vit_tiny" in warnings[0]
    assert "scratch" in warnings[0]
    assert count_vit_parameters(model) == 2_697_610


def test_vit_large_from_scratch_is_warned_about_once(caplog):
    with caplog.at_level(logging.WARNING), torch.device("meta"):
        vit_large_imagenet()
        assert ["vit_large_imagenet" in record.getMessage() for record in caplog.records] == [True]
        caplog.clear()
        vit.vit_base_imagenet()
        assert not caplog.records
