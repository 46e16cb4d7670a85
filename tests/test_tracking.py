"""Laws of tracking: what wandb gets of a run, and that nothing of it holds the run up or changes it.

The real package is used offline. Where it must fail, a module of the same name stands before it on the path of the
tracker's process and writes down what it is asked for.
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


def process_state():
    """What a package might change in the process that imports it."""
    streams = [(stream, stream.write) for stream in (sys.stdout, sys.stderr)]
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    hooks = (sys.excepthook, sys.exit, sys.unraisablehook, threading.excepthook)
    environ = {name: value for name, value in os.environ.items() if "WANDB" in name}
    threads = [thread for thread in threading.enumerate() if "wandb" in f"{thread.name} {type(thread).__module__}"]
    return streams, handlers, hooks, environ, threads, os.getcwd(), sys.path[:]


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
import logging, os, signal, sys, time
from pathlib import Path
import test_tracking as t

t.models.BUILDERS["vit_micro"] = t.vit_micro
os.fsync = lambda _: None
make = logging.getLogRecordFactory()

def dying(*args, **kwargs):
    record = make(*args, **kwargs)
    if record.getMessage().startswith("state 1 epoch 2/2 batch 3/3"):  # two steps after the last checkpoint
        note = Path(sys.argv[-1], "tracking.json")
        t.until(lambda: t.json.loads(note.read_text())["step"] == t.AXIS + 5, "the last numbers are not handed over")
        time.sleep(1)  # the note comes first
        os.kill(os.getpid(), signal.SIGKILL)
    return record

logging.setLogRecordFactory(dying)
t.entry.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was killed in state 1 and resumed here: folder, segments, and this process before and after."""
    pytest.importorskip("wandb")
    folder, here = tmp_path_factory.mktemp("offline") / "a run", Path(__file__).resolve().parent
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, *BASE, "--wandb_mode", "offline", "--save_dir", folder]
    killed = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    until(lambda: segments(folder)[0].exits, "the process that sends outlives its run")
    before = process_state()
    assert entry.main(["--resume", "--save_dir", str(folder)]) == 0
    for handler in logging.getLogger().handlers[:]:  # the log of this run gets no line of others
        logging.getLogger().removeHandler(handler)
        handler.close()
    return folder, segments(folder), before, process_state()


def test_all_segments_are_one_run_whose_steps_rise_and_come_once(resumed):
    _, found, before, after = resumed
    assert len(found) == 2
    assert len({segment.run.run_id for segment in found}) == 1
    assert [row["_step"] for segment in found for row in segment.rows] == list(range(1, STATES * AXIS + 1))
    assert found[0].rows[-1]["_step"] == AXIS + 5  # also what was logged after the last checkpoint
    assert [segment.exits for segment in found] == [[1], [0]]  # killed, and ended well
    assert all(segment.run.resume for segment in found)  # or `wandb sync` starts the run anew with each segment
    assert after == before


def test_a_run_is_named_after_its_folder_and_carries_all_flags(resumed):
    folder, found, *_ = resumed
    for segment in found:
        assert (segment.run.project, segment.run.display_name, segment.run.entity) == ("RSST", "a run", "")
    config = {name: value for name, value in items(found[0].run.config.update).items() if name != "_wandb"}
    assert config == yaml.safe_load((folder / "args.yaml").read_text())


def test_tracked_numbers_are_those_of_the_runs_files(resumed):
    folder, found, *_ = resumed
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
    folder, found, *_ = resumed
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

FAKE = """
import json, os, sys, time

BEHAVIOUR = os.environ["FAKE"].split()

def note(*what):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(what) + "\\n")

def act(where):
    note(where, os.getpid())
    if BEHAVIOUR[0] == where:
        if BEHAVIOUR[1] == "hangs":
            time.sleep(600)
        if BEHAVIOUR[1] == "exits":
            os._exit(7)
        raise {"fails": RuntimeError("first line\\nsecond line"), "full": OSError(28, "No space left on device"),
               "missing": ModuleNotFoundError("No module named 'wandb'"), "mute": Exception()}[BEHAVIOUR[1]]

act("import")

class Settings:
    def __init__(self, **_):
        if os.environ["WANDB_MODE"] not in ("online", "offline"):
            raise ValueError("an empty WANDB_MODE is not allowed")

class Image:
    def __init__(self, path): open(path).close()

class Summary:
    def update(self, values): note("values", sorted(values)); act("summary")

class Run:
    url, dir, summary = "https://wandb.test/run", "x/wandb/run/files", Summary()
    def log(self, values, step): act("log")
    def finish(self, exit_code=0): act("finish")

def init(mode, **options):
    print("not for the log")
    note("mode", mode)
    if BEHAVIOUR[0] == "offline" or mode != "offline":
        act("init")
    if mode == BEHAVIOUR[0]:
        raise RuntimeError("no network")
    if BEHAVIOUR[0] == "init":
        act("init")
    return Run()
"""


