"""timm's Swin and SwinV2: heads and neurons, their cost, and how to save them.

    units = swin_units(model)                                   # {"layers.0.blocks.0.attn": Units(...), ...}
    SWIN.cost(model, kept)                                      # heads, neurons, parameters and MACs that are left

Stages have widths and depths of their own; the layers that merge patches between them are not pruned, nor is the
residual stream. `SWIN` is the family's entry in `families.FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from families.parts import EVA_HEADS, HEADS, NEURONS, Branch, class_name
from families.transformers import TransformerFamily, cost_of, describe_units, kept_of, timm_model
from pruning.units import Kept, Layout, LayoutError, Units, unit_weights

PRUNABLE_SUFFIXES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

# ---------------------------------------------------------------------------------------------- what a unit is


class WindowHeads(Branch):
    """The heads of a window attention, which does not store how wide they are."""

    def width(self, module: nn.Module) -> int:
        if hasattr(module, "scale"):
            return round(module.scale**-2)  # also where no head is left
        return module.proj.in_features // max(1, module.num_heads)


def _set_heads(attn: nn.Module, count: int) -> None:
    attn.num_heads = count


def _windowed(heads: Branch, **differences) -> WindowHeads:
    return WindowHeads(**{**vars(heads), "set_count": _set_heads, **differences})


# by class of block: where the heads of its attention are, which is a WindowAttention of the same file
BLOCKS = {
    "timm.models.swin_transformer.SwinTransformerBlock": _windowed(
        HEADS,
        activation=None,
        tensors={"relative_position_bias_table": (1, None)},
        narrow_class="NarrowWindowAttention",
    ),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _windowed(
        EVA_HEADS, tensors={**EVA_HEADS.tensors, "logit_scale": (0, None)}, narrow_class="NarrowWindowAttentionV2"
    ),
}
POSITIONS = "cpb_mlp.2.weight"  # SwinV2's rows of each head in the layers that make its table of relative positions


def swin_units(model: nn.Module, kinds: Iterable[str] = ("head", "neuron")) -> dict[str, Units]:
    """The heads ("layers.S.blocks.N.attn") and neurons ("layers.S.blocks.N.mlp") of a Swin, in the order of its layers.

    A head owns its rows of `attn.qkv` with their biases and its columns of `attn.proj`, as in a plain ViT; besides, in
    Swin its column of `relative_position_bias_table`, in SwinV2 its `logit_scale`, its shares of `q_bias` and `v_bias`
    and its row of the last layer of `cpb_mlp`.

    Raises:
        LayoutError: the blocks are not those of timm's Swin or SwinV2.
    """
    reason = layout_problem(model)
    if reason:
        raise LayoutError(reason)
    units = {}
    for layer, (name, block) in enumerate(_blocks(model)):
        if "head" in kinds:
            units[f"{name}.attn"] = _heads_of(block, f"{name}.attn.", layer)
        if "neuron" in kinds:
            units[f"{name}.mlp"] = replace(
                NEURONS.units(block.mlp, f"{name}.mlp.", layer), macs=partial(_neuron_macs, block)
            )
    return units


def _heads_of(block: nn.Module, prefix: str, layer: int) -> Units:
    attn, heads = block.attn, BLOCKS[class_name(block)]
    group = heads.units(attn, prefix, layer)
    parts, unranked = dict(group.parts), ()
    if hasattr(attn, "cpb_mlp"):
        unranked = (f"{prefix}{POSITIONS}",)
        parts[unranked[0]] = Layout(0, 1, group.count, 1)
    return replace(
        group,
        parts=parts,
        unranked=unranked,
        output=replace(group.output, windows=True),
        contribution=replace(group.contribution, windows=True),
        macs=partial(_head_macs, block),
    )


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for stage, layer in enumerate(model.layers):
        for index, block in enumerate(layer.blocks):
            yield f"layers.{stage}.blocks.{index}", block


def _branches(model: nn.Module) -> Iterator[tuple[str, nn.Module, Branch]]:
    for name, block in _blocks(model):
        yield f"{name}.attn", block.attn, BLOCKS[class_name(block)]
        yield f"{name}.mlp", block.mlp, NEURONS


def layout_problem(model: nn.Module) -> str | None:
    """Why this model's blocks cannot be pruned by head and neuron; None when they can."""
    kind = type(model).__name__
    stages = getattr(model, "layers", None)
    if not isinstance(stages, nn.Sequential | nn.ModuleList) or not all(hasattr(stage, "blocks") for stage in stages):
        return f"{kind} has no stages with blocks at .layers; not a Swin"
    embed = getattr(model, "patch_embed", None)
    if not isinstance(getattr(embed, "proj", None), nn.Conv2d) or not getattr(embed, "img_size", None):
        return f"{kind}.patch_embed is not one convolution for images of one size; not a Swin"
    for name, block in _blocks(model):
        if class_name(block) not in BLOCKS:
            return f"{kind}.{name} is a {class_name(block)}, not a Swin's block"
        narrow = f"models.narrow.{BLOCKS[class_name(block)].narrow_class}"
        if class_name(block.attn) not in (f"{type(block).__module__}.WindowAttention", narrow):
            return f"{kind}.{name}.attn is a {class_name(block.attn)}, not a Swin's WindowAttention"
        if class_name(block.mlp) != "timm.layers.mlp.Mlp":
            return f"{kind}.{name}.mlp is a {class_name(block.mlp)}, not a Swin's Mlp"
        if not isinstance(block.mlp.fc1, nn.Linear) or not isinstance(block.mlp.norm, nn.Identity):
            return f"{kind}.{name}.mlp has convolutions or a norm inside; not a Swin's Mlp"
    return None if any(True for _ in _blocks(model)) else f"{kind}.layers has no blocks; not a Swin"


