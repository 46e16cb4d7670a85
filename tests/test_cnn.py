"""Laws of the convolutional part: ResNets, filters as units, Refill and RSST on filters, removal, files and runs.

Runs are real ones through `main([...])`: scikit-learn's digits and a ResNet of three small blocks.
"""

import copy
import csv
import itertools
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import call, masks_of, runner
from torch import nn

import export
import main_imp_fillback as entry
import models
import pruning_utils as cnn
from dataset import DATASETS
from models.resnet import ResNet
from rsst import Penalty
from vit_structured_pruning import (
    remove_units,
    scatter_tensors,
    score_units,
    slice_tensors,
    unit_masks,
)

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
WIDTHS = (4, 6)
BLOCKS = ["layer1.0", "layer2.0", "layer2.1"]
BLOCK_CONVOLUTIONS = [f"{block}.conv{i}" for block in BLOCKS for i in (1, 2)]
# filters, kernel elements a filter
SHAPES = dict(zip(BLOCK_CONVOLUTIONS, [(4, 36), (4, 36), (6, 36), (6, 54), (6, 54), (6, 54)], strict=True))

words = str.split


def res_micro(num_classes=None, img_size=None, projected=False):
    return ResNet((1, 2), WIDTHS, projected, num_classes or 10, img_size or 8)


def res_micro_projected(num_classes=None, img_size=None):
    return res_micro(num_classes, img_size, projected=True)


