"""The command with `--search`: runs a study and writes its front."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from cli.errors import leave
from cli.plan import plan
from engine.model import make_model, units_of_run
from engine.processes import ALONE
from engine.run_folder import named_dir
from search import front
from search.space import Space, in_words
from search.trials import Study, need_optuna
from settings.flags import FLAGS
from utils import RunError, Stopped, format_table

log = logging.getLogger(__name__)

# flags of the search itself, not of its trials
OWN = {"save_dir", "exp_name", "resume", "checkpoint", "config", "dry_run", "overwrite", "list_archs"}


def search(args: argparse.Namespace) -> int:
    """Run trials until the study, which several processes may share, has `args.search`; then write its front.

    Raises:
        RunError: the search cannot work.
    """
    need_optuna()
    with torch.device("meta"):
        model = make_model(args, weights=False)
    has_units = bool(units_of_run(args, model)[0])
    args.search_objective = args.search_objective or ("macs" if has_units else "params")
    if args.search_objective != "params" and not has_units:
        raise RunError(
            f"--search_objective {args.search_objective}: single weights leave it as it is; use params, or add "
            "--vit_structured"
        )
    space, folder = Space(args, has_units), Path(args.save_dir or named_dir(args.exp_name))
    if args.dry_run:
        print(_planned(args, space, folder))
        return 0
    given = {name: value for name, value in args.given.items() if name not in OWN and not name.startswith("search")}
    own = {name: value for name, value in given.items() if FLAGS[name].resumes}
    study = Study(args, folder, {name: value for name, value in given.items() if name not in own}, own, space)
    log.info(f"search in {folder}: {args.search} trials\n{_space_table(space)}")
    try:
        with study.signals:
            while (found := study.next()) is not None:
                trial, lock = found
                try:
                    study.work_on(trial)
                finally:
                    lock.release()
                study.signals.check()
            with study.locked():
                log.info(front.write(study))
    except Stopped as stop:
        return leave(ALONE, f"stopped by {stop}; the same command goes on with the search", stop.code)
    except KeyboardInterrupt:
        return leave(ALONE, "interrupted; the same command goes on with the search from the last checkpoint", 130)
    return 0


def _space_table(space: Space) -> str:
    rows = [{"searched": name, "in": in_words(values)} for name, values in space.values.items()]
    return format_table(rows, {"searched": "searched", "in": "in"})


def _planned(args: argparse.Namespace, space: Space, folder: Path) -> str:
    """What `--dry_run` prints."""
    largest = plan(argparse.Namespace(**{**vars(args), **space.largest()}))
    return (
        f"search in {folder}: {args.search} trials drawn by multi-objective TPE with seed {args.seed}, for validation "
        f"accuracy and {args.search_objective}\n\n{_space_table(space)}\n\n{args.search} times a trial, here one that "
        f"keeps as much as any:\n\n{largest}"
    )
