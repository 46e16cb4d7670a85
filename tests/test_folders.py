"""Laws of the data sets that are folders of images: what is listed, how it is split, and what a batch shows."""

import errno
import logging
import multiprocessing
import os
import pickle
import random
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from micro import touch
from PIL import Image, ImageFile

import images.folders
from dataset import DATASETS, Batches, DataError, FolderBatches, FolderSplit, Split, dataset_facts, load_dataset

# isort: split
from dataset import make_batches, split_sizes
from images.files import EXTENSIONS

IMAGENET = DATASETS["imagenet"]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
KINDS = ("b.JPG", "a.jpeg", "c.PNG", "d.bmp", "e.webp", "f.ppm", "g.pgm", "h.tif", "i.Tiff", "j.jpg")


def touch_classes(root, part, *counts):
    return touch(root, *(f"{part}/c{c}/{i:03}.jpg" for c, count in enumerate(counts) for i in range(count)))


def write_tiny(root, annotations):
    """Two classes of 10 training images; three images validate, in classes where there are no annotations."""
    inner = "" if annotations is None else "images/"
    touch(root, *(f"train/{c}/{inner}{c}_{i}.JPEG" for c in ("n1", "n2") for i in range(10)))
    if annotations is None:
        return touch(root, "val/n2/v0.JPEG", "val/n2/v2.JPEG", "val/n1/v1.JPEG")
    touch(root, *(f"val/images/v{i}.JPEG" for i in range(3)))
    (root / "val" / "val_annotations.txt").write_text(annotations)
    return root


def names(split):
    return [os.fsdecode(path) for path in split.paths]


