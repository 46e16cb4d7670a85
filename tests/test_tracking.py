"""Laws of tracking: what wandb gets of a run, and that no failure of wandb stops the run or changes its numbers.

The real package is used offline. Where it must fail, a fake module of the same name takes its place.
"""

import csv
import json
import logging
import os
import shlex
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from micro import vit_micro

import main_imp_fillback as entry
import models
from engine.tracking import Tracker

STEPS, STATES = 6, 3  # of a state: two epochs of three steps
AXIS = STEPS + 1  # a state's end is a step, too
FLAGS = (
    "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.4 --print_freq 1 --no-export --vit_structured --vit_prune_target both"
)
BASE = FLAGS.split()


def until(fine, what):
    deadline = time.monotonic() + 60
    while not fine():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def house(tmp_path_factory):
    """The micro model is an `--arch`, and nobody is logged in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BUILDERS, "vit_micro", vit_micro)
        patch.setattr(os, "fsync", lambda _: None)  # no power fails here, and a shared disk is slow
        for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setitem(sys.modules, "markdown", None)  # pictures take longer than these runs


# ------------------------------------------------------------------------------------------------------------ offline


def records(path):
    """All records of a `.wandb` file, which is a LevelDB log: blocks of 32 KiB, records in chunks of 7 + n bytes."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="this wandb has no wandb_internal_pb2")
    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while len(data) - place > 7:
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if len(data) < place + 7 + length or kind == 0:
            break  # still being written
        part = data[place + 7 : place + 7 + length]
        whole = part if kind in (1, 2) else whole + part  # 1 full, 2 first, 3 middle, 4 last
        place += 7 + length
        if kind in (1, 4):
            yield messages.Record.FromString(whole)


def items(entries):
    return {"/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries}


class Segment:
    def __init__(self, folder):
        (self.path,) = folder.glob("*.wandb")
        found = list(records(self.path))
        self.rows = [items(record.history.item) for record in found if record.HasField("history")]
        self.summary = {}
        for record in found:
            self.summary |= items(record.summary.update)
        self.run = next((record.run for record in found if record.HasField("run")), None)
        self.exits = [record.exit.exit_code for record in found if record.HasField("exit")]


def segments(folder):
    return [Segment(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]


# a step's line of the log comes before its numbers are handed over
DRIVER = """
import logging, os, signal, sys
import test_tracking as t

t.models.BUILDERS["vit_micro"] = t.vit_micro
os.fsync = lambda _: None
make = logging.getLogRecordFactory()

def stopping(*args, **kwargs):
    record = make(*args, **kwargs)
    if record.getMessage().startswith("state 1 epoch 2/2 batch 3/3"):  # in the middle of the last epoch
        os.kill(os.getpid(), signal.SIGTERM)
    return record

logging.setLogRecordFactory(stopping)
sys.exit(t.entry.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was stopped in state 1 and resumed here: its folder and the two segments that wandb wrote."""
    pytest.importorskip("wandb")
    folder, here = tmp_path_factory.mktemp("offline") / "a run", Path(__file__).resolve().parent
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, *BASE, "--wandb_mode", "offline", "--save_dir", folder]
    stopped = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert entry.main(["--resume", "--save_dir", str(folder)]) == 0
    for handler in logging.getLogger().handlers[:]:  # the log of this run gets no line of others
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    return folder, segments(folder)


def test_all_segments_are_one_run_whose_steps_rise_and_come_once(resumed):
    _, found = resumed
    assert len(found) == 2
    assert len({segment.run.run_id for segment in found}) == 1
    assert [row["_step"] for segment in found for row in segment.rows] == list(range(1, STATES * AXIS + 1))
    assert found[0].rows[-1]["_step"] >= AXIS + 5  # also what was logged in the epoch that was broken off
    assert [segment.exits for segment in found] == [[0], [0]]
    assert all(segment.run.resume for segment in found)  # or `wandb sync` starts the run anew with each segment


def test_a_run_is_named_after_its_folder_and_carries_all_flags(resumed):
    folder, found = resumed
    for segment in found:
        assert (segment.run.project, segment.run.display_name, segment.run.entity) == ("RSST", "a run", "")
    config = {name: value for name, value in items(found[0].run.config.update).items() if name != "_wandb"}
    assert config == yaml.safe_load((folder / "args.yaml").read_text())


def test_tracked_numbers_are_those_of_the_runs_files(resumed):
    folder, found = resumed
    rows = {row["_step"]: row for segment in found for row in segment.rows}
    training = {"train/loss", "train/accuracy", "train/lr"}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        epoch = json.loads(line)
        row = rows[epoch["state"] * AXIS + 3 * (epoch["epoch"] + 1)]
        pairs = {"train/loss": "train_loss", "train/accuracy": "train_accuracy", "train/lr": "lr"}
        pairs |= {"val/accuracy": "val_accuracy", "train/images_per_second": "images_per_second"}
        pairs |= {f"prune/{name}": name for name in ("density", "heads", "neurons", "parameters", "macs")}
        assert {name: row[name] for name in pairs} == {name: epoch[key] for name, key in pairs.items()}
    # the penalty ramps up over the first steps of state 1, up to the cut, and its weights shrink
    ramp = [row for step, row in rows.items() if "rsst/lambda" in row and step < 2 * AXIS]
    assert ramp
    assert all(training | {"rsst/residual"} <= row.keys() for row in ramp)
    strengths, residuals = ([row[f"rsst/{name}"] for row in ramp] for name in ("lambda", "residual"))
    assert strengths == sorted(strengths)
    assert residuals == sorted(residuals, reverse=True)
    with open(folder / "states.csv", newline="") as file:
        states = list(csv.DictReader(file))
    tested = {step: row["test/accuracy"] for step, row in rows.items() if "test/accuracy" in row}
    assert tested == {(state + 1) * AXIS: float(states[state]["test_accuracy"]) for state in range(STATES)}
    # the summary ends with the final numbers and the plots
    summary = found[-1].summary
    last = {f"final/{name}": float(value) for name, value in states[-1].items() if value}
    assert {name: summary.get(name) for name in last} == last
    plots = {f"plots/{path.stem}" for path in (folder / "plots").glob("*.png")}
    assert plots
    assert {name for name in summary if name.startswith("plots/")} == plots
    for name in plots:
        picture = found[-1].path.parent / "files" / summary[name]["path"]
        assert picture.read_bytes() == (folder / f"{name}.png").read_bytes()


def test_the_log_says_how_to_upload_and_wandb_finds_both_segments(resumed):
    folder, found = resumed
    lines = [line for line in (folder / "run.log").read_text().splitlines() if " wandb: " in line]
    folders = [str(segment.path.parent) for segment in found]
    assert [shlex.split(line.partition("wandb sync ")[2]) for line in lines] == [[folder] for folder in folders]
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *folders]
    said = subprocess.run(command, capture_output=True, text=True)
    listing = " ".join((said.stdout + said.stderr).split())
    if "No such option" in listing:
        pytest.skip("this wandb has no dry run of sync")
    assert said.returncode == 0, listing
    assert "Would sync 2 run(s)" in listing
    assert all(segment.path.name in listing and segment.path.parent.name in listing for segment in found)


