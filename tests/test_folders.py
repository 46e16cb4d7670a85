"""Laws of the image-folder data sets of dataset.py: what is listed, how it is split, and what a batch holds."""

import errno
import logging
import math
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
from PIL import Image, ImageFile

import dataset
from dataset import (
    DATASETS,
    Batches,
    DataError,
    FolderBatches,
    FolderSplit,
    Split,
    dataset_facts,
    load_dataset,
    make_batches,
    split_sizes,
)

IMAGENET = DATASETS["imagenet"]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TINY_LAYOUTS = ("by class", "original")


def touch(root, *names):
    """Empty files: whoever opens one as an image finds out."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def touch_classes(root, part, counts):
    return touch(root, *(f"{part}/c{c}/{i:03}.jpg" for c, count in enumerate(counts) for i in range(count)))


def write_tiny(root, layout, annotations=None):
    """Two classes of 10 training images; val holds v0, v2 of class n2 and v1 of class n1."""
    inner = "images/" if layout == "original" else ""
    touch(root, *(f"train/{c}/{inner}{c}_{i}.JPEG" for c in ("n1", "n2") for i in range(10)))
    if layout == "by class":
        return touch(root, "val/n2/v0.JPEG", "val/n2/v2.JPEG", "val/n1/v1.JPEG")
    touch(root, *(f"val/images/v{i}.JPEG" for i in range(3)))
    boxes = "v2.JPEG\tn2\t0\t0\t62\t62\nv0.JPEG\tn2\t1\t2\t3\t4\nv1.JPEG\tn1\t0\t0\t62\t62\n"
    (root / "val" / "val_annotations.txt").write_text(boxes if annotations is None else annotations)
    return root


def names(split):
    return [os.fsdecode(path) for path in split.paths]


def refused(call, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def noise(number, width=48, height=40):
    """A smooth random picture: what JPEG keeps, and what shows where a crop lies."""
    generator = np.random.default_rng(number)
    small = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_images(root, count, size=24, **shape):
    """Image i has label i. One lies as PNG under .jpg, one is grey, one in capitals."""
    files = []
    for i in range(count):
        name = f"{i:03}.JPG" if i == 1 else f"{i:03}.jpg"
        image = noise(i, **shape).convert("L" if i == 2 else "RGB")
        image.save(root / name, "PNG" if i == 0 else "JPEG")
        files.append(name.encode())
    return FolderSplit(np.array(files), torch.arange(count), root, size, "folder")


def without(split, kept):
    return FolderSplit(split.paths[kept], split.labels[kept], split.root, split.image_size, split.dataset)


def pixels_of(images):
    """Undoes the normalisation: int64 0..255."""
    exact = (images.double() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    assert (exact - exact.round()).abs().max() < 1e-3
    return exact.round().long()


def in_order(batches, epochs=2, state=0):
    return {
        (state, epoch, step): batches.batch(state, epoch, step)
        for epoch in range(epochs)
        for step in range(batches.steps_per_epoch)
    }


def fresh(split):
    return FolderBatches(split, IMAGENET, 3, seed=2, aug="basic")


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that Pillow was asked to open in this process."""
    seen, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: (seen.append(os.path.basename(path)), real(path, *rest))[1])
    return seen


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test():
    yield
    assert multiprocessing.active_children() == []


# Listing


def test_images_are_listed_by_sorted_class_and_name_and_other_files_ignored(tmp_path):
    kinds = ("b.JPG", "a.jpeg", "c.PNG", "d.bmp", "e.webp", "f.ppm", "g.pgm", "h.tif", "i.Tiff", "j.jpg")
    touch(tmp_path, *(f"train/zebra/{kind}" for kind in kinds), "train/ant/x.jpg", "train/ant/B.jpg")
    touch(tmp_path, "train/ant/notes.txt", "train/ant/x.gif", "train/ant/._x.jpg", "train/.hidden/x.jpg", "train/x.jpg")
    touch(
        tmp_path,
        "train/ant/folder.jpg/inside.jpg",
        "val/zebra/1.jpg",
        "val/ant/2.jpg",
        "test/ant/3.jpg",
        "test/zebra/4.jpg",
    )
    splits = load_dataset("folder", str(tmp_path))
    train = ["train/ant/B.jpg", "train/ant/x.jpg", *sorted(f"train/zebra/{kind}" for kind in kinds)]
    assert sorted(names(splits.train)) == train
    assert [name.startswith("train/zebra") for name in names(splits.train)] == splits.train.labels.tolist()
    assert (names(splits.val), splits.val.labels.tolist()) == (["val/ant/2.jpg", "val/zebra/1.jpg"], [0, 1])
    assert (names(splits.test), splits.test.labels.tolist()) == (["test/ant/3.jpg", "test/zebra/4.jpg"], [0, 1])
    assert splits.test.path(0) == str(tmp_path / "test/ant/3.jpg")
    assert splits.test.labels.dtype == torch.int64
    assert splits.facts.classes == 2


