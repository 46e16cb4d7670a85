"""Laws of the convolutional part: ResNets, filters as units, Refill and RSST on filters, removal, files and runs.

Runs are real ones through `main([...])`: scikit-learn's digits and a ResNet of three small blocks.
"""

import copy
import json
import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import TIMES, call, card_model, load, masks_of, metrics, rows_of, runner
from references import assert_masks, assert_same_function, assert_same_tensors, clones, largest
from torch import nn

# isort: split
from references import random_masks, unit_scores

import export
import models
import pruning_utils as cnn
import report
from dataset import DATASETS
from families.resnet import CNN
from models.resnet import ResNet
from vit_structured_pruning import CRITERIA, remove_units, scatter_tensors, score_units, slice_tensors, unit_masks

BLOCK_CONVOLUTIONS = [f"layer{block}.conv{i}" for block in ("1.0", "2.0", "2.1") for i in (1, 2)]
# filters, kernel elements a filter
SHAPES = dict(zip(BLOCK_CONVOLUTIONS, [(4, 36), (4, 36), (7, 36), (7, 63), (7, 63), (7, 63)], strict=True))
TOTAL = sum(count * size for count, size in SHAPES.values())

words = str.split


def res_micro(num_classes=None, img_size=None, projected=False):
    return ResNet((1, 2), (4, 7), projected, num_classes or 10, img_size or 8)


def res_micro_projected(num_classes=None, img_size=None):
    return res_micro(num_classes, img_size, projected=True)


def images_of(count, size=8, seed=0, dtype=torch.float32):
    """Images whose borders are as bright as their middles, and labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64) + 0.5
    return pixels.to(dtype), torch.randint(0, 10, (count,), generator=generator)


@pytest.fixture
def make_micro(add_noise):
    """make_micro(projected=True, size=9): a micro ResNet after a few real steps; nothing is at its initial value."""

    def make(seed=0, projected=False, size=8, dtype=torch.float32):
        torch.manual_seed(seed)
        model = add_noise(res_micro(10, size, projected).to(dtype), seed, scale=0.1).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(4):
            images, labels = images_of(16, size, seed=step, dtype=dtype)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return model.eval()

    return make


def some_kept(model, seed=0):
    """A random half of each layer's filters, at least one."""
    chosen = random_masks({n: torch.ones(g.count) for n, g in cnn.filter_units(model, True).items()}, 0.5, seed)
    return {name: mask.nonzero().flatten().tolist() or [len(mask) - 1] for name, mask in chosen.items()}


def norm_of(name):
    """The batch norm behind a convolution: bn2 behind conv2, downsample.1 behind downsample.0."""
    return name[:-1] + "1" if name.endswith("0") else name.replace("conv", "bn")


@torch.no_grad()
def zero_filters(model, kept):
    """Kernel, gain and bias of all other filters become zero, by plain indexing."""
    for name, ids in kept.items():
        convolution, norm = model.get_submodule(name), model.get_submodule(norm_of(name))
        gone = [unit for unit in range(convolution.out_channels) if unit not in ids]
        for tensor in (convolution.weight, norm.weight, norm.bias):
            tensor[gone] = 0
    return model