class Fake:
    """A wandb that behaves as told, and what it was asked for."""

    def __init__(self, folder, monkeypatch):
        folder.mkdir()
        (folder / "wandb.py").write_text(FAKE)
        self.calls, self.monkeypatch = folder / "calls", monkeypatch
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("CALLS", str(self.calls))
        monkeypatch.setitem(sys.modules, "wandb", None)  # the run's own process never needs it
        self.behave("works")

    def behave(self, how):
        self.monkeypatch.setenv("FAKE", how)

    def noted(self, what):
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [value for name, value in map(json.loads, lines) if name == what]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return Fake(tmp_path / "fake", monkeypatch)


def alive(pid):
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
    assert not (folder / "tracking.json").exists()
    assert not (folder / "wandb").exists()
    return ending(folder)


FULL, GOES_ON = "No space left on device", "; this run goes on without it"
NOT_DONE = "not done after 1 s; the run's files are complete without it"


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("works", None),
        ("import missing", f"No module named 'wandb'{GOES_ON}"),
        ("import exits", f"its process ended with 7{GOES_ON}"),
        ("init hangs", NOT_DONE),
        ("log fails", f"first line second line{GOES_ON}"),
        ("log mute", f"Exception{GOES_ON}"),
        ("log hangs", NOT_DONE),
        ("summary exits", f"its process ended with 7{GOES_ON}"),
        ("finish full", f"[Errno 28] {FULL}{GOES_ON}"),
    ],
)
def test_a_wandb_that_does_not_work_costs_one_line(behaviour, said, fake, untracked, tmp_path, monkeypatch, no_report):
    fake.behave(behaviour)
    # a hang must show within it; all else may take its time on a busy machine
    monkeypatch.setattr(Tracker, "patience", 1.0 if "hangs" in behaviour else 60.0)
    folder, before = tmp_path / "run", process_state()
    assert entry.main([*BASE, "--wandb_mode", "offline", "--save_dir", str(folder)]) == 0
    until(lambda: "wandb" not in {thread.name for thread in threading.enumerate()}, "the thread stays")
    lines = [line.partition(" wandb: ")[2] for line in (folder / "run.log").read_text().splitlines()]
    assert [line for line in lines if line and "upload later" not in line] == ([said] if said else [])
    assert "not for the log" not in (folder / "run.log").read_text()
    assert ending(folder) == untracked
    assert process_state() == before
    if Path("/proc/self/stat").exists():
        until(lambda: not any(map(alive, fake.noted("import"))), "the tracker's process stays")


def test_log_returns_while_wandb_hangs_and_ctrl_c_is_for_the_run_only(fake, tmp_path, monkeypatch):
    fake.behave("log hangs")
    monkeypatch.setattr(Tracker, "patience", 0.2)
    tracker = Tracker("offline", tmp_path)
    tracker.log({"value": 0.0}, 0)
    until(lambda: fake.noted("log"), "nothing is sent")
    assert os.getpgid(fake.noted("log")[0]) != os.getpgid(0)

    def more_than_a_pipe_holds():
        for step in range(1, 2000):
            tracker.log({"x" * 1000: 1.0}, step)

    caller = threading.Thread(target=more_than_a_pipe_holds, daemon=True)
    caller.start()
    caller.join(30)
    assert not caller.is_alive()
    tracker.finish()


