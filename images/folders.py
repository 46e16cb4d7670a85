"""Batches of image files, read, decoded and augmented ahead of time by worker processes.

They have the form of those in batches.py and do not depend on the number of workers.
"""

import errno
import functools
import itertools
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from images.augment import ERASE_AREA, ERASE_CHANCE, ERASE_RATIO, Normalise, check_augmentation
from images.facts import DataError, DatasetFacts, FolderSplit, one_line
from images.files import read_rgb
from images.orders import WHOLE, Share, count_steps, epoch_order, random_seed, step_positions
from images.preprocessing import preprocessing_of
from images.reading import import_torchvision
from utils import to_device

logger = logging.getLogger(__name__)

# A worker that died is noticed after the first time (seconds), one that hangs given up after the second.
WORKER_CHECK = 5
WORKER_PATIENCE = 600


class FolderBatches:
    """Batches of image files, decoded and augmented by `workers` processes that work ahead (0: in this process).

    `aug`: "none" shows images as evaluation does (see `preprocessing_of`); "basic" is a random resized crop of 8% to
    100% of the area and a horizontal flip; "strong" adds RandAugment (Cubuk et al. 2020, arXiv:1909.13719), "rand"
    RandAugment and random erasing (for a quarter of the images, a rectangle of 2% to 33% of the area set to the mean).
    Transforms are torchvision's, on Pillow images; bytes travel to `device`, which normalises.

    What is random about the image at a position of an epoch comes from a generator of its own, seeded by
    (seed, state, epoch, position), so batches do not depend on the number of workers, and reading can start
    at any step. Steps asked for in order come from a running stream that goes on into the next epoch; any
    other step starts a new one.

    A file that cannot be read as an image is logged once. In training the next readable image of the epoch's
    order stands in for it, in evaluation it is left out. Raises DataError, from `batch` and `sequential`, when
    more than 1% of the images (at least one, never all) are unreadable and when a worker dies or hangs.
    """

    def __init__(
        self,
        split: FolderSplit,
        facts: DatasetFacts,
        batch_size: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        aug: str = "none",
        workers: int = 0,
        share: Share = WHOLE,
    ) -> None:
        check_augmentation(aug)
        if workers < 0:
            raise ValueError(f"workers {workers}: must be 0 or more")
        count = len(split.labels)
        self.batch_size, self.seed, self.aug, self.workers, self.share = batch_size, seed, aug, workers, share
        self.steps_per_epoch = count_steps(count, batch_size)
        self.labels = split.labels.to(device)
        self._split, self._device = split, torch.device(device)
        self._normalise_ = Normalise(facts, device)
        self._allowed = min(max(1, count // 100), count - 1)
        self._reader = _FolderReader(split, batch_size, seed, aug, facts, self._allowed, share)
        self.broken: dict[int, str] = {}
        self._stream: Iterator | None = None
        self._upcoming = (0, 0, 0)
        _quiet_pillow()

    def __len__(self) -> int:
        """Images that `sequential` yields: those found unreadable so far are not counted."""
        return len(self.labels) - self.unreadable

    @property
    def unreadable(self) -> int:
        """Files found so far that are no images."""
        return len(self.broken)

    @property
    def unreadable_files(self) -> frozenset[str]:
        """Their paths."""
        return frozenset(map(self._split.path, self.broken))

    def batch(self, state: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Training batch: images float32 [B, 3, H, W], labels int64 [B]; a pure function of its arguments, the
        seed and the files. Raises IndexError for a step outside 0..steps_per_epoch-1."""
        step_positions(step, self.batch_size, len(self.labels))  # refuses a wrong step before anything starts
        if self._stream is None or self._upcoming != (state, epoch, step):
            self.close()
            self._stream = self._start(self._steps_from(state, epoch, step), self.workers)
        self._upcoming = (state, epoch, step + 1) if step + 1 < self.steps_per_epoch else (state, epoch + 1, 0)
        try:
            return self._receive(self._stream)
        except BaseException:
            self.close()
            raise

    def sequential(self, limit: int | None = None, whole: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """All readable images in stored order, never augmented, the last batch as long as it is; at most
        `limit` batches. Shapes as in `batch`. Not the `whole`: this process's share of these images."""
        parts = self.share.batches(len(self.labels), self.batch_size, limit, whole)
        stream = self._start(iter(parts), min(self.workers, len(parts)))
        try:
            for _ in parts:
                images, labels = self._receive(stream)
                if len(labels):
                    yield images, labels
        finally:
            _stop(stream)

    def close(self) -> None:
        """Ends the worker processes of `batch`, which starts new ones when it is called again."""
        stream, self._stream = self._stream, None
        _stop(stream)

    def _steps_from(self, state: int, epoch: int, step: int) -> Iterator[tuple[int, int, int]]:
        for later in itertools.count(epoch):
            for position in range(step if later == epoch else 0, self.steps_per_epoch):
                yield state, later, position

    def _start(self, keys: Iterator, workers: int) -> Iterator:
        # The loader draws a seed for its workers, which must not come from the run's generator; nobody uses it.
        options = {"batch_size": None, "sampler": keys, "generator": torch.Generator()}
        if workers:
            options |= {"num_workers": workers, "timeout": WORKER_CHECK, "worker_init_fn": _set_up_worker}
        on_cuda = self._device.type == "cuda"
        # torch raises from its handler of SIGCHLD, in the middle of whatever the main process is doing, when a
        # worker dies. Without the handler the loader notices where it waits for a batch.
        handles = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if handles else None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create")  # how many is the user's choice
                return iter(DataLoader(self._reader, pin_memory=on_cuda, **options))
        except (OSError, RuntimeError) as error:
            raise self._worker_error(one_line(error)) from error
        finally:
            if handles:
                signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def _receive(self, stream: Iterator) -> tuple[Tensor, Tensor]:
        """The next batch of the stream on the device, after a look at what could not be read for it."""
        started = time.monotonic()
        while True:
            try:
                images, chosen, broken = next(stream)
                break
            except (OSError, RuntimeError, MemoryError, EOFError) as error:
                if not self.workers:
                    raise
                if not str(error).startswith("DataLoader timed out"):
                    # What a worker raised arrives with its traceback, the error itself last.
                    raise self._worker_error(str(error).strip().splitlines()[-1]) from error
                if time.monotonic() - started > WORKER_PATIENCE:
                    raise self._worker_error(f"no batch in {WORKER_PATIENCE} seconds") from error
        self.note(broken)
        images, chosen = (to_device(tensor, self._device) for tensor in (images, chosen))
        return self._normalise_(images.float()), self.labels.index_select(0, chosen)

    def _worker_error(self, reason: str) -> DataError:
        return DataError(
            f"--workers {self.workers}: reading --dataset {self._split.dataset} failed ({reason}); lower --workers"
            " when memory or shared memory (/dev/shm) runs out, 0 reads in the main process"
        )

    def note(self, broken: Iterable[tuple[int, str]]) -> None:
        """Files by index that cannot be read, and why."""
        for index, reason in broken:
            if index not in self.broken:
                self.broken[index] = reason
                path, labels = self._split.path(index), self._split.labels
                logger.warning("%s: cannot be read as an image (%s), skipped", path, reason)
                alike = (labels == labels[index]).nonzero().flatten().tolist()
                if self.broken.keys() >= {*alike}:
                    logger.warning("%s: no image of this class can be read", os.path.dirname(path))
        if len(self.broken) > self._allowed:
            first = ", ".join(f"{self._split.path(i)}: {self.broken[i]}" for i in list(self.broken)[:3])
            raise DataError(
                f"--dataset {self._split.dataset}: {len(self.broken):,} of {len(self.labels):,} images cannot be"
                f" read (first: {first}); replace or remove them"
            )


_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class _FolderReader:
    """Reads the batch of a key, wherever the loader asks for it: (state, epoch, step) for training, a range of
    indices for evaluation. Returns pixels uint8 [B, 3, H, W], indices int64 [B] of the images shown, and the
    (index, reason) of those that were wanted and cannot be read."""

    def __init__(
        self, split: FolderSplit, batch_size: int, seed: int, aug: str, facts: DatasetFacts, allowed: int, share: Share
    ) -> None:
        v2 = import_torchvision(split.dataset, "transforms.v2")
        size = split.image_size
        self._split, self._batch_size, self._seed, self._allowed = split, batch_size, seed, allowed
        self._share = share
        shown = preprocessing_of(facts, size)
        self._plain = shown.transform(split.dataset)
        self._random = None
        if aug != "none":
            mode = v2.InterpolationMode(shown.interpolation)
            steps = [v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=mode, antialias=True)]
            if facts.flip:
                steps.append(v2.RandomHorizontalFlip())
            if aug in ("strong", "rand"):
                steps.append(v2.RandAugment())
            steps.append(v2.PILToTensor())
            if aug == "rand":
                mean = [round(255 * value) for value in facts.mean]
                steps.append(v2.RandomErasing(ERASE_CHANCE, ERASE_AREA, ERASE_RATIO, mean))
            self._random = v2.Compose(steps)
        self._cached_order: tuple[tuple[int, int], np.ndarray] | None = None

    def __getitem__(self, key: tuple[int, int, int] | range) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        wanted = self._evaluation(key) if isinstance(key, range) else self._training(*key)
        size = self._split.image_size
        pixels = torch.empty(len(wanted), 3, size, size, dtype=torch.uint8)
        if get_worker_info() is not None:
            # Here, where an error reaches the main process; the loader would share it in a thread that
            # swallows errors.
            pixels.share_memory_()
        shown, broken = [], {}
        for candidates, transform in wanted:
            for index in candidates:
                path = self._split.path(index)
                try:
                    image = read_rgb(path)
                except Exception as error:  # decoders of broken files raise whatever they like
                    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NOT_THE_FILE:
                        raise
                    broken[index] = getattr(error, "strerror", None) or one_line(error).replace(f" {path!r}", "")
                    continue
                pixels[len(shown)] = transform(image)
                shown.append(index)
                break
        return pixels[: len(shown)], torch.tensor(shown, dtype=torch.int64), list(broken.items())

    def _evaluation(self, indices: range) -> list[tuple[Iterator[int], Callable]]:
        return [(iter([index]), self._plain) for index in indices]

    def _training(self, state: int, epoch: int, step: int) -> list[tuple[Iterator[int], Callable]]:
        order = self._order(state, epoch)
        shown = self._share.of_step(step_positions(step, self._batch_size, len(order)))
        positions = [position for part in shown for position in range(part.start, part.stop)]

        def candidates(position: int) -> Iterator[int]:
            # One more than may be broken: when none of them can be read, the run ends.
            return (int(order[(position + k) % len(order)]) for k in range(self._allowed + 1))

        def transform(image, position: int) -> Tensor:
            if self._random is None:
                return self._plain(image)
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed, which seeds the accelerator too.
                torch.default_generator.manual_seed(random_seed(self._seed, state, epoch, position))
                return self._random(image)

        return [(candidates(p), functools.partial(transform, position=p)) for p in positions]

    def _order(self, state: int, epoch: int) -> np.ndarray:
        if self._cached_order is None or self._cached_order[0] != (state, epoch):
            order, _ = epoch_order(self._seed, state, epoch, len(self._split.labels))
            self._cached_order = (state, epoch), order.numpy()
        return self._cached_order[1]


def _quiet_pillow() -> None:
    """Pillow warns of large images, odd palettes and metadata; what matters is whether an image can be read."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _stop(stream: Iterator | None) -> None:
    # Workers end with the loader's iterator, which the traceback of an error may keep alive.
    if hasattr(stream, "_shutdown_workers"):
        stream._shutdown_workers()


def _set_up_worker(_: int) -> None:
    _quiet_pillow()
    # Ctrl-C reaches every process of the terminal; what it means is for the main process to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
