"""Pruning of whole attentions and MLPs of a transformer, and removal of blocks that are empty.

    branches = branch_units(model, units, family.branches(model))   # {"blocks.0.attn": Units of kind "branch", ...}
    drop_empty_blocks_(model, known)                                # fewer blocks, the same function
    bypass_empty_(model, known)                                     # no layer of width zero, the same function

A branch without units adds a constant to every token: its output bias, times the factors of a LayerScale. The constant
of an empty block is added to a bias before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from families.parts import Branch, Branches, class_name
from models.merging import merged_tokens
from pruning.units import Layout, LayoutError, Units

# Blocks that add to the residual stream what a branch's output layer gives, times the factors of a LayerScale at most.
RESIDUAL_BLOCKS = (
    "models.vit.Block",
    "timm.models.vision_transformer.Block",
    "timm.models.vision_transformer.ParallelThingsBlock",
    "timm.models.eva.EvaBlock",
    "timm.models.beit.Block",
)
# Models with these index their blocks by number: mixed RoPE's frequencies, or how many keys and values each has.
_NUMBERED = ("timm.layers.attention.AttentionRope", "models.narrow.NarrowAttentionRope")
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")


# ------------------------------------------------------------------------------------------ a branch as one unit


def branch_units(model: nn.Module, units: Mapping[str, Units], branches: Branches) -> dict[str, Units]:
    """Each attention and MLP as one unit of kind "branch", by the key of its heads or neurons in `units`.

    All its parameters are parts. Weight criteria score its weights into and out of heads or neurons; activations are
    those of its output layer without the bias, which outlives the branch, times its LayerScale; saliency sees
    all heads or neurons as one.

    Raises:
        LayoutError: attention and MLP of a block share their layers.
    """
    found = {}
    for key, module, branch in branches:
        group, output = units[key], branch.output_name(module)
        if group.module != key:
            raise LayoutError(f"{group.module} computes attention and MLP in the same layers: neither can go alone")
        names = [name.removesuffix("_orig") for name, _ in module.named_parameters()]
        layout = replace(group.contribution.layout, count=1, width=group.count * group.contribution.layout.width)
        found[key] = Units(
            "branch",
            group.layer,
            1,
            {f"{key}.{name}": Layout(0, 1, 1, len(_tensor(module, name))) for name in names},
            output=replace(
                group.contribution, side="output", layout=Layout(-1, 1, 1, _width(module, output)),
                compute=partial(_added, model, key, module),
            ),
            contribution=replace(group.contribution, layout=layout),
            macs=partial(_macs_of_all, group),
            listed=True,
            weights=(*group.weights, f"{key}.{output}.weight"),
            module=key,
        )  # fmt: skip
    return found


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _width(module: nn.Module, output: str) -> int:
    return getattr(module, output).out_features


def _added(model: nn.Module, key: str, module: nn.Module, output: nn.Linear, given: Tensor) -> Tensor:
    """What the residual stream loses when the branch is pruned."""
    given = given if output.bias is None else given - output.bias
    scale = layer_scale(model, key, module)
    return given if scale is None else given * scale[2]


def _macs_of_all(group: Units, model: nn.Module, _: Units) -> int:
    return group.count * group.macs(model, group)


def layer_scale(model: nn.Module, key: str, module: nn.Module) -> tuple[nn.Module, str, nn.Parameter] | None:
    """(block, what it calls them there, the factors [D]) at the end of a branch; None where it has none."""
    path, _, leaf = key.rpartition(".")
    block, number = model.get_submodule(path), 1 if leaf == "attn" else 2
    for name in (f"ls{number}", f"gamma_{number}", "ls") if block is not module else ():
        scale = getattr(block, name, None)
        factor = getattr(scale, "gamma", scale)
        if isinstance(factor, nn.Parameter):
            return block, name, factor
    return None


def with_scale(model: nn.Module, key: str, module: nn.Module, group: Units) -> Units:
    """The units of a branch, whose reader knows the factors behind it."""
    scale = layer_scale(model, key, module)
    if scale is None:
        return group
    block, name, factor = scale
    leaf = name if getattr(block, name) is factor else f"{name}.gamma"
    return replace(group, reader=replace(group.reader, scale=f"{key.rpartition('.')[0]}.{leaf}"))


# ------------------------------------------------------------------------------------------ branches without units


class EmptyBranch(nn.Module):
    """Attention without heads or an MLP without neurons: tokens [..., D] to the bias of its output layer."""

    num_heads = 0  # models.merging reads it

    def __init__(self, bias: Tensor | None, head_dim: int):
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.head_dim = head_dim

    def forward(self, x: Tensor, *_, **__) -> Tensor:
        return torch.zeros_like(x) if self.bias is None else self.bias.expand(x.shape)


def bypass_empty_(model: nn.Module, branches: Branches) -> None:
    """Put an `EmptyBranch` in the place of each attention without heads and each MLP without neurons, in place.

    Exporters and ONNX Runtime refuse some operations on tensors of width zero. The names of parameters change, and
    with them the state dict. Branches that share their layers with another (`ParallelScalingBlock`) are not replaced.
    """
    for key, module, branch in list(branches):
        path, _, leaf = key.rpartition(".")
        if branch.count(module) == 0 and getattr(model.get_submodule(path), leaf, None) is module:
            bias = getattr(module, branch.output_name(module)).bias
            setattr(model.get_submodule(path), leaf, EmptyBranch(bias, branch.width(module)))


# ------------------------------------------------------------------------------------------ blocks that do nothing


@torch.no_grad()
def drop_empty_blocks_(model: nn.Module, branches: Branches) -> None:
    """Remove blocks without units from `model.blocks`, in place; `model.blocks_left` holds the numbers of the others.

    The constant that such a block adds to each token is added to the output bias of the last branch of the block before
    it, divided by that branch's LayerScale, or, for the first block, to position embedding and prefix tokens. The block
    is kept where that is impossible: after a norm before all blocks, before a factor of zero, where blocks are not
    `RESIDUAL_BLOCKS`, or where they merge tokens. The last block of a model without any other is kept, too.
    """
    known = all(class_name(block) in RESIDUAL_BLOCKS for block in model.blocks)
    if not known or merged_tokens(model) or any(class_name(module) in _NUMBERED for module in model.modules()):
        return
    members: dict[int, list[tuple[str, nn.Module, Branch]]] = {}
    for key, module, branch in branches:
        members.setdefault(int(key.split(".")[1]), []).append((key, module, branch))
    left: list[int] = []
    for index in range(len(model.blocks)):
        empty = all(branch.count(module) == 0 for _, module, branch in members[index])
        only = index == len(model.blocks) - 1 and not left
        if (
            not empty
            or only
            or not _folds_(model, members[left[-1]][-1] if left else None, _given(model, members[index]))
        ):
            left.append(index)
    if len(left) < len(model.blocks):
        blocks = [model.blocks[index] for index in left]
        model.blocks = nn.Sequential(*blocks) if isinstance(model.blocks, nn.Sequential) else nn.ModuleList(blocks)
        model.blocks_left = left


def _given(model: nn.Module, members: list[tuple[str, nn.Module, Branch]]) -> Tensor:
    """What a block of empty branches adds to each token, [D]."""
    total = torch.zeros(())
    for key, module, branch in members:
        output = getattr(module, branch.output_name(module))
        scale = layer_scale(model, key, module)
        if output.bias is not None:
            total = total.to(output.bias) + (output.bias if scale is None else output.bias * scale[2])
    return total


def _folds_(model: nn.Module, before: tuple[str, nn.Module, Branch] | None, constant: Tensor) -> bool:
    """Add [D] to each token where the branch `before` ends, or before all blocks; False where that cannot be done."""
    if not constant.any():
        return True
    if before is None:
        places = _embedding(model)
        for place in places:
            place += constant
        return bool(places)
    key, module, branch = before
    bias, scale = getattr(module, branch.output_name(module)).bias, layer_scale(model, key, module)
    factors = torch.ones_like(constant) if scale is None else scale[2]
    if bias is None or bool(((factors == 0) & (constant != 0)).any()):
        return False
    bias += torch.where(constant == 0, constant, constant / factors)
    return True


def _embedding(model: nn.Module) -> list[Tensor]:
    """The tensors to which [D] has to be added so that each token before the blocks has it; may be none."""
    tokens = [getattr(model, name) for name in _PREFIX_TOKENS if getattr(model, name, None) is not None]
    position, embed = getattr(model, "pos_embed", None), model.patch_embed
    if not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity):
        return []
    if sum(token.shape[1] for token in tokens) != model.num_prefix_tokens:
        return []
    if position is None:
        bias = embed.proj.bias if isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity) else None
        return [] if bias is None else [bias, *tokens]
    everywhere = position.shape[-2] == embed.num_patches + model.num_prefix_tokens
    return [position] if everywhere else [position, *tokens]