@torch.no_grad()
def counted(model, size):
    """MACs by what a real forward pass puts out: output pixels x weights of each layer."""
    total = []

    def count(module, _, out):
        pixels = out[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        total.append(pixels * module.weight.numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model.eval()(torch.zeros(1, 3, size, size, device=model.fc.weight.device))
    for hook in hooks:
        hook.remove()
    return sum(total)


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------ the networks
@pytest.mark.parametrize(("arch", "parameters", "convolutions", "filters"), [
    ("res20s", 269_722, 19, 16 + 6 * (16 + 32 + 64)), ("res32s", 464_154, 31, 16 + 10 * (16 + 32 + 64)),
    ("res56s", 853_018, 55, 16 + 18 * (16 + 32 + 64)), ("res18", 11_173_962, 20, 64 + 4 * 64 + 5 * (128 + 256 + 512)),
])  # fmt: skip
def test_what_networks_hold_and_cost(arch, parameters, convolutions, filters):
    with torch.device("meta"):
        model = models.build_model(arch, 10, 27)
        assert parameters_of(models.build_model(arch, 100)) - parameters == 90 * (model.fc.in_features + 1)
    assert cnn.cnn_cost(model, {}) == {"filters": filters, "parameters": parameters, "macs": counted(model, 27)}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(cnn.prunable_convolutions(model, conv1=True)) == names
    assert list(cnn.prunable_convolutions(model)) == names[1:]
    assert (len(names), names[0]) == (convolutions, "conv1")


def test_projected_networks_are_torchvisions_with_a_small_stem():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 2, 1], num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = ResNet((1, 1, 2, 1), (64, 128, 256, 512), True, 10).eval()
    for name, buffer in ours.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    images, _ = images_of(2)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


def test_the_option_a_shortcut_by_hand():
    for channels, filters, before in ((16, 32, 8), (4, 7, 1)):
        block = models.resnet.BasicBlock(channels, filters, 2, projected=False).eval()
        block.bn2.weight.data.zero_()  # the branch is silent, the shortcut is alone
        x, expected = torch.rand(2, channels, 5, 7), torch.zeros(2, filters, 3, 4)
        expected[:, before : before + channels] = x[:, :, ::2, ::2]
        assert torch.equal(block(x), expected)


def test_convolutions_start_with_hes_deviation():
    torch.manual_seed(0)
    model = ResNet((1, 1), (64, 128), True)
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0"):
        weight = model.get_submodule(name).weight.detach()
        deviation = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))  # by what goes out
        assert float(weight.std()) == pytest.approx(deviation, rel=0.02), name
        assert abs(float(weight.mean())) < 0.04 * deviation, name
    assert (model.layer2[0].bn2.weight == 1).all()
    assert (model.layer2[0].bn2.bias == 0).all()


# ------------------------------------------------------------------------------------ public functions and filters kept
@pytest.mark.parametrize("conv1", [False, True])
def test_public_functions_see_all_convolutions_and_the_first_when_asked(make_micro, conv1, capsys):
    model = make_micro(projected=True)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][not conv1 :]
    weights = clones({name: model.get_submodule(name).weight for name in names})
    total = sum(weight.numel() for weight in weights.values())
    cnn.pruning_model(model, 0.3, conv1=conv1)
    masks = cnn.extract_mask(model.state_dict())
    assert [f"{name}.weight_mask" for name in names] == list(masks)
    masks = dict(zip(names, masks.values(), strict=True))
    everything = {name: torch.ones_like(weight) for name, weight in weights.items()}
    assert_masks(masks, largest(weights, everything, round(total * 0.7)))
    masks[names[0]][0] = 0
    cnn.prune_model_custom(model, masks, conv1=conv1)
    left = 100 * sum(int(mask.sum()) for mask in masks.values()) / total
    assert cnn.check_sparsity(model, conv1=conv1) == pytest.approx(left)
    lines = [re.split(r" +\| ", line) for line in capsys.readouterr().out.splitlines()]
    assert (lines[0], [name for name, *rest in lines if rest]) == (
        ["[CNN Sparsity Report]"],
        [f"{n}.weight_mask" for n in names],
    )
    cnn.remove_prune(model, conv1=conv1)
    assert_same_tensors(
        {n: dict(model.named_parameters())[f"{n}.weight"] for n in names}, {n: weights[n] * masks[n] for n in names}
    )
    if not conv1:
        with pytest.raises(ValueError, match="conv1: the model has no such"):
            cnn.prune_model_custom(model, {"conv1": torch.ones(4, 3, 3, 3)})


def reference_kept(mask, scores, fillback):
    """Refill's filters of one layer by numpy: int(left + (C - left) * fillback), best first, the lower id of equals."""
    mask = np.asarray(mask).reshape(len(scores), -1)
    left = mask.mean() * len(mask)
    keep = max(1, int(left + (len(mask) - left) * fillback + 1e-9))
    alive = [unit for unit in range(len(mask)) if mask[unit].any()]
    return sorted(sorted(alive, key=lambda unit: (-scores[unit], unit))[:keep]) or [0]


def test_how_many_filters_stay_by_hand():
    # C = 16, by hand: 12.8, 13.12, 14.4; 10.24, 10.816, 13.12; 4.8, 5.92, 10.4
    for density, stay in ((0.8, (12, 13, 14)), (0.64, (10, 10, 13)), (0.3, (4, 5, 10))):
        assert tuple(cnn.filter_count(16, density, fillback) for fillback in (0, 0.1, 0.5)) == stay
    assert (cnn.filter_count(16, 0, 0), cnn.filter_count(16, 0, 1)) == (1, 16)
    assert cnn.filter_count(100, 0.29, 0.0) == 29  # int(0.29 * 100) is 28


@settings(max_examples=80, deadline=None)
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
    assert found == {"conv": reference_kept(mask, values, fillback)}