def test_names_that_are_no_text_survive(tmp_path):
    touch_classes(tmp_path, "train", [9])
    odd = os.fsencode(tmp_path / "train" / "c0") + b"/\xff\xe9 \xc3\xa9.jpg"
    noise(0).save(odd.decode("utf-8", "surrogateescape"), "PNG")
    splits = load_dataset("folder", tmp_path)
    found = [split.path(i) for split in (splits.train, splits.val, splits.test) for i in range(len(split.labels))]
    assert odd in [os.fsencode(path) for path in found]


@pytest.mark.parametrize("name", ["imagenet", "tiny-imagenet"])
def test_val_of_imagenet_is_the_test_set_and_validation_is_cut_balanced_from_train(tmp_path, name):
    touch_classes(tmp_path, "train", [30, 30, 30])
    touch_classes(tmp_path, "val", [2, 0, 1])
    torch.manual_seed(1)
    splits = load_dataset(name, tmp_path, val_fraction=0.2)
    torch.manual_seed(2)
    again = load_dataset(name, tmp_path, val_fraction=0.2, train_limit=10)

    assert names(splits.test) == ["val/c0/000.jpg", "val/c0/001.jpg", "val/c2/000.jpg"]
    assert splits.test.labels.tolist() == [0, 0, 2]
    both = names(splits.train) + names(splits.val)
    assert sorted(both) == sorted(f"train/c{c}/{i:03}.jpg" for c in range(3) for i in range(30))
    assert torch.bincount(splits.val.labels).tolist() == [6, 6, 6]
    for split in (splits.train, splits.val):
        assert [int(path.split("/")[1][1:]) for path in names(split)] == split.labels.tolist()
    assert names(again.val) == names(splits.val)
    assert names(again.train) == names(splits.train)[:10]
    assert sorted(torch.bincount(again.train.labels).tolist()) == [3, 3, 4]
    # Not the listing's first ones: the shuffle within a class matters where files are sorted by origin.
    assert sorted(names(splits.val)) != sorted(f"train/c{c}/{i:03}.jpg" for c in range(3) for i in range(6))


