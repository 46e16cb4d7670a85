"""What families of transformers share: cost, dead units, folding, saving.

A branch here is (units key, its module, its `families.parts.Branch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from families.branches import branch_units, bypass_empty_, layer_scale
from families.cards import loading_section
from families.parts import Branch, Branches
from pruning.units import Kept, Units, count_parameters, unit_parameters
from utils import RunError


def cost_of(
    model: nn.Module, units: Mapping[str, Units], kept: Kept, macs: Callable[[nn.Module, Mapping[str, int]], int]
) -> dict[str, int]:
    """Heads, neurons, parameters and MACs of `model` once only the kept units are left (keys absent: all kept)."""
    left = {key: len(kept[key]) if key in kept else group.count for key, group in units.items()}
    gone = sum((group.count - left[key]) * unit_parameters(model, group) for key, group in units.items())
    return {
        "heads": sum(left[key] for key, group in units.items() if group.kind == "head"),
        "neurons": sum(left[key] for key, group in units.items() if group.kind == "neuron"),
        "parameters": count_parameters(model) - gone,
        "macs": macs(model, left),
    }


@torch.no_grad()
def find_working(branches: Branches) -> dict[str, list[int]]:
    """Which heads and neurons still work, where weights were pruned one by one: {units key: ids}.

    A head is dead when its columns of the output are zero or its v rows are, a neuron when its column or its row is;
    where a norm counts them, both, and it has to give zero. `fold_dead_` has to come before they are removed.
    """
    alive = {}
    for key, module, branch in branches:
        constant, value = branch.constant_units(module)
        output, columns = _columns(module, branch)
        used = columns.any(0).any(1)
        normed = branch.norm_between(module) is not None
        if output.bias is None or normed:
            constant = constant & ~value.any(1)  # no bias can take over what they add
        works = ~constant | used if normed else ~constant & used
        alive[key] = works.nonzero().flatten().tolist()
    return alive


@torch.no_grad()
def fold_dead_(branches: Branches, alive: Kept) -> None:
    """Add what dead units still emit, the constant of their biases, to the output bias of their branch, in place.

    A head whose v rows are zero emits its v bias wherever it attends, a neuron with a zero row act(bias).
    """
    for key, module, branch in branches:
        working = set(alive.get(key, range(branch.count(module))))
        dead = [unit for unit in range(branch.count(module)) if unit not in working]
        output, columns = _columns(module, branch)
        if dead and output.bias is not None and branch.norm_between(module) is None:
            _, value = branch.constant_units(module)
            output.bias += torch.einsum("duw,uw->d", columns[:, dead], value[dead])


def _columns(module: nn.Module, branch: Branch) -> tuple[nn.Linear, Tensor]:
    """The layer that reads the units of a branch, and its columns [D, count, width]."""
    output = getattr(module, branch.output_name(module))
    layout = branch.units(module, "", 0).parts[f"{branch.output_name(module)}.weight"]
    return output, layout.split(output.weight)[:, 0]


@torch.no_grad()
def fold_layer_scale_(model: nn.Module, branches: Branches) -> list[str]:
    """Multiply the factors at the end of each branch into its output layer, in place; the names of these factors.

    timm's blocks hold them as a module `ls1` (`ls` in parallel branches) or a parameter `gamma_1`; without it, a block
    has an identity or None.
    """
    gone = []
    for key, module, branch in branches:
        scale = layer_scale(model, key, module)
        if scale is not None:
            block, name, factor = scale
            output = getattr(module, branch.output_name(module))
            output.weight *= factor[:, None]
            if output.bias is not None:
                output.bias *= factor
            setattr(block, name, None if getattr(block, name) is factor else nn.Identity())
            gone.append(f"{key.rpartition('.')[0]}.{name}")
    return gone


def describe_units(units: Mapping[str, Units], kept: Kept) -> dict:
    """For config.json: heads and neurons of each layer that is left, and their ids in each layer of the dense one."""
    heads, neurons = ([group.count for group in units.values() if group.kind == kind] for kind in ("head", "neuron"))
    attentions = [key for key in kept if key.endswith("attn")]
    return {
        "heads": heads,
        "neurons": neurons,
        "kept_heads": [kept[key] for key in attentions],
        "kept_neurons": [kept[key] for key in kept if key not in attentions],
    }


def kept_of(config: Mapping, units: Mapping[str, Units]) -> dict[str, range]:
    """The inverse: how many units of the dense model to keep."""
    left = {"head": iter(config["heads"]), "neuron": iter(config["neurons"])}
    return {key: range(next(left[group.kind])) for key, group in units.items()}


def timm_model(arguments: Mapping) -> nn.Module:
    """`timm.create_model` with random weights."""
    try:
        import timm
    except ImportError as error:
        raise RunError(
            f"this model was made from a timm model, which needs timm ({error}): pip install timm"
        ) from error
    model = timm.create_model(**arguments)
    rest = {name: value for name, value in arguments.items() if name != "model_name"}
    model.arch_name, model.arch_args = f"timm/{arguments['model_name']}", rest  # so that it can be described again
    return model


class TransformerFamily:
    """What a `families.Family` of heads and neurons answers alike; a subclass adds what it finds in its own modules.

    `prunable_suffixes(model)` are what the names of its prunable layers end with, `find_units(model, kinds)` its units,
    `branches(model)` its attentions and MLPs.
    """

    kinds = ("head", "neuron")
    counts_by = "ratio"
    classifier = "head"  # distilled models have `head` and `head_dist`

    def prunable_layers(self, model: nn.Module, first: bool = False) -> dict[str, nn.Module]:
        suffixes = self.prunable_suffixes(model) + (("patch_embed.proj",) if first else ())
        return {name: module for name, module in model.named_modules() if name.endswith(suffixes)}

    def units(self, model: nn.Module, kinds: Iterable[str] | None = None, first: bool = True) -> dict[str, Units]:
        return self.find_units(model, self.kinds if kinds is None else kinds)

    def branches_as_units(self, model: nn.Module) -> dict[str, Units]:
        return branch_units(model, self.units(model), self.branches(model))

    def drop_empty_blocks_(self, model: nn.Module) -> None:
        pass

    def bypass_empty_(self, model: nn.Module) -> None:
        bypass_empty_(model, self.branches(model))

    def working_units_(self, model: nn.Module) -> dict[str, list[int]]:
        alive = find_working(self.branches(model))
        fold_dead_(self.branches(model), alive)
        return alive

    def fold_(self, model: nn.Module) -> list[str]:
        """LayerScale is multiplied into the output layer of its branch. The scale of queries and keys is kept: fused
        attention multiplies by it inside its kernel, in no measurable time, and takes none but its own in timm."""
        return fold_layer_scale_(model, self.branches(model))

    def image_size(self, model: nn.Module) -> int:
        return model.patch_embed.img_size[0]

    def tokens(self, features: Tensor) -> Tensor:
        return features

    def memory_format(self, removed: bool, precision: torch.dtype | None) -> torch.memory_format | None:
        return None

    def card(self, config: Mapping) -> tuple[str, str]:
        left = f"Heads per block: {config['heads']}\nNeurons per block: {config['neurons']}"
        if "blocks" in config:
            left = f"Blocks of the dense model that are left, counted from 0: {config['blocks']}\n{left}"
        if "token_merge" in config:
            left += f"\n\nEvery block merges {config['token_merge']} tokens of an image, at most half of its patches "
            left += "(token merging, ToMe)."
        return left, loading_section(config)