# -------------------------------------------------------------------------------------------- scores, refill of a model
def filter_places(model):
    return {name: (name, [[i] for i in range(group.count)]) for name, group in cnn.filter_units(model, True).items()}


@pytest.mark.parametrize("criteria", ["remain", "magnitude", "l1", "l2", "saliency"])
def test_scores_of_filters_are_the_references(make_micro, criteria):
    model = make_micro(projected=True)
    masks = random_masks({n: m.weight for n, m in cnn.prunable_convolutions(model, True).items()}, 0.4, 5)
    batches = [images_of(3, seed=7), images_of(5, seed=8)]
    expected, before = unit_scores(model, criteria, filter_places(model), masks, batches), clones(model.state_dict())
    found = score_units(model, cnn.filter_units(model, True), criteria, mask=masks, batches=batches)
    assert_same_tensors(model.state_dict(), before)
    assert list(found) == list(masks)
    for name, values in found.items():
        reference = np.where(masks[name].flatten(1).any(1), expected[name], -np.inf)  # the dead are never chosen
        np.testing.assert_allclose(values.numpy(), reference, rtol=1e-5, atol=1e-7, err_msg=name)
        assert len(set(values.tolist())) > 1


def test_fillback_on_a_model(make_micro):
    model, trained, initial = make_micro(0).train(), make_micro(1), make_micro(2)
    batches = [images_of(4, seed=3), images_of(4, seed=4)]
    plain = random_masks({name: m.weight for name, m in cnn.prunable_convolutions(model).items()}, 0.5)
    cnn.prune_model_custom(trained, plain)  # what torch.nn.utils.prune leaves of a trained model
    masks = {f"{name}.weight_mask": mask for name, mask in plain.items()}
    given = [masks, clones(trained.state_dict()), initial.state_dict()]
    untouched = [clones(tensors) for tensors in (*given, model.state_dict())]
    cnn.remove_prune(trained)

    def call(loader, **options):
        return cnn.prune_model_custom_fillback(model, given[0], loader, given[1], given[2], "saliency", 0.25, **options)

    found = call((batch for batch in batches), return_mask_only=True)  # any iterable
    for tensors, expected in zip((*given, model.state_dict()), untouched, strict=True):
        assert_same_tensors(tensors, expected)
    assert all(module.training for module in model.modules())
    scores = unit_scores(trained, "saliency", filter_places(trained), plain, batches)
    kept = {name: reference_kept(plain[name], scores[name], 0.25) for name in BLOCK_CONVOLUTIONS}
    parameters = dict(initial.named_parameters())
    expected = {n: m for n, m in unit_masks(cnn.filter_units(model), kept, parameters).items() if "conv" in n}
    assert_same_tensors({f"{name}.weight": mask for name, mask in found.items()}, expected)

    assert call(batches) is model
    for tensors, expected in zip(given, untouched, strict=False):
        assert_same_tensors(tensors, expected)
    assert torch.equal(model.layer1[0].conv1.weight_orig, given[2]["layer1.0.conv1.weight"])
    cnn.remove_prune(model)
    start = zero_filters(copy.deepcopy(initial), kept).state_dict()
    assert_same_tensors({name: model.state_dict()[name] for name in start}, start)


def test_fillback_with_and_without_the_first_convolution(make_micro):
    model = make_micro(projected=True)
    everything = {n: torch.ones_like(m.weight) for n, m in cnn.prunable_convolutions(model, True).items()}
    everything["conv1"][1] = 0
    arguments = (None, model.state_dict(), model.state_dict())
    for masks in (everything, {"conv1": everything["conv1"]}):
        found = cnn.prune_model_custom_fillback(model, masks, *arguments, "remain", return_mask_only=True)
        assert list(found) == list(masks)
        assert found["conv1"].flatten(1).all(1).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="fillback_rate"):
        cnn.prune_model_custom_fillback(model, everything, *arguments, "remain", fillback_rate=1.5)


# ---------------------------------------------------------------------------------------- what a filter is, and removal
def test_a_filter_is_its_kernel_with_gain_and_bias():
    model = res_micro_projected()
    units = cnn.filter_units(model, conv1=True)
    owned = {name for group in units.values() for name in group.parts}
    assert owned == {name for name, _ in model.named_parameters() if not name.startswith("fc.")}
    for name, group in units.items():
        assert list(group.parts) == [f"{name}.weight", f"{norm_of(name)}.weight", f"{norm_of(name)}.bias"]
    assert list(cnn.filter_units(model)) == list(units)[1:]
    assert [name for name, group in units.items() if group.removable] == BLOCK_CONVOLUTIONS


