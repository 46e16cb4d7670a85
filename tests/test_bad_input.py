"""Laws of refusal: whatever is wrong with flags, files or the machine, it is one line, and nothing is left behind.

Commands go through `main([...])`; damaged files are those of a real run that was broken off.
"""

import argparse
import contextlib
import copy
import gzip
import io
import itertools
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from micro import vit_micro

import main_imp_fillback as entry
import models
import utils
from dataset import DATASETS
from vit_structured_pruning import CRITERIA

SCRIPT = Path(__file__).resolve().parent.parent / "main_imp_fillback.py"
words = str.split
BASE = words(
    "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.4 --checkpoint_every 2 --no-export"
)


@pytest.fixture(autouse=True)
def _in_house(house, monkeypatch):
    monkeypatch.setattr(entry.report, "write", lambda _: None)  # pictures take longer than these runs


def call(argv):
    """Exit code, standard output and standard error of the command, in this process; warnings are errors of it, too."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(record=True) as seen:
        for category in (UserWarning, RuntimeWarning, FutureWarning):
            warnings.simplefilter("always", category)
        try:
            code = entry.main([str(part) for part in argv])
        except SystemExit as stop:
            code = stop.code
    said = "".join(f"{found.category.__name__}: {found.message}\n" for found in seen)
    return code, out.getvalue(), said + err.getvalue()


def assert_one_line(err):
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert re.match(r"\S+: error: \S", err), err


def content_of(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def assert_refused(argv, *named, folder=None):
    """Exit code 2, one line that holds each of `named`, `folder` and the current folder as they were."""
    before = content_of(folder) if folder else {}
    code, _, err = call(argv)
    assert code == 2, err
    assert_one_line(err)
    assert all(part in err for part in named), err
    assert (content_of(folder) if folder else {}) == before
    assert os.listdir() == []


class Payload:
    """Unpickled, it makes a file in the current folder."""

    def __reduce__(self):
        return (open, ("payload_ran", "w"))


# --------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--accum_steps 0", "--accum_steps 0"),
        ("--accum_steps -2", "--accum_steps -2"),
        *[(f"--checkpoint_every={value}", "--checkpoint_every") for value in ("0", "-5", "0m", "m", "10s", "1.5", "")],
        ("--vit_structured --arch res20s", "--vit_structured"),
        ("--vit_structured --arch vit_odd", "--arch vit_odd|dim 24 .* 5 heads"),
        ("--arch res20s --patch_size 4", "--patch_size 4"),
        ("--arch res20s --pretrained", "--pretrained"),
        ("--reg_form gradient --reg_finish nan", "--reg_finish nan"),
        ("--decreasing_lr ,", "--decreasing_lr ,"),
        ("--decreasing_lr 1,,2", "--decreasing_lr 1,,2"),
        ("--decreasing_lr 1,2,2", "--decreasing_lr 1,2,2"),
        ("--weight_decay nan", "--weight_decay nan"),
        ("--clip_grad nan", "--clip_grad nan"),
        ("--val_fraction nan", "--val_fraction nan"),
        ("--opt lion", "--opt lion"),
        ("--sched step", "--sched step"),
        ("--wandb_mode sometimes", "--wandb_mode sometimes"),
        ("--device tpu", "--device tpu"),
        ("--resume --checkpoint none.pt", "none.pt"),
        ("--resume --save_dir none", "none"),
        ("--config none.yaml", "--config none.yaml"),
        ("--config .", "--config ."),
        ("--save_dir /proc/run", "--save_dir /proc/run"),
        ("--init .", r"--init|\."),
    ],
)  # fmt: skip
def test_more_bad_flags_are_one_line_that_names_them(flags, named, monkeypatch):
    odd = lambda **given: vit_micro(**{**given, "num_heads": 5})  # noqa: E731
    monkeypatch.setitem(models.BUILDERS, "vit_odd", odd)
    argv = flags.split()
    code, _, err = call([*BASE, *argv] if "--resume" not in argv else argv)
    assert code == 2, err
    assert_one_line(err)
    # argparse writes "argument --opt: invalid choice: 'lion'"
    assert all(part in err for part in named.split()) or re.search(named, err), err
    assert os.listdir() == []


def write_fashion(folder, labels, truncate=None):
    """Fashion-MNIST's four files with a blank image for each label."""
    folder.mkdir()
    header = struct.pack(">IIII", 2051, len(labels), 28, 28)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(784 * len(labels))))
        found = gzip.compress(struct.pack(">II", 2049, len(labels)) + bytes(labels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(found[:truncate])


@pytest.mark.parametrize(
    ("labels", "truncate", "named"), [([0, 5, 10], None, "label 10"), ([0, 1, 2], 12, "labels-idx1"), ([], None, "")]
)
def test_damaged_data_is_one_line(labels, truncate, named, tmp_path):
    write_fashion(tmp_path / "data", labels, truncate)
    flags = [
        "--dataset",
        "fashionmnist",
        "--data",
        tmp_path / "data",
        "--device",
        "cpu",
        "--save_dir",
        tmp_path / "run",
    ]
    assert_refused(flags, named, str(tmp_path / "data"), folder=tmp_path / "data")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)], ids=str)
