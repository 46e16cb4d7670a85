"""Laws of `--search`: what is drawn, which trials are stopped, what a study survives, and what is on its front.

Most trials are runs of a stand-in for the command, which leaves in milliseconds what a run leaves.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from micro import BOTH, MICRO, assert_one_line, call, rows_of

import main_imp_fillback as entry
from search import trials
from search.space import Space
from search.trials import is_weak

optuna = pytest.importorskip("optuna")
ROOT = Path(__file__).resolve().parent.parent
words = str.split

# Accuracy and cost of a trial follow from its rate alone. SLOW: seconds an epoch; HANGS: in this one.
STAND_IN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path

flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:] if "=" in flag)
folder = Path(sys.argv[sys.argv.index("--save_dir") + 1])
assert sys.argv[-2:] == ["--resume", "auto"]
lock = open(folder / "run.lock", "a+")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open(folder / "calls", "a") as file:
    file.write(f"{os.getpid()}\\n")
rate, states, epochs = float(flags["rate"]), int(flags["pruning_times"]), int(flags["epochs"])
if rate > float(os.environ.get("FAILS_ABOVE", 1)):
    sys.exit(f"first line\\nerror: --rate {rate}: too much")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
args = {"arch": "vit_micro", "dataset": "digits", "epochs": epochs, "pruning_times": states, "seed": 42}
(folder / "args.yaml").write_text(json.dumps({**args, "struct": "rsst"}))
metrics = folder / "metrics.jsonl"
lines = metrics.read_text() if metrics.exists() else ""
accuracy = 0.9 - rate**2 * float(os.environ.get("SIGN", 1))
for number in range(len(lines.splitlines()), states * epochs):
    time.sleep(float(os.environ.get("SLOW", 0)) if number < int(os.environ.get("HANGS", 99)) else 600)
    if stop:
        sys.exit(143)
    row = {"state": number // epochs, "epoch": number % epochs, "val_accuracy": accuracy}
    lines += json.dumps(row) + "\\n"
    (folder / "new").write_text(lines)
    os.replace(folder / "new", metrics)
row = {"state": states - 1, "best_accuracy": accuracy, "test_accuracy": 0.5 + rate / 10}
row |= {"macs": 1000 - 100 * int(10 * rate), "parameters": 5000}
(folder / "states.csv").write_text(",".join(row) + "\\n" + ",".join(map(str, row.values())) + "\\n")
"""
SEARCH = [*MICRO, *BOTH]


