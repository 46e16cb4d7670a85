"""What makes training fast changes nothing else: accumulation, half precision, compilation, captured steps, the thread
that writes checkpoints, steps that never wait for the device, and the two ways to compute attention.

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
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from micro import (
    BOTH,
    MICRO,
    STEPS,
    TIMES,
    broken_off,
    call,
    clones,
    largest_difference,
    load,
    make_run,
    metrics,
    record,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_imp_fillback as entry
import utils
from benchmarks import gpu
from benchmarks.train_step import training_state
from engine import capture
from engine import run as run_module
from engine.capture import CapturedStep, check_compile
from engine.checkpoint import Background, RunState
from engine.choose import choose_target
from engine.training import StateTraining
from models.vit import Attention
from settings.flags import GRAPHS
from utils import RunError

REPOSITORY = Path(__file__).resolve().parent.parent
words = str.split
slow = partial(pytest.param, marks=pytest.mark.slow)
BASE = [*MICRO, *words("--rate 0.5 --criteria magnitude")]
RAMP = ("--struct", "rsst", *BOTH, *words("--reg_finish 0.5 --pruning_times 2"))
WHOLE_BATCH, IN_PARTS = words("--batch_size 20 --accum_steps 1"), words("--batch_size 5 --accum_steps 4")


@pytest.fixture
def run(house, tmp_path):
    """run("--struct", "imp", name="a") -> what was seen of the run; see `micro.record`."""

    def start(*flags, name="run", base=BASE, code=0):
        found = record(tmp_path / name, [*map(str, base), *map(str, flags)])
        assert found.code == code, found.err
        return found

    return start


def column(seen, name):
    return [row[name] for row in metrics(seen.dir)]


def assert_same_run(one, other):
    assert one.steps.keys() == other.steps.keys()
    for key, step in one.steps.items():
        assert largest_difference(step.weights, other.steps[key].weights) == 0, key
    assert metrics(one.dir, TIMES) == metrics(other.dir, TIMES)
    assert_same_masks(one, other)


def assert_same_masks(one, other):
    masks, others = one.run.progress.masks, other.run.progress.masks
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
    assert any(not mask.all() for mask in masks.values())


# -------------------------------------------------------------------------------------------------------- accumulation
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("images", "epochs", "steps"), [slow(40, 2, 4), (18, 4, 4)])  # in parts of 5 5 5 5, of 5 5 5 3
def test_accumulation_equals_the_whole_batch_in_float64(images, epochs, steps, run):
    flags = (*RAMP, *words("--clip_grad 0.3 --label_smoothing 0.1 --epochs"), epochs, "--train_limit", images)
    whole, parts = run(*flags, *WHOLE_BATCH, name="whole"), run(*flags, *IN_PARTS, name="parts")
    assert whole.steps.keys() == parts.steps.keys() == set(itertools.product(range(2), range(1, steps + 1)))
    for key, step in whole.steps.items():
        assert largest_difference(step.weights, parts.steps[key].weights) < 1e-9, key
    for one, other in zip(metrics(whole.dir, TIMES), metrics(parts.dir, TIMES), strict=True):
        assert one == pytest.approx(other, abs=1e-9)
    assert_same_masks(whole, parts)
    assert any(column(whole, "lambda"))
    first, last = whole.steps[0, 1].weights, whole.steps[1, steps].weights
    assert largest_difference(first, last) > 1e-3  # they agree on something


# ------------------------------------------------------------------------------------------------------ half precision
@pytest.mark.usefixtures("house")
@pytest.mark.parametrize("criterion", ["magnitude", "l1"])
def test_bf16_chooses_the_same_masks_for_equal_weights(criterion, tmp_path, add_noise):
    chosen = []
    for precision in ("off", "bf16"):
        run = make_run(tmp_path / precision, *RAMP, "--criteria", criterion, "--amp", precision, "--rate", "0.5")
        assert run.precision == {"off": None, "bf16": torch.bfloat16}[precision]
        add_noise(run.dense, scale=0.05)
        run.progress.state = 1
        chosen.append(choose_target(run)[1])
        run.close()
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"), [(1, 1, torch.bfloat16), (0, 1, torch.bfloat16), (0, 0, None), (None, None, None)]
)
def test_auto_is_bf16_on_cpus_with_instructions_for_it(amx, avx512, expected, monkeypatch):
    monkeypatch.delenv(utils.AMP_AUTO, raising=False)
    for name, has in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
        if has is None:  # a PyTorch that does not say
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: bool(has), raising=False)
    assert utils.pick_precision("auto", torch.device("cpu")) == expected
    assert utils.pick_precision("auto", torch.device("mps")) is None
    assert utils.pick_precision("off", torch.device("cpu")) is None


@pytest.mark.parametrize(("value", "expected"), [("bf16", torch.bfloat16), ("off", None)])
def test_a_variable_stands_for_auto_on_every_processor(value, expected, monkeypatch):
    monkeypatch.setenv(utils.AMP_AUTO, value)
    assert utils.pick_precision("auto", torch.device("cpu")) == expected
    assert utils.pick_precision("off", torch.device("cpu")) is None
    monkeypatch.setenv(utils.AMP_AUTO, "fp8")
    with pytest.raises(utils.RunError, match="must be bf16 or off"):
        utils.pick_precision("auto", torch.device("cpu"))


def test_bf16_losses_are_those_of_float32_within_its_digits(run):
    flags = ("--struct", "rsst", *BOTH, "--pruning_times", 1, "--lr", "0.02")
    whole, half = run(*flags, "--amp", "off", name="whole"), run(*flags, "--amp", "bf16", name="half")
    assert column(whole, "train_loss") != column(half, "train_loss")
    assert column(whole, "train_loss") == pytest.approx(column(half, "train_loss"), rel=2**-6)  # it keeps 8 digits


# --------------------------------------------------------------------------------------------------------- compilation
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


def test_many_compiled_states_stay_below_the_limit_of_recompilations(run, only_traced):
    limit, states = 1, 3
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        flags = ("--struct", "refill", *BOTH, *words("--compile --epochs 1 --rate 0.9 --pruning_times"), states)
        found = run(*flags)
    assert len(only_traced) == states
    assert len({step.width for step in found.steps.values()}) > limit


def assert_goes_on_to_the_same_bits(flags, state, run, folder):
    """A run broken off in the middle of a state and resumed ends as one that is not."""
    flags = (*flags, "--checkpoint_every", "1")
    whole = run(*flags, name="whole").dir
    broken_off([*BASE, *flags], folder, state, 4)
    assert metrics(folder, TIMES) == metrics(whole, TIMES)
    assert largest_difference(load(folder / "best.pt")["weights"], load(whole / "best.pt")["weights"]) == 0


def test_a_compiled_run_goes_on_to_the_same_bits(run, only_traced, tmp_path):
    assert_goes_on_to_the_same_bits(("--pruning_times", 1, "--compile"), 0, run, tmp_path / "broken")
    assert len(only_traced) == 3  # unbroken, broken, and where it went on


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_compiled_training_is_that_of_eager_training(precision, run):
    flags = (*RAMP, "--amp", precision, "--lr", "0.01")
    eager, compiled = run(*flags, name="eager"), run(*flags, "--compile", name="compiled")
    tolerance = 1e-4 if precision == "off" else 2**-6
    assert column(eager, "train_loss") == pytest.approx(column(compiled, "train_loss"), rel=tolerance)
    assert_same_masks(eager, compiled)
    assert "cut at step" in compiled.log
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
    monkeypatch.setattr(capture, "CudaGraph", Tape)
    monkeypatch.setattr(entry, "check_compile", lambda *_: None)
    monkeypatch.setattr(Tape, "made", [])
    return Tape.made


CAPTURED = {
    "rsst, a teacher": (*RAMP, *words("--sched cosine --momentum 0.8 --teacher self --kd_features 1")),
    "bf16, gradient form": (
        *RAMP,
        *IN_PARTS,
        *words(
            "--clip_grad 0.3 --amp bf16 --no-compact_training "
            "--block_loss_grad --reg_form gradient --warmup 1 --reg_finish 1"
        ),
    ),
    "filters, adamw": words(
        "--struct rsst --arch res20s --reg_finish 0.5 --pruning_times 2 --opt adamw --lr 0.002 --decreasing_lr 1"
    ),
}


@pytest.mark.parametrize("flags", CAPTURED.values(), ids=CAPTURED)
def test_a_captured_run_is_the_plain_run_bit_for_bit(flags, run, tapes):
    """Learning rate, lambda and batches change from step to step: all reach the captured step."""
    flags = (*flags, "--train_limit", 120)
    plain = run(*flags, name="plain")
    assert not tapes
    captured = run(*flags, "--compile", "graph", name="captured")
    assert sum(tape.replays for tape in tapes) >= 2 * 2 * STEPS
    assert {tape.warm_ups for tape in tapes if tape.replays} == {CapturedStep.WARM_UP}
    assert_same_run(plain, captured)


def use_float16(monkeypatch):
    for module in (utils, run_module):
        monkeypatch.setattr(module, "pick_precision", lambda *_: torch.float16)


@pytest.mark.parametrize("optimizer", [slow("sgd"), "adamw"])
def test_a_captured_fp16_run_skips_the_steps_that_the_plain_run_skips(optimizer, run, tapes, around, monkeypatch):
    """The scaler starts where gradients overflow and doubles every second step; the device decides whether to skip.

    Before the first step that is not skipped there is nothing to remember: no momentum, no moments.
    """
    use_float16(monkeypatch)
    scales, moments = {"plain": [], "captured": []}, []

    def high_scale(run):
        if run.progress.state == 0:
            run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28, growth_interval=2)

    def remember(training):
        found = scales[training.run.save_dir.parent.name]
        found.append(training.run.scaler.get_scale())
        if training.progress.state == 0 and found[-1] == 2.0 ** (28 - len(found)):  # skipped, all of them
            moments.extend(value.clone() for state in training.optimizer.state.values() for value in state.values())

    around("begin_state", before=high_scale)
    around("step", after=remember)
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
    assert_same_run(plain, captured)
    # Optimizer._accelerator_graph_capture_health_check: all(group["capturable"] for group in self.param_groups)
    groups = captured.run.optimizer.param_groups
    assert [group.get("capturable", optimizer == "sgd") for group in groups] == [True, True]


def test_a_run_goes_on_in_fp16_that_began_without_it(run, around, monkeypatch):
    """As --amp auto does when a run moves to an older GPU."""

    def stop(training):
        if training.progress.step == 4 and not training.run.scaler.is_enabled():
            raise KeyboardInterrupt

    around("step", before=stop)
    half = run("--struct", "imp", *words("--pruning_times 1 --amp auto --checkpoint_every 1"), code=130)
    use_float16(monkeypatch)
    assert call(["--resume", "--save_dir", half.dir]) == 0
    assert "cpu, fp16, seed" in (half.dir / "run.log").read_text()
    assert len(metrics(half.dir)) == 2


def test_a_loss_that_breaks_in_a_captured_step_is_named_by_its_step(run, tapes, around):
    def spoil(training):
        if (training.progress.state, training.progress.step) == (0, 10):
            with torch.no_grad():
                training.network.model.get_parameter("head.bias").fill_(math.nan)

    around("step", before=spoil)
    ended = run("--struct", "imp", *words("--compile graph --train_limit 160"), code=1)
    assert "not finite at step 10 of state 0" in ended.err
    assert tapes[0].replays > 10 - 3


def test_graphs_need_a_gpu_and_torchs_own_ones_cannot_accumulate(run):
    """Their second part overwrites the gradients of the first; a graph of the whole step has all parts."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(RunError, match=f"--compile {mode}: .* use compiled-graph or --accum_steps 1"):
            check_compile(mode, 2, gpu)
        check_compile(mode, 1, gpu)
        check_compile(mode, 2, cpu)
    for mode in (None, "default", *GRAPHS):
        check_compile(mode, 2, gpu)
    for mode in GRAPHS:
        ended = run("--struct", "imp", "--compile", mode, name=mode, code=2)
        assert ended.err.endswith(f"--compile {mode}: needs a CUDA GPU, this run is on cpu; leave it out\n")
        assert not ended.dir.exists()


