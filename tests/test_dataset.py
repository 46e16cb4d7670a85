"""Laws of dataset.py, each against a reference that does not share its code."""

import gzip
import hashlib
import logging
import os
import pickle
import re
import socket
import struct
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
from dataset import DATASETS, Batches, DataError, Split, balanced_order, load_dataset, split_sizes

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
CIFAR10 = DATASETS["cifar10"]
FASHION = DATASETS["fashionmnist"]
DIGITS = DATASETS["digits"]


def write_idx(path, array, magic=None, cut=0):
    header = struct.pack(f">{1 + array.ndim}I", magic or 0x0800 + array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content[: len(content) - cut]))


def write_fashion(folder, train=200, test=30):
    """Image i carries i in its first two pixels, so that a test can tell which image it got."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28))
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 7 % 5)
    return folder


def ids(split):
    return (split.images[:, 0, 0, 0].long() * 256 + split.images[:, 0, 0, 1].long()).tolist()


def write_cifar(name, root, count=20):
    """torchvision's own layout. Returns the (images [N, 3, 32, 32], labels) of all training files."""
    generator = np.random.default_rng(1)
    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    folder.mkdir(parents=True)
    if name == "cifar10":
        train, test, key = [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels"
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    else:
        train, test, key = ["train"], "test", "fine_labels"
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    images, labels = [], []
    for file_name in [*train, test]:
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        classes = generator.integers(0, DATASETS[name].classes, count).tolist()
        (folder / file_name).write_bytes(pickle.dumps({"data": pixels, key: classes}))
        if file_name != test:
            images.append(pixels.reshape(-1, 3, 32, 32))
            labels += classes
    return np.concatenate(images), labels


def snapshot(root):
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def seven_second_timeout():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(7.0)
    yield
    socket.setdefaulttimeout(before)


@pytest.fixture
def unchecked_md5(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))