@pytest.mark.parametrize(
    ("parts", "sizes", "line"),
    [
        (["val", "test"], (40, 6, 8), "val/ validates and test/ tests"),
        (["val"], (36, 4, 6), "val/ is the test set, validation is cut from train/"),
        (["test"], (36, 4, 8), "test/ is the test set, validation is cut from train/"),
        ([], (29, 3, 8), "fifth of train/ (8 images) is the test set, validation is cut from the rest"),
    ],
)
def test_roles_of_the_parts_of_a_folder(tmp_path, caplog, parts, sizes, line):
    touch_classes(tmp_path, "train", [20, 20])
    for part in parts:
        touch_classes(tmp_path, part, {"val": [3, 3], "test": [4, 4]}[part])
    with caplog.at_level(logging.INFO):
        assert split_sizes("folder", 0.1, None, tmp_path) == sizes[:2]
        assert split_sizes("folder", 0.1, 7, tmp_path) == (7, sizes[1])
        facts = dataset_facts("folder", tmp_path)
        assert not caplog.records
        splits = load_dataset("folder", tmp_path)
    assert len(caplog.records) == 1
    assert line in caplog.text
    assert tuple(len(split.labels) for split in (splits.train, splits.val, splits.test)) == sizes
    assert splits.facts == facts
    assert facts.train_images == {6: 40, 4: 40, 3: 32}[sizes[1]]
    everything = names(splits.train) + names(splits.val) + names(splits.test)
    assert len(set(everything)) == len(everything) == 40 + 6 * ("val" in parts) + 8 * ("test" in parts)
    assert torch.bincount(splits.test.labels).tolist() == [sizes[2] // 2] * 2
    assert names(splits.test) == sorted(names(splits.test))
    assert names(load_dataset("folder", tmp_path).test) == names(splits.test)


@pytest.mark.parametrize("layout", TINY_LAYOUTS)
def test_tiny_imagenet_in_both_layouts(tmp_path, layout):
    splits = load_dataset("tiny-imagenet", write_tiny(tmp_path, layout))
    shown = {
        os.path.basename(path): label
        for path, label in zip(names(splits.test), splits.test.labels.tolist(), strict=True)
    }
    assert shown == {"v0.JPEG": 1, "v1.JPEG": 0, "v2.JPEG": 1}
    assert all(os.path.exists(splits.test.path(i)) for i in range(3))
    assert all(os.path.exists(splits.train.path(i)) for i in range(18))
    assert [("n1", "n2").index(path.split("/")[1]) for path in names(splits.train)] == splits.train.labels.tolist()
    if layout == "original":
        assert names(splits.test) == [f"val/images/v{i}.JPEG" for i in range(3)]
    assert splits.train.image_size == 64
    assert load_dataset("tiny-imagenet", tmp_path, image_size=32).val.image_size == 32


def test_images_without_annotation_are_left_out_with_a_warning(tmp_path, caplog):
    write_tiny(tmp_path, "original", annotations="v0.JPEG\tn2\t0\t0\t1\t1\n")
    assert names(load_dataset("tiny-imagenet", tmp_path).test) == ["val/images/v0.JPEG"]
    assert "2 images" in caplog.text


def test_facts_are_official_without_data_and_counted_with_it(tmp_path, caplog):
    assert dataset_facts("imagenet", tmp_path) is DATASETS["imagenet"]
    assert (IMAGENET.classes, IMAGENET.train_images, IMAGENET.vit_image_size) == (1000, 1_281_167, 224)
    tiny = dataset_facts("tiny-imagenet")
    assert (tiny.classes, tiny.train_images, tiny.image_size, tiny.vit_image_size) == (200, 100_000, 64, 64)
    assert dataset_facts("digits", tmp_path) is DATASETS["digits"]
    # 1,281,167 / 10 = 128,116.7
    assert split_sizes("imagenet", 0.1, None) == (1_153_050, 128_117)
    assert split_sizes("tiny-imagenet", 0.1, 500, tmp_path) == (500, 10_000)

    touch_classes(touch_classes(tmp_path, "train", [10, 10, 10]), "val", [1, 1, 1])
    facts = dataset_facts("imagenet", tmp_path)
    assert (facts.classes, facts.train_images) == (3, 30)
    assert (facts.mean, facts.std) == (IMAGENET.mean, IMAGENET.std)
    assert split_sizes("imagenet", 0.1, None, tmp_path) == (27, 3)
    with caplog.at_level(logging.INFO):
        assert load_dataset("imagenet", tmp_path).facts == facts
    assert caplog.messages == ["--dataset imagenet: 3 classes found, the full set has 1000"]
    assert DATASETS["folder"].classes == DATASETS["folder"].train_images == 0


# One line for each wrong tree


@pytest.mark.parametrize("call", [dataset_facts, split_sizes, load_dataset])
def test_folder_without_a_tree_says_how_it_should_look(tmp_path, call):
    missing = tmp_path / "nowhere"
    message = refused(call, "folder", data_dir=missing)
    assert str(missing) in message
    assert "train/CLASS/*.jpg" in message
    assert "--data " in message


@pytest.mark.parametrize("call", [dataset_facts, split_sizes])
def test_folder_needs_a_data_folder(call):
    assert "train/CLASS/*.jpg" in refused(call, "folder")


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("imagenet", ["val/a/1.jpg"], "no folder train/"),
        ("imagenet", ["train/a/1.jpg"], "no folder val/"),
        ("tiny-imagenet", ["train/a/1.jpg"], "val/val_annotations.txt"),
        ("folder", ["val/a/1.jpg"], "no folder train/"),
        ("folder", ["train"], "no folder train/"),
        ("folder", ["train/1.jpg"], "holds no class folders"),
        ("folder", ["train/a/1.txt"], "train/a' holds no images"),
        ("folder", ["train/a/1.jpg", "train/b/deeper/1.jpg"], "train/b' holds no images"),
        ("folder", ["train/a/1.jpg", "train/a/2.jpg"], "2 images, too few"),
        ("imagenet", ["train/a/1.jpg", "val/1.jpg"], "val' holds no class folders"),
        ("imagenet", ["train/a/1.jpg", "val/a/1.txt"], "val' holds no class folders with images"),
        ("imagenet", ["train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg"], "val/b' is not among those of train/"),
        ("folder", ["train/a/1.jpg", "test/b/1.jpg"], "test/b' is not among those of train/"),
        ("imagenet", ["train/a/1.jpg", "val/a/1.jpg"], "--val_fraction 0.1: leaves nothing to train on of 1 images"),
        ("tiny-imagenet", ["train/a/1.jpg", "val/images/1.jpg"], "val_annotations.txt' is missing"),
    ],
)
def test_a_wrong_tree_is_one_line(tmp_path, name, files, words):
    message = refused(load_dataset, name, touch(tmp_path, *files))
    assert words in message
    if "--val_fraction" not in message:
        assert message.startswith(f"--dataset {name}: ")
        assert "--data must name a folder with train/CLASS/" in message


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ("v0.JPEG\tn2\t0\t0\t1\t1\nv9.JPEG\tn1\t0\t0\t1\t1\n", "names 'v9.JPEG', which is not in val/images/"),
        ("v0.JPEG\tn2\t0\nv1.JPEG\tn3\t0\n", "line 2: class 'n3' is not among those of train/"),
        ("v0.JPEG\n", "line 1: class '' is not among those of train/"),
        ("", "is empty"),
    ],
)
def test_wrong_annotations_are_one_line(tmp_path, annotations, words):
    message = refused(load_dataset, "tiny-imagenet", write_tiny(tmp_path, "original", annotations))
    assert words in message
    assert "val_annotations.txt" in message


