"""Laws of pretrained weights and of `--arch timm/NAME`: what goes over, what is resampled, what is refused.

No network: all weights are written here from timm models with random values.
"""

import argparse
import logging
import os
import pickle
import re
import sys

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer as TimmVit
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.nn.utils import prune

from models import build_model, resnet, vit
from models.pretrained import load_pretrained_weights, load_whole
from models.vit import VisionTransformer
from models.weight_files import MisfitError, PretrainedError
from vit_pruning_utils import is_vit_model

SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY = {"embed_dim": 24, "num_heads": 3, "depth": 2}  # overrides that make any ViT small
HEAD, EMBEDDINGS = {"head.weight", "head.bias"}, {"pos_embed", "patch_embed.proj.weight"}
# builder: the timm model whose public weights it starts from
PUBLIC = {f"vit_{size}{end}": f"vit_{size}_patch16_224" for size in ("small", "base") for end in ("", "_imagenet")}
PUBLIC["vit_large_imagenet"] = "vit_large_patch16_224"


def source_vit(**arguments):
    """A small timm ViT all of whose values matter."""
    return fill(TimmVit(**{**SMALL, "mlp_ratio": 2.0, **arguments}))


def target_vit(**arguments):
    return VisionTransformer(**{**SMALL, "mlp_ratio": 2.0, **arguments}).eval()


