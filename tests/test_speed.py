"""What makes training fast changes nothing else: accumulation, half precision, compilation, smaller networks, the
thread that writes checkpoints, steps that never wait for the device, and the two ways to compute attention.

Runs are real ones through `main([...])`: scikit-learn's digits and a Vision Transformer of two small blocks.
"""

import collections
import copy
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_imp_fillback as entry
import utils
from benchmarks import gpu
from benchmarks.train_step import training_job
from models.vit import Attention, _attend
from utils import Background, RunError, RunState
from vit_structured_pruning import scatter_tensors

REPOSITORY = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "images_per_second")

words = str.split
BASE = words(
    "--dataset digits --arch vit_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.5 --criteria magnitude --no-export"
)
STEPS = 3  # an epoch
BOTH = ("--vit_structured", "--vit_prune_target", "both")


@pytest.fixture(autouse=True)
def _in_house(house, monkeypatch):
    monkeypatch.setattr(entry.report, "write", lambda _: None)  # pictures take longer than these runs


@pytest.fixture
def run(tmp_path, capsys, around):
    """run("--struct", "imp", name="a") -> folder, standard error, dense-shaped weights after each (state, step)."""
    trace = {}

    def remember(job, *_):
        trace.setdefault(job.save_dir.name, {})[job.run.state, job.run.step] = dense_shaped(job)

    around("train_step", after=remember)

    def start(*flags, name="run", base=BASE, code=0):
        folder = tmp_path / name
        capsys.readouterr()
        found = entry.main([str(part) for part in (*base, "--save_dir", folder, *flags)])
        error = capsys.readouterr().err
        assert found == code, error
        return SimpleNamespace(dir=folder, err=error, trace=trace.get(name, {}))

    return start


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def dense_shaped(job):
    return clones(scatter_tensors(job.model.state_dict(), job.units, job.model_kept))


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def metrics(folder, drop=TIMES):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in drop} for line in lines]


def column(folder, name):
    return [row[name] for row in metrics(folder)]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def masks_of(folder):
    return RunState.unpack(load(folder / "checkpoint.pt")["run"], torch.device("cpu")).masks


def assert_same_masks(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not mask.all() for mask in one.values())


def log_of(folder):
    return (folder / "run.log").read_text()


# -------------------------------------------------------------------------------------------------------- accumulation

WHOLE_BATCH = ("--batch_size", "20", "--accum_steps", "1")
IN_PARTS = ("--batch_size", "5", "--accum_steps", "4")
RAMP = ("--struct", "rsst", *BOTH, *words("--reg_finish 0.5 --clip_grad 0.3 --label_smoothing 0.1"))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("images", "steps"),
    [(60, 3), (18, 1), (10, 1)],  # in parts of 5 5 5 5, of 5 5 5 3, of 3 3 3 1
)
def test_accumulation_equals_the_whole_batch_in_float64(images, steps, run):
    flags = (*RAMP, "--train_limit", images, "--pruning_times", 2, "--epochs", 4)
    whole, parts = run(*flags, *WHOLE_BATCH, name="whole"), run(*flags, *IN_PARTS, name="parts")
    assert whole.trace.keys() == parts.trace.keys()
    assert len(whole.trace) == 2 * 4 * steps
    for key in whole.trace:
        assert largest_difference(whole.trace[key], parts.trace[key]) < 1e-9, key
    for one, other in zip(metrics(whole.dir), metrics(parts.dir), strict=True):
        assert one == pytest.approx(other, abs=1e-9)
    assert_same_masks(masks_of(whole.dir), masks_of(parts.dir))
    assert any(row["lambda"] for row in metrics(whole.dir))
    last, first = max(whole.trace), min(whole.trace)
    assert largest_difference(whole.trace[last], whole.trace[first]) > 1e-3  # they agree on something


def test_accumulation_starts_like_the_whole_batch_in_float32(run):
    flags = (*RAMP, "--pruning_times", 1)
    whole, parts = run(*flags, *WHOLE_BATCH, name="whole"), run(*flags, *IN_PARTS, name="parts")
    for step in range(1, 2 * STEPS + 1):
        assert largest_difference(whole.trace[0, step], parts.trace[0, step]) < 1e-5, step
    assert column(whole.dir, "train_loss") == pytest.approx(column(parts.dir, "train_loss"), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("criterion", ["magnitude", "l1"])
def test_bf16_chooses_the_same_masks_for_equal_weights(criterion, run, around, add_noise):
    found = {}
    around("begin_state", before=lambda job: job.run.state == 1 and add_noise(job.dense, scale=0.05))
    around("begin_state", after=lambda job: found.update({(job.args.amp, job.run.state): job.run.target}))
    for precision in ("off", "bf16"):
        run("--struct", "rsst", *BOTH, *words("--criteria"), criterion, "--pruning_times", 2, "--epochs", 1,
            "--amp", precision, "--lr", "1e-12", name=precision)  # fmt: skip
    assert_same_masks(found["off", 1], found["bf16", 1])


@pytest.mark.parametrize(("amx", "avx512", "expected"), [(1, 1, torch.bfloat16), (0, 1, torch.bfloat16), (0, 0, None)])
def test_auto_is_bf16_on_cpus_with_instructions_for_it(amx, avx512, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512), raising=False)
    assert utils.pick_precision("auto", torch.device("cpu")) == expected
    assert utils.pick_precision("auto", torch.device("mps")) is None
    assert utils.pick_precision("off", torch.device("cpu")) is None


