"""What a CUDA GPU does differently, in runs and exports of the small models of the other tests.

Every body runs on the CPU as well, with stand-ins: a tape for the CUDA graph, a compiler that traces and generates no
code, and no check of the device. On a GPU nothing is replaced.
"""

import json

import pytest
import torch
from micro import BOTH, STEPS
from test_dataset import numbered
from test_folders import in_order, same, write_images
from test_nm import pruned_vit
from test_speed import (  # noqa: F401  `only_traced`, `run` and `tapes` are fixtures
    Tape,
    assert_goes_on_to_the_same_bits,
    assert_same_masks,
    assert_same_run,
    column,
    only_traced,
    run,
    tapes,
    use_float16,
    words,
)

import export
from dataset import DATASETS, Batches, FolderBatches
from deployment import semi_structured

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))
RAMP = (*words("--struct rsst --reg_finish 0.5 --pruning_times 2 --lr 0.005 --train_limit 120"), *BOTH)


@pytest.fixture(params=["cpu", GPU])
def device(request):
    if request.param == "cpu":
        request.getfixturevalue("only_traced")
        request.getfixturevalue("tapes")
    yield request.param
    if request.param == "cuda":
        torch.compiler.reset()


@pytest.fixture
def train(run, device):  # noqa: F811
    """train("--struct", "imp", name="a"): `run` of test_speed.py on the device."""
    return lambda *flags, **how: run(*flags, "--device", device, **how)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_captured_step_is_the_eager_step(optimizer, train):
    """RSST's penalty grows and the learning rate changes from step to step."""
    flags = (*RAMP, "--opt", optimizer, "--deterministic")
    eager, captured = (train(*flags, *more, name=f"{len(more)}") for more in ((), ("--compile", "graph")))
    assert len(eager.steps) > 2 * STEPS
    assert_same_run(eager, captured)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "compiled-graph"])
def test_every_mode_of_compilation_trains_as_eager_does(mode, optimizer, train):
    flags = (*RAMP, "--opt", optimizer)
    eager, compiled = train(*flags, name="eager"), train(*flags, "--compile", mode, name="compiled")
    assert column(eager, "train_loss") == pytest.approx(column(compiled, "train_loss"), rel=1e-3)
    assert_same_masks(eager, compiled)
    assert "cut at step" in compiled.log


def test_a_compiled_conv_stem_trains_as_eager_does(train):
    flags = words("--arch vit_mini --stem conv --patch_size 8 --img_size 16 --struct refill --pruning_times 2")
    eager, compiled = train(*flags, name="eager"), train(*flags, "--compile", "compiled-graph", name="compiled")
    assert column(eager, "train_loss") == pytest.approx(column(compiled, "train_loss"), rel=1e-3)


@pytest.mark.parametrize("compilation", [(), ("--compile", "graph")], ids=["eager", "graph"])
def test_fp16_loses_no_more_than_its_digits(compilation, train, device, monkeypatch):
    plain = train(*RAMP, name="plain")
    if device == "cpu":  # which refuses --amp fp16
        use_float16(monkeypatch)
    half = train(*RAMP, *compilation, *(("--amp", "fp16") if device == "cuda" else ()), name="half")
    assert "fp16, seed" in half.log
    assert column(plain, "train_loss") != column(half, "train_loss")
    assert column(plain, "train_loss") == pytest.approx(column(half, "train_loss"), rel=2**-5)


def test_a_captured_run_goes_on_to_the_same_bits(run, device, around, tmp_path):  # noqa: F811
    flags = (*RAMP, *words("--opt adamw --compile graph --deterministic --device"), device)
    assert_goes_on_to_the_same_bits(flags, 1, run, tmp_path / "broken")
    assert device == "cuda" or sum(tape.replays for tape in Tape.made) > STEPS


def test_a_cnn_is_proven_and_exported_where_convolutions_may_round(train, device, capsys):
    """TF32 convolutions differ by more than the bound, which float64 on the CPU has to meet."""
    flags = words("--arch res20s --struct rsst --rate 0.4 --epochs 1 --pruning_times 2 --amp auto")
    done = train(*flags)
    capsys.readouterr()
    assert export.main([str(done.dir), "--device", device, "--fold", "--evaluate"]) == 0
    for folder in (done.dir / "model", done.dir / "model" / "folded"):
        proof = json.loads((folder / "parity.json").read_text())
        assert proof["max_difference_float64"] <= proof["bound"]
        assert proof["top1_agreement"] >= 0.95
    config = export.read_config(done.dir / "model")
    assert config["parameters"]["removed"] < config["parameters"]["dense"]
    assert config["metrics"]["test_accuracy"] == pytest.approx(
        float(done.run.progress.states[-1]["test_accuracy"]), abs=2 / 359
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_kernels_compute_the_same(dtype, device):
    model = pruned_vit()[0].to(device, dtype)
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        expected = model(images)
        said = export.semi_structured_(model)
        found = model(images)
    if semi_structured.why_dense(torch.device(device), dtype):
        assert "stay dense" in said
        assert torch.equal(found, expected)
    else:
        assert said == "the weights of 8 of 8 2:4 linear layers are sparse"
        assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_batches_have_the_bits_of_the_cpu(device):
    facts = DATASETS["cifar10"]
    here, there = (Batches(numbered(50), facts, 20, device=where, seed=2, aug="basic") for where in ("cpu", device))
    for got, expected in zip(there.batch(1, 2, 1), here.batch(1, 2, 1), strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_files_have_the_bits_of_the_cpu_and_draw_nothing_on_the_device(tmp_path, workers, device):
    def states():
        return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]

    split, facts = write_images(tmp_path, 8), DATASETS["imagenet"]
    here, before = in_order(FolderBatches(split, facts, 4, aug="strong")), states()
    there = FolderBatches(split, facts, 4, device=device, aug="strong", workers=workers)
    assert all(same([t.cpu() for t in batch], here[key]) for key, batch in in_order(there).items())
    assert same(states(), before)
    there.close()
