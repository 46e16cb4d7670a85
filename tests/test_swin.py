"""Heads and neurons of timm's Swin and SwinV2: what belongs to each in windows, what it costs, and that it can go."""

import copy
import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from micro import call, largest_difference, load, rows_of
from references import kept_by, masked_copy
from timm.layers import GluMlp
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import export
from families import family_of
from families.cards import LOADING_SNIPPETS, needs_loader
from families.swin import SWIN
from models import build_model
from pruning.ranking import rank_units
from pruning.removal import remove_units, scatter_tensors, slice_tensors
from pruning.scores import score_units
from pruning.units import LayoutError, count_parameters

slow = partial(pytest.param, marks=pytest.mark.slow)
CLASSES = 5
SMALL = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "mlp_ratio": 2, "drop_path_rate": 0.0}
SMALL |= {"window_size": 4, "patch_size": 2, "num_classes": CLASSES}
PADDED = {"img_size": 36, "patch_size": 4, "window_size": 4}  # 9 x 9 tokens, then 5 x 5


def build(kind, **options):
    return kind(**{**SMALL, **options})


MODELS = {
    "Swin": lambda: build(SwinTransformer), "Swin padded": lambda: build(SwinTransformer, **PADDED),
    "Swin other widths": lambda: build(SwinTransformer, head_dim=6, qkv_bias=False, window_size=(4, 2)),
    "SwinV2": lambda: build(SwinTransformerV2), "SwinV2 padded": lambda: build(SwinTransformerV2, **PADDED),
    "SwinV2 without bias": lambda: build(SwinTransformerV2, qkv_bias=False),
}  # fmt: skip


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request, add_noise):
    torch.manual_seed(0)
    model = add_noise(request.param(), scale=0.2).double().eval()
    first = model.layers[0].blocks[0].attn
    if hasattr(first, "logit_scale"):
        first.logit_scale.data.fill_(6.0)  # SwinV2 stops at log(100)
    return model


def images_of(model, number=2, dtype=torch.float64):
    size = model.patch_embed.img_size[0]
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


