"""Laws of pretrained weights and of `--arch timm/NAME`: what goes over, what is resampled, what is refused.

No network: all weights are written here from timm models with random values.
"""

import argparse
import logging
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

from models import BUILDERS, build_model, check_arch, is_known, pretrained_source, resnet, vit
from models.vit import (
    MisfitError,
    PretrainedError,
    TransferReport,
    VisionTransformer,
    load_pretrained_weights,
)
from vit_structured_pruning import layout_problem

SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
TINY_TIMM = {"embed_dim": 24, "num_heads": 3, "depth": 2}  # overrides that make any of timm's ViTs small
HEAD = {"head.weight", "head.bias"}
EMBEDDINGS = {"pos_embed", "patch_embed.proj.weight"}

# arch: timm model of the same blocks, arguments, pixels; the larger ones with fewer blocks, to be quick
GEOMETRY = {
    "vit_tiny": ("vit_tiny_patch16_224", {"depth": 9, "mlp_ratio": 2}, 32),
    "vit_small": ("vit_small_patch16_224", {}, 32),
    "vit_base": ("vit_base_patch16_224", {"depth": 2}, 32),
    "vit_small_imagenet": ("vit_small_patch16_224", {"depth": 2}, 224),
    "vit_base_imagenet": ("vit_base_patch16_224", {"depth": 2}, 224),
    "vit_large_imagenet": ("vit_large_patch16_224", {"depth": 1}, 224),
}
TENSORS_A_BLOCK = 12  # weight and bias of norm1, qkv, proj, norm2, fc1, fc2


def source_vit(**arguments):
    """A small timm ViT all of whose values matter."""
    return fill(TimmVit(**{**SMALL, "mlp_ratio": 2.0, **arguments}))


def timm_vit(name, **arguments):
    """A ViT of timm's by name with random values; its own initialisation is slow and left out."""
    return fill(timm.create_model(name, pretrained=False, weight_init="skip", **arguments))


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


@pytest.fixture
def public_weights(monkeypatch):
    """timm without a network: `create_model(..., pretrained=True)` gives small models with random values."""
    asked, real = {}, timm.create_model

    def create_model(name, pretrained=False, **arguments):
        if not pretrained:
            return real(name, pretrained=False, **arguments)
        asked[name] = fill(real(name, **TINY_TIMM, **arguments))
        return asked[name]

    monkeypatch.setattr(timm, "create_model", create_model)
    return asked


# ------------------------------------------------------------------------------------- into our six builders


def check_builder(arch, path):
    name, arguments, pixels = GEOMETRY[arch]
    source = timm_vit(name, **arguments)
    theirs = source.state_dict()
    save(path, theirs)
    model = build_model(arch, 10 if pixels == 32 else 1000, pretrained=str(path), **arguments).eval()
    ours, report = model.state_dict(), model.pretrained_report
    depth = len(source.blocks)
    assert len(ours) == TENSORS_A_BLOCK * depth + 8  # cls_token, pos_embed, and twice patch_embed, norm and head
    assert (report.skipped, report.failure) == ([], "")
    if pixels == 224:
        assert sorted(report.transferred) == sorted(ours)
        assert report.resampled == report.reinitialised == []
        images = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(model(images), source(images), rtol=0, atol=1e-5)
        return
    assert set(report.resampled) == EMBEDDINGS
    assert set(report.reinitialised) == HEAD
    assert sorted(report.transferred) == sorted(set(ours) - EMBEDDINGS - HEAD)
    assert len(report.transferred) == TENSORS_A_BLOCK * depth + 4
    for tensor in report.transferred:
        assert torch.equal(ours[tensor], theirs[tensor]), tensor
    positions = resample_abs_pos_embed(theirs["pos_embed"], [8, 8], num_prefix_tokens=1)
    assert torch.equal(ours["pos_embed"], positions)
    assert torch.equal(ours["pos_embed"][:, 0], theirs["pos_embed"][:, 0])
    assert torch.equal(ours["patch_embed.proj.weight"], resample_patch_embed(theirs["patch_embed.proj.weight"], [4, 4]))
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


