"""Laws of a run that is killed, stopped or cannot write: it goes on from its last checkpoint to the same bits.

Every run here is a process of its own, so that it can die for real: most are forked off a server that has imported the
command once, some are the command started anew. Inside such a process `at` lets something happen at an exact moment:
the second step of state 1, the fifth `os.replace` of state 2, half a `write`.
"""

import contextlib
import copy
import errno
import functools
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from micro import BOTH, TIMES, load, metrics, rows_of, vit_micro, wrap
from safetensors.torch import load_file

import export
import main_imp_fillback as entry
import models
import report
import utils
from engine.checkpoint import load_checkpoint
from engine.run import Run
from engine.run_folder import RunLock
from engine.training import StateTraining

torch.set_num_threads(1)  # in the server's processes, too, which do not read conftest.py

SCRIPT = Path(__file__).resolve().parent.parent / "main_imp_fillback.py"
words = str.split
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

EPOCHS, STATES = 3, 3  # of 3 steps an epoch; the cut is after step 4, half of 9 rounded to even
BASE = words(
    "--dataset digits --arch vit_micro --img_size 16 --device cpu --amp off --train_limit 60 --batch_size 20 "
    "--epochs 3 --pruning_times 3 --lr 0.05 --rate 0.4 --reg_finish 0.5 --checkpoint_every 2 --print_freq 2 "
    "--workers 0 --wandb_mode disabled"
)
MODES = {
    "rsst structured": ("--struct", "rsst", *BOTH), "rsst": words("--struct rsst --fillback_rate 0.2"),
    "refill structured": ("--struct", "refill", *BOTH, *words("--prune_type rewind_lt --rewind_epoch 1")),
    "refill": words("--struct refill --fillback_rate 0.2 --opt adamw --lr 0.005"), "imp": words("--struct imp"),
    "oneshot": ("--struct", "oneshot", *BOTH), "dense": words("--struct dense"),
    "emptied": words(
        "--struct refill --vit_structured --vit_prune_target branch --rate 0.8 --prune_type finetune --opt adamw "
        "--lr 0.005"
    ),
    "cnn": words("--struct rsst --arch res20s --img_size 8"),
}  # fmt: skip
MODE = "rsst structured"
TINY = words(
    "--dataset digits --arch vit_tiny --img_size 8 --device cpu --amp off --train_limit 60 --batch_size 20 "
    "--print_freq 1 --wandb_mode disabled --epochs 50 --pruning_times 2"
)


# ------------------------------------------------------------------------------------------- what happens in a process
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # it comes to the process, not to this thread


def kill_when_written():
    """Once the thread that writes is done: between its two renames there is no checkpoint.pt."""
    RUNS[-1].recorder.writer.wait()
    kill()


def fail(name):
    number = getattr(errno, name)
    raise OSError(number, os.strerror(number))


def send(*names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


def out_of_memory(kind):
    if kind == "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has none.")
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: no")


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


RUNS = []  # of this process
HERE = SimpleNamespace(setattr=setattr)  # this process is the patch's whole life


def now():
    """State of the process's run, -1 before it has one."""
    return RUNS[0].progress.state if RUNS and hasattr(RUNS[0], "progress") else -1


def at(point, state, count, act, *details):
    """Let `act(*details)` happen before the count-th call of `point` in `state`, once.

    `point` is a method of the run or of a state's training ("cut", or "cut done" for the moment after it), a function
    of the entry, "os.replace" (of any file, or "os.replace best.pt"), "os.fsync", "os.mkdir", "open" (of a file to
    write to) or "write", where half of what was to be written is on disk already.
    """
    left = [count]

    def arrive(*_):
        if now() == state:
            left[0] -= 1
            if left[0] == 0:
                act(*details)

    class HalfWritten:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            half = len(data) // 2
            self.file.write(data[:half])
            self.file.flush()
            arrive()
            return half + self.file.write(data[half:])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def opened(path, mode="r", *more):
        if "w" not in mode:
            return open(path, mode, *more)
        if point == "open":
            arrive()
        return HalfWritten(open(path, mode, *more)) if point == "write" else open(path, mode, *more)

    def before(module, name, target=""):
        original = getattr(module, name)

        def call(*arguments, **named):
            if not target or Path(arguments[1]).name == target:
                arrive()
            return original(*arguments, **named)

        setattr(module, name, call)

    name, _, rest = point.removeprefix("os.").partition(" ")
    if point in ("open", "write"):
        utils.open = opened
    elif point.startswith("os."):
        before(os, name, rest)
    elif hasattr(Run, name) or hasattr(StateTraining, name):
        wrap(HERE, name, **{"after" if rest else "before": arrive})
    else:
        before(entry, name)