def test_compiled_graph_captures_the_compiled_network(run, only_traced, tapes, monkeypatch):
    """Grey images, which arrive as views with strides of their own: nothing may be compiled in a capture."""
    traced, capture_tape = torch._dynamo.utils.counters["stats"], Tape.capture

    def without_compiling(tape, work):
        before = traced["unique_graphs"]
        capture_tape(tape, work)
        assert traced["unique_graphs"] == before > 0

    monkeypatch.setattr(Tape, "capture", without_compiling)
    flags = ("--struct", "rsst", *BOTH, *words("--pruning_times 2 --train_limit 120"))
    plain, both = run(*flags, name="plain"), run(*flags, "--compile", "compiled-graph", name="both")
    assert len(only_traced) == len(tapes) == 3
    assert {options["mode"] for options in only_traced} == {"default"}
    assert sum(tape.replays for tape in tapes) >= 2 * 2 * STEPS
    assert column(plain, "train_loss") == pytest.approx(column(both, "train_loss"), rel=1e-5)
    assert_same_masks(plain, both)


# ---------------------------------------------------------------------------------- checkpoints, written by a thread
@pytest.fixture
def delayed_writes(monkeypatch):
    """Nothing is written before somebody waits for it; the list holds each checkpoint that came to be on disk."""
    may_write, written, submit, wait = threading.Event(), [], Background.submit, Background.wait

    def delayed(write, *arguments):
        assert may_write.wait(60), "nobody waits for the writer"
        write(*arguments)
        if isinstance(arguments[1], RunState):
            written.append(load(arguments[0] / "checkpoint.pt"))

    def waiting(writer):
        may_write.set()
        try:
            wait(writer)
        finally:
            may_write.clear()

    monkeypatch.setattr(Background, "submit", lambda writer, *work: submit(writer, delayed, *work))
    monkeypatch.setattr(Background, "wait", waiting)
    return written


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def test_a_late_checkpoint_holds_the_moment_of_its_call(run, around, delayed_writes):
    expected, late, pending, moved = [], [], [], []

    def remember(run):
        late.append(len(expected) - len(delayed_writes))
        if expected:
            moved.append(largest_difference(expected[-1]["weights"], run.dense.state_dict()))
        content = {
            "weights": clones(run.dense.state_dict()), "moments": run.optimizer.state_dict()["state"],
            "scaler": run.scaler.state_dict(), "random": utils.random_states(),
            "run": {name: value for name, value in vars(run.progress).items() if name != "seconds"},
        }  # fmt: skip
        expected.append(copy.deepcopy(content))

    around("checkpoint", before=remember, after=lambda _: pending.append(len(expected) - len(delayed_writes)))
    flags = words("--reg_finish 0.5 --checkpoint_every 2 --lr 0.01 --clip_grad 1 --opt adamw")
    run("--struct", "rsst", *BOTH, *flags)
    assert len(delayed_writes) == len(expected) > 3 * 3
    for found, wanted in zip(delayed_writes, expected, strict=True):
        progress = vars(RunState.unpack(found["run"], torch.device("cpu")))
        del progress["seconds"]
        assert same({**{key: found[key] for key in wanted}, "run": progress}, wanted)
    assert set(late) == {0, 1}  # a state ends with all on disk
    assert set(pending) == {1}  # never two copies at a time
    assert late.count(1) >= 3 * 3
    assert sum(difference > 0 for difference in moved) > 3 * 2  # training went on in between
    assert any(content["run"]["sums"] for content in expected)
    assert any(state for content in expected for state in content["moments"].values())


