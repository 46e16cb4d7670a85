"""Rounds of training: the states of a run and, with `--finish_epochs`, a last fine-tuning that is called the finish.

The finish starts from the weights that the last state selected and keeps that state's masks and units: nothing is
chosen, doomed or rewound. It has a learning-rate schedule of its own. In files and checkpoints it counts as state S,
after states 0 .. S-1. With `--finish_on_all` no image is left to select by: the weights of its last step are exported.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from dataset import Batches, FolderBatches, FolderSplit, Split, Splits, joined
from engine.model import run_length
from engine.optimizer import Schedule, milestones_of
from images.orders import count_steps


@dataclass(frozen=True)
class Round:
    """A state or the finish: `epochs` passes over the training images of `data` at the rates of `schedule`."""

    epochs: int
    data: Batches | FolderBatches
    schedule: Schedule

    @property
    def steps_per_epoch(self) -> int:
        return self.data.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def images_per_step(self) -> int:
        """Images that one optimizer step sees, over all processes."""
        return min(self.data.batch_size, len(self.data.labels))


def state_round(args: argparse.Namespace, data: Batches | FolderBatches) -> Round:
    """What every state trains on."""
    _, epochs, milestones = run_length(args)
    steps = data.steps_per_epoch
    at = tuple(epoch * steps for epoch in milestones)
    return Round(epochs, data, Schedule(args.sched, args.lr, args.warmup * steps, at, epochs * steps, args.min_lr))


def finish_round(args: argparse.Namespace, data: Batches | FolderBatches) -> Round:
    """What the finish trains on; `data` hold the images of `finish_split`."""
    return Round(args.finish_epochs, data, finish_schedule(args, data.steps_per_epoch))


def finish_split(args: argparse.Namespace, splits: Splits) -> Split | FolderSplit:
    """The images that the finish trains on."""
    return joined(splits.train, splits.val) if args.finish_on_all else splits.train


def finish_images(args: argparse.Namespace, train: int, val: int) -> int:
    """How many images `finish_split` has, given the sizes of both splits."""
    return train + val if args.finish_on_all else train


def finish_steps(args: argparse.Namespace, train: int, val: int) -> int:
    """Optimizer steps of an epoch of the finish; as in every state, the last incomplete batch is dropped."""
    return count_steps(finish_images(args, train, val), args.batch_size * args.accum_steps)


def finish_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """A state's schedule scaled to the finish: warm-up and milestones keep their shares of it, in whole steps."""
    total = steps_per_epoch * args.finish_epochs
    warmup, *at = (epoch * total // args.epochs for epoch in (args.warmup, *milestones_of(args)))
    return Schedule(args.sched, args.finish_lr, warmup, tuple(at), total, args.min_lr)


def finish_line(args: argparse.Namespace, images: int, last_state: int) -> str:
    """The line of the log with which the finish begins."""
    what, kept = f"{images:,} training images", "the epoch that is best on validation is exported"
    if args.finish_on_all:
        what = f"{images:,} images, training and validation together"
        last = "average of the weights at" if args.ema_decay else "weights of"
        kept = f"nothing is held out to select by: exported is what it ends with, the {last} the last step"
    return (
        f"finish: {args.finish_epochs} epochs from the selected weights of state {last_state}, masks as they are, lr "
        f"{args.finish_lr:g}, {args.sched}, on {what}; {kept}"
    )
