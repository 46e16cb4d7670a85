"""The flags of a run that goes on: its checkpoint's, with those of today's command that are free to change.

With `--resume auto` a command says both how its run starts and that it goes on; here is found which of them it does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.checks import check_run_name
from cli.flags import AUTO, square
from engine.allocation import allocates
from engine.checkpoint import has_checkpoint, load_checkpoint
from engine.folder import named_dir
from engine.model import run_length
from utils import OneLineParser, RunError, load_tensors

FREE_ON_RESUME = {
    "workers", "device", "gpu", "print_freq", "verbose", "save_dir", "resume", "checkpoint", "data", "config",
    "checkpoint_every", "wandb_mode", "wandb_project", "wandb_entity", "dry_run", "overwrite", "list_archs",
}  # fmt: skip


def finds_run(args: argparse.Namespace) -> bool:
    """Whether the folder of `--resume auto` has a checkpoint to go on from; fills in `save_dir`.

    Raises:
        RunError: the command names no folder, or not clearly; or its run had checkpoints and has lost them.
    """
    check_run_name(args)
    if not (args.save_dir or args.exp_name):
        raise RunError("--resume auto: needs --save_dir DIR or --exp_name NAME, or it would not find its run again")
    if args.checkpoint:
        raise RunError(f"--checkpoint {args.checkpoint}: --resume auto takes the latest one; leave one of them out")
    args.save_dir = args.save_dir or str(named_dir(args.exp_name))
    folder = Path(args.save_dir)
    if args.overwrite:
        raise RunError(f"--overwrite: replaces {folder}, which --resume auto goes on with; leave one of them out")
    try:
        if has_checkpoint(folder):
            return True
        lost = [name for name in ("states.csv", "model") if (folder / name).exists()]
    except OSError as error:
        raise RunError(f"--save_dir {folder}: cannot be read ({error.strerror}); choose another") from error
    if lost:  # both are written when checkpoints are there already
        raise RunError(
            f"--resume auto: {folder} holds {lost[0]}, but no checkpoint any more; "
            "start anew with --overwrite in its place, or choose another --save_dir"
        )
    return False


def is_complete(args: argparse.Namespace) -> bool:
    """Whether a run that would go on has trained all its states and written what a run writes in the end."""
    if args.resumed_from["run"]["state"] < run_length(args)[0]:
        return False
    folder = Path(args.save_dir)
    files = ["checkpoint.pt", "report.html", *(["model/config.json"] if args.export else [])]
    if not all((folder / name).is_file() for name in files):
        return False
    checkpoint, *last = ((folder / name).stat().st_mtime_ns for name in files)
    return min(last) >= checkpoint  # older ones are of the time before the run got more states


def resumed_args(parser: OneLineParser, args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The flags of the run that goes on, with those of today's that are free to change."""
    if not (args.save_dir or args.checkpoint):
        parser.error("--resume: needs --save_dir DIR or --checkpoint FILE")
    args.save_dir = args.save_dir or str(Path(args.checkpoint).parent)
    if args.checkpoint:
        content = load_tensors(Path(args.checkpoint), "--checkpoint")
    else:
        content = load_checkpoint(Path(args.save_dir))
    foreign = f"--resume: {args.checkpoint or args.save_dir} holds no checkpoint of this program"
    stored, progress = content.get("args"), content.get("run")
    if not (isinstance(stored, dict) and isinstance(progress, dict) and isinstance(progress.get("state"), int)):
        raise RunError(f"{foreign} (no flags, or no state)")
    missing = {"arch", "dataset", "struct", "epochs", "pruning_times", "lr", "rate", "seed"} - stored.keys()
    wrong = [action.dest for action in parser._actions if action.dest in stored and not _could_be(action, stored)]
    if missing or wrong:
        raise RunError(f"{foreign} (flags missing or of a wrong type: {', '.join(sorted(missing) + wrong)})")
    stored = {**{name: parser.get_default(name) for name in vars(args)}, **stored}
    longer = given.get("pruning_times", 0) > stored["pruning_times"]
    by_schedule = (
        stored["vit_structured"] or stored["nm"] or allocates(argparse.Namespace(**{"unit_counts": None, **stored}))
    )
    grows = by_schedule and stored["ratio_schedule"] != "constant"
    if longer and stored["finish_epochs"] and content["run"]["state"] >= stored["pruning_times"]:
        more = given["pruning_times"]
        parser.error(f"--pruning_times {more}: this run is in its finish, which no state can follow; leave it out")
    free = FREE_ON_RESUME | ({"pruning_times"} if longer and not grows and stored["struct"] != "dense" else set())
    other = [f"--{name} {value}" for name, value in given.items() if name not in free and stored.get(name) != value]
    if other:
        way_out = "give those of its args.yaml, or another --save_dir" if args.resume == AUTO else "leave them out"
        parser.error(f"--resume: the run was started with other flags than {' '.join(other)}; {way_out}")
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
    kinds = {int: int, square: int, float: (int, float)}.get(action.type, str)
    return isinstance(value, kinds) and (not action.choices or value in action.choices)
