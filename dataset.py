"""Data sets as device-resident uint8 tensors, with batches that can be replayed one by one.

    splits = load_dataset("digits", "data", image_size=16)
    train = Batches(splits.train, splits.facts, batch_size=128, device="cpu", seed=42, aug="basic")
    images, labels = train.batch(state=0, epoch=3, step=7)     # the same bits whenever it is asked for

Images are uint8 [N, C, H, W] until a batch is made; a batch is float32 [B, 3, H, W], normalised once by the
data set's own mean and standard deviation. Which images validate is fixed, whatever the seed of the run.
"""

import contextlib
import gzip
import http.client
import io
import logging
import math
import os
import socket
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)


class DataError(RuntimeError):
    """One line that says what is wrong with the data and what to do."""


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set without reading it. Mean and std are per stored channel, on the 0..1 scale,
    over the training set at its native size; `train_images` counts the training set before validation is
    taken from it; `vit_image_size` is what a ViT built for 32 pixels is shown when the user names no size.
    """

    classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    vit_image_size: int
    train_images: int


DATASETS = {
    "cifar10": DatasetFacts(
        classes=10,
        channels=3,
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        flip=True,
        vit_image_size=32,
        train_images=50_000,
    ),
    "cifar100": DatasetFacts(
        classes=100,
        channels=3,
        image_size=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        flip=True,
        vit_image_size=32,
        train_images=50_000,
    ),
    "fashionmnist": DatasetFacts(
        classes=10,
        channels=1,
        image_size=28,
        mean=(0.2860,),
        std=(0.3530,),
        flip=True,
        vit_image_size=32,
        train_images=60_000,
    ),
    "digits": DatasetFacts(
        classes=10,
        channels=1,
        image_size=8,
        mean=(0.3058,),
        std=(0.3762,),
        flip=False,
        vit_image_size=16,
        train_images=1_438,
    ),
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N], both on the CPU."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Splits:
    """Train and validation are cut from the official training set, test is the official test set."""

    train: Split
    val: Split
    test: Split
    facts: DatasetFacts


# Splitting


def balanced_order(labels: Tensor | Sequence[int], seed: int = 0) -> Tensor:
    """A fixed permutation, int64 [N], any prefix of which holds the classes in their proportions.

    Image r of the n of its class (after a seeded shuffle) stands at (r + 0.5) / n; images are sorted by that
    and then by class. With classes of equal size, counts in a prefix differ by at most one.
    """
    labels = np.asarray(labels)
    # RandomState's stream is frozen by NumPy's compatibility policy; Generator's may change with a release,
    # and with it every validation set.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    position = (rank + 0.5) / np.repeat(counts, counts)
    return torch.from_numpy(by_class[np.lexsort((labels[by_class], position))].astype(np.int64))


def split_sizes(name: str, val_fraction: float = 0.1, train_limit: int | None = None) -> tuple[int, int]:
    """Images in train and val as `load_dataset` would return them, without any data.

    Raises DataError for an unknown name, a fraction outside (0, 1) and a limit below 1.
    """
    return _count_split(_facts(name).train_images, val_fraction, train_limit)


def _facts(name: str) -> DatasetFacts:
    if name not in DATASETS:
        raise DataError(f"--dataset {name}: unknown; choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _count_split(images: int, val_fraction: float, train_limit: int | None) -> tuple[int, int]:
    if not 0 < val_fraction < 1:
        raise DataError(f"--val_fraction {val_fraction}: must lie between 0 and 1, such as 0.1")
    if train_limit is not None and train_limit < 1:
        raise DataError(f"--train_limit {train_limit}: must be at least 1; leave it out to train on all images")
    val = max(1, round(images * val_fraction))
    available = images - val
    if available < 1:
        raise DataError(f"--val_fraction {val_fraction}: leaves nothing to train on of {images} images; lower it")
    return (available if train_limit is None else min(available, train_limit)), val


# Loading


def load_dataset(
    name: str,
    data_dir: str | Path,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    train_limit: int | None = None,
) -> Splits:
    """Reads a data set, downloading it into `data_dir` when it is missing, and splits it.

    Validation is the prefix of `balanced_order` of the official training set; the rest is train, in its own
    balanced order, of which `train_limit` keeps the first. `image_size` (pixels) other than the native one
    resizes bilinearly with antialiasing, once. No argument depends on the seed of a run.

    Raises DataError, in one line, for a bad argument and for data that is missing (with no network), damaged
    or labelled outside the classes. A failed download leaves `data_dir` as it was.
    """
    facts = _facts(name)
    if image_size is not None and image_size < 1:
        raise DataError(f"--img_size {image_size}: must be at least 1 pixel")
    _count_split(facts.train_images, val_fraction, train_limit)

    official_train, test = _READERS[name](name, Path(data_dir).expanduser())
    train_images, val_images = _count_split(len(official_train.labels), val_fraction, train_limit)
    order = balanced_order(official_train.labels)
    val_order, rest = order[:val_images], order[val_images:]
    if train_limit is not None and train_limit > len(rest):
        logger.warning("--train_limit %d: only %d training images, all are used", train_limit, len(rest))
    train_order = rest[balanced_order(official_train.labels[rest])][:train_images]

    def finish(split: Split) -> Split:
        return Split(_resize(split.images, image_size or facts.image_size), split.labels)

    train, val = (Split(official_train.images[o], official_train.labels[o]) for o in (train_order, val_order))
    return Splits(finish(train), finish(val), finish(test), facts)


def _resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, H] to uint8 [N, C, size, size], in chunks whose float copies stay around 64 MiB."""
    count, channels, height, _ = images.shape
    if size == height:
        return images
    resized = torch.empty(count, channels, size, size, dtype=torch.uint8)
    chunk = max(1, 2**24 // (channels * max(size, height) ** 2))
    for start in range(0, count, chunk):
        part = images[start : start + chunk].float()
        part = functional.interpolate(part, size=(size, size), mode="bilinear", antialias=True)
        resized[start : start + chunk] = part.round_().clamp_(0, 255).to(torch.uint8)
    return resized


def _checked_split(images: Tensor, labels: Tensor, facts: DatasetFacts, source: str) -> Split:
    shape = (facts.channels, facts.image_size, facts.image_size)
    if len(labels) == 0:
        raise DataError(f"{source}: holds no images; replace it with a fresh copy")
    if len(images) != len(labels) or tuple(images.shape[1:]) != shape:
        raise DataError(
            f"{source}: {len(labels)} labels for images of shape {tuple(images.shape)}, expected"
            f" {(len(labels), *shape)}; replace it with a fresh copy"
        )
    outside = labels[(labels < 0) | (labels >= facts.classes)]
    if len(outside):
        raise DataError(
            f"{source}: label {outside[0].item()} is outside 0..{facts.classes - 1}; the file is damaged or"
            " belongs to another data set, replace it"
        )
    return Split(images, labels)


def _read_digits(name: str, root: Path) -> tuple[Split, Split]:
    """scikit-learn's 1,797 embedded digits: a fixed, class-balanced fifth is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"--dataset {name}: needs scikit-learn ({error}); pip install scikit-learn") from error
    digits = load_digits()
    facts = DATASETS[name]
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    split = _checked_split(images, labels, facts, "scikit-learn's digits")
    order = balanced_order(labels)
    train, test = order[-facts.train_images :], order[: -facts.train_images]
    return Split(split.images[train], split.labels[train]), Split(split.images[test], split.labels[test])


def _read_cifar(name: str, root: Path) -> tuple[Split, Split]:
    datasets = _import_torchvision_datasets(name)
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder, archive = root / source.base_folder, root / source.filename

    def open_parts() -> tuple:
        return source(str(root), train=True), source(str(root), train=False)

    def convert(part, files: list) -> Split:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(part.targets, dtype=torch.int64)
        names = ", ".join(file_name for file_name, _ in files)
        return _checked_split(images, labels, DATASETS[name], f"{folder} ({names})")

    try:
        train, test = open_parts()
    except (RuntimeError, OSError):
        # torchvision raises RuntimeError for files that are missing as for files with another md5.
        archive_intact = os.access(archive, os.R_OK) and datasets.utils.check_integrity(archive, source.tgz_md5)
        suspects = [folder] if archive_intact else [folder, archive]
        damaged = " and ".join(path.name for path in suspects if path.exists())
        found = f"{damaged} under '{root}' damaged or incomplete" if damaged else f"not found under '{root}'"

        def obtain(staging: str) -> None:
            if archive_intact:
                datasets.utils.extract_archive(str(archive), staging)
            else:
                source(staging, download=True)

        _fetch(name, root, obtain, found, f"{source.filename} from the CIFAR page")
        train, test = open_parts()
    return convert(train, source.train_list), convert(test, source.test_list)


_IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def _read_fashion(name: str, root: Path) -> tuple[Split, Split]:
    folder = _find_idx_folder(root)
    if folder is None:
        datasets = _import_torchvision_datasets(name)

        def obtain(staging: str) -> None:
            datasets.FashionMNIST(staging, download=True)

        _fetch(name, root, obtain, f"not found under '{root}'", "the four .gz files of Fashion-MNIST")
        folder = root / "FashionMNIST" / "raw"

    def read(part: str) -> Split:
        images, labels = (folder / file_name for file_name in _IDX_FILES[part])
        return _checked_split(
            read_idx(images, dimensions=3)[:, None],
            read_idx(labels, dimensions=1).to(torch.int64),
            DATASETS[name],
            str(labels),
        )

    return read("train"), read("test")


def _find_idx_folder(root: Path) -> Path | None:
    names = [file_name for part in _IDX_FILES.values() for file_name in part]
    missing = {}
    for folder in (root, root / "FashionMNIST" / "raw", root / "fashion-mnist"):
        missing[folder] = [file_name for file_name in names if not os.path.isfile(folder / file_name)]
        if not missing[folder]:
            return folder
    for folder, absent in missing.items():
        if len(absent) < len(names):
            raise DataError(
                f"--dataset fashionmnist: '{folder}' lacks {', '.join(absent)}; add what is missing, or"
                " remove the other idx .gz files there to have all four downloaded"
            )
    return None


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads a gzipped IDX file of unsigned bytes into a uint8 tensor of that many dimensions.

    Format: http://yann.lecun.com/exdb/mnist (magic number 0x0000 0x08 dimensions, then big-endian sizes).
    Raises DataError when the file cannot be read, has another magic number, or is longer or shorter than its
    header says.
    """
    way_out = "replace it with a fresh copy from the Fashion-MNIST page"
    try:
        with gzip.open(path, "rb") as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_one_line(error)}); {way_out}") from error
    header = struct.Struct(f">i{dimensions}I")
    magic = 0x0800 + dimensions
    if len(content) < header.size or (found := header.unpack_from(content))[0] != magic:
        raise DataError(f"{path}: not an IDX file of {dimensions} dimensions (magic number {magic}); {way_out}")
    shape = found[1:]
    if len(content) != header.size + math.prod(shape):
        raise DataError(
            f"{path}: damaged, {len(content) - header.size} bytes where its header promises"
            f" {'x'.join(map(str, shape))}; {way_out}"
        )
    values = np.frombuffer(content, dtype=np.uint8, offset=header.size).reshape(shape)
    # A copy, because a tensor must not alias the read-only bytes.
    return torch.from_numpy(values.copy())