def test_a_folder_that_may_not_be_listed_is_one_line(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    touch_classes(tmp_path, "train", [3])
    monkeypatch.setattr(os, "scandir", refuse)
    message = refused(load_dataset, "folder", tmp_path)
    assert "Permission denied" in message
    assert message.startswith(f"--dataset folder: '{tmp_path}' cannot be read (")


def test_bad_arguments_come_before_the_listing(tmp_path):
    assert "--val_fraction 0" in refused(load_dataset, "imagenet", tmp_path / "none", val_fraction=0)
    assert "--train_limit 0" in refused(load_dataset, "folder", tmp_path / "none", train_limit=0)
    assert "--img_size 0" in refused(load_dataset, "imagenet", tmp_path / "none", image_size=0)


# Evaluation


def by_hand(path, size, shorter):
    """Pillow alone: shorter side to `shorter`, then the middle."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if width <= height:
        image = image.resize((shorter, int(shorter * height / width)), Image.Resampling.BILINEAR)
    else:
        image = image.resize((int(shorter * width / height), shorter), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1).long()


@pytest.mark.parametrize("aug", ["none", "strong"])
@pytest.mark.parametrize(
    ("size", "shorter", "shape"),
    [
        (24, 24, (48, 40)),
        (24, 24, (31, 61)),
        (127, 127, (150, 170)),
        (128, 146, (200, 160)),
        (132, 151, (200, 160)),
        (224, 256, (300, 260)),
    ],
)
def test_evaluation_shows_the_middle_of_the_resized_image(tmp_path, aug, size, shorter, shape):
    split = write_images(tmp_path, 3, size, width=shape[0], height=shape[1])
    images, labels = next(FolderBatches(split, IMAGENET, 3, aug=aug).sequential())
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2]
    expected = torch.stack([by_hand(split.path(i), size, shorter) for i in range(3)])
    assert torch.equal(pixels_of(images), expected)


def test_every_mode_of_pillow_becomes_rgb_and_is_normalised_by_hand(tmp_path):
    colour = (200, 100, 50)
    files = {
        "rgb.png": Image.new("RGB", (30, 40), colour),
        "grey.png": Image.new("L", (30, 40), 77),
        "palette.png": Image.new("RGB", (30, 40), colour).quantize(4),
        "alpha.png": Image.new("RGBA", (30, 40), (*colour, 128)),
        "grey_alpha.png": Image.new("LA", (30, 40), (77, 9)),
        "binary.png": Image.new("1", (30, 40), 1),
        "cmyk.tif": Image.new("CMYK", (30, 40), (55, 155, 205, 0)),  # ink: 255 minus the colour
        "grey16.png": Image.fromarray(np.full((40, 30), 77 * 256 + 130, dtype=np.uint16)),
        "grey16.pgm": Image.fromarray(np.full((40, 30), 77 * 256 + 130, dtype=np.uint16)),
        "rgb.bmp": Image.new("RGB", (30, 40), colour),
        "grey.jpg": Image.new("L", (30, 40), 77),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
    split = FolderSplit(np.array([n.encode() for n in files]), torch.arange(len(files)), tmp_path, 16, "folder")
    images, labels = next(FolderBatches(split, IMAGENET, len(files)).sequential())
    assert labels.tolist() == list(range(len(files)))
    for name, image in zip(files, images.double().numpy(), strict=True):
        pixel = (77, 77, 77) if "grey" in name else (255, 255, 255) if "binary" in name else colour
        expected = (np.array(pixel) / 255 - MEAN) / STD
        assert np.abs(image - expected[:, None, None]).max() < 1e-5, name


def test_sequential_shows_every_image_and_counts_batches(tmp_path):
    batches = FolderBatches(write_images(tmp_path, 11), IMAGENET, 4, aug="strong")
    assert len(batches) == 11
    assert [labels.tolist() for _, labels in batches.sequential()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [len(labels) for _, labels in batches.sequential(limit=2)] == [4, 4]
    assert [len(labels) for _, labels in batches.sequential(limit=9)] == [4, 4, 3]
    assert list(batches.sequential(limit=0)) == []


# Training


@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
def test_any_step_in_any_order_with_any_workers_equals_the_run_in_order(tmp_path, aug):
    split = write_images(tmp_path, 13)
    (tmp_path / "004.jpg").write_bytes(b"no image")
    played = FolderBatches(split, IMAGENET, 4, seed=3, aug=aug)
    sequence = in_order(played)
    assert list(sequence) == [(0, e, s) for e in range(2) for s in range(3)]
    shuffled = random.Random(0).sample(sorted(sequence), len(sequence))
    alone = FolderBatches(split, IMAGENET, 4, seed=3, aug=aug)
    assert all(same(alone.batch(*key), sequence[key]) for key in shuffled)
    assert all(same(alone.batch(*key), sequence[key]) for key in [shuffled[0]] * 2)

    worked = FolderBatches(split, IMAGENET, 4, seed=3, aug=aug, workers=2)
    assert all(same(batch, sequence[key]) for key, batch in in_order(worked).items())
    assert all(same(worked.batch(*key), sequence[key]) for key in shuffled[:2])
    assert all(same(a, b) for a, b in zip(worked.sequential(), played.sequential(), strict=True))
    worked.close()


def test_a_stream_that_starts_in_the_middle_goes_on_into_whole_epochs_of_its_own_state(tmp_path):
    split = write_images(tmp_path, 9)
    expected = {key: batch for state in (0, 1) for key, batch in in_order(fresh(split), 3, state).items()}
    batches = fresh(split)
    for key in [(0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (1, 1, 2), (1, 2, 0), (0, 2, 1)]:
        assert same(batches.batch(*key), expected[key]), key


@pytest.mark.parametrize("workers", [0, 2])
def test_two_streams_side_by_side_do_not_disturb_each_other(tmp_path, workers):
    split = write_images(tmp_path, 8)
    expected = in_order(FolderBatches(split, IMAGENET, 4, aug="basic"), epochs=1)
    one, two = (FolderBatches(split, IMAGENET, 4, aug="basic", workers=workers) for _ in range(2))
    first = one.batch(0, 0, 0)
    validation = two.sequential()
    next(validation)
    assert same(two.batch(0, 0, 1), expected[0, 0, 1])
    assert same(one.batch(0, 0, 1), expected[0, 0, 1])
    assert same(first, expected[0, 0, 0])
    assert next(validation)[1].tolist() == [4, 5, 6, 7]
    one.close()
    two.close()


def test_seed_state_and_epoch_each_change_order_and_crops(tmp_path):
    split = write_images(tmp_path, 12)
    base = (0, 0, 0)
    keys = [base, (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (2**32, 0, 0), (0, 1, 1)]
    orders, crops = set(), set()
    for seed, state, epoch in keys:
        images, labels = FolderBatches(split, IMAGENET, 12, seed=seed, aug="basic").batch(state, epoch, 0)
        orders.add(tuple(labels.tolist()))
        crops.add(images[labels.argsort()].numpy().tobytes())
    assert len(orders) == len(crops) == len(keys)


def test_two_images_of_an_epoch_are_cropped_differently(tmp_path):
    for name in ("a.png", "b.png"):
        noise(0).save(tmp_path / name)
    split = FolderSplit(np.array([b"a.png", b"b.png"]), torch.arange(2), tmp_path, 24, "folder")
    images, _ = FolderBatches(split, IMAGENET, 2, aug="basic").batch(0, 0, 0)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
def test_each_epoch_shows_each_image_once_in_the_same_order_whatever_the_augmentation(tmp_path, aug):
    split = write_images(tmp_path, 12)
    batches, plain = (FolderBatches(split, IMAGENET, 4, seed=5, aug=a) for a in (aug, "none"))
    for epoch in range(2):
        shown = torch.cat([batches.batch(1, epoch, step)[1] for step in range(3)])
        assert sorted(shown.tolist()) == list(range(12))
        assert torch.equal(shown, torch.cat([plain.batch(1, epoch, step)[1] for step in range(3)]))


@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
def test_a_training_image_equals_torchvisions_functional_transforms(tmp_path, aug):
    """The seed of an image is that of NumPy's SeedSequence with spawn key (state, epoch, position)."""
    from torchvision import transforms
    from torchvision.transforms import functional, v2

    split = write_images(tmp_path, 30, width=60, height=50)
    batches = FolderBatches(split, IMAGENET, 10, seed=9, aug=aug)
    flips = 0
    for step in range(3):
        images, labels = batches.batch(2, 1, step)
        for i, (got, label) in enumerate(zip(pixels_of(images), labels.tolist(), strict=True)):
            if aug == "none":
                assert torch.equal(got, by_hand(split.path(label), 24, 24))
                continue
            sequence = np.random.SeedSequence(9, spawn_key=(2, 1, 10 * step + i))
            image = Image.open(split.path(label)).convert("RGB")
            with torch.random.fork_rng():
                torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
                box = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
                flip = torch.rand(1) < 0.5
                image = functional.resized_crop(image, *box, [24, 24])
                image = functional.hflip(image) if flip else image
                image = v2.RandAugment()(image) if aug == "strong" else image
            flips += int(flip)
            assert torch.equal(got, functional.pil_to_tensor(image).long())
    assert aug == "none" or 5 < flips < 25


def test_last_incomplete_batch_is_dropped_unless_it_is_the_only_one(tmp_path):
    split = write_images(tmp_path, 11)
    batches = FolderBatches(split, IMAGENET, 4)
    assert batches.steps_per_epoch == 2
    with pytest.raises(IndexError, match="2 steps"):
        batches.batch(0, 0, 2)
    with pytest.raises(IndexError):
        batches.batch(0, 0, -1)
    only = FolderBatches(split, IMAGENET, 64, workers=2)
    assert only.steps_per_epoch == 1
    for epoch in range(2):
        images, labels = only.batch(0, epoch, 0)
        assert images.shape == (11, 3, 24, 24)
        assert sorted(labels.tolist()) == list(range(11))
    only.close()


def test_bad_batch_arguments_raise(tmp_path):
    split = write_images(tmp_path, 2)
    for arguments, words in [({"aug": "weak"}, "weak"), ({"workers": -1}, "workers -1")]:
        with pytest.raises(ValueError, match=words):
            FolderBatches(split, IMAGENET, 2, **arguments)
    with pytest.raises(ValueError, match="batch_size 0"):
        FolderBatches(split, IMAGENET, 0)


def test_the_factory_chooses_by_the_kind_of_split(tmp_path):
    folder = make_batches(write_images(tmp_path, 4), IMAGENET, 2, "cpu", seed=1, aug="basic", workers=1)
    assert (type(folder), folder.seed, folder.aug, folder.workers) == (FolderBatches, 1, "basic", 1)
    small = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
    resident = make_batches(small, DATASETS["cifar10"], 2, "cpu", seed=1, aug="basic", workers=1)
    assert (type(resident), resident.seed, resident.aug) == (Batches, 1, "basic")
    before = resident.batch(0, 0, 0)
    resident.close()
    assert same(resident.batch(0, 0, 0), before)


def test_from_a_tree_to_batches_of_every_split(tmp_path):
    for part, count in (("train", 10), ("val", 2), ("test", 3)):
        for label, colour in enumerate([(250, 0, 0), (0, 0, 250)]):
            (tmp_path / part / f"c{label}").mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), colour).save(tmp_path / part / f"c{label}" / f"{i}.png")
    splits = load_dataset("folder", tmp_path, image_size=16)
    for split, count in ((splits.train, 20), (splits.val, 4), (splits.test, 6)):
        batches = make_batches(split, splits.facts, 4, "cpu", aug="basic")
        parts = [*batches.sequential(), *in_order(batches, epochs=1).values()]
        assert sum(len(labels) for _, labels in batches.sequential()) == count
        for images, labels in parts:
            pixels = pixels_of(images)
            assert (pixels[:, 0] == 250 * (labels == 0)[:, None, None]).all()
            assert (pixels[:, 2] == 250 * (labels == 1)[:, None, None]).all()


