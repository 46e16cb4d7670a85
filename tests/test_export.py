"""Laws of the small model that a run ends with: nothing changes by removal, on disk, in timm, in ONNX Runtime."""

import copy
import json
import math
import os
import pickletools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import export
import main_imp_fillback
from dataset import DATASETS, load_dataset
from models import build_model
from models.resnet import ResNet
from models.vit import CONFIGS, VisionTransformer
from utils import RunError
from vit_structured_pruning import (
    find_working_units,
    fold_dead_units_,
    remove_units,
    select_units,
    vit_cost,
    vit_units,
)

ROOT = Path(export.__file__).resolve().parent
DIM, DEPTH, HEADS, WIDTH, HIDDEN, CLASSES = 12, 2, 3, 4, 24, 5  # the micro model: 8 px, patch 4, so 4 + 1 tokens
MODEL_FILES = ["README.md", "config.json", "model.safetensors", "parity.json"]


# ------------------------------------------------------------------------------------- models, made independently


def noisy(model, seed=0, scale=0.1):
    """Noise on every weight, bias and norm, so that no initial zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model.eval()


def micro(seed=0, scale=0.3, **overrides):
    geometry = {"img_size": 8, "patch_size": 4, "num_classes": CLASSES, "embed_dim": DIM}
    geometry |= {"depth": DEPTH, "num_heads": HEADS, "mlp_ratio": HIDDEN / DIM}
    return noisy(VisionTransformer(**{**geometry, **overrides}), seed, scale)


def pictures(count=4, size=8, seed=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def head_rows(attn, heads):
    """Rows of qkv that belong to `heads`, from the definition."""
    width, total = attn.head_dim, attn.num_heads * attn.head_dim
    return [part * total + head * width + i for part in range(3) for head in heads for i in range(width)]


def head_columns(attn, heads):
    return [head * attn.head_dim + i for head in heads for i in range(attn.head_dim)]


def others(count, kept):
    return [unit for unit in range(count) if unit not in kept]


@torch.no_grad()
def masked_like(model, kept, columns_only=False):
    """A copy with zeros where units are not kept: their columns alone, or rows and biases too."""
    masked = copy.deepcopy(model)
    for layer, block in enumerate(masked.blocks):
        attn, mlp = block.attn, block.mlp
        heads = others(attn.num_heads, kept.get(f"blocks.{layer}.attn", range(attn.num_heads)))
        neurons = others(mlp.fc1.out_features, kept.get(f"blocks.{layer}.mlp", range(mlp.fc1.out_features)))
        attn.proj.weight[:, head_columns(attn, heads)] = 0
        mlp.fc2.weight[:, neurons] = 0
        if not columns_only:
            attn.qkv.weight[head_rows(attn, heads)] = 0
            attn.qkv.bias[head_rows(attn, heads)] = 0
            mlp.fc1.weight[neurons] = 0
            mlp.fc1.bias[neurons] = 0
    return masked


def choose(model, kinds, sorting_mode, min_units=1, ratio=0.45, seed=3):
    """Units that stay, by random scores of which some layers have larger ones."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for kind in kinds:
        scores = {
            key: torch.rand(group.count, generator=generator, dtype=torch.float64) + 0.2 * group.layer
            for key, group in vit_units(model, (kind,)).items()
        }
        kept |= select_units(scores, ratio, sorting_mode, min_units)
    return kept