def images_of(count, size=8, seed=0, dtype=torch.float32):
    """Images whose borders are as bright as their middles, and labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64) + 0.5
    return pixels.to(dtype), torch.randint(0, 10, (count,), generator=generator)


def train(model, steps=4, size=8):
    """A few real steps, so that weights and batch-norm statistics are a trained network's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for step in range(steps):
        images, labels = images_of(16, size, seed=step, dtype=model.fc.weight.dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def make_micro(add_noise):
    """make_micro(projected=True, size=9): a trained micro ResNet; no parameter is at its initial value."""

    def make(seed=0, projected=False, size=8, dtype=torch.float32):
        torch.manual_seed(seed)
        return train(add_noise(res_micro(10, size, projected).to(dtype), seed, scale=0.1), size=size)

    return make


def some_kept(model, seed=0, conv1=True):
    """A random half of each layer's filters, at least one."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, group in cnn.filter_units(model, conv1).items():
        chosen = torch.rand(group.count, generator=generator) < 0.5
        kept[name] = chosen.nonzero().flatten().tolist() or [group.count - 1]
    return kept


@torch.no_grad()
def zero_filters(model, kept):
    """Kernel, gain and bias of all other filters become zero, by plain indexing."""
    modules = dict(model.named_modules())
    for name, ids in kept.items():
        gone = [unit for unit in range(modules[name].out_channels) if unit not in ids]
        path, _, leaf = name.rpartition(".")
        norm = modules[f"{path}.1" if leaf == "0" else f"{path}.{leaf.replace('conv', 'bn')}".lstrip(".")]
        modules[name].weight[gone] = 0
        norm.weight[gone] = 0
        norm.bias[gone] = 0
    return model


@torch.no_grad()
def counted(model, size):
    """MACs by what a real forward pass puts out: output pixels x weights of each layer."""
    total = []

    def count(module, _, out):
        pixels = out[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        total.append(pixels * module.weight.numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(total)


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_tensors(found, expected, skip=()):
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.startswith(tuple(skip)):
            assert torch.equal(found[name], expected[name]), name


# ------------------------------------------------------------------------------------------------------ the networks


@pytest.mark.parametrize(
    ("arch", "parameters", "convolutions"),
    [("res20s", 269_722, 19), ("res32s", 464_154, 31), ("res56s", 853_018, 55), ("res18", 11_173_962, 20)],
)
def test_parameters_and_prunable_layers(arch, parameters, convolutions):
    model = models.build_model(arch, 10)
    assert parameters_of(model) == parameters
    assert cnn.cost_of(model, {})["parameters"] == parameters
    everything, without_first = cnn.prunable_layers(model, first=True), cnn.prunable_layers(model)
    assert len(everything) == convolutions
    assert list(everything)[0] == "conv1"
    assert list(without_first) == list(everything)[1:]
    assert all(everything[name] is module for name, module in without_first.items())
    assert parameters_of(models.build_model(arch, 100)) - parameters == 90 * (model.fc.in_features + 1)


def test_res20s_has_its_prunable_weights_and_filters():
    layers = cnn.prunable_layers(models.build_model("res20s", 10))
    # 6 of 16x16, one 16 to 32 and 5 of 32x32, one 32 to 64 and 5 of 64x64
    assert sum(module.weight.numel() for module in layers.values()) == 9 * (6 * 256 + 512 + 5 * 1024 + 2048 + 5 * 4096)
    assert [f"layer{s}.{b}.conv{i}" for s in (1, 2, 3) for b in range(3) for i in (1, 2)] == list(layers)
    assert cnn.cost_of(models.build_model("res20s", 10), {})["filters"] == 16 + 6 * (16 + 32 + 64)


@pytest.mark.parametrize("size", [28, 32, 27])
@pytest.mark.parametrize("arch", ["res20s", "res18"])
def test_macs_are_what_a_forward_pass_multiplies(arch, size):
    model = models.build_model(arch, 10, size)
    assert cnn.cost_of(model, {})["macs"] == counted(model, size)
    assert cnn.image_size(model) == size


def test_macs_of_res20s_by_hand():
    stages = [(32, 6 * 16 * 16), (16, 16 * 32 + 5 * 32 * 32), (8, 32 * 64 + 5 * 64 * 64)]
    expected = 32 * 32 * 27 * 16 + sum(9 * side * side * pairs for side, pairs in stages) + 640
    assert cnn.cost_of(models.build_model("res20s", 10), {})["macs"] == expected


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("size", [8, 9, 11])
def test_cost_of_kept_filters_is_that_of_the_removed_network(projected, size):
    model = res_micro(10, size, projected)
    for seed in range(3):
        kept = some_kept(model, seed)
        cost = cnn.cost_of(model, kept)
        removable = {name: ids for name, ids in kept.items() if name in BLOCK_CONVOLUTIONS}
        small = remove_units(copy.deepcopy(model), cnn.units_of(model), kept)
        assert cost["macs"] == counted(small, size) < counted(model, size)
        assert cost["parameters"] == parameters_of(small) < parameters_of(model)
        assert cost["filters"] == sum(map(len, kept.values()))
        for name, ids in removable.items():
            assert small.get_submodule(name).out_channels == len(small.get_submodule(name).weight) == len(ids)


def test_the_option_a_shortcut_by_hand():
    for channels, filters, before in ((16, 32, 8), (4, 7, 1)):
        block = models.resnet.BasicBlock(channels, filters, 2, projected=False).eval()
        block.bn2.weight.data.zero_()  # the branch is silent, the shortcut is alone
        x = torch.rand(2, channels, 5, 7)
        found = block(x)
        assert found.shape == (2, filters, 3, 4)
        for image, channel, row, column in itertools.product(range(2), range(filters), range(3), range(4)):
            source = channel - before
            expected = x[image, source, 2 * row, 2 * column] if 0 <= source < channels else 0.0
            assert found[image, channel, row, column] == expected


def test_res18_is_torchvisions_with_a_small_stem():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = models.build_model("res18", 10, 16).eval()
    for name, buffer in ours.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    images, _ = images_of(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


def functional(weights, images, depths):
    """A ResNet with option A in eval mode, written out."""

    def norm(x, name):
        mean, var, gain, bias = (
            weights[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        scale = gain / (var + 1e-5).sqrt()
        return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]

    x = norm(F.conv2d(images, weights["conv1.weight"], padding=1), "bn1").clamp(min=0)
    for stage, depth in enumerate(depths, 1):
        for block in (f"layer{stage}.{index}" for index in range(depth)):
            stride = 2 if stage > 1 and block.endswith(".0") else 1
            out = F.conv2d(x, weights[f"{block}.conv1.weight"], stride=stride, padding=1)
            out = norm(out, f"{block}.bn1").clamp(min=0)
            out = norm(F.conv2d(out, weights[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
            extra = out.shape[1] - x.shape[1]
            zeros = [torch.zeros_like(out[:, :count]) for count in (extra // 2, extra - extra // 2)]
            x = (out + torch.cat([zeros[0], x[:, :, ::stride, ::stride], zeros[1]], dim=1)).clamp(min=0)
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize("size", [8, 11])
def test_forward_is_the_paper_written_out(make_micro, size):
    model = make_micro(size=size, dtype=torch.float64)
    images, _ = images_of(3, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), functional(model.state_dict(), images, (1, 2)), rtol=0, atol=1e-12)


def test_convolutions_start_with_hes_deviation():
    torch.manual_seed(0)
    model = models.build_model("res18", 10)
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv2", "layer4.0.downsample.0"):
        weight = model.get_submodule(name).weight
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.02), name
        assert abs(float(weight.detach().mean())) < 0.02 * math.sqrt(2 / fan_out), name
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


# ----------------------------------------------------------------------------------------------------- public functions


def surviving(weights, keep):
    """Global magnitude masks by a full numpy sort; of equals the first in (layer, index) order stays."""
    flat = np.concatenate([np.abs(weight.detach().numpy()).ravel() for weight in weights.values()])
    mask = np.zeros(len(flat))
    mask[np.argsort(-flat, kind="stable")[:keep]] = 1
    cuts = np.cumsum([weight.numel() for weight in weights.values()])[:-1]
    parts = np.split(mask, cuts)
    return {
        name: torch.tensor(part).reshape(weight.shape).float()
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }


@pytest.mark.parametrize("conv1", [False, True])
def test_pruning_model_takes_the_smallest_weights_of_all_convolutions(make_micro, conv1):
    model, left = make_micro(projected=True), None
    weights = clones({f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d)})
    weights = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    if not conv1:
        del weights["conv1"]
    left = sum(weight.numel() for weight in weights.values())
    for _ in range(2):
        cnn.pruning_model(model, 0.3, conv1=conv1)
        left = round(left * 0.7)
        found = cnn.extract_mask(model.state_dict())
        expected = surviving(weights, left)
        assert list(found) == [f"{name}.weight_mask" for name in expected]
        for name, mask in expected.items():
            assert torch.equal(found[f"{name}.weight_mask"], mask), name
            assert torch.equal(model.get_submodule(name).weight, weights[name] * mask)
    assert hasattr(model.conv1, "weight_mask") == conv1
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        cnn.pruning_model(model, 1.0)


def test_check_sparsity_prints_what_is_left(make_micro, capsys):
    model = make_micro()
    mask = torch.ones(4, 4, 3, 3)
    mask[0] = 0
    cnn.prune_model_custom(model, {"layer1.0.conv1": mask})
    total = sum(count * size for count, size in SHAPES.values())
    assert cnn.check_sparsity(model) == pytest.approx(100 * (total - 36) / total)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[CNN Sparsity Report]"
    assert re.split(r" +\| ", lines[1]) == ["layer1.0.conv1.weight_mask", "Sparsity: 25.00%"]
    assert [line.split()[0] for line in lines[1:7]] == [f"{name}.weight_mask" for name in BLOCK_CONVOLUTIONS]
    assert all(line.endswith("Sparsity: 0.00%") for line in lines[2:7])
    assert lines[7:] == [
        f"Overall sparsity: {3600 / total:.2f}%",
        f"Remaining weights: {100 - 3600 / total:.2f}%",
    ]
    cnn.remove_prune(model)  # without masks zeros are what counts
    model.layer2[0].conv1.weight.data[0, 0] = 0
    assert cnn.check_sparsity(model) == pytest.approx(100 * (total - 36 - 9) / total)
    assert cnn.check_sparsity(model, conv1=True) == pytest.approx(100 * (total + 108 - 36 - 9) / (total + 108))


@pytest.mark.parametrize("spelling", ["{}", "{}.weight_mask"])
def test_custom_masks_are_applied_and_made_permanent(make_micro, spelling):
    model = make_micro()
    before, names = clones(model.state_dict()), list(model.state_dict())
    masks = {spelling.format(name): (torch.rand(c, s // 9, 3, 3) < 0.5).float() for name, (c, s) in SHAPES.items()}
    given_masks = clones(masks)
    cnn.prune_model_custom(model, masks)
    assert_same_tensors(masks, given_masks)
    for name in BLOCK_CONVOLUTIONS:
        module = model.get_submodule(name)
        assert torch.equal(module.weight_mask, masks[spelling.format(name)])
        assert torch.equal(module.weight_orig, before[f"{name}.weight"])
    cnn.remove_prune(model)
    assert sorted(model.state_dict()) == sorted(names)
    for name in BLOCK_CONVOLUTIONS:
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"] * masks[spelling.format(name)])


def test_masks_that_do_not_fit_are_refused(make_micro):
    model = make_micro()
    for masks, match in (
        ({"layer9.0.conv1": torch.ones(4, 4, 3, 3)}, "layer9.0.conv1"),
        ({"conv1": torch.ones(4, 3, 3, 3)}, "conv1"),  # not prunable unless asked for
        ({"layer1.0.conv1": torch.ones(4, 4, 3)}, "shape"),
        ({"layer1.0.conv1": torch.full((4, 4, 3, 3), 0.5)}, "0 and 1"),
    ):
        with pytest.raises(ValueError, match=match):
            cnn.prune_model_custom(model, masks)
    cnn.prune_model_custom(model, {"conv1": torch.zeros(4, 3, 3, 3)}, conv1=True)
    assert not model.conv1.weight.any()


# ------------------------------------------------------------------------------------------------- which filters stay


def reference_kept(mask, scores, fillback):
    """Refill's filters of one layer by numpy: int(left + (C - left) * fillback), best first, the lower id of equals."""
    mask = np.asarray(mask)
    filters = len(mask)
    left = mask.mean() * filters
    keep = max(1, int(left + (filters - left) * fillback + 1e-9))
    alive = [unit for unit in range(filters) if mask[unit].any()]
    return sorted(sorted(alive, key=lambda unit: (-scores[unit], unit))[:keep]) or [0]


# C = 16, by hand: 12.8, 13.12, 14.4; 10.24, 10.816, 13.12; 4.8, 5.92, 10.4
BY_HAND = {
    (0.8, 0.0): 12,
    (0.8, 0.1): 13,
    (0.8, 0.5): 14,
    (0.64, 0.0): 10,
    (0.64, 0.1): 10,
    (0.64, 0.5): 13,
    (0.3, 0.0): 4,
    (0.3, 0.1): 5,
    (0.3, 0.5): 10,
}


@pytest.mark.parametrize(("density", "fillback"), BY_HAND)
def test_how_many_filters_stay_by_hand(density, fillback):
    order = torch.randperm(800, generator=torch.Generator().manual_seed(0))
    mask = (order < round(800 * density)).float().reshape(16, 2, 5, 5)
    scores = torch.rand(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = cnn.select_filters({"conv": mask}, {"conv": scores}, fillback)["conv"]
    assert len(kept) == BY_HAND[density, fillback]
    assert min(scores[kept]) > max(scores[[unit for unit in range(16) if unit not in kept]])
    assert kept == sorted(kept)


def test_a_whole_number_is_not_lost_to_rounding():
    assert int(0.29 * 100) == 28  # what floats make of it
    assert cnn.filter_count(100, 0.29, 0.0) == 29
    assert cnn.filter_count(4, 0.1, 0.0) == cnn.filter_count(4, 0.0, 0.0) == 1
    assert cnn.filter_count(4, 0.0, 1.0) == cnn.filter_count(4, 1.0, 0.0) == 4


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_kept_filters_are_the_references(data):
    filters, size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    bits = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=filters * size, max_size=filters * size))
    mask = torch.tensor(bits).reshape(filters, size, 1, 1)
    # few values, so that ties are common
    values = data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=filters, max_size=filters))
    scores = torch.tensor(values, dtype=torch.float64)
    scores[~mask.flatten(1).any(1)] = -math.inf
    fillback = data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
    found = cnn.select_filters({"conv": mask}, {"conv": scores}, fillback)
    assert found == {"conv": reference_kept(mask.flatten(1), values, fillback)}