def refused(call, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def noise(number, width=48, height=40):
    """A smooth random picture: what JPEG keeps, and what shows where a crop lies."""
    generator = np.random.default_rng(number)
    small = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_images(root, count, size=24, **shape):
    """Image i has label i. One lies as PNG under .jpg, one is grey, one in capitals."""
    files = [f"{i:03}.JPG" if i == 1 else f"{i:03}.jpg" for i in range(count)]
    for i, name in enumerate(files):
        noise(i, **shape).convert("L" if i == 2 else "RGB").save(root / name, "PNG" if i == 0 else "JPEG")
    return FolderSplit(np.array([os.fsencode(name) for name in files]), torch.arange(count), root, size, "folder")


def pixels_of(shown):
    """Undoes the normalisation: int64 0..255."""
    exact = (shown.double() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    assert (exact - exact.round()).abs().max() < 1e-3
    return exact.round().long()


def in_order(batches, epochs=2, state=0):
    steps = range(batches.steps_per_epoch)
    return {(state, epoch, step): batches.batch(state, epoch, step) for epoch in range(epochs) for step in steps}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test():
    yield
    assert multiprocessing.active_children() == []


# --------------------------------------------------------------------------------------------- listing
def test_images_are_listed_by_sorted_class_and_name_and_other_files_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    odd = os.fsdecode(b"\xff\xe9 \xc3\xa9.jpg")  # no text in any encoding
    train = ["train/ant/B.jpg", "train/ant/x.jpg", f"train/ant/{odd}", *(f"train/zebra/{kind}" for kind in KINDS)]
    train += ["train/ant/folder.jpg/inside.jpg", "train/ant/x.gif"]
    touch(tmp_path, *train, "val/zebra/1.jpg", "val/ant/2.jpg", "test/ant/3.jpg")
    touch(tmp_path, "train/ant/notes.txt", "train/ant/._x.jpg", "train/.hidden/x.jpg", "train/x.jpg", "train/a.txt")
    touch(tmp_path, *(f"val/ant/in/{i}.HEIC" for i in range(4)), "extra/x.jpg", ".git/x.jpg", "LICENSE", "x.jpg")
    splits = load_dataset("folder", str(tmp_path))
    assert caplog.messages[1:] == [
        "--dataset folder: 6 files are left out: 1 outside the class folders (train/x.jpg); 1 .txt "
        "(train/ant/notes.txt); 4 .heic (val/ant/in/0.HEIC, val/ant/in/1.HEIC, val/ant/in/2.HEIC, ...); read are "
        f"{' '.join(EXTENSIONS)}",
        "--dataset folder: not read beside train/: extra/",
        "--dataset folder: test/ has no images of 1 of 2 classes: zebra",
    ]
    assert sorted(names(splits.train)) == sorted(train)
    assert [name.startswith("train/zebra") for name in names(splits.train)] == splits.train.labels.tolist()
    assert all(os.path.isfile(splits.train.path(i)) for i in range(15))
    assert (names(splits.val), splits.val.labels.tolist()) == (["val/ant/2.jpg", "val/zebra/1.jpg"], [0, 1])
    assert splits.test.path(0) == str(tmp_path / "test/ant/3.jpg")
    assert splits.test.labels.dtype == torch.int64
    assert splits.facts.classes == 2


@pytest.mark.parametrize("name", ["imagenet", "tiny-imagenet"])
def test_val_of_imagenet_is_the_test_set_and_validation_is_cut_stratified_from_train(tmp_path, name):
    touch_classes(touch_classes(tmp_path, "train", 30, 30, 30), "val", 2, 0, 1)
    splits = load_dataset(name, tmp_path, val_fraction=0.2)
    assert names(splits.test) == ["val/c0/000.jpg", "val/c0/001.jpg", "val/c2/000.jpg"]
    assert splits.test.labels.tolist() == [0, 0, 2]
    listed = [f"train/c{c}/{i:03}.jpg" for c in range(3) for i in range(30)]
    assert sorted(names(splits.train) + names(splits.val)) == listed
    assert torch.bincount(splits.val.labels).tolist() == [6, 6, 6]
    for split in (splits.train, splits.val):
        assert [int(path.split("/")[1][1:]) for path in names(split)] == split.labels.tolist()
    again = load_dataset(name, tmp_path, val_fraction=0.2, train_limit=10)
    assert (names(again.val), names(again.train)) == (names(splits.val), names(splits.train)[:10])


@pytest.mark.parametrize(("parts", "sizes", "line"), [
    (("val", "test"), (40, 6, 8), "val/ validates (6 images), test/ tests (8 images)"),
    (("val",), (36, 4, 6), "val/ is the test set (6 images), as there is no test/; 4 images {cut}"),
    (("valid",), (36, 4, 6), "valid/ is the test set (6 images), as there is no test/; 4 images {cut}"),
    (("validation", "test"), (40, 6, 8), "validation/ validates (6 images), test/ tests (8 images)"),
    (("test",), (36, 4, 8), "test/ is the test set (8 images), as there is no val/; 4 images {cut}"),
    ((), (29, 3, 8), "a fixed fifth of train/, stratified by class, is the test set (8 images); 3 images {cut}"),
])  # fmt: skip
def test_roles_of_the_parts_of_a_folder(tmp_path, caplog, parts, sizes, line):
    caplog.set_level(logging.INFO)
    touch_classes(tmp_path, "train", 20, 20)
    for part in parts:
        touch_classes(tmp_path, part, *((4, 4) if part == "test" else (3, 3)))
    assert split_sizes("folder", 0.1, None, tmp_path) == sizes[:2]
    assert split_sizes("folder", 0.1, 7, tmp_path) == (7, sizes[1])
    facts = dataset_facts("folder", tmp_path)
    assert not caplog.records
    splits = load_dataset("folder", tmp_path)
    errors = {3: "28.9", 4: "25.0", 6: "20.4", 8: "17.7"}  # 50 / sqrt(n)
    coarse = ", ".join(f"{errors[size]} points on {size} images" for size in sizes[1:])
    told = f"{line.format(cut='cut from train/ validate')}; the standard error of an accuracy is up to {coarse}"
    assert caplog.messages == [f"--dataset folder: {told}"]
    assert tuple(len(split.labels) for split in (splits.train, splits.val, splits.test)) == sizes
    assert splits.facts == facts
    assert facts.train_images == {6: 40, 4: 40, 3: 32}[sizes[1]]
    everything = names(splits.train) + names(splits.val) + names(splits.test)
    assert len(set(everything)) == len(everything) == 40 + sum(8 if part == "test" else 6 for part in parts)
    assert torch.bincount(splits.test.labels).tolist() == [sizes[2] // 2] * 2
    assert names(splits.test) == sorted(names(splits.test))
    assert names(load_dataset("folder", tmp_path).test) == names(splits.test)


def test_a_model_of_no_device_can_ask_for_the_classes(tmp_path):
    touch_classes(tmp_path, "train", 5, 5)
    with torch.device("meta"):  # as --dry_run builds it
        assert dataset_facts("folder", tmp_path).classes == 2


@pytest.mark.parametrize("annotations", [None, "v2.JPEG\tn2\t0\t9\nv0.JPEG\tn2\t1\t2\t3\t4\nv1.JPEG\tn1\t0\n"])
def test_tiny_imagenet_in_both_layouts(tmp_path, caplog, annotations):
    caplog.set_level(logging.WARNING)
    splits = load_dataset("tiny-imagenet", write_tiny(tmp_path, annotations))
    shown = zip((os.path.basename(path) for path in names(splits.test)), splits.test.labels.tolist(), strict=True)
    assert sorted(shown) == [("v0.JPEG", 1), ("v1.JPEG", 0), ("v2.JPEG", 1)]
    assert all(os.path.exists(split.path(i)) for split, n in ((splits.test, 3), (splits.train, 18)) for i in range(n))
    assert [("n1", "n2").index(path.split("/")[1]) for path in names(splits.train)] == splits.train.labels.tolist()
    assert splits.train.image_size == 64
    assert load_dataset("tiny-imagenet", tmp_path, image_size=32).val.image_size == 32
    if annotations:
        assert names(splits.test) == [f"val/images/v{i}.JPEG" for i in range(3)]
        plain = load_dataset("tiny-imagenet", write_tiny(tmp_path / "plain", None))
        orders = [[os.path.basename(path) for path in names(train)] for train in (plain.train, splits.train)]
        assert orders[0] == orders[1]  # whichever layout, training sees the same images in the same order
        assert not caplog.records
        write_tiny(tmp_path, annotations="v0.JPEG\tn2\t0\t0\t1\t1\n")
        assert names(load_dataset("tiny-imagenet", tmp_path).test) == ["val/images/v0.JPEG"]
        assert "2 images" in caplog.text


def test_facts_are_official_without_data_and_counted_with_it(tmp_path, caplog):
    assert dataset_facts("imagenet", tmp_path) is IMAGENET
    assert (IMAGENET.classes, IMAGENET.train_images, IMAGENET.vit_image_size) == (1000, 1_281_167, 224)
    tiny = dataset_facts("tiny-imagenet")
    assert (tiny.classes, tiny.train_images, tiny.image_size, tiny.vit_image_size) == (200, 100_000, 64, 64)
    assert dataset_facts("digits", tmp_path) is DATASETS["digits"]
    assert split_sizes("imagenet", 0.1, None) == (1_153_050, 128_117)  # 1,281,167 / 10 = 128,116.7
    assert split_sizes("tiny-imagenet", 0.1, 500, tmp_path) == (500, 10_000)

    touch_classes(touch_classes(tmp_path, "train", 10, 10, 10), "val", 1, 1, 1)
    facts = dataset_facts("imagenet", tmp_path)
    assert (facts.classes, facts.train_images, facts.mean, facts.std) == (3, 30, IMAGENET.mean, IMAGENET.std)
    assert split_sizes("imagenet", 0.1, None, tmp_path) == (27, 3)
    with caplog.at_level(logging.INFO):
        assert load_dataset("imagenet", tmp_path).facts == facts
    assert caplog.messages[0] == "--dataset imagenet: 3 classes found, the full set has 1,000"
    assert "val/ is the test set (3 images); 3 images cut from train/ validate; " in caplog.messages[1]
    assert len(caplog.messages) == 2
    assert DATASETS["folder"].classes == DATASETS["folder"].train_images == 0


# ------------------------------------------------------------------------ one line for each wrong tree
@pytest.mark.parametrize("call", [dataset_facts, split_sizes, load_dataset])
def test_folder_without_a_tree_says_how_it_should_look(tmp_path, call):
    missing = tmp_path / "nowhere"
    message = refused(call, "folder", data_dir=missing)
    assert message.startswith(f"--dataset folder: there is no folder '{missing}'; --data must name a folder with")
    if call is not load_dataset:
        assert "train/CLASS/*.jpg" in refused(call, "folder")


@pytest.mark.parametrize(("name", "files", "words"), [
    ("imagenet", "val/a/1.jpg", "no folder train/"), ("imagenet", "train/a/1.jpg", "no folder val/"),
    ("folder", "train", "no folder train/"), ("folder", "train/1.jpg", "train' holds no class folders"),
    ("folder", "train/a/1.txt", "train/a' holds no images"),
    ("folder", "train/a/1.jpg train/b/deeper/1.heic", "train/b' holds no images"),
    ("folder", "train/a/1.jpg train/b/2.jpg", "2 images, too few"),
    ("folder", "train/a/1.jpg train/a/2.jpg", "holds one class only (a)"),
    ("folder", "train/a/1.jpg train/b/1.jpg val/a/1.jpg valid/a/1.jpg", "holds val/ and valid/; keep one"),
    ("imagenet", "train/a/1.jpg val/a/1.txt", "val' holds no class folders with images"),
    ("imagenet", "train/a/1.jpg val/a/1.jpg val/b/1.jpg", "val/b' is not among those of train/"),
    ("folder", "train/a/1.jpg test/b/1.jpg", "test/b' is not among those of train/"),
    ("tiny-imagenet", "train/a/1.jpg val/images/1.jpg", "val_annotations.txt' is missing"),
    ("v0.JPEG\tn2\t0\nv9.JPEG\tn1\t0\n", "", "val_annotations.txt' names 'v9.JPEG', which is not in val/images/"),
    ("v0.JPEG\tn2\t0\nv1.JPEG\tn3\t0\n", "", "val_annotations.txt' line 2: class 'n3' is not among those of"),
    ("v0.JPEG\n", "", "val_annotations.txt' line 1: class '' is not among those of train/"),
    ("", "", "val_annotations.txt' is empty"),
])  # fmt: skip
def test_a_wrong_tree_is_one_line(tmp_path, name, files, words):
    """Without files, `name` is what val_annotations.txt says."""
    touch(tmp_path, *files.split()) if files else write_tiny(tmp_path, name)
    name = name if files else "tiny-imagenet"
    message = refused(load_dataset, name, tmp_path)
    assert words in message
    assert message.startswith(f"--dataset {name}: ")
    assert "--data must name a folder with train/CLASS/" in message
    assert ("val/val_annotations.txt" in message) == (name == "tiny-imagenet")


def test_a_folder_that_may_not_be_listed_is_one_line(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    touch_classes(tmp_path, "train", 3)
    monkeypatch.setattr(os, "scandir", refuse)  # root may list what it likes
    message = refused(load_dataset, "folder", tmp_path)
    assert message.startswith(f"--dataset folder: '{tmp_path}' cannot be read ([Errno 13] Permission denied")


def test_bad_arguments_come_before_the_listing_and_what_leaves_nothing_after_it(tmp_path):
    for flag in ("val_fraction", "train_limit"):
        assert refused(load_dataset, "folder", tmp_path / "none", **{flag: 0}).startswith(f"--{flag} 0: ")
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    message = refused(load_dataset, "imagenet", tmp_path, val_fraction=0.9)
    assert "--val_fraction 0.9: leaves nothing to train on of 2 images" in message


# ------------------------------------------------------------------------------------------ evaluation
def by_hand(path, size, shorter):
    """Pillow alone: shorter side to `shorter`, then the middle."""
    image = Image.open(path).convert("RGB")
    scaled = [shorter if side == min(image.size) else int(shorter * side / min(image.size)) for side in image.size]
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1).long()


@pytest.mark.parametrize(
    ("size", "shorter", "width", "height"),
    [(24, 24, 48, 40), (24, 24, 31, 61), (127, 127, 150, 170), (128, 146, 200, 160), (132, 151, 200, 160)],
)
def test_evaluation_shows_the_middle_of_the_resized_image(tmp_path, size, shorter, width, height):
    split = write_images(tmp_path, 3, size, width=width, height=height)
    shown, labels = next(FolderBatches(split, IMAGENET, 3, aug="strong").sequential())
    assert shown.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2]
    assert torch.equal(pixels_of(shown), torch.stack([by_hand(split.path(i), size, shorter) for i in range(3)]))


def test_every_mode_of_pillow_becomes_rgb_without_a_warning_and_is_normalised(tmp_path, monkeypatch):
    colour, deep = (200, 100, 50), np.full((40, 30), 77 * 256 + 130, dtype=np.uint16)
    files = {
        "rgb.png": Image.new("RGB", (30, 40), colour),
        "grey.png": Image.new("L", (30, 40), 77),
        "palette.png": Image.new("RGB", (30, 40), colour).quantize(4),
        "alpha.png": Image.new("RGBA", (30, 40), (*colour, 128)),
        "grey_alpha.png": Image.new("LA", (30, 40), (77, 9)),
        "binary.png": Image.new("1", (30, 40), 1),
        "cmyk.tif": Image.new("CMYK", (30, 40), (55, 155, 205, 0)),  # ink: 255 minus the colour
        "grey16.png": Image.fromarray(deep),
        "grey16.pgm": Image.fromarray(deep),
        "grey.jpg": Image.new("L", (30, 40), 77),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 30 x 40 lies between this and twice this, an error
    split = FolderSplit(np.array([n.encode() for n in files]), torch.arange(len(files)), tmp_path, 16, "folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shown, _ = next(FolderBatches(split, IMAGENET, len(files)).sequential())
    assert caught == []
    for name, image in zip(files, shown.double().numpy(), strict=True):
        pixel = (77, 77, 77) if "grey" in name else (255, 255, 255) if "binary" in name else colour
        assert np.abs(image - ((np.array(pixel) / 255 - MEAN) / STD)[:, None, None]).max() < 1e-5, name


# -------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(("aug", "seed"), [("none", 2**32 + 1), ("basic", 9), ("strong", -1)])
def test_a_training_image_equals_torchvisions_functional_transforms(tmp_path, aug, seed):
    """Order and images are seeded by NumPy's SeedSequence, spawn keys (state, epoch) and (state, epoch, position)."""
    from torchvision import transforms
    from torchvision.transforms import functional, v2

    def seed_of(*key):
        return int(np.random.SeedSequence(seed % 2**64, spawn_key=key).generate_state(1, np.uint64)[0])

    split = write_images(tmp_path, 30, width=60, height=50)
    batches = FolderBatches(split, IMAGENET, 10, seed=seed, aug=aug)
    order, flips = torch.randperm(30, generator=torch.Generator().manual_seed(seed_of(2, 1))).tolist(), 0
    for position, label in enumerate(order):
        if position % 10 == 0:
            shown, labels = batches.batch(2, 1, position // 10)
            assert labels.tolist() == order[position : position + 10]
        if aug == "none":
            assert torch.equal(pixels_of(shown[position % 10]), by_hand(split.path(label), 24, 24))
            continue
        image = Image.open(split.path(label)).convert("RGB")
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(2, 1, position))
            box = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            flip = torch.rand(1) < 0.5
            image = functional.resized_crop(image, *box, [24, 24])
            image = functional.hflip(image) if flip else image
            image = v2.RandAugment()(image) if aug == "strong" else image
        flips += int(flip)
        assert torch.equal(pixels_of(shown[position % 10]), functional.pil_to_tensor(image).long())
    assert aug == "none" or 5 < flips < 25


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_in_any_order_equals_the_run_in_order_and_disturbs_nothing_else(tmp_path, workers):
    def random_states():
        return torch.get_rng_state().tolist(), [part.tolist() for part in np.random.get_state()[1:2]], random.getstate()

    split, before = write_images(tmp_path, 13), random_states()
    (tmp_path / "004.jpg").write_bytes(b"no image")
    played, batches = (FolderBatches(split, IMAGENET, 4, seed=3, aug="strong", workers=w) for w in (0, workers))
    batches = pickle.loads(pickle.dumps(batches))  # as it goes to workers that are spawned
    sequence = {**in_order(played, 3), **in_order(played, 2, state=1)}
    # In order; from the middle on into whole epochs of the stream's own state; again; anywhere.
    keys = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 1), (1, 1, 2), (0, 2, 0)]
    keys += [] if workers else random.Random(0).sample(sorted(sequence), len(sequence))
    validation, kept = batches.sequential(), {}
    for number, key in enumerate(keys):
        kept[key] = batches.batch(*key)
        assert same(kept[key], sequence[key]), key
        assert number != 1 or next(validation)[1].tolist() == [0, 1, 2, 3]  # meanwhile
    assert [labels.tolist() for _, labels in validation] == [[5, 6, 7], [8, 9, 10, 11], [12]]
    assert all(same(kept[key], sequence[key]) for key in keys)
    assert all(same(a, b) for a, b in zip(batches.sequential(), played.sequential(), strict=True))
    batches.close()
    assert random_states() == before


def test_last_incomplete_batch_is_dropped_in_training_unless_it_is_the_only_one(tmp_path):
    split = write_images(tmp_path, 11)
    batches, only = FolderBatches(split, IMAGENET, 4), FolderBatches(split, IMAGENET, 64)
    assert (len(batches), batches.steps_per_epoch, only.steps_per_epoch) == (11, 2, 1)
    for step in (2, -1):
        with pytest.raises(IndexError, match=f"step {step}: an epoch has 2 steps"):
            batches.batch(0, 0, step)
    for epoch in range(2):
        shown, labels = only.batch(0, epoch, 0)
        assert shown.shape == (11, 3, 24, 24)
        assert sorted(labels.tolist()) == list(range(11))
    for limit, sizes in ((0, []), (2, [4, 4]), (9, [4, 4, 3]), (None, [4, 4, 3])):
        assert [len(labels) for _, labels in batches.sequential(limit)] == sizes


def test_bad_batch_arguments_raise(tmp_path):
    split = write_images(tmp_path, 2)
    for batch_size, arguments, words in (
        (2, {"aug": "weak"}, "weak"),
        (2, {"workers": -1}, "workers -1"),
        (0, {}, "batch_size 0"),
    ):
        with pytest.raises(ValueError, match=words):
            FolderBatches(split, IMAGENET, batch_size, **arguments)


def test_the_factory_chooses_by_the_kind_of_split(tmp_path):
    small = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
    for split, kind in ((write_images(tmp_path, 4), FolderBatches), (small, Batches)):
        made = make_batches(split, IMAGENET, 2, "cpu", seed=1, aug="basic", workers=1)
        assert (type(made), made.batch_size, made.seed, made.aug) == (kind, 2, 1, "basic")
        assert getattr(made, "workers", 1) == 1
        made.close()
        assert len(made.batch(0, 0, 0)[1]) == 2
        made.close()


# ------------------------------------------------------------------------------ what is read, and when
def test_loading_opens_no_image_and_a_batch_only_its_own(tmp_path, monkeypatch):
    opened, really_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(os.path.basename(path)), really_open(path))[1])
    split = write_images(tmp_path, 13)
    load_dataset("folder", touch_classes(tmp_path / "tree", "train", 10, 10))
    batches = FolderBatches(split, IMAGENET, 3, aug="basic")
    assert opened == []
    order = [names(split)[i] for i in FolderBatches(split, IMAGENET, 13).batch(0, 1, 0)[1]]
    opened.clear()
    batches.batch(0, 1, 2)  # a resumed run
    assert opened == order[6:9]
    batches.batch(0, 1, 3)
    assert opened == order[6:12]
    opened.clear()
    next(batches.sequential())
    assert opened == names(split)[:3]


