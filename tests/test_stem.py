"""Laws of `--stem conv`: its costs, that all behind it stays, and that a run with it prunes, exports and reloads."""

import json

import pytest
import timm
import torch
from micro import DIM, MICRO, WHOLE, assert_same_tensors, call, largest_difference, load, vit_micro
from torch import nn

import export
import main_imp_fillback as entry
from dataset import DATASETS
from engine.averaging import Average
from engine.distill import named_teacher
from engine.optimizer import parameter_groups
from families.vit import vit_macs
from models import build_model, from_weights
from models.pretrained import load_pretrained_weights
from models.vit import VisionTransformer

GEOMETRY = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
UNITS = "--struct rsst --vit_structured --vit_prune_target both --rate 0.5"
STEM = "patch_embed."

# pixels, patch size; the stem's parameters and multiply-accumulates in D = 192: for every convolution kernel and batch
# norm, then the 1x1 with its bias; for every convolution pixels of what it gives times kernel
BY_HAND = {
    (32, 4): (
        27 * 96 + 2 * 96 + 9 * 96 * 192 + 2 * 192 + 192 * 192 + 192,
        256 * 27 * 96 + 64 * 9 * 96 * 192 + 64 * 192 * 192,
    ),
    (28, 2): (27 * 192 + 2 * 192 + 192 * 192 + 192, 196 * 27 * 192 + 196 * 192 * 192),
    (64, 8): (
        27 * 48 + 2 * 48 + 9 * 48 * 96 + 2 * 96 + 9 * 96 * 192 + 2 * 192 + 192 * 192 + 192,
        1024 * 27 * 48 + 256 * 9 * 48 * 96 + 64 * 9 * 96 * 192 + 64 * 192 * 192,
    ),
}


