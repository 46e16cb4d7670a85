"""Laws of image folders, timm's models and pretrained weights through the whole command."""

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from micro import call
from PIL import Image

import export
from vit_structured_pruning import layout_problem

SHORT = [
    "--batch_size",
    "8",
    "--epochs",
    "1",
    "--pruning_times",
    "2",
    "--rate",
    "0.5",
    "--device",
    "cpu",
    "--amp",
    "off",
    "--lr",
    "0.01",
    "--workers",
    "0",
]
BOTH = ["--struct", "rsst", "--vit_structured", "--vit_prune_target", "both"]
TINY_VIT = ["--arch", "timm/test_vit"]  # timm's own model for tests: 64 wide, 6 blocks of 2 heads, 0.4 M parameters


@pytest.fixture(autouse=True)
def _in_house(house):
    pass


def picture(path, seed, mode="RGB", kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (40 + seed % 9, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)


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


def test_an_imagenet_tree_trains_prunes_and_exports(imagenet, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ["--dataset", "imagenet", "--data", imagenet, *TINY_VIT, "--img_size", "32", *SHORT, *BOTH]
    assert call([*flags, "--save_dir", folder]) == 0
    text = capsys.readouterr().out
    assert "3 classes" in text
    assert "n00000000/3.JPEG" in text
    assert "1 images could not be read" in text
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    model = export.load(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    assert model.num_classes == 3
    assert config["timm"] == {"model_name": "test_vit", "num_classes": 3, "img_size": 32}
    assert config["heads"] == [1] * 6  # half of two
    assert config["mean"] == [0.485, 0.456, 0.406]
    assert (folder / "report.html").is_file()


def test_worker_processes_change_nothing(imagenet, tmp_path):
    flags = ["--dataset", "imagenet", "--data", imagenet, *TINY_VIT, "--img_size", "32", *SHORT, "--struct", "dense"]
    losses = []
    for workers in (0, 2):
        folder = tmp_path / f"w{workers}"
        assert call([*flags, "--workers", workers, "--aug", "strong", "--save_dir", folder, "--no-export"]) == 0
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["train_loss"], row["val_accuracy"]) for row in rows])
    assert losses[0] == losses[1]


