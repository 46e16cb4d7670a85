"""The flags of a resumed run: those of its checkpoint, with those of the new command that may change.

With `--resume auto` the same command starts a run and resumes it; `finds_run` decides which.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.checkpoint import has_checkpoint, load_checkpoint
from engine.model import run_length
from engine.run_folder import EXPORT_FAILED, named_dir
from settings.flag import AUTO, check_values
from settings.flags import FLAGS, complete
from utils import OneLineParser, RunError, load_tensors


def finds_run(args: argparse.Namespace) -> bool:
    """Whether the folder of `--resume auto` has a checkpoint to resume from; fills in `save_dir`.

    Raises:
        RunError: the command names no folder, or contradicts itself; or the run's checkpoints are missing.
    """
    check_values([FLAGS["exp_name"]], args)
    if not (args.save_dir or args.exp_name):
        raise RunError("--resume auto: needs --save_dir DIR or --exp_name NAME to find its run")
    if args.checkpoint:
        raise RunError(f"--checkpoint {args.checkpoint}: --resume auto takes the latest one; leave one of them out")
    args.save_dir = args.save_dir or str(named_dir(args.exp_name))
    folder = Path(args.save_dir)
    if args.overwrite:
        raise RunError(f"--overwrite: replaces {folder}, which --resume auto resumes; leave one of them out")
    try:
        if has_checkpoint(folder):
            return True
        lost = [name for name in ("states.csv", "model") if (folder / name).exists()]
    except OSError as error:
        raise RunError(f"--save_dir {folder}: cannot be read ({error.strerror}); choose another") from error
    if lost:  # a run writes both after its first checkpoint
        raise RunError(
            f"--resume auto: {folder} holds {lost[0]}, but no checkpoint any more; "
            "replace --resume auto by --overwrite to start again, or choose another --save_dir"
        )
    return False


def is_complete(args: argparse.Namespace) -> bool:
    """Whether a resumed run has trained all its states and written its last files."""
    before, rounds = args.resumed_from["args"], run_length(args)[0] + bool(args.finish_epochs)
    longer = (before.get("finish_epochs") or 0) < (args.finish_epochs or 0)
    if longer or args.resumed_from["run"]["state"] < rounds:
        return False
    folder = Path(args.save_dir)
    small = EXPORT_FAILED if (folder / EXPORT_FAILED).is_file() else "model/config.json"
    files = ["checkpoint.pt", "report.html", *([small] if args.export else [])]
    if not all((folder / name).is_file() for name in files):
        return False
    checkpoint, *last = ((folder / name).stat().st_mtime_ns for name in files)
    return min(last) >= checkpoint  # older files are from before the run was extended


def resumed_args(parser: OneLineParser, args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The flags of the checkpoint, with those of the new command that may change."""
    if not (args.save_dir or args.checkpoint or args.exp_name):
        parser.error("--resume: needs --save_dir DIR, --exp_name NAME or --checkpoint FILE")
    if not args.save_dir:
        check_values([FLAGS["exp_name"]], args)
        args.save_dir = str(Path(args.checkpoint).parent if args.checkpoint else named_dir(args.exp_name))
    if args.checkpoint:
        content = load_tensors(Path(args.checkpoint), "--checkpoint")
    else:
        content = load_checkpoint(Path(args.save_dir))
    foreign = f"--resume: {args.checkpoint or args.save_dir} holds no checkpoint of this program"
    stored, progress = content.get("args"), content.get("run")
    if not (isinstance(stored, dict) and isinstance(progress, dict) and isinstance(progress.get("state"), int)):
        raise RunError(f"{foreign} (no flags, or no state)")
    missing = {"arch", "dataset", "struct", "epochs", "pruning_times", "lr", "rate", "seed"} - stored.keys()
    wrong = [name for name, flag in FLAGS.items() if name in stored and not flag.could_be(stored[name])]
    if missing or wrong:
        raise RunError(f"{foreign} (flags missing or of a wrong type: {', '.join(sorted(missing) + wrong)})")
    stored = complete(stored)
    free = {name for name, flag in FLAGS.items() if flag.resumes}
    free |= _extensions(stored, given, content["run"]["state"])
    other = [f"--{name} {value}" for name, value in given.items() if name not in free and stored.get(name) != value]
    if other:
        way_out = "give those of its args.yaml, or another --save_dir" if args.resume == AUTO else "leave them out"
        if given.get("epochs", 0) > stored["epochs"]:
            way_out += "; --finish_epochs N trains the selected model for longer"
        parser.error(f"--resume: the run was started with other flags than {' '.join(other)}; {way_out}")
    resumed = argparse.Namespace(**{**vars(args), **stored, **{name: given[name] for name in free if name in given}})
    resumed.save_dir, resumed.resume, resumed.resumed_from = args.save_dir, True, content
    return resumed


def _extensions(stored: dict, given: dict, state: int) -> set[str]:
    """Those of the given flags that extend a run which has reached `state`.

    Raises:
        RunError: the longer run would have trained the finished states differently.
    """
    longer, states = set(), stored["pruning_times"]
    if given.get("pruning_times", 0) > states:
        reason = ""
        if stored["struct"] == "dense":
            reason = "a dense run spreads one schedule over all its epochs; --finish_epochs N trains it for longer"
        elif not FLAGS["ratio_schedule"].idle(stored) and stored["ratio_schedule"] != "constant":
            reason = (
                f"--ratio_schedule {stored['ratio_schedule']} has spread this run's pruning over {states} states; "
                "start a new run"
            )
        elif stored["finish_epochs"] and state >= states:
            reason = "this run is in its finish, after which no state can follow; leave it out"
        if reason:
            raise RunError(f"--pruning_times {given['pruning_times']}: {reason}")
        longer.add("pruning_times")
    if given.get("finish_epochs", 0) > (stored["finish_epochs"] or 0):
        longer.add("finish_epochs")
        if not stored["finish_epochs"]:  # no finish has started yet
            longer |= {"finish_lr", "finish_on_all"}
    return longer
