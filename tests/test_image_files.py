"""Laws of image files: which are listed, what pixels they become, and by what a run knows its data again."""

import json
import os
import shutil
import struct
import subprocess
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from micro import MICRO, call, runner, touch
from PIL import Image

import main_imp_fillback as entry
from dataset import FolderBatches, difference, folder_identity, load_dataset, read_rgb
from deployment.demo import PAGE
from images.files import list_images
from reporting import flags as flags_of_reports

SLOPE = np.arange(12, dtype=np.int64).reshape(3, 4)  # a picture that no turn and no mirror leaves as it is


def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(path):
    pixels = read(path)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def write(path, values, dtype, **options):
    image = Image.fromarray(np.array(values, dtype=dtype))
    image.save(path, **options)
    return path


def make_unsigned(path):
    """Pillow writes 32-bit integers as signed ones (SampleFormat 2, tag 339); they become unsigned ones (1)."""
    content = path.read_bytes()
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    assert content.count(signed) == 1
    path.write_bytes(content.replace(signed, unsigned))
    return path


# -------------------------------------------------------------------------- what pixels a file becomes
@pytest.mark.parametrize(("dtype", "values", "seen"), [
    ("uint16", [[0, 255, 256, 65535]], [[0, 0, 1, 255]]),
    ("int32", [[0, 1, 128, 255]], [[0, 1, 128, 255]]),
    ("int32", [[0, 255, 256, 65535]], [[0, 0, 1, 255]]),
    ("int32", [[0, 2**23, 2**30, 2**31 - 1]], [[0, 1, 128, 255]]),
    ("float32", [[0, 0.25, 0.5, 1]], [[0, 64, 128, 255]]),  # 63.75 and 127.5, to even
    ("float32", [[0, 0.1, 1.02, -0.01]], [[0, 26, 255, 0]]),  # 25.5; filters overshoot
    ("float32", [[0, 1.4, 128, 255]], [[0, 1, 128, 255]]),
    ("float32", [[0, 257, 32896, 65535]], [[0, 1, 128, 255]]),
    ("float32", [[0, 0, 0, 0]], [[0, 0, 0, 0]]),
])  # fmt: skip
def test_numbers_of_more_than_8_bits_become_the_8_bits_worked_out_by_hand(tmp_path, dtype, values, seen):
    assert grey(write(tmp_path / "deep.tif", values, dtype)) == seen


def test_unsigned_and_sixteen_bit_numbers_keep_their_own_range(tmp_path):
    full = np.array([[0, 2**24, 2**31, 2**32 - 1]], dtype=np.uint32).view(np.int32)
    assert grey(make_unsigned(write(tmp_path / "full.tif", full, np.int32))) == [[0, 1, 128, 255]]
    dark = [[0, 100, 255, 255]]  # 16 bits that are dark stay dark
    for name in ("dark.png", "dark.pgm", "dark.tif"):
        assert grey(write(tmp_path / name, dark, np.uint16)) == [[0, 0, 0, 0]]


@pytest.mark.parametrize(("dtype", "values", "reason"), [
    ("int32", [[0, -1, 5, 9]], "from -1 to 9: what is black is not known"),
    ("int32", [[0, 70000, 5, 9]], "end at 70000: what is white is not known"),
    ("float32", [[-1, 0, 0.5, 1]], "from -1 to 1: what is black is not known"),
    ("float32", [[0, 1e6, 0.5, 1]], r"from 0 to 1e\+06: what is white is not known"),
    ("float32", [[0, np.nan, 0.5, 1]], "not finite"), ("float32", [[0, np.inf, 0.5, 1]], "not finite"),
])  # fmt: skip
def test_numbers_without_a_meaning_as_pixels_are_refused(tmp_path, dtype, values, reason):
    with pytest.raises(ValueError, match=reason):
        read_rgb(write(tmp_path / "odd.tif", values, dtype))


ALPHA = [[0, 255, 51, 255]]