@torch.no_grad()
def fill(model):
    """Give every parameter uniform values of its own, norms' gains around 1; eval mode."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.uniform_(-0.1, 0.1, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    return model.eval()


def save(path, weights):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, expected):
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def refusal(*arguments, error=PretrainedError, **keywords):
    """The one line of a refusal to build."""
    with pytest.raises(error) as caught:
        build_model(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def public_weights(monkeypatch):
    """timm without a network: `create_model(..., pretrained=True)` gives small models with random values."""
    asked, real = {}, timm.create_model

    def create_model(name, pretrained=False, **arguments):
        if not pretrained:
            return real(name, pretrained=False, **arguments)
        asked[name] = fill(real(name, **TINY, **arguments))
        return asked[name]

    monkeypatch.setattr(timm, "create_model", create_model)
    return asked


# ---------------------------------------------------------------------------------------------- where they come from


@pytest.mark.parametrize(("arch", "name"), PUBLIC.items())
def test_public_weights_are_timms_default_or_of_the_tag(arch, name, public_weights, caplog):
    assert getattr(vit, arch)(**TINY).pretrained_report is None
    caplog.clear()
    default = getattr(vit, arch)(num_classes=10, pretrained=True, **TINY)
    tagged = build_model(arch, 10, pretrained=True, pretrained_tag="augreg_in21k", **TINY)
    assert list(public_weights) == [name, f"{name}.augreg_in21k"]
    for model, source in zip((default, tagged), public_weights.values(), strict=True):
        assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    resampled = EMBEDDINGS if default.patch_embed.img_size == (32, 32) else set()
    assert set(default.pretrained_report.resampled) == resampled
    assert not warnings_of(caplog)  # not even that vit_large needs much data from scratch


def test_public_weights_of_timm_models_go_the_same_way(public_weights, caplog):
    name = "deit_tiny_patch16_224"
    with caplog.at_level(logging.INFO):
        model = build_model(f"timm/{name}", 10, 32, True, patch_size=4, **TINY)
    assert set(model.pretrained_report.resampled) == EMBEDDINGS
    assert "28 tensors transferred, 2 resampled, 2 re-initialised, 0 skipped" in caplog.text
    build_model(f"timm/{name}", 10, 32, True, pretrained_tag="fb_in1k", patch_size=4, **TINY)
    build_model("timm/vit_small_patch16_224.dino", 10, 32, True, patch_size=4, **TINY)
    assert list(public_weights) == [name, f"{name}.fb_in1k", "vit_small_patch16_224.dino"]


@pytest.mark.parametrize("tag", [None, "augreg_in21k"])
def test_vit_tiny_starts_from_scratch_and_takes_no_tag(tag, caplog):
    if tag:
        told = refusal("vit_tiny", 10, pretrained=True, pretrained_tag=tag, error=ValueError)
        assert "--pretrained_tag augreg_in21k: vit_tiny has no public" in told
        return
    model = build_model("vit_tiny", 10, pretrained=True)
    (line,) = warnings_of(caplog)
    assert line == model.pretrained_report.failure
    assert "vit_tiny" in line
    assert "scratch" in line
    assert model.pretrained_report.reinitialised == list(model.state_dict())


# ---------------------------------------------------------------------------------------------------- what goes over


def test_the_same_geometry_gives_timms_logits_and_fallback_changes_nothing(tmp_path, caplog):
    source = source_vit()
    path = save(tmp_path / "w.safetensors", source.state_dict())
    model = build_model("vit_tiny", 5, 16, str(path), pretrained_fallback=True, embed_dim=24, depth=2).eval()
    assert_same(model, source.state_dict())
    report, images = model.pretrained_report, torch.randn(3, 3, 16, 16)
    assert report.transferred == list(source.state_dict())
    assert report.resampled == report.reinitialised == report.skipped == warnings_of(caplog) == []
    assert report.failure == ""
    with torch.no_grad():
        torch.testing.assert_close(model(images), source(images), rtol=0, atol=1e-5)


def test_another_geometry_is_resampled_as_timm_does_and_the_log_says_so(tmp_path, caplog):
    weights = source_vit().half().float().state_dict()
    weights["fc_norm.weight"] = torch.ones(24)  # has no place here
    path = save(tmp_path / "w.pth", {name: tensor.half() for name, tensor in weights.items()})
    model = target_vit(img_size=18, patch_size=3, num_classes=7).double()
    before = copy_of(model)
    with caplog.at_level(logging.DEBUG):
        report = load_pretrained_weights(model, path, partial=True)
    expected = dict(weights)  # half precision is resampled in single, and double models take either
    expected["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [6, 6], num_prefix_tokens=1)
    expected["patch_embed.proj.weight"] = resample_patch_embed(weights["patch_embed.proj.weight"], [3, 3])
    assert torch.equal(expected["pos_embed"][:, 0], weights["pos_embed"][:, 0])  # the class token's stays
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in HEAD else expected[name].double()), name
    assert (set(report.resampled), set(report.reinitialised)) == (EMBEDDINGS, HEAD)
    assert report.skipped == ["fc_norm.weight"]
    assert set(report.transferred) == before.keys() - EMBEDDINGS - HEAD
    lines = {level: [r.getMessage() for r in caplog.records if r.levelno == level] for level in (20, 10)}
    counts = "28 tensors transferred, 2 resampled, 2 re-initialised, 1 skipped"
    assert f"pretrained weights from {path}: {counts}" in lines[20]
    named = ["resampled: pos_embed, patch_embed.proj.weight", "skipped: fc_norm.weight"]
    assert {*named, "reinitialised: head.weight, head.bias"} <= {*lines[10]}
    assert [line for line in lines[10] if line.startswith("transferred: cls_token, ")]


@pytest.mark.parametrize("pixels", [16, 24])
def test_reinit_keeps_the_random_patch_embedding(pixels, tmp_path):
    path = save(tmp_path / "w.pth", source_vit().state_dict())
    torch.manual_seed(5)
    random = build_model("vit_tiny", 5, pixels, patch_size=4, **TINY).state_dict()
    torch.manual_seed(5)
    model = build_model("vit_tiny", 5, pixels, path, patch_embed="reinit", patch_size=4, **TINY)
    kept = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(model.pretrained_report.reinitialised) == kept
    assert model.pretrained_report.resampled == ([] if pixels == 16 else ["pos_embed"])
    assert all(torch.equal(model.state_dict()[name], random[name]) for name in kept)
    with pytest.raises(ValueError, match=r"--patch_embed guess: .*resample.*reinit"):
        load_pretrained_weights(model, path, patch_embed="guess")


FAMILIES = {
    "class token": ("vit_tiny_patch16_224", {}, 1),
    "averaged": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 1),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", {}, 2),
    "DeiT III": ("deit3_small_patch16_224", {}, 0),  # no position for the class token
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 0),
    "averaged registers": ("vit_medium_patch16_reg4_gap_256", {}, 0),
    "q and k norm": ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_families_transfer_and_are_plain_vits(family, tmp_path):
    name, arguments, prefix = FAMILIES[family]
    source = fill(timm.create_model(name, pretrained=False, weight_init="skip", **TINY, **arguments))
    weights = source.state_dict()
    path = save(tmp_path / "w.safetensors", weights)
    new = {**TINY, **arguments, "img_size": 32, "patch_size": 4}
    model = build_model(f"timm/{name}", 10, pretrained=path, **new).eval()
    ours, report = model.state_dict(), model.pretrained_report
    # timm's own path from a checkpoint to another geometry
    expected = checkpoint_filter_fn(dict(weights), timm.create_model(name, pretrained=False, **new))
    heads = {item for item in ours if item.startswith(("head.", "head_dist."))}
    assert len(heads) == (4 if family == "distilled DeiT" else 2)
    assert (set(report.resampled), set(report.reinitialised), report.skipped) == (EMBEDDINGS, heads, [])
    for item in ours.keys() - heads:
        torch.testing.assert_close(ours[item], expected[item], rtol=0, atol=1e-6)
    assert ours["pos_embed"].shape[1] == 64 + prefix
    assert is_vit_model(model)
    model.double().train()(torch.randn(2, 3, 32, 32).double()).square().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float64}
    same = build_model(f"timm/{name}", source.num_classes, pretrained=path, **TINY, **arguments)
    assert_same(same, weights)


# ------------------------------------------------------------------------------------------ all of it, or by name


DEIT3, TINY_DEIT3 = "deit3_small_patch16_224", {**TINY, "num_classes": 5, "img_size": 16, "patch_size": 4}


def as_published(weights):
    """DeiT-III's own files: LayerScale under other names."""
    return {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in weights.items()}


