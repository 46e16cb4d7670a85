"""The flags of a run that goes on: its checkpoint's, with those of today's command that are free to change."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.checkpoint import load_checkpoint
from utils import OneLineParser, load_tensors

FREE_ON_RESUME = {
    "workers", "device", "gpu", "print_freq", "verbose", "save_dir", "resume", "checkpoint", "data", "config",
    "checkpoint_every", "wandb_mode", "wandb_project", "wandb_entity", "dry_run", "overwrite", "list_archs",
}  # fmt: skip


def resumed_args(parser: OneLineParser, args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The flags of the run that goes on, with those of today's that are free to change."""
    if not (args.save_dir or args.checkpoint):
        parser.error("--resume: needs --save_dir DIR or --checkpoint FILE")
    args.save_dir = args.save_dir or str(Path(args.checkpoint).parent)
    if args.checkpoint:
        content = load_tensors(Path(args.checkpoint), "--checkpoint")
    else:
        content = load_checkpoint(Path(args.save_dir))
    stored = content.get("args")
    if not (isinstance(stored, dict) and isinstance(content.get("run"), dict)):
        raise TypeError("no flags, or no state")
    missing = {"arch", "dataset", "struct", "epochs", "pruning_times", "lr", "rate", "seed"} - stored.keys()
    wrong = [action.dest for action in parser._actions if action.dest in stored and not _could_be(action, stored)]
    if missing or wrong:
        raise TypeError(f"flags missing or of a wrong type: {', '.join(sorted(missing) + wrong)}")
    stored = {**{name: parser.get_default(name) for name in vars(args)}, **stored}
    longer = given.get("pruning_times", 0) > stored["pruning_times"]
    grows = stored["vit_structured"] and stored["ratio_schedule"] != "constant"
    if longer and stored["finish_epochs"] and content["run"]["state"] >= stored["pruning_times"]:
        more = given["pruning_times"]
        parser.error(f"--pruning_times {more}: this run is in its finish, which no state can follow; leave it out")
    free = FREE_ON_RESUME | ({"pruning_times"} if longer and not grows and stored["struct"] != "dense" else set())
    other = [f"--{name} {value}" for name, value in given.items() if name not in free and stored.get(name) != value]
    if other:
        parser.error(f"--resume: the run was started with other flags than {' '.join(other)}; leave them out")
    resumed = argparse.Namespace(**{**vars(args), **stored, **{name: given[name] for name in free if name in given}})
    resumed.save_dir, resumed.resume, resumed.resumed_from = args.save_dir, True, content
    return resumed


def _could_be(action: argparse.Action, stored: dict) -> bool:
    """Whether the value of a stored flag is of a kind that the parser gives it."""
    value = stored[action.dest]
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return action.nargs == "?"
    kinds = {int: int, float: (int, float)}.get(action.type, str)
    return isinstance(value, kinds) and (not action.choices or value in action.choices)
