"""Laws of what leaves the program: operator sets, int8, the page that shows the model, the folder for the hub."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from micro import DEPTH, assert_one_line, linked, rows_of, vit_micro
from torch.nn.functional import interpolate

import export
import models
import report
from dataset import DATASETS, load_dataset, make_batches
from deployment import demo, onnx_file
from deployment.hub import write_hub
from deployment.quantise import better_form, to_int8
from images.preprocessing import resized
from models.resnet import ResNet
from utils import RunError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("house")
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
RUNTIME = {name: f"{name} of a test".encode() for name in demo.ORT_FILES}


def unpacked(folder):
    """An npm package onnxruntime-web as far as the page is concerned."""
    (folder / "dist").mkdir(parents=True)
    for name, content in RUNTIME.items():
        (folder / "dist" / name).write_bytes(content)
    return folder


def logits_of(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def opset_of(path):
    return {entry.domain: entry.version for entry in onnx.load(str(path)).opset_import}[""]


@pytest.fixture(scope="module")
def test_digits():
    """Test images of digits at 16 pixels, normalised by hand, and their labels."""
    test, facts = load_dataset("digits", "data", 16).test, DATASETS["digits"]
    images = ((test.images.double() / 255 - facts.mean[0]) / facts.std[0]).float().expand(-1, 3, -1, -1).contiguous()
    return images, test.labels


@pytest.fixture(scope="module")
def shipped(finished_run, tmp_path_factory):
    """Everything at once, of the small run."""
    place = tmp_path_factory.mktemp("shipped")
    run = linked(finished_run, place / "run")
    flags = ["--onnx", "--opset", "21", "--int8", "--evaluate", "--demo", "--ort_web", str(unpacked(place / "npm"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BUILDERS, "vit_micro", vit_micro)
        assert export.main([str(run), *flags, "--hf", str(place / "hub" / "micro")]) == 0
    return SimpleNamespace(run=run, model=run / "model", demo=run / "demo", hub=place / "hub" / "micro")


# ------------------------------------------------------------------------------------------------ operator sets, int8
def test_the_files_have_the_operator_set_asked_for(shipped, test_digits):
    names = ("model.onnx", "model_int8.onnx", "model_int8_dynamic.onnx")
    assert [opset_of(shipped.model / name) for name in names] == [21, 21, 21]
    assert opset_of(shipped.demo / "model_0.onnx") == 21
    small = export.load(shipped.model)
    for count in (1, 5):
        images = test_digits[0][:count]
        with torch.no_grad():
            assert (logits_of(shipped.model / "model.onnx", images) - small(images)).abs().max() <= 1e-4


def test_another_operator_set_than_asked_for_is_not_written(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.onnx, "export", lambda model, inputs, target, **_: shutil.copy(shipped.model / "model.onnx", target)
    )
    with pytest.raises(RunError, match="--opset 19: PyTorch writes 21 for it"):
        onnx_file.to_onnx(export.load(shipped.model), tmp_path / "model.onnx", 19)
    assert not list(tmp_path.glob("*.onnx*"))


def relative_error(found, expected):
    return float((found - expected).norm() / (expected - expected.mean(1, keepdim=True)).norm())


def initialisers(path):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def test_int8_weights_are_the_rounded_ones_and_the_ends_stay_whole(shipped, test_digits):
    """q x scale is each weight to within half a step of its channel, and uses 7 bits."""
    small, static = export.load(shipped.model), shipped.model / "model_int8.onnx"
    expected = {name: tensor.numpy() for name, tensor in small.state_dict().items()}
    stored, nodes = initialisers(static), onnx.load(str(static)).graph.node
    quantised = [name for name in stored if name.endswith("_quantized") and stored[name].ndim == 2]
    assert len(quantised) == 4 * DEPTH
    found = 0
    for name in quantised:
        scale = stored[name.replace("_quantized", "_scale")]
        assert stored[name].dtype == np.int8
        assert np.abs(stored[name].astype(int)).max() <= 64
        whole = stored[name] * scale
        for weight in expected.values():
            if weight.shape == whole.T.shape and np.abs(weight.T - whole).max() <= 0.51 * scale.max():
                found += 1
                assert (np.abs(weight.T - whole) <= 0.51 * scale).all()
    assert found == len(quantised)
    floats = [array for array in stored.values() if array.dtype == np.float32]
    for name in ("patch_embed.proj.weight", "head.weight"):
        assert any(array.shape == expected[name].shape and np.array_equal(array, expected[name]) for array in floats)
    # products of activations read no rounded number
    makers = {output: node.op_type for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type == "MatMul" and makers.get(node.input[1]) != "DequantizeLinear"]
    assert len(products) == 2 * DEPTH
    assert all(makers[node.input[0]] != "DequantizeLinear" for node in products)
    images = test_digits[0][:64]
    with torch.no_grad():
        for name in ("model_int8.onnx", "model_int8_dynamic.onnx"):
            assert 0 < relative_error(logits_of(shipped.model / name, images), small(images)) < 0.05


def test_static_scales_are_those_of_the_images_shown(shipped, tmp_path, test_digits):
    """Twice the images, twice the scale of the first activation that a layer's weights meet."""
    scales = []
    for factor in (1.0, 2.0):
        to_int8(shipped.model / "model.onnx", tmp_path / "a.onnx", "static", [factor * test_digits[0][:32]])
        scales.append({k: v for k, v in initialisers(tmp_path / "a.onnx").items() if v.ndim == 0 and "_scale" in k})
    assert scales[0].keys() == scales[1].keys()
    assert any(not np.array_equal(scales[0][name], scales[1][name]) for name in scales[0])
    with pytest.raises(RunError, match="--int8: no training image to calibrate on"):
        to_int8(shipped.model / "model.onnx", tmp_path / "b.onnx", "static", [])
    assert [path.name for path in tmp_path.glob("*.onnx*")] == ["a.onnx"]