@pytest.fixture
def stand_in(house, tmp_path, monkeypatch):
    """Trials run the stand-in; pictures have a test of their own."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(trials, "COMMAND", script)
    monkeypatch.setattr(trials, "POLL", 0.02)
    monkeypatch.setattr("search.front.draw", lambda *_: b"")
    return script


def study_of(folder):
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}")


def states_of(folder):
    return [trial.state.name for trial in study_of(folder).trials]


def space_of(*flags, units=True):
    args = entry.parse_args([*MICRO, "--search", "3", "--save_dir", "unused", *flags])
    return Space(args, units)


def drawn(space, times=30):
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=1))
    return [space.draw(study.ask()) for _ in range(times)]


# ------------------------------------------------------------------------------------------------------ what is drawn
PENALTY = {"reg_granularity_prune", "RST_schedule", "reg_finish"}
ALL = {"struct", "rate", "mlp_prune_ratio", "criteria", "ratio_allocation", "prune_type"} | PENALTY


@pytest.mark.usefixtures("house")
def test_flags_given_by_hand_are_fixed_and_those_without_effect_are_not_drawn():
    base = [flag for flag in MICRO if flag not in ("--rate", "0.3")]

    def names(*flags, units=True):
        args = entry.parse_args([*base, "--search", "3", "--save_dir", "unused", *flags])
        return set(Space(args, units).values)

    assert names(*BOTH) == ALL
    assert names("--vit_structured") == ALL - {"mlp_prune_ratio"}
    assert names(*BOTH, *words("--rate 0.5 --criteria l2 --RST_schedule x")) == ALL - {
        "rate", "criteria", "RST_schedule",
    }  # fmt: skip
    assert names(*BOTH, "--sorting_mode", "global") == ALL - {"ratio_allocation"}
    assert names(*BOTH, "--target_macs", "0.5") == ALL - {"rate", "mlp_prune_ratio"}
    assert names("--nm", "2:4", units=False) == {"struct", "prune_type"} | PENALTY
    assert names(*BOTH, "--struct", "refill") == ALL - {"struct"} - PENALTY
    assert names(units=False) == {"struct", "rate", "prune_type"} | PENALTY
    assert names("--fillback_rate", "0.1", units=False) == {"struct", "rate", "prune_type", "criteria"} | PENALTY
    for flags in drawn(space_of(*BOTH)):
        assert ("reg_finish" in flags) == (flags["struct"] == "rsst")
        assert 0.1 <= flags["mlp_prune_ratio"] <= 0.9
        assert "rate" not in flags  # of MICRO


@pytest.mark.usefixtures("house")
def test_single_weights_end_between_5_and_90_percent():
    args = entry.parse_args(words("--search 3 --save_dir unused --arch vit_micro --dataset digits --pruning_times 11"))
    rate = Space(args, False).values["rate"]
    assert (1 - rate["low"]) ** 10 == pytest.approx(0.9, rel=0.01)
    assert (1 - rate["high"]) ** 10 == pytest.approx(0.05, rel=0.01)


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize("values", ["{low: 0.6, high: 0.95}", "[0.95, null, 0.6]"])
def test_the_largest_trial_has_the_largest_target(values, tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(f"target_macs: {values}\n")
    assert space_of(*BOTH, "--search_space", str(file)).largest() == {"target_macs": 0.95}


@pytest.mark.usefixtures("house")
def test_a_file_says_what_is_searched(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("lr: {low: 0.001, high: 0.1, log: true}\nfc: [true, false]\nmin_units: {low: 1, high: 3}\n")
    base = [flag for flag in MICRO if flag not in ("--lr", "0.05")]
    args = entry.parse_args([*base, *BOTH, "--search", "3", "--save_dir", "unused", "--search_space", str(file)])
    found = drawn(Space(args, True))
    assert all(set(flags) == {"lr", "fc", "min_units"} for flags in found)
    assert {flags["fc"] for flags in found} == {True, False}
    assert {flags["min_units"] for flags in found} == {1, 2, 3}
    assert all(0.001 <= flags["lr"] <= 0.1 for flags in found)
    assert sum(flags["lr"] < 0.01 for flags in found) > 8  # half of a logarithmic range


WRONG = {
    "rate: 0.3": "rate: 0.3 is neither", "rate: {low: 0.6, high: 0.3}": "low below high",
    "rate: {low: 0, high: 0.3, log: true}": "above 0", "rats: [0.1]": "rats: no flag",
    "dataset: [digits, cifar10]": "dataset: no flag that trials can differ in", "[rate]": "must hold flags",
    "criteria: []": "criteria: [] is neither", "epochs: [one]": "invalid int value: 'one'",
    "rate: [": "not a YAML file",
}  # fmt: skip


REFUSED = {
    "--search 0": "--search 0", "--search 2 --resume": "--resume", "--search 2 --checkpoint x.pt": "--checkpoint",
    "--search 2 --overwrite": "--overwrite", "--search 2 --finish_epochs 1 --finish_on_all": "--finish_on_all",
    "--search_objective macs": "belongs to --search", "--search_patience 3": "belongs to --search",
    "--search 2 --search_patience -1": "--search_patience -1",
    "--search 2 --search_objective latency": "leave --no-export out",
    "--search 2 --struct dense": "no flag with an effect",
}  # fmt: skip


@pytest.mark.usefixtures("house")
def test_what_a_search_cannot_do_is_one_line(tmp_path, capsys):
    cases = {(*words(flags),): said for flags, said in REFUSED.items()}
    for number, (text, said) in enumerate(WRONG.items()):
        (tmp_path / f"{number}.yaml").write_text(text)
        cases["--search", "2", "--search_space", str(tmp_path / f"{number}.yaml")] = said
    for flags, said in cases.items():
        code = call([*SEARCH, "--save_dir", tmp_path / "s", *flags])
        assert_one_line((code, *capsys.readouterr()), said)
        assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("house")
def test_what_else_a_search_needs(tmp_path, monkeypatch, capsys):
    def refused(*flags):
        code = call([*MICRO, "--search", 2, *flags])
        return (code, *capsys.readouterr())

    assert_one_line(refused(), "needs --save_dir DIR or --exp_name NAME")
    folder = ("--save_dir", tmp_path / "s")
    assert_one_line(refused(*folder, "--search_objective", "macs"), "single weights leave it as it is; use params")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "args.yaml").write_text("")
    assert_one_line(refused(*folder), "holds a run")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "study.db").write_text("no database, but long enough to be looked at as one" * 20)
    assert_one_line(refused("--save_dir", tmp_path / "t"), "study.db: Optuna cannot open it (", "not a database")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert_one_line(refused(*folder), "pip install optuna")


@pytest.mark.usefixtures("house")
def test_the_plan_shows_space_and_cost_and_writes_nothing(tmp_path, capsys):
    assert call([*SEARCH, "--search", 7, "--save_dir", tmp_path / "s", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "7 trials drawn by multi-objective TPE with seed 42, for validation accuracy and macs" in out
    assert "0.2 to 2, logarithmic" in out
    assert "rsst | refill" in out
    assert "7 times a trial" in out
    assert "86" in out.split("7 times")[1]  # 90% of 96 neurons, the least that is drawn to go
    assert call([*SEARCH, "--search", 7, "--save_dir", tmp_path / "s", "--dry_run", "--target_macs", 0.7]) == 0
    assert "rate " not in capsys.readouterr().out
    assert not (tmp_path / "s").exists()


# ------------------------------------------------------------------------------------------------ the rule of medians
def history(*accuracies, epochs=4):
    return [
        {"state": number // epochs, "epoch": number % epochs, "val_accuracy": accuracy}
        for number, accuracy in enumerate(accuracies)
    ]


def test_the_median_rule_by_hand():
    lengths = {0: 4, 1: 4, 2: 2}
    peers = [history(0.1, 0.2, 0.5, 0.6), history(0.1, 0.2, 0.7, 0.8), history(0.1, 0.2, 0.9, 0.9)]

    def judged(*accuracies, least=3):
        return is_weak(history(*accuracies), peers, least, lengths)

    assert not judged()
    assert not judged(0.0)  # the first half of a state
    assert not judged(0.0, 0.0)
    assert judged(0.0, 0.0, 0.69)
    assert not judged(0.0, 0.0, 0.7)  # as good as the median
    assert judged(0.0, 0.0, 0.9, 0.79)
    assert not judged(0.0, 0.0, 0.1, least=4)  # too few
    assert not judged(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.0)  # where no other has been
    finish = [{"state": 2, "epoch": 1, "val_accuracy": 0.3}]
    assert is_weak(finish, [[{**finish[0], "val_accuracy": 0.4}]], 1, lengths)
    assert not is_weak([{"state": 2, "epoch": 1}], [finish], 1, lengths)


# ------------------------------------------------------------------------------------------------------------ a study
def test_a_study_ends_with_runs_a_front_and_files_that_run_them_again(stand_in, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "study"
    command = [*words("--dataset digits --arch vit_micro --epochs 2 --pruning_times 2 --seed 5"), *BOTH]
    command += ["--no-export", "--data", "some where", "--save_dir", folder]
    assert call([*command, "--search", 4]) == 0
    out = capsys.readouterr().out
    assert "trial 3 (4 of 4 begun): " in out
    rows, front = rows_of(folder / "trials.csv"), rows_of(folder / "pareto.csv")
    assert [row["state"] for row in rows] == ["complete"] * 4
    points = [(float(row["val_accuracy"]), float(row["cost"])) for row in rows]
    beaten = [any(a >= b and c <= d and (a, c) != (b, d) for a, c in points) for b, d in points]
    expected = {row["trial"] for row, lost in zip(rows, beaten, strict=True) if not lost}
    assert {row["trial"] for row in front} == expected
    assert len(front) > 1
    costs = [float(row["cost"]) for row in front]
    assert costs == sorted(costs)
    for row in rows:
        assert float(row["val_accuracy"]) == pytest.approx(0.9 - float(row["rate"]) ** 2)
        assert float(row["test_accuracy"]) == pytest.approx(0.5 + float(row["rate"]) / 10)
        assert (folder / f"trial_{int(row['trial']):04}" / "calls").read_text().count("\n") == 1
    assert sorted(path.name for path in (folder / "pareto").iterdir()) == [f"{row['point']}.yaml" for row in front]
    for row in front:
        args = entry.parse_args(["--config", str(folder / "pareto" / f"{row['point']}.yaml")])
        assert (args.dataset, args.data, args.seed, args.export) == ("digits", "some where", 5, False)
        assert (args.search, args.save_dir, args.vit_prune_target) == (None, None, "both")
        for name, value in row.items():
            if name in ALL and value:
                assert str(getattr(args, name)) == value
    report = (folder / "report.md").read_text()
    assert "Test accuracy chose nothing" in report
    assert f"| {front[0]['point']} | {front[0]['trial']} |" in report

    # the same command goes on to more trials, and draws what it would have drawn at once
    assert call([*command, "--search", 5]) == 0
    again = [*command[:-1], tmp_path / "other", "--search", 5]
    assert call(again) == 0
    assert [row["rate"] for row in rows_of(folder / "trials.csv")] == [
        row["rate"] for row in rows_of(tmp_path / "other" / "trials.csv")
    ]
    capsys.readouterr()
    code = call([*command, "--search", 5, "--lr", 0.3])
    assert_one_line((code, *capsys.readouterr()), "was searched with another --lr")


def test_a_study_goes_on_with_its_own_data_only(stand_in, tmp_path, capsys):
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1"):
        path = tmp_path / "data" / "train" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = tmp_path / "study"
    command = [*words("--dataset folder --img_size 16 --arch vit_micro --epochs 2 --pruning_times 2"), *BOTH]
    command += ["--no-export", "--save_dir", folder]
    assert call([*command, "--search", 1, "--data", tmp_path / "data"]) == 0
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    assert call([*command, "--search", 2, "--data", moved]) == 0
    capsys.readouterr()
    (moved / "train" / "a" / "3.jpg").touch()
    code = call([*command, "--search", 3, "--data", moved])
    assert_one_line((code, *capsys.readouterr()), "was searched on other data: there were 4 images in train and now 5")
    assert states_of(folder) == ["COMPLETE"] * 2


def test_test_accuracy_chooses_nothing(stand_in, tmp_path):
    """The stand-in's test accuracy rises with the rate, as its cost falls: by it the cheapest trial would win alone."""
    folder = tmp_path / "study"
    assert call([*SEARCH, "--search", 2, "--save_dir", folder]) == 0
    for trial in study_of(folder).trials:
        assert trial.values[0] == pytest.approx(0.9 - 0.3**2)
        assert "test" not in json.dumps(trial.user_attrs)


