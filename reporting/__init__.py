"""Reports and comparisons of runs, from the CSV and JSON files in their folders. `report.py` is the program.

runs          the files of a run, as plain values          timeline      its states, cuts and penalty over epochs
flags         which of its flags matter                    words         numbers as text, Markdown
figures       what all pictures share                      plots         the pictures of one run
page          HTML, and files written all at once          run_report    the report of one run
groups        runs that differ only in their seed          compare       several runs, and compare_plot their picture
paired        differences, their intervals, claims     compare_paired    the differences that a comparison computes
"""

from __future__ import annotations

from utils import RunError


def need(name: str):
    """Import a package that only reports use.

    Raises:
        RunError: it is missing; says what to install.
    """
    try:
        return __import__(name, fromlist=["x"])
    except ImportError as error:
        package = name.partition(".")[0]
        raise RunError(f"reports need {package} ({error}): pip install matplotlib markdown scipy") from error
