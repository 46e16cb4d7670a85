"""ResNets of `models.resnet`: filters, their cost, which of them are dead, and how to save them.

    units = filter_units(model)                                 # {"layer1.0.conv1": Units(...), ...}
    CNN.cost(model, kept)                                       # filters, parameters and MACs that are left

`CNN` is the family's entry in `families.FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.resnet import ResNet
from pruning.units import Kept, Layout, LayoutError, Reader, Tap, Units

NARROW = 64  # channels of a residual stream; see fold_norms_


# ----------------------------------------------------------------------------------------------- filters as units


def prunable_convolutions(model: nn.Module, conv1: bool = False) -> dict[str, nn.Conv2d]:
    """All convolutions by name, in the model's order, without the first one unless `conv1`."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return dict(found if conv1 else found[1:])


def filter_units(model: nn.Module, conv1: bool = False) -> dict[str, Units]:
    """The filters of each prunable convolution as units, keyed by its name.

    A filter is its kernel with the gain and bias of the batch norm after it: batch norm divides a kernel's scale out
    again, so that a kernel alone cannot fade. Physically removable are the filters of a residual block: those of its
    first convolution together with what reads them, those of its second one because the block places what is left in
    the residual stream, whose width stays. Stem and projections keep theirs.
    """
    modules, means = dict(model.named_modules()), shifts(model)
    units = {}
    for layer, (name, convolution) in enumerate(prunable_convolutions(model, conv1).items()):
        count, block = convolution.out_channels, name.rpartition(".")[0]
        rows = Layout(0, 1, count, 1)
        norm = _norm_behind(name)
        parts, followers, place, reader = {f"{name}.weight": rows}, {}, None, None
        if isinstance(modules.get(norm), nn.BatchNorm2d):
            parts |= {f"{norm}.weight": rows, f"{norm}.bias": rows}
            followers = {f"{norm}.running_mean": rows, f"{norm}.running_var": rows}
        if convolution.bias is not None:
            parts[f"{name}.bias"] = rows
        in_block = hasattr(modules[block], "out_index")
        if in_block and name.endswith("conv1"):
            columns = followers[f"{block}.conv2.weight"] = Layout(1, 1, count, 1)
            reader = Reader(f"{block}.conv2", columns, shift=means.get(f"{block}.conv2"))
        elif in_block and name.endswith("conv2"):
            place = f"{block}.out_index"
        output = Tap(name, "output", Layout(1, 1, count, 1))
        units[name] = Units(
            "filter", layer, count, parts, output, output, followers, place, removable=in_block, reader=reader
        )
    return units