@pytest.mark.parametrize(("projected", "size"), [(False, 11), (True, 8)])
def test_removed_and_masked_networks_compute_the_same_at_the_cost_that_is_planned(make_micro, projected, size):
    dense = make_micro(projected=projected, size=size)
    images, _ = images_of(20, size, seed=9)
    for seed in range(2):
        kept = some_kept(dense, seed)
        masked = zero_filters(copy.deepcopy(dense), kept)
        small, found = export.compact(masked, kept)
        assert found == kept
        assert_same_function(masked, small, images)
        assert float((dense(images) - masked(images)).abs().max()) > 1e-2  # what went was not nothing
        by_itself, alive = export.compact(masked)
        assert {name: alive[name] for name in kept} == kept
        assert parameters_of(by_itself) == parameters_of(small) < parameters_of(dense)
        cost = {
            "filters": sum(map(len, kept.values())),
            "parameters": parameters_of(small),
            "macs": counted(small, size),
        }
        assert cnn.cnn_cost(dense, kept) == cost
        for name in BLOCK_CONVOLUTIONS:
            assert small.get_submodule(name).out_channels == len(small.get_submodule(name).weight) == len(kept[name])


def test_what_batch_norm_still_emits_keeps_a_filter_and_a_dead_layer_one(make_micro):
    model = zero_filters(make_micro(), {"layer2.1.conv2": []})
    with torch.no_grad():
        for unit, parts in enumerate(("kernel", "kernel gain", "kernel gain bias", "gain bias")):
            if "kernel" in parts:
                model.layer1[0].conv1.weight[unit] = 0
            if "gain" in parts:
                model.layer1[0].bn1.weight[unit] = 0
            if "bias" in parts:
                model.layer1[0].bn1.bias[unit] = 0
        model.layer1[0].bn1.bias[1] = 1.5
    kept = {name: list(range(count)) for name, (count, _) in SHAPES.items()}
    kept |= {"conv1": [0, 1, 2, 3], "layer1.0.conv1": [0, 1, 3], "layer2.1.conv2": [0]}
    small, found = export.compact(model)
    assert cnn.find_working_filters(model) == found == kept
    images, _ = images_of(6)
    assert_same_function(model, small, images)
    # the constant that the second one emits is cut off by zero padding: no bias can stand for it
    one_less, _ = export.compact(model, {"layer1.0.conv1": [0, 3]})
    with torch.no_grad():
        assert float((one_less(images) - model(images)).abs().max()) > 1e-3


def test_filters_can_be_removed_in_two_rounds_and_keep_their_place(make_micro):
    model, images = make_micro(), images_of(6)[0]
    first = {"layer2.1.conv2": [1, 2, 5], "layer2.0.conv2": list(range(7))}
    once = remove_units(zero_filters(model, first), cnn.filter_units(model), first)
    assert once.layer2[1].out_index.tolist() == [1, 2, 5]
    assert once.layer2[0].out_index is None
    assert "layer2.1.out_index" not in once.state_dict()
    masked = zero_filters(copy.deepcopy(once), {"layer2.1.conv2": [1, 2]})
    twice, kept = export.compact(masked)
    assert kept["layer2.1.conv2"] == [1, 2]
    assert twice.layer2[1].out_index.tolist() == [2, 5]
    assert twice.layer2[1].conv2.weight.shape == (2, 7, 3, 3)
    assert_same_function(masked, twice, images)


def test_slice_and_scatter_are_inverse(make_micro):
    model = make_micro(projected=True)
    units, kept = cnn.filter_units(model, conv1=True), some_kept(model, 3)
    tensors = model.state_dict()
    small = slice_tensors(tensors, units, kept)
    assert_same_tensors(small, remove_units(copy.deepcopy(model), units, kept).state_dict())
    dense = scatter_tensors(small, units, kept)
    assert_same_tensors(slice_tensors(dense, units, kept), small)
    expected = clones(tensors)
    for name in BLOCK_CONVOLUTIONS:
        gone = [unit for unit in range(SHAPES[name][0]) if unit not in kept[name]]
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{norm_of(name)}.{leaf}"][gone] = 0
        expected[f"{name}.weight"][gone] = 0
        if name.endswith("conv1"):
            expected[f"{name[:-1]}2.weight"][:, gone] = 0
    assert_same_tensors(dense, expected)