def test_auto_does_without_pytorchs_word_on_the_cpu(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert utils.pick_precision("auto", torch.device("cpu")) is None


def test_bf16_losses_are_those_of_float32_within_its_digits(run):
    flags = ("--struct", "rsst", *BOTH, "--pruning_times", 1, "--lr", "0.02")
    whole, half = run(*flags, "--amp", "off", name="whole"), run(*flags, "--amp", "bf16", name="half")
    one, other = column(whole.dir, "train_loss"), column(half.dir, "train_loss")
    assert one != other
    assert one == pytest.approx(other, rel=2**-6)  # bf16 keeps 8 binary digits


@pytest.mark.parametrize("compact", ["--compact_training", "--no-compact_training"])
@pytest.mark.parametrize("method", ["rsst", "refill", "imp"])
def test_bf16_keeps_weights_in_float32_and_masked_ones_at_zero(method, compact, run, around):
    zeros = []

    def look(job, *_):
        weights = dense_shaped(job)
        assert {weight.dtype for weight in (*weights.values(), *job.model.parameters())} == {torch.float32}
        for name, mask in job.run.masks.items():
            gone = weights[f"{name}.weight"][mask == 0]
            assert not gone.any()
            zeros.append(gone.numel())

    around("train_step", after=look)
    structure = () if method == "imp" else BOTH
    run("--struct", method, *structure, compact, "--amp", "bf16", "--reg_finish", "0.5")
    assert sum(zeros) > 0


# --------------------------------------------------------------------------------------------------------- compilation


@pytest.fixture(scope="session")
def can_compile():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception as error:  # whatever a toolchain lacks
        pytest.skip(f"torch.compile cannot run here: {str(error).splitlines()[0]}")
    torch.compiler.reset()


@pytest.fixture
def only_traced(monkeypatch):
    """`torch.compile` that traces and guards as always and runs what it traced without generating code."""
    compiled, original = [], torch.compile

    def traced(model, **options):
        compiled.append(options)
        return original(model, backend="eager", dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", traced)
    yield compiled
    torch.compiler.reset()


def test_many_compiled_states_stay_below_the_limit_of_recompilations(run, only_traced, around):
    limit, states = 2, 4
    widths = set()
    around("train_step", after=lambda job, *_: widths.add(sum(p.numel() for p in job.model.parameters())))
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        run("--struct", "refill", *BOTH, "--compile", "--pruning_times", states, "--epochs", 1, "--rate", "0.9")
    assert len(only_traced) == states
    assert len(widths) > limit


def assert_goes_on_to_the_same_bits(flags, run, around):
    """A run broken off in the middle of state 1 and resumed ends as one that is not."""
    stop_at = [(1, 4)]

    def stop(job, *_):
        if (job.run.state, job.run.step) in stop_at:
            stop_at.clear()
            raise KeyboardInterrupt

    whole = run(*flags, "--checkpoint_every", "1", name="whole")
    around("train_step", before=stop)
    run(*flags, "--checkpoint_every", "1", name="broken", code=130)
    again = run("--resume", name="broken", base=())
    assert not stop_at
    assert metrics(again.dir) == metrics(whole.dir)
    assert largest_difference(load(again.dir / "best.pt")["weights"], load(whole.dir / "best.pt")["weights"]) == 0


def test_a_compiled_run_goes_on_to_the_same_bits(run, only_traced, around):
    flags = ("--struct", "rsst", *BOTH, *words("--compile --pruning_times 2 --reg_finish 0.5"))
    assert_goes_on_to_the_same_bits(flags, run, around)
    assert len(only_traced) == 3 + 3 + 1  # state 0, state 1 and its cut, twice; and where it went on


@pytest.mark.slow
@pytest.mark.usefixtures("can_compile")
@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_compiled_training_is_that_of_eager_training(precision, run):
    flags = ("--struct", "rsst", *BOTH, *words("--pruning_times 2 --reg_finish 0.5 --amp"), precision, "--lr", "0.01")
    eager, compiled = run(*flags, name="eager"), run(*flags, "--compile", name="compiled")
    tolerance = 1e-4 if precision == "off" else 2**-6
    assert column(eager.dir, "train_loss") == pytest.approx(column(compiled.dir, "train_loss"), rel=tolerance)
    assert_same_masks(masks_of(eager.dir), masks_of(compiled.dir))
    assert "cut at step" in log_of(compiled.dir)
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------- captured steps


def tensors_in(content):
    return [leaf for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: notes each operation with the tensors it took and gave, repeats it on the same memory.

    What a real graph freezes is frozen here: numbers that Python knew, addresses, branches. As there, what is captured
    is not done, and nothing may wait for the device.
    """

    made: list["Tape"] = []

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.captured, self.replays, self.warm_ups = [], {}, False, 0, 0
        Tape.made.append(self)

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        packet = operation.overloadpacket
        assert packet not in NoWaiting.REFUSED, f"{packet} waits for the device"
        for tensor in tensors_in((arguments, named)):
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in self.before:
                self.before[memory.data_ptr()] = memory, memory.clone()
        result = operation(*arguments, **named)
        self.calls.append((operation, arguments, named, result))
        return result

    def warm_up(self, work):
        self.warm_ups += 1
        work()

    def capture(self, work):
        assert not self.captured
        with self:
            work()
        self.captured = True
        for memory, content in self.before.values():
            memory.copy_(content)

    @torch.no_grad()
    def replay(self):
        assert self.captured
        self.replays += 1
        for operation, arguments, named, result in self.calls:
            taken = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((arguments, named))}
            again = operation(*arguments, **named)
            for old, new in zip(tensors_in(result), tensors_in(again), strict=True):
                if old.untyped_storage().data_ptr() not in taken:
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Tapes in place of CUDA graphs, on a CPU that passes for a GPU; the list of those made."""
    monkeypatch.setattr(utils, "CudaGraph", Tape)
    monkeypatch.setattr(utils, "check_compile", lambda *_: None)
    monkeypatch.setattr(Tape, "made", [])
    return Tape.made


def test_a_tape_repeats_what_a_graph_would(tapes):
    rate, total, python = torch.tensor(2.0), torch.zeros(3), SimpleNamespace(rate=2.0)
    frozen, places = torch.zeros(3), set()

    def step(values):
        places.add(values.data_ptr())
        total.add_(values * rate)
        frozen.add_(values * python.rate)

    captured = utils.CapturedStep(step)
    for number in range(6):
        python.rate = float(number)
        rate.fill_(number)
        captured(torch.tensor([1.0, 2.0, number]))
    # sum of number * (1, 2, number) for 0..5; Python's number stays 3 from the capture on
    assert total.tolist() == [15, 30, 55]
    assert frozen.tolist() == [0 + 1 + 2 + 3 * 3, 2 * 12, 0 + 1 + 4 + 3 * (3 + 4 + 5)]
    assert (tapes[0].warm_ups, tapes[0].replays) == (3, 3)
    assert len(places) == 1  # warmed up on what it is captured with: a compiled network sees the same strides


CAPTURED = {
    "rsst": ("--struct", "rsst", *BOTH, *words("--reg_finish 0.5 --sched cosine --momentum 0.8")),
    "clipped, accumulated, bf16": (*RAMP, *IN_PARTS, *words("--amp bf16 --no-compact_training --block_loss_grad")),
    "gradient form": ("--struct", "rsst", *BOTH, *words("--reg_form gradient --warmup 1")),
    "adamw": ("--struct", "rsst", *words("--opt adamw --lr 0.002 --decreasing_lr 1 --reg_finish 0.5")),
    "refill": ("--struct", "refill", *BOTH, *words("--fc")),
    "filters": ("--struct", "rsst", *words("--arch res20s --reg_finish 0.5")),
}


@pytest.mark.parametrize("flags", CAPTURED.values(), ids=CAPTURED)
def test_a_captured_run_is_the_plain_run_bit_for_bit(flags, run, tapes):
    """Learning rate, lambda and batches change from step to step: all reach the captured step."""
    flags = (*flags, *words("--pruning_times 2 --train_limit 120"))
    plain = run(*flags, name="plain")
    assert not tapes
    captured = run(*flags, "--compile", "graph", name="captured")
    assert sum(tape.replays for tape in tapes) >= 2 * 2 * STEPS
    assert {tape.warm_ups for tape in tapes if tape.replays} == {utils.CapturedStep.WARM_UP}
    assert plain.trace.keys() == captured.trace.keys()
    for key in plain.trace:
        assert largest_difference(plain.trace[key], captured.trace[key]) == 0, key
    assert metrics(plain.dir) == metrics(captured.dir)
    assert_same_masks(masks_of(plain.dir), masks_of(captured.dir))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_captured_fp16_run_skips_the_steps_that_the_plain_run_skips(optimizer, run, tapes, around, monkeypatch):
    """The scaler starts where gradients overflow and doubles every second step; the device decides whether to skip.

    Before the first step that is not skipped there is nothing to remember: no momentum, no moments.
    """
    monkeypatch.setattr(utils, "pick_precision", lambda *_: torch.float16)
    scales, moments = {"plain": [], "captured": []}, []

    def high_scale(job):
        if job.run.state == 0:
            job.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28, growth_interval=2)

    def remember(job, *_):
        found = scales[job.save_dir.name]
        found.append(job.scaler.get_scale())
        if job.run.state == 0 and found[-1] == 2.0 ** (28 - len(found)):  # skipped, all of them
            moments.extend(value.clone() for state in job.optimizer.state.values() for value in state.values())

    around("set_up_training", after=high_scale)
    around("train_step", after=remember)
    flags = ("--struct", "rsst", *BOTH, *words("--pruning_times 2 --train_limit 160 --lr 0.002 --opt"), optimizer)
    plain = run(*flags, name="plain")
    captured = run(*flags, "--compile", "graph", name="captured")
    assert sum(tape.replays for tape in tapes) > 2 * 2 * STEPS
    assert scales["plain"] == scales["captured"]
    steps = [math.log2(after / before) for before, after in itertools.pairwise(scales["plain"])]
    assert scales["plain"][0] == 2**27
    assert {-1, 0, 1} == set(steps)  # skipped, done, done for the second time
    assert moments
    assert not any(value.any() for value in moments)
    for key in plain.trace:
        assert largest_difference(plain.trace[key], captured.trace[key]) == 0, key


def test_a_run_goes_on_in_fp16_that_began_without_it(run, around, monkeypatch):
    """As --amp auto does when a run moves to an older GPU."""

    def stop(job, *_):
        if job.run.step == 4 and not job.scaler.is_enabled():
            raise KeyboardInterrupt

    around("train_step", before=stop)
    run("--struct", "imp", *words("--pruning_times 1 --amp auto --checkpoint_every 1"), code=130)
    monkeypatch.setattr(utils, "pick_precision", lambda *_: torch.float16)
    again = run("--resume", base=())
    assert "cpu, fp16, seed" in log_of(again.dir)
    assert len(metrics(again.dir)) == 2


@pytest.mark.parametrize("after", ["a cut", "a state"])
def test_no_gradient_outlives_a_step(after, run, around):
    """What holds a gradient holds the memory of the graph that it was made in."""
    seen = []
    around("end_state" if after == "a state" else "cut", before=lambda job: seen.append(job))
    run("--struct", "rsst", *BOTH, *words("--reg_finish 0.5 --pruning_times 2"))
    parameters = [p for job in seen for model in (job.dense, job.model) for p in model.parameters()]
    assert seen
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_captured_optimizers_are_declared_capturable_where_pytorch_asks(optimizer, run, around):
    groups = []
    around("set_up_training", after=lambda job: groups.extend(job.optimizer.param_groups))
    run("--struct", "imp", "--opt", optimizer, *words("--lr 0.001 --compile graph --pruning_times 1"))
    # Optimizer._accelerator_graph_capture_health_check: all(group["capturable"] for group in self.param_groups)
    assert [group.get("capturable", optimizer == "sgd") for group in groups] == [True, True]


def test_a_captured_run_goes_on_to_the_same_bits(run, tapes, around):
    flags = (*CAPTURED["adamw"], *words("--compile graph --pruning_times 2 --train_limit 120"))
    assert_goes_on_to_the_same_bits(flags, run, around)
    assert sum(tape.replays for tape in tapes) > STEPS


def test_a_loss_that_breaks_in_a_captured_step_is_named_by_its_step(run, tapes, monkeypatch):
    original = entry.PruneRetrain.train_step

    def step(job, epoch, batch):
        if (job.run.state, job.run.step) == (0, 10):
            with torch.no_grad():
                job.model.get_parameter("head.bias").fill_(math.nan)
        original(job, epoch, batch)

    monkeypatch.setattr(entry.PruneRetrain, "train_step", step)
    ended = run("--struct", "imp", *words("--compile graph --train_limit 160"), code=1)
    assert "not finite at step 10 of state 0" in ended.err
    assert tapes[0].replays > 10 - 3


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune", *utils.GRAPHS])
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_torchs_own_graphs_cannot_accumulate(mode, accum_steps):
    """On a GPU, their second part overwrites the gradients of the first; a graph of the whole step has all parts."""
    if mode in ("reduce-overhead", "max-autotune") and accum_steps == 2:
        with pytest.raises(RunError, match=f"--compile {mode}: .* use compiled-graph or --accum_steps 1"):
            utils.check_compile(mode, accum_steps, torch.device("cuda"))
    else:
        utils.check_compile(mode, accum_steps, torch.device("cuda"))
    if mode not in utils.GRAPHS:
        utils.check_compile(mode, accum_steps, torch.device("cpu"))


@pytest.mark.parametrize("mode", utils.GRAPHS)
def test_graphs_need_a_gpu(mode, run):
    ended = run("--struct", "imp", "--compile", mode, code=2)
    assert ended.err.splitlines()[-1].endswith(f"--compile {mode}: needs a CUDA GPU, this run is on cpu; leave it out")
    assert not ended.dir.exists()


def test_compiled_graph_captures_the_compiled_network(run, only_traced, tapes, monkeypatch):
    """Grey images, which arrive as views with strides of their own: nothing may be compiled in a capture."""
    traced, capture = torch._dynamo.utils.counters["stats"], Tape.capture

    def without_compiling(tape, work):
        before = traced["unique_graphs"]
        capture(tape, work)
        assert traced["unique_graphs"] == before > 0

    monkeypatch.setattr(Tape, "capture", without_compiling)
    flags = ("--struct", "rsst", *BOTH, *words("--pruning_times 2 --train_limit 120"))
    plain, both = run(*flags, name="plain"), run(*flags, "--compile", "compiled-graph", name="both")
    assert len(only_traced) == len(tapes) == 3
    assert {options["mode"] for options in only_traced} == {"default"}
    assert sum(tape.replays for tape in tapes) >= 2 * 2 * STEPS
    assert column(plain.dir, "train_loss") == pytest.approx(column(both.dir, "train_loss"), rel=1e-5)
    assert_same_masks(masks_of(plain.dir), masks_of(both.dir))


# --------------------------------------------------------------------------------------------------- smaller networks


def test_the_small_vit_tiny_starts_like_the_masked_one_in_float32():
    flags = words("--arch vit_tiny --batch_size 2 --accum_steps 2 --clip_grad 0.5 --label_smoothing 0.1 --amp off")
    found = {}
    for compact in ("--compact_training", "--no-compact_training"):
        torch.manual_seed(0)
        job = training_job([*flags, compact])
        assert (job.model is job.dense) == (compact == "--no-compact_training")
        start = dense_shaped(job)
        for step in range(3):
            job.train_step(0, step)
        found[compact] = dense_shaped(job)
    assert largest_difference(*found.values()) < 1e-5
    assert largest_difference(start, found[compact]) > 1e-4


# ---------------------------------------------------------------------------------- checkpoints, written by a thread


@pytest.fixture
def delayed_writes(monkeypatch):
    """No checkpoint is written before somebody waits for it; `.written` holds what is on disk after each write."""
    may_write, written, original_save, original_wait = threading.Event(), [], utils.save_checkpoint, Background.wait

    def save(save_dir, content):
        assert may_write.wait(60), "nobody waits for the checkpoint"
        original_save(save_dir, content)
        written.append(load(save_dir / "checkpoint.pt"))

    def wait(writer):
        may_write.set()
        try:
            original_wait(writer)
        finally:
            may_write.clear()

    monkeypatch.setattr(utils, "save_checkpoint", save)
    monkeypatch.setattr(Background, "wait", wait)
    return SimpleNamespace(written=written)


def assert_equal_contents(found, expected, path="checkpoint"):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, value in expected.items():
            assert_equal_contents(found[key], value, f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for number, value in enumerate(expected):
            assert_equal_contents(found[number], value, f"{path}/{number}")
    else:
        assert found == expected, path


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["rsst", "imp"])
def test_a_late_checkpoint_holds_the_moment_of_its_call(method, optimizer, run, around, delayed_writes):
    expected, late, moved = [], [], []

    def remember(job):
        late.append(len(expected) - len(delayed_writes.written))
        if expected:
            moved.append(largest_difference(expected[-1]["weights"], job.dense.state_dict()))
        held = {name: getattr(job.run, name) for name in vars(job.run)}
        expected.append(
            copy.deepcopy(
                {
                    "weights": clones(job.dense.state_dict()),
                    "moments": job.optimizer.state_dict()["state"],
                    "scaler": job.scaler.state_dict(),
                    "random": utils.random_states(),
                    "run": {name: value for name, value in held.items() if name != "seconds"},
                }
            )
        )

    around("checkpoint", before=remember)
    structure = BOTH if method == "rsst" else ()
    run("--struct", method, *structure, *words("--opt"), optimizer, *words("--reg_finish 0.5 --checkpoint_every 2"),
        "--lr", "0.01", "--clip_grad", "1")  # fmt: skip
    assert len(delayed_writes.written) == len(expected) > 3 * 3
    for found, wanted in zip(delayed_writes.written, expected, strict=True):
        found["run"] = vars(RunState.unpack(found["run"], torch.device("cpu")))
        assert_equal_contents({key: found[key] for key in wanted if key != "run"} | {"run": {}}, wanted | {"run": {}})
        assert_equal_contents({key: found["run"][key] for key in wanted["run"]}, wanted["run"])
    assert set(late) == {0, 1}  # a state ends with all on disk
    assert late.count(1) >= 3 * 3
    assert sum(difference > 0 for difference in moved) > 3 * 2  # training went on in between
    assert any(content["run"]["sums"] for content in expected)
    assert any(state for content in expected for state in content["moments"].values())


def test_at_most_one_checkpoint_is_pending(run, monkeypatch, delayed_writes):
    """When the copy for the next one is taken, all before are on disk."""
    waiting, original = [], utils.random_states
    calls = []

    def copying():
        waiting.append(len(calls) - len(delayed_writes.written))
        calls.append(None)
        return original()

    monkeypatch.setattr(utils, "random_states", copying)
    run("--struct", "imp", "--checkpoint_every", "1")
    assert len(waiting) > 3 * 6
    assert set(waiting) == {0}


@pytest.mark.parametrize(("failing", "steps"), [(1, 2 * STEPS), (4, 4 * STEPS), (9, 6 * STEPS)])
def test_a_failing_writer_stops_the_run_at_the_next_checkpoint_or_the_end(failing, steps, run, monkeypatch, around):
    """A state writes three: after each of its two epochs, and when it is done. The ninth is the last."""
    calls, done, original = [], [], utils.save_checkpoint

    def save(save_dir, content):
        calls.append(None)
        if len(calls) == failing:
            raise RunError("cannot write checkpoint.pt: the disk is gone; free the disk or choose --save_dir", 1)
        original(save_dir, content)

    around("train_step", after=lambda *_: done.append(None))
    monkeypatch.setattr(utils, "save_checkpoint", save)
    ended = run("--struct", "imp", code=1)
    assert ended.err.count("\n") == 1
    assert "the disk is gone" in ended.err
    assert (len(calls), len(done)) == (failing, steps)


def test_a_writers_error_shows_once_and_the_writer_goes_on(tmp_path):
    writer, done = Background(), []

    def fail():
        raise RunError("the disk is full")

    writer.submit(done.append, 1)
    writer.submit(fail)
    with pytest.raises(RunError, match="the disk is full"):
        writer.wait()
    writer.wait()
    writer.submit(done.append, 2)
    writer.wait()
    assert done == [1, 2]


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 2), ("adamw", 3)])
def test_a_checkpoint_of_vit_tiny_is_weights_and_moments_and_little_more(optimizer, copies):
    job = training_job(words("--arch vit_tiny --batch_size 2 --amp off --no-compact_training --opt") + [optimizer])
    job.train_step(0, 0)
    job.clock = 0.0
    job.checkpoint()
    job.writer.wait()
    weights = 4 * 2_697_610
    assert copies * weights < (job.save_dir / "checkpoint.pt").stat().st_size <= (copies + 0.1) * weights


