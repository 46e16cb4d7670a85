"""Laws of the small model that a run ends with: nothing changes by removal, on disk, in timm, in ONNX Runtime."""

import argparse
import ast
import copy
import json
import math
import re
import shutil
import sys
import time

import pytest
import torch
import yaml
from micro import DEPTH, DIM, HEAD_DIM, HEADS, HIDDEN, TOKENS, assert_one_line, card_model, linked, rows_of, vit_micro
from references import assert_same_function, assert_same_tensors, clones, masked_by_hand, masks_by_hand, vit_places
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

import export
import models
from dataset import DATASETS, load_dataset
from deployment.exported import seal
from families import family_of
from utils import RunError
from vit_structured_pruning import count_vit_parameters

pytestmark = pytest.mark.usefixtures("house")
CLASSES, SIZE, PATCH = 10, 16, 8  # of the micro model
GEOMETRY = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
MODEL_FILES = ["README.md", "config.json", "model.safetensors", "parity.json"]


# ------------------------------------------------------------------------------------- models, made independently
@torch.no_grad()
def noisy(model, scale=0.3):
    """Noise on every weight, bias and norm, so that no initial zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = scale * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise + (parameter.ndim == 1 and name.endswith("weight")))
    return model.eval()


def micro(**overrides):
    return noisy(vit_micro(**overrides))


def pictures(count=4, size=SIZE, seed=7):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches_of(*sizes, size=SIZE):
    return [(pictures(n, size, seed), torch.zeros(n, dtype=torch.long)) for seed, n in enumerate(sizes)]


def others(count, kept):
    return [unit for unit in range(count) if unit not in kept]


def complete(model, kept):
    """The ids of all units that stay: of a layer that is not named, all."""
    return {key: kept.get(key, list(range(len(rows)))) for key, (_, rows, *_) in vit_places(model).items()}


def masked_like(model, kept):
    """A copy with zeros where units are not kept."""
    return masked_by_hand(model, masks_by_hand(model, kept))


def macs_of(dim, heads, neurons, width, tokens, patch, classes):
    """The formula of SPEC 3."""
    blocks = sum(
        3 * tokens * dim * h * width + 2 * tokens**2 * h * width + tokens * h * width * dim + 2 * tokens * dim * n
        for h, n in zip(heads, neurons, strict=True)
    )
    return (tokens - 1) * 3 * patch**2 * dim + blocks + dim * classes


def micro_macs(heads, neurons):
    return macs_of(DIM, heads, neurons, HEAD_DIM, TOKENS, PATCH, CLASSES)


SOME = {"blocks.0.attn": [0, 2], "blocks.0.mlp": [1, 5, 7, 23], "blocks.1.attn": [1], "blocks.1.mlp": [0, 2, 40]}
NO_BLOCK = {**SOME, "blocks.1.attn": [], "blocks.1.mlp": []}


def write_micro(folder, kept=SOME, **changes):
    """An exported micro model; returns (masked, small)."""
    masked = masked_like(micro(), kept)
    content = {"batches": batches_of(5, 3), "facts": DATASETS["cifar10"], "provenance": {}, "metrics": {}, **changes}
    return masked, export.write(folder, masked, kept, **content)


# ------------------------------------------------------------------------------------------------ what still works
@torch.no_grad()
def test_removal_leaves_the_masked_model_as_it_was_and_names_all_that_stays():
    kept = {"blocks.0.attn": [1, 2, 3], "blocks.1.mlp": []}
    masked = masked_like(micro(), kept)
    before = clones(masked.state_dict())
    small, returned = export.compact(masked, kept)
    assert returned == complete(masked, kept)
    assert_same_function(masked, small, pictures())
    assert_same_tensors(masked.state_dict(), before)
    pointers = [{p.data_ptr() for p in model.parameters() if p.numel()} for model in (masked, small)]
    assert not pointers[0] & pointers[1]


def qkv_rows(parts, heads=(1,)):
    start = {"q": 0, "k": HEADS * HEAD_DIM, "v": 2 * HEADS * HEAD_DIM}
    return [start[part] + head * HEAD_DIM + i for part in parts for head in heads for i in range(HEAD_DIM)]


ALL_HEADS, ALL_NEURONS = list(range(HEADS)), list(range(HIDDEN))
LESS_HEADS, LESS_NEURONS = others(HEADS, [1]), others(HIDDEN, [2, 9])
PROJ, FC2 = (slice(None), slice(HEAD_DIM, 2 * HEAD_DIM)), (slice(None), [2, 9])
BOTH = {"attn.qkv.weight": qkv_rows("v"), "mlp.fc1.weight": [2, 9]}
DEATHS = {
    # what is zero, heads and neurons that block 0 keeps, whether removal without folding would change the function
    "proj columns": ({"attn.proj.weight": PROJ}, LESS_HEADS, ALL_NEURONS, False),
    "v rows": ({"attn.qkv.weight": qkv_rows("v")}, LESS_HEADS, ALL_NEURONS, True),
    "q and k rows": ({"attn.qkv.weight": qkv_rows("qk")}, ALL_HEADS, ALL_NEURONS, False),
    "all v rows but one": ({"attn.qkv.weight": qkv_rows("v")[1:]}, ALL_HEADS, ALL_NEURONS, False),
    "fc2 columns": ({"mlp.fc2.weight": FC2}, ALL_HEADS, LESS_NEURONS, False),
    "fc1 rows": ({"mlp.fc1.weight": [2, 9]}, ALL_HEADS, LESS_NEURONS, True),
    "fc1 biases": ({"mlp.fc1.bias": [2, 9]}, ALL_HEADS, ALL_NEURONS, False),
    "both kinds": (BOTH, LESS_HEADS, LESS_NEURONS, True),
    "all heads": ({"attn.qkv.weight": qkv_rows("v", ALL_HEADS)}, [], ALL_NEURONS, True),
    "all neurons": ({"mlp.fc1.weight": ALL_NEURONS}, ALL_HEADS, [], True),
}


@torch.no_grad()
def kill(model, zeros):
    for name, index in zeros.items():
        model.blocks[0].get_parameter(name)[index] = 0
    return model


@torch.no_grad()
@pytest.mark.parametrize(("zeros", "heads", "neurons", "needs_folding"), DEATHS.values(), ids=DEATHS)
def test_dead_units_are_found_folded_and_removed(zeros, heads, neurons, needs_folding):
    model, images = kill(micro().double(), zeros), pictures().double()
    alive = complete(model, {"blocks.0.attn": heads, "blocks.0.mlp": neurons})
    small, kept = export.compact(model)
    assert kept == alive
    unfolded = export.compact(model, alive)[0]
    expected = model(images)
    bound = 1e-12 * max(1.0, float(expected.abs().max()))
    assert (expected - small(images)).abs().max() <= bound
    difference = float((expected - unfolded(images)).abs().max())
    assert difference > 1e-4 if needs_folding else difference <= bound


def test_without_an_output_bias_a_constant_keeps_its_unit():
    model = kill(micro(), BOTH)
    model.blocks[0].attn.proj.bias = model.blocks[0].mlp.fc2.bias = None
    assert export.compact(model)[1] == complete(model, {})
    kill(model, {"attn.proj.weight": PROJ, "mlp.fc2.weight": FC2})
    assert export.compact(model)[1] == complete(model, {"blocks.0.attn": LESS_HEADS, "blocks.0.mlp": LESS_NEURONS})


# ------------------------------------------------------------------------------------------------ the folder
@torch.no_grad()
@pytest.mark.parametrize("kept", [SOME, NO_BLOCK], ids=["some of each", "no block"])
def test_folder_holds_the_model(tmp_path, kept):
    folder, provenance, metrics = tmp_path / "a" / "model", {"arch": "micro", "seed": 3}, {"test_accuracy": 0.25}
    masked, small = write_micro(folder, kept, provenance=provenance, metrics=metrics)
    assert sorted(path.name for path in folder.iterdir()) == MODEL_FILES  # and no temporary file

    config = json.loads((folder / "config.json").read_text())
    left = [0, 1] if kept is SOME else [0]  # a block without any unit is taken out
    heads, neurons = ([len(kept[f"blocks.{i}.{part}"]) for i in left] for part in ("attn", "mlp"))
    macs = [micro_macs([HEADS] * DEPTH, [HIDDEN] * DEPTH), micro_macs(heads, neurons)]
    expected = {
        "vit": {**GEOMETRY, "num_classes": CLASSES, "depth": len(left)},
        **({} if kept is SOME else {"blocks": left}),
        "head_dim": HEAD_DIM,
        "heads": heads,
        "neurons": neurons,
        "kept_heads": [kept["blocks.0.attn"], kept["blocks.1.attn"]],
        "kept_neurons": [kept["blocks.0.mlp"], kept["blocks.1.mlp"]],
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2470, 0.2435, 0.2616],
        "preprocessing": {
            "size": 16, "resize": 16, "resize_mode": "square", "crop": 16, "crop_mode": "center", "channels": 3,
            "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616], "interpolation": "bilinear",
            "orientation": "exif", "source": "the data set",
        },
        "parameters": {"dense": count_vit_parameters(masked), "removed": count_vit_parameters(small)},
        "macs": dict(zip(("dense", "removed"), macs, strict=True)),
        "provenance": provenance,
        "metrics": metrics,
    }  # fmt: skip
    assert {key: value for key, value in config.items() if key != "sha256"} == expected
    assert export.read_config(folder) == config

    loaded = export.load(str(folder))
    assert not any(module.training for module in loaded.modules())
    assert_same_tensors(loaded.state_dict(), small.state_dict())
    proof = json.loads((folder / "parity.json").read_text())
    assert (proof["images"], proof["top1_agreement"]) == (8, 1.0)
    assert f"{proof['max_difference_float32']:.2g} in float32" in export.verification_line(folder)
    if kept is SOME:
        assert_same_function(masked, loaded, pictures())
    else:  # what the block adds is a sum rounded to float32; tests/test_depth.py has the law in float64
        assert (masked(pictures()) - loaded(pictures())).abs().max() <= 1e-5

    card = (folder / "README.md").read_text()
    numbers = [f"{count_vit_parameters(model):,}" for model in (masked, small)]
    numbers += [f"{count / 1e9:.4f} G" for count in macs] + [f"block: {counts}" for counts in (heads, neurons)]
    for part in (*numbers, "test_accuracy: 0.25", "of 8 validation images"):
        assert part in card


@torch.no_grad()
def test_parity_measures_what_differs():
    """Of two models that differ: over all images, of which neither the first nor the last is the worst."""
    masked, other = micro(), micro()
    other.patch_embed.proj.weight[:, 0, 0, 0] += torch.linspace(0, 1, DIM)
    images = pictures(119)
    worst = {int((masked(images) - other(images)).abs().amax(1).argmax()), int(masked(images).abs().amax(1).argmax())}
    images = images[others(119, worst)[:40] + sorted(worst) + others(119, worst)[40:]]
    batches = [(part, torch.full((len(part),), 3)) for part in images.split([40, 70, 9])]
    expected, found = masked(images), other(images)
    exact = [copy.deepcopy(model).double()(images.double()) for model in (masked, other)]
    difference, largest = (expected - found).abs().max(), float(expected.abs().max())
    agreed = float((expected.argmax(1) == found.argmax(1)).float().mean())
    assert 0 < agreed < 1
    masked.train()
    masked.blocks[1].eval()
    modes = [module.training for module in masked.modules()]
    proof = export.parity(masked, other, batches)
    assert [module.training for module in masked.modules()] == modes
    assert proof == {
        "images": 119,
        "images_float64": 119,
        "max_difference_float32": pytest.approx(float(difference), rel=1e-4),
        "max_difference_float64": pytest.approx(float((exact[0] - exact[1]).abs().max()), rel=1e-12),
        "largest_logit": pytest.approx(largest, rel=1e-5),
        "bound": pytest.approx(1e-5 * max(1, largest), rel=1e-5),
        "top1_agreement": pytest.approx(agreed),
        "accuracy": int((found.argmax(1) == 3).sum()) / 119,
    }


class Tf32(torch.nn.Conv2d):
    """A convolution that rounds as TF32 does: the numbers that meet have 10 bits behind the leading one. Their sums
    depend on how many channels there are, as those of a GPU's kernels do."""

    def forward(self, x):
        if x.dtype != torch.float32:
            return super().forward(x)
        x, weight = (((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in (x, self.weight.data))
        half = x.shape[1] // 2
        first = self._conv_forward(x[:, :half], weight[:, :half], self.bias)
        return first + self._conv_forward(x[:, half:], weight[:, half:], None)


@torch.no_grad()
def test_what_a_gpus_convolutions_round_fails_no_verification(tmp_path):
    """Float64 says whether models are the same; float32 is reported."""
    torch.manual_seed(0)
    masked = models.build_model("res20s", 10)
    for module in masked.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.__class__ = Tf32
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1)
            module.bias.normal_()
    kept = {f"layer{i}.{j}.conv1": list(range(5)) for i in (1, 2, 3) for j in range(3)}
    for name, ids in kept.items():
        block = masked.get_submodule(name.rpartition(".")[0])
        gone = others(block.conv1.out_channels, ids)
        block.conv1.weight[gone], block.bn1.weight[gone], block.bn1.bias[gone] = 0, 0, 0
    batches = batches_of(40, size=32)
    export.write(tmp_path, masked.eval(), kept, batches, None, {}, {})
    proof = json.loads((tmp_path / "parity.json").read_text())
    assert proof["max_difference_float64"] < 1e-12
    assert proof["max_difference_float32"] > proof["bound"]


@torch.no_grad()
def test_of_a_program_only_what_the_device_rounds_is_allowed(tmp_path, monkeypatch):
    """The model rounds to TF32, its program does not; more than that is a fault."""
    model = micro()
    program = copy.deepcopy(model)
    model.patch_embed.proj.__class__ = Tf32
    assert (model(pictures()) - program(pictures())).abs().max() > 1e-4
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(torch.export, "save", lambda _, path: path.write_bytes(b""))
    monkeypatch.setattr(torch.export, "load", lambda _: program)
    monkeypatch.setattr(program, "module", lambda: program, raising=False)
    assert export.torch_export(model, tmp_path / "model.pt2") > 1e-4
    program.head.bias[0] += 0.05
    with pytest.raises(RunError, match="--torch_export"):
        export.torch_export(model, tmp_path / "model.pt2")


WRONG_BIASES = {
    "a little": lambda bias: bias.add_(1e-3),
    "not a number": lambda bias: bias.fill_(math.nan),
    "not a number in one class": lambda bias: bias[1].fill_(math.nan),
    "infinite": lambda bias: bias.fill_(math.inf),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["works", "hardly works", *[kind for kind in WRONG_BIASES if kind != "a little"]])
def test_a_model_that_computes_something_else_is_not_written(tmp_path, kind):
    """A unit that works, or hardly does, is to go; or nothing can be said of the logits."""
    write_micro(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    masked = masked_like(micro(), SOME)
    if kind == "hardly works":
        masked.blocks[0].mlp.fc2.weight[:, 1] *= 1e-3  # which moves the logits by some 1e-4
    elif kind in WRONG_BIASES:
        WRONG_BIASES[kind](masked.head.bias)
    kept = {**SOME, "blocks.0.mlp": SOME["blocks.0.mlp"][1:]} if "works" in kind else SOME
    for folder in ("model", "new"):
        with pytest.raises(RunError, match="differs") as caught:
            export.write(tmp_path / folder, masked, kept, batches_of(5, 3), DATASETS["cifar10"], {}, {})
        assert caught.value.code == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write .*file/model: Not a directory") as caught:
        write_micro(tmp_path / "file" / "model")
    assert caught.value.code == 1


def test_config_has_a_line_a_layer_and_the_run_s_folder_is_one_to_load(tmp_path):
    masked, _ = write_micro(tmp_path / "model", provenance={"note": "[\\n 1, 2 ] {"})
    text = (tmp_path / "model" / "config.json").read_text()
    for line in ("    [1, 5, 7, 23],", "    [0, 2, 40]", '  "heads": [2, 1],', '    "note": "[\\\\n 1, 2 ] {"'):
        assert line in text.splitlines()
    assert json.loads(text) == export.read_config(tmp_path / "model")
    assert_same_function(masked, export.load(tmp_path), pictures())
    with pytest.raises(RunError, match="is .*nothing an exported model"):
        export.load(tmp_path / "nothing")


def flags_of_run(**changes):
    flags = {"arch": "vit_mini", "dataset": "digits", "struct": "refill", "criteria": "l1", "prune_type": "lt"}
    flags |= {"rate": 0.2, "pruning_times": 2, "epochs": 1, "seed": 3, "vit_structured": True, "mlp_prune_ratio": None}
    return argparse.Namespace(**{**flags, "vit_prune_target": "both", "nm": None, **changes})


PROVENANCE = {
    # what the card of such a run says besides arch, dataset, struct, number of states and epochs, and seed
    "ratios": ({}, {"criteria", "prune_type", "rate", "vit_prune_target"}),
    "two ratios": ({"mlp_prune_ratio": 0.5}, {"criteria", "prune_type", "rate", "vit_prune_target", "mlp_prune_ratio"}),
    "a budget": ({"target_macs": 0.5}, {"criteria", "prune_type", "vit_prune_target", "target_macs"}),
    "milliseconds": (
        {"target_latency_ms": 2.0, "latency_batch": 1},
        {"criteria", "prune_type", "vit_prune_target", "target_latency_ms", "latency_batch"},
    ),
    "N:M": ({"nm": "2:4", "vit_structured": False, "struct": "imp"}, {"prune_type", "nm"}),
    "dense": ({"struct": "dense"}, set()),
    "a single state": ({"pruning_times": 1, "target_macs": 0.5}, set()),
}


@pytest.mark.parametrize(("changes", "said"), PROVENANCE.values(), ids=PROVENANCE)
def test_the_card_lists_the_flags_that_ruled(changes, said):
    found = export.run_provenance(flags_of_run(**changes))
    assert found.keys() == {"arch", "dataset", "struct", "pruning_times", "epochs", "seed"} | said
    dense = changes.get("struct") == "dense" or "pruning_times" in changes
    assert found["struct"] == ("dense" if dense else changes.get("struct", "refill"))


def test_the_card_of_a_dense_run_says_nothing_of_pruning(tmp_path):
    provenance = export.run_provenance(flags_of_run(struct="dense"))
    write_micro(tmp_path, kept={}, provenance=provenance)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# vit_mini\n")
    assert not re.search("prun(ed|e_)|removed|masked", card.partition("## Loading")[0])
    assert f"| {count_vit_parameters(micro()):,} |" in card


# ------------------------------------------------------------------------------------------------ plain timm
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("kept", [{}, NO_BLOCK], ids=["whole", "no block"])
def test_timm_alone_loads_the_folder(tmp_path, monkeypatch, kept):
    pytest.importorskip("timm")
    masked, _ = write_micro(tmp_path, kept)
    model, code = card_model(tmp_path)
    assert code == export.LOADING_SNIPPETS["vit"]
    assert len(code.splitlines()) < 20
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names <= {"json", "timm", "safetensors.torch", "torch"}  # nothing of ours
    monkeypatch.chdir(tmp_path)
    assert type(model).__module__.startswith("timm.")
    assert not model.training
    assert (model(pictures()) - masked(pictures())).abs().max() <= 1e-5
    # strict: neither a missing nor an unknown tensor passes
    weights = load_file("model.safetensors")
    fewer = {name: tensor for name, tensor in weights.items() if name != "blocks.0.mlp.fc2.bias"}
    for wrong in (fewer, {**weights, "extra": torch.zeros(1)}):
        save_file(wrong, "model.safetensors")
        with pytest.raises(RuntimeError, match="Missing|Unexpected"):
            exec(code, {})


# ------------------------------------------------------------------------------------------------ damaged folders
def assert_refused(folder):
    with pytest.raises(RunError) as caught:
        export.load(folder)
    assert caught.value.code == 2
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def changes_of(value):
    """`value` with one of its plain values changed, for each of them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ({**value, key: changed} for changed in changes_of(inner))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from ([*value[:index], changed, *value[index + 1 :]] for changed in changes_of(inner))
    else:
        yield 1 if value is None else value + ("x" if isinstance(value, str) else 1)


def test_one_changed_byte_or_config_value_is_refused(tmp_path):
    write_micro(tmp_path, provenance={"arch": "micro"}, metrics={"val_accuracy": 0.5})
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    content, whole = json.loads(config.read_text()), weights.read_bytes()
    fewer = [{name: value for name, value in content.items() if name != key} for key in content]
    wrong = [*changes_of(content), *fewer, {**content, "more": 1}]
    assert len(wrong) > 40
    for changed in wrong:
        config.write_text(json.dumps(changed))
        assert_refused(tmp_path)
    config.write_text(json.dumps(content))  # other white space is no other content
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (*range(8), *range(8, header, 97), header, *range(header, len(whole), 997), len(whole) - 1):
        weights.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_refused(tmp_path)
    weights.write_bytes(whole[:-1])
    assert_refused(tmp_path)
    weights.write_bytes(whole)
    export.load(tmp_path)


def test_equal_models_give_equal_files():
    files = [seal({"arch": "micro"}, {"weight": torch.arange(3.0)}) for _ in range(20)]
    assert files == files[:1] * 20  # safetensors writes its metadata in a random order
    assert torch.equal(load_tensors(files[0][1])["weight"], torch.arange(3.0))


DAMAGES = {
    "config.json missing": lambda f: (f / "config.json").unlink(),
    "model.safetensors missing": lambda f: (f / "model.safetensors").unlink(),
    "a file in its place": lambda f: (shutil.rmtree(f), f.write_text("model")),
    "config.json a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "config.json not text": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00{"),
    "config.json a list": lambda f: (f / "config.json").write_text("[1, 2]"),
    "config.json an empty object": lambda f: (f / "config.json").write_text("{}"),
    "header no JSON": lambda f: (f / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"x" * 64),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_folder_is_refused_in_one_line(tmp_path, damage):
    write_micro(tmp_path / "model")
    damage(tmp_path / "model")
    assert_refused(tmp_path / "model")


# ------------------------------------------------------------------------------------------------ a finished run
@pytest.fixture
def run_copy(finished_run, tmp_path):
    return linked(finished_run, tmp_path / "copy")


def replace(path, content):
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit_args(folder, **changes):
    args = yaml.safe_load((folder / "args.yaml").read_text())
    replace(folder / "args.yaml", yaml.safe_dump({**args, **changes}))


def edit_best(folder, **changes):
    best = torch.load(folder / "best.pt", weights_only=True)
    (folder / "best.pt").unlink()
    torch.save({**best, **changes}, folder / "best.pt")


def kept_of(config):
    kinds = {"attn": config["kept_heads"], "mlp": config["kept_neurons"]}
    return {f"blocks.{layer}.{kind}": ids for kind, layers in kinds.items() for layer, ids in enumerate(layers)}


def masked_of(run):
    """The run's selected model, put together by hand."""
    model, best = vit_micro(), torch.load(run / "best.pt", weights_only=True)
    model.load_state_dict(best["weights"])
    return model.eval(), best["kept"]


def read_table(lines):
    """Rows of a text table whose columns are two blanks apart; the line of dashes gives their places."""
    spans = [match.span() for match in re.finditer("-+", lines[1])]
    assert set(lines[1]) == {"-", " "}
    titles = [lines[0][start:end].strip() for start, end in spans]
    return [dict(zip(titles, [line[a:b].strip() for a, b in spans], strict=True)) for line in lines[2:]]


@torch.no_grad()
def test_validation_accuracy_is_measured_on_the_exported_model(tmp_path):
    """What a run gives was measured in the precision of training, and what stands there may be of an older version."""
    images, batches = pictures(40), []
    for _ in range(2):
        masked, _ = write_micro(tmp_path, batches=batches or [(images, torch.zeros(40))], metrics={"val_accuracy": 2.0})
        found = masked(images).argmax(1)
        expected = int((found == 0).sum()) / 40 if not batches else 1.0
        assert export.read_config(tmp_path)["metrics"] == {"val_accuracy": expected}
        batches = [(images, found)]


@torch.no_grad()
def accuracy_on_digits(model, part="test"):
    """From raw pixels."""
    test, facts = getattr(load_dataset("digits", "data", SIZE), part), DATASETS["digits"]
    images = ((test.images.double() / 255 - facts.mean[0]) / facts.std[0]).float().expand(-1, 3, -1, -1)
    return int((model(images).argmax(1) == test.labels).sum()) / len(test.labels)


@torch.no_grad()
def test_command_writes_the_model_of_a_run(run_copy, finished_run, command):
    code, out, err = command(run_copy, "--latency", "--evaluate")
    assert (code, err) == (0, "")
    folder, (masked, kept) = run_copy / "model", masked_of(run_copy)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*MODEL_FILES, "latency.txt"])
    assert [len(kept[f"blocks.{i}.{part}"]) for part in ("attn", "mlp") for i in range(2)] == [1, 1, 24, 24]
    config = export.read_config(folder)
    assert kept_of(config) == kept
    small = export.load(folder)
    assert_same_function(masked, small, pictures())
    at_the_end = load_file(finished_run / "model" / "model.safetensors")  # by the run itself
    assert_same_tensors(at_the_end, small.state_dict())

    accuracy = accuracy_on_digits(masked)
    val_accuracy = accuracy_on_digits(masked, "val")
    assert config["metrics"] == {"val_accuracy": val_accuracy, "test_accuracy": accuracy}
    assert f"test accuracy {100 * accuracy:.2f}% of 359 images" in out
    made_by = {"arch": "vit_micro", "dataset": "digits", "struct": "rsst", "criteria": "l1", "prune_type": "lt"}
    made_by |= {"rate": 0.6, "pruning_times": 2, "epochs": 1, "seed": 42}
    assert config["provenance"] == {**made_by, "vit_prune_target": "both", "mlp_prune_ratio": 0.5}
    assert [config["mean"], config["std"]] == [list(DATASETS["digits"].mean) * 3, list(DATASETS["digits"].std) * 3]
    assert json.loads((folder / "parity.json").read_text())["images"] == 144  # a tenth of 1,438 and what balance adds
    assert export.verification_line(folder) in out

    table = (folder / "latency.txt").read_text()
    assert table.strip() in out
    rows = read_table(table.splitlines()[1:])
    assert [row["batch"] for row in rows] == ["1", "8", "64"]
    assert all(float(row["dense ms"]) > 0 and float(row["pruned ms"]) > 0 for row in rows)