# ------------------------------------------------------------------------------------------------------- on disk, ONNX
def test_export_and_back_and_in_onnx_runtime(make_micro, tmp_path):
    model, path = make_micro(projected=True, size=9), tmp_path / "model"
    kept = some_kept(model, 1)
    batches = [images_of(8, 9, seed=1), images_of(3, 9, seed=2)]
    facts = DATASETS["fashionmnist"]
    small = export.write(path, zero_filters(model, kept), kept, batches, facts, {"arch": "res"}, {})
    loaded = export.load(path)
    assert not loaded.training
    assert_same_tensors(loaded.state_dict(), small.state_dict())
    assert_same_function(model, loaded, batches[0][0])
    config = json.loads((path / "config.json").read_text())
    expected = {"depths": [1, 2], "widths": [4, 7], "projected": True, "num_classes": 10, "img_size": 9}
    assert config["resnet"] == expected
    assert {name: config["kept_filters"][name] for name in kept} == kept
    assert config["mean"] == [facts.mean[0]] * 3
    assert config["parameters"] == {"dense": parameters_of(model), "removed": parameters_of(small)}
    assert config["macs"] == {"dense": counted(model, 9), "removed": counted(small, 9)}
    card = (path / "README.md").read_text()
    assert "export.load" in card
    assert f"layer2.0.conv1: {len(kept['layer2.0.conv1'])}" in card
    assert "Vision Transformer" not in card

    for package in ("onnx", "onnxscript", "onnxruntime"):
        runtime = pytest.importorskip(package)
    assert loaded.layer1[0].out_index is not None
    assert export.to_onnx(loaded, tmp_path / "model.onnx") <= 1e-4
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images, _ = images_of(5, 9, seed=6)
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("projected", "narrow"), [(False, 64), (True, 64), (False, 4)])
def test_folded_networks_have_no_norm_and_compute_the_same(make_micro, projected, narrow, tmp_path, monkeypatch):
    monkeypatch.setattr("families.resnet.NARROW", narrow)  # the micro network's streams have 4 and 7 channels
    model, (images, labels) = make_micro(projected=projected), images_of(5)
    kept = some_kept(model)
    masked = zero_filters(model, kept)
    small = export.write(tmp_path, masked, kept, [(images, labels)], None, {}, {})
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    placed = [name for name, block in small.named_modules() if getattr(block, "out_index", None) is not None]
    wide = [name for name in placed if name.startswith("layer2") and narrow == 4]
    assert norms
    assert len(placed) > len(wide)
    folded = export.write_folded(tmp_path, masked, kept, [(images, labels)])
    exact = copy.deepcopy(small).double()
    CNN.fold_(exact)
    with torch.no_grad():
        assert (folded(images) - masked(images)).abs().max() <= 1e-5
        assert (exact(images.double()) - copy.deepcopy(masked).double()(images.double())).abs().max() <= 1e-12
    config = export.read_config(tmp_path / "folded")
    assert len(config["folded"]) == norms + len(placed) - len(wide)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert wide == [name for name, block in folded.named_modules() if getattr(block, "out_index", None) is not None]
    assert config["macs"]["removed"] == counted(folded, 8) > export.read_config(tmp_path)["macs"]["removed"]
    assert config["parameters"]["removed"] == parameters_of(folded)
    loaded = export.load(tmp_path / "folded")
    assert (loaded(images) - folded(images)).abs().max() <= 1e-6
    assert loaded.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    (tmp_path / "folded" / "model").symlink_to(tmp_path)
    assert (card_model(tmp_path / "folded")[0](images) - folded(images)).abs().max() <= 1e-6
    # the same model/ keeps its variant, another one takes it away
    export.write(tmp_path, masked, kept, [(images, labels)], None, {}, {})
    assert (tmp_path / "folded").exists()
    with torch.no_grad():
        masked.fc.bias += 1
    export.write(tmp_path, masked, kept, [(images, labels)], None, {}, {})
    assert not (tmp_path / "folded").exists()