# --------------------------------------------------------------------------------------------- when wandb does not work


class Fake:
    """A wandb module that fails as told, and what it was asked for."""

    errors = {
        "fails": RuntimeError("first line\nsecond line"), "full": OSError(28, "No space left on device"),
        "mute": Exception(),
    }  # fmt: skip
    url, dir = "https://wandb.test/run", "x/wandb/run/files"

    def __init__(self):
        self.behaviour, self.calls, self.hanging = "works", [], threading.Event()
        self.Settings, self.Image, self.summary = dict, lambda path: open(path).close(), self

    def act(self, where, what=None):
        self.calls.append((where, what))
        if self.behaviour.split()[0] == where:
            how = self.behaviour.split()[1]
            if how == "hangs":
                self.hanging.wait(60)
            else:
                raise self.errors[how]

    def init(self, mode, **_):
        if os.environ.get("WANDB_MODE") == "":
            raise ValueError("an empty WANDB_MODE is not allowed")
        self.calls.append(("mode", mode))
        self.act(mode)
        self.act("init")
        return self

    def teardown(self):
        self.calls.append(("teardown", None))

    def log(self, values, step):
        self.act("log", step)

    def update(self, values):
        self.act("summary", sorted(values))

    def finish(self):
        self.act("finish")

    def noted(self, where):
        return [what for name, what in self.calls if name == where]


@pytest.fixture
def fake(monkeypatch):
    module = Fake()
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield module
    module.hanging.set()


def ending(folder):
    """Weights, random states and history of a finished run, without clock times and the id."""
    found = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    drop = ("seconds", "images_per_second")
    history = [{k: v for k, v in row.items() if k not in drop} for row in found["run"]["history"]]
    tensors = {**found["weights"], "random": found["random"].pop("torch")}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, history, found["random"]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untracked") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "markdown", None)
        assert entry.main([*BASE, "--wandb_mode", "disabled", "--save_dir", str(folder)]) == 0
    assert not (folder / "wandb").exists()
    return ending(folder)