def refreshed(model, seed=0):
    """The model in eval mode with weights and statistics off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.2
                tensor.add_(noise.abs() if name.endswith("var") else noise)
    return model.eval()


def timm_vit(**geometry):
    """The same network of timm's own parts."""
    width, sizes = geometry["embed_dim"], {**geometry, "patch_size": 1}
    stem = nn.Sequential(
        timm.layers.ConvNormAct(3, width // 2, kernel_size=3, stride=2),
        timm.layers.ConvNormAct(width // 2, width, kernel_size=3, stride=2),
    )
    embed = lambda **options: timm.layers.HybridEmbed(stem, **options)  # noqa: E731
    return timm.models.vision_transformer.VisionTransformer(**sizes, mlp_ratio=2, embed_layer=embed)


# ----------------------------------------------------------------------------------------------- what it is and costs
@pytest.mark.parametrize(("pixels", "patch"), BY_HAND)
def test_counts_by_hand(pixels, patch, capsys):
    parameters, macs = BY_HAND[pixels, patch]
    tokens = (pixels // patch) ** 2
    with torch.device("meta"):
        plain, conv = (build_model("vit_tiny", 10, pixels, patch_size=patch, stem=stem) for stem in ("patch", "conv"))
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, conv)]
    projection = 3 * patch * patch * 192
    assert counts[1] == counts[0] - projection - 192 + parameters
    assert vit_macs(conv) == vit_macs(plain) - tokens * projection + macs
    flags = f"--dry_run --stem conv --dataset cifar10 --img_size {pixels} --patch_size {patch} --pruning_times 1"
    assert call(flags.split()) == 0
    plan = capsys.readouterr().out
    assert f"{counts[1]:,} parameters, 2,654,208 of them prunable weights" in plan
    assert plan.split("About")[0].split()[-2] == f"{vit_macs(conv) / 1e9:.4f}"


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_resnet26d_224"])
def test_a_hybrids_backbone_counts_too(name):
    model = timm.create_model(name, img_size=64, depth=1).eval()
    seen = []

    def count(conv, _, out):
        seen.append(out.shape[2] * out.shape[3] * conv.weight.numel())

    convolutions = [module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions:
        conv.register_forward_hook(count)
    model(torch.zeros(1, 3, 64, 64))
    embedding = sum(seen)
    assert len(seen) == len(convolutions) > 1
    tokens, dim = model.patch_embed.num_patches + 1, model.embed_dim
    linear = sum(module.weight.numel() for module in model.blocks.modules() if isinstance(module, nn.Linear))
    assert vit_macs(model) == embedding + tokens * linear + 2 * tokens**2 * dim + model.head.weight.numel()


def test_it_is_timms_by_name_and_value():
    ours, theirs = refreshed(VisionTransformer(**GEOMETRY, stem="conv")), timm_vit(**GEOMETRY).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = ours.double()(images)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, theirs.double()(images), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"12x12.*16"):
        ours(images[..., :12, :12])


def test_fresh_weights_are_pytorchs():
    torch.manual_seed(3)
    embed = VisionTransformer(**GEOMETRY, stem="conv").patch_embed
    conv, norm = embed.backbone[1].conv.weight.detach(), embed.backbone[1].bn
    assert float(conv.abs().max()) <= (12 * 9) ** -0.5
    assert float(conv.std()) == pytest.approx((12 * 9 * 3) ** -0.5, rel=0.05)
    assert set(norm.weight.tolist()) | set(norm.running_var.tolist()) == {1.0}
    before = conv.clone()
    embed.reset_parameters()
    assert not torch.equal(conv, before)


def test_weights_know_their_stem():
    for stem in ("conv", "patch"):
        model = refreshed(build_model("vit_tiny", 7, 24, patch_size=8, stem=stem, depth=9))
        again = from_weights("vit_tiny", model.state_dict())
        assert_same_tensors(again.state_dict(), model.state_dict())


# ------------------------------------------------------------------------------------------------ how it is trained
def test_kernels_decay_and_the_stem_is_the_first_layer(house):
    model = vit_micro(stem="conv")
    groups = parameter_groups(entry.parse_args([*MICRO, "--layer_decay", "0.5", "--weight_decay", "0.1"]), model)
    found = {id(p): (group["weight_decay"], group["scale"]) for group in groups for p in group["params"]}
    for name, parameter in model.patch_embed.named_parameters():
        kernel = name.endswith("conv.weight") or name == "proj.weight"
        assert found[id(parameter)] == (0.1 if kernel else 0.0, 0.125), name


def test_statistics_are_averaged_and_their_count_is_kept():
    model = vit_micro(stem="conv")
    average = Average(model, 0.5)
    norm, kept = model.patch_embed.backbone[0].bn, average.model.patch_embed.backbone[0].bn
    expected = torch.zeros_like(norm.running_mean)
    for step in range(1, 4):
        model.train()(torch.randn(2, 3, 16, 16))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * norm.running_mean
        torch.testing.assert_close(kept.running_mean, expected)
    assert int(kept.num_batches_tracked) == 3


def test_a_small_network_trains_as_the_masked_one_and_statistics_rewind(float64, seen):
    flags = f"{UNITS} --stem conv --reg_finish 0.5 --pruning_times 2".split()
    compact, masked = seen(*flags), seen(*flags, "--no-compact_training")
    assert compact.steps[1, 6].width < masked.steps[1, 6].width
    for key, step in compact.steps.items():
        assert largest_difference(step.weights, masked.steps[key].weights) < 1e-9, key
    mean = "patch_embed.backbone.2.bn.running_mean"
    assert compact.steps[0, 6].weights[mean].abs().max() > 0
    assert compact.starts[1].weights[mean].abs().max() == 0


@pytest.mark.parametrize("flags", [UNITS, "--struct imp --prune_patch_embed --rate 0.4"])
def test_what_a_run_exports_reloads_here_and_in_plain_timm(flags, train, monkeypatch):
    base = [flag for flag in MICRO if flag != "--no-export"]
    folder = train(f"{flags} --stem conv --pruning_times 2", base=base)
    proof = json.loads((folder / "model" / "parity.json").read_text())
    assert proof["max_difference_float64"] < 1e-12
    small, config = export.load(folder / "model"), json.loads((folder / "model" / "config.json").read_text())
    assert config["stem"] == [[3, 6], [6, 12], [12, 24]]
    by_hand = 27 * 6 + 9 * (6 * 12 + 12 * 24) + 2 * (6 + 12 + 24) + 24 * 24 + 24
    assert config["parameters"]["dense"] == WHOLE - 3 * 64 * DIM - DIM + by_hand
    best = load(folder / "best.pt")["weights"]
    for name, tensor in small.patch_embed.state_dict().items():
        assert torch.equal(tensor, best[f"{STEM}{name}"]), name
    assert bool((small.patch_embed.proj.weight == 0).any()) == ("--prune_patch_embed" in flags)
    assert small.patch_embed.backbone[0].bn.running_mean.abs().max() > 0
    found = {}
    snippet = (folder / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder / "model")
    exec(snippet, found)
    images = torch.randn(3, 3, 16, 16)
    assert type(found["model"]).__module__.startswith("timm.")
    torch.testing.assert_close(found["model"](images), small(images), rtol=0, atol=1e-6)
    student = entry.parse_args([*MICRO, "--teacher", str(folder / "checkpoint.pt")])
    last = vit_micro(stem="conv")
    last.load_state_dict(load(folder / "checkpoint.pt")["weights"])
    teacher = named_teacher(student, DATASETS["digits"], vit_micro(), export.load)
    torch.testing.assert_close(teacher(images), last.eval()(images))


@pytest.mark.slow
def test_onnx_computes_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export.to_onnx(refreshed(vit_micro(stem="conv")), tmp_path / "model.onnx") < 1e-4


def test_a_checkpoint_that_knows_no_stem_teaches_a_run_with_one(house, tmp_path):
    plain = refreshed(vit_micro())
    flags = vars(entry.parse_args(list(MICRO)))
    del flags["stem"]
    content = {"args": {name: value for name, value in flags.items() if name != "notes"}, "weights": plain.state_dict()}
    torch.save(content, tmp_path / "old.pt")
    student = entry.parse_args([*MICRO, "--stem", "conv", "--teacher", str(tmp_path / "old.pt")])
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        named_teacher(student, DATASETS["digits"], vit_micro(), export.load)(images), plain(images)
    )