def test_export_from_a_checkpoint_of_the_public_functions(make_micro, resnets, tmp_path):
    model = make_micro()
    cnn.pruning_model(model, 0.3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth.tar")
    cnn.remove_prune(model)
    argv = ["--from_checkpoint", tmp_path / "model.pth.tar", "--arch", "res_micro", "--out", tmp_path / "out"]
    assert export.main([str(part) for part in argv]) == 0
    assert_same_function(model, export.load(tmp_path / "out"), images_of(2)[0])


# ---------------------------------------------------------------------------------------------------------------- runs

BASE = words(
    "--dataset digits --arch res_micro --device cpu --amp off --train_limit 60 --batch_size 20 --epochs 2 "
    "--pruning_times 2 --lr 0.05 --rate 0.3 --val_fraction 0.05 --no-export --criteria magnitude"
)
STEPS = 3  # an epoch


@pytest.fixture
def resnets(house, monkeypatch):
    """The micro ResNets are an `--arch`, too."""
    for builder in (res_micro, res_micro_projected):
        monkeypatch.setitem(models.BUILDERS, builder.__name__, builder)
        monkeypatch.setitem(models.resnet.BUILDERS, builder.__name__, builder)


@pytest.fixture
def run(resnets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "write", lambda _: None)  # pictures take longer than such a run
    return runner(tmp_path, capsys, BASE)


@pytest.fixture
def seen(around):
    """The weights that training steps meet and leave, by (state, steps done)."""
    found = SimpleNamespace(met={}, left={})

    def look(into):
        def keep(training):
            into[training.progress.state, training.progress.step] = clones(training.network.model.state_dict())

        return keep

    around("step", before=look(found.met), after=look(found.left))
    return found


@pytest.fixture
def noisy_init(tmp_path, add_noise):
    """Initial weights for --init whose biases are not zero, and their file."""
    torch.manual_seed(11)
    weights = clones(add_noise(res_micro(10, 8), 11, scale=0.3).state_dict())
    torch.save(weights, tmp_path / "noisy.pt")
    return tmp_path / "noisy.pt", weights


def test_the_documented_commands_on_digits(resnets, tmp_path, capsys):
    base = words("--arch res20s --lr 0.01 --batch_size 128 --dataset digits --device cpu --epochs 1 --pruning_times 2")
    done = runner(tmp_path, capsys, base)("--struct", "rsst", "--train_limit", "128")
    assert (done.dir / "report.html").exists()
    assert re.search(r"state +density +filters +parameters +MACs", done.out)
    dense, pruned = rows_of(done.dir / "states.csv")
    assert (dense["filters"], dense["parameters"], dense["density"]) == ("688", "269722", "1.0")
    expected, kept = masks_of(load(done.dir / "checkpoint.pt"), "elementwise"), load(done.dir / "best.pt")["kept"]
    filters = {name: 16 * 2 ** (int(name[5]) - 1) for name in expected}
    assert {n: len(ids) for n, ids in kept.items()} == {n: int(expected[n].mean() * filters[n] + 1e-9) for n in filters}
    assert int(pruned["filters"]) == 16 + sum(map(len, kept.values()))
    proof = json.loads((done.dir / "model" / "parity.json").read_text())
    assert proof["max_difference_float64"] <= proof["bound"]
    assert proof["top1_agreement"] == 1.0
    assert export.main([str(done.dir), "--out", str(tmp_path / "out"), "--evaluate", "--fold"]) == 0
    folded = export.load(tmp_path / "out" / "folded")
    assert (folded(images_of(4)[0]) - export.load(tmp_path / "out")(images_of(4)[0])).abs().max() <= 1e-5
    masked = models.build_model("res20s", 10, 8)
    masked.load_state_dict(load(done.dir / "best.pt")["weights"])
    for folder in (done.dir / "model", tmp_path / "out"):
        small = export.load(folder)
        assert parameters_of(small) == int(pruned["parameters"]) < 269_722
        assert counted(small, 8) == int(pruned["macs"])
        assert_same_function(masked, small, images_of(4)[0])
    metrics_of = json.loads((tmp_path / "out" / "config.json").read_text())["metrics"]
    assert metrics_of["test_accuracy"] == pytest.approx(float(pruned["test_accuracy"]))


def plan_rows(capsys, flags):
    assert call([*words(flags), "--dry_run"]) == 0
    assert os.listdir() == []
    return [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" *\d+ +\d+\.\d+%", line)]


def test_a_cnn_sees_images_at_their_native_size(resnets, capsys):
    for flags, size in (("digits", 8), ("fashionmnist", 28), ("cifar10", 32), ("digits --img_size 12", 12)):
        (row,) = plan_rows(capsys, f"--arch res20s --pruning_times 1 --dataset {flags}")
        assert row[4] == f"{counted(models.build_model('res20s', 10), size) / 1e9:.4f}"