@pytest.mark.parametrize(("failing", "steps"), [(1, 2 * STEPS), (9, 6 * STEPS)])
def test_a_failing_writer_stops_the_run_at_the_next_checkpoint_or_the_end(failing, steps, run, monkeypatch):
    """A state writes three: after each of its two epochs, and when it is done. The ninth is the last."""
    calls, replace = [], os.replace

    def fail(source, target):
        calls.extend([target] if Path(target).name == "checkpoint.pt" else [])
        if len(calls) == failing and calls[-1] == target:
            raise OSError(5, "the disk is gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    ended = run("--struct", "imp", code=1)
    assert ended.err.count("\n") == 1
    assert "the disk is gone" in ended.err
    assert (len(calls), len(ended.steps)) == (failing, steps)


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 2), ("adamw", 3)])
def test_a_checkpoint_of_vit_tiny_is_weights_and_moments_and_little_more(optimizer, copies):
    training = training_state(
        words("--arch vit_tiny --batch_size 2 --amp off --no-compact_training --opt") + [optimizer]
    )
    training.step()
    run = training.run
    run.checkpoint()
    run.recorder.writer.wait()
    weights = 4 * 2_697_610
    assert copies * weights < (run.save_dir / "checkpoint.pt").stat().st_size <= (copies + 0.1) * weights


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
def quiet_steps(monkeypatch):
    """Steps that may not wait; a line of facts for each. Methods that hand a tensor's values to Python, which on the
    CPU need no operation, fail inside."""
    seen, original = [], StateTraining.step

    def refuse(*_, **__):
        raise AssertionError("a step reads a tensor's values")

    def step(training):
        training.run.recorder.writer.wait()  # its thread reads values, and may
        epoch, batch = divmod(training.progress.step, training.run.round.steps_per_epoch)
        if batch == 0:  # the first batch of an epoch draws its order
            training.run.round.data.batch(training.progress.state, epoch, batch)

        def counters():
            """AdamW counts its steps in scalars that live on the CPU wherever the weights are."""
            return [state["step"] for state in training.optimizer.state.values() if "step" in state]

        with NoWaiting(counters) as mode, pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "numpy", "cpu", "__array__"):
                patch.setattr(torch.Tensor, name, refuse)
            original(training)
        less = len(training.network.masked) > 0 or training.network.model is not training.run.dense
        seen.append((less, bool(training.penalty), mode.operations))

    monkeypatch.setattr(StateTraining, "step", step)
    return seen


