"""Vision Transformers, ours and timm's: heads and neurons, their cost, which of them are dead, and how to save them.

    units = vit_units(model)                                    # {"blocks.0.attn": Units(...), "blocks.0.mlp": ...}
    VIT.cost(model, kept)                                       # heads, neurons, parameters and MACs that are left

Which rows and columns a head or neuron of each class of attention and MLP owns is written in `families/parts.py`. `VIT`
is the family's entry in `families.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from families.branches import drop_empty_blocks_, with_scale
from families.cards import traits_of
from families.parts import (
    BRANCHES,
    GATED_NEURONS,
    PARALLEL_BLOCKS,
    PARALLEL_HEADS,
    PARALLEL_NEURONS,
    Branch,
    class_name,
    head_dim,
)
from families.transformers import (
    Branches,
    TransformerFamily,
    cost_of,
    describe_units,
    find_working,
    fold_dead_,
    kept_of,
    timm_model,
)
from models.merging import matching_macs, merge_tokens_, merged_tokens
from models.vit import VisionTransformer
from pruning.units import Kept, Layout, LayoutError, Stack, Units

PRUNABLE_SUFFIXES = (
    *(f"attn.{name}" for name in ("qkv", "q_proj", "k_proj", "v_proj", "gate", "proj")),
    *(f"mlp.{name}" for name in ("fc1", "fc1_g", "fc1_x", "fc2")),
)
PARALLEL_SUFFIXES = (".in_proj", ".attn_out_proj", ".mlp_out_proj", ".out_proj")


# ---------------------------------------------------------------------------------------------- what a unit is


def vit_units(model: nn.Module, kinds: Iterable[str] = ("head", "neuron")) -> dict[str, Units]:
    """The heads ("blocks.N.attn") and neurons ("blocks.N.mlp") of a ViT, in the order of its layers.

    Head h owns rows {c * A + h * d + i : c = 0, 1, 2; i < d} of `attn.qkv`, their biases, and columns
    h * d .. (h + 1) * d - 1 of `attn.proj` (A = heads * d). Neuron j owns row and bias j of `mlp.fc1` and column
    j of `mlp.fc2`. Other classes of attention and MLP divide theirs alike, see `families.parts.BRANCHES`.

    Raises:
        LayoutError: the blocks are not those of a plain ViT.
    """
    units, layers = {}, {"head": 0, "neuron": 0}
    for key, name, module, branch in known_branches(model):
        if branch.kind in kinds:
            group = with_scale(model, key, module, branch.units(module, f"{name}.", layers[branch.kind]))
            if branch.kind == "head" and getattr(model, "rope_mixed", False):
                group = replace(group, followers={**group.followers, "rope.freqs": Stack(1, group.layer, group.count)})
            units[key] = group
        layers[branch.kind] += 1
    return units


def known_branches(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, Branch]]:
    """(units key, module's name, module, what its units own) of every attention and MLP; raises as `vit_units`."""
    reason = layout_problem(model)
    if reason:
        raise LayoutError(reason)
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        if class_name(block) in PARALLEL_BLOCKS:
            yield f"{name}.attn", name, block, PARALLEL_HEADS
            yield f"{name}.mlp", name, block, PARALLEL_NEURONS
        else:
            for path, module in _modules_of(block):
                yield f"{name}.{path}", f"{name}.{path}", module, BRANCHES[class_name(module)]


def _modules_of(block: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """The attention and MLP modules of a block by their path in it; those it should have and has not are None."""
    if hasattr(block, "attns") and hasattr(block, "ffns"):
        yield from ((f"attns.{index}.attn", branch.attn) for index, branch in enumerate(block.attns))
        yield from ((f"ffns.{index}.mlp", branch.mlp) for index, branch in enumerate(block.ffns))
    else:
        yield "attn", getattr(block, "attn", None)
        yield "mlp", getattr(block, "mlp", None)


def layout_problem(model: nn.Module) -> str | None:
    """Why this model's blocks cannot be pruned by head and neuron; None when they can."""
    kind = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(blocks) == 0:
        return f"{kind} has no transformer blocks at .blocks; only plain ViTs are supported"
    embed = getattr(model, "patch_embed", None)
    if not isinstance(getattr(embed, "proj", None), nn.Conv2d) or not hasattr(embed, "num_patches"):
        return f"{kind}'s patch embedding is not one convolution (hybrid, NaFlex); not a plain ViT"
    if getattr(model, "rel_pos_bias", None) is not None:
        return f"{kind}.rel_pos_bias is one table of relative positions for the heads of all blocks; not supported"
    for index, block in enumerate(blocks):
        if class_name(block) in PARALLEL_BLOCKS:
            continue
        for path, module in _modules_of(block):
            problem = _attention_problem if path.endswith("attn") else _mlp_problem
            if reason := problem(f"{kind}.blocks.{index}.{path}", module):
                return reason
    return None


def _attention_problem(where: str, attn: nn.Module | None) -> str | None:
    branch = BRANCHES.get(class_name(attn))
    inputs = [getattr(attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    one = isinstance(getattr(attn, "qkv", None), nn.Linear)
    three = branch is not None and all(isinstance(layer, nn.Linear) for layer in inputs)
    if not isinstance(getattr(attn, "proj", None), nn.Linear) or not (one or three):
        return f"{where} has no linear qkv and proj (windowed or split attention); not a plain ViT"
    countable = hasattr(attn, "num_heads") and (hasattr(attn, "head_dim") or branch is not None)
    width = attn.num_heads * head_dim(attn) if countable else 0
    if not countable or (one and attn.qkv.out_features != 3 * width):
        return f"{where}: qkv does not hold 3 x heads x head_dim rows; not a plain ViT"
    if three and any(layer.out_features != width for layer in inputs):
        return f"{where} has fewer keys and values than heads (grouped-query attention), which several heads share"
    if attn.proj.in_features != width:
        return f"{where}: qkv and proj disagree on the number of heads"
    if branch is None or branch.kind != "head":
        return f"{where} is a {class_name(attn)}, not a plain ViT's Attention"
    return _norm_problem(f"{where} has a norm after attention (sub-LayerNorm)", branch.norm_between(attn), "heads")


def _mlp_problem(where: str, mlp: nn.Module | None) -> str | None:
    branch = BRANCHES.get(class_name(mlp))
    pairs = (("fc1", "fc2"), ("fc1_g", "fc1_x", "fc2")) if branch is GATED_NEURONS else (("fc1", "fc2"),)
    if not any(all(isinstance(getattr(mlp, name, None), nn.Linear) for name in names) for names in pairs):
        return f"{where} has no linear fc1 and fc2; not a plain ViT"
    if branch is None or branch.kind != "neuron":
        if mlp.fc1.out_features != mlp.fc2.in_features:
            return f"{where} gates its hidden layer (SwiGLU, GLU): fc1 and fc2 widths differ"
        return f"{where} is a {class_name(mlp)}, not a plain ViT's Mlp"
    for name, streams in branch.inputs.items():
        layer = getattr(mlp, name, None)
        if layer is not None and layer.out_features != streams * mlp.fc2.in_features:
            return f"{where} gates its hidden layer (SwiGLU, GLU): {name} and fc2 widths differ"
    return _norm_problem(f"{where} has a norm inside (sub-LayerNorm)", branch.norm_between(mlp), "neurons")


def _norm_problem(what: str, norm: nn.Module | None, units: str) -> str | None:
    # a LayerNorm can still count removed units, as the zeros that they were
    known = isinstance(norm, nn.LayerNorm) and type(norm).__name__ in ("LayerNorm", "NarrowLayerNorm")
    if norm is None or (known and norm.weight is not None and norm.bias is not None):
        return None
    return f"{what}, which mixes {units}; of norms there only a LayerNorm with weight and bias is supported"


def prunable_suffixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of the layers end with whose weights count as prunable."""
    parallel = any(class_name(block) in PARALLEL_BLOCKS for block in getattr(model, "blocks", ()))
    return PRUNABLE_SUFFIXES + (PARALLEL_SUFFIXES if parallel else ())


# ------------------------------------------------------------------------------------- what it counts and costs


def vit_macs(model: nn.Module, counts: Mapping[str, int] | None = None) -> int:
    """Forward multiply-accumulates per image of a ViT by closed form, norms and activations not counted.

    `torch.utils.flop_counter` does not see fused attention on the CPU, hence the formula. `counts` gives the
    units left per key of `vit_units`; None counts the model as it is. Where tokens merge, the similarities by which
    they are chosen count too, the averages, one product a value, do not.
    """
    units = vit_units(model)
    total = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel() + _stem_macs(model.patch_embed)
    for key, group in units.items():
        left = group.count if counts is None else counts.get(key, group.count)
        total += left * group.macs(model, group)
    heads = (model.head, getattr(model, "head_dist", None))
    total += sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))
    return total + _pool_macs(model) + matching_macs(model)


_STEM_MACS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # a ResNet's take a second


def _stem_macs(embed: nn.Module) -> int:
    """The cost of convolutions before the patches, in a stem or a hybrid's backbone."""
    if not hasattr(embed, "backbone"):
        return 0
    if embed not in _STEM_MACS:
        _STEM_MACS[embed] = _count_macs(embed)
    return _STEM_MACS[embed]


def _count_macs(embed: nn.Module) -> int:
    # how large what each of them gives is comes out of a pass, which needs no memory and no arithmetic on "meta"
    tensors = {**dict(embed.backbone.named_parameters()), **dict(embed.backbone.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    channels = next(module.in_channels for module in embed.backbone.modules() if isinstance(module, nn.Conv2d))
    pixels = torch.empty(2, channels, *embed.img_size, device="meta", dtype=next(iter(shapes.values())).dtype)
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(embed.backbone, shapes, (pixels,))
    return counter.get_total_flops() // 4  # two for each product and sum, of two images


def _pool_macs(model: nn.Module) -> int:
    """What an attention pool costs: its keys and values see all tokens, everything else only the few latent ones."""
    pool = getattr(model, "attn_pool", None)
    if not hasattr(pool, "kv"):
        return 0
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    layers = [module.weight.numel() for module in pool.modules() if isinstance(module, nn.Linear)]
    keys_values = pool.kv.weight.numel()
    products = 2 * tokens * pool.num_heads * pool.head_dim
    return tokens * keys_values + pool.latent_len * (sum(layers) - keys_values + products)


def vit_cost(model: nn.Module, kept: Kept) -> dict[str, int]:
    """Heads, neurons, parameters and MACs of `model` once only the kept units are left (keys absent: all kept)."""
    return cost_of(model, vit_units(model), kept, vit_macs)


def find_working_units(model: nn.Module) -> dict[str, list[int]]:
    """Which heads and neurons still work; see `families.transformers.find_working`.

    Where tokens merge, a head also works whose keys are not zero: they have a say in which ones do.
    """
    alive = find_working(_branches(model))
    for key, module, branch in _branches(model) if merged_tokens(model) else ():
        if branch.kind == "head":
            layer, layout = module.qkv, Layout(0, 3, branch.count(module), branch.width(module))
            rows = [layout.split(tensor)[1].flatten(1) for tensor in layer.parameters()]
            alive[key] = sorted({*alive[key], *torch.cat(rows, 1).any(1).nonzero().flatten().tolist()})
    return alive


def fold_dead_units_(model: nn.Module, alive: Kept) -> None:
    """Fold what dead units still emit into output biases, in place; see `families.transformers.fold_dead_`."""
    fold_dead_(_branches(model), alive)


def _branches(model: nn.Module) -> Branches:
    return ((key, module, branch) for key, _, module, branch in known_branches(model))


# ------------------------------------------------------------------------------------------- on disk and back


def describe(small: nn.Module, kept: Kept) -> dict:
    """The architecture of a removed model as plain values, enough to build it again.

    `vit` has the arguments of VisionTransformer, here and in timm; `timm` the name and arguments of
    `timm.create_model`; `stem` the channels into and out of each convolution of a stem; `token_merge` how many tokens
    each block merges; `blocks`, where some were removed, the numbers of the others in the dense model.
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
        if hasattr(small.patch_embed, "channels"):
            config["stem"] = small.patch_embed.channels
    else:
        config = {"timm": {"model_name": small.arch_name.removeprefix("timm/"), **small.arch_args}}
    units = vit_units(small)
    first_heads = next(group for group in units.values() if group.kind == "head")
    if hasattr(small, "blocks_left"):
        config["blocks"] = small.blocks_left
        if "timm" in config:
            config["timm"]["depth"] = len(blocks)
    config |= {**traits_of(small), "head_dim": first_heads.contribution.layout.width}
    if merged_tokens(small):
        config["token_merge"] = merged_tokens(small)
    return config | describe_units(units, kept)


def rebuild(config: Mapping) -> tuple[nn.Module, dict[str, range]]:
    """The model that `describe` knew, with random weights and dense blocks, and how many units of it to keep."""
    if "vit" in config:
        # blocks of as many neurons as the widest has: how many there were in the dense model is not written
        ratio = max(2.0, (max(config["neurons"]) + 0.5) / config["vit"]["embed_dim"])
        model = VisionTransformer(**config["vit"], mlp_ratio=ratio, stem="conv" if "stem" in config else "patch")
    else:
        model = timm_model(config["timm"])
    merge_tokens_(model, config.get("token_merge", 0))
    return model, kept_of(config, vit_units(model))


class VitFamily(TransformerFamily):
    """ViTs as a `families.Family`."""

    title = "ViT"
    config_keys = ("vit", "timm")
    timm_files = ("vision_transformer*", "eva", "deit", "beit")

    problem = staticmethod(layout_problem)
    cost = staticmethod(vit_cost)
    describe = staticmethod(describe)
    rebuild = staticmethod(rebuild)
    prunable_suffixes = staticmethod(prunable_suffixes)
    find_units = staticmethod(vit_units)
    branches = staticmethod(_branches)

    def working_units_(self, model: nn.Module) -> dict[str, list[int]]:
        alive = find_working_units(model)
        fold_dead_units_(model, alive)
        return alive

    def drop_empty_blocks_(self, model: nn.Module) -> None:
        drop_empty_blocks_(model, self.branches(model))


VIT = VitFamily()