# --------------------------------------------------------------------------------------------------- pretrained starts
def test_pretrained_blocks_transfer_and_the_stem_starts_anew(tmp_path, caplog):
    source = refreshed(VisionTransformer(**{**GEOMETRY, "patch_size": 2}))
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    model = VisionTransformer(**GEOMETRY, stem="conv")
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level("INFO"):
        report = load_pretrained_weights(model, tmp_path / "plain.pth")
    assert "--stem conv" in caplog.text
    assert "random weights" in caplog.text
    assert report.resampled == ["pos_embed"]
    assert report.reinitialised == [name for name in fresh if name.startswith(STEM)]
    for name, tensor in model.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(tensor, fresh[name] if name.startswith(STEM) else source.state_dict()[name]), name


def test_pretrained_weights_with_a_stem_transfer_whole(tmp_path, caplog):
    source, model = refreshed(VisionTransformer(**GEOMETRY, stem="conv")), VisionTransformer(**GEOMETRY, stem="conv")
    torch.save(source.state_dict(), tmp_path / "stem.pth")
    with caplog.at_level("INFO"):
        report = load_pretrained_weights(model, tmp_path / "stem.pth")
    assert "--stem" not in caplog.text
    assert report.reinitialised == []
    assert_same_tensors(model.state_dict(), source.state_dict())


# ------------------------------------------------------------------------------------------------------ said no early
@pytest.mark.parametrize(("flags", "words"), [
    ("--img_size 28 --patch_size 7", "patch_size 7; 28 pixels; --patch_size 2 or 4"),
    ("--img_size 27 --patch_size 3", "patch_size 3; 27 pixels; even --img_size"),
    ("--patch_size 1", "patch_size 1; --patch_size 2 or 4 or 8 or 16"), ("--img_size 20", "20; 8"),
    ("--arch res20s", "--stem conv; res20s"),
    ("--arch timm/deit_tiny_patch16_224", "--stem conv; timm/deit_tiny_patch16_224"),
    ("--stem cnn", "--stem; cnn; conv"),
])  # fmt: skip
@pytest.mark.usefixtures("house")
def test_what_cannot_be_is_refused(flags, words, capsys):
    assert call([*MICRO, "--stem", "conv", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in words.split("; "):
        assert word in line


@pytest.mark.usefixtures("house")
def test_what_has_no_effect_is_said(capsys):
    notes = entry.parse_args([*MICRO, "--stem", "conv", "--patch_embed", "resample"]).notes
    assert [note for note in notes if "--patch_embed: has no effect on a conv stem" in note]