@torch.no_grad()
def assert_same_function(masked, small, images):
    """In both precisions, on copies; the bounds of SPEC 5.8."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        one, two = (copy.deepcopy(model).to(dtype).eval() for model in (masked, small))
        expected, found = one(images.to(dtype)), two(images.to(dtype))
        assert expected.isfinite().all()
        difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
        assert difference <= bound * max(1.0, largest), f"{dtype}: {difference} with logits up to {largest}"


def parameters_of(dim, heads, neurons, width, tokens, patch, classes):
    """Parameters of a removed ViT, from its definition."""
    blocks = sum(
        4 * dim + (dim + 1) * 3 * h * width + (h * width + 1) * dim + (dim + 1) * n + (n + 1) * dim
        for h, n in zip(heads, neurons, strict=True)
    )
    return blocks + (3 * patch**2 + 1) * dim + dim + tokens * dim + 2 * dim + (dim + 1) * classes


def macs_of(dim, heads, neurons, width, tokens, patch, classes):
    """The formula of SPEC 3."""
    blocks = sum(
        3 * tokens * dim * h * width + 2 * tokens**2 * h * width + tokens * h * width * dim + 2 * tokens * dim * n
        for h, n in zip(heads, neurons, strict=True)
    )
    return (tokens - 1) * 3 * patch**2 * dim + blocks + dim * classes


def counts_of(model):
    heads = [block.attn.num_heads for block in model.blocks]
    return heads, [block.mlp.fc1.out_features for block in model.blocks]


MICRO_KEPT = {"blocks.0.attn": [0, 2], "blocks.0.mlp": [1, 5, 7, 23], "blocks.1.attn": [1], "blocks.1.mlp": [0, 2, 4]}
EMPTY_ATTENTION = {**MICRO_KEPT, "blocks.0.attn": []}
EMPTY_MLP = {**MICRO_KEPT, "blocks.1.mlp": []}
EMPTY_BLOCK = {**MICRO_KEPT, "blocks.1.attn": [], "blocks.1.mlp": []}


def batches_of(*sizes, size=8):
    return [(pictures(n, size, seed), torch.zeros(n, dtype=torch.long)) for seed, n in enumerate(sizes)]


def write_micro(folder, kept=MICRO_KEPT, seed=0, **changes):
    """An exported micro model; returns (masked, small)."""
    masked = masked_like(micro(seed), kept)
    content = {"batches": batches_of(5, 3), "facts": DATASETS["cifar10"], "provenance": {}, "metrics": {}, **changes}
    return masked, export.write(folder, masked, kept, **content)


# ------------------------------------------------------------------------------------------------ masked or removed


@pytest.mark.parametrize("sorting_mode", ["layer-wise", "global"])
@pytest.mark.parametrize("kinds", [("head",), ("neuron",), ("head", "neuron")], ids="+".join)
@pytest.mark.parametrize("columns_only", [True, False])
def test_removal_is_lossless(kinds, sorting_mode, columns_only):
    model = noisy(build_model("vit_tiny", 10))
    kept = choose(model, kinds, sorting_mode)
    heads_left = {len(ids) for key, ids in kept.items() if key.endswith("attn")}
    neurons_left = {len(ids) for key, ids in kept.items() if key.endswith("mlp")}
    if sorting_mode == "global":
        assert all(len(counts) > 1 for counts in (heads_left, neurons_left) if counts), "counts must differ by layer"
    else:
        assert heads_left <= {1}
        assert neurons_left <= {211}
    masked = masked_like(model, kept, columns_only)
    before = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    small, returned = export.compact(masked, kept)

    assert returned == {
        key: list(kept[key]) if key in kept else list(range(group.count)) for key, group in vit_units(model).items()
    }
    assert_same_function(masked, small, pictures(size=32))
    with torch.no_grad():
        unpruned = (masked(pictures(size=32)) - model(pictures(size=32))).abs().max()
    assert unpruned > 1e-2, "what was removed must have mattered"
    assert [len(returned[f"blocks.{i}.attn"]) for i in range(9)] == counts_of(small)[0]
    assert [len(returned[f"blocks.{i}.mlp"]) for i in range(9)] == counts_of(small)[1]

    # the model passed in is as it was
    assert counts_of(masked) == ([3] * 9, [384] * 9)
    assert before.keys() == masked.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in masked.state_dict().items())
    shared = {p.data_ptr() for p in masked.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared


@pytest.mark.parametrize("kept", [MICRO_KEPT, EMPTY_ATTENTION, EMPTY_MLP, EMPTY_BLOCK])
def test_kept_units_are_the_rows_and_columns_asked_for(kept):
    model = micro()
    small, _ = export.compact(masked_like(model, kept), kept)
    for layer, (block, cut) in enumerate(zip(model.blocks, small.blocks, strict=True)):
        heads, neurons = kept[f"blocks.{layer}.attn"], kept[f"blocks.{layer}.mlp"]
        assert torch.equal(cut.attn.qkv.weight, block.attn.qkv.weight[head_rows(block.attn, heads)])
        assert torch.equal(cut.attn.qkv.bias, block.attn.qkv.bias[head_rows(block.attn, heads)])
        assert torch.equal(cut.attn.proj.weight, block.attn.proj.weight[:, head_columns(block.attn, heads)])
        assert torch.equal(cut.attn.proj.bias, block.attn.proj.bias)
        assert torch.equal(cut.mlp.fc1.weight, block.mlp.fc1.weight[neurons])
        assert torch.equal(cut.mlp.fc1.bias, block.mlp.fc1.bias[neurons])
        assert torch.equal(cut.mlp.fc2.weight, block.mlp.fc2.weight[:, neurons])
        assert torch.equal(cut.mlp.fc2.bias, block.mlp.fc2.bias)
        assert (cut.attn.head_dim, cut.attn.scale) == (WIDTH, WIDTH**-0.5)
    assert_same_function(masked_like(model, kept), small, pictures())


def test_global_selection_may_empty_a_branch():
    """With min_units 0 the first layers, whose scores are lowest, lose all they have."""
    model = noisy(build_model("vit_tiny", 10, depth=4))
    scores = {f"blocks.{i}.attn": torch.full((3,), float(i), dtype=torch.float64) for i in range(4)}
    kept = select_units(scores, 0.5, "global", min_units=0)
    scores = {f"blocks.{i}.mlp": torch.full((384,), -float(i), dtype=torch.float64) for i in range(4)}
    kept |= select_units(scores, 0.6, "global", min_units=0)
    assert [len(kept[f"blocks.{i}.attn"]) for i in range(4)] == [0, 0, 3, 3]
    assert [len(kept[f"blocks.{i}.mlp"]) for i in range(4)] == [384, 230, 0, 0]
    masked = masked_like(model, kept)
    small, _ = export.compact(masked, kept)
    assert_same_function(masked, small, pictures(size=32))


def check_arch(arch, **overrides):
    model = noisy(build_model(arch, 7, **overrides), scale=0.05)
    kept = choose(model, ("head", "neuron"), "global", min_units=0, ratio=0.5)
    masked = masked_like(model, kept)
    small, _ = export.compact(masked, kept)
    heads, neurons = counts_of(small)
    size, patch, dim = model.patch_embed.img_size[0], model.patch_embed.patch_size[0], model.embed_dim
    geometry = (dim, heads, neurons, model.blocks[0].attn.head_dim, (size // patch) ** 2 + 1, patch, 7)
    assert sum(p.numel() for p in small.parameters()) == parameters_of(*geometry)
    assert vit_cost(model, kept)["macs"] == macs_of(*geometry)
    assert_same_function(masked, small, pictures(2, size))


@pytest.mark.parametrize("arch", list(CONFIGS))
def test_every_arch(arch):
    overrides = {"img_size": 64} if arch.endswith("imagenet") else {}
    check_arch(arch, depth=2, **overrides)  # the widths are what differs


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(CONFIGS))
def test_every_arch_in_full(arch):
    check_arch(arch)


def test_one_head_of_three(tmp_path):
    """Each head takes 3 x 64 rows of 192 and their biases, and 64 columns of 192, in each of 9 blocks."""
    model = noisy(build_model("vit_tiny", 10))
    everything = {f"blocks.{i}.attn": [0, 1, 2] for i in range(9)}
    fewer = {f"blocks.{i}.attn": others(3, [i % 3]) for i in range(9)}
    sizes = {}
    for name, kept, parameters in (("dense", everything, 2_697_610), ("removed", fewer, 2_253_514)):
        masked, folder = masked_like(model, kept), tmp_path / name
        small = export.write(folder, masked, kept, batches_of(2, size=32), DATASETS["cifar10"], {}, {})
        assert sum(p.numel() for p in small.parameters()) == parameters
        assert json.loads((folder / "config.json").read_text())["parameters"]["removed"] == parameters
        sizes[name] = (folder / "model.safetensors").stat().st_size
        header = sizes[name] - 4 * parameters
        assert 0 < header < 200 * len(small.state_dict())
    # 444,096 parameters went; the headers differ by digits of shapes and offsets
    assert sizes["dense"] - sizes["removed"] == pytest.approx(4 * (2_697_610 - 2_253_514), abs=500)


# ------------------------------------------------------------------------------------------------ element-wise runs


def parts(model, layer=0):
    attn, mlp = model.blocks[layer].attn, model.blocks[layer].mlp
    total = attn.num_heads * attn.head_dim
    rows = {name: slice(i * total + WIDTH, i * total + 2 * WIDTH) for i, name in enumerate("qkv")}  # of head 1
    return attn, mlp, rows


def zero_proj_columns(model):
    parts(model)[0].proj.weight[:, WIDTH : 2 * WIDTH] = 0


def zero_v_rows(model):
    attn, _, rows = parts(model)
    attn.qkv.weight[rows["v"]] = 0


def zero_q_rows(model):
    attn, _, rows = parts(model)
    attn.qkv.weight[rows["q"]] = 0


def zero_k_rows(model):
    attn, _, rows = parts(model)
    attn.qkv.weight[rows["k"]] = 0


def zero_q_and_k_rows(model):
    zero_q_rows(model)
    zero_k_rows(model)


def zero_one_v_row_less(model):
    attn, _, rows = parts(model)
    attn.qkv.weight[rows["v"]][1:] = 0


def zero_fc1_rows(model):
    parts(model)[1].fc1.weight[[2, 9]] = 0


def zero_fc2_columns(model):
    parts(model)[1].fc2.weight[:, [2, 9]] = 0


def zero_fc1_bias(model):
    parts(model)[1].fc1.bias[[2, 9]] = 0


def zero_both_kinds(model):
    zero_v_rows(model)
    zero_fc1_rows(model)


def zero_all_v_rows(model):
    attn = parts(model)[0]
    attn.qkv.weight[2 * HEADS * WIDTH :] = 0


def zero_all_fc1_rows(model):
    parts(model)[1].fc1.weight[:] = 0


ALL_HEADS, ALL_NEURONS = list(range(HEADS)), list(range(HIDDEN))
DEATHS = [
    # what is zero, heads and neurons that block 0 keeps, whether removal without folding would change the function
    (zero_proj_columns, [0, 2], ALL_NEURONS, False),
    (zero_v_rows, [0, 2], ALL_NEURONS, True),
    (zero_q_rows, ALL_HEADS, ALL_NEURONS, False),
    (zero_k_rows, ALL_HEADS, ALL_NEURONS, False),
    (zero_q_and_k_rows, ALL_HEADS, ALL_NEURONS, False),
    (zero_one_v_row_less, ALL_HEADS, ALL_NEURONS, False),
    (zero_fc2_columns, ALL_HEADS, others(HIDDEN, [2, 9]), False),
    (zero_fc1_rows, ALL_HEADS, others(HIDDEN, [2, 9]), True),
    (zero_fc1_bias, ALL_HEADS, ALL_NEURONS, False),
    (zero_both_kinds, [0, 2], others(HIDDEN, [2, 9]), True),
    (zero_all_v_rows, [], ALL_NEURONS, True),
    (zero_all_fc1_rows, ALL_HEADS, [], True),
]


@torch.no_grad()
@pytest.mark.parametrize(("kill", "heads", "neurons", "needs_folding"), DEATHS, ids=[d[0].__name__ for d in DEATHS])
def test_dead_units_are_found_folded_and_removed(kill, heads, neurons, needs_folding):
    model = micro().double()
    kill(model)
    alive = {"blocks.0.attn": heads, "blocks.0.mlp": neurons, "blocks.1.attn": ALL_HEADS, "blocks.1.mlp": ALL_NEURONS}
    assert find_working_units(model) == alive
    small, kept = export.compact(model)
    assert kept == alive
    assert counts_of(small) == ([len(heads), HEADS], [len(neurons), HIDDEN])
    images = pictures(dtype=torch.float64)
    expected = model(images)
    scale = max(1.0, float(expected.abs().max()))
    assert (expected - small(images)).abs().max() <= 1e-12 * scale
    unfolded = remove_units(copy.deepcopy(model), vit_units(model), alive)
    difference = float((expected - unfolded(images)).abs().max())
    assert difference > 1e-4 if needs_folding else difference <= 1e-12 * scale


@torch.no_grad()
def test_folded_constant_by_hand():
    model = micro().double()
    zero_both_kinds(model)
    before = copy.deepcopy(model)
    fold_dead_units_(model, find_working_units(model))
    attn, mlp, rows = parts(before)
    constant = attn.proj.weight[:, WIDTH : 2 * WIDTH] @ attn.qkv.bias[rows["v"]]
    torch.testing.assert_close(model.blocks[0].attn.proj.bias, attn.proj.bias + constant, rtol=0, atol=1e-14)
    expected = mlp.fc2.bias.clone()
    for neuron in (2, 9):
        bias = float(mlp.fc1.bias[neuron])
        expected += mlp.fc2.weight[:, neuron] * bias * 0.5 * (1 + math.erf(bias / math.sqrt(2)))
    torch.testing.assert_close(model.blocks[0].mlp.fc2.bias, expected, rtol=0, atol=1e-14)
    changed = {
        name
        for (name, old), new in zip(before.state_dict().items(), model.state_dict().values(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {"blocks.0.attn.proj.bias", "blocks.0.mlp.fc2.bias"}


@torch.no_grad()
def test_without_an_output_bias_a_constant_keeps_its_unit():
    model = micro().double()
    attn, mlp, _ = parts(model)
    attn.proj.bias = mlp.fc2.bias = None
    zero_both_kinds(model)
    assert find_working_units(model)["blocks.0.attn"] == ALL_HEADS
    assert find_working_units(model)["blocks.0.mlp"] == ALL_NEURONS
    zero_proj_columns(model)
    zero_fc2_columns(model)
    assert find_working_units(model)["blocks.0.attn"] == [0, 2]
    assert find_working_units(model)["blocks.0.mlp"] == others(HIDDEN, [2, 9])


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "head_goes"),
    [({}, True), ({"qkv_bias": False}, True), ({"proj_bias": False}, False), ({"init_values": 0.5}, True)],
)
def test_dead_units_of_a_timm_model(options, head_goes):
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2,
        num_classes=CLASSES,
        **options,
    )
    model = noisy(model, scale=0.3).double()
    zero_v_rows(model)
    zero_fc2_columns(model)
    small, kept = export.compact(model)
    assert kept["blocks.0.attn"] == ([0, 2] if head_goes else ALL_HEADS)
    assert kept["blocks.0.mlp"] == others(HIDDEN, [2, 9])
    expected, found = (m(pictures(dtype=torch.float64)) for m in (model, small))
    assert (expected - found).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------ the folder


@torch.no_grad()
@pytest.mark.parametrize("kept", [MICRO_KEPT, EMPTY_ATTENTION, EMPTY_MLP, EMPTY_BLOCK])
def test_folder_holds_the_model(tmp_path, kept):
    provenance, metrics = {"arch": "micro", "seed": 3}, {"test_accuracy": 0.25}
    masked, small = write_micro(tmp_path / "a" / "model", kept, provenance=provenance, metrics=metrics)
    folder = tmp_path / "a" / "model"
    assert sorted(path.name for path in folder.iterdir()) == MODEL_FILES  # and no temporary file

    config = json.loads((folder / "config.json").read_text())
    heads, neurons = ([len(kept[f"blocks.{i}.{part}"]) for i in range(2)] for part in ("attn", "mlp"))
    assert config["vit"] == {
        "img_size": 8,
        "patch_size": 4,
        "num_classes": CLASSES,
        "embed_dim": DIM,
        "depth": DEPTH,
        "num_heads": HEADS,
    }
    assert (config["head_dim"], config["heads"], config["neurons"]) == (WIDTH, heads, neurons)
    assert config["kept_heads"] == [kept["blocks.0.attn"], kept["blocks.1.attn"]]
    assert config["kept_neurons"] == [kept["blocks.0.mlp"], kept["blocks.1.mlp"]]
    assert config["mean"] == [0.4914, 0.4822, 0.4465]
    assert config["std"] == [0.2470, 0.2435, 0.2616]
    assert (config["provenance"], config["metrics"]) == (provenance, metrics)
    full = (DIM, [HEADS] * 2, [HIDDEN] * 2, WIDTH, 5, 4, CLASSES)
    cut = (DIM, heads, neurons, WIDTH, 5, 4, CLASSES)
    assert config["parameters"] == {"dense": parameters_of(*full), "removed": parameters_of(*cut)}
    assert config["macs"] == {"dense": macs_of(*full), "removed": macs_of(*cut)}

    loaded = export.load(folder)
    assert not any(module.training for module in loaded.modules())
    assert loaded.state_dict().keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(pictures()), small(pictures()))
    assert torch.equal(export.load(str(folder))(pictures()), small(pictures()))

    # the proof, measured again
    proof = json.loads((folder / "parity.json").read_text())
    images = torch.cat([batch for batch, _ in batches_of(5, 3)])
    expected, found = masked(images), loaded(images)
    difference = float((expected - found).abs().max())
    assert proof["images"] == 8
    assert difference <= 1e-5
    assert proof["max_difference_float32"] == pytest.approx(difference, abs=1e-6)
    assert proof["max_difference_float64"] <= 1e-12
    assert proof["largest_logit"] == pytest.approx(float(expected.abs().max()), rel=1e-5)
    assert proof["top1_agreement"] == 1.0

    card = (folder / "README.md").read_text()
    for number in (parameters_of(*full), parameters_of(*cut)):
        assert f"{number:,}" in card
    assert str(heads) in card
    assert "test_accuracy: 0.25" in card


def test_grey_data_set_normalises_three_channels(tmp_path):
    """Grey images become three channels, so each gets the one mean; digits and Fashion-MNIST are grey."""
    for name in ("digits", "fashionmnist"):
        write_micro(tmp_path / name, facts=DATASETS[name])
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["mean"] == list(DATASETS[name].mean) * 3
        assert config["std"] == list(DATASETS[name].std) * 3


@torch.no_grad()
def test_parity_measures_what_differs():
    """A quarter more on one class: the difference is known, and so are the images whose answer changes."""
    masked = micro()
    other = copy.deepcopy(masked)
    other.head.bias[2] += 0.25
    added = float(other.head.bias[2].double() - masked.head.bias[2].double())  # 0.25 but for rounding
    batches = batches_of(9, 70, 40)
    expected = torch.cat([masked(images) for images, _ in batches])
    found = expected.clone()
    found[:, 2] += 0.25
    agreed = float((expected.argmax(1) == found.argmax(1)).float().mean())
    assert 0 < agreed < 1
    masked.train()
    masked.blocks[1].eval()
    modes = [module.training for module in masked.modules()]
    proof = export.parity(masked, other, batches)
    assert [module.training for module in masked.modules()] == modes
    assert proof["images"] == 119
    assert proof["max_difference_float32"] == pytest.approx(0.25, abs=1e-5)
    assert proof["max_difference_float64"] == pytest.approx(added, abs=1e-12)
    assert proof["largest_logit"] == pytest.approx(float(expected.abs().max()), rel=1e-5)
    assert proof["bound_float32"] == pytest.approx(1e-5 * max(1, float(expected.abs().max())), rel=1e-5)
    assert proof["top1_agreement"] == pytest.approx(agreed)


@torch.no_grad()
@pytest.mark.parametrize("place", range(3))
def test_parity_looks_at_every_batch(place):
    """Two models differ in what they make of one red pixel, which only one image of one batch has."""
    masked = micro()
    other = copy.deepcopy(masked)
    other.patch_embed.proj.weight[:3, 0, 0, 0] += 1  # the same for all would vanish in the norm
    batches = batches_of(2, 2, 2)
    for images, _ in batches:
        images[:, 0, ::4, ::4] = 0
    assert export.parity(masked, other, batches)["max_difference_float32"] <= 1e-5
    batches[place][0][1, 0, 0, 0] = 1.0
    assert export.parity(masked, other, batches)["max_difference_float32"] > 1e-2


def corrupt(change):
    def remove_and_corrupt(model, units, kept):
        small = remove_units(model, units, kept)
        with torch.no_grad():
            change(small)
        return small

    return remove_and_corrupt


MISMATCHES = {
    "a little": lambda model: model.head.bias.add_(1e-3),
    "not a number": lambda model: model.head.bias.fill_(math.nan),
    "not a number in one class": lambda model: model.head.bias[1].fill_(math.nan),
    "infinite": lambda model: model.head.bias.fill_(math.inf),
}


@pytest.mark.parametrize("change", MISMATCHES.values(), ids=MISMATCHES)
def test_a_model_that_computes_something_else_is_not_written(tmp_path, monkeypatch, change):
    monkeypatch.setattr(export, "remove_units", corrupt(change))
    with pytest.raises(RunError) as caught:
        write_micro(tmp_path / "model")
    assert caught.value.code == 1
    assert not list(tmp_path.iterdir())


def test_units_that_still_work_are_not_dropped(tmp_path):
    write_micro(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    masked = masked_like(micro(), MICRO_KEPT)
    for key in MICRO_KEPT:
        fewer = {**MICRO_KEPT, key: MICRO_KEPT[key][1:]}
        content = (batches_of(5, 3), DATASETS["cifar10"], {}, {})
        with pytest.raises(RunError) as caught:
            export.write(tmp_path / "model", masked, fewer, *content)
        assert caught.value.code == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


# ------------------------------------------------------------------------------------------------ plain timm


def snippet_of(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


TIMM_DRIVER = """
import json, os, sys
report = {}
for folder in sys.argv[1:]:
    os.chdir(folder)
    space = {}
    try:
        exec(open("snippet.py").read(), space)
    except RuntimeError as error:
        report[folder] = {"refused": str(error)[:80]}
        continue
    import torch
    from safetensors.torch import load_file
    check, model = load_file("check.safetensors"), space["model"]
    with torch.no_grad():
        difference = float((model(check["images"]) - check["logits"]).abs().max())
    report[folder] = {"difference": difference, "kind": type(model).__module__, "training": model.training}
