"""Laws of the data sets that live on the device, each against a reference that does not share their code."""

import gzip
import hashlib
import os
import pickle
import shutil
import socket
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import DATASETS, Batches, DataError, Split, balanced_order, load_dataset, split_sizes

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
CIFAR10, FASHION, DIGITS = (DATASETS[name] for name in ("cifar10", "fashionmnist", "digits"))


def write_idx(path, array, magic=None):
    header = struct.pack(f">{1 + array.ndim}I", magic or 0x0800 + array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


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


def pairs(*splits):
    """(bytes, label) of every image, sorted."""
    return sorted((image.numpy().tobytes(), int(label)) for s in splits for image, label in zip(s.images, s.labels))  # noqa: B905


def write_cifar(name, root, count=20):
    """torchvision's own layout. Returns the (bytes, label) of all training images, sorted."""
    generator = np.random.default_rng(1)
    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    folder.mkdir(parents=True)
    if name == "cifar10":
        train, test, key = [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels"
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    else:
        train, test, key = ["train"], "test", "fine_labels"
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    written = []
    for file_name in [*train, test]:
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        classes = generator.integers(0, DATASETS[name].classes, count).tolist()
        (folder / file_name).write_bytes(pickle.dumps({"data": pixels, key: classes}))
        if file_name != test:
            written += zip([image.tobytes() for image in pixels], classes, strict=True)
    return sorted(written)


def snapshot(root):
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def refused(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        load_dataset(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbered(count, channels=3, size=32):
    """Random images whose label is their index."""
    images = np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return Split(torch.from_numpy(images), torch.arange(count))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def unchecked_md5(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))


# ------------------------------------------------------------------------------------------- splitting
def test_every_prefix_of_the_balanced_order_keeps_unequal_classes_in_proportion():
    labels = torch.tensor([0] * 70 + [1] * 25 + [2] * 4 + [5] * 1)
    order = balanced_order(labels, seed=4)
    assert sorted(order.tolist()) == list(range(100))
    share = torch.bincount(labels).double() / 100
    for length in range(101):
        counts = torch.bincount(labels[order[:length]], minlength=6)
        # Each class is within half an image of its share at one common position, which is itself off by
        # half an image for each of the four classes at most.
        assert ((counts - length * share).abs() <= 0.5 + 4 * share / 2 + 1e-9).all()


def test_balanced_order_is_fixed_for_ever_and_shuffles_within_the_class():
    # By hand from RandomState(0).permutation(12) = 6 11 4 10 2 8 1 7 9 3 0 5, whose classes are 0 2 1 1 2 2 1
    # 1 0 0 0 2: 6 9 3 0 of class 0, 4 10 1 7 of class 1, 11 2 8 5 of class 2, taken in turn.
    labels = [0, 1, 2] * 4
    assert balanced_order(labels).tolist() == [6, 4, 11, 9, 10, 2, 3, 1, 8, 0, 7, 5]
    assert balanced_order(labels, seed=1).tolist() != balanced_order(labels).tolist()
    assert balanced_order([]).tolist() == []


def test_split_is_disjoint_complete_stratified_and_independent_of_any_seed(tmp_path, caplog):
    write_fashion(tmp_path)
    torch.manual_seed(1)
    np.random.seed(1)
    first = load_dataset("fashionmnist", tmp_path, val_fraction=0.2, train_limit=160)
    assert not caplog.records
    torch.manual_seed(2)
    np.random.seed(2)
    limited = load_dataset("fashionmnist", tmp_path, val_fraction=0.2, train_limit=50)

    labels = torch.arange(200) % 7 % 5
    order = balanced_order(labels)
    rest = order[40:]
    assert (ids(first.val), ids(limited.val)) == (order[:40].tolist(), order[:40].tolist())
    train = rest[balanced_order(labels[rest])].tolist()
    assert (ids(first.train), ids(limited.train)) == (train, train[:50])
    for split in (first.train, first.val):
        assert [i % 7 % 5 for i in ids(split)] == split.labels.tolist()
    assert ids(first.test) == list(range(30))

    assert len(load_dataset("fashionmnist", tmp_path, train_limit=181).train.labels) == 180
    assert "--train_limit 181: only 180 training images" in caplog.text


@pytest.mark.parametrize(("fraction", "limit"), [(0.0001, None), (0.25, 500), (0.1, 10**6), (0.5, 1)])
def test_split_sizes_agree_with_what_is_loaded(fraction, limit):
    splits = load_dataset("digits", "unused", val_fraction=fraction, train_limit=limit)
    assert split_sizes("digits", fraction, limit) == (len(splits.train.labels), len(splits.val.labels))
    assert len(splits.val.labels) == {0.0001: 1, 0.25: 360, 0.1: 144, 0.5: 719}[fraction]  # of 1,438
    large = [
        split_sizes(name, 0.1, limit) for name, limit in (("cifar10", None), ("cifar100", 1000), ("fashionmnist", None))
    ]
    assert large == [(45_000, 5_000), (1_000, 5_000), (54_000, 6_000)]  # needs no data


@pytest.mark.parametrize(
    ("flag", "value"), [("val_fraction", 0), ("val_fraction", 1.0), ("val_fraction", float("nan")), ("train_limit", 0)]
)
def test_bad_arguments_are_named(flag, value):
    assert f"--{flag} {value}: " in refused("digits", "unused", **{flag: value})
    with pytest.raises(DataError, match=f"--{flag} {value}: "):
        split_sizes("digits", **{flag: value})


def test_what_leaves_nothing_is_refused_and_unknown_names_list_the_known_ones():
    assert "--val_fraction 0.9999: leaves nothing to train on of 1438 images" in refused("digits", "", None, 0.9999)
    assert "--img_size 0: must be" in refused("digits", "unused", image_size=0)
    assert refused("cifar11", "unused").endswith(f"choose one of {', '.join(DATASETS)}")
    with pytest.raises(DataError, match="cifar11"):
        split_sizes("cifar11")


# ------------------------------------------------------------------------------------ digits and sizes
def test_digits_facts_and_fixed_test_set():
    from sklearn.datasets import load_digits

    splits, digits = load_dataset("digits", "unused"), load_digits()
    levels = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)
    every = zip([image.tobytes() for image in levels], digits.target.tolist(), strict=True)
    assert pairs(splits.train, splits.val, splits.test) == sorted(every)
    stored = torch.cat([splits.train.images, splits.val.images]).double() / 255
    assert stored.shape == (DIGITS.train_images, DIGITS.channels, DIGITS.image_size, DIGITS.image_size)
    assert abs(stored.mean().item() - DIGITS.mean[0]) < 5e-4
    assert abs(stored.std(unbiased=False).item() - DIGITS.std[0]) < 5e-4
    assert not DIGITS.flip
    share = torch.bincount(splits.test.labels) - torch.bincount(torch.tensor(digits.target)) * 0.2
    assert share.abs().max() < 1


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refused("digits", "unused")


@pytest.mark.parametrize("size", [16, 5])
def test_resize_equals_pillow_bilinear_within_one_level(size):
    native = load_dataset("digits", "unused").test.images
    resized = load_dataset("digits", "unused", image_size=size).test.images
    assert (resized.shape, resized.dtype) == ((len(native), 1, size, size), torch.uint8)
    expected = np.stack(
        [Image.fromarray(image[0].numpy()).resize((size, size), Image.Resampling.BILINEAR) for image in native]
    )
    difference = np.abs(expected.astype(int) - resized[:, 0].numpy().astype(int))
    assert difference.max() <= 1
    # Pillow rounds after each of its two passes; cutting decimals off would differ in half the pixels.
    assert (difference == 0).mean() > 0.8


def test_resize_in_chunks_reaches_every_image(tmp_path):
    write_fashion(tmp_path)
    levels = np.array([0, 1, 127, 254, 255, 3])
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.tile(levels[:, None, None], (1, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(6))
    resized = load_dataset("fashionmnist", tmp_path, image_size=2048).test.images  # four images a chunk
    assert (resized == torch.from_numpy(levels)[:, None, None, None]).all()


# ------------------------------------------------------------------------------- fashion-MNIST and IDX
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw", "fashion-mnist"])
def test_four_idx_files_are_read_where_they_lie(tmp_path, folder, no_network):
    write_fashion(tmp_path / folder)
    before = snapshot(tmp_path)
    splits = load_dataset("fashionmnist", str(tmp_path), image_size=32)
    assert (splits.train.images.shape, splits.train.images.dtype) == ((180, 1, 32, 32), torch.uint8)
    assert splits.train.labels.dtype == torch.int64
    assert splits.facts is FASHION
    assert snapshot(tmp_path) == before


def replaced(content, place, byte):
    return content[:place] + bytes([byte]) + content[place + 1 :]


@pytest.mark.parametrize(("damage", "named"), [
    (lambda content: content[:-200], "images-idx3"),
    (lambda content: b"<html>not found</html>", "images-idx3"),
    (lambda content: replaced(content, len(content) // 2, content[len(content) // 2] ^ 0xFF), "images-idx3"),
    (lambda content: replaced(content, 10, 0xFF), "images-idx3"),  # no such deflate block
    (lambda content: gzip.compress(replaced(gzip.decompress(content), 3, 1)), "images-idx3"),  # magic number
    (lambda content: gzip.compress(gzip.decompress(content)[:-1]), "images-idx3"),
    (lambda content: gzip.compress(gzip.decompress(content) + b"x"), "images-idx3"),
    (lambda content: gzip.compress(b"\0\0\x08\3\0"), "images-idx3"),
    (lambda content: gzip.compress(b""), "images-idx3"),
    (lambda content: gzip.compress(struct.pack(">4I", 0x803, 200, 27, 28) + bytes(200 * 27 * 28)), "labels-idx1"),
])  # fmt: skip
def test_damaged_idx_is_one_line_with_the_file_and_the_way_out(tmp_path, damage, named):
    images = write_fashion(tmp_path) / "train-images-idx3-ubyte.gz"
    images.write_bytes(damage(images.read_bytes()))
    message = refused("fashionmnist", tmp_path)
    assert str(tmp_path / f"train-{named}-ubyte.gz") in message
    assert "fresh copy" in message


@pytest.mark.parametrize(
    ("test", "labels", "words"),
    [(30, [0] * 29, "29 labels"), (0, [], "no images"), (30, [0] * 17 + [10] + [0] * 12, "label 10 is outside 0..9")],
)
def test_labels_that_do_not_belong_to_the_images_are_refused(tmp_path, test, labels, words):
    write_fashion(tmp_path, test=test)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array(labels))
    message = refused("fashionmnist", tmp_path)
    assert words in message
    assert str(tmp_path / "t10k-labels-idx1-ubyte.gz") in message


def test_some_of_the_four_files_missing_names_them(tmp_path, no_network):
    write_fashion(tmp_path)
    for missing in ("t10k-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"):
        (tmp_path / missing).unlink()
    assert "lacks train-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz" in refused("fashionmnist", tmp_path)


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_the_real_one():
    splits = load_dataset("fashionmnist", DEBIAN_FASHION)
    for split, count in ((splits.train, 5_400), (splits.val, 600), (splits.test, 1_000)):
        assert torch.bincount(split.labels).tolist() == [count] * 10
    histogram = sum(torch.bincount(split.images.flatten(), minlength=256) for split in (splits.train, splits.val))
    levels, share = torch.arange(256) / 255, histogram.double() / histogram.sum()
    mean = (levels * share).sum()
    assert abs(mean - FASHION.mean[0]) < 5e-4
    assert abs(((levels - mean) ** 2 * share).sum().sqrt() - FASHION.std[0]) < 5e-4


# --------------------------------------------------------------------------------- cIFAR and downloads
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_torchvisions_layout(tmp_path, name, no_network, unchecked_md5):
    written = write_cifar(name, tmp_path)
    splits = load_dataset(name, tmp_path)
    assert pairs(splits.train, splits.val) == written
    assert splits.train.images.is_contiguous()
    assert splits.test.images.shape == (20, 3, 32, 32)
    folder = next(tmp_path.iterdir())
    file_name, key, outside = {"cifar10": ("test_batch", "labels", 10), "cifar100": ("train", "fine_labels", 100)}[name]
    broken = {"data": np.zeros((3, 3072), dtype=np.uint8), key: [5, outside, 7]}
    (folder / file_name).write_bytes(pickle.dumps(broken))
    assert refused(name, tmp_path).startswith(f"{folder} ({file_name}): label {outside} is outside")


@pytest.mark.parametrize(
    ("name", "folder"), [("cifar10", "."), ("cifar100", "not/there/yet"), ("fashionmnist", "not/there/yet")]
)
def test_no_data_and_no_network_is_one_line_and_leaves_no_trace(tmp_path, name, folder, no_network):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    before = snapshot(tmp_path)
    message = refused(name, tmp_path / folder)
    assert message.startswith(f"--dataset {name}: not found under '{tmp_path / folder}' and the download failed (")
    assert "network is unreachable" in message
    assert "--dataset digits" in message
    assert "cifar10" in refused("cifar10", tmp_path / "mine" / "note.txt")  # a data folder that is a file
    assert snapshot(tmp_path) == before


def answer_downloads(monkeypatch, write):
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", write)


def test_a_download_lands_complete_silent_and_under_a_timeout(tmp_path, monkeypatch, capfd, unchecked_md5):
    write_cifar("cifar100", tmp_path / "source")
    with tarfile.open(tmp_path / "source.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-100-python", "cifar-100-python")
    content, timeouts = (tmp_path / "source.tar.gz").read_bytes(), []
    monkeypatch.setattr("torchvision.datasets.CIFAR100.tgz_md5", hashlib.md5(content).hexdigest())

    def write(url, filename):
        timeouts.append(socket.getdefaulttimeout())
        print("noise", file=sys.stderr)
        print("noise")
        Path(filename).write_bytes(content)

    answer_downloads(monkeypatch, write)
    data = tmp_path / "new" / "data"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(7.0)
    assert len(load_dataset("cifar100", data).train.labels) == 18
    assert (timeouts, socket.getdefaulttimeout()) == ([30.0], 7.0)
    socket.setdefaulttimeout(before)
    assert "noise" not in "".join(capfd.readouterr())
    assert sorted(path.name for path in data.iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]

    answer_downloads(monkeypatch, lambda url, filename: pytest.fail("downloaded twice"))
    shutil.rmtree(data / "cifar-100-python")  # an archive put there by hand
    assert len(load_dataset("cifar100", data).train.labels) == 18
    (data / "cifar-100-python.tar.gz").unlink()
    assert len(load_dataset("cifar100", data).train.labels) == 18
    assert [path.name for path in data.iterdir()] == ["cifar-100-python"]


def test_downloaded_fashion_mnist_is_found_again(tmp_path, monkeypatch, no_network):
    source = write_fashion(tmp_path / "source")
    md5 = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in sorted(source.iterdir())]
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.resources", md5)
    answer_downloads(
        monkeypatch, lambda url, filename: Path(filename).write_bytes((source / Path(url).name).read_bytes())
    )
    first = load_dataset("fashionmnist", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["FashionMNIST"]
    answer_downloads(monkeypatch, lambda url, filename: pytest.fail("downloaded twice"))
    assert ids(load_dataset("fashionmnist", tmp_path / "data").train) == ids(first.train)


@pytest.mark.parametrize("error", [OSError("connection\nreset"), RuntimeError("odd"), KeyboardInterrupt()])
def test_a_broken_download_touches_nothing_that_stood_there(tmp_path, monkeypatch, error):
    def write(url, filename):
        Path(filename).write_bytes(b"half")
        raise error

    answer_downloads(monkeypatch, write)
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"damaged")
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"damaged too")
    before, timeout = snapshot(tmp_path), socket.getdefaulttimeout()
    with pytest.raises((KeyboardInterrupt, DataError)) as caught:
        load_dataset("cifar100", tmp_path)
    assert (snapshot(tmp_path), socket.getdefaulttimeout()) == (before, timeout)
    damaged = f"cifar-100-python and cifar-100-python.tar.gz under '{tmp_path}' damaged or incomplete and the download"
    assert caught.type is KeyboardInterrupt or damaged in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- batches
def expected_images(split, facts, border, aug, seed, state, epoch):
    """All images of an epoch in the order shown, float64 [N, C, H, H], one by one in NumPy; and that order.

    The seed is that of NumPy's SeedSequence with spawn key (state, epoch), and numbers come in the order below: a
    release that drew others would resume to other bits.
    """
    count, _, size, _ = split.images.shape
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(state, epoch))
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def integers(high):
        return torch.randint(high, (count,), generator=generator).tolist()

    def factors():
        return (0.6 + 0.8 * torch.rand(count, generator=generator)).tolist()

    order = torch.randperm(count, generator=generator).tolist()
    top, left, flip = [border] * count, [border] * count, [0] * count
    if aug != "none":
        top, left = integers(2 * border + 1), integers(2 * border + 1)
        flip = integers(2) if facts.flip else flip
    if aug == "strong":
        bright, contrast, side = factors(), factors(), size // 4
        erase_top, erase_left, erased = integers(size - side + 1), integers(size - side + 1), integers(2)

    mean, std = (np.array(value).reshape(-1, 1, 1) for value in (facts.mean, facts.std))
    padded = np.pad(split.images.numpy(), ((0, 0), (0, 0), (border, border), (border, border))) / 255
    shown = []
    for i, index in enumerate(order):
        image = padded[index, :, top[i] : top[i] + size, left[i] : left[i] + size][..., :: -1 if flip[i] else 1]
        if aug == "strong":
            image = np.minimum(image * bright[i], 1)
            image = np.clip(image.mean() + contrast[i] * (image - image.mean()), 0, 1)
        image = (image - mean) / std
        if aug == "strong" and erased[i]:
            image[:, erase_top[i] : erase_top[i] + side, erase_left[i] : erase_left[i] + side] = 0
        shown.append(image)
    return np.stack(shown), order


@pytest.mark.parametrize("seed", [5, -1, 2**32 + 5])
@pytest.mark.parametrize("aug", ["none", "basic", "strong"])
@pytest.mark.parametrize(
    ("facts", "size", "border"),
    [(CIFAR10, 32, 4), (FASHION, 24, 4), (CIFAR10, 23, 2), (DIGITS, 16, 2), (DIGITS, 7, 0)],
)
def test_a_batch_equals_an_image_by_image_reference_whenever_it_is_asked_for(facts, size, border, aug, seed):
    split = numbered(40, channels=facts.channels, size=size)
    batches = Batches(split, facts, 15, seed=seed, aug=aug)
    for state, epoch, step in [(0, 0, 1), (1, 0, 1), (1, 2, 0), (0, 0, 0), (0, 0, 1)]:
        torch.rand(1)
        images, labels = batches.batch(state, epoch, step)
        expected, order = expected_images(split, facts, border, aug, seed, state, epoch)
        assert (images.dtype, images.shape) == (torch.float32, (15, 3, size, size))
        assert labels.tolist() == order[step * 15 : step * 15 + 15]
        # A grey image is three times the same.
        assert np.abs(images.numpy() - expected[step * 15 : step * 15 + 15]).max() < (1e-4 if aug == "strong" else 1e-5)
    assert torch.equal(images, Batches(split, facts, 15, seed=seed, aug=aug).batch(0, 0, 1)[0])


@pytest.mark.parametrize("aug", ["none", "strong"])
@pytest.mark.parametrize("facts", [CIFAR10, FASHION])
def test_last_batch_is_dropped_in_training_and_counted_in_evaluation(facts, aug):
    split = numbered(25, facts.channels, size=8)
    batches = Batches(split, facts, 10, aug=aug)
    assert (len(batches), batches.steps_per_epoch, batches.unreadable) == (25, 2, 0)
    for step in (2, -1):
        with pytest.raises(IndexError, match=f"step {step}: an epoch has 2 steps"):
            batches.batch(0, 0, step)
    parts = list(batches.sequential())
    assert [labels.tolist() for _, labels in parts] == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    mean, std = (np.array(value).reshape(-1, 1, 1) for value in (facts.mean, facts.std))
    images = torch.cat([images for images, _ in parts])
    assert images.shape == (25, 3, 8, 8)
    assert np.abs(images.numpy() - (split.images.numpy() / 255 - mean) / std).max() < 1e-5
    for batch in (parts[0], batches.batch(0, 0, 0), next(batches.sequential())):
        batch[0].zero_()  # never what is stored
    assert torch.equal(torch.cat([images for images, _ in batches.sequential()])[10:], images[10:])
    assert torch.equal(next(batches.sequential())[0], images[:10])
    for limit, sizes in ((0, []), (1, [10]), (9, [10, 10, 5])):
        assert [len(labels) for _, labels in batches.sequential(limit=limit)] == sizes
    only = Batches(split, facts, 128, aug=aug)
    assert only.steps_per_epoch == 1
    assert sorted(only.batch(0, 0, 0)[1].tolist()) == list(range(25))


def test_bad_batch_arguments_raise():
    for batch_size, aug, words in ((2, "weak", "aug 'weak'"), (0, "none", "batch_size 0")):
        with pytest.raises(ValueError, match=words):
            Batches(numbered(4), CIFAR10, batch_size, aug=aug)
