"""Laws of `export.py` behind a finished export: answers for image files, and more forms from `model/` alone."""

import json
import re
import shutil

import pytest
import torch
from micro import assert_one_line, linked, rows_of
from PIL import Image

import export
import main_imp_fillback
from dataset import DATASETS, load_dataset
from deployment.exported import seal

pytestmark = pytest.mark.usefixtures("house")
SIZE = 16


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    """The run's folder with its model/, and the pixels of six test digits as its data set shows them."""
    run = linked(finished_run, tmp_path_factory.mktemp("predict") / "run")
    shutil.copytree(finished_run / "model", run / "model")
    return run, load_dataset("digits", "data", SIZE).test.images[:6]


@pytest.fixture
def pictures(exported, tmp_path):
    """These digits as files, half of them in folders below, one more file that is no image, and one of notes."""
    folder = tmp_path / "pictures"
    (folder / "b" / "deeper").mkdir(parents=True)
    for number, pixels in enumerate(exported[1]):
        place = folder if number < 3 else folder / "b" / "deeper"
        Image.fromarray(pixels[0].numpy()).save(place / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@torch.no_grad()
def shares_by_hand(run, pixels):
    facts = DATASETS["digits"]
    images = ((pixels.double() / 255 - facts.mean[0]) / facts.std[0]).float().expand(-1, 3, -1, -1)
    return export.load(run / "model")(images).softmax(1)


@pytest.mark.parametrize("place", ["run", "model"])
def test_images_get_the_probabilities_of_the_network(exported, pictures, command, tmp_path, place):
    run, pixels = exported
    expected = shares_by_hand(run, pixels)
    code, out, err = command(run if place == "run" else run / "model", "--predict", pictures, "--out", "answers.csv")
    assert (code, err) == (0, "")
    files = [pictures / f"{i}.png" if i < 3 else pictures / "b" / "deeper" / f"{i}.png" for i in range(6)]
    rows = rows_of("answers.csv")
    assert [row["file"] for row in rows] == [str(file) for file in files]
    left_out, *lines = out.splitlines()
    assert left_out == f"{pictures}: left out: notes.txt (.txt)"
    for row, shares, line in zip(rows, expected, lines, strict=True):
        best = int(shares.argmax())
        assert (row["class"], float(row["probability"])) == (str(best), pytest.approx(float(shares[best]), abs=1e-5))
        assert [float(row[f"p_{digit}"]) for digit in range(10)] == pytest.approx(shares.tolist(), abs=1e-5)
        assert line.startswith(f"{row['file']}: {best} {100 * float(shares[best]):.1f}%, ")
    assert sorted(path.name for path in (run / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "parity.json",
    ]  # fmt: skip


def test_what_is_no_image_is_named_counted_and_costs_no_other_answer(exported, pictures, command):
    (pictures / "broken.png").write_text("no image")
    one = pictures / "0.png"
    code, out, err = command(exported[0], "--predict", one, pictures / "broken.png", pictures / "notes.txt", one)
    assert code == 1
    assert out.count("0.png: ") == 2
    assert "broken.png: cannot be read as an image" in out
    assert "notes.txt: cannot be read as an image" in out
    assert "error: --predict: 2 of 4 files could not be read" in err
    assert len(err.splitlines()) == 1


BAD = {
    "RUN --predict NONE": "no such file or folder", "RUN --predict EMPTY": "no images in this folder",
    "RUN --predict PICTURES --out answers": "is a CSV file",
    "RUN --predict PICTURES --out THERE.csv": "is there already; .*--overwrite",
    "RUN --predict PICTURES --out NONE/answers.csv": "not a folder that can be written",
    "RUN --predict PICTURES --onnx": "--onnx: does not go with --predict",
    "--from_checkpoint c.pt --arch vit_mini --out o.csv --predict PICTURES": "--predict",
    "EMPTY --predict PICTURES": "is .*empty an exported model", "MODEL": "say what to make of it",
    "MODEL --latency": "--latency: .*needs the folder of its run",
    "MODEL --onnx --int8": "--int8: .*needs the folder of its run",
    "MODEL --onnx --out PICTURES": "--out: .*needs the folder of its run",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_what_cannot_be_answered_is_one_line(exported, pictures, command, tmp_path, flags):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("mine")
    names = {"RUN": exported[0], "MODEL": exported[0] / "model", "PICTURES": pictures, "EMPTY": tmp_path / "empty"}
    names |= {"NONE": tmp_path / "none", "THERE.csv": tmp_path / "there.csv"}
    names["NONE/answers.csv"] = tmp_path / "none" / "answers.csv"
    result = command(*(names.get(flag, flag) for flag in flags.split()))
    assert_one_line(result)
    assert re.search(BAD[flags], result[2])
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_onnx_needs_no_data_set_and_says_how_images_are_shown(exported, command, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("deployment.command.load_dataset", None)
    folder = shutil.copytree(exported[0] / "model", tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command(folder, "--onnx")[0] == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    images = torch.randn(2, 3, SIZE, SIZE)
    (found,) = onnxruntime.InferenceSession(folder / "model.onnx").run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        assert (torch.from_numpy(found) - export.load(folder)(images)).abs().max() <= 1e-4
    said = {prop.key: prop.value for prop in onnx.load(str(folder / "model.onnx")).metadata_props}
    config = export.read_config(folder)
    shown = json.loads(said["preprocessing"])
    assert (shown["mean"], shown["std"], shown["crop"]) == (config["mean"], config["std"], SIZE)


def test_class_names_are_those_of_config_json(exported, pictures, command, tmp_path):
    folder = shutil.copytree(exported[0] / "model", tmp_path / "model")
    config = {**export.read_config(folder), "class_names": [f"digit {number}" for number in range(10)]}
    config, blob = seal(config, export.load(folder).state_dict())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(blob)
    best = int(shares_by_hand(exported[0], exported[1][:1]).argmax())
    assert f"0.png: digit {best} " in command(folder, "--predict", pictures / "0.png")[1]


# ------------------------------------------------------------------------------------------------ a run's own folder
def test_a_run_refuses_a_folder_with_the_model_of_others(tmp_path, capsys):
    (tmp_path / "r" / "model").mkdir(parents=True)
    (tmp_path / "r" / "model" / "README.md").write_text("of a project")
    flags = "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 40 --epochs 1 --pruning_times 1"
    assert main_imp_fillback.main([*flags.split(), "--save_dir", str(tmp_path / "r")]) == 2
    assert "model: holds README.md, which this program did not write" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["model"]


def test_a_complete_run_that_is_resumed_keeps_the_forms_of_its_model(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    for name in ("model.onnx", "onnx.csv"):
        (run / "model" / name).write_text("of these weights")
    assert main_imp_fillback.main(["--save_dir", str(run), "--resume"]) == 0
    assert (run / "model" / "model.onnx").read_text() == (run / "model" / "onnx.csv").read_text() == "of these weights"


def test_what_an_export_measures_is_in_the_run_s_report_at_once(finished_run, command, tmp_path):
    for package in ("markdown", "matplotlib"):
        pytest.importorskip(package)
    run = linked(finished_run, tmp_path / "run")
    assert command(run, "--latency")[0] == 0
    assert not (run / "report.md").exists()  # a run without one gets none
    (run / "report.md").write_text("of before")
    assert command(run, "--latency")[0] == 0
    assert (run / "model" / "latency.txt").read_text().splitlines()[-1] in (run / "report.md").read_text()
