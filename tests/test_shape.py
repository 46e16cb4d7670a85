"""`--arch FOLDER`: the shape of an exported model, with the initial weights that its family draws for such layers."""

import json
import math
import re
import shutil

import pytest
import torch
from micro import MICRO, assert_same_tensors, call, load, vit_micro

import export
import main_imp_fillback as entry
import models
from cli.parse import parse_args
from dataset import dataset_facts
from deployment.exported import describe
from engine.model import first_model
from engine.shape import model_from_flags
from families import family_of
from models.resnet import ResNet
from pruning.removal import remove_units
from utils import RunError, seed_everything

DIGITS = dataset_facts("digits")


def exported(folder, model, kept):
    """config.json of `model` without the units that are not kept; the small model."""
    family = family_of(model)
    units = family.units(model)
    kept = {key: list(kept.get(key, range(group.count))) for key, group in units.items()}
    small = remove_units(model, units, kept)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(describe(small, kept, DIGITS)))
    return small


def shape_args(folder, *flags):
    return parse_args(["--dataset", "digits", "--arch", str(folder), *flags])


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def resnet():
    return ResNet((1, 1), (8, 16), projected=False, num_classes=3)


CASES = {
    "vit": (lambda: vit_micro(num_classes=3), {"blocks.0.attn": [1], "blocks.1.attn": [], "blocks.1.mlp": [0, 7, 9]}),
    "wide vit": (lambda: vit_micro(mlp_ratio=4), {"blocks.0.attn": [1, 3]}),
    "resnet": (resnet, {"layer1.0.conv1": [0, 5], "layer1.0.conv2": [2, 3, 6], "layer2.0.conv1": [1]}),
    "timm": (
        lambda: models.build_model("timm/vit_tiny_patch16_224", 3, 32, depth=2),
        {"blocks.0.attn": [0], "blocks.1.mlp": [4, 5]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_shape_is_the_exported_one_and_can_be_exported_again(tmp_path, name):
    build, kept = CASES[name]
    small = exported(tmp_path / "run" / "model", build(), kept)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        model = first_model(shape_args(folder))
        found, expected = shapes(model), shapes(small)
        classifier = {key for key in found if key.startswith(family_of(model).classifier)}
        assert {key: found[key] for key in found.keys() - classifier} == {
            key: expected[key] for key in expected.keys() - classifier
        }
    own = family_of(model)
    everything = {key: list(range(group.count)) for key, group in own.units(model).items()}
    again, left = own.rebuild(describe(model, everything, None))
    remove_units(again, own.units(again), left)
    again.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, own.image_size(model), own.image_size(model))
    expected = model.eval()(images)
    assert expected.shape == (2, 10)
    assert torch.equal(again.eval()(images), expected)


def test_initial_weights_are_fresh_and_those_of_layers_of_this_size(tmp_path):
    exported(tmp_path / "vit", vit_micro(), {"blocks.0.mlp": range(40)})
    draws = []
    for seed in (0, 0, 1):
        seed_everything(seed)
        draws.append(first_model(shape_args(tmp_path / "vit")).state_dict())
    assert_same_tensors(draws[0], draws[1])
    assert not torch.equal(draws[0]["blocks.0.mlp.fc1.weight"], draws[2]["blocks.0.mlp.fc1.weight"])
    assert float(draws[0]["blocks.0.mlp.fc1.weight"].std()) == pytest.approx(0.02, rel=0.1)
    # a convolution's variance is 2 / (9 x filters): with a quarter of the filters it is four times as large
    exported(tmp_path / "res", ResNet((1,), (64,), projected=False), {"layer1.0.conv1": range(16)})
    weight = first_model(shape_args(tmp_path / "res")).state_dict()["layer1.0.conv1.weight"]
    assert weight.shape == (16, 64, 3, 3)
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.05)


def test_a_small_network_trains_resumes_and_exports_as_any_other(house, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(entry.report, "write", lambda _: None)  # pictures take longer than this run
    shape = tmp_path / "shape" / "model"
    exported(shape, vit_micro(), {"blocks.0.attn": [2, 3], "blocks.0.mlp": range(10), "blocks.1.attn": []})
    flags = [flag for flag in MICRO if flag != "--no-export"]
    flags += ["--struct", "dense", "--arch", shape, "--pruning_times", "1", "--save_dir", tmp_path / "run"]
    assert call([*flags, "--dry_run"]) == 0
    assert re.search(r" 2 +58 ", capsys.readouterr().out)  # heads and neurons, as below
    assert call(flags) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["heads"], config["neurons"]) == ([2, 0], [10, 48])
    assert config["kept_heads"] == [[0, 1], []]
    selected = load(tmp_path / "run" / "best.pt")["weights"]
    assert_same_tensors(export.load(tmp_path / "run" / "model").state_dict(), selected)
    files = ("metrics.jsonl", "states.csv")
    before = [(tmp_path / "run" / name).read_text() for name in files]
    assert call(["--resume", "--save_dir", tmp_path / "run"]) == 0
    assert [(tmp_path / "run" / name).read_text() for name in files] == before
    shutil.rmtree(shape.parent)
    capsys.readouterr()
    assert call(["--resume", "--save_dir", tmp_path / "run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--arch {shape}: no such folder" in said


@pytest.mark.parametrize(("flags", "words"), [
    ((), "holds no model"), ((), "cannot be used"), ((), "describes no network"), ((), "folded"),
    (("--img_size", "32"), "--img_size 32: the network of --arch"),
    (("--patch_size", "4"), "--patch_size 4: the network of --arch"), (("--pretrained",), "--pretrained True"),
    (("--stem", "conv"), "--stem conv"), (("--layer_scale", "0.1"), "--layer_scale 0.1"),
])  # fmt: skip
def test_what_cannot_be_meant_is_one_line(tmp_path, capsys, flags, words):
    folder = tmp_path / "model"
    exported(folder, vit_micro(), {})
    config = json.loads((folder / "config.json").read_text())
    broken = {
        "holds no model": None, "cannot be used": "{", "describes no network": json.dumps({**config, "heads": [4]}),
        "folded": json.dumps({**config, "folded": ["blocks.0.ls1"]}),
    }  # fmt: skip
    if not flags and broken[words] is None:
        (folder / "config.json").unlink()
    elif not flags:
        (folder / "config.json").write_text(broken[words])
    with pytest.raises((RunError, SystemExit)) as stop:
        model_from_flags(shape_args(folder, *flags), DIGITS)
    said = str(stop.value) if stop.type is RunError else capsys.readouterr().err.strip()
    assert "\n" not in said
    assert words in said
    assert str(folder) in said
