"""Plain Vision Transformers, ours and timm's: their heads and neurons, what these cost, which work, how they are saved.

    units = vit_units(model)                                    # {"blocks.0.attn": Units(...), "blocks.0.mlp": ...}
    VIT.cost(model, kept)                                       # heads, neurons, parameters and MACs that are left

A model comes in; units, counts and plain values go out. `VIT` is the family's entry in `families.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from models.vit import VisionTransformer
from pruning.units import Kept, Layout, LayoutError, Tap, Units, count_parameters, unit_parameters, unit_weights
from utils import RunError

PRUNABLE_SUFFIXES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

# Where a plain ViT's Attention and Mlp come from; others compute something else with the same layers.
PLAIN_MODULES = ("models.vit", "timm.layers.attention", "timm.layers.mlp", "timm.models.vision_transformer")


# ---------------------------------------------------------------------------------------------- what a unit is


def vit_units(model: nn.Module, kinds: Iterable[str] = ("head", "neuron")) -> dict[str, Units]:
    """The heads ("blocks.N.attn") and neurons ("blocks.N.mlp") of a ViT, in the order of its layers.

    Head h owns rows {c * A + h * d + i : c = 0, 1, 2; i < d} of `attn.qkv`, their biases, and columns
    h * d .. (h + 1) * d - 1 of `attn.proj` (A = heads * d). Neuron j owns row and bias j of `mlp.fc1` and column
    j of `mlp.fc2`.

    Raises:
        LayoutError: the blocks are not those of a plain ViT.
    """
    reason = layout_problem(model)
    if reason:
        raise LayoutError(reason)
    units = {}
    for layer, block in enumerate(model.blocks):
        if "head" in kinds:
            units[f"blocks.{layer}.attn"] = heads_of(block.attn, f"blocks.{layer}.attn.", layer)
        if "neuron" in kinds:
            units[f"blocks.{layer}.mlp"] = neurons_of(block.mlp, f"blocks.{layer}.mlp.", layer)
    return units


def heads_of(attn: nn.Module, prefix: str, layer: int) -> Units:
    """The heads of one attention module; `prefix` is what its parameters' names start with."""
    count, width = attn.num_heads, attn.head_dim
    parts = {f"{prefix}qkv.weight": Layout(0, 3, count, width)}
    if attn.qkv.bias is not None:
        parts[f"{prefix}qkv.bias"] = Layout(0, 3, count, width)
    parts[f"{prefix}proj.weight"] = Layout(1, 1, count, width)
    output = Tap(f"{prefix}qkv", "output", Layout(-1, 3, count, width))
    contribution = Tap(f"{prefix}proj", "input", Layout(-1, 1, count, width))
    return Units("head", layer, count, parts, output, contribution, resize=_set_heads, macs=unit_macs, listed=True)


def _set_heads(attn: nn.Module, count: int) -> None:
    attn.num_heads, attn.attn_dim = count, count * attn.head_dim
    if count == 0 and hasattr(attn, "fused_attn"):
        attn.fused_attn = False  # timm's fused path dies on no heads at all under torch 2.9


def neurons_of(mlp: nn.Module, prefix: str, layer: int) -> Units:
    """The neurons of one MLP; `prefix` is what its parameters' names start with."""
    count = mlp.fc1.out_features
    parts = {f"{prefix}fc1.weight": Layout(0, 1, count, 1)}
    if mlp.fc1.bias is not None:
        parts[f"{prefix}fc1.bias"] = Layout(0, 1, count, 1)
    parts[f"{prefix}fc2.weight"] = Layout(1, 1, count, 1)
    output = Tap(f"{prefix}fc1", "output", Layout(-1, 1, count, 1))
    contribution = Tap(f"{prefix}fc2", "input", Layout(-1, 1, count, 1))
    return Units("neuron", layer, count, parts, output, contribution, macs=unit_macs)


def layout_problem(model: nn.Module) -> str | None:
    """Why this model's blocks cannot be pruned by head and neuron; None when they can."""
    kind = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(blocks) == 0:
        return f"{kind} has no transformer blocks at .blocks; only plain ViTs are supported"
    embed = getattr(model, "patch_embed", None)
    if not isinstance(getattr(embed, "proj", None), nn.Conv2d) or not hasattr(embed, "num_patches"):
        return f"{kind}'s patch embedding is not one convolution (hybrid, NaFlex); not a plain ViT"
    for index, block in enumerate(blocks):
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        where = f"{kind}.blocks.{index}"
        if not all(isinstance(getattr(attn, part, None), nn.Linear) for part in ("qkv", "proj")):
            return f"{where}.attn has no linear qkv and proj (windowed or split attention); not a plain ViT"
        if not all(isinstance(getattr(mlp, part, None), nn.Linear) for part in ("fc1", "fc2")):
            return f"{where}.mlp has no linear fc1 and fc2; not a plain ViT"
        heads, width = getattr(attn, "num_heads", None), getattr(attn, "head_dim", None)
        if heads is None or width is None or attn.qkv.out_features != 3 * heads * width:
            return f"{where}.attn: qkv does not hold 3 x heads x head_dim rows; not a plain ViT"
        if attn.proj.in_features != heads * width:
            return f"{where}.attn: qkv and proj disagree on the number of heads"
        if getattr(attn, "gate", None) is not None:
            return f"{where}.attn is gated; gated attention is not supported"
        if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            return f"{where}.attn has a norm after attention (sub-LayerNorm), which mixes heads"
        if mlp.fc1.out_features != mlp.fc2.in_features:
            return f"{where}.mlp gates its hidden layer (SwiGLU, GLU): fc1 and fc2 widths differ"
        if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
            return f"{where}.mlp has a norm inside (sub-LayerNorm), which mixes neurons"
        for place, part, known in (("attn", attn, "Attention"), ("mlp", mlp, "Mlp")):
            if type(part).__name__ != known or type(part).__module__ not in PLAIN_MODULES:
                found = f"{type(part).__module__}.{type(part).__name__}"
                return f"{where}.{place} is a {found}, not a plain ViT's {known}"
    return None