@pytest.mark.parametrize(
    "flags",
    ["--amp bf16 --clip_grad 0.3 --label_smoothing 0.1 --batch_size 5 --accum_steps 4",
     "--no-compact_training --reg_form gradient --clip_grad 0.3 --block_loss_grad --aug strong --sched cosine",
     "--compact_training --opt adamw --lr 0.002"],
)  # fmt: skip
@pytest.mark.usefixtures("house")
def test_no_step_waits_for_the_device_between_prints(flags, tmp_path, quiet_steps):
    """Nor where lambda and residual are recorded."""
    assert call([*BASE, *RAMP, "--train_limit", "80", *words(flags), "--save_dir", tmp_path / "run"]) == 0
    assert len(quiet_steps) == 2 * 2 * 4
    assert any(penalised for _, penalised, _ in quiet_steps)
    assert any(less for less, _, _ in quiet_steps)
    assert all(operations[torch.ops.aten.mm] for *_, operations in quiet_steps)  # the mode sees what a step does


@pytest.mark.usefixtures("house", "quiet_steps")
def test_a_step_that_prints_does_wait(tmp_path):
    with pytest.raises(AssertionError, match="waits for the device|reads a tensor"):
        call([*BASE, *words("--struct imp --print_freq 2 --save_dir"), tmp_path / "run"])


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


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_explicit_in_half_precision_with_gradients_on_the_cpu(device, gradients, fused_calls):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        fused_calls.clear()
        with torch.set_grad_enabled(gradients):
            out = attention(dtype=dtype, device=device)(torch.zeros(2, 5, 24, dtype=dtype, device=device))
        assert (out.shape, out.dtype) == ((2, 5, 24), dtype)
        explicit = device == "cpu" and gradients and dtype in (torch.bfloat16, torch.float16)
        assert fused_calls == ([] if explicit else [dtype])
    fused_calls.clear()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):  # counts as half precision
        attention()(torch.zeros(2, 5, 24))
    assert fused_calls == ([] if gradients else [torch.bfloat16])