# What is read, and when


def test_loading_opens_no_image_and_a_batch_only_its_own(tmp_path, opened):
    split = write_images(tmp_path, 13)
    touch_classes(tmp_path / "tree", "train", [20])
    load_dataset("folder", tmp_path / "tree")
    batches = FolderBatches(split, IMAGENET, 3, aug="basic")
    assert opened == []
    order = [FolderBatches(split, IMAGENET, 13).batch(0, 1, 0)[1].tolist()]
    order = [os.fsdecode(split.paths[i]) for i in order[0]]
    opened.clear()
    batches.batch(0, 1, 2)  # a resumed run
    assert opened == order[6:9]
    batches.batch(0, 1, 3)
    assert opened == order[6:12]
    opened.clear()
    next(batches.sequential())
    assert opened == names(split)[:3]


def test_workers_stay_over_the_epochs_and_end_when_closed(tmp_path):
    batches = FolderBatches(write_images(tmp_path, 6), IMAGENET, 3, workers=2)
    batches.batch(0, 0, 0)
    workers = {child.pid for child in multiprocessing.active_children()}
    assert len(workers) == 2
    for epoch, step in [(0, 1), (1, 0), (1, 1), (2, 0)]:
        batches.batch(0, epoch, step)
    assert {child.pid for child in multiprocessing.active_children()} == workers
    batches.close()
    assert multiprocessing.active_children() == []
    expected = FolderBatches(batches._split, IMAGENET, 3).batch(0, 2, 1)
    assert same(batches.batch(0, 2, 1), expected)
    batches.close()
    stream = batches.sequential()
    next(stream)
    assert multiprocessing.active_children()
    stream.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_the_runs_own_random_numbers_are_left_alone(tmp_path, workers):
    def states():
        return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    split = write_images(tmp_path, 8)
    before, filters = states(), np.random.get_state()[2]
    batches = FolderBatches(split, IMAGENET, 4, aug="strong", workers=workers)
    in_order(batches)
    list(batches.sequential())
    batches.close()
    after = states()
    assert torch.equal(before[0], after[0])
    assert (before[1:], filters) == (after[1:], np.random.get_state()[2])


