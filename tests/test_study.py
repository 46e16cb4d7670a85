"""Studies: a grid of ordinary runs from a file, made in order, each once, whatever fails or stops it."""

import csv
import os
import signal
import threading
import time
from pathlib import Path

import micro
import pytest

from benchmarks import study, study_tables
from benchmarks.grid import Planned, check, checked, read_study
from utils import RunError

ROOT = Path(__file__).resolve().parent.parent

# Stands in for a program that trains: notes in OUT/order that it started, and leaves a run's files.
STAND_IN = """\
import signal, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--save_dir") + 1])
with (folder.parent / "order").open("a") as order:
    order.write(f"{folder.name} {'resumed' if '--resume' in sys.argv else 'fresh'}\\n")
start = Path(sys.argv[sys.argv.index("--init") + 1]).parents[1] if "--init" in sys.argv else None
if start and not (start / "states.csv").exists():
    sys.exit("too early")
if (folder.parent / f"break_{folder.name}").exists():
    sys.exit("it broke")
if (folder.parent / f"wait_{folder.name}").exists():
    signal.signal(signal.SIGINT, lambda *_: ((folder / "checkpoint.pt").touch(), sys.exit(130)))
    (folder / "ready").touch()
    time.sleep(60)
flags = "{arch: vit_mini, dataset: digits, epochs: 1, pruning_times: 3, seed: 0, struct: rsst}"
(folder / "args.yaml").write_text(flags)
(folder / "states.csv").write_text(
    "state,density,parameters,macs,accuracy_before_cut,accuracy_after_cut,best_accuracy,test_accuracy,seconds\\n"
    "0,1.0,100,1000,,,0.8,0.7,2.5\\n1,0.5,50,600,0.75,0.5,0.7,0.6,1.5\\n2,0.25,30,500,0.65,0.6,0.7,0.6125,1.0\\n"
)
"""
GRID = """\
base: {{dataset: digits, arch: vit_mini, epochs: 2, lr: 0.5}}
cells:
  - {{name: start, each: {{seed: [0, 1]}}, flags: {{struct: dense}}, program: '{program}'}}
  - name: cut
    stage: 1
    program: '{program}'
    each:
      method: {{soft: {{struct: rsst, pruning_times: 3}}, hard: {{struct: refill, pruning_times: 5, lr: null}}}}
      density: [0.5, 0.1]
      seed: [0, 1]
    flags: {{rate: '{{rate}}', init: '{{out}}/start_s{{seed}}/model/model.safetensors', fc: true}}
"""