report["modules"] = [[name, getattr(module, "__file__", None)] for name, module in sys.modules.items()]
print(json.dumps(report))
"""


@torch.no_grad()
def test_timm_alone_loads_the_folder(tmp_path):
    pytest.importorskip("timm")
    sizes = {"whole": {}, "some": MICRO_KEPT, "no-attention": EMPTY_ATTENTION, "no-mlp": EMPTY_MLP}
    sizes |= {"no-block": EMPTY_BLOCK}
    folders = {name: tmp_path / name for name in (*sizes, "tiny", "lacking", "extra")}
    for name, kept in sizes.items():
        masked, _ = write_micro(folders[name], kept)
        images = pictures(6, seed=1)
        save_file({"images": images, "logits": masked(images)}, folders[name] / "check.safetensors")
    model = noisy(build_model("vit_tiny", 10))
    kept = choose(model, ("head", "neuron"), "global")
    masked, images = masked_like(model, kept), pictures(2, 32)
    export.write(folders["tiny"], masked, kept, batches_of(2, size=32), DATASETS["cifar10"], {}, {})
    save_file({"images": images, "logits": masked(images)}, folders["tiny"] / "check.safetensors")
    # strict: neither a missing nor an unknown tensor passes
    for name in ("lacking", "extra"):
        shutil.copytree(folders["some"], folders[name])
        weights = load_file(folders[name] / "model.safetensors")
        weights.pop("blocks.1.mlp.fc2.bias") if name == "lacking" else weights.update(extra=torch.zeros(1))
        save_file(weights, folders[name] / "model.safetensors")
    for folder in folders.values():
        code = snippet_of(folder)
        assert code == export.LOADING_SNIPPETS["vit"]
        assert len(code.splitlines()) < 20
        (folder / "snippet.py").write_text(code)

    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", TIMM_DRIVER, *map(str, folders.values())]
    done = subprocess.run(
        command, cwd=folders["some"], env=clean, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name in (*sizes, "tiny"):
        found = report[str(folders[name])]
        assert found.get("kind", "").startswith("timm."), (name, found)
        assert found["difference"] <= 1e-5, name
        assert found["training"] is False
    for name in ("lacking", "extra"):
        assert "refused" in report[str(folders[name])], name
    ours = {path.stem for path in ROOT.glob("*.py")} | {"models"}
    for name, file in report["modules"]:
        assert name.partition(".")[0] not in ours
        assert file is None or ROOT not in Path(file).parents or "site-packages" in file, file


# ------------------------------------------------------------------------------------------------ damaged folders


def assert_refused(folder, *words):
    with pytest.raises(RunError) as caught:
        export.load(folder)
    message = str(caught.value)
    assert caught.value.code == 2
    assert str(folder) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_one_flipped_byte_is_refused(tmp_path):
    write_micro(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *range(8, header, 5), header, header + 1, *range(header, len(whole), 97), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert_refused(tmp_path / "model")
    path.write_bytes(whole)
    export.load(tmp_path / "model")


def changes_of(value, place=()):
    """Every plain value inside `value` as (place, another value of its type)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from changes_of(inner, (*place, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from changes_of(inner, (*place, index))
    else:
        yield place, value + ("x" if isinstance(value, str) else 1)


def test_one_changed_config_value_is_refused(tmp_path):
    write_micro(tmp_path / "model", provenance={"arch": "micro"}, metrics={"val_accuracy": 0.5})
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    places = list(changes_of(config))
    assert len(places) > 30
    for place, value in places:
        changed = copy.deepcopy(config)
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        path.write_text(json.dumps(changed))
        assert_refused(tmp_path / "model")
    for key in config:
        path.write_text(json.dumps({name: value for name, value in config.items() if name != key}))
        assert_refused(tmp_path / "model")
    path.write_text(json.dumps({**config, "more": 1}))
    assert_refused(tmp_path / "model")
    path.write_text(json.dumps(config))  # other white space is no other content
    export.load(tmp_path / "model")


DAMAGES = {
    "config.json missing": lambda f: (f / "config.json").unlink(),
    "model.safetensors missing": lambda f: (f / "model.safetensors").unlink(),
    "everything missing": shutil.rmtree,
    "a file in its place": lambda f: (shutil.rmtree(f), f.write_text("model")),
    "config.json a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "config.json empty": lambda f: (f / "config.json").write_text(""),
    "config.json cut": lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:99]),
    "config.json not text": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00{"),
    "config.json a list": lambda f: (f / "config.json").write_text("[1, 2]"),
    "config.json null": lambda f: (f / "config.json").write_text("null"),
    "config.json an empty object": lambda f: (f / "config.json").write_text("{}"),
    "header garbage": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 512),
    "header no JSON": lambda f: (f / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"x" * 64),
    "a pickle": lambda f: torch.save({"a": torch.ones(2)}, f / "model.safetensors"),
    "another model's weights": lambda f: (
        write_micro(f.parent / "other", seed=1),
        shutil.copy(f.parent / "other" / "model.safetensors", f),
    ),
    "another model's config": lambda f: (
        write_micro(f.parent / "other", seed=1),
        shutil.copy(f.parent / "other" / "config.json", f),
    ),
} | {
    f"weights cut to {size}": lambda f, size=size: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:size]
    )
    for size in (0, 4, 8, 100, 5000, -1)
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_folder_is_refused_in_one_line(tmp_path, damage):
    write_micro(tmp_path / "model")
    damage(tmp_path / "model")
    assert_refused(tmp_path / "model")