def test_the_runs_random_numbers_do_not_reach_the_batches(tmp_path):
    split = write_images(tmp_path, 8)
    torch.manual_seed(1)
    one = FolderBatches(split, IMAGENET, 8, aug="strong").batch(0, 0, 0)
    torch.manual_seed(2)
    assert same(FolderBatches(split, IMAGENET, 8, aug="strong").batch(0, 0, 0), one)


# Images that cannot be read


def spoil(path, how):
    content = path.read_bytes()
    if how == "junk":
        path.write_bytes(b"<html>not found</html>")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "vanished":
        path.unlink()
    elif how == "broken png":
        noise(0, 200, 200).save(path, "PNG")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif how == "dangling link":
        path.unlink()
        path.symlink_to(path.parent / "nowhere.jpg")


@pytest.mark.parametrize("how", ["junk", "empty", "truncated", "vanished", "broken png", "dangling link"])
def test_a_broken_image_is_left_out_of_evaluation_and_logged_once(tmp_path, caplog, how):
    split = write_images(tmp_path, 9)
    spoil(tmp_path / "005.jpg", how)
    batches = FolderBatches(split, IMAGENET, 4)
    for _ in range(2):
        parts = list(batches.sequential())
        assert [labels.tolist() for _, labels in parts] == [[0, 1, 2, 3], [4, 6, 7], [8]]
        assert [len(images) for images, _ in parts] == [4, 3, 1]
        assert len(batches) == 8
    assert len(caplog.records) == 1
    assert str(tmp_path / "005.jpg") in caplog.text
    assert "cannot be read as an image" in caplog.text
    assert caplog.text.count("005.jpg") == 1
    assert "005" not in "".join(names(without(split, parts[1][1])))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_batch_of_broken_images_alone_is_not_shown(tmp_path):
    split = write_images(tmp_path, 5)
    spoil(tmp_path / "004.jpg", "junk")
    assert [labels.tolist() for _, labels in FolderBatches(split, IMAGENET, 2).sequential()] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_the_next_readable_image_of_the_order_stands_in(tmp_path, caplog, workers):
    split = write_images(tmp_path, 200, size=8, width=12, height=12)  # two may be broken
    order = FolderBatches(split, IMAGENET, 200, seed=6).batch(0, 0, 0)[1].tolist()
    # Two neighbours in the middle, of which the first ends a batch, or the last of all, which wraps around.
    for broken in (order[9:11], order[199:]):
        healthy = {label: (tmp_path / os.fsdecode(split.paths[label])).read_bytes() for label in broken}
        for label in broken:
            spoil(tmp_path / os.fsdecode(split.paths[label]), "junk")
        batches = FolderBatches(split, IMAGENET, 10, seed=6, aug="basic", workers=workers)
        shown = torch.cat([labels for _, labels in in_order(batches, epochs=1).values()]).tolist()
        batches.close()
        expected, stand_in = list(order), {9: 11, 10: 11} if len(broken) == 2 else {199: 0}
        for position, other in stand_in.items():
            expected[position] = order[other]
        assert shown == expected
        assert len(batches) == 200 - len(broken)
        for label, content in healthy.items():
            (tmp_path / os.fsdecode(split.paths[label])).write_bytes(content)
    assert len(caplog.records) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["training", "evaluation"])
