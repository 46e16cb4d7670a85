"""N:M sparsity: which weights stay, how states get there, runs that keep to it, and what sparse kernels make of it."""

import itertools
import math
import shutil

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import LAYERS, MICRO, PRUNABLE, assert_same_tensors, call, load, masks_of, metrics, rows_of, wrap
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

import export
import main_imp_fillback as entry
import report
from deployment import semi_structured
from models.vit import VisionTransformer
from pruning.nm import holds_pattern, nm_step, parse_pattern, scheduled_keep, weights_left
from reporting.flags import command
from reporting.run_report import describe


def by_loops(weight, mask, keep, group):
    """What stays, weight after weight: convolutions in the order of kernel positions and, within one, of channels."""
    expected = torch.zeros_like(mask)
    inner = [range(size) for size in weight.shape[2:]]
    for row in range(weight.shape[0]):
        places = [(row, channel, *at) for at in itertools.product(*inner) for channel in range(weight.shape[1])]
        for start in range(0, len(places), group):
            members = places[start : start + group]
            count = math.ceil(len(members) * keep / group)
            alive = [place for place in members if mask[place]]
            for place in sorted(alive, key=lambda place: -abs(float(weight[place])))[:count]:  # stable
                expected[place] = 1
    return expected


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_step_keeps_the_largest_of_each_group(data):
    """Against loops: ties, masks, rests, kernels, and groups shorter and longer than what is ranked by comparing."""
    group = data.draw(st.integers(2, 6) | st.integers(31, 35))
    keep = data.draw(st.integers(1, group - 1))
    kernel = data.draw(st.sampled_from([(), (1, 1), (2, 3)]))
    shape = (2, data.draw(st.integers(1, 9) | st.integers(30, 40)), *kernel)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randint(-3, 4, shape, generator=generator).float()
    mask = (torch.rand(shape, generator=generator) < 0.8).float()
    if kernel and data.draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    found = nm_step({"x": weight}, {"x": mask}, keep, group)["x"]
    assert torch.equal(found, by_loops(weight, mask, keep, group))
    assert holds_pattern(found, keep, group)
    whole = nm_step({"x": weight}, {"x": torch.ones(shape)}, keep, group)["x"]
    assert int(whole.sum()) == weights_left([weight.shape], keep, group)
    if keep > 1 and int(whole.sum()) > weights_left([weight.shape], keep - 1, group):
        assert not holds_pattern(whole, keep - 1, group)


def test_a_step_by_hand():
    weight = torch.tensor([[1.0, -2, 2, 0, 9, 9, 9, 9, 3, -4, 5], [0.0, 0, 0, 0, math.nan, 1, math.inf, 2, 0, 0, 0]])
    mask = torch.ones_like(weight)
    mask[0, 4:7] = 0
    found = nm_step({"x": weight}, {"x": mask}, 2, 4)["x"]
    assert found.tolist() == [
        [0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1],  # gone weights stay gone, whatever they are; of 3 at the end ceil(1.5) stay
        [1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0],
    ]
    assert holds_pattern(found, 2, 4)
    found[0, 0] = 1
    assert not holds_pattern(found, 2, 4)


def test_what_a_channels_last_kernel_multiplies_by_is_a_whole_group():
    """With 4 channels every position of a kernel keeps 2 of them, which sparse convolutions ask for."""
    weight = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = nm_step({"x": weight}, {"x": torch.ones_like(weight)}, 2, 4)["x"]
    assert torch.equal(found.sum(1), torch.full((3, 3, 3), 2.0))


@pytest.mark.parametrize(
    ("pattern", "schedule", "expected"),
    [
        ("2:4", "geometric", [4, 3, 2]),  # 4 / sqrt(2) = 2.83
        ("2:4", "linear", [4, 4, 3, 3, 2]),  # 3.5 and 2.5: halves up
        ("2:4", "constant", [4, 2, 2, 2]),
        ("2:4", "geometric", [4, 2]),
        ("1:4", "geometric", [4, 3, 2, 1]),  # 4 / 4^(1/3) = 2.52, 1.59
        ("4:8", "linear", [8, 7, 6, 5, 4]),
        ("1:16", "geometric", [16, 8, 4, 2, 1]),
    ],
)
def test_states_lead_to_the_pattern(pattern, schedule, expected):
    states = len(expected)
    found = [scheduled_keep(*parse_pattern(pattern), schedule, state, states) for state in range(states)]
    assert found == expected