@pytest.fixture
def grid(tmp_path):
    """A study whose runs are made by the stand-in, and its folder."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    file = tmp_path / "grid.yaml"
    file.write_text(GRID.format(program=tmp_path / "stand_in.py"))
    (tmp_path / "out").mkdir()
    return file, tmp_path / "out"


def rows_of(out):
    return {row["name"]: row for row in micro.rows_of(out / "study.csv")}


def order_of(out):
    return (out / "order").read_text().split("\n")[:-1]


def make(file, out, *flags):
    return study.main([str(file), "--out", str(out), "--processes", "1", *flags])


def test_every_combination_is_a_run_and_runs_come_by_stage_then_seed(grid):
    file, out = grid
    _, runs = read_study(file, out)
    names = ["start_s0", "start_s1"]
    names += [
        f"cut_{method}_{density}_s{seed}" for seed in (0, 1) for method in ("soft", "hard") for density in (0.5, 0.1)
    ]
    assert [run.name for run in runs] == names
    run = runs[5]
    assert (run.name, run.needs) == ("cut_hard_0.1_s0", ("start_s0",))
    # 4 prunings leave a tenth: 0.1 ** (1 / 4) = 0.562341
    flags = f"--dataset digits --arch vit_mini --epochs 2 --rate 0.437659 --init {out}/start_s0/model/model.safetensors"
    assert (
        run.command
        == f"python {run.program} {flags} --fc --struct refill --pruning_times 5 --seed 0 --save_dir {run.folder}"
    )
    _, runs = read_study(file, out, seeds=[7])
    assert [run.name for run in runs] == ["start_s7", *(name.replace("_s0", "_s7") for name in names[2:6])]
    assert {run.flags["seed"] for run in runs} == {7}
    assert runs[1].needs == ("start_s7",)


@pytest.mark.parametrize(("back", "states"), [(0, 2), (0, 4), (0.05, 3)])
def test_the_rate_reaches_the_density_with_what_is_given_back(tmp_path, back, states):
    (tmp_path / "grid.yaml").write_text(
        f"{{base: {{fillback_rate: {back}, pruning_times: {states}}}, cells: [{{name: a, each: {{density: [0.2]}}, "
        "flags: {rate: '{rate}', mlp_prune_ratio: '{gone}'}}]}"
    )
    (run,) = read_study(tmp_path / "grid.yaml", tmp_path)[1]
    left = (1 - float(run.flags["rate"])) ** (states - 1)
    assert left + back * (1 - left) == pytest.approx(0.2, abs=1e-5)
    assert float(run.flags["mlp_prune_ratio"]) == 0.8


@pytest.mark.parametrize(("old", "new", "words"), [
    ("/start_s{{seed}}", "/begin_s{{seed}}", "no run has that name"),
    ("{{rate}}", "{{portion}}", "no value for 'portion'"),
    ("pruning_times: 3", "pruning_times: 0", "--pruning_times 0"), ("stage: 1", "phase: 1", "phase"),
    ("struct: rsst", "struct: soft", "soft"), ("[0.5, 0.1]", "[1.5]", "density 1.5"),
    ("[0.5, 0.1]", "[0.5, 0.5]", "named twice"),
])  # fmt: skip
def test_a_grid_that_cannot_be_made_says_so_in_one_line(grid, capsys, old, new, words):
    file, out = grid
    assert old in GRID
    file.write_text(GRID.replace(old, new).format(program=file.parent / "stand_in.py"))
    with pytest.raises(SystemExit) as left:
        make(file, out, "--list")
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.count("\n") == 1
    assert words in said
    for content in ("", "a: [", "cells: []", "cells: [3]"):
        file.write_text(content)
        with pytest.raises(RunError, match=r"grid\.yaml"):
            read_study(file, out)


def test_each_run_is_made_once_and_gives_a_row(grid, capsys):
    file, out = grid
    assert make(file, out) == 0
    rows, order = rows_of(out), order_of(out)
    assert [line.split()[0] for line in order] == [run.name for run in read_study(file, out)[1]]
    row = rows["cut_hard_0.1_s1"]
    found = {
        name: row[name] for name in ("cell", "variant", "method", "asked", "seed", "density", "macs", "test", "seconds")
    }
    assert found == {
        "cell": "cut", "variant": "cut_hard_0.1", "method": "hard", "asked": "0.1", "seed": "1", "density": "0.25",
        "macs": "500", "test": "0.6125", "seconds": "5.0",
    }  # fmt: skip
    cuts = [float(row[name]) for name in ("before_cut_mean", "after_cut_mean", "before_cut_worst", "after_cut_worst")]
    assert cuts == pytest.approx([0.7, 0.55, 0.75, 0.5])
    assert row["command"].endswith(f"--save_dir {out}/cut_hard_0.1_s1")
    assert "[10/10] cut_hard_0.1_s1: test 61.25%" in capsys.readouterr().out
    assert make(file, out) == 0
    assert order_of(out) == order


def test_a_failure_is_listed_and_stops_nothing_but_what_needs_it(grid, capsys):
    file, out = grid
    (out / "break_start_s0").touch()
    assert make(file, out) == 1
    rows = rows_of(out)
    assert rows["start_s0"]["failure"] == "exit status 1: it broke"
    assert rows["cut_soft_0.5_s0"]["failure"] == "not started: needs start_s0"
    assert [name for name, row in rows.items() if not row["failure"]] == [
        "start_s1", *(f"cut_{method}_{density}_s1" for method in ("soft", "hard") for density in (0.5, 0.1))
    ]  # fmt: skip
    assert "failed: start_s0: exit status 1: it broke" in capsys.readouterr().err
    (out / "break_start_s0").unlink()
    assert make(file, out) == 0
    assert not any(row["failure"] for row in rows_of(out).values())
    assert len(order_of(out)) == 6 + 5


def test_a_signal_reaches_the_runs_and_the_same_command_goes_on(grid, capsys):
    file, out = grid
    (out / "wait_start_s1").touch()

    def interrupt():
        while not (out / "start_s1" / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert make(file, out) == 130
    assert list(rows_of(out)) == ["start_s0"]
    (out / "wait_start_s1").unlink()
    assert make(file, out) == 0
    assert order_of(out)[:3] == ["start_s0 fresh", "start_s1 fresh", "start_s1 resumed"]
    assert len(rows_of(out)) == 10


def test_what_another_command_made_is_not_passed_off(grid, capsys):
    file, out = grid
    assert make(file, out, "--only", "start") == 0
    rows = rows_of(out)
    assert make(file, out, "--only", "start", "--set", "epochs=3") == 1
    assert capsys.readouterr().err.count("was made by another command") == 2
    assert (rows_of(out), len(order_of(out))) == (rows, 2)


def test_only_brings_what_it_needs_which_comes_first(grid):
    file, out = grid
    assert make(file, out, "--only", "cut_soft_*_s1", "--processes", "3") == 0
    first, *others = rows_of(out)
    assert (first, set(others)) == ("start_s1", {"cut_soft_0.5_s1", "cut_soft_0.1_s1"})


def test_the_time_left_goes_by_cost_and_by_what_is_done(tmp_path):
    def planned(name, cell, cost):
        return Planned(name, cell, cell, 0, {}, {}, "", tmp_path, (), cost)

    table = study.Table(tmp_path / "study.csv")
    table.rows = {"a": {"seconds": "30", "failure": ""}}
    done = [planned("a", "near", 10.0)]
    todo = [planned("b", "near", 20.0), planned("c", "far", 5.0)]
    assert study.seconds_left(todo, done, table, speed=1.0) == pytest.approx(3 * 25)
    assert study.seconds_left(todo, [], table, speed=0.5) == pytest.approx(2 * 25)


COMPARED = {
    "compare_methods": {name: {"struct": name} for name in ("dense", "imp", "refill", "rsst")},
    "compare_criteria": {
        name: {"struct": "refill", "vit_prune_target": "both", "criteria": name}
        for name in ("remain", "magnitude", "l1", "l2", "saliency", "random")
    },
    "compare_variants": {"weights": {"struct": "rsst", "vit_structured": False}}
    | {name: {"struct": "rsst", "vit_structured": True, "vit_prune_target": name} for name in ("head", "mlp", "both")},
    "vit_vs_cnn": {
        f"{arch}_{method}": {"arch": arch, "struct": method, "vit_structured": arch == "vit_tiny"}
        for arch in ("vit_tiny", "res20s")
        for method in ("refill", "rsst")
    },
}


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_hold_what_their_names_say(name, tmp_path):
    file = ROOT / "benchmarks" / "studies" / f"{name}.yaml"
    settings, runs = read_study(file, tmp_path, seeds=[7], words=["--dataset", "digits", "--rate", "0.3"])
    assert {run.name for run in runs} == {f"{run}_s7" for run in COMPARED[name]}
    for run in runs:
        found = vars(check(run, settings["base"]))
        expected = {**COMPARED[name][run.name.removesuffix("_s7")], "dataset": "digits", "rate": 0.3, "seed": 7}
        assert {flag: found[flag] for flag in expected} == expected


def test_flags_behind_the_dashes_are_added_to_every_run_and_compared_at_the_end(grid, capsys):
    file, out = grid
    flags = ["--report", "--only", "start", "--", "--lr", "0.1", "--data", "a b/{seed}"]
    assert make(file, out, *flags) == 0
    rows = rows_of(out)
    assert rows["start_s1"]["command"].endswith(f"--seed 1 --lr 0.1 --data 'a b/1' --save_dir {out}/start_s1")
    assert (out / "report" / "compare.html").is_file()
    assert f"comparison: {out}/report/compare.html" in capsys.readouterr().out
    (out / "break_start_s0").touch()
    (out / "report" / "compare.html").unlink()
    (out / "start_s0" / "states.csv").unlink()
    assert make(file, out, *flags) == 1
    assert not (out / "report" / "compare.html").exists()


@pytest.mark.parametrize("scale", study.SCALES)
def test_the_flags_of_our_studies_are_those_of_the_command(scale, tmp_path):
    settings, runs = read_study(ROOT / "benchmarks" / "studies" / f"{scale}.yaml", tmp_path)
    assert all(run.cost > 0 for run in checked(runs, settings))
    notes = {note for run in {run.kind: run for run in runs}.values() for note in check(run, settings["base"]).notes}
    assert not [note for note in notes if "no effect" in note]
    assert len({run.axes["seed"] for run in runs}) == 5


def test_a_row_has_the_numbers_of_a_real_run(finished_run):
    run = Planned("run", "cell", "cell", 0, {"seed": 1}, {}, study.MAIN, finished_run, ())
    row = study.row_of(run, 7.0)
    assert study.is_complete(run)
    assert (row["target"], row["cuts"], row["heads"], row["precision"]) == ("both", 1, 2, "float32")
    assert 0 <= row["test"] <= 1


def row(method, seed, test, asked="0.5", cell="both", command="--struct refill", **others):
    cut = {"cuts": "0", "before_cut_mean": "", "after_cut_mean": "", "before_cut_worst": "", "after_cut_worst": ""}
    counts = {"density": "0.5", "parameters": "100", "macs": str(float(asked or 1) * 1e6), "seconds": "1"}
    naming = {"name": f"{method}_{asked}_{seed}", "cell": cell, "method": method, "asked": asked, "seed": str(seed)}
    return {**naming, "target": "both", "test": test, "failure": "", "command": command, **cut, **counts, **others}


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_methods_are_compared_by_seed_at_the_share_they_were_asked_for(tmp_path):
    rows = [row("refill", seed, 0.5 + seed / 10, share) for seed in range(3) for share in ("0.5", "0.2")]
    # half a point, one and one and a half above refill at 50%; no run of seed 1 at 20%
    rows += [row("rsst", seed, 0.505 + seed / 10 + seed / 200) for seed in range(3)]
    rows += [row("rsst", seed, 0.4 + seed / 10, "0.2") for seed in (0, 2)]
    rows += [row("dense", seed, 0.9, "", cell="dense") for seed in range(3)]
    rows += [row("broken", 0, "", failure="exit status 1")]
    write_rows(tmp_path / "study.csv", rows)
    entries, failed = study_tables.read_entries(tmp_path / "study.csv")
    assert failed == ["broken_0.5_0"]
    differences = study_tables.differences(entries, entries, ("both", "refill"))
    found = {(a.method, b.asked): difference for a, b, difference in differences}
    assert found.keys() == {("rsst", "0.5"), ("rsst", "0.2"), ("dense", "0.5"), ("dense", "0.2")}
    assert found["rsst", "0.5"].mean == pytest.approx(0.01)
    # t(0.975, 2) = 4.302653, sd = 0.005
    assert found["rsst", "0.5"].interval[0] == pytest.approx(0.01 - 4.302653 * 0.005 / 3**0.5)
    assert (found["rsst", "0.2"].n, found["rsst", "0.2"].mean) == (2, pytest.approx(-0.1))
    assert found["dense", "0.2"].mean == pytest.approx(0.3)


def test_a_pattern_of_weights_is_compared_with_the_method_without_it(tmp_path):
    tests = {"imp": 0.5, "imp_2-4": 0.51, "rsst": 0.6, "rsst_2-4": 0.58}
    write_rows(
        tmp_path / "study.csv", [row(name, seed, test, cell="nm") for name, test in tests.items() for seed in (0, 1)]
    )
    entries, _ = study_tables.read_entries(tmp_path / "study.csv")
    (group,) = groups = study_tables.sections(entries)
    found = {(entry.method, other.method): difference.mean for entry, other, difference in group.found}
    assert found == {("imp_2-4", "imp"): pytest.approx(0.01), ("rsst_2-4", "rsst"): pytest.approx(-0.02)}
    assert group.found[0][2].comparisons == 2
    assert study_tables.pictures(groups).keys() == {"study_nm.png"}


def test_references_of_several_cells_are_named_with_theirs(tmp_path):
    tests = {("head", "refill"): 0.4, ("mlp", "refill"): 0.5, ("mlp", "rsst"): 0.52}
    shares = ("0.5", "0.2", "0.1")
    rows = [
        row(name, seed, test, share, cell)
        for (cell, name), test in tests.items()
        for seed in (0, 1)
        for share in shares
    ]
    write_rows(tmp_path / "study.csv", rows)
    entries, failed = study_tables.read_entries(tmp_path / "study.csv")
    groups = study_tables.sections(entries)
    text = study_tables.study_text(entries, failed, groups)
    assert "| refill | 50% | 50.00 | refill of head | no interval (no spread) | 2 | +10.00 |" in text
    assert "| rsst | 50% | 52.00 | refill of mlp | no interval (no spread) | 2 | +2.00 |" in text
    # a line a method cannot say which of the references is meant
    assert [group.has_lines for group in groups] == [True, False]


def test_a_question_repeats_its_lines_with_the_corrections_of_their_tables(tmp_path):
    tests = {("both", "refill"): 0.5, ("both", "rsst"): 0.51, ("both", "random"): 0.49}
    tests |= {("factor", "l2"): 0.52, ("factor", "g_2"): 0.5, ("factor", "linear"): 0.5}
    rows = [row(name, seed, test + seed / 100, "0.2", cell) for (cell, name), test in tests.items() for seed in (0, 1)]
    write_rows(tmp_path / "study.csv", rows)
    entries, _ = study_tables.read_entries(tmp_path / "study.csv")
    groups = {group.name: group for group in study_tables.sections(entries)}
    assert list(groups) == ["both", "factor", "criterion", "when"]
    found = {(a.method, b.method): d.comparisons for a, b, d in groups["criterion"].found}
    assert found == {("random", "refill"): 2, ("l2", "rsst"): 3}
    text = study_tables.study_text([], [], [groups["criterion"]])
    assert "Minus refill of both, rsst of both, paired by seed; corrected for 2 comparisons of both, 3" in text
    assert study_tables.pictures([groups["criterion"]]).keys() == {"study_criterion.png"}


def test_tables_and_picture_say_what_was_measured(tmp_path, capsys):
    cut = {"cuts": "2", "before_cut_mean": "0.75", "after_cut_mean": "0.74"}
    cuts = [{**cut, "before_cut_worst": "0.8", "after_cut_worst": worst} for worst in ("0.79", "0.75")]
    rows = [row("refill", seed, 0.5 + seed / 100) for seed in (0, 1)]
    rows += [row("rsst", seed, 0.6, command="--struct rsst --rate 0", **cuts[seed]) for seed in (0, 1)]
    write_rows(tmp_path / "study.csv", rows)
    assert study_tables.main([str(tmp_path / "study.csv")]) == 0
    text = (tmp_path / "study.md").read_text()
    assert "| both | both | decay | 4 | 1.00 | 5.00 |" in text
    # of 50% and 51%: 50.5 -+ t(0.975, 1) = 12.7062 times 0.5
    assert "| refill | 50% | 2 | 50.50 ± 6.35 | 50.0% | 100 | 0.50 M | 1 |" in text
    assert "| rsst | 50% | 60.00 | refill | better | 2 | +9.50 | +3.15 to +15.85 |" in text
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        study_tables.main([str(tmp_path / "study.md")])
    assert capsys.readouterr().err.count("\n") == 1