def test_command_finds_dead_units_and_clears_what_belongs_to_another_model(run_copy, command, tmp_path):
    """The same weights without the list of kept units: the zeros alone tell which heads and neurons are gone."""
    masked, kept = masked_of(run_copy)
    edit_args(run_copy, vit_structured=False)
    edit_best(run_copy, kept={})
    out = tmp_path / "elsewhere"
    write_micro(out)
    for name in ("model.onnx", "latency.txt"):
        (out / name).write_text("of another model")
    code, said, _ = command(run_copy, "--out", out)
    assert code == 0
    assert f"{out}: model.onnx, latency.txt belonged to another model and is gone" in said
    assert sorted(path.name for path in out.iterdir()) == MODEL_FILES
    assert not (run_copy / "model").exists()
    config, tested = export.read_config(out), float(rows_of(run_copy / "states.csv")[-1]["test_accuracy"])
    assert (kept_of(config), config["metrics"]["test_accuracy"]) == (kept, tested)
    assert "mlp_prune_ratio" not in config["provenance"]
    assert_same_function(masked, export.load(out), pictures())


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


CODE = "!!python/object/apply:builtins.open ['{}', w]"
BAD_RUNS = {
    "one more state to come": (lambda f: edit_args(f, pruning_times=3), "not finished"),
    "an epoch of the last state to come": (lambda f: edit_args(f, epochs=2), "not finished"),
    "best.pt of an older state": (lambda f: edit_best(f, state=0), "not finished"),
    "metrics damaged": (lambda f: replace(f / "metrics.jsonl", '{"state": 1'), ""),
    "no states": (lambda f: replace(f / "states.csv", "state,density\n"), ""),
    "no args": (lambda f: (f / "args.yaml").unlink(), "args.yaml"),
    "args damaged": (lambda f: replace(f / "args.yaml", "a: [1"), ""),
    "args with code": (lambda f: replace(f / "args.yaml", CODE.format(f / "ran")), ""),
    "args empty": (lambda f: replace(f / "args.yaml", "{}"), ""),
    "no best.pt": (lambda f: (f / "best.pt").unlink(), "best.pt"),
    "best.pt truncated": (lambda f: replace(f / "best.pt", (f / "best.pt").read_bytes()[:-1000]), "best.pt"),
    "best.pt with code": (lambda f: edit_best(f, more=Payload(f / "ran")), "best.pt"),
    "best.pt of something else": (lambda f: ((f / "best.pt").unlink(), torch.save({"a": 1}, f / "best.pt")), ""),
    "weights of another model": (lambda f: edit_best(f, weights=vit_micro(depth=3).state_dict()), "--arch vit_micro"),
    "nothing there": (shutil.rmtree, ""),
    "a head that works is to go": (lambda f: edit_best(f, kept={**masked_of(f)[1], "blocks.0.attn": []}), "differs"),
}