KEPT = {
    "random": lambda group, order: order[: 1 + len(order) // 2],
    "one": lambda group, order: order[:1],
    "none": lambda group, order: order[: group.layer - 1 if group.layer else 0],
}


@torch.no_grad()
@pytest.mark.parametrize("which", KEPT)
def test_the_removed_model_computes_what_the_masked_one_does(model, which):
    units = SWIN.units(model)
    kept = kept_by(KEPT, units, which)
    cost, zeroed = SWIN.cost(model, kept), masked_copy(model, units, kept)
    small, images = remove_units(copy.deepcopy(zeroed), units, kept), images_of(model)
    expected = zeroed(images)
    assert (expected - model(images)).abs().max() > 1e-3
    assert (small(images) - expected).abs().max() < 1e-12
    assert (copy.deepcopy(small)(images) - expected).abs().max() < 1e-12
    assert cost["parameters"] == count_parameters(small)
    assert cost == SWIN.cost(small, {})
    assert {key: group.count for key, group in SWIN.units(small).items()} == {k: len(ids) for k, ids in kept.items()}
    sliced = slice_tensors(zeroed.state_dict(), units, kept)
    assert {name: t.shape for name, t in sliced.items()} == {name: t.shape for name, t in small.state_dict().items()}
    for name, tensor in scatter_tensors(sliced, units, kept).items():
        assert torch.equal(tensor, zeroed.state_dict()[name]), name


# ------------------------------------------------------------------------------------- what belongs to a unit
def read_by(model, layer, images):
    """What a layer is fed in one forward pass."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images)
    handle.remove()
    return seen[0]


def outputs_of_units(model, key, images):
    """[units, ...] of what each unit adds to its branch's output, from what the last layer of the branch reads."""
    branch = model.get_submodule(key)
    last, count = (branch.proj, branch.num_heads) if key.endswith("attn") else (branch.fc2, branch.fc1.out_features)
    width = last.in_features // count
    read, shares = read_by(model, last, images), [slice(unit * width, (unit + 1) * width) for unit in range(count)]
    return torch.stack([read[..., share] @ last.weight[:, share].T for share in shares])


@pytest.mark.parametrize("key", ["layers.0.blocks.1.attn", "layers.1.blocks.0.attn", "layers.1.blocks.1.mlp"])
def test_a_unit_owns_what_its_output_depends_on_and_nothing_else(model, key):
    group, branch, images = SWIN.units(model)[key], model.get_submodule(key), images_of(model)
    outputs = outputs_of_units(model, key, images)
    for unit in (0, group.count - 1):
        gradients = torch.autograd.grad(
            outputs[unit].square().sum(), list(branch.parameters()), retain_graph=True, allow_unused=True
        )
        for (name, parameter), gradient in zip(branch.named_parameters(), gradients, strict=True):
            if name.startswith("cpb_mlp.0"):
                continue  # shared by all heads
            touched = torch.zeros_like(parameter) if gradient is None else (gradient != 0).to(parameter)
            part = group.parts.get(f"{key}.{name}")
            owned = torch.zeros_like(parameter) if part is None else part.mask(parameter, [unit])
            if name == "qkv.bias":  # softmax does not see the bias of the keys
                touched, owned = (tensor.unflatten(0, (3, -1))[[0, 2]] for tensor in (touched, owned))
            if name == "cpb_mlp.2.weight":  # nor what ReLU shuts
                assert touched.any()
                owned = owned * touched.any(0)
            assert torch.equal(touched, owned), (name, unit)
    with torch.no_grad():
        alone = outputs_of_units(masked_copy(model, {key: group}, {key: range(1, group.count)}), key, images)
    assert not alone[0].any()
    assert torch.equal(alone[1:], outputs.detach()[1:])
    assert alone[1:].any()


@torch.no_grad()
@pytest.mark.parametrize("which", [None, *KEPT])
def test_macs_are_those_of_the_products_that_run(model, which):
    units = SWIN.units(model)
    kept = kept_by(KEPT, units, which) if which else {}
    small = remove_units(copy.deepcopy(model), units, kept)
    with FlopCounterMode(display=False) as counter:  # no fused attention here, which it would not see
        small(images_of(model, 1))
    assert SWIN.cost(model, kept)["macs"] == counter.get_total_flops() // 2


# ------------------------------------------------------------------------------------------ scores
def scores_by_loop(model, key, criteria, images, labels):
    """Image by image, unit by unit: one image alone has no other's windows in its batch."""
    branch = model.get_submodule(key)
    attention = key.endswith("attn")
    last, count = (branch.proj, branch.num_heads) if attention else (branch.fc2, branch.fc1.out_features)
    width, totals = last.in_features // count, [0.0] * count
    for image, label in zip(images, labels, strict=True):
        if criteria == "saliency":
            seen = []
            handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
            loss = nn.functional.cross_entropy(model(image[None]), label[None])
            handle.remove()
            products = seen[0] * torch.autograd.grad(loss, seen)[0]
            for unit in range(count):
                totals[unit] += products[..., unit * width : (unit + 1) * width].sum().abs().item()
            continue
        read = read_by(model, branch if attention else branch.fc1, image[None])
        layer = branch.qkv if attention else branch.fc1
        bias = layer.bias
        if getattr(branch, "q_bias", None) is not None:
            bias = torch.cat([branch.q_bias, torch.zeros_like(branch.q_bias), branch.v_bias])
        output = nn.functional.linear(read, layer.weight, bias).detach()
        output = output.unflatten(-1, (3 if attention else 1, count, width))
        for unit in range(count):
            values = output[..., unit, :]
            totals[unit] += float((values.abs() if criteria == "l1" else values.square()).mean())
    means = [total / len(images) for total in totals]
    return [math.sqrt(mean) for mean in means] if criteria == "l2" else means


@pytest.mark.parametrize("criteria", ["l1", "l2", "saliency"])
@pytest.mark.parametrize("name", ["Swin padded", "SwinV2 padded"])
def test_scores_are_means_over_images_not_windows(name, criteria, add_noise):
    torch.manual_seed(0)
    model = add_noise(MODELS[name](), scale=0.2).double().eval()
    images, labels = images_of(model, 3), torch.tensor([0, 3, 1])
    units = SWIN.units(model)
    units = {key: units[key] for key in ("layers.0.blocks.1.attn", "layers.1.blocks.1.attn", "layers.0.blocks.0.mlp")}
    found = score_units(model, units, criteria, batches=[(images[:2], labels[:2]), (images[2:], labels[2:])])
    for key, scores in found.items():
        expected = scores_by_loop(model, key, criteria, images, labels)
        torch.testing.assert_close(scores.tolist(), expected, rtol=1e-9, atol=0)


# ---------------------------------------------------------------------------------------- which units work
@torch.no_grad()
def test_dead_units_are_found_and_what_they_emit_is_folded(model):
    units = SWIN.units(model)
    first, last = "layers.0.blocks.1", "layers.1.blocks.0"
    attn, width = model.get_submodule(f"{first}.attn"), units[f"{first}.attn"].contribution.layout.width
    attn.qkv.weight.unflatten(0, (3, -1))[2, :width] = 0  # v of the first head; its bias goes on
    model.get_submodule(f"{last}.attn").proj.weight[:, -width:] = 0
    model.get_submodule(f"{first}.mlp").fc1.weight[3] = 0
    model.get_submodule(f"{last}.mlp").fc2.weight[:, 4] = 0
    images = images_of(model)
    small, kept = export.compact(model)
    dead = {f"{first}.attn": {0}, f"{last}.attn": {3}, f"{first}.mlp": {3}, f"{last}.mlp": {4}}
    for key, group in units.items():
        assert set(range(group.count)) - set(kept[key]) == dead.get(key, set()), key
    assert (small(images) - model(images)).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------ on disk and back
NAMES = {"Swin": "swin_tiny_patch4_window7_224", "SwinV2": "swinv2_tiny_window8_256"}
FRESH = r"""
import os, sys, torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    card = open("README.md").read()
    lines = {}
    exec(card.split("```python\n")[1].split("```")[0], lines)
    with torch.no_grad():
        torch.save(lines["model"](torch.load("images.pt")), "logits.pt")
"""


def test_a_card_s_lines_load_the_model_in_a_fresh_process(tmp_path, add_noise):
    expected = {}
    for name, which in (("Swin", "random"), ("Swin", "none"), ("SwinV2", "random"), ("SwinV2", "none")):
        options = {key: value for key, value in SMALL.items() if key not in ("img_size", "num_classes")}
        torch.manual_seed(0)
        dense = add_noise(build_model(f"timm/{NAMES[name]}", CLASSES, 32, **options), scale=0.2).eval()
        assert family_of(dense) is SWIN
        units = SWIN.units(dense)
        kept = kept_by(KEPT, units, which)
        model, images = masked_copy(dense, units, kept), images_of(dense, dtype=torch.float32)
        folder = tmp_path / f"{name} {which}"
        export.write(folder, model, kept, [(images, torch.zeros(2, dtype=int))], None, {}, {})
        with torch.no_grad():
            expected[folder] = export.load(folder)(images)
            assert (expected[folder] - model(images)).abs().max() < 1e-5
        torch.save(images, folder / "images.pt")
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", FRESH, *expected], check=True, cwd=tmp_path, env=environment)
    for folder, logits in expected.items():
        torch.testing.assert_close(torch.load(folder / "logits.pt"), logits, rtol=0, atol=1e-6)


def test_plain_timm_loads_a_swin_with_a_head_in_each_attention():
    config = {"swin": {}, "version": 1, "heads": [1, 2], "neurons": [3, 4]}
    assert len(LOADING_SNIPPETS["swin"].splitlines()) < 20
    assert not needs_loader(config)
    assert needs_loader({**config, "heads": [1, 0]})
    assert needs_loader({**config, "version": 2})


def test_layers_and_classifier(model):
    names = [f"layers.{stage}.blocks.{block}" for stage in range(2) for block in range(2)]
    layers = [f"{name}.{part}" for name in names for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert list(SWIN.prunable_layers(model)) == layers
    assert list(SWIN.prunable_layers(model, first=True)) == ["patch_embed.proj", *layers]
    classifier = [name for name, _ in model.named_parameters() if name.startswith(SWIN.classifier)]
    assert classifier == ["head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize(("name", "reason"), [
    ("swinv2_cr_tiny_224", "SwinTransformerV2Cr has no stages with blocks at .layers"),
    ("maxvit_tiny_rw_224", "MaxxVit has no stages with blocks at .layers"),
    ("davit_tiny", "DaVit has no stages with blocks at .layers"),
])  # fmt: skip
def test_relatives_are_refused(name, reason):
    with torch.device("meta"):
        relative = timm.create_model(name)
    assert reason in SWIN.problem(relative)
    with pytest.raises(LayoutError, match=type(relative).__name__):
        family_of(relative)


def test_a_foreign_module_is_refused_by_its_place():
    model = build(SwinTransformer)
    model.layers[1].blocks[0].attn = build(SwinTransformerV2).layers[1].blocks[0].attn
    assert "layers.1.blocks.0.attn is a timm.models.swin_transformer_v2.WindowAttention" in SWIN.problem(model)
    model = build(SwinTransformer)
    model.layers[0].blocks[1].mlp = GluMlp(8, 32)
    assert "layers.0.blocks.1.mlp is a timm.layers.mlp.GluMlp" in SWIN.problem(model)


# ------------------------------------------------------------------------------------- layers that differ
def test_score_per_mac_takes_the_macs_of_the_ratio(add_noise):
    model = add_noise(build(SwinTransformer)).eval()
    units = SWIN.units(model)
    scores = score_units(model, units, "magnitude")
    kept = rank_units(model, units, scores, {"head": 0.5, "neuron": 0.5}, "global", 1, "score_per_mac")
    costs = {key: group.macs(model, group) for key, group in units.items()}
    removable = sum(group.count * costs[key] for key, group in units.items())
    gone = sum((group.count - len(kept[key])) * costs[key] for key, group in units.items())
    assert 0 <= gone - removable / 2 < max(costs.values())


# ------------------------------------------------------------------------------------------ the command
def entry_of(kind, **options):
    """What timm calls for a name, without what it says about pretrained weights."""
    geometry = {name: value for name, value in options.items() if name in SMALL}
    return build(kind, **{"embed_dim": 4, **geometry})


@register_model
def swin_micro(**options):
    return entry_of(SwinTransformer, **options)


@register_model
def swinv2_micro(**options):
    return entry_of(SwinTransformerV2, **options)


RUN = "--dataset digits --device cpu --amp off --img_size 16 --train_limit 40 --batch_size 20 --epochs 2 --lr 0.05 "
RUN += "--pruning_times 2 --vit_structured --vit_prune_target both --rate 0.5 --arch timm/"


@pytest.mark.parametrize(("arch", "flags"), [
    slow("swin_micro", "--struct rsst --criteria saliency --reg_finish 0.5"),
    ("swin_micro", "--struct refill --min_units 0 --sorting_mode global --rate 0.8"),
    ("swinv2_micro", "--struct rsst --criteria l1 --reg_finish 0.5"),
    slow("swinv2_micro", "--struct refill --criteria l2 --no-compact_training"),
])  # fmt: skip
def test_the_command_prunes_and_exports(house, tmp_path, arch, flags):
    assert call([*f"{RUN}{arch} {flags}".split(), "--save_dir", tmp_path / "run"]) in (0, None)
    proof = json.loads((tmp_path / "run" / "model" / "parity.json").read_text())
    assert proof["max_difference_float64"] < 1e-12
    assert proof["top1_agreement"] == 1
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    # of 12 heads and 48 neurons
    assert (sum(config["heads"]), sum(config["neurons"])) == ((2, 9) if "0.8" in flags else (6, 24))
    last = rows_of(tmp_path / "run" / "states.csv")[-1]
    small = export.load(tmp_path / "run" / "model")
    assert int(last["parameters"]) == count_parameters(small)
    assert int(last["macs"]) == SWIN.cost(small, {})["macs"]


def test_masked_and_compact_runs_agree(house, float64, tmp_path):
    weights = []
    for flag in ("--compact_training", "--no-compact_training"):
        folder = tmp_path / flag.strip("-")
        flags = "--struct rsst --criteria l2 --reg_finish 0.5 --no-export"
        assert call([*f"{RUN}swinv2_micro {flags}".split(), flag, "--save_dir", folder]) in (0, None)
        weights.append(load(folder / "checkpoint.pt")["weights"])
    assert next(iter(weights[0].values())).dtype == torch.float64
    assert largest_difference(*weights) < 1e-9