def test_more_than_a_hundredth_of_broken_images_stops_with_their_number(tmp_path, workers, how):
    split = write_images(tmp_path, 300, size=8, width=12, height=12)
    broken = [7, 100, 101, 299]

    def run():
        batches = FolderBatches(split, IMAGENET, 20, workers=workers)
        try:
            list(batches.sequential()) if how == "evaluation" else in_order(batches, epochs=1)
        finally:
            batches.close()

    for label in broken[:3]:
        spoil(tmp_path / f"{label:03}.jpg", "junk")
    run()
    spoil(tmp_path / f"{broken[3]:03}.jpg", "vanished")
    message = refused(run)
    assert message.startswith("--dataset folder: 4 of 300 images cannot be read (first: ")
    assert message.count(str(tmp_path)) >= 3
    if how == "evaluation":
        assert "007.jpg" in message
    assert "299.jpg" not in message or how == "training"


@pytest.mark.parametrize(("count", "broken"), [(1, 1), (2, 2), (5, 2), (5, 5)])
def test_small_sets_bear_one_broken_image_but_never_all(tmp_path, count, broken):
    split = write_images(tmp_path, count)
    for path in sorted(tmp_path.iterdir())[:broken]:
        spoil(path, "junk")
    for run in (lambda b: list(b.sequential()), in_order):
        assert f" of {count} images" in refused(run, FolderBatches(split, IMAGENET, 4))