def refused(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        load_dataset(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def numbered(count, channels=3, size=32, seed=0):
    """Random images whose label is their index."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def pixels_of(images, facts):
    """Undoes the normalisation: int64 0..255, the stored channels only."""
    channels = len(facts.mean)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (facts.mean, facts.std))
    exact = (images[:, :channels].double() * std + mean) * 255
    assert (exact - exact.round()).abs().max() < 1e-3
    return exact.round().long()


# Splitting


def test_every_prefix_of_the_balanced_order_keeps_equal_classes_within_one_image():
    labels = torch.arange(12).repeat(9)[torch.randperm(108, generator=torch.Generator().manual_seed(3))]
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(108))
    for length in range(109):
        counts = torch.bincount(labels[order[:length]], minlength=12)
        assert counts.max() - counts.min() <= 1


def test_every_prefix_of_the_balanced_order_keeps_unequal_classes_in_proportion():
    labels = torch.tensor([0] * 70 + [1] * 25 + [2] * 4 + [5] * 1)
    order = balanced_order(labels, seed=4)
    assert sorted(order.tolist()) == list(range(100))
    share = torch.bincount(labels).double() / 100
    present = (share > 0).sum()
    for length in range(101):
        counts = torch.bincount(labels[order[:length]], minlength=6)
        # Each class is within half an image of its share at one common position, which is itself off by
        # half an image for each class at most.
        assert ((counts - length * share).abs() <= 0.5 + present * share / 2 + 1e-9).all()


def test_balanced_order_is_fixed_for_ever_and_shuffles_within_the_class():
    # By hand from RandomState(0).permutation(12) = 6 11 4 10 2 8 1 7 9 3 0 5, whose classes are 0 2 1 1 2 2 1
    # 1 0 0 0 2: 6 9 3 0 of class 0, 4 10 1 7 of class 1, 11 2 8 5 of class 2, taken in turn.
    labels = [0, 1, 2] * 4
    assert balanced_order(labels).tolist() == [6, 4, 11, 9, 10, 2, 3, 1, 8, 0, 7, 5]
    assert balanced_order(labels, seed=1).tolist() != balanced_order(labels).tolist()
    assert balanced_order([]).tolist() == []


def test_split_is_disjoint_complete_stratified_and_independent_of_any_seed(tmp_path):
    write_fashion(tmp_path)
    torch.manual_seed(1)
    np.random.seed(1)
    first = load_dataset("fashionmnist", tmp_path, val_fraction=0.2)
    torch.manual_seed(2)
    np.random.seed(2)
    second = load_dataset("fashionmnist", tmp_path, val_fraction=0.2, train_limit=50)

    assert sorted(ids(first.train) + ids(first.val)) == list(range(200))
    assert ids(first.val) == ids(second.val)
    assert len(first.val.labels) == 40
    everything = torch.bincount(torch.cat([first.train.labels, first.val.labels]), minlength=5)
    assert ((torch.bincount(first.val.labels, minlength=5) - everything * 0.2).abs() <= 1).all()
    assert ids(second.train) == ids(first.train)[:50]
    limited = torch.bincount(second.train.labels, minlength=5)
    assert ((limited - torch.bincount(first.train.labels, minlength=5) * 50 / 160).abs() <= 1).all()
    for split in (first.train, first.val):
        assert [i % 7 % 5 for i in ids(split)] == split.labels.tolist()
    assert ids(first.test) == list(range(30))


def test_a_larger_train_limit_keeps_all_and_warns(tmp_path, caplog):
    write_fashion(tmp_path)
    with caplog.at_level(logging.WARNING):
        splits = load_dataset("fashionmnist", tmp_path, train_limit=181)
    assert len(splits.train.labels) == 180
    assert "181" in caplog.text
    assert "180" in caplog.text
    caplog.clear()
    load_dataset("fashionmnist", tmp_path, train_limit=180)
    assert not caplog.records


@pytest.mark.parametrize("val_fraction", [0.0001, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("train_limit", [None, 1, 500, 10**6])
def test_split_sizes_agree_with_what_is_loaded(val_fraction, train_limit):
    splits = load_dataset("digits", "unused", val_fraction=val_fraction, train_limit=train_limit)
    train, val = split_sizes("digits", val_fraction, train_limit)
    assert (train, val) == (len(splits.train.labels), len(splits.val.labels))
    assert val >= 1


def test_split_sizes_of_the_large_sets_need_no_data():
    assert split_sizes("cifar10", 0.1, None) == (45_000, 5_000)
    assert split_sizes("cifar100", 0.1, 1_000) == (1_000, 5_000)
    assert split_sizes("fashionmnist", 0.1, None) == (54_000, 6_000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"val_fraction": 0}, "--val_fraction 0"),
        ({"val_fraction": 1.0}, "--val_fraction 1.0"),
        ({"val_fraction": float("nan")}, "--val_fraction nan"),
        ({"val_fraction": 0.9999}, "nothing to train on"),
        ({"train_limit": 0}, "--train_limit 0"),
        ({"image_size": 0}, "--img_size 0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    assert words in refused("digits", "unused", **arguments)


def test_unknown_name_lists_the_known_ones():
    message = refused("cifar11", "unused")
    assert all(name in message for name in DATASETS)
    with pytest.raises(DataError, match="cifar11"):
        split_sizes("cifar11", 0.1, None)


# Digits


def test_digits_facts_and_fixed_test_set():
    splits = load_dataset("digits", "unused")
    stored = torch.cat([splits.train.images, splits.val.images]).double() / 255
    assert len(stored) == DIGITS.train_images
    assert stored.shape[1:] == (DIGITS.channels, DIGITS.image_size, DIGITS.image_size)
    assert abs(stored.mean().item() - DIGITS.mean[0]) < 5e-4
    assert abs(stored.std(unbiased=False).item() - DIGITS.std[0]) < 5e-4
    assert not DIGITS.flip

    from sklearn.datasets import load_digits

    digits = load_digits()
    every = [np.floor(image * 255 / 16 + 0.5).astype(np.uint8).tobytes() for image in digits.images]
    pairs = sorted(zip(every, digits.target.tolist(), strict=True))
    got = []
    for split in (splits.train, splits.val, splits.test):
        got += zip([image.numpy().tobytes() for image in split.images], split.labels.tolist(), strict=True)
    assert sorted(got) == pairs
    share = torch.bincount(splits.test.labels) - torch.bincount(torch.tensor(digits.target)) * 0.2
    assert share.abs().max() < 1


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refused("digits", "unused")


@pytest.mark.parametrize("size", [16, 5])
def test_resize_equals_pillow_bilinear_within_one_level(size):
    native = load_dataset("digits", "unused").test.images
    resized = load_dataset("digits", "unused", image_size=size).test.images
    assert resized.shape == (len(native), 1, size, size)
    assert resized.dtype == torch.uint8
    expected = np.stack(
        [Image.fromarray(image[0].numpy()).resize((size, size), Image.Resampling.BILINEAR) for image in native]
    )
    difference = np.abs(expected.astype(int) - resized[:, 0].numpy().astype(int))
    assert difference.max() <= 1
    # Pillow rounds after each of its two passes; cutting decimals off would differ in half the pixels.
    assert (difference == 0).mean() > 0.8


def test_resize_in_chunks_reaches_every_image():
    levels = torch.tensor([0, 1, 127, 254, 255, 3], dtype=torch.uint8)
    size = 2048  # four images a chunk
    resized = dataset._resize(levels[:, None, None, None].expand(-1, 1, 2, 2), size)
    assert (resized == levels[:, None, None, None]).all()


# Fashion-MNIST and IDX


@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw", "fashion-mnist"])
def test_four_idx_files_are_read_where_they_lie(tmp_path, folder, no_network):
    write_fashion(tmp_path / folder)
    before = snapshot(tmp_path)
    splits = load_dataset("fashionmnist", str(tmp_path), image_size=32)
    assert splits.train.images.shape == (180, 1, 32, 32)
    assert splits.train.images.dtype == torch.uint8
    assert splits.train.labels.dtype == torch.int64
    assert splits.facts is FASHION
    assert snapshot(tmp_path) == before


def test_idx_values_survive(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 5))
    write_idx(tmp_path / "x.gz", values)
    assert np.array_equal(dataset.read_idx(tmp_path / "x.gz", 3).numpy(), values)


def damage(path, how):
    images = np.zeros((200, 28, 28))
    if how == "truncated gzip":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "not gzip":
        path.write_bytes(b"<html>not found</html>")
    elif how == "gzip bits flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif how == "no such deflate block":
        content = bytearray(path.read_bytes())
        content[10] = 0xFF
        path.write_bytes(content)
    elif how == "wrong magic":
        write_idx(path, images, magic=2049)
    elif how == "too short":
        write_idx(path, images, cut=1)
    elif how == "too long":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"x"))
    elif how == "header cut":
        path.write_bytes(gzip.compress(b"\0\0\x08\3\0"))
    elif how == "empty":
        path.write_bytes(gzip.compress(b""))
    elif how == "other size":
        write_idx(path, np.zeros((200, 27, 28)))


@pytest.mark.parametrize(
    "how",
    [
        "truncated gzip",
        "not gzip",
        "gzip bits flipped",
        "no such deflate block",
        "wrong magic",
        "too short",
        "too long",
        "header cut",
        "empty",
        "other size",
    ],
)
def test_damaged_idx_is_one_line_with_the_file_and_the_way_out(tmp_path, how):
    write_fashion(tmp_path)
    damage(tmp_path / "train-images-idx3-ubyte.gz", how)
    message = refused("fashionmnist", tmp_path)
    named = "train-labels-idx1-ubyte.gz" if how == "other size" else "train-images-idx3-ubyte.gz"
    assert str(tmp_path / named) in message
    assert "fresh copy" in message


def test_fewer_labels_than_images_is_refused(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(199))
    assert "199 labels" in refused("fashionmnist", tmp_path)


def test_an_empty_set_is_refused(tmp_path):
    write_fashion(tmp_path, test=0)
    assert "no images" in refused("fashionmnist", tmp_path)


def test_label_outside_the_classes_names_label_and_file(tmp_path):
    write_fashion(tmp_path)
    labels = np.zeros(30)
    labels[17] = 10
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    message = refused("fashionmnist", tmp_path)
    assert "label 10 " in message
    assert str(tmp_path / "t10k-labels-idx1-ubyte.gz") in message


def test_some_of_the_four_files_missing_names_them(tmp_path, no_network):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    message = refused("fashionmnist", tmp_path)
    assert "t10k-labels-idx1-ubyte.gz" in message
    assert "train-images-idx3-ubyte.gz" in message
    assert "lacks" in message


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_the_real_one():
    splits = load_dataset("fashionmnist", DEBIAN_FASHION)
    assert (len(splits.train.labels), len(splits.val.labels)) == split_sizes("fashionmnist", 0.1, None)
    stored = torch.cat([splits.train.images, splits.val.images])
    labels = torch.cat([splits.train.labels, splits.val.labels])
    assert len(labels) == FASHION.train_images
    assert torch.bincount(labels).tolist() == [6_000] * 10
    assert torch.bincount(splits.val.labels).tolist() == [600] * 10
    assert torch.bincount(splits.test.labels).tolist() == [1_000] * 10
    mean = stored.sum(dtype=torch.int64).item() / stored.numel()
    square = sum(chunk.long().square().sum().item() for chunk in stored.split(10_000)) / stored.numel()
    assert abs(mean / 255 - FASHION.mean[0]) < 5e-4
    assert abs((square - mean**2) ** 0.5 / 255 - FASHION.std[0]) < 5e-4


# CIFAR and downloads


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_torchvisions_layout(tmp_path, name, no_network, unchecked_md5):
    images, labels = write_cifar(name, tmp_path)
    splits = load_dataset(name, tmp_path)
    expected = sorted((image.tobytes(), label) for image, label in zip(images, labels, strict=True))
    got = []
    for split in (splits.train, splits.val):
        assert split.images.is_contiguous()
        got += zip([image.numpy().tobytes() for image in split.images], split.labels.tolist(), strict=True)
    assert sorted(got) == expected
    assert splits.test.images.shape == (20, 3, 32, 32)


def test_cifar_label_outside_the_classes_names_label_and_file(tmp_path, unchecked_md5):
    write_cifar("cifar100", tmp_path)
    pixels = np.zeros((3, 3072), dtype=np.uint8)
    broken = tmp_path / "cifar-100-python" / "train"
    broken.write_bytes(pickle.dumps({"data": pixels, "fine_labels": [5, 100, 7]}))
    message = refused("cifar100", tmp_path)
    assert "label 100 " in message
    assert "cifar-100-python (train)" in message


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashionmnist"])
@pytest.mark.parametrize("folder", [".", "not/there/yet"])
def test_no_data_and_no_network_is_one_line_at_once_and_leaves_no_trace(tmp_path, name, folder, no_network):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    before = snapshot(tmp_path)
    start = time.monotonic()
    message = refused(name, tmp_path / folder)
    assert time.monotonic() - start < 10
    assert message.startswith(f"--dataset {name}: not found under '{tmp_path / folder}' and the download failed (")
    assert "network is unreachable" in message
    assert "--dataset digits" in message
    assert snapshot(tmp_path) == before


def test_data_folder_that_is_a_file_is_one_line(tmp_path, no_network):
    (tmp_path / "data").write_text("a file")
    assert "cifar10" in refused("cifar10", tmp_path / "data")


def pack_cifar100(tmp_path, monkeypatch):
    write_cifar("cifar100", tmp_path / "source")
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-100-python", "cifar-100-python")
    content = archive.read_bytes()
    archive.unlink()
    monkeypatch.setattr("torchvision.datasets.CIFAR100.tgz_md5", hashlib.md5(content).hexdigest())
    return content


def answer_downloads(monkeypatch, write):
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", write)


def test_an_archive_put_there_by_hand_is_unpacked_without_network(tmp_path, monkeypatch, no_network, unchecked_md5):
    content = pack_cifar100(tmp_path, monkeypatch)
    data = tmp_path / "data"
    data.mkdir()
    (data / "cifar-100-python.tar.gz").write_bytes(content)
    assert len(load_dataset("cifar100", data).train.labels) == 18
    assert sorted(path.name for path in data.iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]
    (data / "cifar-100-python.tar.gz").unlink()
    assert len(load_dataset("cifar100", data).train.labels) == 18


def test_a_download_lands_complete_silent_and_under_a_timeout(
    tmp_path, monkeypatch, capfd, unchecked_md5, seven_second_timeout
):
    content = pack_cifar100(tmp_path, monkeypatch)
    timeouts = []

    def write(url, filename):
        timeouts.append(socket.getdefaulttimeout())
        print("noise", file=sys.stderr)
        print("noise")
        Path(filename).write_bytes(content)

    answer_downloads(monkeypatch, write)
    data = tmp_path / "new" / "data"
    assert len(load_dataset("cifar100", data).train.labels) == 18
    assert timeouts == [30.0]
    assert socket.getdefaulttimeout() == 7.0
    assert "noise" not in "".join(capfd.readouterr())
    assert sorted(path.name for path in data.iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]


def test_downloaded_fashion_mnist_is_found_again(tmp_path, monkeypatch, no_network):
    source = write_fashion(tmp_path / "source")
    md5 = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in sorted(source.iterdir())]
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.resources", md5)
    answer_downloads(
        monkeypatch, lambda url, filename: Path(filename).write_bytes((source / Path(url).name).read_bytes())
    )
    data = tmp_path / "data"
    first = load_dataset("fashionmnist", data)
    assert [path.name for path in data.iterdir()] == ["FashionMNIST"]

    def refuse(url, filename):
        raise AssertionError("downloaded twice")

    answer_downloads(monkeypatch, refuse)
    assert ids(load_dataset("fashionmnist", data).train) == ids(first.train)


@pytest.mark.parametrize("error", [OSError("connection\nreset"), RuntimeError("odd"), KeyboardInterrupt()])
def test_a_broken_download_touches_nothing_that_stood_there(tmp_path, monkeypatch, error, seven_second_timeout):
    def write(url, filename):
        Path(filename).write_bytes(b"half")
        raise error

    answer_downloads(monkeypatch, write)
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"damaged")
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"damaged too")
    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError) as caught:
        load_dataset("cifar100", tmp_path)
    assert snapshot(tmp_path) == before
    assert socket.getdefaulttimeout() == 7.0
    if caught.type is DataError:
        assert re.search(r"cifar-100-python and cifar-100-python.tar.gz .* damaged", str(caught.value))
        assert "\n" not in str(caught.value)


# Batches


def test_normalisation_is_by_the_data_sets_mean_and_std():
    split = numbered(20)
    images, labels = next(iter(Batches(split, CIFAR10, 20).sequential()))
    mean, std = np.array(CIFAR10.mean).reshape(3, 1, 1), np.array(CIFAR10.std).reshape(3, 1, 1)
    expected = (split.images.numpy() / 255 - mean) / std
    assert images.dtype == torch.float32
    assert np.abs(images.numpy() - expected).max() < 2e-6
    assert labels.tolist() == list(range(20))


def test_grey_becomes_three_equal_channels():
    batches = Batches(numbered(10, channels=1, size=28), FASHION, 5, aug="strong")
    for images in (batches.batch(0, 0, 0)[0], next(batches.sequential())[0]):
        assert images.shape == (5, 3, 28, 28)
        assert torch.equal(images[:, 0], images[:, 1])
        assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
def test_any_batch_alone_equals_the_batch_in_sequence(aug):
    split = numbered(40)
    played = Batches(split, CIFAR10, 12, seed=3, aug=aug)
    sequence = {
        (state, epoch, step): [tensor.clone() for tensor in played.batch(state, epoch, step)]
        for state in range(2)
        for epoch in range(2)
        for step in range(played.steps_per_epoch)
    }
    # Neighbours in this order share the epoch and step and differ in the state.
    for key in sorted(sequence, key=lambda key: key[::-1]):
        images, labels = sequence[key]
        torch.rand(5)
        alone = Batches(split, CIFAR10, 12, seed=3, aug=aug).batch(*key)
        again = played.batch(*key)
        for got in (alone, again):
            assert torch.equal(got[0], images)
            assert torch.equal(got[1], labels)


@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
def test_each_epoch_shows_each_image_once(aug):
    split = numbered(36, size=16)
    batches = Batches(split, CIFAR10, 12, aug=aug)
    for epoch in range(3):
        shown = torch.cat([batches.batch(1, epoch, step)[1] for step in range(3)])
        assert sorted(shown.tolist()) == list(range(36))


@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
def test_seed_state_and_epoch_each_change_the_batch(aug):
    split = numbered(60)
    base = (0, 0, 0)
    seen = []
    for seed, state, epoch in [base, (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (2**32, 0, 0), (0, 1, 1)]:
        images, labels = Batches(split, CIFAR10, 30, seed=seed, aug=aug).batch(state, epoch, 0)
        seen.append(labels.tolist())
    assert len({tuple(labels) for labels in seen}) == len(seen)


def test_without_augmentation_a_batch_shows_the_images_as_they_are():
    split = numbered(30)
    images, labels = Batches(split, CIFAR10, 20, seed=4).batch(0, 1, 0)
    assert torch.equal(pixels_of(images, CIFAR10), split.images[labels].long())


def test_augmentation_does_not_change_which_images_come_when():
    split = numbered(30)
    orders = [Batches(split, CIFAR10, 30, seed=9, aug=aug).batch(2, 3, 0)[1] for aug in ("none", "basic", "strong")]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


@pytest.mark.parametrize(
    ("facts", "size", "border"),
    [(CIFAR10, 32, 4), (FASHION, 24, 4), (CIFAR10, 23, 2), (DIGITS, 16, 2), (DIGITS, 7, 0)],
)
def test_crop_and_flip_equal_plain_slicing_of_a_padded_image(facts, size, border):
    split = numbered(150, channels=facts.channels, size=size)
    batches = Batches(split, facts, 150, seed=5, aug="basic")
    padded = np.pad(split.images.numpy(), ((0, 0), (0, 0), (border, border), (border, border))).astype(int)
    drawn = set()
    for epoch in range(3):
        images, labels = batches.batch(0, epoch, 0)
        for got, label in zip(pixels_of(images, facts).numpy(), labels.tolist(), strict=True):
            matches = []
            for top in range(2 * border + 1):
                for left in range(2 * border + 1):
                    crop = padded[label, :, top : top + size, left : left + size]
                    matches += [
                        (top, left, flip)
                        for flip in (False, True)
                        if np.array_equal(got, crop[:, :, :: -1 if flip else 1])
                    ]
            assert len(matches) == 1
            drawn.update(matches)
    side = 2 * border + 1
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(side))
    assert {flip for _, _, flip in drawn} == ({False, True} if facts.flip else {False})
    # 450 independent draws: offsets and flip tied to each other would leave most combinations unseen.
    assert len(drawn) > 0.8 * side**2 * (1 + facts.flip)


@pytest.mark.parametrize(("facts", "size"), [(CIFAR10, 32), (DIGITS, 16)])
def test_strong_equals_an_image_by_image_reference(facts, size):
    split = numbered(64, channels=facts.channels, size=size)
    strong = Batches(split, facts, 64, seed=1, aug="strong")
    images, labels = strong.batch(0, 0, 0)
    plain, same = Batches(split, facts, 64, seed=1, aug="basic").batch(0, 0, 0)
    assert torch.equal(labels, same)
    plan = strong._plan(0, 0)
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (facts.mean, facts.std))
    unit = pixels_of(plain, facts).numpy() / 255
    side, erased = size // 4, 0
    for i in range(64):
        bright = np.minimum(unit[i] * plan.brightness[i].item(), 1)
        middle = bright.mean()
        expected = (np.clip(middle + plan.contrast[i].item() * (bright - middle), 0, 1) - mean) / std
        top, left = plan.erase_top[i].item(), plan.erase_left[i].item()
        if top < size:
            erased += 1
            assert top + side <= size
            expected[:, top : top + side, left : left + side] = 0
        assert 0 <= left <= size - side
        assert np.abs(images[i, : facts.channels].numpy() - expected).max() < 1e-4
    assert 16 < erased < 48
    for factor in (plan.brightness, plan.contrast):
        assert factor.min() >= 0.6
        assert factor.max() <= 1.4
        assert factor.max() - factor.min() > 0.6
    assert len(set(plan.erase_left.tolist())) > 1


@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
def test_last_batch_is_dropped_in_training_and_counted_in_evaluation(aug):
    split = numbered(25, size=8)
    batches = Batches(split, CIFAR10, 10, aug=aug)
    assert len(batches) == 25
    assert batches.steps_per_epoch == 2
    with pytest.raises(IndexError, match="2 steps"):
        batches.batch(0, 0, 2)
    with pytest.raises(IndexError):
        batches.batch(0, 0, -1)
    parts = list(batches.sequential())
    assert [len(labels) for _, labels in parts] == [10, 10, 5]
    assert torch.cat([labels for _, labels in parts]).tolist() == list(range(25))
    assert torch.equal(pixels_of(torch.cat([images for images, _ in parts]), CIFAR10), split.images.long())
    assert [len(labels) for _, labels in batches.sequential(limit=1)] == [10]
    assert [len(labels) for _, labels in batches.sequential(limit=9)] == [10, 10, 5]
    assert list(batches.sequential(limit=0)) == []


def test_the_only_batch_is_kept():
    batches = Batches(numbered(7), CIFAR10, 128, aug="basic")
    assert batches.steps_per_epoch == 1
    images, labels = batches.batch(0, 0, 0)
    assert images.shape == (7, 3, 32, 32)
    assert sorted(labels.tolist()) == list(range(7))


def test_batches_never_write_into_what_they_store():
    split = numbered(20)
    kept = split.images.clone()
    for aug in ("none", "basic", "strong"):
        batches = Batches(split, CIFAR10, 10, aug=aug)
        before = [images.clone() for images, _ in batches.sequential()]
        images, _ = batches.batch(0, 0, 0)
        images.zero_()
        next(batches.sequential())[0].zero_()
        assert all(torch.equal(a, b) for a, (b, _) in zip(before, batches.sequential(), strict=True))
    assert torch.equal(split.images, kept)


def test_bad_batch_arguments_raise():
    with pytest.raises(ValueError, match="weak"):
        Batches(numbered(4), CIFAR10, 2, aug="weak")
    with pytest.raises(ValueError, match="batch_size 0"):
        Batches(numbered(4), CIFAR10, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_makes_the_same_bits():
    split = numbered(50)
    here, there = (Batches(split, CIFAR10, 20, device=device, seed=2, aug="basic") for device in ("cpu", "cuda"))
    for got, expected in zip(there.batch(1, 2, 1), here.batch(1, 2, 1), strict=True):
        assert torch.equal(got.cpu(), expected)
