"""Laws of tracking: what wandb gets of a run, and that nothing of it holds the run up or changes it.

The real package is used offline. Where it must fail, a module of the same name stands before it on the path of the
tracker's process and writes down what it is asked for.
"""

import csv
import json
import logging
import os
import shlex
import shutil
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
import utils

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS, STATES = 6, 3  # of a state: two epochs of three steps
AXIS = STEPS + 1  # a state's end is a step, too
words = str.split
BASE = words(
    "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.4 --print_freq 1 --no-export --vit_structured --vit_prune_target both"
)


def until(fine, what):
    deadline = time.monotonic() + 60
    while not fine():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def house(tmp_path_factory):
    """The micro model is an `--arch`, nobody is logged in, and the logging that a run sets up goes again."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BUILDERS, "vit_micro", vit_micro)
        patch.setattr(os, "fsync", lambda _: None)  # no power fails here, and a shared disk is slow
        for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def no_report(monkeypatch):
    """Pictures take longer than these runs."""
    monkeypatch.setattr(entry.report, "write", lambda _: None)


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


DRIVER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
import test_tracking as t
t.models.BUILDERS["vit_micro"] = t.vit_micro
train_step = t.entry.PruneRetrain.train_step

tell, told = t.utils.Tracker._tell, []

def telling(tracker, message):
    tell(tracker, message)
    told.append(message)

def dying(job, *where):
    if (job.run.state, job.run.step) == (1, 5):  # two steps after the last checkpoint
        t.until(lambda: len(told) > 1 and told[-1][2] == 1 * t.AXIS + 5, "the last numbers are not handed over")
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    train_step(job, *where)

t.utils.Tracker._tell = telling
t.entry.PruneRetrain.train_step = dying
t.entry.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was killed in state 1 and resumed here: its folder, and this process before and after."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("offline") / "a run"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, Path(__file__).parent)))}
    command = [sys.executable, "-c", DRIVER, *BASE, "--wandb_mode", "offline", "--save_dir", folder]
    killed = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    until(lambda: segments(folder)[0].exits, "the process that sends outlives its run")
    before = process_state()
    assert entry.main(["--resume", "--save_dir", str(folder)]) == 0
    return folder, before, process_state()


def test_all_segments_are_one_run_whose_steps_rise_and_come_once(resumed):
    found = segments(resumed[0])
    assert len(found) == 2
    assert len({segment.run.run_id for segment in found}) == 1
    assert [row["_step"] for segment in found for row in segment.rows] == list(range(1, STATES * AXIS + 1))
    assert found[0].rows[-1]["_step"] == AXIS + 5  # also what was logged after the last checkpoint
    assert [segment.exits for segment in found] == [[1], [0]]  # killed, and ended well
    assert all(segment.run.resume for segment in found)  # or `wandb sync` starts the run anew with each segment


def test_a_run_is_named_after_its_folder_and_carries_all_flags(resumed):
    folder = resumed[0]
    first, second = segments(folder)
    for segment in (first, second):
        assert (segment.run.project, segment.run.display_name, segment.run.entity) == ("RSST", "a run", "")
    config = {name: value for name, value in items(first.run.config.update).items() if name != "_wandb"}
    assert config == yaml.safe_load((folder / "args.yaml").read_text())
    assert {action.dest for action in entry.build_parser()._actions} - {"help"} <= config.keys()


def test_tracked_numbers_are_those_of_the_runs_files(resumed):
    folder = resumed[0]
    rows = {row["_step"]: row for segment in segments(folder) for row in segment.rows}
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


def test_the_summary_ends_with_the_final_numbers_and_the_plots(resumed):
    folder = resumed[0]
    summary = segments(folder)[-1].summary
    with open(folder / "states.csv", newline="") as file:
        last = {f"final/{name}": float(value) for name, value in list(csv.DictReader(file))[-1].items() if value}
    assert {name: summary.get(name) for name in last} == last
    plots = {f"plots/{path.stem}" for path in (folder / "plots").glob("*.png")}
    assert plots
    assert {name for name in summary if name.startswith("plots/")} == plots
    for name in plots:
        picture = segments(folder)[-1].path.parent / "files" / summary[name]["path"]
        assert picture.read_bytes() == (folder / f"{name}.png").read_bytes()


def test_wandb_sync_finds_both_segments(resumed):
    command = [sys.executable, "-m", "wandb", "sync"]
    if "--dry-run" not in subprocess.run([*command, "--help"], capture_output=True, text=True).stdout:
        pytest.skip("this wandb has no dry run of sync")
    paths = [segment.path for segment in segments(resumed[0])]
    said = subprocess.run([*command, "--dry-run", *(path.parent for path in paths)], capture_output=True, text=True)
    listing = " ".join((said.stdout + said.stderr).split())
    assert said.returncode == 0, listing
    assert f"Would sync {len(paths)} run(s)" in listing
    assert all(path.name in listing and path.parent.name in listing for path in paths)


def test_the_log_says_how_to_upload(resumed):
    lines = [line for line in (resumed[0] / "run.log").read_text().splitlines() if " wandb: " in line]
    assert len(lines) == 2
    for line, segment in zip(lines, segments(resumed[0]), strict=True):
        assert shlex.split(line.partition("wandb sync ")[2]) == [str(segment.path.parent)]


def test_the_runs_process_stays_as_it_was(resumed):
    for before, after in zip(*resumed[1:], strict=True):
        assert after == before


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
    def update(self, values): act("summary")

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
        if not self.calls.exists():
            return []
        return [value for name, value in map(json.loads, self.calls.read_text().splitlines()) if name == what]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return Fake(tmp_path / "fake", monkeypatch)


def alive(pid):
    """Whether a process runs; one that only waits to be collected does not."""
    stat_file = Path("/proc", str(pid), "stat")
    try:
        return stat_file.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ending(folder):
    """Weights, random states and history of a finished run, without clock times and the id."""
    found = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    drop = ("seconds", "images_per_second")
    history = [{k: v for k, v in row.items() if k not in drop} for row in found["run"]["history"]]
    return {name: tensor.numpy().tobytes() for name, tensor in found["weights"].items()}, history, found["random"]


def assert_same_bits(found, expected):
    assert found[:2] == expected[:2]
    assert {k: v for k, v in found[2].items() if k != "torch"} == {k: v for k, v in expected[2].items() if k != "torch"}
    assert torch.equal(found[2]["torch"], expected[2]["torch"])


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untracked") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry.report, "write", lambda _: None)
        assert entry.main([*BASE, "--wandb_mode", "disabled", "--save_dir", str(folder)]) == 0
    assert not (folder / "tracking.json").exists()
    assert not (folder / "wandb").exists()
    return ending(folder)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("works", None),
        ("import missing", "No module named 'wandb'; this run goes on without it"),
        ("import exits", "its process ended with 7; this run goes on without it"),
        ("init fails", "first line second line; this run goes on without it"),
        ("init hangs", "not done after 1 s; the run's files are complete without it"),
        ("log full", "[Errno 28] No space left on device; this run goes on without it"),
        ("log mute", "Exception; this run goes on without it"),
        ("log exits", "its process ended with 7; this run goes on without it"),
        ("log hangs", "not done after 1 s; the run's files are complete without it"),
        ("summary fails", "first line second line; this run goes on without it"),
        ("finish full", "[Errno 28] No space left on device; this run goes on without it"),
        ("finish hangs", "not done after 1 s; the run's files are complete without it"),
    ],
)
def test_a_wandb_that_does_not_work_costs_one_line(behaviour, said, fake, untracked, tmp_path, monkeypatch, no_report):
    fake.behave(behaviour)
    # a hang must show within it; all else may take its time on a busy machine
    monkeypatch.setattr(utils.Tracker, "patience", 1.0 if "hangs" in behaviour else 60.0)
    folder, before = tmp_path / "run", process_state()
    assert entry.main([*BASE, "--wandb_mode", "offline", "--save_dir", str(folder)]) == 0
    until(lambda: "wandb" not in {thread.name for thread in threading.enumerate()}, "the thread stays")
    lines = [line.partition(" wandb: ")[2] for line in (folder / "run.log").read_text().splitlines()]
    lines = [line for line in lines if line and "upload later" not in line]
    assert lines == ([said] if said else [])
    assert "not for the log" not in (folder / "run.log").read_text()
    assert_same_bits(ending(folder), untracked)
    assert process_state() == before
    if Path("/proc/self/stat").exists():
        until(lambda: not any(map(alive, fake.noted("import"))), "the tracker's process stays")


def test_log_returns_while_wandb_hangs(fake, tmp_path, monkeypatch):
    fake.behave("log hangs")
    monkeypatch.setattr(utils.Tracker, "patience", 0.2)
    tracker = utils.Tracker("offline", tmp_path)
    tracker.log({"value": 0.0}, 0)
    until(lambda: fake.noted("log"), "nothing is sent")

    def more_than_a_pipe_holds():
        for step in range(1, 2000):
            tracker.log({"x" * 1000: 1.0}, step)

    caller = threading.Thread(target=more_than_a_pipe_holds, daemon=True)
    caller.start()
    caller.join(30)
    assert not caller.is_alive()
    tracker.finish()


def test_a_full_disk_under_the_note_ends_tracking_only(fake, untracked, tmp_path, monkeypatch, no_report):
    write_text = utils.write_text

    def full(path, text):
        if path.name == "tracking.json":
            raise utils.RunError(f"cannot write {path}: No space left on device; free the disk", 1)
        write_text(path, text)

    monkeypatch.setattr(utils, "write_text", full)
    folder = tmp_path / "run"
    assert entry.main([*BASE, "--wandb_mode", "offline", "--save_dir", str(folder)]) == 0
    lines = [line for line in (folder / "run.log").read_text().splitlines() if "goes on without it" in line]
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert fake.noted("log") == []  # what could come twice after a resume is not sent
    assert_same_bits(ending(folder), untracked)


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="no sessions here")
def test_ctrl_c_in_the_terminal_is_for_the_run_only(fake, tmp_path):
    fake.behave("log hangs")
    tracker = utils.Tracker("offline", tmp_path)
    tracker.log({}, 0)
    until(lambda: fake.noted("log"), "nothing is sent")
    (pid,) = fake.noted("log")
    assert os.getpgid(pid) != os.getpgid(0)
    tracker.patience = 0.1
    tracker.finish()


# ------------------------------------------------------------------------------------------------------- which mode


@pytest.mark.parametrize(("flag", "environment"), [("disabled", "online"), ("auto", "disabled")])
def test_disabled_starts_and_writes_nothing(flag, environment, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr(subprocess, "Popen", None)
    before = process_state()
    tracker = utils.Tracker(flag, tmp_path)
    tracker.log({"a": 1.0}, 1)
    tracker.summarise({"b": 1.0}, {})
    tracker.finish()
    assert process_state() == before
    assert not fake.calls.exists()
    assert not (tmp_path / "tracking.json").exists()


HERE = "machine api.wandb.ai login user password k"
THERE, ANYBODY = "machine other.test password k", "default password k"


@pytest.mark.parametrize(
    ("flag", "environ", "login", "modes"),
    [
        ("auto", {}, None, ["offline"]),
        ("auto", {"WANDB_MODE": ""}, None, ["offline"]),
        ("auto", {"WANDB_MODE": "online"}, None, ["online"]),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, HERE, ["offline"]),
        ("auto", {"WANDB_API_KEY": "k"}, None, ["online"]),
        ("auto", {"WANDB_API_KEY": ""}, None, ["offline"]),
        ("auto", {}, HERE, ["online"]),
        ("auto", {}, THERE, ["offline"]),
        ("auto", {}, ANYBODY, ["offline"]),
        ("auto", {"WANDB_BASE_URL": "https://other.test"}, THERE, ["online"]),
        ("auto", {"WANDB_BASE_URL": "https://other.test"}, HERE, ["offline"]),
        ("auto", {}, "machine \x00 what is this", ["offline"]),
        ("auto", {}, b"\xff\xfe", ["offline"]),
        ("auto", {"NETRC": "/no/such/file"}, HERE, ["offline"]),
        ("offline", {"WANDB_MODE": "online", "WANDB_API_KEY": "k"}, HERE, ["offline"]),
        ("online", {"WANDB_MODE": "disabled"}, None, ["online"]),
        ("online", {"FAKE": "online fails"}, None, ["online", "offline"]),
        ("auto", {"FAKE": "online fails"}, HERE, ["online", "offline"]),
    ],
)
def test_online_needs_credentials_and_falls_back(flag, environ, login, modes, fake, tmp_path, monkeypatch, caplog):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    if login:
        (home / ".netrc").write_bytes(login if isinstance(login, bytes) else login.encode())
        (home / ".netrc").chmod(stat.S_IRUSR)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO)
    tracker = utils.Tracker(flag, tmp_path)
    tracker.log({"a": 1.0}, 1)
    tracker.finish()
    assert fake.noted("mode") == modes
    assert (len(fake.noted("log")), len(fake.noted("finish"))) == (1, 1)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["wandb: cannot go online (no network); tracking offline"] * (len(modes) - 1)
    where = "offline; upload later with: wandb sync x/wandb/run" if modes[-1] == "offline" else "https://wandb.test/run"
    assert f"wandb: {where}" in caplog.messages


@pytest.mark.slow
def test_the_real_package_falls_back_to_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    tracker = utils.Tracker("auto", tmp_path, project="RSST")
    tracker.log({"a": 1.5}, 3)
    tracker.finish()
    assert "cannot go online" in caplog.text
    (segment,) = segments(tmp_path)
    assert [(row["_step"], row["a"]) for row in segment.rows] == [(3, 1.5)]


# ---------------------------------------------------------------------------------------------------- tracking.json


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"{}",
        b'{"id": "abcd1234"}',
        b'{"step": 5}',
        b'{"id": 5, "step": 5}',
        b'{"id": null, "step": 5}',
        b'{"id": "", "step": 5}',
        b'{"id": "../x", "step": 5}',
        b'{"id": "abcd1234", "step": "5"}',
        b'{"id": "abcd1234", "step": 5.5}',
        b'{"id": "abcd1234", "step": true}',
        b'{"id": "abcd1234", "step": 1e999}',
        b'{"id": "abcd1234", "step": null}',
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("run_id", ["", "12345678"])
def test_a_damaged_note_counts_as_none(content, run_id, tmp_path):
    if content is not None:
        (tmp_path / "tracking.json").write_bytes(content)
    tracker = utils.Tracker("disabled", tmp_path, run_id)
    assert tracker.last_step == -1
    assert tracker.run_id == run_id or (run_id == "" and len(tracker.run_id) == 8 and int(tracker.run_id, 16) >= 0)


def test_the_note_is_of_its_own_run_only(tmp_path):
    (tmp_path / "tracking.json").write_text('{"id": "abcd1234", "step": 5}')
    found = [utils.Tracker("disabled", tmp_path, run_id) for run_id in ("", "abcd1234", "12345678")]
    assert [(tracker.run_id, tracker.last_step) for tracker in found] == [
        ("abcd1234", 5),
        ("abcd1234", 5),
        ("12345678", -1),
    ]


def test_a_folder_in_the_place_of_the_note_costs_one_line(fake, tmp_path, caplog):
    (tmp_path / "tracking.json").mkdir()
    tracker = utils.Tracker("offline", tmp_path)
    tracker.log({"a": 1.0}, 1)
    tracker.finish()
    assert [r.getMessage() for r in caplog.records if "goes on without it" in r.getMessage()] == [
        f"wandb: cannot write {tmp_path / 'tracking.json'}: Is a directory; free the disk or choose --save_dir; "
        "this run goes on without it"
    ]
    shutil.rmtree(tmp_path / "tracking.json")