@pytest.mark.slow
def test_convolutions_are_int8_but_the_first(tmp_path):
    torch.manual_seed(0)
    model = ResNet(depths=[1, 1, 1], widths=[8, 8, 8], projected=False, num_classes=10, img_size=8)
    images = torch.randn(64, 3, 8, 8)
    for _ in range(20):
        model(images)  # statistics of the batch norms
    model.eval()
    export.to_onnx(model, tmp_path / "a.onnx")
    assert better_form(tmp_path / "a.onnx") == "static"
    with torch.no_grad():
        expected = model(images)
    for form in ("static", "dynamic"):
        to_int8(tmp_path / "a.onnx", tmp_path / f"{form}.onnx", form, [images])
        kinds = [node.op_type for node in onnx.load(str(tmp_path / f"{form}.onnx")).graph.node]
        assert "BatchNormalization" not in kinds
        weights = [array for array in initialisers(tmp_path / f"{form}.onnx").values() if array.ndim == 4]
        assert sorted(array.dtype.kind for array in weights)[:1] == ["f"]
        assert sum(array.dtype.kind == "f" for array in weights) == 1
        assert relative_error(logits_of(tmp_path / f"{form}.onnx", images), expected) < 0.1


def test_the_table_is_measured_and_shown(shipped, test_digits):
    rows = {row["model"]: row for row in rows_of(shipped.model / "onnx.csv")}
    images, labels = test_digits
    files = {"removed": "model.onnx", "removed int8": "model_int8.onnx"}
    files["removed int8 dynamic"] = "model_int8_dynamic.onnx"
    assert list(rows) == ["masked", *files]
    for name, file in files.items():
        accuracy = float((logits_of(shipped.model / file, images).argmax(1) == labels).float().mean())
        assert float(rows[name]["test_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
        assert float(rows[name]["megabytes"]) == pytest.approx((shipped.model / file).stat().st_size / 1e6, abs=1e-3)
    assert rows["masked"]["test_accuracy"] == rows["removed"]["test_accuracy"]
    threads = sorted({1, onnx_file.cores()})
    timed = [f"ms_{n}_thread{'s' * (n > 1)}_batch_{batch}" for n in threads for batch in (1, 64)]
    assert list(rows["masked"]) == ["model", "megabytes", "test_accuracy", *timed]
    assert all(float(row[column]) > 0 for row in rows.values() for column in timed)
    report.write(shipped.run)
    card, markdown = (shipped.model / "README.md").read_text(), (shipped.run / "report.md").read_text()
    line = next(line for line in markdown.splitlines() if line.startswith("| removed int8 |"))
    assert line in card
    assert f"{float(rows['removed int8']['ms_1_thread_batch_64']):.2f} ms" in line
    assert "<td>removed int8</td>" in (shipped.run / "report.html").read_text()


def test_the_dense_network_of_a_run_that_kept_it_stands_in_the_table(finished_run, tmp_path, monkeypatch):
    from deployment.source import full_network, masked_from_run

    run = linked(finished_run, tmp_path / "run")
    masked, _, args, _ = masked_from_run(run)
    assert full_network(run, masked, args, None)[0] == "masked"
    torch.manual_seed(5)
    dense = vit_micro()
    torch.save(dense.state_dict(), run / "teacher.pt")
    torch.save(vit_micro(num_classes=4).state_dict(), tmp_path / "other.pt")
    for given in (None, str(run / "teacher.pt")):
        name, found = full_network(run, masked, args, given)
        assert name == "dense"
        assert all(torch.equal(found.state_dict()[key], value) for key, value in dense.state_dict().items())
    with pytest.raises(RunError, match="^--dense .*other.pt: cannot teach|^--dense .*other.pt"):
        full_network(run, masked, args, str(tmp_path / "other.pt"))


# ------------------------------------------------------------------------------------------------ bad input
FAILING_NPM = "#!/bin/sh\necho 'npm error code EAI_AGAIN no registry' >&2\nexit 1\n"
BAD = {
    "RUN --int8": "--int8: belongs to --onnx", "RUN --onnx --opset 7": "--opset 7: there is no way",
    "RUN --onnx --opset 99": "--opset 99: there is no way", "RUN --demo --opset 99": "--opset 99",
    "RUN --opset 21": "--opset 21: belongs to", "RUN --onnx --int8 --dataset cifar10 --data NONE": "--dataset cifar10",
    "RUN --onnx --int8 --dataset imagenet --data NONE": "--dataset imagenet",
    "--from_checkpoint c.pt --arch vit_micro --out OUT --onnx --int8": "--int8: calibrates on training images",
    "--from_checkpoint c.pt --arch vit_micro --out OUT --demo PAGE": "--demo: shows images as a data set does",
    "--from_checkpoint c.pt --arch vit_micro --out OUT --dataset digits --demo": "--demo: needs a folder",
    "RUN --overwrite": "--overwrite: belongs to --demo", "RUN --ort_web NPM": "--ort_web",
    "RUN --dense c.pt": "--dense c.pt: belongs to",
    "RUN --demo PAGE --ort_web NPM --dense nothing.pt": "--dense nothing.pt",
    "RUN --demo THERE --ort_web NPM": "is there already", "RUN --demo THERE --ort_web NPM --overwrite": "holds no page",
    "RUN --demo FILE/page --ort_web NPM": "not a folder that can be written",
    "RUN --demo PAGE --ort_web NONE": "--ort_web", "RUN --demo PAGE": "npm cannot fetch onnxruntime-web",
    "RUN --hf THERE": "--hf",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_what_cannot_work_is_one_line_and_leaves_nothing(finished_run, tmp_path, command, monkeypatch, flags):
    run = linked(finished_run, tmp_path / "run")
    torch.save(vit_micro().state_dict(), "c.pt")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "npm").write_text(FAILING_NPM)
    (tmp_path / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    names = {"RUN": run, "OUT": tmp_path / "out", "PAGE": tmp_path / "page", "THERE": tmp_path / "there"}
    names |= {"NONE": tmp_path / "none", "NPM": unpacked(tmp_path / "npm"), "FILE/page": tmp_path / "file" / "page"}
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    code = 1 if BAD[flags].startswith("npm") else 2
    assert_one_line(command(*(names.get(flag, flag) for flag in flags.split())), BAD[flags], code=code)
    assert sorted(str(path) for path in tmp_path.rglob("*") if path.name != "none") == before


def test_without_npm_the_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="npm is not installed.*install Node.js, or .*--ort_web DIR") as caught:
        demo.runtime_files(None)
    assert caught.value.code == 2


# ------------------------------------------------------------------------------------------------ the page
def test_the_folder_of_the_page_holds_all_it_needs(shipped, test_digits):
    names = ["app.mjs", "demo.json", "image.mjs", "index.html", "model_0.onnx", "model_1.onnx", "model_2.onnx", "ort"]
    assert sorted(path.name for path in shipped.demo.iterdir()) == [*names, "style.css"]
    assert {path.name: path.read_bytes() for path in (shipped.demo / "ort").iterdir()} == RUNTIME
    content, config = (
        json.loads(path.read_text()) for path in (shipped.demo / "demo.json", shipped.model / "config.json")
    )
    assert content["classes"] == list("0123456789")
    assert content["draw"]
    parameters, macs = config["parameters"], config["macs"]
    expected = [("Full size", "dense"), ("Pruned", "removed"), ("Pruned, int8", "removed")]
    for number, (model, (name, size)) in enumerate(zip(content["models"], expected, strict=True)):
        path = shipped.demo / f"model_{number}.onnx"
        assert model == {"name": name, "file": path.name, "parameters": parameters[size], "macs": macs[size]} | {
            "bytes": path.stat().st_size
        }
    assert (shipped.demo / "model_2.onnx").read_bytes() == (shipped.model / "model_int8_dynamic.onnx").read_bytes()
    found = [logits_of(shipped.demo / f"model_{number}.onnx", test_digits[0][:3]) for number in (0, 1)]
    assert (found[0] - found[1]).abs().max() <= 1e-4
    page = (shipped.demo / "index.html").read_text()
    scripts = "".join((shipped.demo / name).read_text() for name in ("app.mjs", "image.mjs", "style.css"))
    outside = re.findall(r"https?://(?!localhost)[^\"'\s<]+", page + scripts)
    assert not outside
    assert "default-src 'self'" in page  # which the browser holds the page to


def test_an_earlier_page_is_replaced_whole(shipped, tmp_path):
    page = tmp_path / "deep" / "page"
    page.mkdir(parents=True)
    for name in ("stale", "demo.json"):
        (page / name).write_text("of an earlier page")
    demo.check_new_folder("--demo", page, overwrite=True)
    facts, small = DATASETS["digits"], export.load(shipped.model)
    words = demo.page_words("vit_micro", "digits", "masked")
    classes = demo.class_names("digits", "data", 10)
    shown = [demo.Shown("Pruned", small, shipped.model / "model.onnx")]
    demo.write_demo(page, shown, words, "digits", facts, 16, classes, RUNTIME)
    names = {path.name for path in shipped.demo.iterdir()} - {"model_1.onnx", "model_2.onnx"}
    assert {path.name for path in page.iterdir()} == names
    broken = [demo.Shown("Pruned", small, shipped.model / "nothing.onnx")]
    with pytest.raises(RunError, match="--demo .*new.*cannot be written"):
        demo.write_demo(tmp_path / "deep" / "new", broken, words, "digits", facts, 16, classes, RUNTIME)
    assert [path.name for path in page.parent.iterdir()] == ["page"]


def test_classes_have_their_names(tmp_path):
    for name in ("n01440764", "n99999999", "cat", ".hidden"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert demo.class_names("folder", tmp_path, 3) == ["cat", "tench", "n99999999"]
    assert demo.class_names("folder", tmp_path, 4) == ["0", "1", "2", "3"]
    assert demo.class_names("fashionmnist", "none", 10)[9] == "Ankle boot"
    assert demo.class_names("cifar100", tmp_path, 100)[99] == "99"


RUN_IMAGE = """
import { readFileSync } from "node:fs";
import { inputOf, median, pictureOf, seen, softmax } from "MODULE";
const cases = JSON.parse(readFileSync(0));
const results = cases.map(({ rgba, width, height, spec }) => {
  const shown = seen(pictureOf(Uint8Array.from(rgba), width, height, spec.grey), spec);
  return shown && { planes: shown.planes.map((p) => [...p]), input: [...inputOf(shown, spec)] };
});
const medians = [median([3, 1, 2]), median([4, 1, 2, 9])];
console.log(JSON.stringify({ results, softmax: softmax([1, 2, 3]), medians }));
"""


def in_node(tmp_path, cases):
    script = tmp_path / "run.mjs"
    script.write_text(RUN_IMAGE.replace("MODULE", (demo.PAGE / "image.mjs").as_uri()))
    content = []
    for image, spec in cases:
        height, width = image.shape[1:]
        rgba = torch.cat([image.expand(3, -1, -1), torch.full((1, height, width), 255, dtype=torch.uint8)])
        content.append(
            {"rgba": rgba.permute(1, 2, 0).flatten().tolist(), "width": width, "height": height, "spec": spec}
        )
    done = subprocess.run([NODE, script], input=json.dumps(content), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def pixels(channels, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)


@needs_node
def test_the_page_prepares_images_as_the_data_sets_do(tmp_path):
    """Images of the data sets' own sizes: bit for bit; folders of images: as torchvision does it on Pillow's."""
    from PIL import Image
    from torchvision.transforms import v2

    own = [("digits", 16), ("digits", 8), ("fashionmnist", 28), ("fashionmnist", 32), ("cifar10", 32), ("cifar10", 24)]
    cases, expected = [], []
    for seed, (name, size) in enumerate(own):
        facts = DATASETS[name]
        image = pixels(facts.channels, facts.image_size, facts.image_size, seed)
        cases.append((image, demo.image_spec(name, facts, size)))
        split = SimpleNamespace(images=resized(image[None], size), labels=torch.zeros(1, dtype=torch.long))
        (batch, _), *_ = make_batches(split, facts, 1, "cpu").sequential()
        real = interpolate(image[None].double(), (size, size), mode="bilinear", antialias=True)[0]
        clear = (real - real.floor() - 0.5).abs() > 1e-3  # in float32 an exact half goes either way
        expected.append((split.images[0], batch[0], clear))
    weights = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.8}
    squash = {**weights, "crop_mode": "squash"}
    files = [
        (61, 90, 32, None, 32), (300, 200, 128, None, 146), (90, 61, 32, weights, 40), (61, 90, 32, squash, (40, 40)),
    ]  # fmt: skip
    for seed, (height, width, size, shown, to) in enumerate(files):
        image = pixels(3, height, width, seed)
        cases.append((image, demo.image_spec("folder", DATASETS["folder"].shown_by(shown), size)))
        mode = v2.InterpolationMode.BICUBIC if shown else v2.InterpolationMode.BILINEAR
        plain = v2.Compose([v2.Resize(to, mode, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
        expected.append((plain(Image.fromarray(image.permute(1, 2, 0).numpy())), None, None))
    found = in_node(tmp_path, cases)
    for (_, spec), (planes, batch, clear), result in zip(cases, expected, found["results"], strict=True):
        shown = torch.tensor(result["planes"]).view(-1, spec["size"], spec["size"])
        difference = (shown - planes).abs()
        assert difference.max() <= 1, spec
        if batch is None:  # Pillow sums in integers
            assert (difference > 0).float().mean() <= 0.005, spec
            continue
        assert not difference[clear].any(), spec
        assert clear.float().mean() > 0.9
        input_found = torch.tensor(result["input"], dtype=torch.float32).view(batch.shape)
        same = (difference == 0).expand(3, -1, -1)
        assert torch.equal(input_found[same], batch[same])
    assert found["softmax"] == pytest.approx([0.09003057, 0.24472847, 0.66524096])
    assert found["medians"] == [2, 3]


@needs_node
def test_the_page_makes_digits_of_drawings_and_bright_things_of_photographs(tmp_path):
    digits, fashion = (
        demo.image_spec(name, DATASETS[name], size) for name, size in (("digits", 8), ("fashionmnist", 28))
    )
    corner = torch.zeros(1, 100, 100, dtype=torch.uint8)  # an L, 64 pixels a side, 16 thick
    corner[:, 20:84, 30:46] = corner[:, 68:84, 30:94] = 255
    bar = torch.zeros(1, 90, 90, dtype=torch.uint8)  # 8 wide, 64 high: one column of blocks, in the middle
    bar[:, 10:74, 50:58] = 255
    shirt = torch.full((1, 28, 56), 255, dtype=torch.uint8)  # dark on white, wider than high
    shirt[:, 7:21, 14:42] = 40
    empty = torch.zeros(1, 50, 50, dtype=torch.uint8)
    cases = [(corner, digits), (255 - corner, digits), (bar, digits), (empty, digits), (shirt, fashion)]
    found = in_node(tmp_path, cases)["results"]
    expected = torch.zeros(8, 8)
    expected[:, :2] = expected[6:] = 255
    for result in found[:2]:  # dark on white is the same digit
        assert torch.equal(torch.tensor(result["planes"]).view(8, 8), expected)
    column = torch.tensor(found[2]["planes"]).view(8, 8)
    assert torch.equal(column.sum(0) > 0, torch.tensor([i in (3, 4) for i in range(8)]))
    assert (column[:, 3:5] == 128).all()  # half of each block: 8 of 16 places, 127.5 rounded to even
    assert found[3] is None
    shown = torch.zeros(28, 28)
    shown[7:21] = 215
    assert torch.equal(torch.tensor(found[4]["planes"]).view(28, 28), shown)


# ------------------------------------------------------------------------------------------------ the hub
LOADED = """
import torch
images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
torch.save(model(images).detach(), "logits.pt")
"""


def test_the_hub_folder_loads_by_the_lines_of_its_card(shipped, tmp_path):
    folder = shutil.copytree(shipped.hub, tmp_path / "hub")
    names = ["README.md", "config.json", "model.onnx", "model.safetensors", "model_int8.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "model_int8_dynamic.onnx", "parity.json"]
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])
    config = json.loads((folder / "config.json").read_text())
    assert head["license"] == "mit"
    assert (head["library_name"], head["pipeline_tag"], head["metrics"]) == (
        "timm",
        "image-classification",
        ["accuracy"],
    )
    assert {"pruning", "timm"} <= set(head["tags"])
    (result,) = head["model-index"][0]["results"]
    assert (result["task"]["type"], result["dataset"]["type"]) == ("image-classification", "digits")
    accuracy = config["metrics"]["test_accuracy"]
    assert result["metrics"] == [{"type": "accuracy", "value": pytest.approx(accuracy, abs=1e-6)}]
    assert config["architecture"] == "vit_micro"
    assert (config["num_classes"], config["label_names"]) == (10, list("0123456789"))
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    assert config["pretrained_cfg"]["mean"] == config["mean"]

    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    subprocess.run([sys.executable, "-c", code + LOADED], cwd=folder, check=True, timeout=300)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = export.load(shipped.model)(images)
        assert (export.load(folder)(images) - expected).abs().max() == 0
    assert (torch.load(folder / "logits.pt", weights_only=True) - expected).abs().max() <= 1e-5
    assert not {path.name for path in folder.parent.iterdir()} - {"hub", "cwd"}


@torch.no_grad()
def test_a_model_without_its_data_set_goes_to_the_hub_and_loads(tmp_path, monkeypatch):
    """A ResNet, whose card loads it by this program."""
    torch.manual_seed(1)
    model = ResNet(depths=[1, 1, 1], widths=[4, 4, 4], projected=True, num_classes=3, img_size=8).eval()
    images = torch.randn(4, 3, 8, 8)
    kept = {"layer1.0.conv1": [0, 1, 2, 3]}
    export.write(tmp_path / "model", model, kept, [(images, torch.zeros(4))], None, {"arch": "res20s"}, {})
    write_hub(tmp_path / "model", tmp_path / "hub", None, 8)
    text = (tmp_path / "hub" / "README.md").read_text()
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])
    assert (head["library_name"], head["license"]) == ("pytorch", "mit")
    assert not {"datasets", "model-index"} & set(head)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path / "hub")
    space = {}
    exec(code, space)
    assert (space["model"](images) - model(images)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------ in a browser
def browser(tmp_path, width, height):
    """Headless Chromium; a test without it, its driver or Selenium is skipped with the reason."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium or its driver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    for flag in ["--headless", "--no-sandbox", "--disable-gpu", *quiet.split()]:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


@pytest.fixture
def served():
    """served(folder) -> its address, by Python's own server."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    servers = []

    def serve(folder):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder))))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_digit_drawn_in_a_browser_is_answered(tmp_path, served):
    """A small ViT trained on digits; what the page says of a drawing and of an image file."""
    from PIL import Image
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    import main_imp_fillback

    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    run = tmp_path / "run"
    flags = "--dataset digits --arch vit_micro --img_size 16 --epochs 25 --pruning_times 2 --batch_size 32 --amp off "
    flags += "--device cpu --opt adamw --lr 0.003 --sched cosine --warmup 0 --vit_structured --vit_prune_target both "
    flags += "--rate 0.5 --mlp_prune_ratio 0.5 --no-export"
    assert main_imp_fillback.main([*flags.split(), "--save_dir", str(run)]) == 0
    assert export.main([str(run), "--demo"]) == 0

    page = browser(tmp_path, 390, 844)
    try:
        page.get(served(run / "demo"))

        def answer():
            return page.find_element(By.TAG_NAME, "body").get_attribute("data-answer")

        def wait(what):
            return WebDriverWait(page, 120).until(lambda _: what())

        wait(lambda: page.find_element(By.TAG_NAME, "body").get_attribute("data-ready"))
        assert page.execute_script("return document.documentElement.scrollWidth") <= 500  # nothing sticks out
        pad = page.find_element(By.ID, "pad")
        strokes = ActionChains(page, duration=20).move_to_element_with_offset(pad, 0, -90).click_and_hold()
        for _ in range(6):
            strokes = strokes.move_by_offset(0, 30)
        strokes.release().perform()
        assert wait(answer) == "1 1"
        assert [strong.text for strong in page.find_elements(By.CSS_SELECTOR, ".answer strong")] == ["1", "1"]
        assert all(time.text.endswith(" ms") for time in page.find_elements(By.CSS_SELECTOR, ".time strong"))
        page.find_element(By.ID, "clear").click()
        assert answer() is None

        test = load_dataset("digits", "data", 8).test
        with torch.no_grad():
            small, facts = export.load(run / "model"), DATASETS["digits"]
            sized = resized(test.images[:1], 16).double()
            shares = small(((sized / 255 - facts.mean[0]) / facts.std[0]).float().expand(-1, 3, -1, -1)).softmax(1)[0]
        Image.fromarray(test.images[0, 0].numpy()).save(tmp_path / "digit.png")
        page.find_element(By.ID, "file").send_keys(str(tmp_path / "digit.png"))
        best = int(shares.argmax())
        assert wait(answer) == f"{best} {best}"
        shown = [float(share.text.rstrip("%")) for share in page.find_elements(By.CSS_SELECTOR, ".answer .share")]
        assert shown == pytest.approx([100 * float(shares[best])] * 2, abs=0.051)
        (tmp_path / "words.txt").write_text("no image")
        page.find_element(By.ID, "file").send_keys(str(tmp_path / "words.txt"))
        wait(lambda: "words.txt cannot be read as an image" in page.find_element(By.ID, "status").text)
        assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    finally:
        page.quit()