def test_a_folder_that_cannot_be_written_is_one_line(flags, broken, monkeypatch, tmp_path):
    """As a read-only disk says it; file modes do not stop root."""

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "unlink", "replace", "rename"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    folder = broken if flags else tmp_path / "new"
    argv = [*flags, "--save_dir", folder]
    argv = argv if "--resume" in flags else [*BASE, *argv]
    assert_refused(argv, f"--save_dir {folder}", "Read-only file system", folder=folder)


def command(*argv, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--rate 1", "--decreasing_lr 9,3 --epochs 10", "--accum_steps 0", "--checkpoint_every never", "--device cuda",
        "--vit_structured --arch res20s", "--config none.yaml", "--checkpoint none.pt", "--resume", "--img_size 33",
        "--save_dir /dev/null/run --dataset digits",
    ],
)  # fmt: skip
def test_the_command_itself_refuses_in_one_line(flags):
    done = command("--dataset", "digits", *flags.split(), cwd=".")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.match(rf"main_imp_fillback.py: error: .*{flags.split()[0].strip('-')}", done.stderr), done.stderr
    assert os.listdir() == []


# ------------------------------------------------------------------------------------------------------ config files

CONFIGS = {
    "no YAML": (b"epochs: [1", "not a YAML file"),
    "no text": (bytes(range(256)), "not a YAML file"),
    "tabs": (b"epochs:\n\t- 3", "not a YAML file"),
    "empty": (b"", "must hold flags"),
    "list": (b"- epochs\n- 3", "must hold flags"),
    "number": (b"3", "must hold flags"),
    "two documents": (b"epochs: 3\n---\nepochs: 4", "not a YAML file"),
    "unknown flag": (b"epoch: 3", "'epoch'"),
    "flag with dashes": (b"--epochs: 3", "'--epochs'"),
    "number as flag": (b"3: epochs", "unknown flag 3"),
    "config in config": (b"config: other.yaml", "'config'"),
    "help": (b"help: true", "'help'"),
    "word for number": (b"epochs: many", "many"),
    "fraction for count": (b"epochs: 2.5", "2.5"),
    "mapping": (b"epochs: {a: 1}", "{'a': 1}"),
    "date": (b"seed: 2024-02-03", "2024-02-03"),
    "word for switch": (b"fc: often", "often"),
    "number for switch": (b"resume: 3", "3"),
    "no value for count": (b"epochs: true", "True"),
    "bad choice": (b"struct: hard", "hard"),
    "value out of range": (b"rate: 1.5", "--rate 1.5"),
    "list of lists": (b"decreasing_lr: [[1], [2]]", "decreasing_lr"),
    "code": (b"epochs: !!python/object/apply:os.mkdir ['payload_ran']", "not a YAML file"),
    "code as list": (b"!!python/object/new:os.system ['touch payload_ran']", "not a YAML file"),
    "nested deep": (b"[" * 2_000, "not a YAML file"),
    "cycle": (b"decreasing_lr: &a [*a]", "decreasing_lr"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_bad_config_files_are_one_line(kind, tmp_path):
    content, named = CONFIGS[kind]
    path = tmp_path / "flags.yaml"
    path.write_bytes(content)
    assert_refused(["--config", path, *BASE[:4], "--dry_run"], named)


@settings(max_examples=60, deadline=None, database=None)
@given(content=st.binary(max_size=60) | st.text("epochs:rat{}[]- &*!|>'\"#%@,\n0123.", max_size=40).map(str.encode))
def test_no_config_file_ends_in_a_traceback(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    code, out, err = call(["--config", path, *BASE, "--dry_run"])
    if code == 0:
        assert err == ""
        assert "parameters" in out
    else:
        assert code == 2
        assert_one_line(err)


# ------------------------------------------------------------------------------------------------ any flags whatever

WHOLE = st.sampled_from(["-1", "0", "1", "2", "3", "7", "16", "97", "many", "", "1.5", "nan", "1e3"])
FRACTIONS = st.sampled_from(
    ["-0.1", "0", "1e-9", "0.3", "0.5", "0.99", "1", "4", "nan", "inf", "-inf", "1e300", "x", ""]
)
TEXTS = st.sampled_from(["", " ", "a", "a b", "none.pt", "\u00e4\u2713", "%s", "{}", "-", "--", "\t\n", "0"])
MILESTONES = st.sampled_from(["", "1", "60,90", "90,60", "1,1", "a", "1,", ",", "0,2", "1.5", "-1", "1,2,3", " 1, 2 "])
ARCHS = ["vit_micro", "vit_tiny", "res20s", "timm/vit_tiny_patch16_224", "timm/deit_tiny_patch16_224", "timm/resnet18"]
ARCHS += ["timm/", "timm/none", "vit_huge", ""]
VALUES = {
    "dataset": st.sampled_from([*DATASETS, "mnist", ""]),
    "arch": st.sampled_from([*ARCHS, *models.BUILDERS]),
    "criteria": st.sampled_from([*CRITERIA, "taylor", ""]),
    "decreasing_lr": MILESTONES,
    "checkpoint_every": st.sampled_from(["1", "50", "10m", "0", "m", "1h", "-3"]),
    "img_size": st.sampled_from(["8", "16", "28", "32", "224", "0", "-8", "17", "x"]),
    "patch_size": st.sampled_from(["1", "2", "4", "7", "8", "16", "0", "-4", "5", "x", "1000"]),
}


def flags_of(action):
    """One flag of the command line with a value that may be bad."""
    options = st.sampled_from(action.option_strings)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return options.map(lambda option: [option])
    if action.dest in VALUES:
        values = VALUES[action.dest]
    elif action.choices:
        values = st.sampled_from([*map(str, action.choices), "nonsense"])
    else:
        values = {int: WHOLE, float: FRACTIONS}.get(action.type, TEXTS)
    given_one = st.tuples(options, values).map(lambda pair: [f"{pair[0]}={pair[1]}"])
    return given_one | options.map(lambda option: [option])


def draw_flags():
    actions = [action for action in entry.build_parser()._actions if action.dest != "help"]
    common = [action for action in actions if action.dest in ("arch", "struct", "vit_structured", "dataset")]
    some = st.lists(st.sampled_from(actions).flatmap(flags_of), max_size=6)
    few = st.lists(st.sampled_from(common).flatmap(flags_of), max_size=3)
    return st.tuples(few, some).map(lambda lists: [part for flags in lists for flag in flags for part in flag])


def check_plan_or_refusal(argv):
    code, out, err = call([*argv, "--dry_run"])
    if code == 0:
        assert err == ""
        assert re.search(r"[\d,]+ parameters, [\d,]+ of them prunable", out)
        assert "MB of disk" in out
    else:
        assert code == 2, (code, err)
        assert_one_line(err)
        assert out == ""
    assert os.listdir() == []


quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=quiet)
@given(argv=draw_flags())
def test_any_flags_plan_or_are_refused_in_one_line(argv):
    check_plan_or_refusal(argv)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, database=None, suppress_health_check=quiet)
@given(argv=draw_flags())
def test_very_many_flags_plan_or_are_refused_in_one_line(argv):
    check_plan_or_refusal(argv)


@pytest.mark.parametrize("arch", [*models.BUILDERS, "vit_micro"])
def test_every_architecture_has_a_plan(arch):
    argv = ["--dataset", "cifar10", "--arch", arch, "--dry_run"]
    if arch == "vit_micro":
        argv += ["--img_size", "32"]
    code, out, err = call(argv)
    assert (code, err) == (0, "")
    assert "20 states" in out


# -------------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="session")
def broken_once(tmp_path_factory):
    """The folder of a structured run that Ctrl-C stopped in state 1, after its cut."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    step = entry.PruneRetrain.train_step

    def stop(job, *where):
        if (job.run.state, job.run.step) == (1, 5):
            raise KeyboardInterrupt
        step(job, *where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry.PruneRetrain, "train_step", stop)
        patch.setitem(models.BUILDERS, "vit_micro", vit_micro)
        flags = ("--struct", "rsst", "--vit_structured", "--vit_prune_target", "both", "--workers", "0")
        code, _, err = call([*BASE, *flags, "--save_dir", folder])
    assert code == 130, err
    assert {"checkpoint.pt", "checkpoint.prev.pt", "init.pt", "best.pt"} <= set(os.listdir(folder))
    return folder


@pytest.fixture
def broken(broken_once, tmp_path):
    return Path(shutil.copytree(broken_once, tmp_path / "run"))


def only_checkpoint(folder, content):
    """Let this be the only checkpoint, validly sealed."""
    (folder / "checkpoint.prev.pt").unlink(missing_ok=True)
    utils.save_tensors(folder / "checkpoint.pt", content)


@pytest.fixture(scope="session")
def sealed(broken_once):
    """The bytes of a checkpoint, and what they hold."""
    path = broken_once / "checkpoint.pt"
    return path.read_bytes(), utils.load_tensors(path, "--checkpoint")


def same(one, other):
    if isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(other, dict):
        return isinstance(one, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    if isinstance(other, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def load_or_refuse(path, data):
    """What a file of these bytes holds, or None when it is refused."""
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return utils.load_tensors(path, "--checkpoint")
        except utils.RunError as error:
            reason = str(error)
    assert "\n" not in reason
    assert str(path) in reason
    return None


@settings(max_examples=150, deadline=None, database=None)
@given(st.data())
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(sealed, tmp_path_factory, data):
    whole, content = sealed
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    found = load_or_refuse(tmp_path_factory.getbasetemp() / "flipped.pt", bytes(changed))
    assert found is None or same(found, content)
    if bit // 8 < len(whole) - 73:  # within the archive; behind it are 9 bytes and 64 digits
        assert found is None


@settings(max_examples=100, deadline=None, database=None)
@given(st.data())
def test_a_file_cut_short_anywhere_is_refused_or_holds_everything(sealed, tmp_path_factory, data):
    whole, content = sealed
    length = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 200, len(whole) - 1))
    found = load_or_refuse(tmp_path_factory.getbasetemp() / "short.pt", whole[:length])
    assert found is None or same(found, content)
    if length < len(whole) - 100:
        assert found is None


@settings(max_examples=60, deadline=None, database=None)
@given(st.binary(max_size=200))
def test_no_bytes_load_as_a_checkpoint(tmp_path_factory, data):
    assert load_or_refuse(tmp_path_factory.getbasetemp() / "junk.pt", data) is None


class Legacy:
    def __init__(self):
        self.payload = Payload()


def payloads(folder):
    """Files that run code when they are loaded carelessly."""
    utils.save_tensors(folder / "sealed.pt", {"run": Payload()})
    torch.save({"args": {}, "run": {"state": Payload()}}, folder / "zip.pt")
    torch.save({"run": Payload()}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    for protocol in (0, 2, 4):
        (folder / f"pickle{protocol}.pt").write_bytes(pickle.dumps({"run": Payload()}, protocol=protocol))
    return sorted(folder.glob("*.pt"))


def test_no_file_runs_code(broken, tmp_path):
    folder = tmp_path / "payloads"
    folder.mkdir()
    for path in payloads(folder):
        for flag in ("--checkpoint", "--init"):
            assert_refused([flag, path, *(BASE if flag == "--init" else [])], flag, str(path), folder=folder)
        for name in ("checkpoint.pt", "init.pt"):
            victim = shutil.copytree(broken, tmp_path / "victim", dirs_exist_ok=True)
            (victim / "checkpoint.prev.pt").unlink(missing_ok=True)
            shutil.copy(path, victim / name)
            assert_refused(["--resume", "--save_dir", victim], str(victim), folder=victim)
            shutil.rmtree(victim)


@pytest.mark.parametrize("damage", ["half", "bit", "empty", "payload", "gone"])
def test_a_damaged_checkpoint_says_that_the_one_before_is_taken(damage, broken, monkeypatch):
    latest = broken / "checkpoint.pt"
    data = bytearray(latest.read_bytes())
    data[len(data) // 3] ^= 4
    before = utils.load_tensors(broken / "checkpoint.prev.pt", "--resume")["run"]
    changed = {"half": data[: len(data) // 2], "bit": data, "empty": b"", "payload": pickle.dumps(Payload())}
    latest.unlink() if damage == "gone" else latest.write_bytes(changed[damage])
    monkeypatch.setattr(entry.PruneRetrain, "__call__", lambda job: job.tracker.finish())
    code, out, err = call(["--resume", "--save_dir", broken])
    assert (code, err) == (0, "")
    assert f"resumed at state {before['state']}, step {before['step']} " in out
    if damage != "gone":
        assert str(latest) in out
        assert "the checkpoint before" in out
    assert os.listdir() == []


WRONG = {
    "None": None,
    "text": "text",
    "negative": -1,
    "fraction": 2.5,
    "not a number": math.nan,
    "list": [1, "a"],
    "mapping": {"a": 1},
    "tensor": torch.ones(2, 2),
}
DELETED = object()


def places(content, into=("run", "args", "moments", "random", "rewind_sha256", "scaler")):
    """Paths of the entries of a checkpoint; of tensors by layer, the first."""
    found = [(key,) for key in content]
    for key in into:
        if isinstance(content[key], dict):
            found += [(key, name) for name in content[key]]
    for name in ("masks", "target", "elementwise", "kept", "target_kept"):
        if isinstance(content["run"][name], str):  # equal to another set
            continue
        layer = next(iter(content["run"][name]))
        found.append(("run", name, layer))
        if isinstance(content["run"][name][layer], dict):
            found += [("run", name, layer, part) for part in ("bits", "shape")]
    found += [("weights", name) for name in list(content["weights"])[:2]]
    found += [("run", "history", 0), ("run", "history", -1), ("run", "states", 0), ("run", "best", "accuracy")]
    found += [("moments", 0), ("moments", 0, "momentum_buffer")]
    return found


def changed(content, path, value):
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


def check_wrong_entry(content, path, value, folder):
    only_checkpoint(folder, changed(content, path, value))
    before = content_of(folder)
    code, _, err = call(["--resume", "--save_dir", folder])
    if code in (0, 130):  # it does no harm: the entry has a default, or says nothing of what is to come
        assert err.count("\n") == (code != 0), err
        return
    assert code == 2, (path, value, err)
    assert_one_line(err)
    assert content_of(folder) == before, [name for name, data in content_of(folder).items() if before.get(name) != data]
    assert os.listdir() == []


def test_wrong_entries_in_a_sound_file_are_one_line(sealed, broken):
    _, content = sealed
    entries = [("run",), ("args",), ("weights",), ("moments",), ("random",), ("rewind_file",), ("args", "epochs")]
    entries += [("moments", 0), ("moments", 0, "momentum_buffer")]
    for path, value in itertools.product(entries, (None, "text", DELETED)):
        if path == ("args", "epochs") and value is DELETED:
            continue  # as in checkpoints that are older than a flag, which then is what it is by default
        only_checkpoint(broken, changed(content, path, value))
        assert_refused(["--resume", "--save_dir", broken], folder=broken)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WRONG, "deleted"])
def test_any_wrong_entry_in_a_sound_file_is_one_line(kind, sealed, broken, monkeypatch):
    step, left = entry.PruneRetrain.train_step, [0]

    def few_steps(job, *where):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        step(job, *where)

    monkeypatch.setattr(entry.PruneRetrain, "train_step", few_steps)
    failures = []
    first = [*WRONG, "deleted"].index(kind) % 4
    for path in places(sealed[1])[first::4]:  # each entry gets two or three of the kinds
        folder = Path(shutil.copytree(broken, broken.parent / "fuzzed"))
        left[0] = 8  # into state 2
        try:
            check_wrong_entry(sealed[1], path, WRONG.get(kind, DELETED), folder)
        except (Exception, pytest.fail.Exception) as error:
            failures.append(f"{path}: {type(error).__name__} {str(error)[:300]}")
        shutil.rmtree(folder)
    assert failures == []


# ------------------------------------------------------------------------------------------------------ flags on resume

FREE = words(
    "workers device gpu print_freq verbose save_dir resume checkpoint data config checkpoint_every wandb_mode "
    "wandb_project wandb_entity dry_run overwrite list_archs help"
)


def another_value(action, stored):
    """Flags that ask for something else than the run was started with."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[1 if stored else 0]]
    if action.nargs == 0:
        return [action.option_strings[0]]
    if action.choices:
        return [action.option_strings[0], next(str(choice) for choice in action.choices if choice != stored)]
    if action.dest == "pruning_times":
        return [action.option_strings[0], "2"]
    if action.type in (int, float):
        return [action.option_strings[0], str(action.type((stored or 0) * 0.5 + 3))]
    return [action.option_strings[0], "other"]


def test_every_other_flag_is_refused_by_name_on_resume(sealed, broken, monkeypatch):
    _, content = sealed
    stored = content["args"]
    monkeypatch.setattr(entry, "load_dataset", lambda *_: pytest.fail("it went on"))
    checked = 0
    for action in entry.build_parser()._actions:
        if action.dest in FREE:
            continue
        flags = another_value(action, stored[action.dest])
        if action.nargs == 0 and stored[action.dest] == action.const:
            continue  # the run was started with it
        assert_refused(["--resume", "--save_dir", broken, *flags], action.dest, folder=broken)
        checked += 1
    assert checked > 50


def test_a_config_file_counts_on_resume_as_flags_do(broken, tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text(yaml.safe_dump({"lr": 0.5}))
    assert_refused(["--resume", "--save_dir", broken, "--config", path], "--lr 0.5", folder=broken)


def test_a_plan_of_a_run_that_resumes_changes_nothing(broken):
    before = content_of(broken)
    code, out, err = call(["--resume", "--save_dir", broken, "--dry_run"])
    assert (code, err) == (0, "")
    assert "3 states" in out
    assert content_of(broken) == before