@pytest.mark.parametrize(("damage", "word"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_what_is_not_a_finished_run_is_refused(run_copy, command, damage, word):
    damage(run_copy)
    differs = word == "differs"
    assert_one_line(command(run_copy), "" if differs or "--arch" in word else run_copy, word, code=1 if differs else 2)
    assert not (run_copy / "model").exists()
    assert not (run_copy / "ran").exists()


IMPORT = "--from_checkpoint four.pt --arch vit_micro"
BAD_FLAGS = {
    "": "folder of a finished run",
    f"RUN {IMPORT} --out OUT": "--from_checkpoint",
    "--from_checkpoint four.pt --out OUT": "--arch",
    IMPORT: "--out",
    "--from_checkpoint four.pt --arch vit_none --out OUT": "vit_none",
    f"{IMPORT} --out OUT --evaluate": "--dataset",
    f"{IMPORT} --out OUT --data here": "--dataset",
    f"{IMPORT} --out OUT --evaluate --dataset digits": "--dataset digits: has 10 classes, the model 4",
    f"{IMPORT} --out OUT --dataset none": "none",
    "RUN --unknown": "--unknown",
    "RUN --late": "--late",  # no abbreviations
    "RUN --arch vit_small": "--arch vit_small",  # would be ignored
    "RUN --out FILE": "--out",
    "RUN --out FILE/model": "--out",
    "RUN --device cuda": "--device cuda",
    "RUN --compile": "--compile",  # nothing would time it
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_contradicting_flags_are_refused_in_one_line(run_copy, command, tmp_path, flags):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (tmp_path / "file").write_text("in the way")
    torch.save(micro(num_classes=4).state_dict(), "four.pt")
    names = {"RUN": run_copy, "OUT": tmp_path / "out", "FILE": tmp_path / "file", "FILE/model": tmp_path / "file" / "m"}
    assert_one_line(command(*(names.get(flag, flag) for flag in flags.split())), BAD_FLAGS[flags])
    assert not (tmp_path / "out").exists()
    assert not (run_copy / "model").exists()


# ------------------------------------------------------------------------------------------------ a foreign checkpoint
def torch_pruned(rows_only):
    """The micro model under torch.nn.utils.prune; the masks zero whole units, their biases stay."""
    model = micro()
    for name, mask in masks_by_hand(model, SOME).items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and not (rows_only and layer.endswith(("proj", "fc2"))):
            prune.custom_from_mask(model.get_submodule(layer), "weight", mask)
    return model


@torch.no_grad()
@pytest.mark.parametrize("layout", ["plain.pt", "rows_only.pt", "nested.pth.tar", "parallel.pth"])
def test_import_of_a_masked_checkpoint(tmp_path, command, layout):
    model = torch_pruned(layout == "rows_only.pt")
    weights = dict(model.state_dict())
    assert "blocks.0.attn.qkv.weight_orig" in weights
    if layout == "nested.pth.tar":
        weights = {"epoch": 3, "state_dict": weights, "best_acc1": 71.5, "optimizer": {"lr": 0.1}}
    elif layout == "parallel.pth":
        weights = {"state_dict": {f"module.{name}": value for name, value in weights.items()}}
    torch.save(weights, layout)
    flags = ["--dataset", "digits", "--evaluate"] if layout == "parallel.pth" else []
    code, _, err = command("--from_checkpoint", layout, "--arch", "vit_micro", "--out", tmp_path / "out", *flags)
    assert (code, err) == (0, "")
    config = export.read_config(tmp_path / "out")
    assert (kept_of(config), config["vit"]["img_size"]) == (SOME, SIZE)
    assert config["provenance"] == {"arch": "vit_micro", "checkpoint": layout}
    facts = (list(DATASETS["digits"].mean) * 3, {"test_accuracy": accuracy_on_digits(model)}) if flags else (None, {})
    assert (config["mean"], config["metrics"]) == facts
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["images"] == (144 if flags else 64)
    assert ("normalised is not known" in (tmp_path / "out" / "README.md").read_text()) == (not flags)
    expected, found = model(pictures()), export.load(tmp_path / "out")(pictures())  # torch's own masks
    assert (expected - found).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def save_weights(path, **changes):
    weights = {**vit_micro().state_dict(), **changes}
    torch.save({name: value for name, value in weights.items() if value is not None}, path)


ODD_MASK = {"norm.weight": None, "norm.weight_orig": torch.ones(DIM), "norm.weight_mask": torch.ones(5)}
BAD_CHECKPOINTS = {
    "with code beside good weights": lambda p: save_weights(p, note=Payload(p.parent / "ran")),
    "a list": lambda p: torch.save([torch.ones(2)], p),
    "names that are numbers": lambda p: torch.save({0: torch.ones(2)}, p),
    "missing": lambda p: None,
    "another model": lambda p: torch.save({"conv1.weight": torch.ones(3, 3)}, p),
    "one tensor more": lambda p: save_weights(p, more=torch.ones(1)),
    "flat position embedding": lambda p: save_weights(p, pos_embed=torch.ones(7)),
    "weight not a tensor": lambda p: save_weights(p, **{"head.weight": 3.0}),
    "mask of another shape": lambda p: save_weights(p, **ODD_MASK),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_checkpoint_that_does_not_fit_is_refused(tmp_path, command, name):
    path = tmp_path / "file.pt"
    BAD_CHECKPOINTS[name](path)
    result = command("--from_checkpoint", path, "--arch", "vit_micro", "--out", tmp_path / "out")
    assert_one_line(result)
    assert path.name in result[2] or "--arch vit_micro" in result[2]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ ONNX
@pytest.fixture(scope="module")
def onnx_file(finished_run, tmp_path_factory):
    """The ONNX file of the run's model, of which a head's and an MLP's branch were emptied, and that model."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = linked(finished_run, tmp_path_factory.mktemp("onnx") / "run")
    masked, kept = masked_of(folder)
    kept |= {"blocks.0.attn": [], "blocks.1.mlp": []}
    masked = masked_like(masked, kept)
    edit_best(folder, kept=kept, weights=masked.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BUILDERS, "vit_micro", vit_micro)
        assert export.main([str(folder), "--onnx"]) == 0
    assert sorted(file.name for file in (folder / "model").iterdir()) == sorted([*MODEL_FILES, "model.onnx"])
    return folder / "model" / "model.onnx", masked


WIDTHS = {"num_classes": CLASSES, "depth": 2, "embed_dim": 64, "num_heads": 2}
STAGES = {"num_classes": CLASSES, "depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2)}
WITH_EMPTY = {
    "vit_tiny_patch16_224": (32, WIDTHS),
    "vit_base_patch16_xp_224": (32, WIDTHS),  # attention and MLP in the same layers
    "eva02_tiny_patch14_224": (28, WIDTHS),
    "beit_base_patch16_224": (32, WIDTHS),
    "vit_small_patch16_18x2_224": (32, WIDTHS),
    "swin_tiny_patch4_window7_224": (28, {**STAGES, "window_size": 7}),
    "swinv2_tiny_window8_256": (32, {**STAGES, "window_size": 8}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", [
    *list(WITH_EMPTY)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(WITH_EMPTY)[2:]),
])  # fmt: skip
def test_exporters_write_what_has_an_empty_attention_and_an_empty_mlp(tmp_path, capfd, name):
    """In one block each, so that no block goes whole. What is written is checked against the model as it is."""
    for package in ("timm", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    size, options = WITH_EMPTY[name]
    model = noisy(models.build_model(f"timm/{name}", img_size=size, **options), scale=0.1)
    keys = list(family_of(model).units(model))
    attentions, mlps = ([key for key in keys if key.endswith(kind)] for kind in ("attn", "mlp"))
    small, _ = export.compact(model, {attentions[0]: [], mlps[-1]: []})
    before = copy.deepcopy(small.state_dict())
    assert export.to_onnx(small, tmp_path / "model.onnx") <= 1e-4
    assert export.torch_export(small, tmp_path / "model.pt2") <= 1e-5
    assert_same_tensors(small.state_dict(), before)
    assert len(capfd.readouterr().err.splitlines()) <= 2


@torch.no_grad()
def test_onnx_runtime_computes_the_same(onnx_file):
    import onnxruntime

    path, masked = onnx_file
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        images = pictures(batch, seed=batch)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        assert found.shape == (batch, CLASSES)
        assert (torch.from_numpy(found) - masked(images)).abs().max() <= 1e-4


@pytest.fixture
def misled(onnx_file, monkeypatch):
    """Torch hands out one model's file or program for every model."""
    program = copy.deepcopy(onnx_file[1])
    monkeypatch.setattr(program, "module", lambda: program, raising=False)
    monkeypatch.setattr(torch.onnx, "export", lambda model, inputs, target, **_: shutil.copy(onnx_file[0], target))
    monkeypatch.setattr(torch.export, "load", lambda _: program)


@pytest.mark.parametrize(("flag", "kind"), [
    *(("--onnx", kind) for kind in WRONG_BIASES), ("--torch_export", "a little"),
    ("--torch_export", "not a number in one class"),
])  # fmt: skip
def test_a_program_that_computes_something_else_is_removed(onnx_file, misled, tmp_path, flag, kind):
    write, bound = (export.to_onnx, 1e-4) if flag == "--onnx" else (export.torch_export, 1e-5)
    other = copy.deepcopy(onnx_file[1]).train()
    assert 0 <= write(other, tmp_path / "same") <= bound
    assert other.training
    with torch.no_grad():
        WRONG_BIASES[kind](other.head.bias)
    with pytest.raises(RunError, match=flag) as caught:
        write(other, tmp_path / "model")
    assert caught.value.code == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["same"]


def test_command_refuses_an_onnx_that_differs(misled, run_copy, command):
    assert_one_line(command(run_copy, "--onnx"), "--onnx", "differs", code=1)
    assert sorted(file.name for file in (run_copy / "model").iterdir()) == MODEL_FILES


def test_missing_onnx_is_one_line_before_any_work_and_costs_nothing_else(run_copy, command, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert_one_line(command(run_copy, "--onnx"), "--onnx", package, "pip install")
            with pytest.raises(RunError, match=package):
                export.to_onnx(micro(), run_copy / "model.onnx")
            assert not (run_copy / "model").exists()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert command(run_copy)[0] == 0
    export.load(run_copy / "model")


# ------------------------------------------------------------------------------------------------ folded and compiled
@torch.no_grad()
def test_layer_scale_goes_into_a_variant(tmp_path):
    masked = masked_like(micro(init_values=0.5), SOME)
    export.write(tmp_path, masked, SOME, batches_of(5), DATASETS["cifar10"], {"arch": "micro"}, {})
    folded = export.write_folded(tmp_path, masked, SOME, batches_of(5))
    assert sorted(path.name for path in (tmp_path / "folded").iterdir()) == MODEL_FILES
    plain, config = export.read_config(tmp_path), export.read_config(tmp_path / "folded")
    assert config.pop("folded") == ["blocks.0.ls1", "blocks.0.ls2", "blocks.1.ls1", "blocks.1.ls2"]
    assert config["parameters"]["removed"] == plain["parameters"]["removed"] - 4 * DIM
    assert "folded model computes" in (tmp_path / "folded" / "README.md").read_text()
    loaded, code = card_model(tmp_path / "folded")
    assert len(code.splitlines()) < 20
    for other in (folded, export.load(tmp_path / "folded"), loaded):
        assert not any("gamma" in name for name, _ in other.named_parameters())
        assert (other(pictures()) - masked(pictures())).abs().max() <= 1e-5


def test_nothing_to_fold_is_one_line_before_any_file(run_copy, command):
    assert_one_line(command(run_copy, "--fold"), "--fold", "no batch norm", "leave it out")
    assert not (run_copy / "model").exists()


@torch.no_grad()
def test_torch_exports_program_computes_the_same_at_any_batch(run_copy, command):
    code, out, err = command(run_copy, "--torch_export")
    assert (code, err) == (0, "")
    assert "torch.export's program differs by" in out
    folder, (masked, _) = run_copy / "model", masked_of(run_copy)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*MODEL_FILES, "model.pt2"])
    program = torch.export.load(folder / "model.pt2").module()
    for batch in (1, 2, 5):
        assert (program(pictures(batch)) - masked(pictures(batch))).abs().max() <= 1e-5


def test_other_forms_of_the_same_weights_stay(run_copy, command):
    """So do the table behind the card and what was measured; not so for other weights."""
    assert command(run_copy, "--evaluate")[0] == 0
    folder = run_copy / "model"
    for name in ("model.onnx", "model_int8.onnx", "onnx.csv", "model.pt2", "latency.txt"):
        (folder / name).write_text("of these weights")
    (folder / "folded").mkdir()
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\n## ONNX\n\na table\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    last = rows_of(run_copy / "states.csv")[-1]["test_accuracy"]
    replace(run_copy / "states.csv", (run_copy / "states.csv").read_text().replace(last, "0.5"))
    assert command(run_copy)[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert (folder / "folded").exists()
    masked, _ = masked_of(run_copy)
    masked.head.bias.data[0] += 1
    edit_best(run_copy, weights=masked.state_dict())
    assert command(run_copy)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == MODEL_FILES
    assert "a table" not in (folder / "README.md").read_text()
    assert export.read_config(folder)["metrics"]["test_accuracy"] == 0.5


FOREIGN = {
    "README.md": "of a project",
    "config.json": '{"provenance": "another program"}',
    "model.onnx": "of a project",
    "parity.json": "[]",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("place", ["out", "run"])
def test_files_of_others_are_not_replaced(run_copy, command, tmp_path, name, place):
    folder = run_copy / "model" if place == "run" else tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text(FOREIGN[name])
    result = command(run_copy, *(["--out", folder] if place == "out" else []))
    assert_one_line(result, str(folder), f"holds {name}, which this program did not write")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, FOREIGN[name])]


@pytest.mark.parametrize("flags", ["--aot", "--latency --compile"])
def test_without_a_compiler_is_one_line_before_any_file(run_copy, command, monkeypatch, flags):
    monkeypatch.setenv("PATH", str(run_copy))
    monkeypatch.delenv("CXX", raising=False)
    assert_one_line(command(run_copy, *flags.split()), flags.split()[-1], "C++ compiler", "install g++")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_one_line(command(run_copy, *flags.split()), "no-such-compiler is missing")
    assert not (run_copy / "model").exists()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_forms_compute_the_same_and_are_timed(run_copy, command):
    code, out, err = command(run_copy, "--aot", "--latency", "--compile")
    assert code == 0, err  # PyTorch may say there that it found no CUDA
    assert "AOTInductor's code differs by" in out
    masked, _ = masked_of(run_copy)
    package = torch._inductor.aoti_load_package(str(run_copy / "model" / "model_aot.pt2"))
    for batch in (1, 2, 5):
        assert (package(pictures(batch)) - masked(pictures(batch))).abs().max() <= 1e-5
    (row, *_) = read_table((run_copy / "model" / "latency.txt").read_text().splitlines()[1:])
    assert float(row["compiled ms"]) > 0
    assert row["compiled faster"].endswith("x")


# ------------------------------------------------------------------------------------------------ sizes and speeds
class Clock:
    """A clock that only the models given to it move, by what a forward pass is said to take."""

    def __init__(self):
        self.now, self.calls = 1000.0, []

    def moved_by(self, model, name, seconds):
        def spend(module, inputs, _):
            self.calls.append((name, tuple(inputs[0].shape), torch.is_grad_enabled(), module.training))
            self.now += seconds(module, len(inputs[0]))

        model.forward = lambda images: images  # copies of the model do the same
        model.register_forward_hook(spend)
        return model


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def zeros_in(model):
    return sum(int((parameter == 0).sum()) for parameter in model.parameters())


def test_tables_of_the_reference(clock, tmp_path):
    """vit_tiny with 18 heads and 2,412 neurons (SPEC 5.3): plan, card, file and table count alike."""
    model = noisy(models.build_model("vit_tiny", 10), scale=0.1)
    kept = {f"blocks.{i}.attn": [0, 1] for i in range(9)} | {f"blocks.{i}.mlp": list(range(268)) for i in range(9)}
    masked = masked_like(model, kept)
    small = export.write(tmp_path, masked, kept, batches_of(1, size=32), DATASETS["cifar10"], {}, {})
    removed = 2_253_514 - 9 * 116 * (192 + 1 + 192)  # one head of three gone, and 116 neurons of 384 in 9 blocks
    macs, full = (macs_of(192, [h] * 9, [n] * 9, 64, 65, 4, 10) for h, n in ((2, 268), (3, 384)))
    config = export.read_config(tmp_path)
    assert config["parameters"] == {"dense": 2_697_610, "removed": removed}
    assert config["macs"] == {"dense": full, "removed": macs}
    assert 0 < (tmp_path / "model.safetensors").stat().st_size - 4 * removed < 200 * len(small.state_dict())

    # masked and dense are two models of one shape; whether zeros are faster than other numbers is the question
    before, zeros = copy.deepcopy(masked.state_dict()), zeros_in(masked)
    assert zeros == 2_697_610 - removed
    speeds = {zeros: 80, 0: 100}
    clock.moved_by(masked, "dense shape", lambda module, images: images / speeds[zeros_in(module)])
    clock.moved_by(small, "removed", lambda module, images: images / 160)
    rows = read_table(export.size_table(masked, small).splitlines())
    assert {shape for _, shape, *_ in clock.calls} == {(64, 3, 32, 32)}
    assert_same_tensors(masked.state_dict(), before)
    dense, cut = ("0.1877 G", "10.79 MB"), (f"{macs / 1e9:.4f} G", f"{4 * removed / 1e6:.2f} MB")
    assert [tuple(row.values()) for row in rows] == [
        ("dense", "2,697,610", *dense, "100"),
        ("masked", f"{removed:,}", *dense, "80"),
        ("pruned", f"{removed:,}", *cut, "160"),
    ]
    dense_only = noisy(models.build_model("vit_tiny", 10), scale=0.1)
    clock.moved_by(dense_only, "dense", lambda module, images: images / 100)
    assert [row["model"] for row in read_table(export.size_table(dense_only, dense_only).splitlines())] == ["dense"]
    assert list(rows[0]) == ["model", "parameters", "MACs", "file", "images/s"]

    head, *table = export.latency_table(masked, small, batch_sizes=(1, 6)).splitlines()
    same = {"faster": "2.00x", "MACs limit": f"{full / macs:.2f}x", "of limit": f"{200 * macs / full:.0f}%"}
    assert read_table(table) == [
        {"batch": "1", "dense ms": "12.50", "pruned ms": "6.25", **same},
        {"batch": "6", "dense ms": "75.00", "pruned ms": "37.50", **same},
    ]
    assert all(part in head for part in ("cpu", f"{torch.get_num_threads()} threads", torch.__version__))


def test_throughput_is_an_interleaved_median_and_leaves_the_models_as_they_were(clock):
    seconds = {"a": iter([99, 1, 7, 2]), "b": iter([99, 4, 4, 80])}
    models = {name: clock.moved_by(micro(), name, lambda _, images, i=i: next(i)) for name, i in seconds.items()}
    models["a"].train()
    models["a"].blocks[0].eval()
    modes = [module.training for model in models.values() for module in model.modules()]
    found = export.throughput(models, batch_size=6, repeats=3, seconds=1e9)
    assert found == {"a": 6 / 2, "b": 6 / 4}  # medians of what follows the warm-up
    assert [name for name, *_ in clock.calls] == ["a", "b"] * 4
    assert {tuple(rest) for _, *rest in clock.calls} == {((6, 3, SIZE, SIZE), False, False)}
    assert [module.training for model in models.values() for module in model.modules()] == modes
    models = {name: clock.moved_by(micro(), name, lambda *_: 1.0) for name in "ab"}
    for seconds, calls in ((0.5, 4), (3, 6), (1e9, 18)):  # it ends in time, once after the warm-up at least
        clock.calls.clear()
        assert export.throughput(models, batch_size=2, repeats=8, seconds=seconds) == {"a": 2.0, "b": 2.0}
        assert len(clock.calls) == calls