# ------------------------------------------------------------------------------------------------ a finished run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """One small structured run; tests read it and never write into it."""
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = "--dataset digits --train_limit 80 --epochs 1 --pruning_times 2 --batch_size 32 --amp off --device cpu"
    flags += " --vit_structured --vit_prune_target both --rate 0.34 --mlp_prune_ratio 0.5"
    assert main_imp_fillback.main([*flags.split(), "--save_dir", str(folder)]) == 0
    return folder


RUN_INPUTS = ("args.yaml", "metrics.jsonl", "states.csv", "best.pt", "checkpoint.pt")


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """The files of the run without its model/."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in RUN_INPUTS:
        os.link(finished_run / name, folder / name)  # whoever changes one writes a new file
    return folder


def replace(path, content):
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def no_timing(monkeypatch):
    """Images per second without timing: 100 dense, 150 removed."""
    speeds = {"dense": 100.0, "masked": 100.0, "removed": 150.0}
    monkeypatch.setattr(export, "throughput", lambda models, *_, **__: {name: speeds[name] for name in models})


@pytest.fixture
def command(capsys):
    def run(*argv):
        capsys.readouterr()
        try:
            code = export.main([str(value) for value in argv])
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def assert_one_line(result, *words, code=2):
    found, _, err = result
    assert found == code
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert "error: " in lines[0]
    for word in words:
        assert str(word) in lines[0]


def masked_of(run):
    """The run's selected model, put together by hand."""
    model = build_model("vit_tiny", 10, 16)
    best = torch.load(run / "best.pt", weights_only=True)
    model.load_state_dict(best["weights"])
    return model.eval(), best["kept"]