def naive_attention(module, x):
    """Token by token and head by head, in float64."""
    heads, width = module.num_heads, module.head_dim
    qkv = module.qkv(x)
    out = []
    for image in range(len(x)):
        for token in range(x.shape[1]):
            for head in range(heads):
                q, k, v = (qkv[image, :, (part * heads + head) * width :][:, :width] for part in range(3))
                weights = [(q[token] @ key / math.sqrt(width)).exp() for key in k]
                out.append(sum(weight * value for weight, value in zip(weights, v, strict=True)) / sum(weights))
    return module.proj(torch.cat(out).reshape(*x.shape[:2], heads * width))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.1)])
def test_both_ways_compute_attention_and_its_gradients(dtype, tolerance, add_noise):
    module = add_noise(attention()).to(dtype)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    reference = copy.deepcopy(module).double()
    expected, trained = naive_attention(reference, x.double()), module(x)
    with torch.no_grad():
        fused = module(x)
    for found in (trained, fused):
        assert (found.double() - expected).abs().max() < tolerance
    assert expected.abs().max() > 1
    expected.square().sum().backward()
    trained.square().sum().backward()
    for one, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert (one.grad.double() - other.grad).norm() < tolerance * (1 + other.grad.norm())


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
@pytest.mark.usefixtures("only_traced")
@pytest.mark.parametrize("modes", [("graph",), pytest.param(gpu.MODES, marks=pytest.mark.slow)])
def test_the_gpu_benchmark_measures_every_mode(modes, tapes):
    assert set(gpu.MODES) >= {"plain", "eager", "default", *GRAPHS}
    args = SimpleNamespace(device="cpu", warm_up=5, steps=1, repeats=2, peak=100.0)
    rows = [gpu.measure("vit_tiny", 2, mode, args) for mode in modes]
    assert [row["mode"] for row in rows] == list(modes)
    for row in rows:
        speed = row["_speed"]
        # 0.1877 G multiply-adds an image (SPEC), a third of them forward, two operations each; 45,000 images an epoch
        assert float(row["MFU"].rstrip("%")) == pytest.approx(100 * 6 * 0.1877e9 * speed / 100e12, abs=0.051)
        assert float(row["s/epoch"].replace(",", "")) == pytest.approx(45_000 / speed, rel=0.01)
    graphs = len({*modes} & {*GRAPHS})
    assert [(tape.warm_ups, tape.replays) for tape in tapes] == [(3, 5 - 3 + 2)] * graphs