def test_workers_stay_over_the_epochs_leave_ctrl_c_alone_and_end_when_closed(tmp_path):
    split = write_images(tmp_path, 6)
    batches = FolderBatches(split, IMAGENET, 3, workers=2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    for step in range(2):  # one of each worker, which stands by then
        batches.batch(0, 0, step)
    signal.signal(signal.SIGINT, before)
    workers = {child.pid for child in multiprocessing.active_children()}
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    for epoch, step in [(1, 0), (1, 1), (2, 0)]:
        batches.batch(0, epoch, step)
    assert {child.pid for child in multiprocessing.active_children()} == workers
    batches.close()
    assert multiprocessing.active_children() == []
    stream = batches.sequential(limit=1)
    next(stream)
    assert len(multiprocessing.active_children()) == 1  # as many as there is work for
    stream.close()
    assert multiprocessing.active_children() == []


# -------------------------------------------------------------------------- images that cannot be read
def spoil(path, how="junk"):
    content = path.read_bytes()
    path.unlink()
    if how == "dangling link":
        path.symlink_to(path.parent / "nowhere.jpg")
    elif how == "broken png":
        noise(0, 200, 200).save(path, "PNG")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + bytes(9) + content[len(content) // 2 + 9 :])
    elif how != "vanished":
        path.write_bytes({"junk": b"<html>", "empty": b"", "truncated": content[: len(content) * 2 // 3]}[how])


@pytest.mark.parametrize("how", ["junk", "empty", "truncated", "vanished", "broken png", "dangling link"])
def test_a_broken_image_is_left_out_of_evaluation_and_logged_once(tmp_path, caplog, how):
    split = write_images(tmp_path, 9)
    spoil(tmp_path / "008.jpg", how)
    batches = FolderBatches(split, IMAGENET, 4)
    for _ in range(2):
        parts = list(batches.sequential())
        assert [labels.tolist() for _, labels in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert (len(batches), batches.unreadable) == (8, 1)
    assert len([message for message in caplog.messages if "skipped" in message]) == 1
    reason = {"junk": "cannot identify image file)", "vanished": "No such file or directory)"}.get(how, "")
    assert f"{tmp_path / '008.jpg'}: cannot be read as an image ({reason}" in caplog.text
    assert caplog.text.count("008.jpg") == 1
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_in_training_the_next_readable_image_of_the_order_stands_in(tmp_path, caplog):
    split = write_images(tmp_path, 200, size=8, width=12, height=12)  # two may be broken
    order = FolderBatches(split, IMAGENET, 200, seed=6).batch(0, 0, 0)[1].tolist()
    files = [tmp_path / name for name in names(split)]
    # Two neighbours in the middle, of which the first ends a batch, or the last of all, which wraps around.
    for stand_ins in ({9: 11, 10: 11}, {199: 0}):
        healthy = {position: files[order[position]].read_bytes() for position in stand_ins}
        for position in stand_ins:
            spoil(files[order[position]])
        batches = FolderBatches(split, IMAGENET, 10, seed=6)
        shown = torch.cat([labels for _, labels in in_order(batches, epochs=1).values()]).tolist()
        in_order(batches, epochs=1, state=1)  # an image is counted once, however often it is met
        assert shown == [order[stand_ins.get(position, position)] for position in range(200)]
        assert len(batches) == 200 - len(stand_ins)
        for position, content in healthy.items():
            files[order[position]].write_bytes(content)
    assert len([message for message in caplog.messages if "skipped" in message]) == 3


@pytest.mark.parametrize(("count", "bearable"), [(1, 0), (2, 1), (5, 1), (200, 2)])
def test_more_than_a_hundredth_of_broken_images_stops_but_never_one_nor_all(tmp_path, count, bearable):
    split = write_images(tmp_path, count, size=8, width=12, height=12)
    files = [tmp_path / name for name in names(split)]
    runs = [lambda b: list(b.sequential()), lambda b: in_order(b, 1)]
    for label in range(bearable):
        spoil(files[label])
    assert bearable == 0 or runs[0](FolderBatches(split, IMAGENET, 20))
    spoil(files[-1], "vanished")
    for run in runs:
        message = refused(run, FolderBatches(split, IMAGENET, 20))
        assert f"--dataset folder: {bearable + 1} of {count} images cannot be read (first: {tmp_path}/" in message
        assert message.count(f"{tmp_path}/") == min(3, bearable + 1)


def test_a_class_without_a_readable_image_is_named(tmp_path, caplog):
    for number in range(4):
        name = tmp_path / ("rare" if number == 3 else "often") / f"{number}.png"
        name.parent.mkdir(exist_ok=True)
        noise(number).save(name)
    spoil(name)
    paths = np.array([os.fsencode(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.png"))])
    split = FolderSplit(paths, torch.tensor([0, 0, 0, 1]), tmp_path, 8, "folder")
    list(FolderBatches(split, IMAGENET, 4).sequential())
    assert caplog.messages[1:] == [f"{tmp_path / 'rare'}: no image of this class can be read"]


# ----------------------------------------------------------------------------------- workers that fail
def fail(error):
    raise error


@pytest.mark.parametrize(("place", "act", "reason"), [
    ("PIL.Image.open", lambda _: os._exit(3), "exited unexpectedly"),
    ("PIL.Image.open", lambda _: time.sleep(1.5), "no batch in 0.3 seconds"),
    ("PIL.Image.open", lambda _: fail(OSError(errno.EMFILE, "Too many open files")), "Too many open files"),
    ("torch.Tensor.share_memory_", lambda _: fail(RuntimeError("no shm\nNo space (28)")), "(No space (28))"),
])  # fmt: skip
def test_a_worker_that_fails_is_one_line(tmp_path, monkeypatch, place, act, reason):
    monkeypatch.setattr(images.folders, "WORKER_CHECK", 0.1)
    monkeypatch.setattr(images.folders, "WORKER_PATIENCE", 0.3 if "no batch" in reason else 60)
    batches = FolderBatches(write_images(tmp_path, 8), IMAGENET, 1, workers=2)
    monkeypatch.setattr(place, act)
    message = refused(lambda: list(batches.sequential()))
    assert message.startswith("--workers 2: reading --dataset folder failed (")
    assert reason in message
    assert "lower --workers when memory or shared memory (/dev/shm) runs out" in message


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError("no memory")])
def test_what_is_not_the_images_fault_is_raised_as_it_is(tmp_path, monkeypatch, error):
    batches = FolderBatches(write_images(tmp_path, 4), IMAGENET, 2)
    monkeypatch.setattr(Image, "open", lambda _: fail(error))
    with pytest.raises(type(error), match=str(error.args[-1])):
        batches.batch(0, 0, 0)


def test_a_slow_worker_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(images.folders, "WORKER_CHECK", 0.1)
    batches, really_open = FolderBatches(write_images(tmp_path, 2), IMAGENET, 1, workers=1), Image.open
    monkeypatch.setattr(Image, "open", lambda path: (time.sleep(0.3), really_open(path))[1])
    assert batches.batch(0, 0, 0)[0].shape == (1, 3, 24, 24)
    batches.close()


def test_a_worker_killed_meanwhile_shows_at_the_next_batch_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(images.folders, "WORKER_CHECK", 0.1)
    split = write_images(tmp_path, 40)
    batches = FolderBatches(split, IMAGENET, 1, workers=2)
    batches.batch(0, 0, 0)
    worker = multiprocessing.active_children()[0].pid
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # a signal handler that raises would do it here
    message = refused(lambda: [batches.batch(0, 0, step) for step in range(1, 40)])
    assert message.startswith("--workers 2: reading --dataset folder failed (")
    monkeypatch.undo()
    assert same(batches.batch(0, 0, 0), FolderBatches(split, IMAGENET, 1).batch(0, 0, 0))
    batches.close()


@pytest.mark.slow
def test_spawned_workers_make_the_same_bits(tmp_path):
    split = write_images(tmp_path, 8)
    expected = in_order(FolderBatches(split, IMAGENET, 4, aug="strong"), epochs=1)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        batches = FolderBatches(split, IMAGENET, 4, aug="strong", workers=1)
        assert all(same(batch, expected[key]) for key, batch in in_order(batches, epochs=1).items())
        batches.close()
    finally:
        multiprocessing.set_start_method(before, force=True)