@pytest.mark.parametrize(("colour", "seen"), [
    (0, [[255, 0, 204, 0]]),  # black on white: 255 - alpha
    (100, [[255, 100, 224, 100]]),  # 255 + (100 - 255) * 51 / 255
    (255, [[0, 255, 51, 255]]),  # white would vanish on white
    (250, [[0, 250, 50, 250]]),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_shape_told_by_alpha_alone_is_seen(tmp_path, colour, seen, mode):
    shape = Image.merge("LA", [Image.new("L", (4, 1), colour), Image.fromarray(np.array(ALPHA, dtype=np.uint8))])
    if mode == "P":  # one palette entry for each alpha, all of one colour
        image = Image.new("P", (4, 1))
        image.putdata([0, 1, 2, 1])
        image.putpalette([colour] * 9)
        image.save(tmp_path / "shape.png", transparency=bytes([0, 255, 51]))
    else:
        shape.convert(mode).save(tmp_path / "shape.png")
    assert grey(tmp_path / "shape.png") == seen


def test_alpha_that_says_nothing_is_dropped_and_a_transparent_colour_is_white(tmp_path):
    for alpha in (0, 128, 255):
        Image.new("RGBA", (2, 1), (9, 80, 200, alpha)).save(tmp_path / "even.png")
        assert read(tmp_path / "even.png").tolist() == [[[9, 80, 200]] * 2]
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((0, 0), (7, 8, 9))
    image.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert read(tmp_path / "key.png").tolist() == [[[7, 8, 9], [255, 255, 255]]]


UPRIGHT = {  # orientation as EXIF numbers it -> the upright picture of the stored one
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
    9: lambda stored: stored,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", "uint8"), ("a.tif", "uint8"), ("a.tif", "int32"), ("a.webp", "uint8")]
)
def test_images_are_turned_as_exif_says(tmp_path, orientation, name, dtype):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    write(tmp_path / name, 20 * SLOPE, dtype, exif=exif, **options)
    assert grey(tmp_path / name) == (20 * UPRIGHT[orientation](SLOPE)).tolist()


def test_the_first_frame_of_several_is_read(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert read(tmp_path / name).tolist() == [[[255, 0, 0]] * 2] * 2


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_demo_page_makes_transparent_images_opaque_in_the_same_way(tmp_path):
    generator = np.random.RandomState(0)
    noise = generator.randint(0, 256, (4, 5, 4), dtype=np.uint8)
    even, faint, solid = noise.copy(), noise.copy(), noise.copy()
    even[..., 3], faint[..., :3], solid[..., 3] = 9, 250, 255
    expected = []
    for number, image in enumerate((noise, even, faint, solid)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        expected.append(read(tmp_path / f"{number}.png"))
    script = tmp_path / "run.mjs"
    script.write_text(
        f'import {{ readFileSync }} from "node:fs"; import {{ makeOpaque }} from "{(PAGE / "image.mjs").as_uri()}";'
        "const images = JSON.parse(readFileSync(0)).map((image) => Uint8ClampedArray.from(image));"
        "images.forEach(makeOpaque); console.log(JSON.stringify(images.map((image) => [...image])));"
    )
    content = json.dumps([image.flatten().tolist() for image in (noise, even, faint, solid)])
    done = subprocess.run(["node", script], input=content, capture_output=True, text=True, check=True)
    for found, image in zip(json.loads(done.stdout), expected, strict=True):
        found = np.array(found).reshape(4, 5, 4)
        assert (found[..., 3] == 255).all()
        assert np.abs(found[..., :3] - image).max() <= 1  # Pillow rounds twice


# ------------------------------------------------------------------------------ which files are listed
def test_files_are_listed_or_named_with_the_reason(tmp_path):
    touch(tmp_path, "b.JFIF", "a/x.gif", "a/deep.er/y.avif", "a.jpg", ".hidden.jpg", ".dir/z.jpg")
    touch(tmp_path, "notes.txt", "a/IMG.HEIC", "a/more.heic", "README")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    images, left_out = list_images(tmp_path)
    assert images == ["a.jpg", "a/deep.er/y.avif", "a/x.gif", "b.JFIF", "link.png", "nowhere.png"]
    assert left_out == {
        ".heic": ["a/IMG.HEIC", "a/more.heic"],
        ".txt": ["notes.txt"],
        "not a regular file": ["device.png", "pipe.jpg"],
        "without an ending": ["README"],
    }


# ------------------------------------------------------------------ by what a run knows its data again
def picture(path, seed, size=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for label, name in enumerate(("cat", "dog")):
        for number in range(20):
            picture(root / "train" / name / f"{number:02}.bmp", 100 * label + number)
    return root


def swap(root):
    for name, other in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (root / name).rename(root / other)


def remove_half(root):
    for path in sorted(root.glob("*/*.bmp"))[::2]:
        path.unlink()


CHANGES = {
    "half gone": (remove_half, "there were 32 images in train and now 16, 8 images in test and now 4"),
    "classes swapped": (swap, "there are as many images as before, but names, labels, sizes or contents differ"),
    "renamed file": (lambda root: (root / "cat/00.bmp").rename(root / "cat/0.bmp"), "names, labels, sizes or contents"),
    "other size": (lambda root: picture(root / "cat/07.bmp", 7, 13), "names, labels, sizes or contents"),
    "renamed class": (lambda root: (root / "dog").rename(root / "eel"), "2 and are 2, without dog and with eel"),
    "another class": (lambda root: picture(root / "eel/0.bmp", 1), "classes were 2 and are 3, with eel"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_identity_says_how_data_differ(folder, change):
    act, words = CHANGES[change]
    before = folder_identity("folder", folder)
    assert before["counts"] == {"train": 32, "test": 8}
    assert before["classes"] == ["cat", "dog"]
    assert load_dataset("folder", folder, 8, 0.25, 9).identity == before
    act(folder / "train")
    assert words in difference(before, folder_identity("folder", folder))


def test_an_identity_is_the_same_elsewhere_and_after_every_touch(folder):
    before = folder_identity("folder", folder)
    for path in folder.rglob("*.bmp"):
        os.utime(path, (1, 1))
    moved = folder.rename(folder.with_name("moved"))
    assert difference(before, folder_identity("folder", moved)) == ""
    with open(moved / "train/dog/03.bmp", "ab") as file:
        file.write(bytes(2**16))  # behind what is looked at of its content, so that the size alone tells
    grown = folder_identity("folder", moved)
    with open(moved / "train/dog/03.bmp", "ab") as file:
        file.write(b"0")
    assert "sizes" in difference(grown, folder_identity("folder", moved))
    (moved / "train/cat/05.bmp").unlink()
    (moved / "train/cat/05.bmp").symlink_to("nowhere.bmp")
    assert "sizes" in difference(before, folder_identity("folder", moved))


def test_an_identity_of_resident_data_is_of_their_contents(monkeypatch):
    from images import reading, splits

    first = load_dataset("digits", "none", 8, 0.1, 60).identity
    assert first["counts"] == {"train": 1438, "test": 359}
    assert load_dataset("digits", "none", 16, 0.3).identity == first
    for spoil in (lambda train: train.images[2].bitwise_not_(), lambda train: train.labels[1].add_(1)):

        def other(name, root, spoil=spoil):
            train, test = reading.READERS["digits"](name, root)
            spoil(train)
            return train, test

        monkeypatch.setattr(splits, "READERS", {"digits": other})
        assert "contents differ" in difference(first, load_dataset("digits", "none").identity)


@pytest.mark.parametrize("flags", [(), ("--no-flip",)])
def test_without_flips_what_rises_to_the_right_always_does(tmp_path, house, monkeypatch, flags):
    for number in range(60):
        name = tmp_path / "ramps" / "train" / "ab"[number % 2] / f"{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (40, 1))).save(name)
    batch, rises = FolderBatches.batch, []

    def seen(self, *key):
        images, labels = batch(self, *key)
        rises.extend((images[:, 0, 8, -1] > images[:, 0, 8, 0]).tolist())
        return images, labels

    monkeypatch.setattr(FolderBatches, "batch", seen)
    run = [*RUN, "--aug", "basic", "--data", tmp_path / "ramps", "--pruning_times", 1, *flags]
    assert call(run) == 0
    assert len(rises) == 40
    assert all(rises) == bool(flags)
    assert any(rises)


def test_no_flip_is_an_identity_of_its_own_and_has_no_effect_where_nothing_flips():
    def identity_of(*flags, unknown=None):
        args = vars(entry.parse_args(str.split("--dataset cifar10 --epochs 1") + list(flags)))
        args.pop(unknown, None)
        return flags_of_reports.identity(SimpleNamespace(args=args, method="dense", counts={}))

    plain = identity_of()
    assert identity_of("--no-flip") == plain | {"flip": False}
    assert identity_of(unknown="flip") == plain  # of a run that was made before there was the flag
    for flags, reason in (
        (("--aug", "none"), "with --aug none"),
        (("--dataset", "digits"), "with --dataset digits, which is never flipped"),
    ):
        notes = entry.parse_args([*str.split("--epochs 1 --no-flip --dataset cifar10"), *flags]).notes
        assert f"--no-flip: has no effect {reason}" in notes


RUN = [*MICRO, *str.split("--dataset folder --img_size 16 --workers 0 --aug none --batch_size 10 --train_limit 20")]


def test_a_run_goes_on_with_its_own_data_only(folder, tmp_path, house, capsys):
    base = [*RUN, "--data", folder, "--epochs", 1]
    run = runner(tmp_path, capsys, base)
    whole = run("--pruning_times", 3, name="whole")
    run("--pruning_times", 2, name="run")
    assert "a fixed fifth of train/, stratified by class, is the test set" in (tmp_path / "run" / "run.log").read_text()
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    swap(folder / "train")
    more = ["--save_dir", tmp_path / "run", "--resume", "--pruning_times", 3]
    assert call(more) == 2
    error = capsys.readouterr().err
    assert "error: --resume: the data are not those of this run: there are as many images as before" in error
    assert error.count("\n") == 1
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept
    swap(folder / "train")
    moved = folder.rename(tmp_path / "elsewhere")
    assert call([*more, "--data", moved]) == 0
    assert "not checked" not in capsys.readouterr().out

    def lines(done):
        return [line.split(",")[:12] for line in (done / "states.csv").read_text().splitlines()]

    assert lines(tmp_path / "run") == lines(whole.dir)


def test_a_checkpoint_without_an_identity_is_accepted_with_a_note(folder, tmp_path, house, capsys):
    run = runner(tmp_path, capsys, [*RUN, "--data", folder, "--epochs", 1])
    run("--pruning_times", 2)
    path = tmp_path / "run" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["data"]
    torch.save(content, path)
    assert call(["--save_dir", tmp_path / "run", "--resume", "--pruning_times", 3]) == 0
    assert "does not hold which data it is of" in capsys.readouterr().out
    for nonsense in ({"classes": ["cat", "dog"]}, 5):
        content["data"] = nonsense
        torch.save(content, path)
        assert call(["--save_dir", tmp_path / "run", "--resume"]) == 2
        assert "the checkpoint does not fit this run (data: " in capsys.readouterr().err