_READERS: dict[str, Callable[[str, Path], tuple[Split, Split]]] = {
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "fashionmnist": _read_fashion,
    "digits": _read_digits,
}


# Downloading


def _import_torchvision_datasets(name: str):
    # Imported late: digits and plans without data need no torchvision, whose import fails where its version
    # does not belong to torch's (a RuntimeError then).
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"--dataset {name}: torchvision cannot be imported ({_one_line(error)}); pip install -r"
            " requirements.txt brings the pair that belongs together"
        ) from error
    return datasets


def _fetch(name: str, root: Path, obtain: Callable[[str], object], found: str, wanted: str) -> None:
    """Runs `obtain(staging folder)` and moves the files that it made to the same places under `root`.

    torchvision writes straight to the final names and overwrites what is there. The staging folder keeps a
    failed or interrupted attempt from touching anything, and goes with it.
    """
    logger.info("--dataset %s: %s, downloading or unpacking it", name, found)
    created: list[Path] = []
    complete = False
    try:
        created = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as staging:
            with _quiet_network(timeout=30.0):
                obtain(staging)
            for path in sorted(path for path in Path(staging).rglob("*") if path.is_file()):
                target = root / path.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        complete = True
    except (
        OSError,
        RuntimeError,
        EOFError,
        zlib.error,
        tarfile.TarError,
        http.client.HTTPException,
    ) as error:
        raise DataError(
            f"--dataset {name}: {found} and the download failed ({_one_line(error)}); put {wanted} into"
            f" '{root}', or start offline with --dataset digits"
        ) from error
    finally:
        if not complete:
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextlib.contextmanager
def _quiet_network(timeout: float) -> Iterator[None]:
    """Gives new sockets a timeout (seconds) and keeps torchvision's progress bars off the terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Batches


@dataclass(frozen=True)
class _EpochPlan:
    """Everything random about one epoch, entry i for the i-th image shown; on the training device.

    `origin` is the flat index, in the padded store, of the crop's upper left corner.
    """

    order: Tensor  # int64 [N]
    origin: Tensor | None = None  # [N]
    flip: Tensor | None = None  # bool [N]
    brightness: Tensor | None = None  # float32 [N], a factor
    contrast: Tensor | None = None  # float32 [N], a factor
    erase_top: Tensor | None = None  # int64 [N], the image size where nothing is erased
    erase_left: Tensor | None = None  # int64 [N]


class Batches:
    """Batches of one split, whose pixels live on `device` once, as uint8.

    `aug`: "none"; "basic" is a random crop out of the image with a black border, and a horizontal flip where
    the data set allows it; "strong" adds brightness and contrast jitter (factors 0.6 to 1.4, clamped to the
    pixel range, contrast around the image's own mean) and, for half of the images, one square of a quarter of
    the side set to the mean (random erasing, Zhong et al. 2017, arXiv:1708.04896).
    The border is 4 pixels (He et al. 2016, section 4.2), and an eighth of the side below 24 pixels, where 4
    would move a 16-pixel digit by a quarter of its width and cut strokes off.

    All random numbers come from the CPU generator, seeded by (seed, state, epoch) alone, so the choices are
    the same on every device. Grey images come out as an expanded (stride 0) view of three channels: clone
    before writing into one.
    """

    def __init__(
        self,
        split: Split,
        facts: DatasetFacts,
        batch_size: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        aug: str = "none",
    ) -> None:
        if aug not in ("none", "basic", "strong"):
            raise ValueError(f"aug {aug!r}: choose none, basic or strong")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        count, channels, size, _ = split.images.shape
        self.batch_size, self.seed, self.aug = batch_size, seed, aug
        self.steps_per_epoch = max(count // batch_size, min(count, 1))
        self.labels = split.labels.to(device)
        self._device, self._size, self._flip = torch.device(device), size, facts.flip

        self._border = 0 if aug == "none" else 4 if size >= 24 else size // 8
        side = size + 2 * self._border
        if self._border:
            self._store = torch.zeros(count, channels, side, side, dtype=torch.uint8, device=device)
            self._inner(slice(None)).copy_(split.images)
        else:
            self._store = split.images.contiguous().to(device)

        mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (facts.mean, facts.std))
        self._scale = (1 / (255 * std)).float().to(device)
        self._bias = (-mean / std).float().to(device)

        # Measured at 32x32x3, batch 128, one thread: 32-bit indices gather 1.4 times as fast as 64-bit ones.
        self._index_type = torch.int32 if self._store.numel() < 2**31 else torch.int64
        span = torch.arange(size, dtype=self._index_type)
        planes = torch.arange(channels, dtype=self._index_type)[:, None] * side**2
        self._rows = (planes + span * side).to(device)  # [C, H]
        self._columns = span.to(device)
        self._mirrored = span.flip(0).to(device)
        self._cached_plan: tuple[tuple[int, int], _EpochPlan] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, state: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Training batch: images float32 [B, 3, H, W], labels int64 [B]; a pure function of its arguments and
        the seed. Raises IndexError for a step outside 0..steps_per_epoch-1.

        Only the first call of an epoch draws and copies to the device; the others never wait for it.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step}: an epoch has {self.steps_per_epoch} steps")
        plan = self._plan(state, epoch)
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = plan.order[part]
        if self.aug == "none":
            pixels = self._store.index_select(0, chosen).float()
        else:
            pixels = self._crop(plan.origin[part], plan.flip[part])
        if self.aug == "strong":
            _jitter_(pixels, plan.brightness[part], plan.contrast[part])
        images = self._normalise_(pixels)
        if self.aug == "strong":
            self._erase_(images, plan.erase_top[part], plan.erase_left[part])
        return images.expand(-1, 3, -1, -1), self.labels.index_select(0, chosen)

    def sequential(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in stored order, never augmented, the last batch as long as it is; at most `limit`
        batches. Shapes as in `batch`."""
        starts = range(0, len(self), self.batch_size)
        for start in starts if limit is None else starts[:limit]:
            part = slice(start, start + self.batch_size)
            pixels = self._inner(part).to(torch.float32, memory_format=torch.contiguous_format)
            yield self._normalise_(pixels).expand(-1, 3, -1, -1), self.labels[part]

    def _inner(self, part: slice) -> Tensor:
        """The images without their border: a view, uint8 [n, C, H, W]."""
        inside = slice(self._border, self._border + self._size)
        return self._store[part, :, inside, inside]

    def _plan(self, state: int, epoch: int) -> _EpochPlan:
        if self._cached_plan is None or self._cached_plan[0] != (state, epoch):
            self._cached_plan = (state, epoch), self._draw(state, epoch)
        return self._cached_plan[1]

    def _draw(self, state: int, epoch: int) -> _EpochPlan:
        # state and epoch as a spawn key, because words of one entropy list can run into each other; the
        # modulus admits negative seeds.
        sequence = np.random.SeedSequence(self.seed % 2**64, spawn_key=(state, epoch))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        count, channels, side, _ = self._store.shape

        def integers(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        def factors() -> Tensor:
            return 0.6 + 0.8 * torch.rand(count, generator=generator)

        order = torch.randperm(count, generator=generator)
        drawn = {"order": order}
        if self.aug != "none":
            top, left = integers(2 * self._border + 1), integers(2 * self._border + 1)
            drawn["origin"] = (order * (channels * side**2) + top * side + left).to(self._index_type)
            drawn["flip"] = integers(2).bool() if self._flip else torch.zeros(count, dtype=torch.bool)
        if self.aug == "strong":
            drawn["brightness"], drawn["contrast"] = factors(), factors()
            corners = self._size - self._size // 4 + 1
            top, left = integers(corners), integers(corners)
            drawn["erase_top"] = torch.where(integers(2).bool(), top, self._size)
            drawn["erase_left"] = left
        return _EpochPlan(**{name: value.to(self._device) for name, value in drawn.items()})

    def _crop(self, origin: Tensor, flip: Tensor) -> Tensor:
        """One flat gather: crop offset and flip are only an arithmetic of indices. float32 [B, C, H, W]."""
        columns = torch.where(flip[:, None], self._mirrored, self._columns)  # [B, W]
        rows = origin[:, None, None] + self._rows  # [B, C, H]
        index = rows[..., None] + columns[:, None, None, :]
        return self._store.view(-1).index_select(0, index.view(-1)).view(index.shape).float()

    def _normalise_(self, pixels: Tensor) -> Tensor:
        # Two roundings rather than addcmul: a device that fuses them would give other bits, and on the CPU
        # this is the faster way (measured).
        return pixels.mul_(self._scale).add_(self._bias)

    def _erase_(self, images: Tensor, top: Tensor, left: Tensor) -> None:
        side = self._size // 4
        span = self._columns
        rows = (span >= top[:, None]) & (span < top[:, None] + side)
        columns = (span >= left[:, None]) & (span < left[:, None] + side)
        images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


def _jitter_(pixels: Tensor, brightness: Tensor, contrast: Tensor) -> None:
    """Brightness p -> b p, then contrast p -> m + c (p - m) around the image's mean m, each clamped to 0..255
    as it would be to 0..1. In place; pixels float32 [B, C, H, W], factors [B]."""
    pixels.mul_(brightness[:, None, None, None]).clamp_(max=255)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels.sub_(mean).mul_(contrast[:, None, None, None]).add_(mean).clamp_(0, 255)
