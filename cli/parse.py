"""Parsing in one call: from argv to complete, checked flags."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cli.archs import list_archs
from cli.checks import check_and_complete, check_search
from cli.config import config_flags
from cli.resume import finds_run, is_complete, resumed_args
from engine.processes import first_of_all
from engine.run_folder import EXPORT_FAILED
from settings.flag import AUTO
from settings.flags import build_parser
from utils import RunError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with defaults filled in; exits with an error for values and combinations that cannot work.

    `notes` are remarks for the log, such as flags that have no effect; a search gets the flags of the command line as
    `given`. `--list_archs` prints its table here and exits, as `--help` does, and `--resume auto` on a complete run.
    """
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        argv = config_flags(parser, argv) + argv
    except RunError as error:
        parser.error(str(error))
    args = parser.parse_args(argv)
    if args.list_archs is not None:
        try:
            if first_of_all():
                print(list_archs(args.list_archs, args.verbose))
        except RunError as error:
            parser.error(str(error))
        parser.exit()
    bare = build_parser()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    given = vars(bare.parse_args(argv))

    resumes, auto = bool(args.resume or args.checkpoint), args.resume == AUTO
    try:
        check_search(args)
        if auto:
            resumes = finds_run(args)
        if resumes:
            args, given = resumed_args(parser, args, given), {}
        args.notes = check_and_complete(args, given)
        if args.search:
            args.given = given
        if auto and not resumes:
            args.notes.append(f"--resume auto: {args.save_dir} holds no checkpoint yet; the run starts")
        nothing_to_do = auto and resumes and not args.dry_run and is_complete(args)
    except RunError as error:
        parser.error(str(error))
    if nothing_to_do:
        print(f"{args.save_dir} is complete: all its states are trained; nothing to do")
        if (failed := Path(args.save_dir) / EXPORT_FAILED).is_file():
            print(f"it has no model/: {failed.read_text().strip()}")
        parser.exit()
    return args
