"""What several GPUs are expected to reach, by hand and as benchmarks/README.md has it; and the measurement runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common, scaling

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("gpus", "link", "exchange", "without", "overlapped"),
    [
        (1, 1.0, 0.0, 1.0, 1.0),
        (2, 10.0, 1.0, 3 / 4, 3 / 3.1),  # hidden in the 2 s of the backward pass, but for one bucket of ten
        (2, 2.0, 5.0, 3 / 8, 3 / 6),  # 3 s longer than the backward pass
        (4, 10.0, 1.5, 3 / 4.5, 3 / 3.15),
    ],
)
def test_expected_efficiency_by_hand(gpus, link, exchange, without, overlapped):
    """3 s of computing: 2 images of 1 multiply-add at 4 operations a second; gradients of ten buckets."""
    parameters = 10 * scaling.BUCKET // 4
    found = scaling.expected(parameters, 1, 2, gpus, 4.0, link * scaling.BUCKET)
    assert found == pytest.approx((3.0, exchange, without, overlapped), abs=1e-12)


def test_small_gradients_are_one_bucket():
    """What goes in one message is sent when the backward pass has ended: overlap gains nothing."""
    found = scaling.expected(scaling.BUCKET // 8, 1, 2, 2, 4.0, scaling.BUCKET)
    assert found.with_overlap == found.without_overlap == pytest.approx(3 / 3.5)


def cells(text):
    """The rows of figures in a table of the program or of a page."""
    rows = [re.split(r"\s*\|\s*|\s{2,}", line.strip(" |")) for line in text.splitlines()]
    return [row for row in rows if re.fullmatch(r"\d+", row[0]) and row[-1].endswith("%")]


def test_the_page_shows_what_the_program_computes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--expected"])
    monkeypatch.setattr(common, "save", lambda *_: None)
    scaling.main()
    out = capsys.readouterr().out
    for fact in ("a computation, not a measurement", "304,326,632 parameters", "61.5547 G MACs"):
        assert fact in out.lower() or fact in out
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = page.split("## Several GPUs: what to expect")[1].split("\n## ")[0]
    assert cells(section) == cells(out)
    assert len(cells(out)) == 15


@pytest.mark.slow
def test_groups_of_processes_are_measured_in_turns():
    flags = shlex.split("--processes 2 --batch_size 4 --steps 1 --repeats 1")
    command = [sys.executable, "benchmarks/scaling.py", *flags]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [row[:3] for row in cells(out)] == [["1", "4", "4"], ["2", "4", "2"], ["2", "8", "4"]]