# --------------------------------------------------------------------------------------- steps that wait for nothing


class NoWaiting(TorchDispatchMode):
    """Refuses operations that need a value or a size from the device, except for the scalars that `free()` lists."""

    REFUSED = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
               torch.ops.aten.is_nonzero, torch.ops.aten.equal)  # fmt: skip

    def __init__(self, free):
        super().__init__()
        self.free, self.operations = free, collections.Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        packet = operation.overloadpacket
        self.operations[packet] += 1
        first = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
        if packet in self.REFUSED and first.data_ptr() not in {scalar.data_ptr() for scalar in self.free()}:
            raise AssertionError(f"{packet} waits for the device")
        if packet == torch.ops.aten._to_copy and (named or {}).get("device") is not None:
            target = torch.device(named["device"])
            assert not (target.type == "cpu" and first.device.type != "cpu"), "a copy to the CPU waits for the device"
        return operation(*arguments, **(named or {}))


@pytest.fixture
def no_reading(monkeypatch):
    """Methods of tensors that hand values to Python, and would do so on the CPU without any operation, fail inside
    `with no_reading():`."""

    def refuse(*_, **__):
        raise AssertionError("a step reads a tensor's values")

    class Reading:
        def __enter__(self):
            self.patch = pytest.MonkeyPatch()
            for name in ("tolist", "numpy", "cpu", "__array__"):
                self.patch.setattr(torch.Tensor, name, refuse)

        def __exit__(self, *_):
            self.patch.undo()

    return Reading