def test_a_mode_that_fails_leaves_the_other_rows(monkeypatch):
    saved, failures = (
        {},
        {"eager": torch.OutOfMemoryError("CUDA out of memory\nmore"), "graph": RuntimeError("no graphs")},
    )

    def measure(arch, batch_size, mode, args):
        if mode in failures:
            raise failures[mode]
        return {"model": arch, "mode": mode, "_speed": {"plain": 10.0, "default": 25.0}[mode]}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.common, "save", lambda name, content: saved.update(content))
    for modes, code in (
        ("plain eager graph default", "a, batch 4, eager: CUDA out of memory\na, batch 4, graph: no graphs"),
        ("plain default", None),
    ):
        monkeypatch.setattr(sys, "argv", words(f"gpu.py --device cpu --archs a --batch_sizes 4 --modes {modes}"))
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        assert [(row["mode"], row["over plain"]) for row in saved["rows"]] == [("plain", "1.00x"), ("default", "2.50x")]
        assert ended.value.code == code


OURS = ["plain", "plain, no lists", "ours, full size", "ours, full size, bf16", "ours, small", "ours, small, bf16"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags", "column", "rows"), [
    ("gpu", "--device cpu --batch_sizes 4 --modes plain eager --steps 1 --warm_up 1", "mode", ["plain", "eager"]),
    ("train_step", "--batch_size 2 --threads 1", "step", OURS),
    ("checkpoint", "", "checkpoint", ["plain", "ours", "plain", "ours"]),
])  # fmt: skip
def test_benchmarks_run_and_print_their_table(name, flags, column, rows, tmp_path):
    copied = tmp_path / "copy"  # where its JSON file replaces nobody's results
    unwanted = shutil.ignore_patterns("*.json", "__pycache__", ".*", "tests", "results", "data", "shared")
    shutil.copytree(REPOSITORY, copied, ignore=unwanted)
    done = subprocess.run(
        [sys.executable, copied / "benchmarks" / f"{name}.py", *words(f"--archs vit_tiny --repeats 1 {flags}")],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((copied / "benchmarks" / f"{name}.json").read_text())["rows"]
    assert [row[column] for row in found] == rows
    table = done.stdout.partition("\n\n")[2]
    assert all(str(value) in table for row in found for value in row.values())
    assert not list(tmp_path.glob("bench-*"))  # the run's folder goes again
