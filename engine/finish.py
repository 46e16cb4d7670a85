"""The finish: flags and the splits of a run in; what its small model trains on behind the last state, and how, out.

A finish begins with the weights that the last state selected. Its masks and kept units are that state's, nothing is
chosen, doomed or rewound; it has a schedule of its own. In files and checkpoints it counts as state S, behind
0 .. S-1. On all images (`--finish_on_all`) nothing is left to select by: the weights of its last step are exported.
"""

from __future__ import annotations

import argparse

from dataset import FolderSplit, Split, Splits, joined
from engine.optimizer import Schedule, milestones_of
from images.orders import count_steps


def finish_split(args: argparse.Namespace, splits: Splits) -> Split | FolderSplit:
    """What the finish trains on."""
    return joined(splits.train, splits.val) if args.finish_on_all else splits.train


def finish_images(args: argparse.Namespace, train: int, val: int) -> int:
    """How many images that are, of so many that train and validate."""
    return train + val if args.finish_on_all else train


def finish_steps(args: argparse.Namespace, train: int, val: int) -> int:
    """Optimizer steps of an epoch of the finish; as in every state, the last incomplete batch is dropped."""
    return count_steps(finish_images(args, train, val), args.batch_size * args.accum_steps)


def finish_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """A state's schedule over the steps of the finish."""
    return scaled_schedule(args, args.finish_epochs, args.finish_lr, steps_per_epoch)


def scaled_schedule(args: argparse.Namespace, epochs: int, lr: float, steps_per_epoch: int) -> Schedule:
    """The schedule of `--epochs` over other epochs: warm-up and milestones keep their shares, in whole steps."""
    usual = args.epochs or args.dense_epochs or 1

    def scaled(epoch: int) -> int:
        return epoch * steps_per_epoch * epochs // usual

    milestones = tuple(scaled(epoch) for epoch in milestones_of(args))
    return Schedule(args.sched, lr, scaled(args.warmup), milestones, 1, steps_per_epoch * epochs, args.min_lr)


def finish_line(args: argparse.Namespace, images: int, last_state: int) -> str:
    """What the log says when it begins."""
    what, kept = f"{images:,} training images", "the epoch that is best on validation is exported"
    if args.finish_on_all:
        what = f"{images:,} images, training and validation together"
        last = "average of the weights at" if args.ema_decay else "weights of"
        kept = f"nothing is held out to select by: exported is what it ends with, the {last} the last step"
    return (
        f"finish: {args.finish_epochs} epochs from the selected weights of state {last_state}, masks as they are, lr "
        f"{args.finish_lr:g}, {args.sched}, on {what}; {kept}"
    )