# ----------------------------------------------------------------------------------------------------------- runs


NM = ("--nm", "2:4")


def kept_by_group(mask, width=4):
    return torch.as_tensor(mask).view(-1, width).sum(1).unique().tolist()


@pytest.mark.parametrize("struct", ["imp", "refill", "rsst"])
def test_runs_end_with_two_of_four(struct, seen, noisy):
    run = seen("--struct", struct, "--init", noisy, *NM)
    masks = masks_of(load(run.dir / "checkpoint.pt"), "masks")
    assert list(masks) == LAYERS
    assert {tuple(kept_by_group(mask)) for mask in masks.values()} == {(2,)}
    assert [float(row["density"]) for row in rows_of(run.dir / "states.csv")] == [1, 0.75, 0.5]
    for keep, end in zip((4, 3, 2), run.ends.values(), strict=True):
        assert all(holds_pattern(end[f"{name}.weight"], keep, 4) for name in LAYERS)
        assert sum(int(end[f"{name}.weight"].count_nonzero()) for name in LAYERS) == PRUNABLE * keep // 4
    for state, keep in ((1, 3), (2, 2)):
        assert f"state {state} prunes to {keep}:4, density {25 * keep:.2f}%" in run.log
    # chosen by the weights that the state before ended with, of what was left
    for state, keep in ((1, 3), (2, 2)):
        trained = {name: run.ends[state - 1][f"{name}.weight"] for name in LAYERS}
        before = {
            name: (run.starts[state].masks if struct == "rsst" else run.starts[state - 1].masks)[name]
            for name in LAYERS
        }
        assert_same_tensors(run.starts[state].target, nm_step(trained, before, keep, 4))


def test_rsst_chooses_what_imp_chooses(seen, noisy):
    """From state 0, which is the same for both; and what it dooms trains on until the cut."""
    imp, rsst = (seen("--struct", struct, "--init", noisy, *NM) for struct in ("imp", "rsst"))
    assert_same_tensors(rsst.starts[1].target, imp.starts[1].target)
    assert_same_tensors(imp.starts[1].masks, imp.starts[1].target)
    assert all(mask.all() for mask in rsst.starts[1].masks.values())
    assert (rsst.steps[1, 1].weights[f"{LAYERS[0]}.weight"] != 0).all()
    assert set(rsst.cuts) == {1, 2}