def test_a_dead_layer_keeps_its_first_filter(make_micro):
    model = make_micro()
    masks = {name: torch.ones_like(module.weight) for name, module in cnn.prunable_layers(model).items()}
    masks["layer2.0.conv1"].zero_()
    masks["layer2.0.conv2"].zero_()[3, 0, 0, 0] = 1
    for fillback in (0.0, 0.5):
        found = cnn.prune_model_custom_fillback(
            model, masks, None, model.state_dict(), model.state_dict(), "magnitude", fillback, return_mask_only=True
        )
        assert found["layer2.0.conv1"].flatten(1).any(1).tolist() == [True] + [False] * 5
        assert found["layer2.0.conv2"].flatten(1).any(1).tolist() == [False] * 3 + [True] + [False] * 2
        assert all(found[name].all() for name in BLOCK_CONVOLUTIONS if not name.startswith("layer2.0"))


@pytest.mark.parametrize("fillback", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("density", [0.8, 0.64, 0.3])
def test_refill_of_res20s_is_the_numpy_reference(density, fillback):
    torch.manual_seed(3)
    model = models.build_model("res20s", 10)
    masked = copy.deepcopy(model)
    for name, module in cnn.prunable_layers(masked).items():
        module.weight.data *= 0.3 + torch.rand(len(module.weight))[:, None, None, None]  # filters differ
        module.weight.data *= 0.5 if name.startswith("layer1") else 1.0  # and so do layers
    trained = clones(masked.state_dict())
    cnn.pruning_model(masked, 1 - density)
    masks = cnn.extract_mask(masked.state_dict())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(267_264 * density)
    found = cnn.prune_model_custom_fillback(
        model, masks, None, trained, model.state_dict(), "magnitude", fillback, return_mask_only=True
    )
    counts = set()
    for name, mask in found.items():
        kernels = np.abs(trained[f"{name}.weight"].numpy().astype(np.float64)).reshape(len(mask), -1)
        kept = reference_kept(masks[f"{name}.weight_mask"].flatten(1).numpy(), kernels.sum(1), fillback)
        expected = np.zeros(mask.shape)
        expected[kept] = 1
        assert np.array_equal(mask.numpy(), expected), name
        assert kept
        counts.add(len(kept) / len(mask))
    assert len(found) == 18
    assert len(counts) > 1  # layers differ in density and keep what theirs asks for


# ------------------------------------------------------------------------------------------------------------- scores


def reference_scores(model, criteria, masks, batches):
    """Every criterion with plain loops over filters and images, from hooks of our own and the kernels."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if criteria in ("remain", "magnitude"):
        source = masks if criteria == "remain" else {name: module.weight.detach() for name, module in layers.items()}
        return {
            name: [float(np.abs(kernel.double().numpy()).sum()) for kernel in tensor] for name, tensor in source.items()
        }
    maps, totals, seen = {}, {name: np.zeros(module.out_channels) for name, module in layers.items()}, 0

    def record(name):
        def hook(_, __, out):
            out.retain_grad()
            maps[name] = out

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in layers.items()]
    model.eval()
    for images, labels in batches:
        logits = model(images)
        (-logits.log_softmax(1)[range(len(labels)), labels]).sum().backward()
        for name, out in maps.items():
            for image, unit in itertools.product(range(len(images)), range(out.shape[1])):
                a = out[image, unit].detach().double().numpy()
                g = out.grad[image, unit].double().numpy()
                each = {"l1": np.abs(a).mean(), "l2": (a**2).mean(), "saliency": abs((a * g).sum())}
                totals[name][unit] += each[criteria]
        seen += len(images)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    means = {name: total / seen for name, total in totals.items()}
    return {name: np.sqrt(mean) for name, mean in means.items()} if criteria == "l2" else means


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("criteria", ["remain", "magnitude", "l1", "l2", "saliency"])
def test_scores_of_filters_are_the_references(make_micro, criteria, projected):
    model = make_micro(projected=projected)
    generator = torch.Generator().manual_seed(5)
    layers = cnn.prunable_layers(model, first=True)
    masks = {n: (torch.rand(m.weight.shape, generator=generator) < 0.4).float() for n, m in layers.items()}
    batches = [images_of(3, seed=7), images_of(5, seed=8)]
    expected = reference_scores(model, criteria, masks, batches)
    before = clones(model.state_dict())
    found = score_units(model, cnn.units_of(model), criteria, mask=masks, batches=batches)
    assert_same_tensors(model.state_dict(), before)
    assert list(found) == list(layers)
    for name, values in found.items():
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values.numpy(), expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
        assert len(set(values.tolist())) > 1


def test_random_scores_follow_the_seed_and_the_dead_are_never_chosen(make_micro):
    model = make_micro()
    units = cnn.filter_units(model)
    one, again, other = (score_units(model, units, "random", seed=seed) for seed in (1, 1, 2))
    masks = {name: torch.ones_like(module.weight) for name, module in cnn.prunable_layers(model).items()}
    masks["layer1.0.conv1"][2] = 0
    dead = score_units(model, units, "random", seed=1, mask=masks)
    for name in units:
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])
    assert dead["layer1.0.conv1"][2] == -math.inf
    assert torch.equal(dead["layer1.0.conv2"], one["layer1.0.conv2"])


# ------------------------------------------------------------------------------------------------- refill of one model


def elementwise_masks(model, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = cnn.prunable_layers(model)
    return {name: (torch.rand(m.weight.shape, generator=generator) < density).float() for name, m in layers.items()}


@pytest.mark.parametrize("criteria", ["l1", "saliency"])
@pytest.mark.parametrize("spelling", ["{}", "{}.weight_mask"])
def test_fillback_on_a_model(make_micro, criteria, spelling):
    model, trained, initial = make_micro(0), make_micro(1), make_micro(2)
    model.train()
    batches = [images_of(4, seed=3), images_of(4, seed=4)]
    plain = elementwise_masks(model)
    masks = {spelling.format(name): mask for name, mask in plain.items()}
    # what torch.nn.utils.prune leaves of a trained model
    cnn.prune_model_custom(trained, masks)
    given = [masks, trained.state_dict(), initial.state_dict()]
    untouched = [clones(tensors) for tensors in (*given, model.state_dict())]

    def call(loader, **options):
        return cnn.prune_model_custom_fillback(model, given[0], loader, given[1], given[2], criteria, 0.25, **options)

    found = call(batches, return_mask_only=True)
    for tensors, expected in zip((*given, model.state_dict()), untouched, strict=True):
        assert_same_tensors(tensors, expected)
    assert all(module.training for module in model.modules())
    assert list(found) == BLOCK_CONVOLUTIONS
    pruned = make_micro(1)
    for name, mask in plain.items():
        pruned.get_submodule(name).weight.data *= mask
    scores = reference_scores(pruned, criteria, plain, batches)
    kept = {name: reference_kept(plain[name].flatten(1), scores[name], 0.25) for name in BLOCK_CONVOLUTIONS}
    for name, mask in found.items():
        assert mask.flatten(1).all(1).nonzero().flatten().tolist() == kept[name]
        assert mask.sum() == len(kept[name]) * SHAPES[name][1]
    assert_same_tensors(call(iter(batches), return_mask_only=True), found)  # any iterable
    assert_same_tensors(call((batch for batch in batches), return_mask_only=True), found)

    assert call(batches) is model
    for tensors, expected in zip(given, untouched, strict=False):
        assert_same_tensors(tensors, expected)
    start = zero_filters(copy.deepcopy(initial), kept).state_dict()
    for name, mask in found.items():
        module = model.get_submodule(name)
        assert torch.equal(module.weight_mask, mask)
        assert torch.equal(module.weight_orig, given[2][f"{name}.weight"])
    cnn.remove_prune(model)
    assert_same_tensors({name: model.state_dict()[name] for name in start}, start)


def test_fillback_with_and_without_the_first_convolution(make_micro):
    model = make_micro(projected=True)
    weights = model.state_dict()
    everything = {n: torch.ones_like(m.weight) for n, m in cnn.prunable_layers(model, first=True).items()}
    everything["conv1"][1] = 0
    part = {"conv1": everything["conv1"]}
    for masks in (everything, part):
        found = cnn.prune_model_custom_fillback(model, masks, None, weights, weights, "remain", return_mask_only=True)
        assert list(found) == list(masks)
        assert found["conv1"].flatten(1).all(1).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="fillback_rate"):
        cnn.prune_model_custom_fillback(model, everything, None, weights, weights, "remain", fillback_rate=1.5)
    with pytest.raises(ValueError, match="train_loader"):
        cnn.prune_model_custom_fillback(model, everything, None, weights, weights, "saliency")


# ---------------------------------------------------------------------------------------------------- what a filter is


@pytest.mark.parametrize("projected", [False, True])
def test_a_filter_is_its_kernel_with_gain_and_bias(projected):
    model = res_micro(10, 8, projected)
    units = cnn.filter_units(model, conv1=True)
    owned = sorted(name for group in units.values() for name in group.parts)
    assert owned == sorted(name for name, _ in model.named_parameters() if not name.startswith("fc."))
    for name, unit in (("conv1", 1), ("layer1.0.conv2", 2), ("layer2.0.conv1", 5)):
        masks = unit_masks({name: units[name]}, {name: [unit]}, dict(model.named_parameters()))
        norm = name.replace("conv", "bn")
        assert list(masks) == [f"{name}.weight", f"{norm}.weight", f"{norm}.bias"]
        for mask in masks.values():
            assert mask.flatten(1).all(1).tolist() if mask.ndim > 1 else mask.bool().tolist()
            assert mask[unit].all()
            assert mask.sum() == mask[unit].numel()
    if projected:
        assert list(units["layer2.0.downsample.0"].parts)[1:] == [
            "layer2.0.downsample.1.weight",
            "layer2.0.downsample.1.bias",
        ]
    assert list(cnn.filter_units(model)) == list(units)[1:]
    assert [name for name, group in units.items() if group.removable] == BLOCK_CONVOLUTIONS


def test_the_penalty_shrinks_kernel_gain_and_bias_alike(make_micro):
    model = make_micro(dtype=torch.float64)
    units, kept = cnn.filter_units(model), {"layer2.0.conv1": [0, 2, 5]}
    parameters = dict(model.named_parameters())
    before = clones(parameters)
    doomed = {name: 1 - mask for name, mask in unit_masks(units, kept, parameters).items()}
    penalty = Penalty(parameters, doomed)
    for exponent in (2.0, 8.0, 10.0):
        penalty.set_(exponent)
        penalty.shrink_(parts=10)
    for name, parameter in parameters.items():
        rows = [1, 3, 4] if name.startswith(("layer2.0.conv1.", "layer2.0.bn1.")) else []
        rest = [row for row in range(len(parameter)) if row not in rows]
        torch.testing.assert_close(parameter[rows], before[name][rows] * math.exp(-20), rtol=1e-12, atol=0)
        assert torch.equal(parameter[rest], before[name][rest]), name
    assert penalty.residual() == pytest.approx(math.exp(-20))


# ------------------------------------------------------------------------------------------------------------- removal


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("size", [8, 9])
def test_removed_and_masked_networks_compute_the_same(make_micro, projected, size):
    model = make_micro(projected=projected, size=size)
    for name in BLOCK_CONVOLUTIONS:
        norm = model.get_submodule(name.replace("conv", "bn"))
        assert float((norm.running_var - 1).abs().min()) > 1e-3  # the statistics are real ones
        assert float(norm.running_mean.abs().min()) > 1e-4
        assert float(norm.bias.detach().abs().max()) > 1e-2
    dense = copy.deepcopy(model)
    images, _ = images_of(20, size, seed=9)
    for seed in range(3):
        masked = copy.deepcopy(dense)
        kept = some_kept(masked, seed)
        zero_filters(masked, kept)
        small, found = export.compact(masked, kept)
        assert found == kept
        with torch.no_grad():
            expected = masked(images)
            bound = 1e-5 * max(1.0, float(expected.abs().max()))
            assert float((small(images) - expected).abs().max()) <= bound
            assert float((dense(images) - expected).abs().max()) > 1e-2  # what went was not nothing
            images64 = images.double()
            exact = (copy.deepcopy(small).double()(images64) - copy.deepcopy(masked).double()(images64)).abs().max()
            assert float(exact) < 1e-12
        by_itself, alive = export.compact(masked)
        assert {name: alive[name] for name in kept} == kept
        assert parameters_of(by_itself) == parameters_of(small) < parameters_of(dense)


@pytest.mark.parametrize("arch", ["res20s", "res18"])
def test_real_networks_lose_nothing_by_removal(arch):
    torch.manual_seed(1)
    model = train(models.build_model(arch, 10, 16), steps=2, size=16)
    kept = some_kept(model, 4)
    zero_filters(model, kept)
    small, _ = export.compact(model, kept)
    proof = export.parity(model, small, [images_of(8, 16, seed=2)])
    assert proof["max_difference_float32"] <= 1e-5 * max(1.0, proof["largest_logit"])
    assert proof["max_difference_float64"] < 1e-12
    assert parameters_of(small) == cnn.cost_of(model, kept)["parameters"] < 0.6 * parameters_of(model)


def test_what_batch_norm_still_emits_keeps_a_filter(make_micro):
    model = make_micro()
    with torch.no_grad():
        for unit, parts in enumerate(("kernel", "kernel gain", "kernel gain bias", "gain bias")):
            if "kernel" in parts:
                model.layer1[0].conv1.weight[unit] = 0
            if "gain" in parts:
                model.layer1[0].bn1.weight[unit] = 0
            if "bias" in parts:
                model.layer1[0].bn1.bias[unit] = 0
            elif unit == 1:
                model.layer1[0].bn1.bias[unit] = 1.5
    kept = cnn.find_working_filters(model)
    assert kept["layer1.0.conv1"] == [0, 1, 3]
    assert all(kept[name] == list(range(SHAPES[name][0])) for name in BLOCK_CONVOLUTIONS[1:])
    images, _ = images_of(6)
    with torch.no_grad():
        small, _ = export.compact(model)
        torch.testing.assert_close(small(images), model(images), rtol=0, atol=1e-5)
        # the constant that the second one emits is cut off by zero padding: no bias can stand for it
        one_less, _ = export.compact(model, {"layer1.0.conv1": [0, 3]})
        difference = (one_less(images) - model(images)).abs().max()
        assert float(difference) > 1e-3


def test_a_layer_without_a_working_filter_keeps_one(make_micro):
    model = zero_filters(make_micro(), {"layer2.0.conv1": [], "layer2.1.conv2": []})
    small, kept = export.compact(model)
    assert kept["layer2.0.conv1"] == kept["layer2.1.conv2"] == [0]
    images, _ = images_of(6)
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=0, atol=1e-6)


def test_out_index_places_what_is_left_in_the_residual_stream(make_micro):
    model = make_micro()
    units = cnn.filter_units(model)
    kept = {"layer2.1.conv2": [1, 4], "layer2.0.conv2": list(range(6))}
    small = remove_units(copy.deepcopy(model), units, kept)
    assert small.layer2[1].out_index.tolist() == [1, 4]
    assert small.layer2[0].out_index is None
    assert small.layer2[1].conv2.weight.shape == (2, 6, 3, 3)
    x = torch.rand(2, 6, 4, 4)
    branch, expected = small.layer2[1], x.clone()
    with torch.no_grad():
        out = branch.bn2(branch.conv2(F.relu(branch.bn1(branch.conv1(x)))))
        for place, channel in enumerate((1, 4)):
            expected[:, channel] += out[:, place]
        assert torch.equal(branch(x), expected.clamp(min=0))
    assert "layer2.1.out_index" not in small.state_dict()
    assert copy.deepcopy(small).layer2[1].out_index.tolist() == [1, 4]


def test_filters_can_be_removed_in_two_rounds(make_micro):
    model = zero_filters(make_micro(), {"layer2.1.conv2": [1, 2, 5], "layer2.0.conv2": [0, 3]})
    units = cnn.filter_units(model)
    remove_once = remove_units(copy.deepcopy(model), units, {"layer2.1.conv2": [1, 2, 5], "layer2.0.conv2": [0, 3]})
    zero_filters(model, {"layer2.1.conv2": [2, 5]})
    zero_filters(remove_once, {"layer2.1.conv2": [1, 2]})
    small, kept = export.compact(remove_once)
    assert kept["layer2.1.conv2"] == [1, 2]
    images, _ = images_of(6)
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=0, atol=1e-5)


def test_slice_and_scatter_are_inverse(make_micro):
    model = make_micro(projected=True)
    units, kept = cnn.units_of(model), some_kept(model, 3)
    tensors = model.state_dict()
    small = slice_tensors(tensors, units, kept)
    removed = remove_units(copy.deepcopy(model), units, kept)
    assert_same_tensors(small, removed.state_dict())
    dense = scatter_tensors(small, units, kept)
    assert {name: tensor.shape for name, tensor in dense.items()} == {name: t.shape for name, t in tensors.items()}
    assert_same_tensors(slice_tensors(dense, units, kept), small)
    for name, tensor in dense.items():
        owner = name.rpartition(".")[0]
        convolution = re.sub(r"bn(\d)", r"conv\1", owner)
        expected = tensors[name].clone()
        if convolution in BLOCK_CONVOLUTIONS and expected.ndim:
            expected[[unit for unit in range(len(expected)) if unit not in kept[convolution]]] = 0
        if owner.endswith("conv2"):
            before = kept[owner.replace("conv2", "conv1")]
            expected[:, [unit for unit in range(expected.shape[1]) if unit not in before]] = 0
        assert torch.equal(tensor, expected), name


# ------------------------------------------------------------------------------------------------------- on disk, ONNX


@pytest.mark.parametrize("projected", [False, True])
def test_export_and_back(make_micro, tmp_path, projected):
    model = make_micro(projected=projected, size=9)
    kept = some_kept(model, 1)
    zero_filters(model, kept)
    batches = [images_of(8, 9, seed=1), images_of(3, 9, seed=2)]
    small = export.write(tmp_path / "model", model, kept, batches, DATASETS["fashionmnist"], {"arch": "res"}, {})
    loaded = export.load(tmp_path / "model")
    assert not loaded.training
    assert_same_tensors(loaded.state_dict(), small.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(batches[0][0]), small(batches[0][0]))
        torch.testing.assert_close(loaded(batches[0][0]), model(batches[0][0]), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["resnet"] == {
        "depths": [1, 2],
        "widths": [4, 6],
        "projected": projected,
        "num_classes": 10,
        "img_size": 9,
    }
    assert {name: config["kept_filters"][name] for name in BLOCK_CONVOLUTIONS} == {
        name: kept[name] for name in BLOCK_CONVOLUTIONS
    }
    assert config["mean"] == [DATASETS["fashionmnist"].mean[0]] * 3
    assert config["parameters"] == {"dense": parameters_of(model), "removed": parameters_of(small)}
    assert config["macs"] == {"dense": counted(model, 9), "removed": counted(small, 9)}
    card = (tmp_path / "model" / "README.md").read_text()
    assert "export.load" in card
    assert f"layer2.0.conv1: {len(kept['layer2.0.conv1'])}" in card
    assert "Vision Transformer" not in card


def test_a_network_that_computes_something_else_is_not_exported(make_micro, tmp_path):
    model = make_micro()
    with pytest.raises(export.RunError, match="differs"):
        export.write(tmp_path / "model", model, {"layer1.0.conv1": [0]}, [images_of(4)], None, {}, {})
    assert not (tmp_path / "model").exists()


def test_onnx_of_a_removed_network(make_micro, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = make_micro(projected=True, size=9)
    kept = some_kept(model, 1)
    small, _ = export.compact(zero_filters(model, kept), kept)
    assert small.layer1[0].out_index is not None
    assert export.to_onnx(small, tmp_path / "model.onnx") <= 1e-4
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images, _ = images_of(5, 9, seed=6)
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- runs

BASE = words(
    "--dataset digits --arch res_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 3 --lr 0.05 --rate 0.3 --val_fraction 0.05 --no-export"
)
STEPS = 3  # an epoch
TIMES = ("seconds", "images_per_second")


@pytest.fixture
def resnets(house, monkeypatch):
    """The micro ResNets are an `--arch`, too."""
    for builder in (res_micro, res_micro_projected):
        monkeypatch.setitem(models.BUILDERS, builder.__name__, builder)
        monkeypatch.setitem(models.resnet.BUILDERS, builder.__name__, builder)


@pytest.fixture
def run(resnets, tmp_path, capsys):
    return runner(tmp_path, capsys, BASE)


@pytest.fixture
def watch(around):
    """watch.before("train_step", f) and watch.after(...): f(job, *arguments) around methods of the run."""
    return SimpleNamespace(
        before=lambda method, react: around(method, before=react),
        after=lambda method, react: around(method, after=react),
    )


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def states_of(folder):
    with open(folder / "states.csv", newline="") as file:
        return list(csv.DictReader(file))


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


@pytest.fixture
def noisy_init(tmp_path, add_noise):
    """Initial weights for --init whose biases are not zero, and their file."""
    torch.manual_seed(11)
    weights = clones(add_noise(res_micro(10, 8), 11, scale=0.3).state_dict())
    torch.save(weights, tmp_path / "noisy.pt")
    return tmp_path / "noisy.pt", weights


@pytest.mark.parametrize("method", ["rsst", "refill", "imp"])
def test_the_documented_command_on_digits(method, run):
    base = words("--arch res20s --lr 0.01 --batch_size 256 --dataset digits --device cpu --epochs 1 --pruning_times 2")
    base += words("--train_limit 512")
    done = run("--struct", method, base=base)
    assert re.search(r"state +density +filters +parameters +MACs", done.out)
    dense, pruned = states_of(done.dir)
    assert (dense["filters"], dense["parameters"], dense["density"]) == ("688", "269722", "1.0")
    if method == "imp":
        assert float(pruned["density"]) == pytest.approx(0.8, abs=1e-5)
        assert pruned["filters"] == "688"
    else:
        checkpoint = load(done.dir / "checkpoint.pt")
        expected = masks_of(checkpoint, "elementwise")
        kept = load(done.dir / "best.pt")["kept"]
        for name, ids in kept.items():
            filters = len(checkpoint["weights"][f"{name}.weight"])
            assert len(ids) == max(1, int(expected[name].mean() * filters + 1e-9))
        assert int(pruned["filters"]) == 16 + sum(map(len, kept.values()))
    proof = json.loads((done.dir / "model" / "parity.json").read_text())
    assert proof["max_difference_float32"] <= proof["bound_float32"]
    assert proof["top1_agreement"] == 1.0
    small = export.load(done.dir / "model")
    if method == "imp":
        assert parameters_of(small) <= 269_722
    else:
        assert parameters_of(small) == int(pruned["parameters"]) < 269_722
        assert counted(small, 8) == int(pruned["macs"])


def test_a_cnn_sees_images_at_their_native_size(resnets):
    for flags, size in (("digits", 8), ("fashionmnist", 28), ("cifar10", 32), ("digits --img_size 12", 12)):
        args = entry.parse_args(["--arch", "res_micro", "--dataset", *words(flags)])
        assert entry.make_model(args).img_size == size


REFUSED = {
    "--vit_structured": ("--vit_structured", "filters"),
    "--patch_size 4": ("--patch_size 4", "res20s"),
    "--pretrained": ("--pretrained", "res20s"),
    "--vit_structured --struct oneshot": ("--vit_structured", "filters"),
}


@pytest.mark.parametrize("dry", [(), ("--dry_run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("flags", REFUSED)
def test_what_a_cnn_has_not_is_refused_in_one_line(flags, dry, resnets, tmp_path, capsys):
    argv = words(f"--arch res20s --dataset digits --device cpu {flags} --save_dir {tmp_path / 'run'}")
    assert call([*argv, *dry]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(part in err for part in REFUSED[flags])
    assert not (tmp_path / "run").exists()


def test_oneshot_does_not_send_a_cnn_where_it_is_refused(resnets, capsys):
    assert call(words("--arch res20s --dataset digits --struct oneshot --dry_run")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "add --vit_structured" not in err


def plan_rows(out):
    return [line.split() for line in out.splitlines() if re.match(r" *\d+ +\d+\.\d+%", line)]


@pytest.mark.parametrize("fillback", [0.0, 0.5])
def test_the_plan_of_filters(fillback, resnets, capsys):
    flags = f"--arch res_micro --dataset digits --struct rsst --rate 0.3 --pruning_times 4 --fillback_rate {fillback}"
    assert call([*words(flags), "--dry_run"]) == 0
    rows = plan_rows(capsys.readouterr().out)
    total = sum(count * size for count, size in SHAPES.values())
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for state, row in enumerate(rows):
        left = round(total * 0.7**state) / total
        kept = {
            name: max(1, int(count * left + (count - count * left) * fillback + 1e-9))
            for name, (count, _) in SHAPES.items()
        }
        weights = sum(kept[name] * size for name, (_, size) in SHAPES.items())
        assert row[1] == f"{100 * weights / total:.2f}%"
        assert row[2] == str(4 + sum(kept.values()))
        model = res_micro(10, 8)
        small = remove_units(model, cnn.units_of(model), {name: range(count) for name, count in kept.items()})
        assert row[3] == f"{parameters_of(small):,}"
        assert row[4] == f"{counted(small, 8) / 1e9:.4f}"
    assert os.listdir() == []


def test_the_plan_of_imp_counts_weights(resnets, capsys):
    assert (
        call(words("--arch res20s --dataset cifar10 --struct imp --rate 0.2 --pruning_times 3 --conv1 --dry_run")) == 0
    )
    for state, row in enumerate(plan_rows(capsys.readouterr().out)):
        left = round((267_264 + 432) * 0.8**state)
        assert row[1:4] == [f"{100 * left / 267_696:.2f}%", "688", f"{269_722 - 267_696 + left:,}"]


@pytest.mark.parametrize("conv1", [(), ("--conv1",)], ids=["without first", "with first"])
@pytest.mark.parametrize("method", ["refill", "rsst", "imp"])
def test_densities_and_conv1(method, conv1, run):
    done = run("--struct", method, *conv1)
    total = sum(count * size for count, size in SHAPES.values()) + (108 if conv1 else 0)
    end = load(done.dir / "checkpoint.pt")
    names = ["conv1"] * bool(conv1) + BLOCK_CONVOLUTIONS
    assert list(masks_of(end, "elementwise")) == list(masks_of(end, "masks")) == names

    def ones(kind):
        return masks_of(end, kind)

    assert sum(int(bits.sum()) for bits in ones("elementwise").values()) == round(total * 0.7**2)
    weights = load(done.dir / "checkpoint.pt")["weights"]
    for name, bits in ones("masks").items():
        kernel = weights[f"{name}.weight"].flatten()
        assert not kernel[bits == 0].any()
        filters = bits.reshape(len(weights[f"{name}.weight"]), -1)
        if method != "imp":
            assert ((filters.all(1)) | (~filters.any(1))).all()  # whole or gone
            assert filters.all(1).nonzero()[0].tolist() == end["run"]["kept"][name]
            path, _, leaf = name.rpartition(".")
            for part in ("weight", "bias"):
                norm = weights[f"{path}.{leaf.replace('conv', 'bn')}.{part}".lstrip(".")]
                gone = [unit for unit in range(len(norm)) if unit not in end["run"]["kept"][name]]
                assert not norm[gone].any()
    if method == "imp":
        assert float(states_of(done.dir)[-1]["density"]) == round(total * 0.7**2) / total


@pytest.mark.parametrize("method", ["refill", "rsst"])
def test_refill_never_feeds_the_elementwise_mask(method, run, watch):
    weights, masks, kept = {}, {}, {}

    def remember(job):
        if job.run.state and job.run.step == 0:
            masks[job.run.state], kept[job.run.state] = clones(job.run.elementwise), job.run.target_kept

    watch.before("choose_target", lambda job: weights.update({job.run.state: clones(job.dense.state_dict())}))
    watch.after("begin_state", remember)
    run("--struct", method, "--criteria", "magnitude", "--fillback_rate", "0.1")
    total = sum(count * size for count, size in SHAPES.values())
    kernels = {name: weights[1][f"{name}.weight"] for name in BLOCK_CONVOLUTIONS}
    assert_same_tensors(masks[1], surviving(kernels, round(0.7 * total)))
    for name, ids in kept[1].items():
        scores = kernels[name].double().abs().flatten(1).sum(1).tolist()
        assert ids == reference_kept(masks[1][name].flatten(1), scores, 0.1)
        assert (masks[2][name] <= masks[1][name]).all()  # what a whole filter brought back is no survivor
    assert sum(int(mask.sum()) for mask in masks[2].values()) == round(0.49 * total)


def test_dense_trains_one_long_schedule(run):
    done = run("--struct", "dense")
    (row,) = states_of(done.dir)
    assert (row["density"], row["filters"]) == ("1.0", str(4 + sum(count for count, _ in SHAPES.values())))
    assert len(metrics(done.dir)) == 6


@pytest.fixture
def starts(watch):
    """What each state starts from, and what the one before ended with."""
    found = {}

    def remember(job):
        if job.run.step == 0:
            found[job.run.state] = (clones(job.dense.state_dict()), job.run.masks, job.run.kept)

    watch.after("begin_state", remember)
    return found


@pytest.fixture
def ends(watch):
    found = {}
    watch.before("end_state", lambda job: found.update({job.run.state: clones(job.dense.state_dict())}))
    return found


@pytest.mark.parametrize("fc", [(), ("--fc",)], ids=["without fc", "with fc"])
@pytest.mark.parametrize("method", ["rsst", "imp"])
def test_lt_rewinds_everything_but_the_classifier(method, fc, run, starts, ends):
    done = run("--struct", method, *fc)
    init = load(done.dir / "init.pt")
    assert init["bn1.running_mean"].abs().max() == 0
    for state in (1, 2):
        weights = starts[state][0]
        assert ends[state - 1]["layer2.1.bn2.running_mean"].any()
        assert_same_tensors(weights, init, skip=() if fc else ("fc.",))
        if not fc:
            for name in ("fc.weight", "fc.bias"):
                assert torch.equal(weights[name], ends[state - 1][name])
                assert not torch.equal(weights[name], init[name])


def test_rewind_lt_returns_to_an_epoch_with_its_statistics(run, watch, starts):
    after = []
    watch.after("end_epoch", lambda job, epoch: after.append(clones(job.dense.state_dict())))
    done = run("--struct", "refill", "--prune_type", "rewind_lt", "--rewind_epoch", "1", "--fc")
    assert after[0]["bn1.num_batches_tracked"] == STEPS
    assert_same_tensors(load(done.dir / "rewind.pt"), after[0])
    for state in (1, 2):
        assert_same_tensors(starts[state][0], after[0])


def test_finetune_goes_on_from_the_trained_weights(run, starts, ends):
    run("--struct", "rsst", "--prune_type", "finetune")
    for state in (1, 2):
        assert_same_tensors(starts[state][0], ends[state - 1])


@pytest.mark.parametrize("compact", ["--compact_training", "--no-compact_training"])
def test_doomed_filters_shrink_by_the_dose_and_are_cut(compact, run, watch, noisy_init):
    path, init = noisy_init
    looked = []

    def before_cut(job):
        weights, kept = clones(job.dense.state_dict()), job.run.target_kept
        for name, ids in kept.items():
            gone = [unit for unit in range(SHAPES[name][0]) if unit not in ids]
            for part in (
                f"{name}.weight",
                f"{name.replace('conv', 'bn')}.weight",
                f"{name.replace('conv', 'bn')}.bias",
            ):
                torch.testing.assert_close(weights[part][gone], init[part][gone] * math.exp(-10), rtol=1e-4, atol=1e-30)
                assert torch.equal(weights[part][ids], init[part][ids])
                looked.append(len(gone))
        assert torch.equal(weights["conv1.weight"], init["conv1.weight"])

    def after_cut(job):
        for name, ids in job.run.kept.items():
            parameter = scatter_tensors(job.model.state_dict(), job.units, job.model_kept)[f"{name}.weight"]
            assert parameter.flatten(1).any(1).nonzero().flatten().tolist() == ids

    watch.before("cut", before_cut)
    watch.after("cut", after_cut)
    # a learning rate that moves nothing leaves the penalty alone with the weights
    flags = words("--lr 1e-300 --weight_decay 0 --pruning_times 2 --reg_granularity_prune 0.5 --epochs 4 --clip_grad 1")
    done = run("--struct", "rsst", compact, *flags, "--init", path, "--criteria", "magnitude")
    assert sum(looked) > 0
    assert float(states_of(done.dir)[1]["residual"]) == pytest.approx(math.exp(-10), rel=1e-3)


def kept_slices(job):
    """All tensors of what trains, without what is cut, so that masked and compact networks compare."""
    tensors = job.model.state_dict()
    if not job.model_kept:
        tensors = slice_tensors(tensors, job.units, job.run.kept)
    return clones(tensors)


def trace(run, watch, *flags, name):
    found = {}

    def remember(job, *_):
        if job.save_dir.name == name:
            found[job.run.state, job.run.step] = kept_slices(job)

    watch.after("train_step", remember)
    return found, run(*flags, name=name)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("arch", "method", "states"),
    [
        ("res_micro", "rsst", "2"),
        ("res_micro_projected", "refill", "2"),
        # from the third state on, what the smaller network scatters back decides what is pruned next
        ("res_micro", "refill", "3"),
        ("res_micro_projected", "rsst", "3"),
    ],
)
def test_compact_and_masked_training_agree_in_float64(arch, method, states, run, watch):
    flags = words("--epochs 2 --clip_grad 0.3 --weight_decay 0.01 --criteria magnitude --reg_finish 0.5 --conv1")
    flags = ("--struct", method, "--arch", arch, "--pruning_times", states, *flags)
    compact, small = trace(run, watch, *flags, "--compact_training", name="compact")
    masked, large = trace(run, watch, *flags, "--no-compact_training", name="masked")
    assert compact.keys() == masked.keys() == set(itertools.product(range(int(states)), range(1, 7)))
    for key, tensors in masked.items():
        assert compact[key].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert compact[key][name].shape == tensor.shape, (key, name)
            assert (compact[key][name] - tensor).abs().max() < 1e-9, (key, name)
    for one, other in zip(metrics(small.dir), metrics(large.dir), strict=True):
        # the norm of doomed kernels may count what reads filters that are gone, in the masked network only
        assert one.pop("residual") == pytest.approx(other.pop("residual"), rel=0.01)
        assert one == pytest.approx(other, abs=1e-9)
    assert sum(t.numel() for t in compact[1, 6].values()) < sum(t.numel() for t in compact[0, 6].values())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("compact", ["--compact_training", "--no-compact_training"])
def test_filters_that_come_back_are_whole_and_not_doomed(compact, run, watch, monkeypatch, noisy_init):
    path, init = noisy_init
    layer, others = "layer2.0.conv1", {name: list(range(count)) for name, (count, _) in SHAPES.items()}
    script = {1: [0, 1, 2], 2: [1, 3]}
    state = itertools.count(1)
    monkeypatch.setattr(entry, "select_filters", lambda *_: {**others, layer: script[next(state)]})
    seen = {}

    def look(job, *_):
        weights = scatter_tensors(job.model.state_dict(), job.units, job.model_kept)
        rows = [weights[f"{layer}.weight"].flatten(1), weights["layer2.0.bn1.weight"][:, None]]
        rows.append(weights["layer2.0.bn1.bias"][:, None])
        seen[job.run.state, job.run.step] = torch.cat(rows, dim=1)

    watch.after("train_step", look)
    flags = words("--epochs 4 --reg_finish 0.5 --lr 1e-300 --weight_decay 0")
    done = run("--struct", "rsst", compact, *flags, "--init", path)
    start = torch.cat(
        [init[f"{layer}.weight"].double().flatten(1)]
        + [init[f"layer2.0.bn1.{part}"].double()[:, None] for part in ("weight", "bias")],
        dim=1,
    )
    last, cut = seen[2, 5], seen[2, 7]  # the cut comes after step 6 of 12
    assert torch.equal(seen[1, 7].any(1), torch.tensor([True, True, True, False, False, False]))
    for unit in (1, 3):  # 3 was gone and is what it was at first
        assert torch.equal(last[unit], start[unit])
        assert torch.equal(cut[unit], start[unit])
    for unit in (0, 2):
        assert 0 < float(last[unit].norm()) < 0.9 * float(start[unit].norm())
        assert not cut[unit].any()
    for unit in (4, 5):  # gone in both states
        assert not last[unit].any()
        assert not cut[unit].any()
    assert load(done.dir / "best.pt")["kept"][layer] == [1, 3]


@pytest.mark.parametrize(
    ("method", "point"), [("rsst", (1, 0)), ("rsst", (1, 2)), ("imp", (1, 1))], ids=["before a cut", "after", "imp"]
)
def test_a_broken_run_resumes_to_the_same_bits(method, point, run, watch):
    """Masks from a checkpoint, too, are stored as the weights are, channels last."""

    def look(job):
        for parameter, mask in zip(job.held, job.held_masks, strict=True):
            assert mask.stride() == parameter.stride()
        for parameter, mask in zip(job.penalty.parameters, job.penalty.doomed, strict=True):
            assert mask.stride() == parameter.stride()
        kernels = [parameter for parameter in job.model.parameters() if parameter.ndim == 4]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)

    watch.after("set_up_training", look)
    flags = words("--epochs 3 --pruning_times 2 --reg_finish 0.5 --opt adamw --lr 0.01")
    flags = ("--struct", method, *flags)
    whole = run(*flags, name="whole")
    armed = [True]

    def stop(job, epoch, batch):
        if armed and (job.run.state, epoch) >= point and job.save_dir.name == "broken":
            armed.clear()
            raise KeyboardInterrupt

    watch.before("train_step", stop)
    run(*flags, name="broken", code=130)
    assert not armed
    again = run("--resume", name="broken", base=())
    assert metrics(again.dir) == metrics(whole.dir)
    one, other = (load(folder.dir / "best.pt") for folder in (whole, again))
    assert_same_tensors(other["weights"], one["weights"])
    assert other["kept"] == one["kept"]
    one, other = (load(folder.dir / "checkpoint.pt")["weights"] for folder in (whole, again))
    assert_same_tensors(other, one)


def test_moments_lie_in_memory_as_the_weights_do_when_a_run_goes_on_in_bf16(run, watch, monkeypatch):
    """Fused optimizers do not look at strides; the smaller network is channels last in float32 only."""
    layouts = []

    def look(job, *_):
        if (job.run.state, job.run.step) == (1, 4):
            kernels = [p for p in job.model.parameters() if p.ndim == 4]
            layouts.append([kernel.stride() for kernel in kernels])
            assert [job.optimizer.state[kernel]["exp_avg"].stride() for kernel in kernels] == layouts[-1]
            if len(layouts) == 1:
                raise KeyboardInterrupt

    watch.before("train_step", look)
    flags = words("--struct rsst --pruning_times 2 --reg_finish 0.5 --opt adamw --lr 0.01 --amp auto")
    monkeypatch.setattr(entry.utils, "pick_precision", lambda *_: None)
    run(*flags, "--checkpoint_every", "1", code=130)
    monkeypatch.setattr(entry.utils, "pick_precision", lambda *_: torch.bfloat16)
    run("--resume", base=())
    one, other = layouts
    assert one != other


@pytest.mark.parametrize("method", ["rsst", "imp"])
def test_the_export_command_on_a_finished_run(method, run, tmp_path, capsys):
    done = run("--struct", method, "--rate", "0.5")
    capsys.readouterr()
    assert export.main([str(done.dir), "--out", str(tmp_path / "out"), "--evaluate"]) == 0
    best = load(done.dir / "best.pt")["weights"]
    masked = res_micro(10, 8).eval()
    masked.load_state_dict(best)
    images, _ = images_of(4)
    with torch.no_grad():
        torch.testing.assert_close(export.load(tmp_path / "out")(images), masked(images), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["metrics"]["test_accuracy"] == pytest.approx(float(states_of(done.dir)[-1]["test_accuracy"]))


def test_export_from_a_checkpoint_of_the_public_functions(tmp_path, resnets):
    torch.manual_seed(0)
    model = train(models.build_model("res20s", 10), steps=1, size=16)
    cnn.pruning_model(model, 0.3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth.tar")
    argv = ["--from_checkpoint", tmp_path / "model.pth.tar", "--arch", "res20s", "--out", tmp_path / "out"]
    assert export.main([str(part) for part in argv]) == 0
    images, _ = images_of(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(export.load(tmp_path / "out")(images), model.eval()(images), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- Fashion-MNIST, slow

FASHION_BASE = words(f"--arch res20s --dataset fashionmnist --data {FASHION} --device cpu --pruning_times 2")


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is missing")
@pytest.mark.parametrize("method", ["rsst", "refill", "imp"])
def test_the_documented_command_on_fashion_mnist(method, run):
    flags = words("--lr 0.01 --batch_size 256 --epochs 1 --train_limit 512 --val_fraction 0.005")
    done = run("--struct", method, *flags, base=FASHION_BASE)
    assert re.search(r"state +density +filters +parameters +MACs", done.out)
    assert len(states_of(done.dir)) == 2
    proof = json.loads((done.dir / "model" / "parity.json").read_text())
    assert proof["max_difference_float32"] <= proof["bound_float32"]


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is missing")
@pytest.mark.parametrize("sparsity", [0.36, 0.64])
def test_cutting_filters_costs_nothing_on_fashion_mnist(sparsity, run):
    flags = (
        f"--struct rsst --rate {sparsity} --opt adamw --lr 0.003 --batch_size 64 --epochs 2 --decreasing_lr 2 "
        "--reg_finish 0.5 --train_limit 4096 --val_fraction 0.04 --no-export"
    )
    done = run(*words(flags), base=FASHION_BASE)
    dense, pruned = states_of(done.dir)
    before, after = (float(pruned[f"accuracy_{when}_cut"]) for when in ("before", "after"))
    print(f"sparsity {sparsity:.0%}: {before:.2%} before the cut, {after:.2%} after, residual {pruned['residual']}")
    assert float(pruned["density"]) == pytest.approx(1 - sparsity, abs=0.03)
    assert float(dense["best_accuracy"]) > 0.5  # it has learnt something that a cut could destroy
    assert before > 0.4
    assert before - after <= 0.005
    assert float(pruned["residual"]) < 0.1