def prunable_layers(model: nn.Module, patch_embed: bool = False) -> dict[str, nn.Module]:
    """Layers whose weights count as prunable, by name and in the model's order."""
    suffixes = PRUNABLE_SUFFIXES + (("patch_embed.proj",) if patch_embed else ())
    return {name: module for name, module in model.named_modules() if name.endswith(suffixes)}


# ------------------------------------------------------------------------------------- what it counts and costs


def unit_macs(model: nn.Module, group: Units) -> int:
    """Forward multiply-accumulates per image that go with one unit (N tokens, width d, embedding D).

    A head costs N d D for each of q, k, v and the projection, and 2 N^2 d for its attention; a neuron 2 N D.
    """
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    attention = 2 * tokens * tokens * group.scored[1].width if group.kind == "head" else 0
    return tokens * unit_weights(model, group) + attention


def vit_macs(model: nn.Module, counts: Mapping[str, int] | None = None) -> int:
    """Forward multiply-accumulates per image of a ViT by closed form, norms and activations not counted.

    `torch.utils.flop_counter` does not see fused attention on the CPU, hence the formula. `counts` gives the
    units left per key of `vit_units`; None counts the model as it is.
    """
    units = vit_units(model)
    total = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    for key, group in units.items():
        left = group.count if counts is None else counts.get(key, group.count)
        total += left * unit_macs(model, group)
    if isinstance(model.head, nn.Linear):
        total += model.head.weight.numel()
    return total


def vit_cost(model: nn.Module, kept: Kept) -> dict[str, int]:
    """Heads, neurons, parameters and MACs of `model` once only the kept units are left (keys absent: all stay)."""
    units = vit_units(model)
    left = {key: len(kept[key]) if key in kept else group.count for key, group in units.items()}
    gone = sum((group.count - left[key]) * unit_parameters(model, group) for key, group in units.items())
    return {
        "heads": sum(left[key] for key, group in units.items() if group.kind == "head"),
        "neurons": sum(left[key] for key, group in units.items() if group.kind == "neuron"),
        "parameters": count_parameters(model) - gone,
        "macs": vit_macs(model, left),
    }


# ---------------------------------------------------------------------------------------------- which of it works


@torch.no_grad()
def find_working_units(model: nn.Module) -> dict[str, list[int]]:
    """Which heads and neurons still work, for a model whose weights were pruned one by one: {units key: ids}.

    A head is dead when its `attn.proj` columns are zero or its v rows are, a neuron when its `mlp.fc2` column or its
    `mlp.fc1` row is. `fold_dead_units_` has to come before they are removed.
    """
    alive = {}
    for key, group in vit_units(model).items():
        (rows_name, rows), *_, (columns_name, columns) = group.parts.items()
        incoming = rows.per_unit(model.get_parameter(rows_name))
        if group.kind == "head":
            incoming = incoming.unflatten(1, (3, -1))[:, 2]  # q and k only choose where v is read
        works = incoming.any(1)
        branch = model.get_submodule(key)
        if (branch.proj if group.kind == "head" else branch.fc2).bias is None:
            works[:] = True  # nothing to fold a constant into
        works &= columns.per_unit(model.get_parameter(columns_name)).any(1)
        alive[key] = works.nonzero().flatten().tolist()
    return alive


@torch.no_grad()
def fold_dead_units_(model: nn.Module, alive: Kept) -> None:
    """Add what dead units still emit, the constant of their biases, to the output bias of their branch, in place.

    A head whose v rows are zero emits its v bias whatever it attends to, a neuron with a zero row act(bias).
    """
    for key, group in vit_units(model).items():
        working = set(alive.get(key, range(group.count)))
        dead = [unit for unit in range(group.count) if unit not in working]
        branch = model.get_submodule(key)
        source, output = (branch.qkv, branch.proj) if group.kind == "head" else (branch.fc1, branch.fc2)
        if not dead or source.bias is None or output.bias is None:
            continue
        rows, columns = group.parts[f"{key}.{'qkv' if group.kind == 'head' else 'fc1'}.bias"], group.contribution.layout
        constant = rows.split(source.bias)[-1]  # [count, width]; of q, k and v the last
        if group.kind == "neuron":
            constant = branch.act(constant)
        weight = columns.split(output.weight)[:, 0]  # [D, count, width]
        output.bias += torch.einsum("duw,uw->d", weight[:, dead], constant[dead])