def test_both_layouts_of_tiny_imagenet(tmp_path):
    plain, original = tmp_path / "plain", tmp_path / "original"
    lines = []
    for label in range(2):
        for index in range(10):
            picture(plain / "train" / f"n{label}" / f"{index}.JPEG", index + 50 * label)
            picture(original / "train" / f"n{label}" / "images" / f"n{label}_{index}.JPEG", index + 50 * label)
        for index in range(3):
            picture(plain / "val" / f"n{label}" / f"{index}.JPEG", 200 + index + 50 * label)
            picture(original / "val" / "images" / f"val_{label}{index}.JPEG", 200 + index + 50 * label)
            lines.append(f"val_{label}{index}.JPEG\tn{label}\t0\t0\t62\t62")
    (original / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    results = []
    for tree in (plain, original):
        folder = tmp_path / f"run_{tree.name}"
        flags = ["--dataset", "tiny-imagenet", "--data", tree, *TINY_VIT, "--img_size", "32", *SHORT]
        assert call([*flags, "--struct", "refill", "--vit_structured", "--save_dir", folder, "--no-export"]) == 0
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        results.append([(row["train_loss"], row["val_accuracy"]) for row in rows])
    assert results[0] == results[1]


@pytest.mark.parametrize("dataset", ["imagenet", "tiny-imagenet", "folder"])
@pytest.mark.parametrize("tree", ["missing", "empty", "flat"])
def test_a_wrong_tree_is_one_line(dataset, tree, tmp_path, capsys):
    root = tmp_path / "data"
    if tree != "missing":
        root.mkdir()
    if tree == "flat":
        picture(root / "a.jpg", 1)
    flags = ["--dataset", dataset, "--data", root, "--arch", "vit_small_imagenet", *SHORT]
    assert call([*flags, "--save_dir", tmp_path / "run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert dataset in error
    assert "train/CLASS" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "patch", "tokens"),
    [
        # class token and 4 registers, LayerScale
        pytest.param("vit_small_patch14_reg4_dinov2", 14, 4 + 5, marks=pytest.mark.slow),
        ("deit_tiny_distilled_patch16_224", 16, 4 + 2),  # class and distillation token, two classifiers
    ],
)
def test_timm_models_of_other_families(name, patch, tokens, tmp_path, monkeypatch):
    """Structured RSST, resumed in its middle, removed, exported, and loaded by the card's lines in plain timm."""
    folder = tmp_path / "run"
    flags = ["--dataset", "digits", "--train_limit", "24", "--arch", f"timm/{name}", "--img_size", 2 * patch, *SHORT]
    flags += [*BOTH, "--val_fraction", "0.02", "--save_dir", folder]
    assert call([*flags, "--pruning_times", "2", "--no-export"]) == 0
    assert call(["--resume", "--save_dir", folder]) == 0
    assert export.main([str(folder)]) == 0
    config = json.loads((folder / "model" / "config.json").read_text())
    proof = json.loads((folder / "model" / "parity.json").read_text())
    dense = timm.create_model(name, num_classes=10, img_size=2 * patch)
    assert config["heads"] == [dense.blocks[0].attn.num_heads // 2] * 12
    assert config["neurons"] == [dense.blocks[0].mlp.fc1.out_features // 2] * 12
    assert proof["max_difference_float64"] < 1e-12

    model = export.load(folder / "model")
    assert layout_problem(model) is None
    assert model.pos_embed.shape[1] in (tokens, tokens - model.num_prefix_tokens)
    images = torch.randn(2, 3, 2 * patch, 2 * patch, generator=torch.Generator().manual_seed(0))
    card = (folder / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 20
    assert "export" not in code
    names: dict = {}
    monkeypatch.chdir(folder / "model")
    exec(code, names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](images), model(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "no transformer blocks"),
        ("convnext_atto", "no transformer blocks"),
        ("naflexvit_base_patch16_gap", "patch embedding"),
        ("eva02_tiny_patch14_224", "SwiGLU"),
    ],
)
def test_other_layouts_are_refused_with_the_reason(name, reason, tmp_path, capsys):
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    flags = ["--dataset", "digits", "--arch", f"timm/{name}", *BOTH, "--dry_run"]
    assert call([*flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error


def test_without_network_the_way_out_is_said_and_fallback_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "run"
    flags = ["--dataset", "digits", "--train_limit", "16", "--arch", "timm/vit_tiny_patch16_224", "--img_size", "16"]
    flags += ["--patch_size", "8", *SHORT, "--pruning_times", "1", "--pretrained", "--save_dir", folder]
    assert call([*flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--pretrained PATH" in error
    assert not folder.exists()

    assert call([*flags, "--pretrained_fallback"]) == 0
    text = capsys.readouterr().out
    note = yaml.safe_load((folder / "args.yaml").read_text())["pretrained_note"]
    assert "timm" in note
    assert note in text
    assert "timm could not fetch" in (folder / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_small_imagenet", "vit_base_imagenet", "vit_large_imagenet"])
def test_the_imagenet_builders_run_at_224_pixels(arch, imagenet, tmp_path):
    folder = tmp_path / "run"
    flags = ["--dataset", "imagenet", "--data", imagenet, "--arch", arch, *SHORT, *BOTH, "--batch_size", "2"]
    flags += ["--train_limit", "4", "--score_batches", "1", "--rate", "0.67"]
    assert call([*flags, "--save_dir", folder, "--opt", "sgd"]) == 0
    proof = json.loads((folder / "model" / "parity.json").read_text())
    assert proof["max_difference_float32"] <= proof["bound_float32"]