def test_weak_trials_are_stopped_and_remain_runs_that_can_go_on(stand_in, tmp_path, capsys, monkeypatch):
    """Here accuracy rises with the rate: whatever costs more than two others is weak."""
    monkeypatch.setenv("SIGN", "-1")
    monkeypatch.setenv("SLOW", "0.05")
    folder, command = tmp_path / "study", words("--dataset digits --arch vit_micro --epochs 4 --pruning_times 2")
    space = tmp_path / "space.yaml"
    space.write_text("rate: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]\n")
    command += [*BOTH, "--search_space", space, "--search_patience", 2, "--save_dir", folder]
    assert call([*command, "--search", 9]) == 0
    rows = rows_of(folder / "trials.csv")
    stopped = [row for row in rows if row["state"] == "stopped"]
    complete = {int(row["trial"]): float(row["rate"]) for row in rows if row["state"] == "complete"}
    assert stopped
    assert len(stopped) + len(complete) == 9
    for row in stopped:
        cheaper = [
            rate for number, rate in complete.items() if number < int(row["trial"]) and rate >= float(row["rate"])
        ]
        assert len(cheaper) >= 2
        kept = (folder / f"trial_{int(row['trial']):04}" / "metrics.jsonl").read_text().count("\n")
        assert 3 <= kept < 8  # not in the first half of the first state
    assert not {row["trial"] for row in stopped} & {row["trial"] for row in rows_of(folder / "pareto.csv")}
    assert "stopped, below the median" in capsys.readouterr().out