# ------------------------------------------------------------------------------------------- on disk and back


def describe(small: nn.Module, kept: Kept) -> dict:
    """The architecture of a removed model as plain values, enough to build it again.

    `vit` has the arguments of VisionTransformer, here and in timm; `timm` the name and arguments of
    `timm.create_model`.
    """
    blocks = list(small.blocks)
    if isinstance(small, VisionTransformer):
        width = small.embed_dim
        config = {
            "vit": {
                "img_size": small.patch_embed.img_size[0],
                "patch_size": small.patch_embed.patch_size[0],
                "num_classes": small.head.out_features,
                "embed_dim": width,
                "depth": len(blocks),
                "num_heads": width // blocks[0].attn.head_dim,
            }
        }
        if small.init_values:
            config["vit"]["init_values"] = small.init_values
    else:
        config = {"timm": {"model_name": small.arch_name.removeprefix("timm/"), **small.arch_args}}
    return config | {
        "head_dim": blocks[0].attn.head_dim,
        "heads": [block.attn.num_heads for block in blocks],
        "neurons": [block.mlp.fc1.out_features for block in blocks],
        "kept_heads": [kept[f"blocks.{layer}.attn"] for layer in range(len(blocks))],
        "kept_neurons": [kept[f"blocks.{layer}.mlp"] for layer in range(len(blocks))],
    }


def rebuild(config: Mapping) -> tuple[nn.Module, dict[str, range]]:
    """The dense model that `describe` knew, with random weights, and how many units of it to keep."""
    model = VisionTransformer(**config["vit"]) if "vit" in config else _timm_model(config["timm"])
    kept = {f"blocks.{layer}.attn": range(heads) for layer, heads in enumerate(config["heads"])}
    kept |= {f"blocks.{layer}.mlp": range(neurons) for layer, neurons in enumerate(config["neurons"])}
    return model, kept


def _timm_model(arguments: Mapping) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RunError("this model was made from a timm model: pip install timm") from error
    return timm.create_model(**arguments)


_SNIPPET = """\
import json
import timm
from safetensors.torch import load_file
from torch import nn

with open("config.json") as file:
    config = json.load(file)
{build}
for block, heads, neurons in zip(model.blocks, config["heads"], config["neurons"]):
    attn, mlp, width = block.attn, block.mlp, heads * config["head_dim"]
    dim, bias = attn.proj.out_features, attn.qkv.bias is not None
    attn.num_heads, attn.attn_dim, attn.fused_attn = heads, width, heads > 0
    attn.qkv, attn.proj = nn.Linear(dim, 3 * width, bias=bias), nn.Linear(width, dim)
    mlp.fc1, mlp.fc2 = nn.Linear(dim, neurons), nn.Linear(neurons, dim)
model.load_state_dict(load_file("model.safetensors"))
model.eval()
"""
LOADING_SNIPPETS = {
    "vit": _SNIPPET.format(build='model = timm.models.vision_transformer.VisionTransformer(**config["vit"])'),
    "timm": _SNIPPET.format(build='model = timm.create_model(**config["timm"])'),
}


class VitFamily:
    """Plain ViTs as `families.Family` asks for them."""

    title = "ViT"
    kinds = ("head", "neuron")
    counts_by = "ratio"
    classifier = "head"  # distilled models have `head` and `head_dist`
    config_keys = ("vit", "timm")

    problem = staticmethod(layout_problem)
    cost = staticmethod(vit_cost)
    describe = staticmethod(describe)
    rebuild = staticmethod(rebuild)

    def prunable_layers(self, model: nn.Module, first: bool = False) -> dict[str, nn.Module]:
        return prunable_layers(model, patch_embed=first)

    def units(self, model: nn.Module, kinds: Iterable[str] | None = None, first: bool = True) -> dict[str, Units]:
        return vit_units(model, self.kinds if kinds is None else kinds)

    def working_units_(self, model: nn.Module) -> dict[str, list[int]]:
        kept = find_working_units(model)
        fold_dead_units_(model, kept)
        return kept

    def image_size(self, model: nn.Module) -> int:
        return model.patch_embed.img_size[0]

    def memory_format(self, removed: bool, precision: torch.dtype | None) -> torch.memory_format | None:
        return None

    def card(self, config: Mapping) -> tuple[str, str]:
        left = f"Heads per block: {config['heads']}\nNeurons per block: {config['neurons']}"
        snippet = LOADING_SNIPPETS["vit" if "vit" in config else "timm"]
        return left, f"## Loading it with timm alone\n\n```python\n{snippet}```\n"


VIT = VitFamily()
