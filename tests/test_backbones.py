"""Heads and neurons of the ViTs that are not plain: gated MLPs, split or gated attention, RoPE, norms inside, parallel
blocks. Each class of attention and MLP once, in a model of depth 2 from timm's constructors."""

import copy
import json
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from micro import call, card_model, runner
from references import kept_by, masked_copy
from timm.layers import Attention, AttentionRope, GluMlp, LayerNorm, SwiGLU
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

import export
import models
from families import family_of
from pruning.removal import remove_units, scatter_tensors, slice_tensors
from pruning.scores import score_units
from pruning.units import count_parameters, follower_masks, unit_masks

DIM, HEADS, SIZE, CLASSES = 24, 3, 16, 5
MICRO = {"img_size": SIZE, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": CLASSES}

eva = partial(Eva, **MICRO, mlp_ratio=2, use_rot_pos_emb=True)
vit = partial(VisionTransformer, **MICRO, mlp_ratio=2)
dinov3 = partial(
    eva, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=2, use_abs_pos_emb=False, use_fc_norm=False,
    global_pool="token", init_values=0.5,
)  # fmt: skip


def parallel(**options):
    return vit(block_fn=partial(ParallelScalingBlock, **options), qkv_bias=options.get("qkv_bias", True))


def with_gate(model, build, **options):
    """A model whose second block's attention has a gate."""
    model.blocks[1].attn = build(DIM, num_heads=HEADS, qkv_bias=True, gated=True, **options)
    return model


MODELS = {
    "EVA-02 small": partial(eva, swiglu_mlp=True),
    "EVA-02 base": partial(eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "EVA-02 CLIP": partial(eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, scale_attn_inner=True),
    "EVA post-norm": partial(eva, use_post_norm=True),
    "DINOv3": partial(dinov3, qkv_bias=False),
    "DINOv3 plus": partial(dinov3, swiglu_mlp=True, swiglu_align_to=8),
    "RoPE": partial(eva, attn_type="rope"),
    "mixed RoPE": partial(eva, attn_type="rope", rope_type="mixed"),
    "mixed RoPE, EVA": partial(eva, rope_type="mixed"),
    "RoPE split": partial(eva, attn_type="rope", qkv_fused=False, qk_norm=True),
    "PE": partial(eva, attn_type="rope", global_pool="map"),
    "gated EVA": lambda: with_gate(eva(), type(eva().blocks[0].attn), scale_norm=False),
    "gated RoPE": lambda: with_gate(eva(attn_type="rope"), AttentionRope, scale_norm=True, norm_layer=LayerNorm),
    "gated": lambda: with_gate(vit(), Attention),
    "SwiGLU": partial(vit, mlp_layer=SwiGLU),
    "packed SwiGLU": partial(vit, mlp_layer=partial(GluMlp, act_layer=nn.SiLU, gate_last=False)),
    "GLU": partial(vit, mlp_layer=GluMlp),
    "BEiT-3": partial(vit, scale_attn_norm=True, scale_mlp_norm=True),
    "BEiT": partial(Beit, **MICRO, mlp_ratio=2, qkv_bias=True, use_rel_pos_bias=True, init_values=0.5),
    "parallel attention and MLP": partial(parallel, init_values=0.5),
    "parallel, MLP bias apart": partial(parallel, qkv_bias=False),
    "parallel, one output": partial(parallel, fuse_out_proj=True),
    "parallel things": partial(vit, block_fn=ParallelThingsBlock, init_values=0.5),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request, add_noise):
    torch.manual_seed(0)
    return add_noise(request.param(), scale=0.2).double().eval()


def images_of(model, number=3):
    return torch.randn(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KEPT = {
    "random": lambda group, order: order[: 1 + len(order) // 2],
    "another": lambda group, order: order[: max(1, len(order) // 4)],
    "one": lambda group, order: order[:1],
    "none": lambda group, order: order[: group.layer],
}


@torch.no_grad()
@pytest.mark.parametrize("which", KEPT)
def test_the_removed_model_computes_what_the_masked_one_does(model, which):
    family = family_of(model)
    units = family.units(model)
    kept = kept_by(KEPT, units, which)
    cost, zeroed = family.cost(model, kept), masked_copy(model, units, kept)
    small, images = remove_units(copy.deepcopy(zeroed), units, kept), images_of(model)
    expected = zeroed(images)
    assert (expected - model(images)).abs().max() > 1e-3
    assert (small(images) - expected).abs().max() < 1e-12
    assert cost["parameters"] == count_parameters(small) == family.cost(small, {})["parameters"]
    assert cost == family.cost(small, {})
    again = {key: list(range(group.count)) for key, group in family.units(small).items()}
    assert {key: len(ids) for key, ids in again.items()} == {key: len(ids) for key, ids in kept.items()}
    tensors = dict(zeroed.state_dict())
    sliced = slice_tensors(tensors, units, kept)
    assert {name: t.shape for name, t in sliced.items()} == {name: t.shape for name, t in small.state_dict().items()}
    followers = follower_masks(units, kept, tensors)
    for name, tensor in scatter_tensors(sliced, units, kept).items():
        assert torch.equal(tensor, tensors[name] * followers.get(name, 1)), name


@torch.no_grad()
def test_layer_scale_folds_into_the_layer_before_it(model):
    images, folded = images_of(model), copy.deepcopy(model)
    scales = [name for name, _ in model.named_parameters() if name.rpartition(".")[2].startswith("gamma")]
    apart = any(isinstance(block, ParallelScalingBlock) for block in model.blocks)  # one factor for both branches
    gone = family_of(folded).fold_(folded)
    assert len(gone) == (0 if apart else len(scales))
    assert count_parameters(folded) == count_parameters(model) - DIM * len(gone)
    assert (folded(images) - model(images)).abs().max() < 1e-12


class Meter:
    """Multiply-accumulates of one forward pass, from hooks on layers and the shapes that attention products have."""

    def __init__(self, model, monkeypatch):
        self.total = 0
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(self.see)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        matmul = torch.Tensor.__matmul__

        def counted(a, b):
            self.total += a.numel() * b.shape[-1]
            return matmul(a, b)

        linear = nn.functional.linear

        def counted_linear(x, weight, bias=None):
            self.total += x.numel() * len(weight)
            return linear(x, weight, bias)

        monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
        monkeypatch.setattr(nn.functional, "linear", counted_linear)

    def see(self, module, inputs, output):
        if isinstance(module, nn.Conv2d):
            self.total += output.numel() * module.weight[0].numel()


@torch.no_grad()
@pytest.mark.parametrize("which", [None, "random"])
def test_macs_are_what_hooks_count(model, which, monkeypatch):
    family = family_of(model)
    units = family.units(model)
    kept = {} if which is None else kept_by(KEPT, units, which)
    expected = family.cost(model, kept)["macs"]
    remove_units(model, units, kept)
    meter = Meter(model, monkeypatch)
    model(images_of(model, 1))
    assert meter.total == expected


def places_of(model, group):
    """Where the units stand in the input of the layer that hears them: [count, width]."""
    layer = model.get_submodule(group.contribution.module)
    return group.contribution.layout.own(torch.arange(layer.in_features)).unflatten(0, (group.count, -1))


def audible(model, units):
    """{key: by how much a logit changes at most, [count], when a unit is heard a little louder}."""
    gains, handles = {}, []
    for key, group in units.items():
        layer, places = model.get_submodule(group.contribution.module), places_of(model, group)
        gain = gains[key] = torch.ones(group.count, dtype=torch.float64, requires_grad=True)

        def louder(module, args, gain=gain, places=places):
            factor = torch.ones(module.in_features, dtype=torch.float64)
            return (args[0] * factor.index_put((places,), gain[:, None].expand(places.shape)),)

        handles.append(layer.register_forward_pre_hook(louder))
    logits = model(images_of(model, 2)).flatten()
    slopes = [torch.autograd.grad(logit, list(gains.values()), retain_graph=True) for logit in logits]
    for handle in handles:
        handle.remove()
    return {key: torch.stack([slope[index] for slope in slopes]).abs().amax(0) for index, key in enumerate(gains)}


def test_without_its_parts_a_unit_is_silent_and_the_others_are_not(model):
    units = family_of(model).units(model)
    kept = {key: list(range(1, group.count)) for key, group in units.items()}
    assert all((value > 0).all() for value in audible(model, units).values())
    for key, value in audible(masked_copy(model, units, kept), units).items():
        assert (value == 0).nonzero().flatten().tolist() == [0], key


SHARED = ("q_norm", "k_norm", "in_norm")  # by all heads, or before the units


def test_what_a_unit_gives_depends_on_its_parts_and_on_nothing_else_in_its_module(model):
    units = family_of(model).units(model)
    parameters = dict(model.named_parameters())
    for group in units.values():
        layer, (place, *_) = model.get_submodule(group.contribution.module), places_of(model, group)
        found = []
        handle = layer.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0]))
        model(images_of(model, 2))
        handle.remove()
        given = found[0][..., place] @ layer.weight[:, place].T
        inside = {name: p for name, p in parameters.items() if name.startswith(f"{group.module}.")}
        gradients = torch.autograd.grad(given.square().sum(), list(inside.values()), allow_unused=True)
        # a norm over all units takes their mean and variance
        counted = any(".norm." in name for name in group.parts)
        for name, gradient in zip(inside, gradients, strict=True):
            if name in group.parts:
                moves = group.parts[name].per_unit(gradient).abs().amax(1) > 0
                assert moves[0], name
                assert counted or not moves[1:].any(), name
                assert not (gradient * group.parts[name].mask(gradient, [])).any(), name  # what others have of it
            elif gradient is not None and name.removeprefix(f"{group.module}.").split(".")[0] not in SHARED:
                assert not gradient.any(), name


# ------------------------------------------------------------------------------------------ on disk and back

TINY = {"img_size": SIZE, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "mlp_ratio": 2.0}
CARDS = {
    "vit_small_patch16_dinov3": "EvaAttention without biases",
    "eva02_tiny_patch14_224": "EvaAttention with biases of q and v, packed SwiGLU",
    "eva02_base_patch16_clip_224": "three layers for q, k and v, SwiGLU, norms after attention and inside the MLP",
    "vit_small_patch16_rope_224": "AttentionRope",
    "vit_small_patch16_rope_mixed_224": "RoPE mixed per head",
    "vit_giant_patch14_dinov2": "Attention, packed SwiGLU",
    "aimv2_large_patch14_224": "Attention, SwiGLU",
    "beit3_base_patch16_224": "plain but for the norms",
    "beit_base_patch16_224": "a table of relative positions",
    "vit_base_patch16_xp_224": "parallel attention and MLP",
    "vit_small_patch16_18x2_224": "parallel things",
}
LOADER = """
import json, os, sys
import torch
sys.path.insert(0, "")  # as in a session that is started in the folder
for folder in sys.argv[1:]:
    os.chdir(folder)
    scope = {}
    exec(open("README.md").read().split("```python")[1].split("```")[0], scope)
    torch.save(scope["model"](torch.load("images.pt")), "logits.pt")
    print(folder, {name.partition(".")[0] for name in sys.modules} & {"families", "models", "pruning"})
"""


def tiny(name, num_classes=CLASSES, img_size=SIZE):
    arguments = {**TINY, "num_classes": num_classes, "img_size": img_size}
    model = timm.create_model(name, **arguments)
    model.arch_name, model.arch_args, model.pretrained_report = f"timm/{name}", arguments, None
    return model


@torch.no_grad()
def test_the_lines_of_the_card_load_the_model_with_timm_alone(tmp_path, add_noise):
    expected = {}
    for name in CARDS:
        model = add_noise(tiny(name), scale=0.2).eval()
        units = family_of(model).units(model)
        kept, images = kept_by(KEPT, units, "none" if "rope" in name else "random"), images_of(model).float()
        zeroed, folder = masked_copy(model, units, kept), tmp_path / name
        small = export.write(folder, zeroed, kept, [(images, torch.zeros(3))], None, {"arch": model.arch_name}, {})
        assert (export.load(folder)(images) - small(images)).abs().max() == 0
        torch.save(images, folder / "images.pt")
        expected[str(folder)] = zeroed(images)
    script = tmp_path / "load.py"
    script.write_text(LOADER)
    done = subprocess.run([sys.executable, script, *expected], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"{folder} set()" for folder in expected], done.stderr
    for folder, logits in expected.items():
        found = torch.load(f"{folder}/logits.pt")
        assert (found - logits).abs().max() < 1e-5 * max(1, logits.abs().max()), folder


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_the_card_of_a_folded_model_loads_it(name, tmp_path, add_noise):
    model = add_noise(tiny(name), scale=0.2).eval()
    units = family_of(model).units(model)
    kept, batches = kept_by(KEPT, units, "random"), [(images_of(model).float(), torch.zeros(3))]
    zeroed = masked_copy(model, units, kept)
    export.write(tmp_path, zeroed, kept, batches, None, {"arch": model.arch_name}, {})
    folded = export.write_folded(tmp_path, zeroed, kept, batches)
    for found in (export.load(tmp_path / "folded"), card_model(tmp_path / "folded")[0]):
        assert not any("gamma" in parameter for parameter, _ in found.named_parameters())
        assert (found(batches[0][0]) - folded(batches[0][0])).abs().max() < 1e-6


DIGITS = "--dataset digits --arch tiny --pruning_times 2 --epochs 1 --train_limit 100 --batch_size 50 --device cpu"
UNITS = "--vit_structured --vit_prune_target both --rate 0.34 --mlp_prune_ratio 0.5 --struct"


@pytest.mark.parametrize(("name", "flags"), [
    ("vit_small_patch16_dinov3", f"{UNITS} rsst"), ("vit_small_patch16_dinov3", f"{UNITS} refill"),
    ("eva02_base_patch16_clip_224", f"{UNITS} rsst"), ("eva02_base_patch16_clip_224", f"{UNITS} refill"),
    ("vit_small_patch16_rope_mixed_224", "--struct imp --rate 0.97"),
    ("eva02_base_patch16_clip_224", "--struct imp --rate 0.97"),
])  # fmt: skip
def test_the_command_prunes_and_exports_them(name, flags, house, tmp_path, capsys, monkeypatch):
    """Units, or single weights and the units that die of it."""
    monkeypatch.setitem(models.BUILDERS, "tiny", partial(tiny, name))
    run = runner(tmp_path, capsys, DIGITS.split())(*flags.split())
    config, proof = (json.loads((run.dir / "model" / f"{file}.json").read_text()) for file in ("config", "parity"))
    assert proof["max_difference_float64"] < 1e-12
    assert count_parameters(export.load(run.dir / "model")) == config["parameters"]["removed"]
    if UNITS in flags:
        assert (config["heads"], config["neurons"]) == ([1, 1], [DIM, DIM])
        return
    assert sum(config["neurons"]) < 2 * 2 * DIM
    model = tiny(name)
    layers = set(family_of(model).prunable_layers(model))
    assert layers == {name for name, module in model.blocks.named_modules(prefix="blocks") if type(module) is nn.Linear}


# ------------------------------------------------------------------------------------------ scores and dead units
def seen_by_hand(model, units, images):
    """What l1 looks at, [images, tokens, streams, count, width]: rows times the module's input, and their biases."""
    found, handles = {}, []
    for key, group in units.items():
        module = model.get_submodule(group.module)
        seen = module.in_norm.register_forward_hook if hasattr(module, "in_norm") else module.register_forward_pre_hook
        handles.append(seen(lambda *given, key=key: found.update({key: given[-1]})))
    model(images)
    for handle in handles:
        handle.remove()
    scores = {}
    for key, group in units.items():
        x = found[key][0] if isinstance(found[key], tuple) else found[key]
        module, values = model.get_submodule(group.module), []
        for name in group.scored:
            layer, layout = module.get_submodule(name.split(".")[-2]), group.parts[name]
            bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
            values.append(layout.split((x @ layer.weight.T + bias).movedim(-1, 0)).flatten(3))
        streams = torch.cat(values)  # [streams, count, width, images and tokens]
        for stream, name in ((0, "q_bias"), (2, "v_bias"), (0, "mlp_bias")):
            bias = getattr(module, name, None)
            if bias is not None and (group.kind == "neuron") == (name == "mlp_bias"):
                streams[stream] += bias.reshape(group.count, -1, 1)
        scores[key] = streams.abs().mean((0, 2, 3))
    return scores


@torch.no_grad()
@pytest.mark.parametrize("criteria", ["l1", "magnitude", "remain"])
def test_scores_see_all_rows_of_a_unit(model, criteria):
    units, images = family_of(model).units(model), images_of(model)
    masks = {name: (layer.weight > 0).double() for name, layer in family_of(model).prunable_layers(model).items()}
    masks = masks if criteria == "remain" else None
    found = score_units(model, units, criteria, mask=masks, batches=[(images, torch.zeros(3, dtype=torch.long))])
    if criteria == "l1":
        expected = seen_by_hand(model, units, images)
    else:
        parameters = dict(model.named_parameters())
        worth = torch.abs if criteria == "magnitude" else (lambda weights: (weights > 0).double())
        expected = {
            key: sum(worth(layout.per_unit(parameters[name])).sum(1) for name, layout in group.scored.items())
            for key, group in units.items()
        }
        assert all(sum(part.lead for part in group.scored.values()) == 3 for group in units.values() if group.listed)
    assert found.keys() == expected.keys()
    for key, score in found.items():
        torch.testing.assert_close(score, expected[key], rtol=1e-10, atol=0)


@torch.no_grad()
def test_units_that_died_weight_by_weight_are_folded_away(model):
    """v rows, fc1 rows and columns of zeros: what their biases still give goes into the output bias."""
    units = family_of(model).units(model)
    for group in units.values():
        *rows, columns = (name for name in group.parts if name.endswith(".weight") and ".norm." not in name)
        rows = [name for name in rows if name in group.scored]
        if group.kind == "head":
            rows = rows[-1:]
        for name in rows:
            weight, layout = model.get_parameter(name), group.parts[name]
            layout.split(weight)[-1 if group.kind == "head" else slice(None), ..., 0, :, :].zero_()
        group.contribution.layout.split(model.get_submodule(group.contribution.module).weight)[..., 1, :].zero_()
    small, kept = export.compact(model)
    expected, images = model(images_of(model)), images_of(model)
    assert (small(images) - expected).abs().max() < 1e-12
    for key, group in units.items():
        counted = any(".norm." in name for name in group.parts)
        gated = any(".gate." in name for name in group.parts)
        alive = list(range(group.count))
        if not counted:
            alive.remove(1)
            if not gated:
                alive.remove(0)
        assert kept[key] == alive, key


@torch.no_grad()
def test_units_that_a_norm_counts_die_only_as_zeros(add_noise):
    model = add_noise(MODELS["EVA-02 CLIP"](), scale=0.2).double().eval()
    units = family_of(model).units(model)
    for group in units.values():
        for name, mask in unit_masks({"": group}, {"": range(2, group.count)}, dict(model.named_parameters())).items():
            model.get_parameter(name).mul_(mask)
    small, kept = export.compact(model)
    assert all(kept[key] == list(range(2, group.count)) for key, group in units.items())
    assert (small(images_of(model)) - model(images_of(model))).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------ --list_archs
@pytest.fixture
def listed(monkeypatch, tmp_path, capsys):
    """listed("PATTERN", ...) -> (exit code, out, err, names that were built), with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: built.append(name) or create(name, **options))

    def run(*words):
        built.clear()
        capsys.readouterr()
        code = call(["--list_archs", *words])
        return code, *capsys.readouterr(), built[:]

    return run


def test_list_archs_says_what_can_be_pruned_and_why_not(listed):
    code, out, _, built = listed("timm/vit_d[pw]*ee_patch16_reg1_gap_256", "--verbose")
    assert code == 0
    assert sorted(built) == ["vit_dpwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256"]
    assert "timm/vit_dwee_patch16_reg1_gap_256: VisionTransformer.blocks.0.attn" in out
    assert out.splitlines()[-1] == "2 names: 0 can be pruned, 2 not"
    code, out, _, built = listed("test_vit")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:-1]}
    assert set(rows) == {f"timm/{name}" for name in built} - {"timm/test_vit_relpos"} >= {"timm/test_vit"}
    model = timm.create_model("test_vit")
    cost = family_of(model).cost(model, {})
    layers, heads = len(model.blocks), model.blocks[0].attn.num_heads
    expected = ["ViT", "160", f"{cost['parameters'] / 1e6:.1f}", "M", f"{cost['macs'] / 1e9:.2f}", "G"]
    assert rows["timm/test_vit"][:9] == [*expected, str(layers), "x", str(heads)]
    assert listed("test_vit")[3] == []  # what was built is remembered


def test_list_archs_works_without_a_cache_it_can_write_or_read(listed, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    listed("test_vit2")
    (kept,) = (path for path in folder.rglob("*") if path.is_file())
    assert timm.__version__ in kept.name
    for damage in ("", "{}", "[1]", '{"families": "other", "archs": {"test_vit2": {}}}'):
        kept.write_text(damage)
        code, out, _, built = listed("test_vit2")
        assert (code, built) == (0, ["test_vit2"])
        assert "1 names: 1 can be pruned, 0 not" in out
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file, where no folder can be made
    assert listed("test_vit2")[:2] == (code, out)


def test_list_archs_of_no_name_is_refused(listed):
    code, out, err, built = listed("no_such_name")
    assert (code, out, built) == (2, "", [])
    assert "--list_archs no_such_name" in err
    assert err.count("\n") == 1
