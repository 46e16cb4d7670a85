"""Measures how fast models are, by turns, and makes tables of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

import utils
from deployment.compaction import affordable, macs
from engine.latency import medians
from families import family_of
from models.merging import unmerged
from pruning.scores import evaluating
from pruning.units import count_parameters


@torch.no_grad()
def throughput(
    models: Mapping[str, nn.Module], batch_size: int, repeats: int = 5, seconds: float = 5.0
) -> dict[str, float]:
    """Images per second of each model, from interleaved medians on the models' own device.

    Repeats stop early once `seconds` have passed, but each model runs at least once after its warm-up.
    """
    model = next(iter(models.values()))
    parameter = next(model.parameters())
    size = family_of(model).image_size(model)
    images = torch.randn(batch_size, 3, size, size, device=parameter.device, dtype=parameter.dtype)

    with contextlib.ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        calls = {name: partial(model, images) for name, model in models.items()}
        found = medians(calls, parameter.device, repeats, seconds)
    return {name: batch_size / spent for name, spent in found.items()}


def latency_table(
    dense: nn.Module,
    small: nn.Module,
    batch_sizes: Iterable[int] = (1, 8, 64),
    variants: Mapping[str, nn.Module] | None = None,
) -> str:
    """Speed of the pruned model over the dense one, with the limit that the MACs set; then that of its variants.

    The dense one merges no tokens, even if the pruned one does.
    """
    variants, dense = variants or {}, unmerged(dense)
    limit = macs(dense) / max(1, macs(small))
    rows = []
    for batch_size in batch_sizes:
        speed = throughput({"dense": dense, "pruned": small, **variants}, batch_size, repeats=15)
        gain = speed["pruned"] / speed["dense"]
        rows.append(
            {
                "batch": batch_size,
                "dense ms": f"{1000 * batch_size / speed['dense']:.2f}",
                "pruned ms": f"{1000 * batch_size / speed['pruned']:.2f}",
                "faster": f"{gain:.2f}x",
                "MACs limit": f"{limit:.2f}x",
                "of limit": f"{100 * gain / limit:.0f}%",
                **{f"{name} ms": f"{1000 * batch_size / speed[name]:.2f}" for name in variants},
                **{f"{name} faster": f"{speed[name] / speed['dense']:.2f}x" for name in variants},
            }
        )
    parameter = next(dense.parameters())
    device, precision = parameter.device, str(parameter.dtype).removeprefix("torch.")
    head = f"{precision} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, interleaved medians"
    return f"{head}\n{utils.format_table(rows, {title: title for title in rows[0]})}"


@torch.no_grad()
def size_table(masked: nn.Module, small: nn.Module) -> str:
    """Dense, masked and pruned side by side: parameters in use, MACs, file size and images/s on this device.

    The dense one merges no tokens, even if the others do. Masked is the network of full size with zeros in the place
    of what is pruned; it has a line where there are such zeros, and pruned, without them, where it is another network.
    """
    in_use = sum(int(parameter.count_nonzero()) for parameter in masked.parameters())
    prunable = family_of(masked).prunable_layers(masked, True).values()
    has_zeros = any(bool((module.weight == 0).any()) for module in prunable)
    dense = unmerged(copy.deepcopy(masked))
    for parameter in dense.parameters():
        parameter.masked_fill_(parameter == 0, 0.02)  # whether zeros are faster than other numbers is the question
    parameters = {"dense": count_parameters(masked), "masked": in_use, "pruned": count_parameters(small)}
    models = {"dense": dense}
    models |= {"masked": masked} if has_zeros else {}
    same = parameters["pruned"] == parameters["dense"] and macs(small) == macs(dense)
    models |= {} if same else {"pruned": small}
    speed = throughput(models, affordable(masked))
    rows = [
        {
            "model": name,
            "parameters": f"{parameters[name]:,}",
            "MACs": f"{macs(model) / 1e9:.4f} G",
            "file": f"{sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6:.2f} MB",
            "images/s": f"{speed[name]:,.0f}",
        }
        for name, model in models.items()
    ]
    return utils.format_table(rows, {title: title for title in rows[0]})