def shifts(model: nn.Module) -> dict[str, str]:
    """{convolution: the running mean of the batch norm behind it}, which stands for the bias that it has not."""
    modules = dict(model.named_modules())
    found = {name: _norm_behind(name) for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    return {
        name: f"{norm}.running_mean" for name, norm in found.items() if isinstance(modules.get(norm), nn.BatchNorm2d)
    }


def _norm_behind(name: str) -> str:
    """The batch norm's name: bn2 after conv2, downsample.1 after downsample.0."""
    path, _, leaf = name.rpartition(".")
    sibling = str(int(leaf) + 1) if leaf.isdigit() else leaf.replace("conv", "bn")
    return f"{path}.{sibling}" if path else sibling


# ------------------------------------------------------------------------------------- what it costs, which of it works


def cnn_cost(model: ResNet, kept: Kept) -> dict[str, int]:
    """Filters, parameters and MACs per image of `model` once the other filters are removed (keys absent: all kept).

    MACs are those of convolutions and classifier: output pixels x weights. Filters that cannot be removed count as
    pruned among the filters, and in full among parameters and MACs.
    """
    units = filter_units(model, conv1=True)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for key, ids in kept.items():
        for name, layout in units[key].cut_out:
            if name in shapes:
                shapes[name][layout.dim] = len(ids)
    macs = math.prod(shapes["fc.weight"])
    for name, convolution in prunable_convolutions(model, conv1=True).items():
        side = model.img_size
        for _ in range(int(name[len("layer")]) - 1 if name.startswith("layer") else 0):
            side = (side + 1) // 2  # the first block of each stage after the first has stride 2
        macs += math.prod(shapes[f"{name}.weight"]) * side**2 // convolution.groups
    return {
        "filters": sum(len(kept.get(key, range(group.count))) for key, group in units.items()),
        "parameters": sum(map(math.prod, shapes.values())),
        "macs": macs,
    }


@torch.no_grad()
def find_working_filters(model: nn.Module) -> dict[str, list[int]]:
    """Which filters still work: {layer: ids}; dead is one whose kernel, gain and bias are all zero.

    A bias left alone emits a constant that zero padding cuts off at the border, so such a filter cannot be folded away.
    """
    alive = {}
    for name, group in filter_units(model, conv1=True).items():
        tensors = [layout.per_unit(model.get_parameter(part)) for part, layout in group.parts.items()]
        alive[name] = torch.cat(tensors, dim=1).any(1).nonzero().flatten().tolist() or [0]
    return alive


@torch.no_grad()
def fold_norms_(model: ResNet) -> list[str]:
    """Fold batch norms into convolutions and the places of a block's last filters into zero filters, in place.

    A block whose second convolution is shortened adds its channels to single ones of the residual stream. Up to
    `NARROW` channels that takes longer on a CPU than the zero filters of a convolution of full width, which fill
    registers that would else be empty; with more channels the zeros cost more. Weights are left in channels-last order.
    """
    model.eval()
    gone, modules = [], dict(model.named_modules())
    for name, convolution in prunable_convolutions(model, conv1=True).items():
        norm = _norm_behind(name)
        if isinstance(modules.get(norm), nn.BatchNorm2d):
            kind = convolution.weight.dtype
            fused = fuse_conv_bn_eval(convolution.double(), modules[norm].double()).to(kind)
            model.set_submodule(name, fused)
            model.set_submodule(norm, nn.Identity())
            gone.append(norm)
    for name, block in model.named_modules():
        if getattr(block, "out_index", None) is not None:
            width = model.widths[int(name[len("layer")]) - 1]
            if width <= NARROW:
                block.conv2 = _in_place(block.conv2, block.out_index, width)
                block.out_index = None
                gone.append(f"{name}.out_index")
    model.to(memory_format=torch.channels_last)
    return gone


def _in_place(convolution: nn.Conv2d, index: torch.Tensor, width: int) -> nn.Conv2d:
    """The convolution with `width` filters, its own at `index` and zeros elsewhere."""
    weight = convolution.weight.new_zeros(width, *convolution.weight.shape[1:])
    bias = convolution.bias.new_zeros(width)
    convolution.weight = nn.Parameter(weight.index_copy_(0, index, convolution.weight))
    convolution.bias = nn.Parameter(bias.index_copy_(0, index, convolution.bias))
    convolution.out_channels = width
    return convolution


# ------------------------------------------------------------------------------------------- on disk and back


def describe(small: ResNet, kept: Kept) -> dict:
    """The architecture of a removed model as plain values: the arguments of ResNet and the filters that stayed.

    Filters whose place in the residual stream matters have its number, also where filters had been removed before.
    """
    blocks = {name: getattr(block, "out_index", None) for name, block in small.named_modules()}
    places = {f"{name}.conv2": index.tolist() for name, index in blocks.items() if index is not None}
    return {
        "resnet": {
            "depths": list(small.depths),
            "widths": list(small.widths),
            "projected": small.projected,
            "num_classes": small.num_classes,
            "img_size": small.img_size,
        },
        "kept_filters": {**kept, **places},
    }


def rebuild(config: Mapping) -> tuple[ResNet, dict[str, list[int]]]:
    """The dense model that `describe` knew, with random weights, and the filters of it to keep."""
    return ResNet(**config["resnet"]), config["kept_filters"]


class CnnFamily:
    """ResNets as a `families.Family`."""

    title = "CNN"
    kinds = ("filter",)
    counts_by = "density"
    classifier = "fc."
    timm_files = ()
    config_keys = ("resnet",)

    cost = staticmethod(cnn_cost)
    working_units_ = staticmethod(find_working_filters)
    fold_ = staticmethod(fold_norms_)
    describe = staticmethod(describe)
    rebuild = staticmethod(rebuild)

    def problem(self, model: nn.Module) -> str | None:
        return None if isinstance(model, ResNet) else f"{type(model).__name__} is no ResNet of models.resnet"

    def prunable_layers(self, model: nn.Module, first: bool = False) -> dict[str, nn.Conv2d]:
        return prunable_convolutions(model, conv1=first)

    def units(self, model: nn.Module, kinds: Iterable[str] | None = None, first: bool = True) -> dict[str, Units]:
        return filter_units(model, conv1=first) if kinds is None or "filter" in kinds else {}

    def branches_as_units(self, model: nn.Module) -> dict[str, Units]:
        raise LayoutError("a ResNet has filters, no attention and MLP branches")

    def drop_empty_blocks_(self, model: nn.Module) -> None:
        pass  # a block keeps a filter of each convolution

    def bypass_empty_(self, model: nn.Module) -> None:
        pass  # nor is any convolution empty

    def image_size(self, model: nn.Module) -> int:
        return model.img_size

    def tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)  # a pixel of the last stage's map each

    def memory_format(self, removed: bool, precision: torch.dtype | None) -> torch.memory_format | None:
        # Measured on a CPU: channels last is 1.3x as fast for a dense res20s. Once filters are removed it is 1.1x as
        # fast as they are cut, but 0.84x in bf16.
        return None if removed and precision is not None else torch.channels_last

    def card(self, config: Mapping) -> tuple[str, str]:
        left = "\n".join(f"- {name}: {len(ids)}" for name, ids in config["kept_filters"].items())
        loading = "## Loading it\n\n```python\nimport export  # of the program that wrote this folder\n\n"
        loading += 'model = export.load("model")\n```\n'
        if "folded" in config:
            left += "\n\nBatch norms are folded into the convolutions before them; the last convolution of a block has "
            left += f"zero filters for the other channels of a residual stream of {NARROW} or fewer."
            loading = loading.replace('"model"', '"model/folded"')
        return f"Filters per convolution:\n\n{left}", loading


CNN = CnnFamily()