def test_steps_that_do_not_rise_and_empty_values_are_left_out(fake, tmp_path):
    tracker = Tracker("offline", tmp_path)
    for step in (1, 3, 3, 2, 4):
        tracker.log({"a": 1.0}, step)
    tracker.summarise({"b": 1.0, "empty": ""}, {})
    tracker.finish()
    assert fake.noted("values") == [["b"]]
    assert (len(fake.noted("log")), len(fake.noted("finish"))) == (3, 1)
    assert json.loads((tmp_path / "tracking.json").read_text()) == {"id": tracker.run_id, "step": 4}


# ------------------------------------------------------------------------------------------------------- which mode


@pytest.mark.parametrize(("flag", "environment"), [("disabled", "online"), ("auto", "disabled")])
def test_disabled_starts_and_writes_nothing(flag, environment, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr(subprocess, "Popen", None)
    before = process_state()
    tracker = Tracker(flag, tmp_path)
    tracker.log({"a": 1.0}, 1)
    tracker.summarise({"b": 1.0}, {})
    tracker.finish()
    assert process_state() == before
    assert not fake.calls.exists()
    assert not (tmp_path / "tracking.json").exists()


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
        ("auto", {"FAKE": "online fails"}, HERE, ["online", "offline"]),
    ],
)
def test_online_needs_credentials_and_falls_back(flag, environ, login, modes, fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    if login:
        (tmp_path / ".netrc").write_bytes(login if isinstance(login, bytes) else login.encode())
        (tmp_path / ".netrc").chmod(stat.S_IRUSR)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO)
    tracker = Tracker(flag, tmp_path)
    tracker.log({"a": 1.0}, 1)
    tracker.finish()
    assert (fake.noted("mode"), len(fake.noted("log"))) == (modes, 1)
    where = "offline; upload later with: wandb sync x/wandb/run" if modes[-1] == "offline" else "https://wandb.test/run"
    fell_back = ["wandb: cannot go online (no network); tracking offline"] * (len(modes) - 1)
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


# ---------------------------------------------------------------------------------------------------- tracking.json

NO_NOTES = ["", "{", "[1, 2]", "null", "{}", '{"id": "abcd1234"}', '{"step": 5}', "[" * 100_000]
NO_NOTES += [f'{{"id": {run_id}, "step": 5}}' for run_id in ("5", "null", '""', '"../x"', '"a/../x"')]
NO_NOTES += [f'{{"id": "abcd1234", "step": {step}}}' for step in ('"5"', "5.5", "true", "1e999", "null")]


@pytest.mark.parametrize("run_id", ["", "12345678"])
def test_a_damaged_note_counts_as_none(run_id, tmp_path):
    for content in (None, b"\xff\xfe", *map(str.encode, NO_NOTES)):
        if content is not None:
            (tmp_path / "tracking.json").write_bytes(content)
        tracker = Tracker("disabled", tmp_path, run_id)
        assert tracker.last_step == -1, content
        assert tracker.run_id == run_id or (run_id == "" and len(tracker.run_id) == 8 and int(tracker.run_id, 16) >= 0)


def test_the_note_is_of_its_own_run_only(tmp_path):
    (tmp_path / "tracking.json").write_text('{"id": "abcd1234", "step": 5}')
    found = {run_id: Tracker("disabled", tmp_path, run_id) for run_id in ("", "abcd1234", "12345678")}
    known = {run_id: (tracker.run_id, tracker.last_step) for run_id, tracker in found.items()}
    assert known == {"": ("abcd1234", 5), "abcd1234": ("abcd1234", 5), "12345678": ("12345678", -1)}


def test_a_note_that_cannot_be_written_ends_tracking_only(fake, untracked, tmp_path, monkeypatch, no_report):
    """As on a full disk: what could come twice after a resume is not sent."""
    folder, replace = tmp_path / "run", os.replace

    def full(source, target):
        if Path(target).name == "tracking.json":
            time.sleep(1)  # for what was sent, if it was, to arrive
            raise OSError(28, FULL)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert entry.main([*BASE, "--wandb_mode", "offline", "--save_dir", str(folder)]) == 0
    lines = [line for line in (folder / "run.log").read_text().splitlines() if GOES_ON in line]
    assert len(lines) == 1
    assert f"wandb: cannot write {folder / 'tracking.json'}: {FULL}; free the disk" in lines[0]
    assert fake.noted("log") == []
    assert ending(folder) == untracked