def test_failures_are_told_and_end_a_search_in_which_nothing_works(stand_in, tmp_path, capsys, monkeypatch):
    command = [*words("--dataset digits --arch vit_micro --epochs 1 --pruning_times 2 --search 3"), *BOTH]
    monkeypatch.setenv("FAILS_ABOVE", "0.65")
    assert call([*command, "--save_dir", tmp_path / "some"]) == 0
    states = [row["state"] for row in rows_of(tmp_path / "some" / "trials.csv")]
    assert "failed" in states
    assert "complete" in states
    assert "failed: error: --rate" in capsys.readouterr().out
    monkeypatch.setenv("FAILS_ABOVE", "0")
    code = call([*command, "--save_dir", tmp_path / "none"])
    assert_one_line((code, *capsys.readouterr()), "the first 3 trials failed", "too much", code=1)


# --------------------------------------------------------------------------------------- killed, stopped, and together
SERVE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import micro, models, main_imp_fillback as entry
from search import front, trials
from pathlib import Path
models.BUILDERS["vit_micro"] = micro.vit_micro
trials.COMMAND, trials.POLL = Path({script!r}), 0.02
front.draw = lambda *_: b""
sys.exit(entry.main(sys.argv[1:]))
"""


@pytest.fixture
def start(stand_in, tmp_path):
    """start("--search", 2, SLOW=1) -> a process that searches in tmp_path/study; killed in the end."""
    started = []
    code = SERVE.format(root=str(ROOT), tests=str(ROOT / "tests"), script=str(stand_in))

    def process(*flags, **environment):
        command = [*words("--dataset digits --arch vit_micro --epochs 4 --pruning_times 2"), *BOTH]
        command += ["--save_dir", tmp_path / "study", *flags]
        environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *map(str, command)], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield process
    for one in started:
        one.kill()
        one.wait()
        one.stderr.close()


def wait_for(fine, seconds=120):
    deadline = time.monotonic() + seconds
    while not fine():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_ctrl_c_stops_the_trial_with_its_checkpoint_and_the_same_command_goes_on(start, tmp_path):
    first = tmp_path / "study" / "trial_0000"
    search = start("--search", 2, SLOW=0.2)
    wait_for(lambda: lines(first / "metrics.jsonl") >= 2)
    search.send_signal(signal.SIGINT)
    assert search.wait(60) == 130
    assert "the same command goes on with the search" in search.stderr.read()
    assert states_of(tmp_path / "study") == ["RUNNING"]
    assert start("--search", 2).wait(120) == 0
    assert states_of(tmp_path / "study") == ["COMPLETE"] * 2
    assert lines(first / "metrics.jsonl") == 8
    assert lines(first / "calls") == 2


@pytest.mark.slow
def test_after_sigkill_a_run_that_lives_on_is_left_alone_and_one_that_died_goes_on(start, tmp_path):
    first = tmp_path / "study" / "trial_0000"
    search = start("--search", 2, HANGS=1)
    wait_for(lambda: lines(first / "metrics.jsonl") == 1)
    search.kill()
    search.wait()
    assert start("--search", 2).wait(120) == 0  # beside the run that lives on
    orphan = int((first / "calls").read_text())
    assert sorted(states_of(tmp_path / "study")) == ["COMPLETE", "RUNNING"]
    os.kill(orphan, signal.SIGKILL)
    assert start("--search", 2).wait(120) == 0
    assert states_of(tmp_path / "study") == ["COMPLETE"] * 2
    assert lines(first / "calls") == 2
    assert lines(first / "metrics.jsonl") == 8


@pytest.mark.slow
def test_two_processes_share_a_study(start, tmp_path):
    both = [start("--search", 6, SLOW=0.1) for _ in range(2)]
    assert [search.wait(240) for search in both] == [0, 0]
    assert states_of(tmp_path / "study") == ["COMPLETE"] * 6
    calls = [(tmp_path / "study" / f"trial_{number:04}" / "calls").read_text().split() for number in range(6)]
    assert all(len(call) == 1 for call in calls)  # each trial was run once
    assert len(rows_of(tmp_path / "study" / "trials.csv")) == 6


@pytest.mark.slow
def test_a_real_study_of_micro_runs(house, tmp_path, monkeypatch):
    """Trials are the command itself; the file of a point gives the flags that its run had, and the front is drawn."""
    script = tmp_path / "command.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import micro, models, main_imp_fillback as entry\nmodels.BUILDERS['vit_micro'] = micro.vit_micro\n"
        "entry.report.write = lambda _: None\nsys.exit(entry.main(sys.argv[1:]))\n"
    )
    monkeypatch.setattr(trials, "COMMAND", script)
    folder = tmp_path / "study"
    command = [*MICRO, *BOTH, *words("--wandb_mode disabled --search 3 --save_dir"), str(folder)]
    assert call(command) == 0
    front = rows_of(folder / "pareto.csv")
    for row in front:
        run = folder / f"trial_{int(row['trial']):04}"
        args = vars(entry.parse_args(["--config", str(folder / "pareto" / f"{row['point']}.yaml")]))
        own = ("save_dir", "config", "resume", "notes", "pretrained_note")
        was = yaml.safe_load((run / "args.yaml").read_text())
        assert {name: value for name, value in was.items() if name not in own} == {
            name: args[name] for name in was if name not in own
        }
        assert "search" not in was
        assert float(row["val_accuracy"]) == float(rows_of(run / "states.csv")[-1]["best_accuracy"])
        assert int(row["macs"]) == int(rows_of(run / "states.csv")[-1]["macs"])
        planned = study_of(folder).trials[int(row["trial"])].user_attrs["plan"]["cost"]
        assert planned == int(row["macs"])
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
