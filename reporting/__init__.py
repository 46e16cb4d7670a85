"""Reports and comparisons of runs, from the CSV and JSON files that they left; `report.py` is the door.

runs          what a run left, as plain values             timeline      where its states, cuts and penalty lie
flags         which of its flags matter                    words         numbers as words, Markdown
figures       what all pictures share                      plots         the pictures of one run
page          HTML, and files that appear all at once      run_report    the report of one run
groups        runs that differ in their seed               compare       several runs, and compare_plot their picture
paired        differences over seeds, their intervals
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