@torch.no_grad()
def test_command_writes_the_model_of_a_run(run_copy, finished_run, command):
    """With everything on, and nothing stubbed."""
    code, out, err = command(run_copy, "--latency", "--evaluate")
    assert (code, err) == (0, "")
    folder = run_copy / "model"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*MODEL_FILES, "latency.txt"])
    masked, kept = masked_of(run_copy)
    assert {len(ids) for key, ids in kept.items() if key.endswith("attn")} == {1}  # floor(3 x 0.66)
    assert {len(ids) for key, ids in kept.items() if key.endswith("mlp")} == {192}
    config = json.loads((folder / "config.json").read_text())
    assert config["kept_heads"] == [kept[f"blocks.{i}.attn"] for i in range(9)]
    assert config["kept_neurons"] == [kept[f"blocks.{i}.mlp"] for i in range(9)]
    small = export.load(folder)
    assert_same_function(masked, small, pictures(size=16))
    at_the_end = load_file(finished_run / "model" / "model.safetensors")  # by the run itself
    assert at_the_end.keys() == small.state_dict().keys()
    assert all(torch.equal(at_the_end[name], tensor) for name, tensor in small.state_dict().items())

    # accuracy of the masked model, from raw pixels
    test = load_dataset("digits", "data", 16).test
    facts = DATASETS["digits"]
    images = (test.images.double() / 255 - facts.mean[0]) / facts.std[0]
    correct = int((masked(images.float().expand(-1, 3, -1, -1)).argmax(1) == test.labels).sum())
    assert config["metrics"]["test_accuracy"] == correct / len(test.labels)
    assert f"test accuracy {100 * correct / len(test.labels):.2f}% of {len(test.labels)} images" in out
    assert config["metrics"]["val_accuracy"] == torch.load(run_copy / "best.pt", weights_only=True)["accuracy"]
    assert config["provenance"]["arch"] == "vit_tiny"
    assert config["provenance"]["dataset"] == "digits"

    table = (folder / "latency.txt").read_text()
    assert table.strip() in out
    rows = read_table(table.splitlines()[1:])
    assert [row["batch"] for row in rows] == ["1", "8", "64"]
    assert all(float(row["dense ms"]) > 0 and float(row["removed ms"]) > 0 for row in rows)


def test_command_takes_another_folder(run_copy, command, no_timing, tmp_path):
    assert command(run_copy, "--out", tmp_path / "elsewhere")[0] == 0
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == MODEL_FILES
    assert not (run_copy / "model").exists()


def test_command_finds_dead_units_of_an_elementwise_run(run_copy, command, no_timing):
    """The same weights without the list of kept units: the zeros alone tell which heads and neurons are gone."""
    args = yaml.safe_load((run_copy / "args.yaml").read_text())
    replace(run_copy / "args.yaml", yaml.safe_dump({**args, "vit_structured": False}))
    masked, kept = masked_of(run_copy)
    best = torch.load(run_copy / "best.pt", weights_only=True)
    (run_copy / "best.pt").unlink()
    torch.save({**best, "kept": {}}, run_copy / "best.pt")
    assert command(run_copy)[0] == 0
    config = json.loads((run_copy / "model" / "config.json").read_text())
    assert config["kept_heads"] == [kept[f"blocks.{i}.attn"] for i in range(9)]
    assert config["kept_neurons"] == [kept[f"blocks.{i}.mlp"] for i in range(9)]
    assert_same_function(masked, export.load(run_copy / "model"), pictures(size=16))


def test_evaluate_on_another_data_set_needs_its_classes(tmp_path, command):
    """cifar100 is not on this machine and must not be fetched; digits has 10 classes, so a stand-in is made."""
    path, out = tmp_path / "four.pt", tmp_path / "model"
    torch.save(build_model("vit_tiny", 4, 16).state_dict(), path)
    flags = ["--from_checkpoint", path, "--arch", "vit_tiny", "--out", out]
    assert_one_line(command(*flags, "--evaluate", "--dataset", "digits"), "--dataset digits", "10 classes")
    assert not out.exists()


def test_command_refuses_a_model_that_computes_something_else(run_copy, command, monkeypatch):
    monkeypatch.setattr(export, "remove_units", corrupt(MISMATCHES["a little"]))
    assert_one_line(command(run_copy), "differs", code=1)
    assert not (run_copy / "model").exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def edit_args(folder, **changes):
    args = yaml.safe_load((folder / "args.yaml").read_text())
    replace(folder / "args.yaml", yaml.safe_dump({**args, **changes}))


