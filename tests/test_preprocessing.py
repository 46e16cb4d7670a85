"""Laws of how images are shown: the weights that a run starts from decide, in one place, for all who show images.

Expected values come by hand, from timm's own transforms and from Pillow.
"""

import dataclasses
import json
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import timm
import torch
import yaml
from micro import picture_folder
from PIL import Image

import export
import main_imp_fillback as entry
from dataset import DATASETS, Preprocessing, load_dataset, make_batches, preprocessing_of
from deployment import demo
from deployment.hub import hub_config
from deployment.onnx_file import labels_of
from engine.distill import Renormalised, named_teacher
from engine.preprocessing import weights_want
from utils import to_device

FOLDER = DATASETS["folder"]
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
HALF["shown_as"] = "some weights"
PARTS = {"parts": ("train", "val"), "low": 40, "high": 90}
UNLIKE = {**HALF, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


# ------------------------------------------------------------------------------------------------------------ steps
@pytest.mark.parametrize(("changes", "size", "resize", "mode"), [
    ({}, 224, 256, "shorter"), ({}, 112, 112, "shorter"), ({"crop_pct": 0.9}, 224, 248, "shorter"),
    ({"crop_pct": 0.875}, 112, 128, "shorter"), ({"crop_pct": 1.0}, 224, 224, "shorter"),
    ({"crop_pct": 0.9, "crop_mode": "squash"}, 224, 248, "square"),
    ({"files": False, "crop_pct": 0.9}, 56, 56, "square"),
])  # fmt: skip
def test_what_is_resized_and_cut(changes, size, resize, mode):
    shown = preprocessing_of(dataclasses.replace(FOLDER, **changes), size)
    assert (shown.resize, shown.crop, shown.size, shown.resize_mode) == (resize, size, size, mode)
    assert Preprocessing.from_config({"preprocessing": json.loads(json.dumps(shown.as_config()))}) == shown


@pytest.mark.parametrize("wanted", [HALF, {**UNLIKE, "crop_mode": "squash"}, {**UNLIKE, "crop_pct": 1.0}])
def test_files_are_shown_as_timm_shows_them_to_these_weights(wanted, tmp_path):
    splits = load_dataset("folder", picture_folder(tmp_path, count=4, **PARTS), 48, shown=wanted)
    batches = make_batches(splits.val, splits.facts, 8, "cpu")
    (images, _), *_ = batches.sequential()
    theirs = timm.data.create_transform(
        input_size=(3, 48, 48), **{name: value for name, value in wanted.items() if name != "shown_as"}
    )
    files = [Image.open(splits.val.path(index)).convert("RGB") for index in range(len(splits.val.labels))]
    torch.testing.assert_close(images, torch.stack([theirs(file) for file in files]), rtol=0, atol=1e-5)
    shown = preprocessing_of(splits.facts, 48)
    assert torch.equal(shown.normalised(torch.stack([shown.pixels(file) for file in files])), images)


@pytest.mark.parametrize("wanted", [None, HALF, UNLIKE])
@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
def test_grey_images_get_three_means_where_the_weights_have_them(wanted, aug):
    splits = load_dataset("digits", "data", 8, shown=wanted)
    facts = splits.facts
    (images, _), *_ = make_batches(splits.test, facts, 5, "cpu").sequential(1)
    own = wanted or vars(DATASETS["digits"])
    mean, std = torch.tensor(own["mean"]), torch.tensor(own["std"])
    expected = (splits.test.images[:5].double() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(images, expected.float().expand(-1, 3, -1, -1), rtol=0, atol=1e-5)
    shown, _ = make_batches(splits.train, facts, 5, "cpu", aug=aug).batch(0, 0, 0)
    assert shown.shape == (5, 3, 8, 8)
    low, high = ((bound - mean) / std for bound in (0, 1))
    assert (shown >= low[:, None, None] - 1e-5).all()
    assert (shown <= high[:, None, None] + 1e-5).all()


def test_small_data_sets_are_resized_by_the_interpolation_of_the_weights():
    native = load_dataset("digits", "data", 8).test.images
    found = load_dataset("digits", "data", 16, shown=HALF).test.images
    one = Image.fromarray(native[3, 0].float().numpy()).resize((16, 16), Image.Resampling.BICUBIC)  # in float32
    torch.testing.assert_close(found[3, 0].float(), torch.tensor(np.array(one)).clamp(0, 255), rtol=0, atol=0.501)


def test_copies_overlap_on_cuda_alone_and_out_of_pinned_memory():
    class Recorded(SimpleNamespace):
        def pin_memory(self):
            return Recorded(asked=[*self.asked, "pinned"])

        def to(self, device, **how):
            return [*self.asked, device.type, how]

    found = {name: to_device(Recorded(asked=[]), torch.device(name)) for name in ("cuda", "mps", "cpu")}
    assert found == {"cuda": ["pinned", "cuda", {"non_blocking": True}], "mps": ["mps", {}], "cpu": ["cpu", {}]}


# ----------------------------------------------------------------------------------------------------- who decides
AUGREG, DINO = "timm's vit_small_patch16_224.augreg_in21k_ft_in1k", "timm's vit_small_patch16_224.dino"
OWN = "the run that the weights come from"


@pytest.mark.parametrize(("flags", "mean", "said"), [
    ("--arch vit_small", None, ""), ("--arch vit_small --pretrained", 0.5, AUGREG),
    ("--arch vit_small --pretrained --pretrained_tag dino", 0.485, DINO),
    ("--arch timm/vit_small_patch16_224.dino --pretrained w.pth", 0.485, DINO),
    ("--arch timm/vit_small_patch16_224 --init w.pth", 0.5, AUGREG),
    ("--arch timm/vit_small_patch16_224 --init w.pth --preprocessing dataset", None, ""),
    ("--arch timm/vit_small_patch16_224", None, ""),
    ("--arch vit_small --pretrained w.pth", None, ""),  # anybody's
    ("--arch vit_small --pretrained w.pth --preprocessing model", 0.5, AUGREG),
    ("--arch vit_small --pretrained w.npz", 0.5, AUGREG),  # Google's
    ("--arch vit_tiny --init run/best.pt", None, ""),  # of digits, as this run
    ("--arch vit_tiny --init run/best.pt --dataset cifar10", 0.3058, OWN),
    ("--arch timm/vit_small_patch16_224 --pretrained run", None, ""),  # its own record comes first
    ("--arch vit_tiny --init half/init.pt", 0.5, "some weights"), ("--arch vit_tiny --init model", 0.1, OWN),
    ("--arch vit_tiny --init model/model.safetensors", 0.1, OWN),
])  # fmt: skip
def test_the_record_of_the_weights_decides(flags, mean, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, used in (("run", None), ("half", HALF)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.yaml").write_text(yaml.safe_dump({"dataset": "digits", "preprocessing_used": used}))
    (tmp_path / "model").mkdir()
    shown = preprocessing_of(FOLDER.shown_by(UNLIKE), 32).as_config()
    content = {"mean": shown["mean"], "std": shown["std"], "preprocessing": shown}
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    args = entry.parse_args(["--dataset", "digits", *flags.split()])
    args.pretrained_note = ""
    found = weights_want(args)
    assert (found or {}).get("shown_as", "") == said
    assert mean is None or found["mean"][0] == mean
    if said == OWN and mean == 0.1:
        assert (found["interpolation"], found["crop_pct"]) == ("bicubic", 0.9)


def test_asking_for_the_models_own_without_any_is_refused(capsys):
    flags = ["--arch", "vit_tiny", "--preprocessing", "model"]
    with pytest.raises(SystemExit):
        entry.parse_args(flags)
    assert "--preprocessing model: is about weights that a run starts from" in capsys.readouterr().err
    args = entry.parse_args([*flags, "--init", "w.pth"])
    with pytest.raises(entry.RunError, match="nothing says how the weights' images were shown"):
        weights_want(args)


def test_a_teacher_sees_images_as_its_own_record_says(tmp_path, monkeypatch):
    """A run of digits teaches one whose images are shown another way, and the other way round."""
    digits, half = DATASETS["digits"], DATASETS["digits"].shown_by(UNLIKE)
    model = entry.make_model(entry.parse_args(["--arch", "vit_mini", "--dataset", "digits"]))
    for name, used in (("plain", None), ("half", UNLIKE)):
        (tmp_path / name).mkdir()
        torch.save(model.state_dict(), tmp_path / name / "teacher.pt")
        args = {"arch": "vit_mini", "dataset": "digits", "preprocessing_used": used}
        (tmp_path / name / "args.yaml").write_text(yaml.safe_dump(args))
    pixels = torch.rand(2, 3, 16, 16)

    def normalised(facts):
        mean, std = (torch.tensor(values).expand(3)[:, None, None] for values in (facts.mean, facts.std))
        return (pixels - mean) / std

    for student in (digits, half):
        for name, own in (("plain", digits), ("half", half)):
            flags = ["--arch", "vit_mini", "--dataset", "digits", "--teacher", str(tmp_path / name / "teacher.pt")]
            teacher = named_teacher(entry.parse_args(flags), student, model, export.load).eval()
            assert isinstance(teacher, Renormalised) == (student is not own)
            with torch.no_grad():
                expected = model.eval()(normalised(own))
                torch.testing.assert_close(teacher(normalised(student)), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ a whole run
@pytest.fixture(scope="module")
def run_from_file(tmp_path_factory):
    """A run of the smallest timm ViT, from a file of weights, on image files."""
    folder = tmp_path_factory.mktemp("from_file")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), folder / "w.pth")
    flags = (
        "--dataset folder --arch timm/test_vit --img_size 32 --epochs 1 --pruning_times 2 --struct refill --rate 0.5 "
    )
    flags += "--vit_structured --ratio_schedule constant --workers 0 --batch_size 4 --warmup 0 --device cpu --amp off"
    argv = [
        *flags.split(),
        "--data",
        str(picture_folder(folder / "images", count=5, **PARTS)),
        "--pretrained",
        str(folder / "w.pth"),
    ]
    assert entry.main([*argv, "--save_dir", str(folder / "run")]) == 0
    return folder


def test_all_that_a_run_leaves_says_the_same(run_from_file, caplog):
    """timm's record of test_vit (mean and std 0.5, bicubic, 95%) and the names of the folders, everywhere."""
    run = run_from_file / "run"
    caplog.set_level(logging.INFO)
    assert export.main([str(run), "--onnx", "--evaluate"]) == 0
    config = json.loads((run / "model" / "config.json").read_text())
    shown = Preprocessing.from_config(config)
    assert (shown.mean, shown.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (config["mean"], config["std"]) == ([0.5] * 3, [0.5] * 3)
    theirs = timm.get_pretrained_cfg("test_vit")
    assert theirs.mean == (0.5, 0.5, 0.5)
    expected = theirs.interpolation, int(32 / theirs.crop_pct), 32
    assert (shown.interpolation, shown.resize, shown.crop) == expected
    assert config["class_names"] == ["cat", "dog"]
    assert shown.words() in (run / "run.log").read_text()
    card = (run / "model" / "README.md").read_text()
    assert shown.words() in card
    assert "cat, dog" in card
    metadata = labels_of(run / "model" / "model.onnx")
    assert json.loads(metadata["preprocessing"]) == config["preprocessing"]
    assert json.loads(metadata["class_names"]) == ["cat", "dog"]
    onnx.checker.check_model(str(run / "model" / "model.onnx"))
    hub = hub_config(config, 32)["pretrained_cfg"]
    assert (hub["mean"], hub["interpolation"], hub["crop_pct"]) == ([0.5] * 3, expected[0], 32 / expected[1])
    args = yaml.safe_load((run / "args.yaml").read_text())
    facts = FOLDER.shown_by(args["preprocessing_used"])
    spec = demo.image_spec("folder", facts, 32)
    assert (spec["kernel"], spec["resize"], spec["keepsAspect"]) == (expected[0], expected[1], True)
    assert spec["scale"] == pytest.approx([2 / 255] * 3)
    assert spec["bias"] == [-1.0] * 3


def test_the_exported_model_gets_the_accuracy_of_the_run_by_its_own_config_alone(run_from_file):
    run = run_from_file / "run"
    config = json.loads((run / "model" / "config.json").read_text())
    model, shown = export.load(run / "model"), Preprocessing.from_config(config)
    files = sorted((run_from_file / "images" / "val").glob("*/*.png"))
    images = torch.stack([shown.normalised(shown.pixels(Image.open(file).convert("RGB"))) for file in files])
    with torch.no_grad():
        named = [config["class_names"][number] for number in model(images).argmax(1)]
    share = sum(name == file.parent.name for name, file in zip(named, files, strict=True)) / len(files)
    assert share == pytest.approx(config["metrics"]["test_accuracy"])


def test_a_resumed_run_goes_on_showing_them_so_though_the_weights_are_gone(run_from_file, tmp_path):
    shutil.copytree(run_from_file / "run", tmp_path / "run")
    weights = run_from_file / "w.pth"
    weights.rename(run_from_file / "away.pth")
    try:
        assert entry.main(["--resume", "--save_dir", str(tmp_path / "run"), "--pruning_times", "3"]) == 0
    finally:
        (run_from_file / "away.pth").rename(weights)
    files = [folder / "run" / "model" / "config.json" for folder in (run_from_file, tmp_path)]
    before, after = (json.loads(file.read_text()) for file in files)
    assert before["preprocessing"] == after["preprocessing"]