def ignore(name):
    """As shells do with SIGINT for what they start in the background."""
    signal.signal(getattr(signal, name), signal.SIG_IGN)


def draw_in_every_step():
    """Training that draws from all three generators, as dropout and augmentation of one's own would."""

    def draw(training):
        noise = torch.rand(()) + random.random() + np.random.rand() + np.random.randn()
        with torch.no_grad():
            training.network.model.get_parameter("norm.bias").add_(1e-3 * noise)

    wrap(HERE, "step", after=draw)


def without_report():
    """Pictures take longer than these runs."""
    entry.report.write = lambda _: None


def _process(argv, output, patches):
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(output)
    sys.argv = [str(SCRIPT)]
    # whatever the tests were started with: in the background of a script SIGINT is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    models.BUILDERS["vit_micro"] = vit_micro
    os.fsync = lambda _: None  # no power fails here, and a shared disk is slow
    start = Run.__init__
    Run.__init__ = lambda run, *arguments: (RUNS.append(run), start(run, *arguments))[1]
    for patch, *details in patches:
        patch(*details)
    try:
        code = entry.main(argv)
    except Exception:  # as the interpreter would end, so that tests see it
        traceback.print_exc()
        code = 1
    logging.shutdown()
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------- the processes
@pytest.fixture(scope="session")
def server():
    context = multiprocessing.get_context("forkserver")
    # what the command imports late
    context.set_forkserver_preload(
        [__name__, "sklearn.datasets", "timm.data", "torchvision.transforms.v2", "torch._dynamo"]
    )
    with pytest.MonkeyPatch.context() as patch:
        # the server finds the module nowhere else: Python 3.11's does not take over sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [SCRIPT.parent, Path(__file__).parent])))
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
    return context


@pytest.fixture(scope="session")
def launch(server, tmp_path_factory):
    """launch(argv, (at, "cut", 1, 1, kill), ...) -> code (as subprocess gives it), out and err of the process."""

    def start(argv, *patches, report=False):
        output = tmp_path_factory.mktemp("process")
        patches = patches if report else ((without_report,), *patches)
        process = server.Process(target=_process, args=([str(part) for part in argv], output, patches))
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError("the process hangs")
        files = sorted(os.listdir(output))
        out, err = ((output / name).read_text() if name in files else "" for name in ("out", "err"))
        assert set(files) <= {"out", "err"}  # nothing anywhere else
        return SimpleNamespace(code=process.exitcode, out=out, err=err)

    return start


@pytest.fixture(scope="session")
def whole(launch, tmp_path_factory):
    """whole("imp") -> what an unbroken run of this mode ends with, made once."""
    found = {}

    def ending_of(mode, *patches):
        key = (mode, *patches)
        if key not in found:
            folder = tmp_path_factory.mktemp("whole") / "run"
            done = launch([*BASE, *MODES[mode], "--save_dir", folder], *patches)
            assert done.code == 0, done.err
            found[key] = ending(folder)
            shutil.rmtree(folder.parent)
        return found[key]

    return ending_of


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def resume(launch, folder):
    """Go on as the messages say: from the checkpoint; anew where none was written yet."""

    def start(mode, *patches, **options):
        if any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.prev.pt")):
            return launch(["--resume", "--save_dir", folder], *patches, **options)
        anew = ["--overwrite"] if folder.exists() else []
        return launch([*BASE, *MODES[mode], "--save_dir", folder, *anew], *patches, **options)

    return start


