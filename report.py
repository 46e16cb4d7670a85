#!/usr/bin/env python
"""Reports of runs, from their CSV and JSON files: plots, a report of one run, a comparison of several.

    python report.py results/NAME                          writes report.md, report.html and plots/ into the run
    python report.py results/A results/B [--out DIR]       compares them: compare.csv, .png, .md and .html,
                                                           and compare_paired.csv where groups share seeds

No weights are loaded. Runs that differ only in their seed are one group: its mean and sample standard deviation are
shown, and methods are compared where they reach the same density: by means and, where they share seeds, by differences
with intervals. Each HTML file contains its pictures.
"""

from __future__ import annotations

import os

# PyTorch's CPU threads spin for one another: where other work runs, a step took 5.2 s instead of 0.8 s
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
from pathlib import Path

import utils
from reporting.compare import PAIRED, compare
from reporting.flags import command, flags_without_effect
from reporting.groups import Point, equal_density, group_runs
from reporting.results import state_columns
from reporting.run_report import write, write_report
from reporting.runs import RunFiles, load_run
from reporting.timeline import cut_epochs
from utils import RunError

__all__ = [
    "Point", "RunFiles", "build_parser", "command", "compare", "cut_epochs", "equal_density", "flags_without_effect",
    "group_runs", "load_run", "main", "write",
]  # fmt: skip


def build_parser() -> utils.OneLineParser:
    parser = utils.OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run; several are compared")
    parser.add_argument("--out", help="folder of the comparison; `compare` next to the runs when not given")
    return parser


def main(argv: list[str] | None = None) -> int:
    utils.keep_output_harmless()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.out is not None and len(args.run_dirs) == 1:
        parser.error(f"--out {args.out}: belongs to a comparison; the report of one run is written to its folder")
    try:
        if len(args.run_dirs) > 1:
            out = compare(args.run_dirs, args.out)
            differences = f", {PAIRED}" if (out / PAIRED).exists() else ""
            print(f"comparison in {out}: compare.md, compare.html, compare.png, compare.csv{differences}")
            return 0
        run = load_run(Path(args.run_dirs[0]))
        write_report(run)
        if run.states:
            print(utils.format_table(run.states, state_columns(run)))
        print(f"report in {run.folder / 'report.md'} and {run.folder / 'report.html'}")
    except RunError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