@pytest.mark.parametrize("arch", GEOMETRY)
def test_weights_of_timm_go_into_every_builder(arch, tmp_path):
    check_builder(arch, tmp_path / "w.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_base", "vit_small_imagenet", "vit_base_imagenet", "vit_large_imagenet"])
def test_weights_of_timm_go_into_every_builder_at_full_depth(arch, tmp_path, monkeypatch):
    name, _, pixels = GEOMETRY[arch]
    monkeypatch.setitem(GEOMETRY, arch, (name, {}, pixels))
    check_builder(arch, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("arch", "name"),
    [(arch, name) for arch, (name, *_) in GEOMETRY.items() if arch != "vit_tiny"],
)
def test_public_weights_are_timms_default_or_of_the_tag(arch, name, public_weights):
    model = build_model(arch, 10, pretrained=True, **TINY_TIMM)
    assert list(public_weights) == [name]
    assert torch.equal(model.blocks[1].attn.qkv.weight, public_weights[name].blocks[1].attn.qkv.weight)
    assert pretrained_source(arch) == name
    tagged = f"{name}.augreg_in21k"
    model = build_model(arch, 10, pretrained=True, pretrained_tag="augreg_in21k", **TINY_TIMM)
    assert list(public_weights) == [name, tagged]
    assert torch.equal(model.cls_token, public_weights[tagged].cls_token)
    assert pretrained_source(arch, "augreg_in21k") == tagged


def test_builders_of_the_module_report_too(public_weights):
    assert vit.vit_small(**TINY_TIMM).pretrained_report is None
    model = vit.vit_small(num_classes=7, pretrained=True, **TINY_TIMM)
    assert isinstance(model.pretrained_report, TransferReport)
    assert len(model.pretrained_report.transferred) == 2 * TENSORS_A_BLOCK + 4
    assert torch.equal(model.norm.weight, public_weights["vit_small_patch16_224"].norm.weight)


def test_only_as_many_classes_share_a_head(tmp_path):
    path = save(tmp_path / "w.pt", source_vit().state_dict())
    same, other = target_vit(), target_vit(num_classes=6)
    assert load_pretrained_weights(same, path).reinitialised == []
    before = copy_of(other)
    assert set(load_pretrained_weights(other, path).reinitialised) == HEAD
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in HEAD)


# --------------------------------------------------------------------------------------------- kinds of files