# ------------------------------------------------------------------------------------- what it counts and costs


def _head_macs(block: nn.Module, model: nn.Module, group: Units) -> int:
    """MACs per image of one head of this block: N' d D for each of q, k, v and the projection, 2 N' W d for attention.

    W tokens are in a window, N' in all windows: timm pads what does not fill them. SwinV2 makes its table of relative
    positions in each forward pass again; it counts as if for one image.
    """
    (height, width), sides = block.window_size, block.input_resolution
    window = height * width
    tokens = math.ceil(sides[0] / height) * math.ceil(sides[1] / width) * window
    macs = tokens * unit_weights(model, group) + 2 * tokens * window * group.contribution.layout.width
    if hasattr(block.attn, "cpb_mlp"):
        macs += _positions(block.attn) * block.attn.cpb_mlp[2].in_features
    return macs


def _neuron_macs(block: nn.Module, model: nn.Module, group: Units) -> int:
    return math.prod(block.input_resolution) * unit_weights(model, group)


def _positions(attn: nn.Module) -> int:
    height, width = attn.window_size
    return (2 * height - 1) * (2 * width - 1)


def swin_macs(model: nn.Module, counts: Mapping[str, int]) -> int:
    """Forward multiply-accumulates of one image by closed form, norms and activations not counted; see `_head_macs`.

    `counts` gives the units left per key of `swin_units`.
    """
    total = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    for stage in model.layers:
        if hasattr(stage.downsample, "reduction"):
            total += math.prod(stage.output_resolution) * stage.downsample.reduction.weight.numel()
    for name, block in _blocks(model):
        if hasattr(block.attn, "cpb_mlp") and counts[f"{name}.attn"]:
            total += _positions(block.attn) * block.attn.cpb_mlp[0].weight.numel()
    for key, group in swin_units(model).items():
        total += counts[key] * group.macs(model, group)
    return total + (model.head.fc.weight.numel() if isinstance(model.head.fc, nn.Linear) else 0)


def swin_cost(model: nn.Module, kept: Kept) -> dict[str, int]:
    """Heads, neurons, parameters and MACs of `model` once only the kept units are left (keys absent: all kept)."""
    return cost_of(model, swin_units(model), kept, swin_macs)


# ------------------------------------------------------------------------------------------- on disk and back


def describe(small: nn.Module, kept: Kept) -> dict:
    """The architecture of a removed model as plain values: `swin` has the arguments of `timm.create_model`."""
    version = 2 if any(hasattr(block.attn, "cpb_mlp") for _, block in _blocks(small)) else 1
    config = {"swin": {"model_name": small.arch_name.removeprefix("timm/"), **small.arch_args}, "version": version}
    return config | describe_units(swin_units(small), kept)


def rebuild(config: Mapping) -> tuple[nn.Module, dict[str, range]]:
    """The dense model that `describe` knew, with random weights, and how many units of it to keep."""
    model = timm_model(config["swin"])
    return model, kept_of(config, swin_units(model))


class SwinFamily(TransformerFamily):
    """timm's Swin and SwinV2 as a `families.Family`."""

    title = "Swin"
    config_keys = ("swin",)
    timm_files = ("swin_transformer*",)

    problem = staticmethod(layout_problem)
    cost = staticmethod(swin_cost)
    describe = staticmethod(describe)
    rebuild = staticmethod(rebuild)
    find_units = staticmethod(swin_units)
    branches = staticmethod(_branches)

    def prunable_suffixes(self, model: nn.Module) -> tuple[str, ...]:
        return PRUNABLE_SUFFIXES

    def tokens(self, features: Tensor) -> Tensor:
        return features.flatten(1, 2)  # [B, H', W', D]


SWIN = SwinFamily()