@pytest.mark.parametrize("fillback", [0.0, 0.5])
def test_the_plan_of_filters(fillback, resnets, capsys):
    flags = f"--arch res_micro --dataset digits --struct rsst --rate 0.3 --pruning_times 4 --fillback_rate {fillback}"
    for state, row in enumerate(plan_rows(capsys, flags)):
        left = round(TOTAL * 0.7**state) / TOTAL
        kept = {n: max(1, int(count * (left + (1 - left) * fillback) + 1e-9)) for n, (count, _) in SHAPES.items()}
        weights = sum(kept[name] * size for name, (_, size) in SHAPES.items())
        model = res_micro(10, 8)
        small = remove_units(model, cnn.filter_units(model), {name: range(count) for name, count in kept.items()})
        cost = [str(4 + sum(kept.values())), f"{parameters_of(small):,}", f"{counted(small, 8) / 1e9:.4f}"]
        assert row[:5] == [str(state), f"{100 * weights / TOTAL:.2f}%", *cost]
    assert state == 3


def test_the_plan_of_imp_counts_weights(resnets, capsys):
    rows = plan_rows(capsys, "--arch res20s --dataset cifar10 --struct imp --rate 0.2 --pruning_times 3 --conv1")
    for state, row in enumerate(rows):
        left = round((267_264 + 432) * 0.8**state)
        assert row[1:4] == [f"{100 * left / 267_696:.2f}%", "688", f"{269_722 - 267_696 + left:,}"]
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("method", "conv1"), [("refill", True), pytest.param("rsst", False, marks=pytest.mark.slow), ("imp", True)]
)
def test_a_state_prunes_by_trained_weights_and_refill_feeds_no_mask(method, conv1, run):
    names, total = ["conv1"] * conv1 + BLOCK_CONVOLUTIONS, TOTAL + 108 * conv1

    def ends(kind):
        end = load(done.dir / "checkpoint.pt")
        kernels = {name: end["weights"][f"{name}.weight"] for name in names}
        return end, kernels, {n: torch.tensor(b).view_as(kernels[n]) for n, b in masks_of(end, kind).items()}

    done = run("--struct", method, "--fillback_rate", "0.1", *["--conv1"] * conv1)
    _, trained, earlier = ends("elementwise")
    assert int(sum(mask.sum() for mask in earlier.values())) == round(total * 0.7)
    done = run("--resume", "--pruning_times", "3", base=())
    end, kernels, masks = ends("elementwise")
    # by what the state before ended with; what a whole filter brought back is no survivor
    assert_masks(masks, largest(trained, earlier, round(total * 0.49)))
    _, _, enforced = ends("masks")
    for name, mask in enforced.items():
        assert not kernels[name][mask == 0].any()
        if method == "imp":
            assert torch.equal(mask, masks[name])
            continue
        scores = trained[name].double().abs().flatten(1).sum(1).tolist()
        kept = end["run"]["kept"][name]
        assert kept == reference_kept(masks[name], scores, 0.1)
        gone = [unit for unit in range(len(mask)) if unit not in kept]
        assert mask[kept].all()
        assert not mask[gone].any()
        for part in ("weight", "bias"):
            assert not end["weights"][f"{norm_of(name)}.{part}"][gone].any()
    if method == "imp":
        assert float(rows_of(done.dir / "states.csv")[-1]["density"]) == round(total * 0.49) / total


@pytest.mark.parametrize("flags", ["lt", "rewind_lt --rewind_epoch 1 --fc"])
def test_where_the_next_state_starts(flags, run, seen):
    done = run(*words(f"--struct rsst --prune_type {flags}"))
    ends, start = seen.left[0, 2 * STEPS], seen.met[1, 0]
    init = load(done.dir / "init.pt")
    assert init["bn1.running_mean"].abs().max() == 0
    assert ends["bn1.running_mean"].any()
    if flags.startswith("rewind"):
        assert_same_tensors(start, seen.met[0, STEPS])
        assert_same_tensors(load(done.dir / "rewind.pt"), start)
        assert start["bn1.num_batches_tracked"] == STEPS
    else:
        assert_same_tensors(start, init, skip=("fc.",))
        assert torch.equal(start["fc.weight"], ends["fc.weight"])
        assert not torch.equal(init["fc.weight"], ends["fc.weight"])


STILL = words("--lr 1e-300 --weight_decay 0")  # a learning rate that moves nothing leaves the penalty alone