@pytest.fixture
def ends_in_one_line(resume, folder, whole):
    """ends_in_one_line((at, ...), named=[...]): a run stops so with code 1, its folder is good, and it goes on."""

    def check(*patches, named, step=None):
        ended = resume(MODE, *patches)
        assert ended.code == 1, ended.err
        lines = ended.err.splitlines()
        assert len(lines) == 1, ended.err
        assert lines[0].startswith("main_imp_fillback.py: ")
        assert all(part in lines[0] for part in named), ended.err
        assert step is None or now_at(folder) == step
        assert_good(folder)
        assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
        assert_finishes_alike(resume(MODE), folder, whole(MODE))

    return check


def plain(content):
    """Nested dicts and lists without times, tensors as type, shape and bits: what `==` can compare."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items() if key not in TIMES}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    if isinstance(content, torch.Tensor):
        return content.dtype, content.shape, content.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return repr(content)


FREE = words(
    "workers device gpu print_freq verbose data save_dir resume checkpoint checkpoint_every config wandb_mode "
    "wandb_project wandb_entity overwrite pruning_times deterministic"
)


def ending(folder):
    """All that a finished run leaves but times, and the flags that may change on resume."""
    checkpoint = load(folder / "checkpoint.pt")
    checkpoint["args"] = {name: value for name, value in checkpoint["args"].items() if name not in FREE}
    checkpoint["run"].pop("wandb_id")
    content = {"checkpoint": checkpoint, "best": load(folder / "best.pt"), "metrics.jsonl": metrics(folder)}
    content |= {path.name: rows_of(path) for path in folder.glob("*.csv")}
    content["model"] = load_file(folder / "model" / "model.safetensors")
    content["parity"] = json.loads((folder / "model" / "parity.json").read_text())
    return plain(content)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def assert_good(folder):
    """What holds in the folder of a run at any moment: files are whole, and a checkpoint loads once there was one."""
    names = set(os.listdir(folder))
    rows = metrics(folder) if "metrics.jsonl" in names else []  # no epoch is over yet
    if len(rows) > 1 or names & {"checkpoint.pt", "checkpoint.prev.pt"}:
        content = load_checkpoint(folder)
        assert all(tensor.isfinite().all() for tensor in content["weights"].values())
        assert [(row["state"], row["epoch"]) for row in rows] == list(epochs_of(folder))[: len(rows)]
        # an epoch has its line before its checkpoint, which is written while the next epoch runs
        assert 0 <= len(rows) - len(content["run"]["history"]) <= 2
    for name in names:
        if name.endswith(".pt"):
            utils.load_tensors(folder / name, name)  # its seal is whole
        if name.endswith(".csv"):
            assert all(None not in row and None not in row.values() for row in rows_of(folder / name))
    if "args.yaml" in names:
        assert yaml.safe_load((folder / "args.yaml").read_text())["dataset"] == "digits"


def epochs_of(folder):
    dense = yaml.safe_load((folder / "args.yaml").read_text())["struct"] == "dense"
    return itertools.product(range(1 if dense else STATES), range(EPOCHS * (STATES if dense else 1)))


def assert_finishes_alike(done, folder, expected):
    assert (done.code, done.err) == (0, "")
    assert not [name for name in os.listdir(folder) if name.startswith(".") or "new" in name]
    assert [(row["state"], row["epoch"]) for row in metrics(folder)] == list(epochs_of(folder))
    assert_same_bits(ending(folder), expected)


def now_at(folder):
    """State and step of the latest checkpoint; -1 without any."""
    names = [name for name in ("checkpoint.pt", "checkpoint.prev.pt") if (folder / name).exists()]
    run = load(folder / names[0])["run"] if names else {"state": -1, "step": -1}
    return run["state"], run["step"]


# -------------------------------------------------------------------------------------------------------------- kills
# Moments in the order in which a run meets them: a method or a call of the system, the state, and which call in it,
# counted from where the process before was killed. Checkpoints are written after steps 2, 3, 4, 6, 8 and 9 of a state,
# each by three calls of os.replace: the new file, the old one aside, the new one in its place. In the state that begins
# step 2 is on the ramp and step 3 of a resumed one after the cut; "end_state done" has its checkpoint under way.
KILLS = """write 0 2, step 0 2, os.replace 0 1, step 0 5, write 0 9, end_epoch 0 1, end_state 0 1, begin_state 1 1,
begin_state done 1 1, step 1 2, os.replace 1 2, os.replace 1 3, cut 1 1, cut done 1 1, os.fsync 1 2, step 1 3,
write 1 30, end_epoch done 1 1, end_epoch done 1 1, end_state done 2 1, begin_state 2 1, os.replace 2 1, step 2 3,
cut 2 1, os.replace best.pt 2 1, os.replace checkpoint.pt 2 1, os.replace checkpoint.prev.pt 2 1, end_state 2 1,
hand_over 3 1, write 3 2"""
FIVE = "os.replace 0 6, begin_state 1 1, cut done 1 1, os.replace checkpoint.pt 2 1, write 2 30"
REST = "step 0 5, end_state 0 1, write 1 30, os.replace 1 8, step 2 4"
OTHERS = set(MODES) - {MODE, "dense"}
DENSE = "step 0 5, os.replace 0 5, write 0 30, os.fsync 0 5, end_epoch 0 3"


@pytest.mark.parametrize(("mode", "kills"), [
    (MODE, FIVE), ("emptied", "step 1 4"), slow(MODE, KILLS), slow("dense", DENSE),
    *(slow(mode, REST) for mode in OTHERS),
])  # fmt: skip
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(mode, kills, folder, resume, whole):
    for moment in kills.split(","):
        point, state, count = moment.strip().rsplit(" ", 2)
        killed = resume(mode, (at, point, int(state), int(count), kill))
        assert (killed.code, killed.err) == (-signal.SIGKILL, ""), moment
        assert_good(folder)
    assert_finishes_alike(resume(mode), folder, whole(mode))


def test_an_older_checkpoint_without_moments_of_what_never_had_a_gradient_goes_on(folder, resume, whole):
    assert resume("emptied", (at, "step", 1, 4, kill_when_written)).code == -signal.SIGKILL
    content = load(folder / "checkpoint.pt")
    kept = {number: entry for number, entry in content["moments"].items() if entry["step"] > 0}
    assert 0 < len(kept) < len(content["moments"])
    utils.save_tensors(folder / "checkpoint.pt", {**content, "moments": kept})
    assert_finishes_alike(resume("emptied"), folder, whole("emptied"))


# ------------------------------------------------------------------------------------------------- writes that fail
# where it fails, as in KILLS: from the first file of a run to the model that comes out; "write 1 9" is in torch.save
WRITES = {"open": "EROFS", "write": "ENOSPC", "os.fsync": "EIO", "os.replace": "EIO"}
FAULTS = [*itertools.product(WRITES, range(STATES), range(1, 9)), *itertools.product(WRITES, [STATES], [5])]


@pytest.mark.parametrize(("point", "state", "count"), [
    ("write", 0, 1), ("os.replace", 0, 1), ("write", 1, 9), ("os.mkdir", STATES, 1), slow("write", 1, 40),
    *(slow(*fault) for fault in FAULTS),
])  # fmt: skip
def test_a_write_that_fails_is_one_line_and_loses_nothing(point, state, count, folder, ends_in_one_line):
    name = WRITES.get(point, "ENOSPC")
    named = ["error: ", os.strerror(getattr(errno, name)), str(folder)]
    ends_in_one_line((at, point, state, count, fail, name), named=named)


@pytest.mark.slow
def test_a_report_that_cannot_be_written_costs_a_line_of_the_log(folder, launch):
    flags = [*BASE, "--struct", "imp", "--no-export", "--save_dir", folder]
    done = launch(flags, (at, "os.replace report.md", STATES, 1, fail, "EIO"), report=True)
    assert (done.code, done.err) == (0, "")
    assert "Input/output error" in (folder / "run.log").read_text()
    assert not (folder / "report.md").exists()


@pytest.mark.parametrize("size", [20_000, slow(3_000), slow(100_000)])
def test_a_disk_that_is_full_from_some_step_on_is_one_line_and_loses_nothing(size, folder, ends_in_one_line):
    """The system itself refuses to let a file grow: before, within and behind the archive of tensors."""
    ends_in_one_line((at, "step", 1, 4, limit_file_size, size), named=["File too large", str(folder)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_a_log_that_cannot_grow_costs_nothing_else(folder, resume, whole):
    resume(MODE, (at, "step", 1, 4, kill))
    (folder / "run.log").unlink()
    (folder / "run.log").symlink_to("/dev/full")
    assert_finishes_alike(resume(MODE), folder, whole(MODE))


# ------------------------------------------------------------------------------------------------------------ signals
NOTE = "{}: stopping after this step; a second one stops at once\n"
IGNORED = ((ignore, "SIGINT"),)


@pytest.mark.parametrize(("name", "point", "state", "step", "before"), [
    # the fifth step is done, and written
    ("SIGINT", "step", 1, (1, 5), IGNORED), slow("SIGINT", "step", 1, (1, 5), ()),
    ("SIGTERM", "cut", 1, (1, 4), ()), ("SIGUSR1", "end_state", 1, (2, 0), ()),
    slow("SIGUSR1", "begin_state", 1, (1, 1), ()), slow("SIGTERM", "end_epoch", 0, (0, 3), ()),
    slow("SIGINT", "end_state done", STATES, (3, 0), ()),
])  # fmt: skip
def test_a_signal_ends_the_step_writes_the_checkpoint_and_says_how_to_go_on(
    name, point, state, step, before, folder, resume, whole
):
    stopped = resume(MODE, *before, (at, point, state, 5 if point == "step" else 1, send, name))
    assert stopped.code == 128 + getattr(signal, name), stopped.err
    note, line = stopped.err.splitlines(keepends=True)
    assert note == NOTE.format(name)
    assert f"stopped by {name} with a checkpoint; go on with --resume --save_dir {folder}" in line
    assert now_at(folder) == step
    assert_good(folder)
    assert_finishes_alike(resume(MODE), folder, whole(MODE))


@pytest.mark.parametrize(("name", "code", "before"), [
    ("SIGINT", 130, ()), ("SIGINT", 130, IGNORED), ("SIGTERM", -15, ()), ("SIGUSR1", -10, ((ignore, "SIGUSR1"),)),
])  # fmt: skip
def test_a_second_signal_stops_at_once(name, code, before, folder, resume):
    stopped = resume(MODE, *before, (at, "step", 1, 6, send, name, name))
    assert stopped.code == code, stopped.err
    note, *lines = stopped.err.splitlines(keepends=True)
    assert note == NOTE.format(name)
    assert len(lines) == (1 if name == "SIGINT" else 0), stopped.err
    assert (1, 3) <= now_at(folder) <= (1, 4)  # the step that was under way is lost
    assert_good(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "disposition"), [
    ("SIGINT", 130, signal.SIG_IGN), ("SIGINT", 130, signal.SIG_DFL), ("SIGTERM", 143, signal.SIG_DFL),
    ("SIGUSR1", 138, signal.SIG_DFL),
])  # fmt: skip
def test_a_signal_from_outside_stops_the_command_itself(name, code, disposition, tmp_path):
    """Also where it was ignored from the start, as SIGINT is for what a script starts in the background."""
    command = [sys.executable, SCRIPT, *TINY, "--save_dir", tmp_path / "run"]
    process = subprocess.Popen(
        list(map(str, command)), preexec_fn=lambda: signal.signal(getattr(signal, name), disposition),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    next(line for line in process.stdout if "state 0 epoch 2/50 batch 1" in line)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    note, line = err.splitlines(keepends=True)
    assert note == NOTE.format(name)
    assert f"--resume --save_dir {tmp_path / 'run'}" in line
    assert len([line for line in out.splitlines() if " batch " in line]) <= 3  # no further than the steps under way
    state, step = now_at(tmp_path / "run")
    assert state == 0
    assert step >= 4


# ------------------------------------------------------------------------------------- what the device or flags refuse
@pytest.mark.parametrize("kind", ["cuda", slow("cpu")])
def test_running_out_of_memory_says_what_to_change(kind, ends_in_one_line):
    named = ["--batch_size 20", "--accum_steps 1", "--amp off"]
    ends_in_one_line((at, "mask_gradients", 1, 6, out_of_memory, kind), named=named, step=(1, 4))


@pytest.mark.parametrize(("state", "step"), [(1, 4), (0, 2)])
def test_a_second_process_on_the_folder_of_a_run_is_refused(state, step, folder, launch, whole):
    """With a checkpoint and without; the lock ends with its owner, and what the second one found is unchanged."""
    auto = [*BASE, *MODES["imp"], "--resume", "auto", "--save_dir", folder]
    assert launch(auto, (at, "step", state, step, kill)).code == -signal.SIGKILL
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}
    lock = RunLock(folder)
    for argv in (auto, *([["--resume"], [*BASE, "--overwrite"]] if state else [])):
        refused = launch([*argv, "--save_dir", folder])
        assert refused.code == 2
        assert refused.err.count("\n") == 1, refused.err
        assert f"--save_dir {folder}: process {os.getpid()} on {socket.gethostname()}" in refused.err
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"} == before
    lock.release()
    assert_finishes_alike(launch(auto), folder, whole("imp"))


# ----------------------------------------------------------------------------------------------------- what resumes
def test_all_random_generators_go_on_where_they_were(folder, resume, whole):
    noisy = (draw_in_every_step,)
    assert resume(MODE, noisy, (at, "end_epoch done", 1, 2, kill_when_written)).code == -signal.SIGKILL
    assert set(load(folder / "checkpoint.pt")["random"]) >= {"python", "numpy", "torch"}
    done, expected = resume(MODE, noisy), whole(MODE, noisy)
    assert_finishes_alike(done, folder, expected)
    assert repr(expected) != repr(whole(MODE))  # the draws had an effect


def test_an_older_checkpoint_file_goes_on_to_the_same_end(folder, resume, launch, whole):
    """Determinism asked for changes no bit on the CPU, where one thread is deterministic anyway."""
    launch([*BASE, *MODES[MODE], "--deterministic", "--save_dir", folder], (at, "end_state", 1, 1, kill_when_written))
    older = shutil.copy(folder / "checkpoint.pt", folder / "older.pt")
    assert_finishes_alike(resume(MODE), folder, whole(MODE))
    done = launch(["--checkpoint", older])
    assert (done.code, done.err) == (0, "")
    assert "resumed at state 1, step 9" in done.out
    # the best model of that state is gone: its last one is tested, and the log says so
    assert "best.pt is of another epoch" in done.out
    found, expected = ending(folder), copy.deepcopy(whole(MODE))
    assert found["states.csv"][1]["best_epoch"] == repr(str(EPOCHS - 1))
    for tables in (found, expected):
        for row in (tables["states.csv"][1], tables["checkpoint"]["run"]["states"][1]):
            del row["test_accuracy"], row["best_epoch"], row["best_accuracy"]
    assert_same_bits(found, expected)


@pytest.mark.parametrize(("point", "count"), [("step", 5), ("end_state", 1)])
def test_weights_and_tables_tell_of_one_epoch_where_the_best_model_was_lost(point, count, folder, resume):
    """As where a kill and a device that rounds otherwise left a best.pt of an epoch that no table has."""
    assert resume("imp", (at, point, 2, count, kill_when_written)).code == -signal.SIGKILL
    best = load(folder / "best.pt")
    foreign = {name: torch.zeros_like(tensor) for name, tensor in best["weights"].items()}
    utils.save_tensors(folder / "best.pt", {**best, "weights": foreign, "epoch": 1, "accuracy": 0.999})
    assert resume("imp").code == 0
    best, row = load(folder / "best.pt"), rows_of(folder / "states.csv")[2]
    assert (str(best["epoch"]), str(best["accuracy"])) == (row["best_epoch"], row["best_accuracy"])
    assert best["accuracy"] == metrics(folder)[2 * EPOCHS + best["epoch"]]["val_accuracy"]
    assert any(tensor.any() for tensor in best["weights"].values())


@pytest.mark.parametrize("struct", ["imp", slow("refill --vit_structured --ratio_schedule constant")])
def test_a_finished_run_goes_on_with_more_states(struct, tmp_path, launch):
    flags = [*BASE, "--struct", *struct.split()]
    assert launch([*flags, "--save_dir", tmp_path / "long"]).code == 0
    assert launch([*flags, "--pruning_times", "2", "--save_dir", tmp_path / "short"]).code == 0
    longer = launch(["--resume", "--save_dir", tmp_path / "short", "--pruning_times", "3"])
    assert (longer.code, longer.err) == (0, "")
    assert_same_bits(ending(tmp_path / "short"), ending(tmp_path / "long"))
    assert yaml.safe_load((tmp_path / "short" / "args.yaml").read_text())["pruning_times"] == 3
    shorter = launch(["--resume", "--save_dir", tmp_path / "short", "--pruning_times", "2"])
    assert shorter.code == 2
    assert "--pruning_times 2" in shorter.err


def test_a_run_resumes_with_other_free_flags(folder, resume, launch, whole):
    resume(MODE, (at, "step", 1, 4, kill))
    free = words("--workers 2 --device auto --print_freq 1 --checkpoint_every 5m --wandb_mode auto --verbose")
    assert_finishes_alike(launch(["--resume", "--save_dir", folder, *free]), folder, whole(MODE))


def test_a_run_killed_before_its_first_checkpoint_says_how_to_start_again(folder, launch, resume):
    assert resume("imp", (at, "step", 0, 2, kill)).code == -signal.SIGKILL
    refused = launch(["--resume", "--save_dir", folder])
    assert refused.code == 2
    assert refused.err.count("\n") == 1, refused.err
    assert str(folder) in refused.err
    assert "--overwrite" in refused.err  # without it the folder holds another run


# ---------------------------------------------------------------------------------------------- nobody reads its output
def test_a_run_goes_on_in_its_log_when_nobody_reads_its_output(tmp_path, folder):
    """As with `| head -1`, in a terminal that knows only ASCII, without git: the log file has it all."""
    folder = tmp_path / "\u00e4\u2713"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "PATH": str(tmp_path)}
    flags = words("--dataset digits --arch vit_mini --img_size 8 --device cpu --amp off --train_limit 40 --epochs 1")
    flags += words("--pruning_times 1 --warmup 0 --no-export")
    command = [sys.executable, SCRIPT, *flags, "--save_dir", folder]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert (process.wait(timeout=120), err) == (0, b"")
    assert first.startswith(b"rsst on vit_mini")
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert log.count("standard output is gone; the program goes on") == 1
    assert f"files in {folder}" in log
    assert "state 0 done" in log
    assert json.loads((folder / "environment.json").read_text())["commit"] is None


@pytest.mark.parametrize("argv", ["--help", "--dataset digits --dry_run", "--lr 0"])
@pytest.mark.parametrize("commands", [entry.main, export.main, report.main], ids=["run", "export", "report"])
def test_commands_keep_their_exit_code_without_a_reader(commands, argv):
    codes = []
    for reader in (True, False):
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name in ("stdout", "stderr"):
                read, write = map(stack.enter_context, map(open, os.pipe(), ("rb", "w")))
                for place in (name, f"__{name}__"):
                    patch.setattr(sys, place, write)
                if not reader:
                    read.close()
            try:
                codes.append(commands(words(argv)))
            except SystemExit as leaving:
                codes.append(leaving.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
    expected = 0 if argv == "--help" or (commands is entry.main and "dry" in argv) else 2
    assert codes == [expected, expected]
