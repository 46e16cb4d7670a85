"""Least squares at the cut: what is repaired is the best that there is, in every family, and always finite."""

import copy
import math
from functools import partial

import pytest
import test_backbones
import test_swin
import torch
import torch.nn.functional as F
from references import kept_by, masked_copy, random_masks
from torch import nn

from families import family_of
from families.resnet import shifts
from models.resnet import ResNet
from models.vit import VisionTransformer
from pruning import repair as repair_module
from pruning import scores as scores_module
from pruning.moments import Moments, reading
from pruning.nm import holds_pattern, nm_step
from pruning.removal import remove_units
from pruning.repair import least_squares, repair, repaired_tensors
from pruning.scores import score_units
from pruning.units import Stack

SIZE = 16
OURS = partial(VisionTransformer, img_size=SIZE, patch_size=8, num_classes=5, embed_dim=12, depth=2, num_heads=3)
MODELS = {
    "ours": partial(OURS, mlp_ratio=2, init_values=0.5),
    "ResNet": partial(ResNet, (1, 1), (4, 6), projected=False, num_classes=5, img_size=8),
    "ResNet projected": partial(ResNet, (1, 2), (4, 6), projected=True, num_classes=5, img_size=8),
    **test_backbones.MODELS,
    **test_swin.MODELS,
}
HALF = {"half": lambda group, order: order[: max(1, len(order) // 2)]}


def built(build, add_noise):
    torch.manual_seed(0)
    model = add_noise(build(), scale=0.2).double()
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request, add_noise):
    return built(request.param, add_noise)


def images_of(model, number=40):
    size = family_of(model).image_size(model)
    number = number if size < 32 else min(number, 4)  # Swins have many tokens
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def readers_of(units):
    """{layer: {units key: its reader}}."""
    found = {}
    for key, group in units.items():
        if group.reader is not None:
            found.setdefault(group.reader.layer, {})[key] = group.reader
    return found


@torch.no_grad()
def seen_at(model, layer, images):
    """What a layer reads, as rows, and what it gives, less the mean that a batch norm behind it takes away."""
    module, calls = model.get_submodule(layer), []
    handle = module.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    model(images)
    handle.remove()
    ((given, out),) = calls
    if isinstance(module, nn.Conv2d):
        given = F.unfold(given, module.kernel_size, stride=module.stride, padding=module.padding).transpose(1, 2)
        norm = layer.replace("conv", "bn").replace("downsample.0", "downsample.1")
        out = (out - model.get_submodule(norm).running_mean[:, None, None]).flatten(2).transpose(1, 2)
    return given.reshape(-1, given.shape[-1]), out.reshape(-1, out.shape[-1])


def squared(error):
    return float(error.square().sum(1).mean())


def best_error(rows, wanted, bias=True):
    """The least mean squared error that any weights and bias reach."""
    rows = torch.cat([rows, torch.ones(len(rows), 1).to(rows)], 1) if bias else rows
    return squared(rows @ torch.linalg.lstsq(rows, wanted, driver="gelsd").solution - wanted)


@torch.no_grad()
def test_a_repaired_layer_has_the_error_of_least_squares_on_what_it_still_reads(model):
    units, images = family_of(model).units(model), images_of(model)
    kept = kept_by(HALF, units, "half")
    assert readers_of(units)
    for layer, readers in readers_of(units).items():
        here = {key: kept[key] for key in readers}
        _, wanted = seen_at(model, layer, images)
        cut = masked_copy(model, units, here)
        rows, found = seen_at(cut, layer, images)
        weight = cut.get_submodule(layer).weight.flatten(1)
        biased = model.get_submodule(layer).bias is not None or any(reader.shift for reader in readers.values())
        errors = {"none": squared(found - wanted)}
        for how in ("mean", "ls"):
            options = {"how": how, "ridge": 0}
            assert (seen_at(repair(model, units, here, images, **options), layer, images)[0] - rows).abs().max() < 1e-12
            errors[how] = squared(seen_at(repair(model, units, here, images, **options), layer, images)[1] - wanted)
        ridged = squared(seen_at(repair(model, units, here, images), layer, images)[1] - wanted)
        told = repaired_tensors(model, units, here, images, ridge=0).errors[layer]
        best = best_error(rows[:, weight.any(0)], wanted, biased)
        variance = squared(wanted - wanted.mean(0))
        assert errors["ls"] == pytest.approx(best, rel=1e-6, abs=1e-9 * variance)
        assert best <= ridged <= errors["mean"] * (1 + 1e-9) <= errors["none"] * (1 + 2e-9)
        assert ridged < errors["none"]
        assert (errors["mean"] < errors["none"]) == biased
        assert told.before == pytest.approx(errors["none"], rel=1e-6)
        assert told.after == pytest.approx(best, rel=1e-6, abs=1e-9 * variance)
        assert told.variance == pytest.approx(variance, rel=1e-6)


@torch.no_grad()
def test_where_nothing_goes_nothing_changes(model):
    units, images = family_of(model).units(model), images_of(model, 2)
    same = repair(model, units, {key: list(range(group.count)) for key, group in units.items()}, images)
    assert (same(images) - model(images)).abs().max() < 1e-9


@torch.no_grad()
def test_the_removed_model_computes_what_the_repaired_one_does(model):
    units, images = family_of(model).units(model), images_of(model, 2)
    kept = kept_by(HALF, units, "half")
    kept = {key: ids for key, ids in kept.items() if units[key].removable}
    fixed = repair(model, units, kept, images_of(model))
    small = remove_units(copy.deepcopy(fixed), units, kept)
    assert (fixed(images) - masked_copy(model, units, kept)(images)).abs().max() > 1e-6
    assert (small(images) - fixed(images)).abs().max() < 1e-11


def make_alike(model, group, constant):
    """Unit 1 becomes a copy of unit 0; or, where `constant`, gives the same whatever it sees."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, layout in (group.parts | group.followers).items():
        if name == f"{group.reader.layer}.weight" or name not in tensors:
            continue
        if isinstance(layout, Stack):
            share, dim = tensors[name].select(layout.dim, layout.layer), layout.dim
        else:
            share, dim = layout.split(tensors[name]), layout.dim + 1
        if not constant:
            share.select(dim, 1).copy_(share.select(dim, 0))
        elif name.endswith(".weight"):
            share.select(dim, 1).zero_()


@torch.no_grad()
@pytest.mark.parametrize("constant", [False, True], ids=["copies", "constants"])
def test_copies_and_constants_go_at_no_error(model, constant):
    units, images = family_of(model).units(model), images_of(model, 4)
    free = {
        key: group
        for key, group in units.items()
        # a norm counts what goes, padding is no constant, and a mean needs a place
        if group.reader and not group.reader.norm and not (constant and group.kind == "filter")
    }
    free = {
        key: group
        for key, group in free.items()
        if not constant or model.get_submodule(group.reader.layer).bias is not None
    }
    for group in free.values():
        make_alike(model, group, constant)
    kept = {key: [unit for unit in range(group.count) if unit != 1] for key, group in free.items()}
    assert (repair(model, units, kept, images, ridge=0)(images) - model(images)).abs().max() < 1e-8
    for error in repaired_tensors(model, units, kept, images).errors.values():
        assert error.after <= 1e-2 * error.before


@torch.no_grad()
@pytest.mark.parametrize("ridge", [0, 1e-3])
def test_dead_units_and_few_images_give_finite_weights_and_a_note(model, ridge):
    units = family_of(model).units(model)
    kept = kept_by(HALF, units, "half")
    dead = masked_copy(model, units, {key: [0] for key in units})
    for network in (model, dead):
        found = repaired_tensors(network, units, kept, images_of(model, 1)[:1], ridge=ridge)
        assert all(tensor.isfinite().all() for tensor in found.tensors.values())
        assert all(error.after <= error.before * (1 + 1e-6) + 1e-12 for error in found.errors.values())
        assert all(math.isfinite(share) for _, *shares in found.kinds().values() for share in shares)
    if family_of(model).image_size(model) <= SIZE:
        assert any("give more images" in note for note in found.notes)


@pytest.mark.parametrize("ridge", [0, 1e-3])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_token_leaves_the_mean_and_no_more(rows, ridge):
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).expand(rows, 6)
    moments = Moments(6)
    moments.add(x)
    assert moments.count == rows
    torch.testing.assert_close(moments.mean(), x[0].double())
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for support in (torch.tensor([[1, 1, 0, 0, 1, 0]]), torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1]])):
        exact = least_squares(torch.zeros(6, 6, dtype=torch.float64), weight * (1 - support), support.bool(), ridge)
        assert (exact == 0).all()
        found = least_squares(moments.covariance(), weight * (1 - support), support.bool(), ridge)
        assert found.isfinite().all()


def test_values_that_are_not_finite_leave_a_layer_as_it_is_cut(add_noise):
    model = built(MODELS["ours"], add_noise)
    units = family_of(model).units(model)
    found = repaired_tensors(
        model, units, kept_by(HALF, units, "half"), torch.full((1, 3, SIZE, SIZE), math.inf, dtype=torch.float64)
    )
    assert all(tensor.isfinite().all() for tensor in found.tensors.values())
    assert found.notes
    assert not found.errors


# ---------------------------------------------------------------------------------------------- single weights

SINGLE = ("ours", "DINOv3", "EVA-02 small", "BEiT", "parallel, one output", "SwinV2", "ResNet projected")


@torch.no_grad()
@pytest.mark.parametrize("name", SINGLE)
def test_each_row_of_single_weights_has_the_error_of_its_own_least_squares(name, add_noise):
    model = built(MODELS[name], add_noise)
    layers, images = family_of(model).prunable_layers(model), images_of(model)
    weights = {layer: module.weight for layer, module in layers.items()}
    masks, means = random_masks(weights, density=0.5), shifts(model)
    found = repaired_tensors(model, {}, {}, images, masks=masks, shifts=means, ridge=0)
    assert found.errors.keys() == layers.keys()
    fixed = repair(model, {}, {}, images, masks=masks, shifts=means, ridge=0)
    with reading(model, dict.fromkeys(layers)) as moments:
        model(images)
    for layer in layers:
        assert (fixed.get_submodule(layer).weight[masks[layer] == 0] == 0).all()
        rows = rows_of(model, layer, images)
        torch.testing.assert_close(moments[layer].second(), rows.T @ rows / len(rows))
        weight, mask = weights[layer].flatten(1), masks[layer].flatten(1).bool()
        biased = layers[layer].bias is not None or layer in means
        wanted = rows @ weight.T
        best = sum(best_error(rows[:, m], wanted[:, [r]], biased) for r, m in enumerate(mask))
        assert found.errors[layer].after == pytest.approx(best, rel=1e-6, abs=1e-9 * squared(wanted))
        given = rows @ fixed.get_submodule(layer).weight.flatten(1).T
        if biased:
            given = given + (wanted - given).mean(0)
        assert squared(given - wanted) == pytest.approx(best, rel=1e-6, abs=1e-9 * squared(wanted))
    ridged = repaired_tensors(model, {}, {}, images, masks=masks, shifts=means).errors
    means_alone = repaired_tensors(model, {}, {}, images, masks=masks, shifts=means, how="mean").errors
    for layer, error in found.errors.items():
        assert error.after <= ridged[layer].after * (1 + 1e-9)
        assert ridged[layer].after < means_alone[layer].after <= error.before * (1 + 1e-9)


def rows_of(model, layer, images):
    """What a layer reads, from a call of the layer, or else of the module that multiplies by its weight."""
    try:
        return seen_at(model, layer, images)[0]
    except ValueError:
        return seen_at(model, layer.rpartition(".")[0], images)[0]


@torch.no_grad()
def test_both_ways_to_solve_a_row_and_all_sizes_of_blocks_agree(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    support = torch.rand(7, 9, generator=generator) < torch.linspace(0, 1, 7)[:, None]  # none, few, many, all
    second = rows.T @ rows / 60
    level = 0.1 * float(second.diagonal().mean())
    expected = torch.zeros_like(weight)
    for row, stays in enumerate(support):
        system = second[stays][:, stays] + level * torch.eye(int(stays.sum())).to(second)
        expected[row, stays] = torch.linalg.solve(system, second[stays][:, ~stays] @ weight[row, ~stays])
    one = least_squares(second, weight * ~support[3], support[3:4], 0.1)
    system = second[support[3]][:, support[3]]
    system = system + 0.1 * system.diagonal().mean() * torch.eye(len(system)).to(system)
    wanted = second[support[3]][:, ~support[3]] @ weight[:, ~support[3]].T
    torch.testing.assert_close(one[:, support[3]].T, torch.linalg.solve(system, wanted))
    assert (one[:, ~support[3]] == 0).all()
    for limit in (1, 3 * 8 * 81 * 2, 1 << 30):
        monkeypatch.setattr(repair_module, "_SOLVE_BYTES", limit)
        torch.testing.assert_close(least_squares(second, weight * ~support, support, 0.1), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "EVA-02 CLIP"])
def test_a_pattern_stays_and_units_go_at_once_with_single_weights(name, add_noise):
    model = built(MODELS[name], add_noise)
    family, images = family_of(model), images_of(model)
    units = family.units(model)
    weights = {layer: module.weight for layer, module in family.prunable_layers(model).items()}
    masks = nm_step(weights, {layer: torch.ones_like(weight) for layer, weight in weights.items()}, 2, 4)
    kept = kept_by(HALF, units, "half")
    if name != "ours":
        with pytest.raises(ValueError, match="two steps"):
            repair(model, units, kept, images, masks=masks)
        kept = {}
    fixed = repair(model, units, kept, images, masks=masks)
    assert all(holds_pattern(fixed.get_submodule(layer).weight, 2, 4) for layer in masks)
    if kept:
        small = remove_units(copy.deepcopy(fixed), units, kept)
        assert (small(images) - fixed(images)).abs().max() < 1e-11


# ---------------------------------------------------------------------------------------------- moments


def test_moments_keep_their_digits_far_from_zero_and_add_up():
    rows = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    whole, parts, other = Moments(4), Moments(4), Moments(4)
    whole.add(rows)
    for part in rows[:300].split(7):
        parts.add(part)
    for part in rows[300:].split(50):
        other.add(part)
    parts.merge(other)
    expected = torch.cov(rows.double().T, correction=0)
    for moments in (whole, parts):
        torch.testing.assert_close(moments.covariance(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.mean(), rows.double().mean(0), rtol=1e-12, atol=0)


def test_moments_of_half_precision_are_not_taken_in_it():
    rows = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    moments = Moments(4)
    with torch.autocast("cpu", torch.bfloat16):
        moments.add(rows)
    expected = torch.cov(rows.double().T, correction=0)
    torch.testing.assert_close(moments.covariance(), expected, rtol=1e-5, atol=1e-6)


def test_processes_add_up_to_one(add_noise):
    model = built(MODELS["ours"], add_noise)
    units, images = family_of(model).units(model), images_of(model)
    kept = kept_by(HALF, units, "half")
    seen = []
    repaired_tensors(model, units, kept, images[:16], total=lambda tensor: seen.append(tensor) or tensor)
    others = iter(seen)
    found = repaired_tensors(model, units, kept, images[16:], total=lambda tensor: tensor + next(others)).tensors
    expected = repaired_tensors(model, units, kept, images).tensors
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10)


def test_passes_are_as_many_as_fit_and_leave_no_hooks(add_noise, monkeypatch):
    model = built(MODELS["EVA-02 CLIP"], add_noise)
    units, images = family_of(model).units(model), images_of(model, 8)
    kept = kept_by(HALF, units, "half")
    expected = repaired_tensors(model, units, kept, images)
    monkeypatch.setattr(repair_module, "_MOMENTS_BYTES", 1)
    found = repaired_tensors(model.train(), units, kept, ((part, None) for part in images.split(8)))
    assert found.errors == expected.errors
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_bad_calls_are_refused_in_a_line(add_noise):
    model = built(MODELS["ours"], add_noise)
    units, kept = family_of(model).units(model), {"blocks.0.mlp": [0]}
    with pytest.raises(ValueError, match="choose none, mean, ls"):
        repair(model, units, kept, images_of(model), how="best")
    with pytest.raises(ValueError, match="no calibration images"):
        repair(model, units, kept, [])
    nn.utils.prune.identity(model.blocks[0].mlp.fc1, "weight")
    with pytest.raises(ValueError, match="torch.nn.utils.prune"):
        repair(model, units, kept, images_of(model))


# ---------------------------------------------------------------------------------------------- the criterion


@torch.no_grad()
def test_obs_is_the_error_that_is_left_when_the_others_have_taken_over(model, monkeypatch):
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith("gamma"):
            parameter.fill_(1)
    monkeypatch.setattr(scores_module, "RIDGE", 1e-11)
    units, images = family_of(model).units(model), images_of(model)
    scores = score_units(model, units, "obs", batches=[(part, None) for part in images.split(16)], max_batches=99)
    assert {key: len(score) for key, score in scores.items()} == {key: group.count for key, group in units.items()}
    for key, group in units.items():
        if group.reader is None or group.reader.norm is not None:
            continue
        for unit in (0, group.count - 1):
            kept = {key: [other for other in range(group.count) if other != unit]}
            error = repaired_tensors(model, units, kept, images, ridge=0).errors[group.reader.layer]
            assert float(scores[key][unit]) == pytest.approx(error.after, rel=1e-4, abs=1e-7 * error.variance)


@torch.no_grad()
def test_obs_hears_the_layer_scale(add_noise):
    model = built(MODELS["ours"], add_noise)
    units, batches = family_of(model).units(model), [(images_of(model), None)]
    before = score_units(model, units, "obs", batches=batches)
    factor = units["blocks.1.mlp"].reader.scale
    model.get_parameter(factor).mul_(3)
    after = score_units(model, units, "obs", batches=batches)
    torch.testing.assert_close(after["blocks.1.mlp"], 9 * before["blocks.1.mlp"])
    torch.testing.assert_close(after["blocks.1.attn"], before["blocks.1.attn"])
