"""Laws of image folders, timm's models and pretrained weights through the whole command."""

import json
import shlex
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from micro import call, card_model
from PIL import Image

import export
from vit_pruning_utils import is_vit_model

SHORT = shlex.split("--batch_size 8 --epochs 1 --pruning_times 2 --rate 0.5 --device cpu --amp off --workers 0")
BOTH = ["--struct", "rsst", "--vit_structured", "--vit_prune_target", "both"]
TINY_VIT = ["--arch", "timm/test_vit", "--img_size", "32"]  # timm's own for tests: 64 wide, 6 blocks of 2 heads


@pytest.fixture(autouse=True)
def _in_house(house, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures have tests of their own


def picture(path, seed, mode="RGB", kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (40 + seed % 9, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)


def curve(folder):
    """Loss and accuracy of each epoch."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["train_loss"], row["val_accuracy"]) for row in rows]


@pytest.fixture
def imagenet(tmp_path):
    """Three classes of 12 training and 4 test images: some grey, one broken, one PNG under a JPEG's name."""
    root = tmp_path / "imagenet"
    for part, count in (("train", 12), ("val", 4)):
        for label in range(3):
            for index in range(count):
                grey = "L" if index % 5 == 1 else "RGB"
                picture(root / part / f"n{label:08d}" / f"{index}.JPEG", 100 * label + index, grey)
    (root / "train" / "n00000000" / "3.JPEG").write_bytes(b"not an image")
    picture(root / "train" / "n00000001" / "4.JPEG", 7, kind="PNG")
    return root


def test_an_imagenet_tree_trains_prunes_and_exports_the_same_with_workers(imagenet, tmp_path, capsys):
    flags = ["--dataset", "imagenet", "--data", imagenet, *TINY_VIT, *SHORT, *BOTH, "--aug", "strong"]
    assert call([*flags, "--save_dir", "run"]) == 0
    text = capsys.readouterr().out
    for told in ("3 classes", "n00000000/3.JPEG", "1 images could not be read"):
        assert told in text
    folder = tmp_path / "cwd" / "run"
    config = json.loads((folder / "model" / "config.json").read_text())
    assert export.load(folder / "model").num_classes == 3
    assert config["timm"] == {"model_name": "test_vit", "num_classes": 3, "img_size": 32}
    assert config["heads"] == [1] * 6  # half of two
    assert config["mean"] == [0.485, 0.456, 0.406]
    assert call([*flags, "--pruning_times", 1, "--workers", 2, "--save_dir", "workers", "--no-export"]) == 0
    assert curve(folder.with_name("workers")) == curve(folder)[:1]


@pytest.mark.parametrize(("name", "patch"), [
    # class token and 4 registers, LayerScale
    pytest.param("vit_small_patch14_reg4_dinov2", 14, marks=pytest.mark.slow),
    ("deit_tiny_distilled_patch16_224", 16),  # class and distillation token, two classifiers
])  # fmt: skip
def test_timm_models_of_other_families(name, patch, tmp_path):
    """Structured RSST, removed, exported, and loaded by the card's lines in plain timm."""
    folder, size = tmp_path / "run", ["--arch", f"timm/{name}", "--img_size", 2 * patch]
    flags = ["--dataset", "digits", "--train_limit", 24, *size, *SHORT, *BOTH, "--val_fraction", 0.02]
    assert call([*flags, "--save_dir", folder]) == 0
    config, proof = (json.loads((folder / "model" / f"{file}.json").read_text()) for file in ("config", "parity"))
    dense = timm.create_model(name, num_classes=10, img_size=2 * patch)
    assert config["heads"] == [dense.blocks[0].attn.num_heads // 2] * 12
    assert config["neurons"] == [dense.blocks[0].mlp.fc1.out_features // 2] * 12
    assert proof["max_difference_float64"] < 1e-12
    model = export.load(folder / "model")
    assert is_vit_model(model)
    assert model.pos_embed.shape == dense.pos_embed.shape
    loaded, code = card_model(folder / "model")
    assert "export" not in code
    assert len(code.splitlines()) < 20
    images = torch.randn(2, 3, 2 * patch, 2 * patch, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-6)


def test_pretrained_weights_that_cannot_be_had_end_the_command_or_with_fallback_are_noted(tmp_path, capsys):
    flags = ["--dataset", "digits", "--train_limit", 16, *TINY_VIT, *SHORT, "--pruning_times", 1, "--no-export"]
    flags += ["--pretrained", "none.pth", "--save_dir", "run"]
    folder = tmp_path / "cwd" / "run"
    assert call(flags) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), "--pretrained none.pth" in error, folder.exists()) == (1, True, False)
    assert call([*flags, "--pretrained_fallback"]) == 0
    note = yaml.safe_load((folder / "args.yaml").read_text())["pretrained_note"]
    assert "--pretrained none.pth" in note
    assert note in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_small_imagenet", "vit_base_imagenet", "vit_large_imagenet"])
def test_the_imagenet_builders_run_at_224_pixels(arch, imagenet, tmp_path):
    flags = ["--dataset", "imagenet", "--data", imagenet, "--arch", arch, *SHORT, *BOTH, "--batch_size", 2]
    assert call([*flags, "--train_limit", 4, "--score_batches", 1, "--rate", 0.67, "--save_dir", tmp_path / "run"]) == 0
    proof = json.loads((tmp_path / "run" / "model" / "parity.json").read_text())
    assert proof["max_difference_float64"] <= proof["bound"]