def quiet_steps(monkeypatch, no_reading, seen):
    original = entry.PruneRetrain.train_step

    def step(job, epoch, batch):
        job.writer.wait()  # its thread reads values, and may
        if batch == 0:  # the first batch of an epoch draws its order
            job.train_data.batch(job.run.state, epoch, batch)

        def counters():
            """AdamW counts its steps in scalars that live on the CPU wherever the weights are."""
            return [state["step"] for state in job.optimizer.state.values() if "step" in state]

        with NoWaiting(counters) as mode, no_reading():
            original(job, epoch, batch)
        seen.append((len(job.held), bool(job.penalty), job.model is job.dense, mode.operations))

    monkeypatch.setattr(entry.PruneRetrain, "train_step", step)


STEP_FLAGS = {
    "plain": (),
    "bf16, clipped, accumulated": (*words("--amp bf16 --clip_grad 0.3 --label_smoothing 0.1"), *IN_PARTS),
    "gradient form": words("--reg_form gradient --clip_grad 0.3 --block_loss_grad"),
    "adamw": words("--opt adamw --lr 0.002 --clip_grad 0.3"),
    "strong augmentation": words("--aug strong --sched cosine"),
}


@pytest.mark.parametrize("compact", ["--compact_training", "--no-compact_training"])
@pytest.mark.parametrize("flags", STEP_FLAGS.values(), ids=STEP_FLAGS)
def test_no_step_waits_for_the_device_between_prints(flags, compact, run, monkeypatch, no_reading):
    seen = []
    quiet_steps(monkeypatch, no_reading, seen)
    run("--struct", "rsst", *BOTH, compact, *words("--pruning_times 2 --reg_finish 0.5 --train_limit 80"), *flags)
    assert len(seen) == 2 * 2 * 4
    assert any(penalised for _, penalised, _, _ in seen)
    assert any(held or not full for held, _, full, _ in seen)
    assert all(operations[torch.ops.aten.mm] for *_, operations in seen)  # the mode sees what a step does