@pytest.mark.parametrize("pixels", [16, 24])
def test_names_as_published_are_translated_by_timms_filter(pixels, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = fill(timm.create_model(DEIT3, **TINY_DEIT3))
    published = as_published(source.state_dict())
    assert "blocks.1.gamma_2" in published
    path = save(tmp_path / "w.pth", {"model": published})
    options = {**TINY, "patch_size": 4}
    model = build_model(f"timm/{DEIT3}", 5, pixels, path, **options)
    assert "translated" in caplog.text
    for name, tensor in source.state_dict().items():
        if pixels == 16 or name != "pos_embed":
            assert torch.equal(model.state_dict()[name], tensor), name
    assert model.pretrained_report.resampled == ([] if pixels == 16 else ["pos_embed"])
    assert model.pretrained_report.reinitialised == model.pretrained_report.skipped == []


def keep(weights, *words):
    return {name: tensor for name, tensor in weights.items() if any(word in name for word in words)}


def drop(weights, *words):
    return {name: tensor for name, tensor in weights.items() if not any(word in name for word in words)}


# what is in the file; what the line must say, counted by hand: a block has 12 tensors, a model 32
PARTS = {
    "one tensor": (lambda w: keep(w, "cls_token"), "lacks 29 of the model's 32 tensors (pos_embed, "),
    "a block missing": (lambda w: drop(w, "blocks.1."), "lacks 12 of the model's 32 tensors (blocks.1.norm1.weight, "),
    "a block too many": (
        lambda w: w | {name.replace("s.1.", "s.2."): tensor for name, tensor in keep(w, "blocks.1.").items()},
        "no place for 12 of its tensors (blocks.2.attn.proj.bias, ",
    ),
    "fc_norm": (
        lambda w: drop(w, "norm.") | {f"fc_{name}": w[name] for name in ("norm.weight", "norm.bias")},
        "no place for 2 of its tensors (fc_norm.bias, fc_norm.weight)",
    ),
    "qk_norm": (
        lambda w: w | {f"blocks.0.attn.{name}_norm.weight": torch.ones(8) for name in "qk"},
        "no place for 2 of its tensors (blocks.0.attn.k_norm.weight, blocks.0.attn.q_norm.weight)",
    ),
    "layer scale": (
        lambda w: w | {"blocks.0.gamma_1": torch.ones(24)},
        "no place for 1 of its tensors (blocks.0.gamma_1)",
    ),
    "masks alone": (
        lambda w: drop(w, "fc1.weight") | {"blocks.0.mlp.fc1.weight_mask": w["blocks.0.mlp.fc1.weight"]},
        "lacks 2 of the model's 32 tensors (blocks.0.mlp.fc1.weight, blocks.1.mlp.fc1.weight) and the model has no "
        "place for 1 of its tensors (blocks.0.mlp.fc1.weight_mask)",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_fit_in_part_are_refused_by_name_unless_they_are_meant(part, tmp_path, caplog):
    change, told = PARTS[part]
    path = save(tmp_path / "w.pth", change(source_vit().state_dict()))
    model = target_vit()
    before = copy_of(model)
    for load in (load_pretrained_weights, lambda model, path: load_whole(model, path, "--pretrained", False)):
        with pytest.raises(MisfitError) as caught:
            load(model, path)
        line = str(caught.value)
        if load is load_pretrained_weights or part != "one tensor":  # there the classifier is one that is missing
            assert told in line
        assert line.endswith("accept it by --allow_partial")
        assert "\n" not in line
        assert_same(model, before)
    report = load_pretrained_weights(model, path, partial=True)
    assert told in report.gaps
    assert warnings_of(caplog)[-1].startswith(f"--pretrained {path}: ")
    for name in before:
        expected = before[name] if name in report.reinitialised else source_vit().state_dict()[name]
        assert torch.equal(model.state_dict()[name], expected), name


def test_a_model_with_norms_of_q_and_k_is_not_filled_by_weights_without(tmp_path):
    path = save(tmp_path / "w.pth", source_vit().state_dict())
    line = refusal("timm/vit_tiny_patch16_224", 5, 16, path, patch_size=4, qk_norm=True, mlp_ratio=2.0, **TINY)
    assert "lacks 8 of the model's 40 tensors (blocks.0.attn.q_norm.weight, " in line


def test_pruned_files_give_the_masked_weights(tmp_path):
    source = source_vit()
    mask = (torch.arange(source.blocks[1].mlp.fc2.weight.numel()) % 3 > 0).view_as(source.blocks[1].mlp.fc2.weight)
    prune.custom_from_mask(source.blocks[1].mlp.fc2, "weight", mask)
    path = save(tmp_path / "w.pth", {f"module.{name}": tensor for name, tensor in source.state_dict().items()})
    for load in (load_pretrained_weights, lambda model, path: load_whole(model, path, "--init")):
        model = target_vit()
        load(model, path)
        assert torch.equal(model.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight_orig * mask)
        assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(("folder", "name"), [("run", "best.pt"), ("model", "model.safetensors")])
def test_folders_of_runs_and_of_exported_models_are_read(folder, name, tmp_path):
    weights = source_vit().state_dict()
    (tmp_path / folder).mkdir()
    line = refusal("vit_tiny", 5, 16, tmp_path / folder, error=ValueError, **TINY)
    assert line.endswith("holds no weights; give a file, or the folder of a run or of an exported model")
    save(tmp_path / folder / name, {"weights": weights, "state": 1} if name == "best.pt" else weights)
    model = target_vit()
    load_whole(model, tmp_path / folder, "--init")
    assert_same(model, weights)


def test_initial_weights_are_adapted_in_nothing(tmp_path):
    for changes, told in (
        ({"num_classes": 7}, "head.weight is (7, 24)"),
        ({"img_size": 24}, "pos_embed is (1, 37, 24)"),
    ):
        path = save(tmp_path / "w.pth", source_vit(**changes).state_dict())
        with pytest.raises(MisfitError, match=re.escape(told)):
            load_whole(target_vit(), path, "--init")


# -------------------------------------------------------------------------------------------------- kinds of files


WRAPPED = {
    "plain.pth.tar": lambda weights: weights,
    "state_dict.pth": lambda weights: {"state_dict": weights, "epoch": 3},
    "both.pt": lambda weights: {"state_dict": {"model": weights}, "optimizer": {"lr": 0.1}},
    "module.safetensors": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "deep.tar": lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}},
    "averages.pth": lambda weights: {"model": {"head.bias": torch.ones(5)}, "model_ema": weights},
    "averages.tar": lambda weights: {"state_dict": {}, "state_dict_ema": weights},
    "compiled.pth": lambda weights: {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()},
    "lightning.pt": lambda weights: {"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}},
    "backbone.pth": lambda weights: {
        f"{'' if name.startswith('head') else 'backbone.'}{name}": tensor for name, tensor in weights.items()
    },
    "extras.pth": lambda weights: {
        "model": {**weights, "step": 3},
        "args": argparse.Namespace(lr=1),
        "best": np.float64(0.5),
    },
    "own best.pt": lambda weights: {"weights": weights, "state": 0, "kept": {}, "accuracy": 0.5},
    "pruned.pth": lambda weights: (
        {(f"{name}_orig" if name == "blocks.0.mlp.fc1.weight" else name): tensor for name, tensor in weights.items()}
        | {"blocks.0.mlp.fc1.weight_mask": torch.ones_like(weights["blocks.0.mlp.fc1.weight"])}
    ),
}


@pytest.mark.parametrize("file", WRAPPED)
def test_wrappings_are_taken_off(file, tmp_path):
    source = source_vit()
    model = target_vit()
    report = load_pretrained_weights(model, save(tmp_path / file, WRAPPED[file](source.state_dict())))
    assert report.skipped == []
    assert_same(model, source.state_dict())


def google_layout(model, layout):
    """{name: array} of the files that vision_transformer ("original") and big_vision publish for a ViT."""
    root = {"original": "", "optimizer": "opt/target/", "big_vision": "params/", "stacked": "params/img/"}[layout]
    old = layout in ("original", "optimizer")
    attention = f"MultiHeadDotProductAttention_{1 if old else 0}"
    places = {"norm": "Transformer/encoder_norm", "head": "head", "patch_embed.proj": "embedding"}
    inside = {"norm1": "LayerNorm_0", "norm2": f"LayerNorm_{2 if old else 1}", "attn.proj": f"{attention}/out"}
    inside |= {"attn.qkv": attention, **{f"mlp.fc{n + 1}": f"MlpBlock_{3 if old else 0}/Dense_{n}" for n in (0, 1)}}
    depth, heads, dim = len(model.blocks), model.blocks[0].attn.num_heads, model.embed_dim
    for i in range(depth):
        places |= {f"blocks.{i}.{name}": f"Transformer/encoderblock_{i}/{place}" for name, place in inside.items()}
    arrays = {"cls": model.cls_token, f"{'Transformer/posembed_input/' if old else ''}pos_embedding": model.pos_embed}
    for module, place in places.items():
        if "head" in module and not model.num_classes:
            continue
        layer, kernel = model.get_submodule(module), "scale" if "norm" in module else "kernel"
        weight = layer.weight.t() if layer.weight.ndim < 4 else layer.weight.permute(2, 3, 1, 0)
        if module.endswith("qkv"):
            for name, rows, bias in zip(("query", "key", "value"), weight.T.chunk(3), layer.bias.chunk(3), strict=True):
                arrays[f"{place}/{name}/kernel"] = rows.T.reshape(dim, heads, -1)
                arrays[f"{place}/{name}/bias"] = bias.reshape(heads, -1)
            continue
        arrays[f"{place}/{kernel}"] = weight.reshape(heads, -1, dim) if module.endswith("attn.proj") else weight
        arrays[f"{place}/bias"] = layer.bias
    arrays = {name: array.detach().numpy() for name, array in arrays.items()}
    if layout == "stacked":
        for name in [name for name in arrays if "encoderblock_0/" in name]:
            every = [arrays.pop(name.replace("_0/", f"_{index}/", 1)) for index in range(depth)]
            arrays[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(every)
    return {root + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("layout", ["original", "optimizer", "big_vision", "stacked"])
def test_npz_in_googles_layout_is_read(layout, tmp_path):
    # in floating point 21 x (51 / 21) is below 51; big_vision keeps the class token out of the positions
    geometry = {**SMALL, "embed_dim": 21, "depth": 3, "mlp_ratio": 51.5 / 21}
    apart = layout in ("big_vision", "stacked")
    source = source_vit(**geometry, no_embed_class=apart)
    assert source.blocks[0].mlp.fc1.out_features == 51
    np.savez(tmp_path / "w.npz", **google_layout(source, layout))
    model = TimmVit(**geometry, no_embed_class=True) if apart else VisionTransformer(**geometry)
    assert load_pretrained_weights(model, tmp_path / "w.npz").transferred == list(source.state_dict())
    assert_same(model, source.state_dict())


def test_npz_is_resampled_as_any_other_file(tmp_path):
    source = source_vit(img_size=24, num_classes=0)
    np.savez(tmp_path / "w.npz", **google_layout(source, "original"))
    save(tmp_path / "w.pth", source.state_dict())
    model, expected = (target_vit(img_size=18, patch_size=3) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    assert load_pretrained_weights(model, tmp_path / "w.npz") == load_pretrained_weights(expected, tmp_path / "w.pth")
    assert_same(model, expected.state_dict())


# ------------------------------------------------------------------------------------- files that are no such weights


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def without(arrays, word):
    return {name: array for name, array in arrays.items() if word not in name}


POSITIONS = "Transformer/posembed_input/pos_embedding"
DAMAGED = {
    "half.pth": "",
    "half.safetensors": "",
    "half.npz": "",
    "missing.pth": "No such file",
    "missing.npz": "No such file",
    "empty.pth": b"",
    "noise.safetensors": bytes(range(256)) * 8,
    "list.pth": [torch.ones(2)],
    "numbers.pth": {"norm.weight": 3},
    "namespace.pth": {"model": {}, "args": argparse.Namespace(lr=1)},
    "infinite.pth": {"norm.weight": torch.tensor([1.0, float("nan")])},
    "foreign.npz": lambda arrays: {"weights": np.ones(3)},
    "hybrid.npz": lambda arrays: {**arrays, "conv_root/kernel": np.ones((3, 3, 3, 8))},
    "no blocks.npz": lambda arrays: without(arrays, "encoderblock"),
    "torn grid.npz": lambda arrays: {**arrays, POSITIONS: np.zeros((1, 15, 24), np.float32)},
    "pickled.npz": lambda arrays: {**arrays, POSITIONS: np.array([{}], dtype=object)},
    "code.pth": Payload,
    "nested code.pth": lambda marker: {"state_dict": {"norm.weight": Payload(marker)}},
    "code.safetensors": lambda marker: pickle.dumps(Payload(marker), protocol=2),
}
TOLD = {
    "code.pth": "more than tensors",
    "infinite.pth": "norm.weight holds NaN or infinity",
    "namespace.pth": "dictionary of tensors",
    "torn grid.npz": "15 positions are not a square",
    "list.pth": "dictionary",
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_file_that_is_damaged_or_carries_code_is_refused_in_one_line_and_changes_nothing(file, tmp_path):
    path, content, marker = tmp_path / file, DAMAGED[file], tmp_path / "ran"
    if file.startswith(("half", "missing")):
        if path.suffix == ".npz":
            np.savez(path, **google_layout(source_vit(), "original"))
        else:
            save(path, source_vit().state_dict())
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        if file.startswith("missing"):
            path.unlink()
    elif path.suffix == ".npz":
        np.savez(path, **content(google_layout(source_vit(), "original")))
    else:
        content = content(marker) if callable(content) else content
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    model = target_vit()
    before = copy_of(model)
    with pytest.raises(PretrainedError) as caught:
        load_pretrained_weights(model, path)
    line = str(caught.value)
    assert f"--pretrained {path}: " in line
    assert "\n" not in line
    assert "weights_only" not in line  # torch's advice to load it unsafely
    assert TOLD.get(file, "") in line
    assert_same(model, before)
    assert not marker.exists()
    if "code" in file:
        pickle.loads(pickle.dumps(Payload(marker)))  # the payload does work, so the test can fail
        assert marker.exists()


def test_weights_of_another_architecture_are_an_error_with_fallback_too(tmp_path):
    cases = {
        "wide": (source_vit(embed_dim=48).state_dict(), "48"),
        "grey": (source_vit(in_chans=1, img_size=32, patch_size=8).state_dict(), "1, 8, 8"),
        "torn": ({**source_vit().state_dict(), "pos_embed": torch.zeros(1, 14, 24)}, "1, 14, 24"),
        "stranger": ({"layer1.weight": torch.ones(3)}, "no tensor"),
        "other prefix": ({**source_vit().state_dict(), "pos_embed": torch.zeros(1, 18, 24)}, "1, 18, 24"),
    }
    for name, (weights, told) in cases.items():
        path = save(tmp_path / f"{name}.pth", weights)
        for fallback in (False, True):
            line = refusal("vit_tiny", 5, 16, path, pretrained_fallback=fallback, **TINY)
            assert told in line
            assert str(path) in line


# ------------------------------------------------------------------------------------------- weights not to be had


FAILURES = {
    "missing": "w.pth",
    "damaged": "w.pth",
    "no timm": "pip install timm",
    "no timm to resample": "pip install timm",
    "no network": "check the network, or give a file with --pretrained PATH",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_weights_that_cannot_be_had_are_one_line_or_with_fallback_a_warning(failure, tmp_path, monkeypatch, caplog):
    path = tmp_path / "w.pth"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the hub refuses at once
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if failure == "damaged":
        path.write_bytes(b"PK nothing")
    if failure == "no timm to resample":
        save(path, source_vit().state_dict())
    if failure.startswith("no timm"):
        monkeypatch.setitem(sys.modules, "timm", None)
    source = True if failure in ("no timm", "no network") else str(path)
    line = refusal("vit_small", 10, pretrained=source, **TINY)
    assert line.startswith("--pretrained")
    assert FAILURES[failure] in line
    assert failure != "no network" or "vit_small_patch16_224" in line

    torch.manual_seed(3)
    expected = build_model("vit_small", 10, **TINY)
    torch.manual_seed(3)
    model = build_model("vit_small", 10, pretrained=source, pretrained_fallback=True, **TINY)
    assert_same(model, expected.state_dict())
    (warning,) = warnings_of(caplog)
    assert warning.startswith(line)
    assert "--pretrained_fallback" in warning
    assert "\n" not in warning
    report = model.pretrained_report
    assert (report.failure, report.reinitialised) == (warning, list(expected.state_dict()))
    assert report.transferred == report.resampled == report.skipped == []
    assert expected.pretrained_report is None


def test_the_large_model_from_scratch_is_warned_about_once_and_others_are_not(tmp_path, caplog):
    small = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    build_model("vit_large_imagenet", 10, 32, tmp_path / "w.pth", pretrained_fallback=True, **small)
    (line,) = warnings_of(caplog)
    assert "from scratch" not in line
    caplog.clear()
    build_model("vit_base_imagenet", 10, 32, **small)
    vit.vit_large_imagenet(10, 32, **small)
    (line,) = warnings_of(caplog)
    assert "vit_large_imagenet from scratch" in line


def test_network_chatter_is_not_shown_and_comes_back(monkeypatch, caplog):
    hub = logging.getLogger("huggingface_hub.utils._http")
    caplog.set_level(logging.INFO, logger="huggingface_hub")

    def no_network(*_, **__):
        hub.warning("Retrying in 1s")
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(timm, "create_model", no_network)
    build_model("vit_small", 10, pretrained=True, pretrained_fallback=True, **TINY)
    (line,) = warnings_of(caplog)
    assert "Name or service not known" in line
    assert "more" not in line
    assert hub.getEffectiveLevel() == logging.INFO


# ---------------------------------------------------------------------------------------------------- wrong requests


TAG, DEIT = {"pretrained": True, "pretrained_tag": "dino"}, "timm/deit_tiny_patch16_224"
WRONG = [
    ("vit_huge", {}, r"vit_huge.*vit_tiny.*res20s.*timm/NAME"),
    ("vit_small", {"pretrained": True, "pretrained_tag": "augreg"}, r"--pretrained_tag augreg:.*dino"),
    ("vit_small", {"pretrained": "w.pth", "pretrained_tag": "dino"}, r"_tag dino: .*w\.pth"),
    ("vit_small", {"pretrained_tag": "dino"}, r"--pretrained_tag dino: .*--pretrained"),
    ("timm/vit_small_patch16_224.dino", TAG, r"--pretrained_tag dino: .*timm/vit_small_patch16_224\.dino"),
    (DEIT, TAG, r"_tag dino: .*fb_in1k"),
    ("timm/vit_small_patch16_36x1_224", {"pretrained": True}, r"no weights for timm/vit_small"),
    ("vit_tiny", {"pretrained": "wieghts"}, r"--pretrained wieghts: neither .*\.npz"),
    ("vit_tiny", {"pretrained": __file__}, r"--pretrained .*\.py: .*\.safetensors"),
    ("res20s", {"pretrained": True}, "--pretrained: res20s has no public weights"),
    ("res18", {"pretrained": "w.pth"}, "res18 takes weights of a file by --init w.pth"),
    ("res20s", {"patch_size": 4}, "--patch_size 4: res20s"),
    ("timm/deit_tny_patch16_224", {}, r"unknown arch.*timm/deit_tiny_patch16_224"),
    ("timm/qqqqqqqq", {}, r"unknown arch.*list_models"),
    ("timm/", {}, "unknown arch"),
    ("deit_tiny_patch16_224", {}, "unknown arch"),
    ("timm/hf-hub:timm/deit_tiny_patch16_224", {}, "unknown arch"),
    ("timm/vit_small_patch16_224.dinno", {}, r"dinno: timm has no such weights.*dino"),
    ("timm/resnet18", {"img_size": 32}, r"timm/resnet18: cannot be built with num_classes=10, img_size=32"),
    (DEIT, {"img_size": 30, "patch_size": 4}, "img_size 30 is not a multiple of patch_size 4"),
    ("timm/deit_small_patch16_224", {"num_heads": 5}, "num_heads=5"),
]


@pytest.mark.parametrize(("arch", "keywords", "told"), WRONG)
def test_wrong_requests_are_errors_of_one_line_with_fallback_too(arch, keywords, told):
    for fallback in (False, True):
        with torch.device("meta"), pytest.raises(ValueError, match=told) as caught:
            build_model(arch, 10, pretrained_fallback=fallback, **keywords)
        assert "\n" not in str(caught.value)
        assert str(caught.value).count(" or timm/") <= 2  # three close names


def test_timm_models_are_timms_own_and_ours_need_no_timm(monkeypatch):
    torch.manual_seed(2)
    expected = timm.create_model("deit_tiny_patch16_224", pretrained=False, num_classes=10, img_size=32, patch_size=4)
    torch.manual_seed(2)
    model = build_model(DEIT, num_classes=10, img_size=32, patch_size=4)
    assert type(model) is type(expected)
    assert_same(model, expected.state_dict())
    assert (model.arch_name, model.pretrained_report) == (DEIT, None)
    assert model.arch_args == {"num_classes": 10, "img_size": 32, "patch_size": 4}
    with torch.device("meta"):
        model = build_model(f"{DEIT}.fb_in1k", num_classes=10)
    assert (model.arch_args, model.patch_embed.img_size) == ({"num_classes": 10}, (224, 224))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "--arch timm/deit_tiny_patch16_224: " in (told := refusal(DEIT, 10, error=ValueError))
    assert "pip install timm" in told
    build_model("vit_tiny", 10, depth=1)
    assert type(build_model("res20s", 10)) is resnet.ResNet
