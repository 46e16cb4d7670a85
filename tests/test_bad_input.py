"""Laws of refusal: whatever is wrong with flags, files or the machine, it is one line, and nothing is left behind.

Commands go through `main([...])`; damaged files are those of a real run that was broken off.
"""

import builtins
import contextlib
import copy
import functools
import gzip
import io
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from micro import vit_micro
from safetensors.torch import save_file
from test_cnn import res_micro

import main_imp_fillback as entry
import models
import utils
from cli.errors import explain
from dataset import DATASETS
from engine.training import StateTraining
from vit_structured_pruning import CRITERIA

words = str.split
BASE = words(
    "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.4 --checkpoint_every 2 --print_freq 1 --no-export"
)
STRUCTURED = words("--struct rsst --vit_structured --vit_prune_target both --workers 0")


@pytest.fixture(autouse=True)
def _in_house(house, monkeypatch):
    monkeypatch.setitem(sys.modules, "markdown", None)  # no report: pictures take longer than these runs


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
    assert re.fullmatch(r"\S+: error: \S.*\n", err), err


def content_of(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def assert_refused(argv, *named, folder="."):
    """Exit code 2, one line that holds each of `named`, `folder` and the current folder as they were."""
    before = content_of(folder)
    code, _, err = call(argv)
    assert code == 2, err
    assert_one_line(err)
    assert all(part in err for part in named), err
    assert content_of(folder) == before
    assert os.listdir() == []  # nothing is left behind, and no code of a file has run
    return err


class Payload:
    """Unpickled, it makes a file in the current folder."""

    def __reduce__(self):
        return (open, ("payload_ran", "w"))


# --------------------------------------------------------------------------------------------------------- the table

BOTH = "--vit_structured --vit_prune_target both"
FILES = {
    "counts.json": '{"blocks.1.mlp": 7}', "other.json": '{"blocks.9.mlp": 7}', "many.json": '{"blocks.0.attn": 5}',
    "few.json": '{"blocks.0.attn": 0}', "half.json": '{"blocks.0.attn": 0.5}', "text.json": "heads: 3",
    "empty.csv": "state,layer,kept\n", "plain.txt": "a file, no folder", "flat/a.jpg": "", "empty/empty/x": "",
    "damaged.pt": "PK\x03\x04 not a checkpoint",
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Files that a bad command may name."""
    folder = tmp_path / "files"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    torch.save({"head.weight": torch.ones(1)}, folder / "other.pt")
    torch.save([torch.ones(1)], folder / "list.pt")
    torch.save(vit_micro(num_classes=10).state_dict() | {"norm.bias": torch.ones(25)}, folder / "shape.pt")
    for name in ("damaged", "other"):
        (folder / name).mkdir()
        for file in ("checkpoint.pt", "checkpoint.prev.pt"):
            shutil.copy(folder / f"{name}.pt", folder / name / file)
    return folder


# flags -> what the one line has to name when that is not all of them | and this | ! and not this
BAD = """--rate 1; --rate -0.1; --rate nan; --rate much; --mlp_prune_ratio 1; --fillback_rate 1.5; --momentum 1;
--label_smoothing 1; --decreasing_lr 8,4; --decreasing_lr 4,4; --decreasing_lr 0,4; --decreasing_lr 1.5; --lr 0; --lr
nan; --lr inf; --decreasing_lr half; --epochs 0; --epochs 1.5; --batch_size 0; --pruning_times 0; --print_freq 0;
--workers -1; --score_batches 0; --train_limit 0; --val_fraction 0; --val_fraction 1; --val_fraction 0.9999; --gpu -1;
--seed -1; --seed 99999999999999999999; --weight_decay -1; --warmup -1; --clip_grad 0; --reg_granularity_prune 0;
--exponents 0; --reg_finish 0; --reg_finish 1.1; --prune_type rewind_lt --rewind_epoch 2 -> --rewind_epoch 2;
--rewind_epoch -1; --vit_structured --min_units 5 -> --min_units 5; --min_units -1; --dataset mnist; --arch vit_huge;
--criteria taylor; --vit_structured --vit_prune_target mlp --min_units 49 -> --min_units 49; --img_size 17 -> img_size
17; --img_size 0; --patch_size 5 -> patch_size 5; --patch_size 0; --struct hard; --prune_type nothing; --RST_schedule y;
--struct oneshot; --prune_type pt; --reg_clock state; --vit_structured --rank_by score_per_mac -> --rank_by
score_per_mac; --round_to 0; --round_to -8; --vit_structured --vit_prune_target mlp --round_to 49 -> --round_to 49;
--vit_structured --vit_prune_target mlp --round_to 20 --min_units 41 -> --round_to 20 and --min_units 41; --arch res20s
--round_to 17 -> --round_to 17; --device cuda; --amp fp16; --resume; --frobnicate 3 -> --frobnicate; --epoch 3 ->
--epoch; --checkpoint_every 0; --accum_steps 0; --accum_steps -2; --opt lion; --sched step; --reg_form gradient
--reg_finish nan -> nan; --checkpoint_every -5 -> -5; --checkpoint_every 0m -> 0m; --checkpoint_every m ->
--checkpoint_every; --checkpoint_every 10s -> 10s; --checkpoint_every 1.5 -> 1.5; --checkpoint_every= ->
--checkpoint_every; --decreasing_lr , -> ,; --decreasing_lr 1,,2; --decreasing_lr 1,2,2; --weight_decay nan; --clip_grad
nan; --val_fraction nan; --wandb_mode sometimes -> sometimes; --device tpu; --arch res20s --patch_size 4 -> 4; --arch
res20s --pretrained -> --pretrained; --arch res20s --pretrained {files} -> takes weights of a file by --init | ! public;
--arch res20s --vit_structured -> --vit_structured | filters | ! add --vit_structured; --arch res20s --struct oneshot ->
--struct | filters | ! add --vit_structured; --arch res20s --vit_structured --struct oneshot --dry_run ->
--vit_structured | filters | ! add --vit_structured; --vit_structured --arch vit_odd -> dim 24 | 5 heads; --resume
--checkpoint none.pt -> none.pt; --resume --save_dir none -> none; --config none.yaml -> --config none.yaml: No such
file or directory | give a YAML file of flags; --config . -> .; --save_dir /proc/run -> /proc/run; --init . -> .;
--resume --save_dir {files}/none -> {files}/none | is no folder | ! --overwrite; --resume --save_dir {files} -> has no
checkpoint | ! --overwrite; --resume --save_dir {files}/damaged -> {files}/damaged; --resume --save_dir {files}/other ->
{files}/other; --checkpoint {files}/none.pt -> {files}/none.pt; --checkpoint {files}/damaged.pt -> {files}/damaged.pt;
--checkpoint {files}/other.pt -> {files}/other.pt; --init {files}/none.pt; --init {files}/damaged.pt ->
{files}/damaged.pt; --init {files}/list.pt -> {files}/list.pt; --init {files}/other.pt; --init {files}/shape.pt; --init
{files}/plain.txt -> {files}/plain.txt; --init {files}/none.safetensors -> {files}/none.safetensors; --pretrained
{files}/none.pt; --pretrained {files}/damaged.pt -> {files}/damaged.pt; --pretrained {files}/shape.pt; --save_dir
{files}/plain.txt; --exp_name ../../x; --exp_name a/b -> --exp_name; --exp_name . -> --exp_name; --exp_name .. ->
--exp_name; --exp_name= -> --exp_name; --save_dir {files}/plain.txt/below; --dataset fashionmnist --data {files}/none ->
{files}/none; --dataset cifar10 --data {files}/plain.txt -> {files}/plain.txt; --dataset cifar100 -> --dataset cifar100;
--dataset cifar10 --data {files}/none -> --dataset cifar10; --dataset imagenet --data {files}/none -> imagenet |
train/CLASS; --dataset imagenet --data {files}/empty -> imagenet | train/CLASS; --dataset imagenet --data {files}/flat
-> imagenet | train/CLASS; --dataset tiny-imagenet --data {files}/flat -> tiny-imagenet | train/CLASS; --dataset folder
--data {files}/flat -> folder | train/CLASS; --img_size 32x16 -> 32x16 is a rectangle | ! int value; --patch_size 4x2 ->
4x2 is a rectangle | ! int value; --img_size 32y16 -> invalid int value: '32y16' | ! rectangle; --vit_structured
--target_macs 0.5 --pruning_times 1 -> --pruning_times 1 has state 0 alone | ! leave it; --pretrained none.pth --dry_run
-> --pretrained none.pth: no such file | ! architecture; --init none --dry_run -> --init none: no such file | !
architecture; --finish_epochs 0 -> --finish_epochs 0 | 1 or more; --finish_lr 0.1 -> --finish_lr 0.1 | --finish_epochs;
--finish_on_all -> --finish_on_all | --finish_epochs; --finish_epochs 2 --finish_lr inf -> --finish_lr inf | above 0;
--finish_epochs 2 --finish_lr 0.001 --sched cosine --min_lr 0.01 -> --finish_lr 0.001 | --min_lr 0.01; --img_size 32
--token_merge -1 -> --token_merge -1 | must be 0 or more; --img_size 32 --token_merge 9 -> --token_merge 9 | half of the
patches, here 8; --token_merge 2 --arch res20s -> --token_merge 2 | ResNet | not a plain ViT; --token_merge 2 --arch
timm/beit_base_patch16_224 --dry_run -> --token_merge 2 | Beit | not a plain ViT; --arch timm/convnext_atto --struct
rsst {both} --dry_run -> no transformer blocks; --arch timm/naflexvit_base_patch16_gap --struct rsst {both} --dry_run ->
patch embedding; --arch timm/vit_relpos_small_patch16_224 --struct rsst {both} --dry_run -> RelPosAttention; {both}
--target_macs 0 -> --target_macs 0.0; {both} --target_macs 1 -> --target_macs 1.0; {both} --target_params nan ->
--target_params nan; {both} --target_latency_ms 0 -> --target_latency_ms 0.0; {both} --target_macs 0.5 --target_params
0.6 -> --target_params 0.6: a run can have only one target;
{both} --target_macs 0.5 --latency_batch 4 -> --latency_batch 4;
{both} --latency_batch 0 -> --latency_batch 0; --target_macs 0.5 -> --target_macs 0.5: counts whole units | add
--vit_structured; --arch res_micro --struct imp --target_macs 0.5 -> --struct refill or rsst; --arch res_micro
--criteria remain --target_macs 0.5 -> --criteria remain; {both} --target_macs 0.05 -> --target_macs 0.05: 0.3799 of the
MACs stay at least; {both} --min_units 3 --target_params 0.5 -> of the parameters stay at least; --vit_structured
--target_macs 0.5 -> of the MACs stay at least; {both} --ratio_allocation global --sorting_mode layer-wise ->
contradicts --sorting_mode layer-wise; {both} --ratio_allocation none.json -> --ratio_allocation none.json: No such
file; {both} --ratio_allocation {files}/counts.json --target_macs 0.5 -> leave no choice to --target_macs; {both}
--ratio_allocation {files}/other.json -> blocks.9.mlp is no layer; --vit_structured --ratio_allocation
{files}/counts.json -> blocks.1.mlp is no layer; {both} --ratio_allocation {files}/many.json -> blocks.0.attn keeps 1;
{both} --ratio_allocation {files}/few.json -> 4 units, not 0; {both} --ratio_allocation {files}/half.json -> whole
numbers; {both} --ratio_allocation {files}/text.json -> neither JSON nor; {both} --ratio_allocation {files}/empty.csv ->
neither; --vit_structured --vit_prune_target block --struct refill --target_macs 0.5 --dry_run -> --target_macs"""


@pytest.fixture
def no_network(monkeypatch):
    def blocked(*_, **__):
        raise OSError("the test has no network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, blocked)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", re.split("; ", " ".join(BAD.split())))
def test_bad_input_is_one_line_that_names_it(case, files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(models.BUILDERS, "vit_odd", lambda **given: vit_micro(**{**given, "num_heads": 5}))
    monkeypatch.setitem(models.BUILDERS, "res_micro", res_micro)
    flags, _, named = case.format(files=files, both=BOTH).partition("->")
    arch = re.search(r"--arch timm/(\S+)", flags)
    if arch and arch[1] not in timm.list_models():
        pytest.skip(f"this timm has no {arch[1]}")
    named = [part.strip() for part in named.split("|")] if named else []
    base = () if "--resume" in flags or "--checkpoint " in flags else BASE
    fits, never = [part for part in named if part[0] != "!"], [part[2:] for part in named if part[0] == "!"]
    err = assert_refused([*base, *words(flags)], *fits, folder=files)
    assert not any(part in err for part in never), err
    # numbers may be shown as they were read: -0.1, 1.5, 1
    assert named or re.search(".*".join(re.escape(part) + r"\b" for part in words(flags)), err), err


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("flag", ["--init", "--pretrained", "--teacher"])
def test_weights_that_are_not_finite_are_refused_by_name(flag, suffix, tmp_path):
    weights, path = vit_micro(num_classes=10).state_dict(), tmp_path / f"broken.{suffix}"
    weights["blocks.1.mlp.fc1.weight"][3, 4] = float("nan")
    torch.save(weights, path) if suffix == "pth" else save_file(weights, path)
    assert_refused([*BASE, flag, path], f"{flag} {path}", "blocks.1.mlp.fc1.weight holds NaN", folder=tmp_path)


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
    flags = words(f"--dataset fashionmnist --data {tmp_path / 'data'} --device cpu --save_dir {tmp_path / 'run'}")
    assert_refused(flags, named, str(tmp_path / "data"), folder=tmp_path)


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)], ids=str)
def test_a_folder_that_cannot_be_written_is_one_line(flags, broken, monkeypatch, tmp_path):
    """As a read-only disk says it; file modes do not stop root."""

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    really_open = open

    def open_to_read(path, mode="r", *rest, **more):
        return (refuse if set(mode) & set("wax+") else really_open)(path, mode, *rest, **more)

    monkeypatch.setattr(io, "open", open_to_read)
    monkeypatch.setattr(builtins, "open", open_to_read)
    for name in ("mkdir", "unlink", "replace", "rename", "open"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    folder = broken if flags else tmp_path / "new"
    argv = [*([] if "--resume" in flags else BASE), *flags, "--save_dir", folder]
    assert_refused(argv, f"--save_dir {folder}", "Read-only file system", folder=folder)


@contextlib.contextmanager
def signal_at(line, number):
    """Sends this process a signal when its log has a line that begins so."""
    make = logging.getLogRecordFactory()

    def watch(*args, **kwargs):
        record = make(*args, **kwargs)
        if record.getMessage().startswith(line):
            os.kill(os.getpid(), number)
        return record

    logging.setLogRecordFactory(watch)
    yield
    logging.setLogRecordFactory(make)


DRIVER = """
import os, signal, sys
import test_bad_input as t
os.fsync = lambda _: None
t.models.BUILDERS["vit_micro"] = t.vit_micro
with t.signal_at("state 1 epoch 1/2 batch 1/", signal.SIGSTOP):
    sys.exit(t.entry.main(sys.argv[1:]))
"""


@pytest.fixture
def alive(tmp_path):
    """A run in a process of its own that stands still in state 1."""
    here = Path(__file__).resolve().parent
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, *BASE, *STRUCTURED, "--save_dir", tmp_path / "run"]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_whose_run_is_alive_is_refused_until_it_dies(alive, tmp_path):
    folder = tmp_path / "run"
    for argv in (["--resume"], [*BASE, *STRUCTURED, "--overwrite"], ["--checkpoint", folder / "checkpoint.pt"]):
        argv = [*argv, "--save_dir", folder]
        assert_refused(argv, f"--save_dir {folder}", str(alive.pid), socket.gethostname(), folder=folder)
    alive.kill()
    alive.wait()
    assert call(["--resume", "--save_dir", folder])[0] == 0


# ------------------------------------------------------------------------------------------------------ config files

CONFIGS = {
    "no YAML": (b"epochs: [1", "not a YAML file"),
    "no text": (bytes(range(256)), "not a YAML file"),
    "empty": (b"", "must hold flags"),
    "two documents": (b"epochs: 3\n---\nepochs: 4", "not a YAML file"),
    "unknown flag": (b"epoch: 3", "'epoch'"),
    "flag with dashes": (b"--epochs: 3", "'--epochs'"),
    "number as flag": (b"3: epochs", "unknown flag 3"),
    "switch with number": (b"verbose: 1", "verbose"),
    "switch with text": (b"verbose: 'yes'", "verbose"),
    "switch with zero": (b"compact_training: 0", "compact_training"),
    "group of flags": (b"training:\n  epochs: 3", "'training'"),
    "list": (b"- epochs", "must hold flags"),
    "config in config": (b"config: other.yaml", "'config'"),
    "help": (b"help: true", "'help'"),
    "fraction for count": (b"epochs: 2.5", "2.5"),
    "mapping": (b"epochs: {a: 1}", "{'a': 1}"),
    "word for switch": (b"fc: often", "often"),
    "no value for count": (b"epochs: true", "True"),
    "value out of range": (b"rate: 1.5", "--rate 1.5"),
    "list of lists": (b"decreasing_lr: [[1], [2]]", "decreasing_lr"),
    "code": (b"epochs: !!python/object/apply:os.mkdir ['payload_ran']", "not a YAML file"),
    "nested deep": (b"[" * 800, "not a YAML file"),
    "cycle": (b"decreasing_lr: &a [*a]", "decreasing_lr"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_bad_config_files_are_one_line(kind, tmp_path):
    content, named = CONFIGS[kind]
    (tmp_path / "flags.yaml").write_bytes(content)
    assert_refused(["--config", tmp_path / "flags.yaml", *BASE[:4], "--dry_run"], named)


def assert_planned_or_refused(argv):
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


quiet = {"deadline": None, "database": None}
quiet["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=40, **quiet)
@given(content=st.binary(max_size=60) | st.text("epochs:rat{}[]- &*!|>'\"#%@,\n0123.", max_size=40).map(str.encode))
def test_no_config_file_ends_in_a_traceback(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    assert_planned_or_refused(["--config", path, *BASE])


# ------------------------------------------------------------------------------------------------ any flags whatever
@functools.cache
def flags_in_help():
    """(spellings, choices, whether it takes a value) of each flag, from --help."""
    found = []
    for given_as in re.findall(r"^  (--.*?)(?:\s{2,}|$)", call(["--help", "all"])[1], re.MULTILINE):
        choices = re.search(r"\{(.*?)\}", given_as)
        options = re.findall(r"--[\w-]+", given_as)
        found.append((options, choices[1].split(",") if choices else [], " " in given_as.replace(", ", "")))
    return found


NUMBERS = words("-1 0 1 2 3 7 16 97 1.5 1e3 -0.1 1e-9 0.3 0.5 0.99 4 nan inf -inf 1e300 x")
TEXTS = ["", " ", "a b", "none.pt", "\u00e4\u2713", "%s", "{}", "-", "--", "\t\n", "0"]
VALUES = {
    "--dataset": [*DATASETS, "mnist", ""],
    "--arch": [*models.BUILDERS, *words("vit_micro timm/vit_tiny_patch16_224 timm/resnet18 timm/ timm/none vit_huge")],
    "--criteria": [*CRITERIA, "taylor", ""],
    "--decreasing_lr": ["", "1", "60,90", "90,60", "1,1", "a", "1,", ",", "0,2", "1.5", "-1", "1,2,3", " 1, 2 "],
    "--checkpoint_every": words("1 50 10m 0 m 1h -3"),
    "--img_size": words("8 16 28 32 224 0 -8 17 x"),
    "--patch_size": words("1 2 4 7 8 16 0 -4 5 x 1000"),
}


def one_flag(flag):
    """One flag of the command line with a value that may be bad."""
    options, choices, valued = flag
    values = st.sampled_from(VALUES.get(options[0], [*choices, "nonsense"] if choices else NUMBERS + TEXTS))
    given_one = st.tuples(st.sampled_from(options), values).map("=".join)
    return given_one | st.sampled_from(options) if valued else st.sampled_from(options)


@st.composite
def any_flags(draw):
    flags = [flag for flag in flags_in_help() if "--list_archs" not in flag[0]]  # which lists and does not plan
    common = [flag for flag in flags if flag[0][0] in ("--arch", "--struct", "--vit_structured", "--dataset")]
    few = st.lists(st.sampled_from(common).flatmap(one_flag), max_size=3)
    return draw(few) + draw(st.lists(st.sampled_from(flags).flatmap(one_flag), max_size=6))


@settings(max_examples=40, **quiet)
@given(argv=any_flags())
def test_any_flags_plan_or_are_refused_in_one_line(argv):
    assert_planned_or_refused(argv)


# -------------------------------------------------------------------------------------------------- damaged checkpoints
@pytest.fixture(scope="session")
def broken_once(tmp_path_factory):
    """The folder of a structured run that SIGTERM stopped in state 1, after its cut, within an epoch."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    with pytest.MonkeyPatch.context() as patch, signal_at("state 1 epoch 2/2 batch 1/", signal.SIGTERM):
        patch.setitem(models.BUILDERS, "vit_micro", vit_micro)
        patch.setattr(os, "fsync", lambda _: None)  # as in house
        code, _, err = call([*BASE, *STRUCTURED, "--save_dir", folder])
    assert code == 143, err
    assert {"checkpoint.pt", "checkpoint.prev.pt", "init.pt", "best.pt"} <= set(os.listdir(folder))
    return folder


@pytest.fixture
def broken(broken_once, tmp_path):
    return Path(shutil.copytree(broken_once, tmp_path / "run"))


@pytest.fixture(scope="session")
def sealed(broken_once):
    """The bytes of a checkpoint, and what they hold."""
    path = broken_once / "checkpoint.pt"
    return path.read_bytes(), utils.load_tensors(path, "--checkpoint")


def assert_unloadable(path, data):
    """A file of these bytes is refused, silently but for one line that names it."""
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(utils.RunError, match=re.escape(str(path))) as caught:
            utils.load_tensors(path, "--checkpoint")
    assert "\n" not in str(caught.value)


@settings(max_examples=120, **quiet)
@given(st.data())
def test_a_flipped_bit_or_a_cut_anywhere_is_refused(sealed, tmp_path_factory, data):
    whole, path = sealed[0], tmp_path_factory.getbasetemp() / "damaged.pt"
    archive = len(whole) - 73  # behind it are 9 bytes and 64 digits
    bit = data.draw(st.integers(0, 8 * archive - 1) | st.integers(8 * archive - 1600, 8 * archive - 1))
    flipped = whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
    assert_unloadable(path, flipped)
    assert_unloadable(path, whole[: min(bit // 8, archive - 27)])  # of its last bytes a zip may lack some


@settings(max_examples=60, **quiet)
@given(st.binary(max_size=200))
def test_no_bytes_load_as_a_checkpoint(tmp_path_factory, data):
    assert_unloadable(tmp_path_factory.getbasetemp() / "junk.pt", data)


@pytest.mark.parametrize("form", ["sealed", "zip", "legacy", "pickle"])
def test_no_file_runs_code(form, broken, tmp_path):
    path, content = tmp_path / "payload.pt", {"args": {}, "run": {"state": Payload()}}
    if form == "sealed":
        utils.save_tensors(path, content)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for flags in (["--checkpoint"], [*BASE, "--init"]):
        assert_refused([*flags, path], flags[-1], str(path), folder=tmp_path)
    (broken / "checkpoint.prev.pt").unlink()
    for name in ("init.pt", "checkpoint.pt"):
        shutil.copy(path, broken / name)
        assert_refused(["--resume", "--save_dir", broken], str(broken), folder=tmp_path)


@pytest.mark.parametrize("damage", ["half", "bit", "payload", "gone"])
def test_a_damaged_checkpoint_says_that_the_one_before_is_taken(damage, broken):
    latest = broken / "checkpoint.pt"
    data = bytearray(latest.read_bytes())
    data[len(data) // 3] ^= 4
    before = utils.load_tensors(broken / "checkpoint.prev.pt", "--resume")["run"]
    damaged = {"half": data[: len(data) // 2], "bit": data, "payload": pickle.dumps(Payload())}
    latest.unlink() if damage == "gone" else latest.write_bytes(damaged[damage])
    code, out, err = call(["--resume", "--save_dir", broken])
    assert (code, err) == (0, "")
    assert f"resumed at state {before['state']}, step {before['step']} " in out
    assert (str(latest) in out and "the checkpoint before" in out) == (damage != "gone")


DELETED = object()
ENTRIES = [("run",), ("args",), ("weights",), ("moments",), ("random",), ("rewind_file",), ("args", "epochs")]
ENTRIES += [("moments", 0), ("moments", 0, "momentum_buffer")]


@pytest.mark.parametrize("value", [None, "text", DELETED], ids=["None", "text", "deleted"])
def test_wrong_entries_in_a_sound_file_are_one_line(value, sealed, broken):
    (broken / "checkpoint.prev.pt").unlink()
    for *way, last in ENTRIES:
        if (last, value) == ("epochs", DELETED):
            continue  # a flag that is missing is what it is by default, as in checkpoints that are older than it
        inner = content = copy.deepcopy(sealed[1])
        for key in way:
            inner = inner[key]
        inner[last] = value
        if value is DELETED:
            del inner[last]
        utils.save_tensors(broken / "checkpoint.pt", content)
        assert_refused(["--resume", "--save_dir", broken], folder=broken)


@pytest.mark.parametrize(("error", "named"), [
    (torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 has none."), "(CUDA out of memory.)"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: no"), "can't allocate memory"),
    (AttributeError("'NoneType' object has no attribute 'size'"), None),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
], ids=str)  # fmt: skip
def test_what_fails_while_a_run_resumes_is_not_taken_for_a_foreign_checkpoint(error, named, broken, monkeypatch):
    """Building the state's training reads nothing of the checkpoint: its errors are those of the machine, or bugs."""

    def fail(_):
        raise error

    monkeypatch.setattr(StateTraining, "build", fail)
    if named is None:
        with pytest.raises(type(error), match=re.escape(str(error))):
            call(["--resume", "--save_dir", broken])
        return
    code, _, err = call(["--resume", "--save_dir", broken])
    assert code == 1
    assert_one_line(err)
    assert all(part in err for part in ("out of memory with --batch_size 20", named, f"--resume --save_dir {broken}"))


PEER = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:5"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error\nCuda failure 2 'out of memory'"
REDUCTION = "Expected to have finished reduction in the prior iteration. DistributedDataParallel needs all parameters."
SIZES = "[enforce fail at third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"


@pytest.mark.parametrize(("error", "named"), [
    (RuntimeError(PEER), ["another process cannot be reached (", "Connection closed by peer"]),
    (dist.DistNetworkError("the store is gone"), ["another process cannot be reached (the store is gone)"]),
    (dist.DistBackendError(NCCL), ["out of memory with"]), (RuntimeError(REDUCTION), None),
    (RuntimeError(SIZES), None), (ValueError(PEER), None),
    (OSError(28, "No space left on device"), ["cannot write", "free the disk"]),
    (OSError(5, "Input/output error"), ["cannot write", "Input/output error"]),
], ids=str)  # fmt: skip
def test_another_process_is_lost_only_where_a_message_to_it_failed(error, named, tmp_path):
    group = SimpleNamespace(several=True, dead_ranks=lambda: "another process cannot be reached")
    args = entry.parse_args([*BASE, "--save_dir", str(tmp_path)])
    found = explain(error, args, group)
    if named is None:
        assert found is None
        return
    assert all(part in found for part in named)
    if "cannot write" not in found:
        assert "no checkpoint yet" in found
        (tmp_path / "checkpoint.pt").touch()
        assert f"go on from the last checkpoint with --resume --save_dir {tmp_path}" in explain(error, args, group)
    assert ("free the disk" in found) == (getattr(error, "errno", 0) == 28)


# ------------------------------------------------------------------------------------------------------ flags on resume

FREE = words(
    "workers device gpu print_freq verbose save_dir resume checkpoint data config checkpoint_every wandb_mode "
    "wandb_project wandb_entity dry_run overwrite list_archs"
)


def test_every_other_flag_is_refused_by_name_on_resume(sealed, broken):
    stored, checked = sealed[1]["args"], 0
    for options, choices, valued in flags_in_help():
        name = options[0].removeprefix("--no-").removeprefix("--")
        name = "prune_patch_embed" if name == "conv1" else name
        if name in [*FREE, "finish_epochs"] or (
            not valued and len(options) == 1 and stored.get(name) != options[0].startswith("--no-")
        ):
            continue  # free, or a switch that the run was started with
        flags = [option for option in options if not valued][-1:] or [options[0]]
        if valued:
            value = stored.get(name)
            other = 2 if name == "pruning_times" else "x" if isinstance(value, str) else 3 + (value or 0)
            flags.append(next((choice for choice in choices if choice != value), other))
        assert_refused(["--resume", "--save_dir", broken, *flags], name, folder=broken)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize(("flags", "named"), [
    ("", ["--resume auto", "--save_dir", "--exp_name"]), ("--exp_name ../x", ["--exp_name ../x"]),
    ("--save_dir {run} --overwrite", ["--overwrite", "{run}"]),
    ("--save_dir {run} --checkpoint {run}/checkpoint.pt", ["--checkpoint {run}/checkpoint.pt"]),
    ("--save_dir {run} --lr 0.5 --seed 7", ["--lr 0.5 --seed 7;", "args.yaml"]),
])  # fmt: skip
def test_auto_is_refused_where_it_is_not_clear_what_goes_on(flags, named, broken):
    argv = [*BASE, *STRUCTURED, "--resume", "auto", *flags.format(run=broken).split()]
    assert_refused(argv, *(name.format(run=broken) for name in named), folder=broken)


def test_auto_starts_no_run_over_one_whose_checkpoints_are_damaged_or_gone(broken):
    argv = [*BASE, *STRUCTURED, "--resume", "auto", "--save_dir", broken]
    (broken / "checkpoint.prev.pt").unlink()
    (broken / "checkpoint.pt").write_bytes(b"cut short")
    assert_refused(argv, f"{broken} holds no checkpoint that can be loaded", folder=broken)
    (broken / "checkpoint.pt").unlink()
    assert (broken / "states.csv").exists()
    assert_refused(argv, f"{broken} holds states.csv, but no checkpoint any more", "--overwrite", folder=broken)


def test_a_config_file_counts_on_resume_as_flags_do(broken, tmp_path):
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump({"lr": 0.5}))
    argv = ["--resume", "--save_dir", broken, "--config", tmp_path / "flags.yaml"]
    assert_refused(argv, "--lr 0.5", folder=broken)


@pytest.mark.parametrize("how", [[], ["auto"]])
def test_a_plan_of_a_run_that_resumes_changes_nothing(how, broken):
    before = content_of(broken)
    code, out, err = call(["--resume", *how, "--save_dir", broken, "--dry_run"])
    assert (code, err) == (0, "")
    assert "3 states" in out
    assert content_of(broken) == before