def test_a_step_that_prints_does_wait(run, monkeypatch, no_reading):
    quiet_steps(monkeypatch, no_reading, [])
    with pytest.raises(AssertionError, match="waits for the device|reads a tensor"):
        run("--struct", "imp", "--print_freq", "2")


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.fixture
def fused_calls(monkeypatch):
    """The tensors' types of each call of fused attention."""
    calls, original = [], F.scaled_dot_product_attention

    def counted(q, *arguments, **named):
        calls.append(q.dtype)
        return original(q, *arguments, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


def attention(num_heads=4, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return Attention(24, num_heads, head_dim=6).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_explicit_in_half_precision_with_gradients_on_the_cpu(device, gradients, dtype, fused_calls):
    module = attention(dtype=dtype, device=device)
    with torch.set_grad_enabled(gradients):
        out = module(torch.zeros(2, 5, 24, dtype=dtype, device=device))
    assert (out.shape, out.dtype) == ((2, 5, 24), dtype)
    explicit = device == "cpu" and gradients and dtype in (torch.bfloat16, torch.float16)
    assert fused_calls == ([] if explicit else [dtype])


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_counts_as_half_precision(gradients, fused_calls):
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        attention()(torch.zeros(2, 5, 24))
    assert fused_calls == ([] if gradients else [torch.bfloat16])


def naive_attention(module, x):
    """Token by token and head by head, in float64."""
    module, x = copy.deepcopy(module).double(), x.detach().double()
    heads, width = module.num_heads, module.head_dim
    qkv = module.qkv(x).detach()
    out = torch.zeros(*x.shape[:2], heads * width, dtype=torch.float64)
    for image in range(len(x)):
        for head in range(heads):
            q, k, v = (qkv[image, :, (part * heads + head) * width :][:, :width] for part in range(3))
            for token in range(x.shape[1]):
                weights = [math.exp(float(q[token] @ key) / math.sqrt(width)) for key in k]
                mixed = sum(weight * value for weight, value in zip(weights, v, strict=True)) / sum(weights)
                out[image, token, head * width : (head + 1) * width] = mixed
    return module.proj(out).detach()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.1)])