def test_doomed_filters_shrink_by_the_dose_are_cut_and_may_come_back_whole(run, seen, noisy_init, monkeypatch):
    """The smallest filters are the best: those that were cut come back, as far as zeros are survivors again."""
    monkeypatch.setitem(CRITERIA, "smallest", lambda weights: -weights.abs().sum(1))
    path, init = noisy_init
    flags = words("--struct rsst --criteria smallest --reg_granularity_prune 0.5 --epochs 4 --clip_grad 1 --init")
    done = run(*STILL, *flags, path)
    first, before, after = load(done.dir / "best.pt")["kept"], seen.left[1, STEPS], seen.met[1, STEPS]

    def parts_of(kept):
        for name, ids in kept.items():
            gone = [unit for unit in range(SHAPES[name][0]) if unit not in ids]
            yield from (
                (part, ids, gone) for part in (f"{name}.weight", f"{norm_of(name)}.weight", f"{norm_of(name)}.bias")
            )

    for part, ids, gone in parts_of(first):
        assert len(after[part]) == len(ids) < len(ids + gone)
        torch.testing.assert_close(before[part][gone], init[part][gone] * math.exp(-10), rtol=1e-4, atol=1e-30)
        assert torch.equal(before[part][ids], init[part][ids])
    assert torch.equal(before["conv1.weight"], init["conv1.weight"])
    assert float(rows_of(done.dir / "states.csv")[1]["residual"]) == pytest.approx(math.exp(-10), rel=1e-3)

    end = run("--resume", "--pruning_times", "3", base=()).dir
    kept, weights = (load(end / "best.pt")[key] for key in ("kept", "weights"))
    assert any(set(kept[name]) - set(first[name]) for name in kept)
    assert any(set(first[name]) - set(kept[name]) for name in kept)
    for part, ids, gone in parts_of(kept):
        assert torch.equal(weights[part][ids], init[part][ids])  # at the end as in the beginning
        assert not weights[part][gone].any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("arch", "method"), [pytest.param("res_micro", "refill", marks=pytest.mark.slow), ("res_micro_projected", "rsst")]
)
def test_compact_and_masked_training_agree_in_float64(arch, method, run):
    """From the third state on, what the smaller network scatters back decides what is pruned next."""
    flags = f"--struct {method} --arch {arch} --pruning_times 3 --clip_grad 0.3 --weight_decay 0.01 --conv1"
    flags = words(f"{flags} --reg_finish 0.5 --opt adamw --lr 0.01")
    small, large = (run(*flags, f"--{no}compact_training", name=f"{no}run").dir for no in ("", "no-"))
    for file in ("best.pt", "checkpoint.pt"):
        found, expected = (load(folder / file)["weights"] for folder in (small, large))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=f"{file} {name}")
    assert load(small / "best.pt")["kept"] == load(large / "best.pt")["kept"]
    for one, other in zip(metrics(small, TIMES), metrics(large, TIMES), strict=True):
        # the norm of doomed kernels may count what reads filters that are gone, in the masked network only
        assert one.pop("residual") == pytest.approx(other.pop("residual"), rel=0.01)
        assert one == pytest.approx(other, abs=1e-9)


def test_a_broken_run_resumes_to_the_same_bits(run, seen, around):
    """Before a cut and after it, on the smaller network; also from moments that lie otherwise in memory."""
    flags = words("--struct rsst --epochs 3 --reg_finish 0.5 --opt adamw --lr 0.01")
    whole = run(*flags, name="whole").dir
    stops = [(1, 3), (1, 7)]  # the cut comes after four steps

    def interrupt(training):
        if [(training.progress.state, training.progress.step)] == stops[:1]:
            stops.pop(0)
            raise KeyboardInterrupt

    around("step", before=interrupt)
    run(*flags, name="broken", code=130)
    run("--resume", name="broken", base=(), code=130)
    path = whole.parent / "broken" / "checkpoint.pt"
    content = load(path)
    assert content["run"]["kept"]["layer2.0.conv1"] != list(range(7))
    kernels = [moments for moments in content["moments"].values() if moments["exp_avg"].ndim == 4]
    assert kernels
    for moments in kernels:
        for name in ("exp_avg", "exp_avg_sq"):
            last = moments[name].is_contiguous(memory_format=torch.channels_last)
            other = torch.contiguous_format if last else torch.channels_last
            moments[name] = moments[name].contiguous(memory_format=other)
    torch.save(content, path)
    again = run("--resume", name="broken", base=()).dir
    assert not stops
    assert metrics(again, TIMES) == metrics(whole, TIMES)
    for file in ("best.pt", "checkpoint.pt"):
        one, other = (load(folder / file) for folder in (whole, again))
        assert_same_tensors(other["weights"], one["weights"])
    # what trains is stored channels last, dense and small
    kernels = [weight for weights in seen.met.values() for weight in weights.values() if weight.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