def test_the_count_is_of_images_not_of_encounters(tmp_path):
    split = write_images(tmp_path, 6)
    spoil(tmp_path / "003.jpg", "junk")
    batches = FolderBatches(split, IMAGENET, 6)
    for epoch in range(4):
        images, labels = batches.batch(0, epoch, 0)
        assert len(images) == len(labels) == 6
        assert len(set(labels.tolist())) == 5
    assert len(batches) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_open_files_is_not_the_images_fault(tmp_path, monkeypatch, workers):
    def fail(path):
        raise OSError(errno.EMFILE, "Too many open files")

    split = write_images(tmp_path, 4)
    monkeypatch.setattr(dataset, "_read_rgb", fail)
    with pytest.raises(DataError if workers else OSError, match="Too many open files"):
        FolderBatches(split, IMAGENET, 2, workers=workers).batch(0, 0, 0)


def test_pillow_does_not_warn_of_large_images(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 48 x 40 lies between this and twice this, an error
    split = write_images(tmp_path, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(next(FolderBatches(split, IMAGENET, 3).sequential())[1]) == 3
    assert [w for w in caught if issubclass(w.category, Image.DecompressionBombWarning)] == []


# Workers that fail


def batches_that(monkeypatch, tmp_path, act):
    monkeypatch.setattr(dataset, "_WORKER_CHECK", 0.5)
    monkeypatch.setattr(dataset, "_WORKER_PATIENCE", 1)
    split = write_images(tmp_path, 8)
    monkeypatch.setattr(dataset, "_read_rgb", act)
    return FolderBatches(split, IMAGENET, 1, workers=2)


@pytest.mark.parametrize("how", ["training", "evaluation"])
def test_a_dead_worker_is_one_line(tmp_path, monkeypatch, how):
    batches = batches_that(monkeypatch, tmp_path, lambda path: os._exit(3))
    message = refused(lambda: batches.batch(0, 0, 0) if how == "training" else list(batches.sequential()))
    assert message.startswith("--workers 2: reading --dataset folder failed (")
    assert "exited unexpectedly" in message
    assert "/dev/shm" in message


def test_a_hanging_worker_is_given_up(tmp_path, monkeypatch):
    batches = batches_that(monkeypatch, tmp_path, lambda path: time.sleep(2.5))
    assert "no batch in 1 seconds" in refused(batches.batch, 0, 0, 0)


def test_a_slow_worker_is_waited_for(tmp_path, monkeypatch):
    read = dataset._read_rgb
    batches = batches_that(monkeypatch, tmp_path, lambda path: (time.sleep(0.8), read(path))[1])
    monkeypatch.setattr(dataset, "_WORKER_PATIENCE", 30)
    assert batches.batch(0, 0, 0)[0].shape == (1, 3, 24, 24)
    batches.close()


def test_exhausted_shared_memory_hints_at_workers(tmp_path, monkeypatch):
    def exhausted(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)\nfor file </x>: No space left on device (28)")

    split = write_images(tmp_path, 4)
    monkeypatch.setattr(torch.Tensor, "share_memory_", exhausted)
    message = refused(FolderBatches(split, IMAGENET, 2, workers=1).batch, 0, 0, 0)
    assert "No space left on device" in message
    assert "lower --workers" in message


def test_a_worker_killed_meanwhile_shows_at_the_next_batch_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_WORKER_CHECK", 0.5)
    batches = FolderBatches(write_images(tmp_path, 40), IMAGENET, 1, workers=2)
    batches.batch(0, 0, 0)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:  # a signal handler that raises would do it here
        math.sqrt(2)
    assert "exited unexpectedly" in refused(lambda: [batches.batch(0, 0, step) for step in range(1, 40)])
    monkeypatch.undo()
    assert same(batches.batch(0, 0, 0), FolderBatches(batches._split, IMAGENET, 1).batch(0, 0, 0))
    batches.close()


def test_ctrl_c_is_left_to_the_main_process(tmp_path):
    batches = FolderBatches(write_images(tmp_path, 8), IMAGENET, 2, workers=1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    batches.batch(0, 0, 0)
    signal.signal(signal.SIGINT, before)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    for step in (1, 2, 3):
        batches.batch(0, 0, step)
    assert multiprocessing.active_children() == [worker]
    batches.close()


def test_what_goes_to_spawned_workers_can_be_pickled(tmp_path):
    split = write_images(tmp_path, 8)
    batches = FolderBatches(split, IMAGENET, 4, aug="strong")
    reader = pickle.loads(pickle.dumps(batches._reader))
    pixels, indices, broken = reader[0, 0, 1]
    images, labels = batches.batch(0, 0, 1)
    assert torch.equal(pixels_of(images), pixels.long())
    assert (indices.tolist(), broken) == (labels.tolist(), [])


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 2])
def test_cuda_makes_the_same_bits(tmp_path, workers):
    split = write_images(tmp_path, 8)
    here = in_order(FolderBatches(split, IMAGENET, 4, aug="strong"))
    state = torch.cuda.get_rng_state()
    there = FolderBatches(split, IMAGENET, 4, device="cuda", aug="strong", workers=workers)
    assert all(same([t.cpu() for t in batch], here[key]) for key, batch in in_order(there).items())
    assert torch.equal(torch.cuda.get_rng_state(), state)
    there.close()