def test_both_ways_compute_attention(dtype, tolerance, add_noise):
    module = add_noise(attention()).to(dtype)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = naive_attention(module, x)
    explicit = module(x)
    with torch.no_grad():
        fused = module(x)
    for found in (explicit, fused):
        assert (found.double() - expected).abs().max() < tolerance
    assert expected.abs().max() > 1


def test_both_ways_have_the_same_gradients(add_noise, monkeypatch):
    module = add_noise(attention(), scale=0.1).bfloat16()
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    fused, found = F.scaled_dot_product_attention, {}
    for way, attend in (("explicit", _attend), ("fused", lambda q, k, v, scale: fused(q, k, v, scale=scale))):
        monkeypatch.setattr("models.vit._attend", attend)
        module.zero_grad()
        module(x).float().square().sum().backward()
        found[way] = {name: parameter.grad.float() for name, parameter in module.named_parameters()}
    for name, gradient in found["fused"].items():
        error = (found["explicit"][name] - gradient).norm() / gradient.norm()
        assert error < 0.05, name
    assert largest_difference(*found.values()) > 0  # two ways


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_explicit_attention_leaves_an_empty_branch_its_bias():
    module = attention(num_heads=0).bfloat16()
    with torch.no_grad():
        module.proj.bias.copy_(torch.arange(24))
    assert torch.equal(module(torch.randn(2, 5, 24).bfloat16()), torch.arange(24).bfloat16().expand(2, 5, 24))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_bf16_model_exports_either_way(gradients, make_micro_vit, make_batch):
    model = make_micro_vit(dtype=torch.bfloat16).eval()
    images = make_batch(dtype=torch.bfloat16)[0]
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (images,))
        assert torch.equal(program.module()(images), model(images))