WRAPPED = {
    "plain.pt": lambda weights: weights,
    "plain.pth.tar": lambda weights: weights,
    "state_dict.pth": lambda weights: {"state_dict": weights, "epoch": 3},
    "model.pth": lambda weights: {"model": weights, "optimizer": {"lr": 0.1}},
    "both.pth": lambda weights: {"state_dict": {"model": weights}},
    "module.pth": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "module.safetensors": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "deep.tar": lambda weights: {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
    "half.pth": lambda weights: {name: tensor.half() for name, tensor in weights.items()},
}


@pytest.mark.parametrize("file", WRAPPED)
def test_wrappings_are_taken_off(file, tmp_path):
    source = source_vit().half().float()
    path = save(tmp_path / file, WRAPPED[file](source.state_dict()))
    model = target_vit()
    report = load_pretrained_weights(model, path)
    assert sorted(report.transferred) == sorted(source.state_dict())
    assert report.skipped == []
    assert_same(model, source.state_dict())


def test_half_precision_is_resampled_in_single(tmp_path):
    weights = {name: tensor.half() for name, tensor in source_vit().state_dict().items()}
    model = target_vit(img_size=24, patch_size=3)
    load_pretrained_weights(model, save(tmp_path / "w.pth", weights))
    single = resample_abs_pos_embed(weights["pos_embed"].float(), [8, 8], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, single)
    assert not torch.equal(single, single.half().float())


def test_a_file_with_more_than_tensors_does_not_get_torchs_advice_to_load_it_unsafely(tmp_path):
    path = save(tmp_path / "w.pth", {"model": source_vit().state_dict(), "args": argparse.Namespace(lr=1)})
    with pytest.raises(PretrainedError, match="more than tensors") as caught:
        load_pretrained_weights(target_vit(), path)
    assert "weights_only" not in str(caught.value)


def test_double_models_take_single_weights(tmp_path):
    path = save(tmp_path / "w.pth", source_vit().state_dict())
    expected = target_vit(img_size=24)
    load_pretrained_weights(expected, path)
    model = target_vit(img_size=24).double()
    load_pretrained_weights(model, path)
    assert_same(model, {name: tensor.double() for name, tensor in expected.state_dict().items()})


def google_layout(model, layout):
    """{name: array} of the files that vision_transformer ("original") and big_vision publish for a ViT."""
    root = {"original": "", "optimizer": "opt/target/", "big_vision": "params/", "stacked": "params/img/"}[layout]
    attention, mlp, norm = (1, 3, 2) if layout in ("original", "optimizer") else (0, 0, 1)
    arrays = {}
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def dense(place, name, shape=None):
        kernel, bias = weights[f"{name}.weight"].T, weights[f"{name}.bias"]
        arrays[f"{place}/kernel"] = kernel if shape is None else kernel.reshape(shape)
        arrays[f"{place}/bias"] = bias

    def scale(place, name):
        arrays[f"{place}/scale"], arrays[f"{place}/bias"] = weights[f"{name}.weight"], weights[f"{name}.bias"]

    dim, heads = model.embed_dim, model.blocks[0].attn.num_heads
    trunk = f"{root}Transformer/"
    arrays[f"{root}embedding/kernel"] = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    arrays[f"{root}embedding/bias"] = weights["patch_embed.proj.bias"]
    place = f"{trunk}posembed_input/pos_embedding" if norm == 2 else f"{root}pos_embedding"
    arrays[place] = weights["pos_embed"]
    if "cls_token" in weights:
        arrays[f"{root}cls"] = weights["cls_token"]
    scale(f"{trunk}encoder_norm", "norm")
    if "head.weight" in weights:
        dense(f"{root}head", "head")
    for index in range(len(model.blocks)):
        block, ours = f"{trunk}encoderblock_{index}/", f"blocks.{index}."
        scale(f"{block}LayerNorm_0", f"{ours}norm1")
        scale(f"{block}LayerNorm_{norm}", f"{ours}norm2")
        rows = weights[f"{ours}attn.qkv.weight"].reshape(3, heads, dim // heads, dim)
        bias = weights[f"{ours}attn.qkv.bias"].reshape(3, heads, dim // heads)
        for part, name in enumerate(("query", "key", "value")):
            arrays[f"{block}MultiHeadDotProductAttention_{attention}/{name}/kernel"] = rows[part].transpose(2, 0, 1)
            arrays[f"{block}MultiHeadDotProductAttention_{attention}/{name}/bias"] = bias[part]
        out = f"{block}MultiHeadDotProductAttention_{attention}/out"
        dense(out, f"{ours}attn.proj", (heads, dim // heads, dim))
        dense(f"{block}MlpBlock_{mlp}/Dense_0", f"{ours}mlp.fc1")
        dense(f"{block}MlpBlock_{mlp}/Dense_1", f"{ours}mlp.fc2")
    if layout == "stacked":
        first = f"{trunk}encoderblock_0/"
        for name in [name for name in arrays if name.startswith(first)]:
            every = [arrays.pop(name.replace("_0/", f"_{index}/", 1)) for index in range(len(model.blocks))]
            arrays[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(every)
    return arrays


@pytest.mark.parametrize("layout", ["original", "optimizer", "big_vision", "stacked"])
def test_npz_in_googles_layout_gives_timms_logits(layout, tmp_path):
    # in floating point 21 x (51 / 21) is below 51; big_vision keeps the class token out of the positions
    geometry = {**SMALL, "embed_dim": 21, "depth": 3, "mlp_ratio": 51.5 / 21}
    apart = layout in ("big_vision", "stacked")
    source = source_vit(**geometry, no_embed_class=apart)
    assert source.blocks[0].mlp.fc1.out_features == 51
    path = tmp_path / "w.npz"
    np.savez(path, **google_layout(source, layout))
    models = [TimmVit(**geometry, no_embed_class=apart).eval()]
    models += [] if apart else [VisionTransformer(**geometry).eval()]
    images = torch.randn(3, 3, 16, 16)
    for model in models:
        report = load_pretrained_weights(model, path)
        assert sorted(report.transferred) == sorted(source.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(images), source(images), rtol=0, atol=1e-6)


def test_npz_is_resampled_as_any_other_file(tmp_path):
    source = source_vit(img_size=24, num_classes=0)
    np.savez(tmp_path / "w.npz", **google_layout(source, "original"))
    save(tmp_path / "w.pth", source.state_dict())
    torch.manual_seed(0)
    model = target_vit(img_size=18, patch_size=3)
    expected = target_vit(img_size=18, patch_size=3)
    expected.load_state_dict(model.state_dict())
    assert load_pretrained_weights(model, tmp_path / "w.npz") == load_pretrained_weights(expected, tmp_path / "w.pth")
    assert_same(model, expected.state_dict())


@pytest.mark.parametrize("damage", ["foreign", "hybrid", "no blocks", "torn grid", "pickled", "half", "missing"])
def test_other_npz_is_refused_in_one_line(damage, tmp_path):
    path, arrays = tmp_path / "w.npz", google_layout(source_vit(), "original")
    if damage == "foreign":
        arrays = {"weights": np.ones(3)}
    elif damage == "hybrid":
        arrays["conv_root/kernel"] = np.ones((3, 3, 3, 8))
    elif damage == "no blocks":
        arrays = {name: array for name, array in arrays.items() if "encoderblock" not in name}
    elif damage == "torn grid":
        arrays["Transformer/posembed_input/pos_embedding"] = np.zeros((1, 15, 24), np.float32)
    elif damage == "pickled":
        arrays["Transformer/posembed_input/pos_embedding"] = np.array([{}], dtype=object)
    np.savez(path, **arrays)
    if damage == "half":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "missing":
        path.unlink()
    model = target_vit()
    before = copy_of(model)
    with pytest.raises(PretrainedError) as caught:
        load_pretrained_weights(model, path)
    assert f"--pretrained {path}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("15 positions are not a square" in str(caught.value)) == (damage == "torn grid")
    assert_same(model, before)


# --------------------------------------------------------------------------------------- reinit, log, misfits


@pytest.mark.parametrize("pixels", [16, 24])
def test_reinit_keeps_the_random_patch_embedding(pixels, tmp_path):
    path = save(tmp_path / "w.pth", source_vit().state_dict())
    torch.manual_seed(5)
    model = target_vit(img_size=pixels)
    before = copy_of(model)
    torch.manual_seed(5)
    geometry = {name: value for name, value in SMALL.items() if name not in ("img_size", "num_classes")}
    built = build_model("vit_tiny", 5, pixels, path, patch_embed="reinit", **geometry)
    report = load_pretrained_weights(model, path, patch_embed="reinit")
    assert built.pretrained_report == report
    assert set(report.reinitialised) == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert report.resampled == ([] if pixels == 16 else ["pos_embed"])
    for name in report.reinitialised:
        assert torch.equal(model.state_dict()[name], before[name])
    assert_same(built, model.state_dict())


def test_unknown_way_with_patches_is_refused(tmp_path):
    path = save(tmp_path / "w.pth", source_vit().state_dict())
    with pytest.raises(ValueError, match=r"--patch_embed guess: .*resample.*reinit"):
        load_pretrained_weights(target_vit(), path, patch_embed="guess")


def test_log_says_how_many_and_names_them_for_the_curious(tmp_path, caplog):
    weights = source_vit().state_dict()
    weights["fc_norm.weight"] = torch.ones(24)
    path = save(tmp_path / "w.pth", weights)
    model = target_vit(img_size=24, num_classes=6)
    with caplog.at_level(logging.DEBUG, logger="models.vit"):
        load_pretrained_weights(model, path)
    lines = {level: [r.getMessage() for r in caplog.records if r.levelno == level] for level in (20, 10)}
    assert lines[20] == [
        f"pretrained weights from {path}: 29 tensors transferred, 1 resampled, 2 re-initialised, 1 skipped"
    ]
    assert "resampled: pos_embed" in lines[10]
    assert "reinitialised: head.weight, head.bias" in lines[10]
    assert "skipped: fc_norm.weight" in lines[10]
    assert [line for line in lines[10] if line.startswith("transferred: cls_token, ")]


def test_weights_of_another_architecture_are_an_error_with_fallback_too(tmp_path):
    wide = save(tmp_path / "wide.pth", source_vit(embed_dim=48).state_dict())
    grey = save(tmp_path / "grey.pth", source_vit(in_chans=1, img_size=32, patch_size=8).state_dict())
    torn = source_vit().state_dict()
    torn["pos_embed"] = torch.zeros(1, 14, 24)
    torn = save(tmp_path / "torn.pth", torn)
    stranger = save(tmp_path / "stranger.pth", {"layer1.weight": torch.ones(3)})
    for path, told in ((wide, "48"), (grey, "1, 8, 8"), (torn, "1, 14, 24"), (stranger, "no tensor")):
        for fallback in (False, True):
            with pytest.raises(MisfitError) as caught:
                build_model("vit_tiny", 5, 16, path, pretrained_fallback=fallback, embed_dim=24, depth=2, num_heads=3)
            assert told in str(caught.value)
            assert "\n" not in str(caught.value)
            assert str(path) in str(caught.value)


# ----------------------------------------------------------------------------------- weights not to be had


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The hub refuses at once, and has nothing in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def request(failure, tmp_path, monkeypatch):
    """Arguments of `build_model` whose weights cannot be had, and what the line must say."""
    path = tmp_path / "w.pth"
    if failure == "missing":
        return {"pretrained": str(path)}, str(path)
    if failure == "damaged":
        path.write_bytes(b"PK nothing")
        return {"pretrained": str(path)}, str(path)
    if failure == "no timm":
        monkeypatch.setitem(sys.modules, "timm", None)
        return {"pretrained": True}, "pip install timm"
    if failure == "no timm to resample":
        path = save(path, timm_vit("vit_small_patch16_224", **TINY_TIMM).state_dict())
        monkeypatch.setitem(sys.modules, "timm", None)
        return {"pretrained": str(path)}, "pip install timm"
    return {"pretrained": True}, r"vit_small_patch16_224"


FAILURES = ["missing", "damaged", "no timm", "no timm to resample", "no network"]


@pytest.mark.parametrize("failure", FAILURES)
def test_without_fallback_it_is_one_line_that_says_what_to_do(failure, tmp_path, monkeypatch, offline):
    arguments, told = request(failure, tmp_path, monkeypatch)
    with pytest.raises(PretrainedError) as caught:
        build_model("vit_small", 10, **TINY_TIMM, **arguments)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("--pretrained")
    assert told in line
    assert {"no network": "check the network, or give a file with --pretrained PATH"}.get(failure, "") in line


@pytest.mark.parametrize("failure", FAILURES)
def test_with_fallback_it_is_one_warning_and_random_weights(failure, tmp_path, monkeypatch, offline, caplog):
    arguments, told = request(failure, tmp_path, monkeypatch)
    torch.manual_seed(3)
    expected = build_model("vit_small", 10, **TINY_TIMM)
    torch.manual_seed(3)
    with caplog.at_level(logging.INFO):
        model = build_model("vit_small", 10, pretrained_fallback=True, **TINY_TIMM, **arguments)
    assert_same(model, expected.state_dict())
    (line,) = warnings_of(caplog)
    assert told in line
    assert "--pretrained_fallback" in line
    assert "\n" not in line
    report = model.pretrained_report
    assert report.failure == line
    assert report.reinitialised == list(expected.state_dict())
    assert report.transferred == report.resampled == report.skipped == []
    assert expected.pretrained_report is None


def test_fallback_changes_nothing_when_the_weights_are_there(tmp_path, caplog):
    weights = source_vit().state_dict()
    path = save(tmp_path / "w.pth", weights)
    model = build_model("vit_tiny", 5, 16, path, pretrained_fallback=True, embed_dim=24, depth=2)
    assert model.pretrained_report.failure == ""
    assert not warnings_of(caplog)
    assert_same(model, weights)


def test_fallback_of_the_large_model_warns_once(tmp_path, caplog):
    small = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    build_model("vit_large_imagenet", 10, 32, tmp_path / "w.pth", pretrained_fallback=True, **small)
    assert len(warnings_of(caplog)) == 1
    caplog.clear()
    build_model("vit_large_imagenet", 10, 32, **small)
    (line,) = warnings_of(caplog)
    assert "vit_large_imagenet from scratch" in line


def test_large_with_weights_is_not_warned_about(public_weights, caplog):
    build_model("vit_large_imagenet", 10, pretrained=True, **TINY_TIMM)
    assert not warnings_of(caplog)


def test_network_chatter_is_not_shown_and_comes_back(monkeypatch, caplog):
    hub = logging.getLogger("huggingface_hub.utils._http")
    caplog.set_level(logging.INFO, logger="huggingface_hub")

    def no_network(*_, **__):
        hub.warning("Retrying in 1s")
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(timm, "create_model", no_network)
    build_model("vit_small", 10, pretrained=True, pretrained_fallback=True, **TINY_TIMM)
    (line,) = warnings_of(caplog)
    assert "Name or service not known" in line
    assert "more" not in line
    assert hub.getEffectiveLevel() == logging.INFO


@pytest.mark.parametrize("tag", [None, "augreg_in21k"])
def test_vit_tiny_starts_from_scratch_and_takes_no_tag(tag, caplog):
    if tag:
        with pytest.raises(ValueError, match="--pretrained_tag augreg_in21k: vit_tiny has no public"):
            build_model("vit_tiny", 10, pretrained=True, pretrained_tag=tag)
        return
    model = build_model("vit_tiny", 10, pretrained=True)
    (line,) = warnings_of(caplog)
    assert line == model.pretrained_report.failure
    assert "vit_tiny" in line
    assert "scratch" in line
    assert len(model.pretrained_report.reinitialised) == 9 * TENSORS_A_BLOCK + 8
    assert pretrained_source("vit_tiny") is None


WRONG = {
    "unknown arch": ("vit_huge", {}, r"vit_huge.*vit_tiny.*res20s.*timm/NAME"),
    "tag typo": ("vit_small", {"pretrained": True, "pretrained_tag": "augreg"}, r"--pretrained_tag augreg:.*dino"),
    "tag and path": ("vit_small", {"pretrained": "w.pth", "pretrained_tag": "dino"}, r"_tag dino: .*w\.pth"),
    "tag alone": ("vit_small", {"pretrained_tag": "dino"}, r"--pretrained_tag dino: .*--pretrained"),
    "tag twice": (
        "timm/vit_small_patch16_224.dino",
        {"pretrained": True, "pretrained_tag": "dino"},
        r"--pretrained_tag dino: .*timm/vit_small_patch16_224\.dino",
    ),
    "tag of timm": (
        "timm/deit_tiny_patch16_224",
        {"pretrained": True, "pretrained_tag": "x"},
        r"_tag x: .*fb_in1k",
    ),
    "no weights": ("timm/vit_small_patch16_36x1_224", {"pretrained": True}, r"no weights for timm/vit_small"),
    "neither file nor model": ("vit_tiny", {"pretrained": "wieghts"}, r"--pretrained wieghts: neither .*\.npz"),
    "not weights": ("vit_tiny", {"pretrained": __file__}, r"--pretrained .*\.py: .*\.safetensors"),
    "resnet": ("res20s", {"pretrained": True}, "--pretrained: res20s has no public weights"),
    "resnet and file": ("res18", {"pretrained": "w.pth"}, "--pretrained: res18 has no public weights"),
    "resnet with patches": ("res20s", {"patch_size": 4}, "--patch_size 4: res20s"),
}


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_errors_with_fallback_too(case, fallback):
    arch, keywords, told = WRONG[case]
    with pytest.raises(ValueError, match=told) as caught:
        build_model(arch, 10, pretrained_fallback=fallback, **keywords)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ ResNets


@pytest.mark.parametrize("arch", resnet.BUILDERS)
def test_resnets_are_built_by_name(arch):
    assert is_known(arch)
    with torch.device("meta"):
        model = build_model(arch, 7, 28)
    assert type(model) is resnet.ResNet
    assert (model.fc.out_features, model.img_size, model.pretrained_report) == (7, 28, None)
    assert pretrained_source(arch) is None


# ---------------------------------------------------------------------------------------------- timm/NAME


def test_timm_models_are_timms_own():
    torch.manual_seed(2)
    expected = timm.create_model("deit_tiny_patch16_224", pretrained=False, num_classes=10, img_size=32, patch_size=4)
    torch.manual_seed(2)
    model = build_model("timm/deit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4)
    assert type(model) is type(expected)
    assert_same(model, expected.state_dict())
    assert model.arch_name == "timm/deit_tiny_patch16_224"
    assert model.arch_args == {"num_classes": 10, "img_size": 32, "patch_size": 4}
    assert model.pretrained_report is None
    again = timm.create_model(model.arch_name.removeprefix("timm/"), pretrained=False, **model.arch_args)
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.device("meta"):
        model = build_model("timm/deit_tiny_patch16_224", num_classes=10)
    assert model.arch_args == {"num_classes": 10}
    assert model.patch_embed.img_size == (224, 224)


FAMILIES = {
    "class token": ("vit_tiny_patch16_224", {}, 1),
    "averaged": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 1),
    "DeiT": ("deit_tiny_patch16_224", {}, 1),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", {}, 2),
    "DeiT III": ("deit3_small_patch16_224", {}, 0),  # no position for the class token
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 0),
    "DINOv2": ("vit_small_patch14_dinov2", {"img_size": 56}, 1),
    "averaged registers": ("vit_medium_patch16_reg4_gap_256", {}, 0),
    "q and k norm": ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_families_transfer_and_are_plain_vits(family, tmp_path):
    name, arguments, prefix = FAMILIES[family]
    source = timm_vit(name, **TINY_TIMM, **arguments)
    weights = source.state_dict()
    path = save(tmp_path / "w.safetensors", weights)
    new = {**TINY_TIMM, **arguments, "img_size": 32, "patch_size": 4}
    model = build_model(f"timm/{name}", 10, pretrained=path, **new).eval()
    ours, report = model.state_dict(), model.pretrained_report
    # timm's own path from a checkpoint to another geometry
    expected = checkpoint_filter_fn(dict(weights), timm.create_model(name, pretrained=False, **new))
    heads = {item for item in ours if item.startswith(("head.", "head_dist."))}
    assert report.skipped == []
    assert len(heads) == (4 if family == "distilled DeiT" else 2)
    assert set(report.resampled) == EMBEDDINGS
    assert set(report.reinitialised) == heads
    assert set(report.transferred) == set(ours) - EMBEDDINGS - heads
    for item in [*report.transferred, *report.resampled]:
        torch.testing.assert_close(ours[item], expected[item], rtol=0, atol=1e-6)
    assert ours["pos_embed"].shape[1] == 64 + prefix
    assert torch.equal(ours["pos_embed"][:, :prefix], weights["pos_embed"][:, :prefix])
    assert layout_problem(model) is None
    logits = model.train()(torch.randn(2, 3, 32, 32))
    logits.square().sum().backward()
    assert logits.shape == (2, 10)
    assert all(parameter.grad is not None for parameter in model.parameters())

    same = build_model(f"timm/{name}", source.num_classes, pretrained=path, **TINY_TIMM, **arguments).eval()
    assert_same(same, weights)
    assert set(same.pretrained_report.transferred) == set(weights)
    images = torch.randn(1, 3, *source.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(same(images), source(images), rtol=0, atol=1e-5)


def test_positions_of_other_prefix_tokens_are_refused(tmp_path):
    small = {**TINY_TIMM, "img_size": 64}
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, **small)
    path = save(tmp_path / "w.pth", distilled.state_dict())
    with pytest.raises(MisfitError, match=r"pos_embed.*18.*65"):
        build_model("timm/deit_tiny_patch16_224", 10, 32, path, patch_size=4, **TINY_TIMM)


def test_public_weights_of_timm_models_go_the_same_way(public_weights, caplog):
    name = "deit_tiny_patch16_224"
    with caplog.at_level(logging.INFO, logger="models.vit"):
        model = build_model(f"timm/{name}", 10, 32, True, patch_size=4, **TINY_TIMM)
    assert list(public_weights) == [name]
    assert set(model.pretrained_report.resampled) == EMBEDDINGS
    assert "28 tensors transferred, 2 resampled, 2 re-initialised, 0 skipped" in caplog.text
    assert torch.equal(model.blocks[0].mlp.fc1.weight, public_weights[name].blocks[0].mlp.fc1.weight)
    build_model(f"timm/{name}", 10, 32, True, pretrained_tag="fb_in1k", patch_size=4, **TINY_TIMM)
    build_model("timm/vit_small_patch16_224.dino", 10, 32, True, patch_size=4, **TINY_TIMM)
    assert list(public_weights) == [name, f"{name}.fb_in1k", "vit_small_patch16_224.dino"]


def test_double_is_trained_in_double():
    torch.set_default_dtype(torch.float64)
    try:
        model = build_model("timm/vit_small_patch14_reg4_dinov2", 10, 28, patch_size=14, **TINY_TIMM)
        model(torch.randn(2, 3, 28, 28)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float64}


REFUSED = {
    "timm/deit_tny_patch16_224": ({}, r"unknown arch.*timm/deit_tiny_patch16_224"),
    "timm/qqqqqqqq": ({}, r"unknown arch.*list_models"),
    "timm/": ({}, "unknown arch"),
    "timm/hf-hub:timm/deit_tiny_patch16_224": ({}, "unknown arch"),
    "timm/vit_small_patch16_224.dinno": ({}, r"dinno: timm has no such weights.*dino"),
    "timm/resnet18": ({"img_size": 32}, r"timm/resnet18: cannot be built with num_classes=10, img_size=32"),
    "timm/resnet26": ({"patch_size": 4}, r"timm/resnet26: cannot be built with num_classes=10, patch_size=4"),
    "timm/deit_tiny_patch16_224": ({"img_size": 30, "patch_size": 4}, "img_size 30 is not a multiple of patch_size 4"),
    "timm/deit_small_patch16_224": ({"num_heads": 5}, "num_heads=5"),
}


@pytest.mark.parametrize("arch", REFUSED)
def test_what_timm_cannot_build_is_refused_in_one_line(arch):
    arguments, told = REFUSED[arch]
    with torch.device("meta"), pytest.raises(ValueError, match=told) as caught:
        build_model(arch, 10, **arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(" or timm/") <= 2  # three close names


def test_a_timm_model_without_timm_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="--arch timm/deit_tiny_patch16_224: .*pip install timm") as caught:
        build_model("timm/deit_tiny_patch16_224", 10)
    assert "\n" not in str(caught.value)
    build_model("vit_tiny", 10, depth=1)  # ours need no timm


def test_known_names():
    known = ["vit_tiny", "res56s", "timm/deit_tiny_patch16_224", "timm/deit_tiny_patch16_224.fb_in1k"]
    unknown = ["deit_tiny_patch16_224", "timm/vit_tiny", "timm/deit_tiny_patch16_224.fb", "timm/", ""]
    assert all(is_known(arch) for arch in [*known, *BUILDERS])
    assert not any(is_known(arch) for arch in unknown)
    assert check_arch("timm/deit_tiny_patch16_224") is None
    assert pretrained_source("timm/deit_tiny_patch16_224") == "deit_tiny_patch16_224"
    assert pretrained_source("timm/deit_tiny_patch16_224", "fb_in1k") == "deit_tiny_patch16_224.fb_in1k"
    assert pretrained_source("timm/vit_small_patch16_36x1_224") is None