def stopped_in_last_state(folder):
    """What a run of two epochs a state leaves when it is stopped after the last state's first one."""
    edit_args(folder, epochs=2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["state"], row["epoch"]) for row in rows] == [(0, 0), (1, 0)]
    rows.insert(1, {**rows[0], "epoch": 1})
    replace(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    replace(folder / "states.csv", "\n".join((folder / "states.csv").read_text().splitlines()[:2]) + "\n")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["run"] |= {"state": 1, "step": 2, "begun": True, "states": checkpoint["run"]["states"][:1]}
    (folder / "checkpoint.pt").unlink()
    torch.save(checkpoint, folder / "checkpoint.pt")


def change_best(folder, content):
    (folder / "best.pt").unlink()
    torch.save(content, folder / "best.pt")


def first_row_only(folder):
    replace(folder / "metrics.jsonl", (folder / "metrics.jsonl").read_text().splitlines()[0] + "\n")


BAD_RUNS = {
    "one more state to come": (lambda f: edit_args(f, pruning_times=3), "not finished"),
    "an epoch of the last state to come": (stopped_in_last_state, "not finished"),
    "only one row": (first_row_only, ""),
    "no rows": (lambda f: replace(f / "metrics.jsonl", ""), ""),
    "no metrics": (lambda f: (f / "metrics.jsonl").unlink(), ""),
    "metrics damaged": (lambda f: replace(f / "metrics.jsonl", '{"state": 1'), ""),
    "metrics not rows": (lambda f: replace(f / "metrics.jsonl", "[1]\n"), ""),
    "no args": (lambda f: (f / "args.yaml").unlink(), ""),
    "args damaged": (lambda f: replace(f / "args.yaml", "a: [1"), ""),
    "args with code": (
        lambda f: replace(f / "args.yaml", f"!!python/object/apply:builtins.open ['{f / 'ran'}', w]"),
        "",
    ),
    "args not a mapping": (lambda f: replace(f / "args.yaml", "just text"), ""),
    "args empty": (lambda f: replace(f / "args.yaml", "{}"), ""),
    "args not text": (lambda f: replace(f / "args.yaml", b"\xff\xfe\x00\x01"), ""),
    "no best.pt": (lambda f: (f / "best.pt").unlink(), "best.pt"),
    "best.pt truncated": (lambda f: replace(f / "best.pt", (f / "best.pt").read_bytes()[:-1000]), "best.pt"),
    "best.pt empty": (lambda f: replace(f / "best.pt", ""), "best.pt"),
    "best.pt with code": (lambda f: change_best(f, {"state": 1, "weights": Payload(f / "ran")}), "best.pt"),
    "best.pt of something else": (lambda f: change_best(f, {"a": torch.ones(1)}), ""),
    "nothing there": (shutil.rmtree, ""),
}


@pytest.mark.parametrize(("damage", "word"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_what_is_not_a_finished_run_is_refused(run_copy, command, damage, word):
    damage(run_copy)
    assert_one_line(command(run_copy), run_copy, word)
    assert not (run_copy / "model").exists()
    assert not (run_copy / "ran").exists()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["RUN", "--from_checkpoint", "file.pt", "--arch", "vit_tiny", "--out", "OUT"],
        ["--from_checkpoint", "file.pt", "--out", "OUT"],
        ["--from_checkpoint", "file.pt", "--arch", "vit_tiny"],
        ["--from_checkpoint", "file.pt", "--arch", "vit_none", "--out", "OUT"],
        ["RUN", "--dataset", "none"],
        ["RUN", "--unknown"],
        ["RUN", "--arch", "vit_small"],  # would be ignored
        ["RUN", "--out", "FILE"],
        ["RUN", "--out", "FILE/model"],
    ],
    ids=" ".join,
)
def test_contradicting_flags_are_refused_in_one_line(run_copy, command, no_timing, tmp_path, flags):
    (tmp_path / "file").write_text("in the way")
    names = {"RUN": run_copy, "OUT": tmp_path / "out", "FILE": tmp_path / "file", "FILE/model": tmp_path / "file" / "m"}
    code, _, err = command(*(names.get(flag, flag) for flag in flags))
    assert code in ((1, 2) if "--out" in flags and "RUN" in flags else (2,))  # a place that cannot be written may be 1
    assert len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()
    assert not (run_copy / "model").exists()


def test_cuda_without_cuda_is_refused(run_copy, command):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert_one_line(command(run_copy, "--device", "cuda"), "--device cuda")
    assert not (run_copy / "model").exists()


# ------------------------------------------------------------------------------------------------ nothing pickled


def globals_in(path):
    """module.name of every global that the pickles of a torch.save archive ask for."""
    found = set()
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
        assert pickles
        for name in pickles:
            strings = []
            for opcode, argument, _ in pickletools.genops(archive.read(name)):
                if "STRING" in opcode.name or "UNICODE" in opcode.name:
                    strings.append(argument)
                elif opcode.name in ("GLOBAL", "INST"):
                    found.add(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    found.add(".".join(strings[-2:]))
                assert opcode.name not in ("EXT1", "EXT2", "EXT4")
    return found


def test_no_file_holds_a_pickled_class(finished_run, tmp_path):
    readers = {
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".safetensors": load_file,
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".png": lambda path: path.read_bytes().index(b"\x89PNG"),
    } | dict.fromkeys((".csv", ".html", ".log", ".md", ".txt"), lambda path: path.read_text(encoding="utf-8"))
    paths = [path for path in finished_run.rglob("*") if path.is_file()]
    assert {"best.pt", "checkpoint.pt", "init.pt", "model.safetensors"} <= {path.name for path in paths}
    for path in paths:
        readers[path.suffix](path)
        if path.suffix == ".pt":
            assert {name.partition(".")[0] for name in globals_in(path)} <= {"torch", "collections"}, path
    for protocol in (2, 4):  # the scan sees what it must
        torch.save({"a": tmp_path}, tmp_path / "class.pt", pickle_protocol=protocol)
        assert any(name.startswith("pathlib") for name in globals_in(tmp_path / "class.pt"))


# ------------------------------------------------------------------------------------------------ a foreign checkpoint


DIGITS_KEPT = {f"blocks.{i}.attn": [i % 3] for i in range(9)} | {"blocks.2.mlp": list(range(0, 384, 3))}


def torch_pruned(rows_only):
    """vit_tiny under torch.nn.utils.prune; the masks zero whole units, their biases stay."""
    model = noisy(build_model("vit_tiny", 10, 16))
    kept = {**{f"blocks.{i}.mlp": list(range(384)) for i in range(9)}, **DIGITS_KEPT}
    for layer, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        heads, neurons = others(3, kept[f"blocks.{layer}.attn"]), others(384, kept[f"blocks.{layer}.mlp"])
        masks = {part: torch.ones_like(part.weight) for part in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)}
        masks[attn.qkv][head_rows(attn, heads)] = 0
        masks[mlp.fc1][neurons] = 0
        if not rows_only:
            masks[attn.proj][:, head_columns(attn, heads)] = 0
            masks[mlp.fc2][:, neurons] = 0
        for part, mask in masks.items():
            prune.custom_from_mask(part, "weight", mask)
    return model, kept


def nest(weights, layout):
    if layout == "nested":
        return {"epoch": 3, "state_dict": weights, "best_acc1": 71.5, "optimizer": {"lr": 0.1}}
    if layout == "parallel":
        return {"state_dict": {f"module.{name}": value for name, value in weights.items()}}
    return weights


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "layout", "rows_only"),
    [
        ("plain.pt", "plain", False),
        ("plain.pt", "plain", True),
        ("model.pth.tar", "nested", False),
        ("parallel.pth", "parallel", True),
    ],
)
def test_import_of_a_masked_checkpoint(tmp_path, command, no_timing, file, layout, rows_only):
    model, kept = torch_pruned(rows_only)
    weights = dict(model.state_dict())
    assert "blocks.0.attn.qkv.weight_orig" in weights
    torch.save(nest(weights, layout), tmp_path / file)
    flags = ["--from_checkpoint", tmp_path / file, "--arch", "vit_tiny", "--out", tmp_path / "out"]
    code, _, err = command(*flags)
    assert (code, err) == (0, "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kept_heads"] == [kept[f"blocks.{i}.attn"] for i in range(9)]
    assert config["kept_neurons"] == [kept[f"blocks.{i}.mlp"] for i in range(9)]
    assert config["vit"]["img_size"] == 16
    small, images = export.load(tmp_path / "out"), pictures(size=16)
    assert counts_of(small) == ([1] * 9, [384, 384, 128] + [384] * 6)
    expected = model(images)  # torch's own masks
    assert (expected - small(images)).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def test_import_with_data_measures_on_it(tmp_path, command, no_timing):
    model, _ = torch_pruned(rows_only=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    flags = ["--from_checkpoint", tmp_path / "model.pt", "--arch", "vit_tiny", "--out", tmp_path / "out"]
    assert command(*flags, "--dataset", "digits", "--evaluate")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mean"] == list(DATASETS["digits"].mean) * 3
    splits = load_dataset("digits", "data", 16)
    facts = DATASETS["digits"]
    images = (splits.test.images.double() / 255 - facts.mean[0]) / facts.std[0]
    correct = int((model(images.float().expand(-1, 3, -1, -1)).argmax(1) == splits.test.labels).sum())
    assert config["metrics"]["test_accuracy"] == correct / len(splits.test.labels)
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["images"] == len(splits.val.labels) == 144


def test_evaluate_of_an_import_needs_the_data_set(tmp_path, command, no_timing):
    torch.save(build_model("vit_tiny", 10, 16).state_dict(), tmp_path / "model.pt")
    flags = ["--from_checkpoint", tmp_path / "model.pt", "--arch", "vit_tiny", "--out", tmp_path / "out"]
    assert_one_line(command(*flags, "--evaluate"), "--dataset")
    assert not (tmp_path / "out").exists()


def tiny_weights(**changes):
    weights = dict(build_model("vit_tiny", 10, 16).state_dict())
    return {name: value for name, value in {**weights, **changes}.items() if value is not None}


def truncate(path):
    torch.save(tiny_weights(), path)
    path.write_bytes(path.read_bytes()[:-5000])


BAD_CHECKPOINTS = {
    "with code": ("file.pth.tar", lambda p: torch.save({"state_dict": {"a": Payload(p.parent / "ran")}}, p)),
    "with code beside good weights": (
        "file.pt",
        lambda p: torch.save({**tiny_weights(), "note": Payload(p.parent / "ran")}, p),
    ),
    "truncated": ("file.pt", truncate),
    "empty": ("file.pt", lambda p: p.write_bytes(b"")),
    "text": ("file.pth", lambda p: p.write_text("hello")),
    "a list": ("file.pth", lambda p: torch.save([torch.ones(2)], p)),
    "names that are numbers": ("file.pth", lambda p: torch.save({0: torch.ones(2)}, p)),
    "missing": ("file.pth", lambda p: None),
    "a folder": ("file.pth", lambda p: p.mkdir()),
    "safetensors text": ("file.safetensors", lambda p: p.write_text("hello, here is no header")),
    "another arch": ("file.pt", lambda p: torch.save(build_model("vit_small", 10, depth=2).state_dict(), p)),
    "another model": ("file.pt", lambda p: torch.save({"conv1.weight": torch.ones(3, 3)}, p)),
    "one tensor less": ("file.pt", lambda p: torch.save(tiny_weights(**{"norm.bias": None}), p)),
    "one tensor more": ("file.pt", lambda p: torch.save(tiny_weights(more=torch.ones(1)), p)),
    "flat position embedding": ("file.pt", lambda p: torch.save(tiny_weights(pos_embed=torch.ones(7)), p)),
    "weight not a tensor": ("file.pt", lambda p: torch.save(tiny_weights(**{"head.weight": 3.0}), p)),
    "mask of another shape": (
        "file.pt",
        lambda p: torch.save(
            tiny_weights(
                **{"norm.weight": None, "norm.weight_orig": torch.ones(192), "norm.weight_mask": torch.ones(5)}
            ),
            p,
        ),
    ),
}


@pytest.mark.parametrize(("name", "make"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_checkpoint_that_does_not_fit_is_refused(tmp_path, command, no_timing, name, make):
    make(tmp_path / name)
    result = command("--from_checkpoint", tmp_path / name, "--arch", "vit_tiny", "--out", tmp_path / "out")
    assert_one_line(result)
    assert name in result[2] or "vit_tiny" in result[2]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ ONNX


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """A micro model with its ONNX file, exported once."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("onnx")
    _, small = write_micro(folder / "model")
    worst = export.to_onnx(small, folder / "model.onnx")
    return folder / "model.onnx", small, worst


def onnx_logits(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    return torch.from_numpy(found)


@torch.no_grad()
def test_onnx_runtime_computes_the_same(onnx_file):
    path, small, worst = onnx_file
    assert sorted(file.name for file in path.parent.iterdir()) == ["model", "model.onnx"]
    assert 0 <= worst <= 1e-4
    for batch in (1, 2, 3, 7):
        images = pictures(batch, seed=batch)
        found = onnx_logits(path, images)
        assert found.shape == (batch, CLASSES)
        assert (found - small(images)).abs().max() <= 1e-4


@torch.no_grad()
def test_onnx_of_emptied_branches(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    kept = {**MICRO_KEPT, "blocks.0.attn": [], "blocks.1.mlp": []}
    masked, small = write_micro(tmp_path / "model", kept)
    export.to_onnx(small, tmp_path / "model.onnx")
    for batch in (1, 3):
        images = pictures(batch, seed=batch)
        assert (onnx_logits(tmp_path / "model.onnx", images) - masked(images)).abs().max() <= 1e-4


@pytest.mark.parametrize("change", MISMATCHES.values(), ids=MISMATCHES)
def test_onnx_that_computes_something_else_is_removed(onnx_file, tmp_path, monkeypatch, change):
    """Torch is made to hand out another model's file."""
    path, small, _ = onnx_file
    monkeypatch.setattr(torch.onnx, "export", lambda model, inputs, target, **_: shutil.copy(path, target))
    other = copy.deepcopy(small)
    export.to_onnx(other, tmp_path / "same.onnx")
    with torch.no_grad():
        change(other)
    with pytest.raises(RunError) as caught:
        export.to_onnx(other, tmp_path / "model.onnx")
    assert caught.value.code == 1
    assert not (tmp_path / "model.onnx").exists()


@torch.no_grad()
def test_command_writes_onnx_and_refuses_a_mismatch(run_copy, command, no_timing, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    code, _, err = command(run_copy, "--onnx")
    assert code == 0, err
    path = run_copy / "model" / "model.onnx"
    masked, _ = masked_of(run_copy)
    for batch in (1, 3):
        images = pictures(batch, 16, seed=batch)
        assert (onnx_logits(path, images) - masked(images)).abs().max() <= 1e-4

    good = run_copy / "good.onnx"
    shutil.move(path, good)
    monkeypatch.setattr(torch.onnx, "export", lambda model, inputs, target, **_: shutil.copy(good, target))
    monkeypatch.setattr(export, "ONNX_BOUND", -1.0)
    result = command(run_copy, "--onnx")
    assert result[0] == 1
    assert "--onnx" in result[2].splitlines()[-1]
    assert not path.exists()
    assert sorted(file.name for file in (run_copy / "model").iterdir()) == MODEL_FILES


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_onnx_is_one_line(run_copy, command, no_timing, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert_one_line(command(run_copy, "--onnx"), "--onnx", package, "pip install")
    assert not (run_copy / "model" / "model.onnx").exists()


def test_missing_onnx_shows_before_any_work(run_copy, command, no_timing, monkeypatch):
    """That is what exit code 2 means (SPEC 9)."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert command(run_copy, "--onnx")[0] == 2
    assert not (run_copy / "model").exists()


def test_missing_onnx_costs_nothing_else(run_copy, command, no_timing, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    assert command(run_copy)[0] == 0
    export.load(run_copy / "model")


# ------------------------------------------------------------------------------------------------ sizes and speeds


def read_table(lines):
    """Rows of a text table whose columns are two blanks apart; the line of dashes gives their places."""
    spans = [match.span() for match in re.finditer("-+", lines[1])]
    assert set(lines[1]) == {"-", " "}
    titles = [lines[0][start:end].strip() for start, end in spans]
    return [dict(zip(titles, [line[a:b].strip() for a, b in spans], strict=True)) for line in lines[2:]]


def test_size_table_counts(no_timing, tmp_path):
    model = noisy(build_model("vit_tiny", 10))
    kept = {f"blocks.{i}.attn": [0, 1] for i in range(9)} | {f"blocks.{i}.mlp": list(range(268)) for i in range(9)}
    masked = masked_like(model, kept)
    before = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    small = export.write(tmp_path, masked, kept, batches_of(1, size=32), DATASETS["cifar10"], {}, {})
    rows = {row["model"]: row for row in read_table(export.size_table(masked, small).splitlines())}
    geometry = (192, [2] * 9, [268] * 9, 64, 65, 4, 10)
    removed, macs = parameters_of(*geometry), macs_of(*geometry)
    # 116 neurons of 192 + 1 + 192 each less than with 18 heads alone
    assert removed == 2_253_514 - 9 * 116 * 385
    assert list(rows) == ["dense", "masked", "removed"]
    assert {name: row["parameters"] for name, row in rows.items()} == {
        "dense": "2,697,610",
        "masked": f"{removed:,}",
        "removed": f"{removed:,}",
    }
    assert {name: row["MACs"] for name, row in rows.items()} == {
        "dense": "0.1877 G",
        "masked": "0.1877 G",
        "removed": f"{macs / 1e9:.4f} G",
    }
    size = (tmp_path / "model.safetensors").stat().st_size
    assert {name: row["file"] for name, row in rows.items()} == {
        "dense": f"{4 * 2_697_610 / 1e6:.2f} MB",
        "masked": f"{4 * 2_697_610 / 1e6:.2f} MB",
        "removed": f"{4 * removed / 1e6:.2f} MB",
    }
    assert float(rows["removed"]["file"].split()[0]) == pytest.approx(size / 1e6, abs=0.03)
    assert [row["images/s"] for row in rows.values()] == ["100", "100", "150"]
    assert all(torch.equal(before[name], tensor) for name, tensor in masked.state_dict().items())

    # the plan, the card and the table count alike
    cost = vit_cost(model, kept)
    assert (cost["heads"], cost["neurons"], cost["parameters"], cost["macs"]) == (18, 2412, removed, macs)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["parameters"] == {"dense": 2_697_610, "removed": removed}
    assert config["macs"] == {"dense": macs_of(192, [3] * 9, [384] * 9, 64, 65, 4, 10), "removed": macs}


def test_size_table_times_dense_weights_without_zeros(monkeypatch):
    """Masked and dense are two models of one shape; neither is changed by being timed."""
    seen = {}

    def look(models, *_, **__):
        for name, model in models.items():
            seen[name] = sum(int((p == 0).sum()) for p in model.parameters())
        return dict.fromkeys(models, 1.0)

    monkeypatch.setattr(export, "throughput", look)
    masked = masked_like(micro(), MICRO_KEPT)
    export.size_table(masked, export.compact(masked, MICRO_KEPT)[0])
    assert seen == {"dense": 0, "masked": sum(int((p == 0).sum()) for p in masked.parameters()), "removed": 0}
    assert seen["masked"] > 0


def test_latency_table_arithmetic(no_timing):
    """100 images a second dense and 150 removed, whatever the batch."""
    masked = masked_like(micro(), MICRO_KEPT)
    small, _ = export.compact(masked, MICRO_KEPT)
    head, *table = export.latency_table(masked, small, batch_sizes=(1, 6)).splitlines()
    full = macs_of(DIM, [HEADS] * 2, [HIDDEN] * 2, WIDTH, 5, 4, CLASSES)
    limit = full / macs_of(DIM, [2, 1], [4, 3], WIDTH, 5, 4, CLASSES)
    same = {"faster": "1.50x", "MACs limit": f"{limit:.2f}x", "of limit": f"{150 / limit:.0f}%"}
    assert read_table(table) == [
        {"batch": "1", "dense ms": "10.00", "removed ms": "6.67", **same},
        {"batch": "6", "dense ms": "60.00", "removed ms": "40.00", **same},
    ]
    assert "cpu" in head
    assert f"{torch.get_num_threads()} threads" in head
    assert torch.__version__ in head


class Clocked(ResNet):
    """A model for 8 pixels that takes the next of its `seconds` on a clock that only such models move."""

    def __init__(self, name, seconds, calls, clock):
        super().__init__((1,), (2,), projected=False, img_size=8)
        self.name, self.seconds, self.calls, self.clock = name, iter(seconds), calls, clock

    def forward(self, images):
        self.calls.append((self.name, tuple(images.shape), torch.is_grad_enabled(), self.training))
        self.clock[0] += next(self.seconds)
        return images


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(export, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_throughput_is_an_interleaved_median(clock):
    calls = []
    models = {"a": Clocked("a", [99, 1, 7, 2], calls, clock), "b": Clocked("b", [99, 4, 4, 80], calls, clock)}
    found = export.throughput(models, batch_size=6, repeats=3, seconds=1e9)
    assert found == {"a": 6 / 2, "b": 6 / 4}  # medians of what follows the warm-up
    assert [name for name, *_ in calls] == ["a", "b"] + ["a", "b"] * 3
    assert {tuple(rest) for _, *rest in calls} == {((6, 3, 8, 8), False, False)}


def test_throughput_stops_when_time_is_up(clock):
    calls = []
    models = {"a": Clocked("a", [1] * 9, calls, clock), "b": Clocked("b", [1] * 9, calls, clock)}
    assert export.throughput(models, batch_size=2, repeats=8, seconds=0.5) == {"a": 2.0, "b": 2.0}
    assert len(calls) == 4
    assert export.throughput(models, batch_size=2, repeats=8, seconds=3) == {"a": 2.0, "b": 2.0}
    assert len(calls) == 4 + 6


def test_throughput_leaves_the_models_as_they_were():
    models = {"one": micro(), "two": micro(seed=1)}
    models["one"].train()
    models["one"].blocks[0].eval()
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    modes = {name: [module.training for module in model.modules()] for name, model in models.items()}
    speeds = export.throughput(models, batch_size=2, repeats=1)
    assert all(speed > 0 for speed in speeds.values())
    for name, model in models.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert [module.training for module in model.modules()] == modes[name], "STYLE 10: the mode is restored"