FULL, GOES_ON = "No space left on device", "; this run goes on without it"


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("works", None),
        ("missing", f"import of wandb halted; None in sys.modules{GOES_ON}"),
        ("init fails", f"first line second line{GOES_ON}"),
        ("log fails", f"first line second line{GOES_ON}"),
        ("log mute", f"Exception{GOES_ON}"),
        ("summary fails", f"first line second line{GOES_ON}"),
        ("finish hangs", "not done after 1 s; the run's files are complete without it"),
        ("finish full", f"[Errno 28] {FULL}{GOES_ON}"),
    ],
)
def test_a_wandb_that_does_not_work_costs_one_line(behaviour, said, fake, untracked, tmp_path, monkeypatch, no_report):
    fake.behaviour = behaviour
    if behaviour == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(Tracker, "patience", 1.0 if "hangs" in behaviour else 60.0)
    folder = tmp_path / "run"
    assert entry.main([*BASE, "--wandb_mode", "offline", "--save_dir", str(folder)]) == 0
    lines = [line.partition(" wandb: ")[2] for line in (folder / "run.log").read_text().splitlines()]
    assert [line for line in lines if line and "upload later" not in line] == ([said] if said else [])
    assert ending(folder) == untracked


def test_steps_that_do_not_rise_and_empty_values_are_left_out(fake, tmp_path):
    tracker = Tracker("offline", tmp_path)
    for step in (1, 3, 3, 2, 4):
        tracker.log({"a": 1.0}, step)
    tracker.summarise({"b": 1.0, "empty": ""}, {})
    tracker.finish()
    assert fake.noted("summary") == [["b"]]
    assert (len(fake.noted("log")), len(fake.noted("finish"))) == (3, 1)


# ------------------------------------------------------------------------------------------------------- which mode


@pytest.mark.parametrize(("flag", "environment"), [("disabled", "online"), ("auto", "disabled")])
def test_disabled_starts_and_writes_nothing(flag, environment, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", environment)
    tracker = Tracker(flag, tmp_path)
    tracker.log({"a": 1.0}, 1)
    tracker.summarise({"b": 1.0}, {})
    tracker.finish()
    assert fake.calls == []


HERE = "machine api.wandb.ai login user password k"
THERE = "machine other.test password k"


@pytest.mark.parametrize(
    ("flag", "environ", "login", "modes"),
    [
        ("auto", {"WANDB_MODE": ""}, None, ["offline"]),
        ("auto", {"WANDB_MODE": "online"}, None, ["online"]),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, HERE, ["offline"]),
        ("auto", {"WANDB_API_KEY": "k"}, None, ["online"]),
        ("auto", {"WANDB_API_KEY": ""}, HERE, ["online"]),
        ("auto", {}, THERE, ["offline"]),
        ("auto", {}, "default password k", ["offline"]),
        ("auto", {"WANDB_BASE_URL": "https://other.test"}, THERE, ["online"]),
        ("auto", {"WANDB_BASE_URL": "https://other.test"}, HERE, ["offline"]),
        ("auto", {}, "machine \x00 what is this", ["offline"]),
        ("auto", {}, b"\xff\xfe", ["offline"]),
        ("auto", {"NETRC": "/no/such/file"}, HERE, ["offline"]),
        ("offline", {"WANDB_MODE": "online", "WANDB_API_KEY": "k"}, HERE, ["offline"]),
        ("online", {"WANDB_MODE": "disabled"}, None, ["online"]),
        ("auto", {"FAKE": "online full"}, HERE, ["online", "offline"]),
    ],
)
def test_online_needs_credentials_and_falls_back(flag, environ, login, modes, fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    if login:
        (tmp_path / ".netrc").write_bytes(login if isinstance(login, bytes) else login.encode())
        (tmp_path / ".netrc").chmod(stat.S_IRUSR)
    fake.behaviour = environ.pop("FAKE", "works")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO)
    tracker = Tracker(flag, tmp_path)
    tracker.log({"a": 1.0}, 1)
    tracker.finish()
    assert (fake.noted("mode"), len(fake.noted("log"))) == (modes, 1)
    where = "offline; upload later with: wandb sync x/wandb/run" if modes[-1] == "offline" else "https://wandb.test/run"
    assert len(fake.noted("teardown")) == len(modes) - 1
    fell_back = [f"wandb: cannot go online ([Errno 28] {FULL}); tracking offline"] * (len(modes) - 1)
    assert caplog.messages == [*fell_back, f"wandb: {where}"]


@pytest.mark.slow
def test_the_real_package_falls_back_to_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    tracker = Tracker("auto", tmp_path, project="RSST")
    tracker.log({"a": 1.5}, 3)
    tracker.finish()
    assert "cannot go online" in caplog.text
    (segment,) = segments(tmp_path)
    assert [(row["_step"], row["a"]) for row in segment.rows] == [(3, 1.5)]