# ---------------------------------------------------------------------------------------------------------- benchmarks

BENCHMARKS = {
    "gpu": words("--device cpu --archs vit_tiny --batch_sizes 4 --modes plain eager --repeats 1 --steps 1 --warm_up 1"),
    "train_step": words("--archs vit_tiny --batch_size 2 --repeats 1 --threads 1"),
    "checkpoint": words("--archs vit_tiny --repeats 1"),
}
EXPECTED_ROWS = {
    "gpu": ["plain", "eager"],
    "train_step": [
        "plain",
        "plain, no lists",
        "ours, full size",
        "ours, full size, bf16",
        "ours, small",
        "ours, small, bf16",
    ],
    "checkpoint": ["plain", "ours", "plain", "ours"],
}


@pytest.mark.usefixtures("only_traced")
def test_the_gpu_benchmark_measures_every_mode(tapes):
    args = SimpleNamespace(device="cpu", warm_up=5, steps=1, repeats=2, peak=100.0)
    rows = [gpu.measure("vit_tiny", 2, mode, args) for mode in gpu.MODES]
    assert [row["mode"] for row in rows] == list(gpu.MODES)
    assert set(gpu.MODES) >= {"plain", "eager", "default", *utils.GRAPHS}
    for row in rows:
        speed = row["_speed"]
        # 0.1877 G multiply-adds an image (SPEC), a third of them forward, two operations each; 45,000 images an epoch
        assert float(row["MFU"].rstrip("%")) == pytest.approx(100 * 6 * 0.1877e9 * speed / 100e12, abs=0.051)
        assert float(row["s/epoch"].replace(",", "")) == pytest.approx(45_000 / speed, rel=0.01)
    assert [(tape.warm_ups, tape.replays) for tape in tapes] == [(3, 5 - 3 + 2)] * 2


