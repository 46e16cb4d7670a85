"""Stores 2:4 weights in the form that sparse tensor cores multiply, on hardware that has them.

    model = export.load("model").to("cuda", torch.float16)
    print(export.semi_structured_(model))

PyTorch calls the form semi-structured (`torch.sparse.to_sparse_semi_structured`): of every four consecutive weights of
a row two are stored, with two bits that say where each stood. Mishra et al., "Accelerating Sparse Deep Neural
Networks", 2021. Elsewhere weights stay dense: a product takes as long with zeros as with other numbers.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from deployment.speed import latency_table
from pruning.nm import holds_pattern

TYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # the first GPUs with sparse tensor cores


def why_dense(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps weights on this device, of this type, from being sparse; empty where nothing does."""
    if device.type != "cuda" or torch.version.hip:
        return f"{device.type} has no kernels for them, NVIDIA GPUs of compute capability 8.0 and more do"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, kernels need 8.0"
    if dtype not in TYPES:
        return f"the kernels multiply float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return ""


def sparse_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers, by name, of whose every four consecutive weights two or more are zero."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in linear.items() if holds_pattern(layer.weight, 2, 4)}


def semi_structured_(model: nn.Module) -> str:
    """Make the weights of 2:4 linear layers sparse, in place, where the device can; for inference, and not undone.

    A layer whose shape or type the kernels refuse stays dense. What it computes is the same but for rounding.

    Args:
        model: on its device and in its type, such as `export.load(folder).to("cuda", torch.float16)`.

    Returns:
        A line that says for how many layers, and why not for others.
    """
    parameter, layers = next(model.parameters()), sparse_layers(model)
    reason = why_dense(parameter.device, parameter.dtype) or ("" if layers else "none is 2:4")
    if reason:
        return f"the weights of {len(layers)} 2:4 linear layers stay dense and bring no speed here: {reason}"
    refused = {name: why for name, layer in layers.items() if (why := _make_sparse_(layer))}
    said = f"the weights of {len(layers) - len(refused)} of {len(layers)} 2:4 linear layers are sparse"
    return said + "".join(f"; {name} stays dense ({why})" for name, why in list(refused.items())[:1])


@torch.no_grad()
def _make_sparse_(layer: nn.Linear) -> str:
    """Empty, or why the layer is as it was: the kernels of this GPU do not take its shape or type."""
    dense = layer.weight
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the tensor is a prototype
            sparse = torch.sparse.to_sparse_semi_structured(dense.detach().contiguous())
        layer.weight = nn.Parameter(sparse, requires_grad=False)
        layer(dense.new_zeros(1, layer.in_features))  # compressing works where multiplying may not
    except (NotImplementedError, RuntimeError) as error:
        layer.weight = dense
        return " ".join(str(error).split())
    return ""


def semi_structured_table(dense: nn.Module, small: nn.Module) -> str:
    """Speed of the removed model with dense and with sparse 2:4 weights in float16, over the dense model; where the
    device has no kernels for them, the line that says so."""
    device = next(small.parameters()).device
    if why_dense(device, torch.float16):
        return semi_structured_(small)
    halves = [copy.deepcopy(model).to(torch.float16) for model in (dense, small)]
    sparse = copy.deepcopy(halves[1])
    said = semi_structured_(sparse)
    return f"{said}\n{latency_table(*halves, variants={'2:4': sparse})}"