@pytest.mark.usefixtures("house")
def test_a_broken_off_run_goes_on_to_the_same_bits(seen, noisy, tmp_path):
    flags = ("--struct", "rsst", "--init", noisy, *NM)
    whole = seen(*flags)

    def kill(training):
        if (training.run.progress.state, training.run.progress.step) == (2, 3):
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, "step", before=kill)
        assert call([*MICRO, *flags, "--save_dir", folder]) == 130
    assert call(["--resume", "--save_dir", folder]) == 0
    first, second = load(whole.dir / "best.pt"), load(folder / "best.pt")
    assert_same_tensors(second["weights"], first["weights"])
    drop = ("seconds", "images_per_second")
    assert metrics(folder, drop) == metrics(whole.dir, drop)
    assert call(["--resume", "--save_dir", folder, "--pruning_times", "4"]) == 2  # the counts of each state change


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        *((f"--nm {value}", f"--nm {value}: ") for value in ("4:2", "0:4", "4:4", "x", "2:4:8", "124", "2:10000")),
        ("--nm 2:4 --vit_structured", "--nm 2:4: "),
        ("--nm 2:4 --fillback_rate 0.1", "--fillback_rate 0.1: "),
        ("--nm 2:4 --struct oneshot", "--struct oneshot: "),
        ("--nm 2:4 --arch res20s --struct rsst", "--struct imp"),
    ],
)
def test_what_makes_no_sense_is_one_line(flags, named, capsys, tmp_path):
    assert call([*MICRO, *flags.split(), "--save_dir", tmp_path / "run"]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("house")
def test_the_plan_is_what_happens(seen, noisy, capsys, tmp_path):
    """Density of each state, for a ViT and for a ResNet's single weights; a rate is noted as without effect."""
    args = entry.parse_args([*MICRO, *NM, "--ratio_schedule", "linear"])
    assert args.notes == ["--rate: has no effect with --nm 2:4, which says how many weights stay"]
    run = seen("--struct", "imp", "--init", noisy, *NM)
    parameters = [int(row["parameters"]) for row in rows_of(run.dir / "states.csv")]
    assert call([*MICRO, *NM, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert [int(line.split()[4].replace(",", "")) for line in shown.splitlines() if "%" in line] == parameters
    assert "Of every 4 consecutive weights of a row 4, 3, 2 stay." in shown
    (tmp_path / "flags.yaml").write_text("nm: '2:4'\nstruct: imp\narch: res20s\n")
    # 3x3 kernels of 16, 32 and 64 channels and shortcuts: all divide by 4
    assert call(["--config", tmp_path / "flags.yaml", "--dataset", "digits", "--pruning_times", 2, "--dry_run"]) == 0
    assert "50.00%" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- export


@pytest.mark.usefixtures("house")
def test_an_export_says_what_it_holds(seen, noisy, tmp_path, capsys):
    run = seen("--struct", "rsst", "--init", noisy, *NM)
    shutil.copytree(run.dir, tmp_path / "copy")
    assert yaml.safe_load((run.dir / "args.yaml").read_text())["nm"] == "2:4"
    assert export.main([str(tmp_path / "copy"), "--latency"]) == 0
    folder = tmp_path / "copy" / "model"
    said = "the weights of 8 2:4 linear layers stay dense and bring no speed here: cpu has no kernels for them"
    assert said in (folder / "latency.txt").read_text()
    assert export.read_config(folder)["provenance"]["nm"] == "2:4"
    assert (
        "Of every 4 consecutive weights of a row of the pruned layers at most 2 are not zero."
        in (folder / "README.md").read_text()
    )
    told = report.load_run(tmp_path / "copy")
    assert "Of every 4 consecutive weights of a row 2 stay in the end, on a geometric schedule." in describe(told)
    assert "--nm 2:4" in command(told)
    assert "--ratio_schedule geometric" in command(told)
    assert "--rate" not in command(told)
    model = export.load(folder)
    assert list(semi_structured.sparse_layers(model)) == LAYERS
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert export.semi_structured_(model).startswith(said)
    assert_same_tensors(model.state_dict(), before)


def pruned_vit():
    """Weights of shapes that the kernels take, 2:4."""
    torch.manual_seed(0)
    geometry = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    model = VisionTransformer(num_classes=10, **geometry).eval()
    layers = {name: layer for name, layer in model.named_modules() if name.endswith(("qkv", "proj", "fc1", "fc2"))}
    layers.pop("patch_embed.proj")
    weights = {name: layer.weight for name, layer in layers.items()}
    for name, mask in nm_step(
        weights, {name: torch.ones_like(weight) for name, weight in weights.items()}, 2, 4
    ).items():
        weights[name].data *= mask
    return model, layers


def test_the_compressed_form_of_the_kernels_holds_all_weights():
    """PyTorch's own conversion, which runs on the CPU too, keeps two weights of four: ours, without a loss."""
    model, layers = pruned_vit()
    assert semi_structured.sparse_layers(model).keys() == layers.keys()
    for layer in layers.values():
        weight = layer.weight.detach().half()
        values, places = conversions.sparse_semi_structured_from_dense_cutlass(weight)
        assert values.shape == (weight.shape[0], weight.shape[1] // 2)
        assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, places), weight)
    dense = torch.ones(32, 64).half()
    assert not torch.equal(
        conversions.sparse_semi_structured_to_dense_cutlass(
            *conversions.sparse_semi_structured_from_dense_cutlass(dense)
        ),
        dense,
    )


def test_layers_that_are_not_two_of_four_stay_dense():
    model, layers = pruned_vit()
    with torch.no_grad():
        layers["blocks.0.mlp.fc1"].weight[5, :3] = 1
    assert semi_structured.sparse_layers(model).keys() == layers.keys() - {"blocks.0.mlp.fc1"}


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [((7, 5), torch.float16, "7.5"), ((8, 0), torch.float32, "not float32"), ((9, 0), torch.bfloat16, "")],
)
def test_which_gpus_have_the_kernels(capability, dtype, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    found = semi_structured.why_dense(torch.device("cuda"), dtype)
    assert why in found
    assert bool(found) == bool(why)


def test_a_layer_that_the_kernels_refuse_is_as_it_was():
    """As where a GPU does not take its shape: PyTorch refuses tensors of the CPU in the same way."""
    layer = nn.Linear(8, 8)
    weight = layer.weight
    assert "Only CUDA tensors" in semi_structured._make_sparse_(layer)
    assert layer.weight is weight