def test_a_mode_that_fails_leaves_the_other_rows(monkeypatch, capsys, tmp_path):
    measured, saved = [], {}

    def measure(arch, batch_size, mode, args):
        measured.append(mode)
        if mode in ("eager", "graph"):
            raise torch.OutOfMemoryError("CUDA out of memory\nmore") if mode == "eager" else RuntimeError("no graphs")
        return {"model": arch, "mode": mode, "_speed": {"plain": 10.0, "default": 25.0}[mode]}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.common, "save", lambda name, content: saved.update(content))
    monkeypatch.setattr(
        sys, "argv", words("gpu.py --device cpu --archs a --batch_sizes 4 --modes plain eager graph default")
    )
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert measured == ["plain", "eager", "graph", "default"]
    assert [(row["mode"], row["over plain"]) for row in saved["rows"]] == [("plain", "1.00x"), ("default", "2.50x")]
    assert ended.value.code == "a, batch 4, eager: CUDA out of memory\na, batch 4, graph: no graphs"
    monkeypatch.setattr(sys, "argv", words("gpu.py --device cpu --archs a --batch_sizes 4 --modes plain default"))
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code is None


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_run_and_print_their_table(name, tmp_path):
    copied = tmp_path / "copy"  # where its JSON file replaces nobody's results
    copied.mkdir()
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, copied)
    for folder in ("models", "benchmarks"):
        shutil.copytree(REPOSITORY / folder, copied / folder, ignore=shutil.ignore_patterns("*.json", "__pycache__"))
    done = subprocess.run(
        [sys.executable, copied / "benchmarks" / f"{name}.py", *BENCHMARKS[name]],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((copied / "benchmarks" / f"{name}.json").read_text())["rows"]
    column = {"gpu": "mode", "train_step": "step", "checkpoint": "checkpoint"}[name]
    assert [row[column] for row in rows] == EXPECTED_ROWS[name]
    table = done.stdout.partition("\n\n")[2]
    assert all(str(value) in table for row in rows for value in row.values())
    assert not list(tmp_path.glob("bench-*"))  # the run's folder goes again
