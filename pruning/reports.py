"""What a pruning step did, as text for log and terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pruning.masks import Masks, count_kept, density
from pruning.units import Kept, Units


def sparsity_report(masks: Mapping[str, Tensor], family: str = "ViT") -> str:
    """The [ViT Sparsity Report]: one line a layer, then overall sparsity and what remains."""
    lines = [f"[{family} Sparsity Report]"]
    for name, mask in masks.items():
        zero = 100 * (1 - density({name: mask}))
        lines.append(f"{name + '.weight_mask':<38} | Sparsity: {zero:.2f}%")
    remaining = 100 * density(masks)
    lines += [f"Overall sparsity: {100 - remaining:.2f}%", f"Remaining weights: {remaining:.2f}%"]
    return "\n".join(lines)


def sparsity_by_kind(masks: Masks, title: str) -> str:
    """The sparsity report with one line for all layers of a kind: blocks.*.attn.qkv."""
    kinds: dict[str, Masks] = {}
    for name, mask in masks.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), {})[name] = mask
    head, *_, overall, remaining = sparsity_report(masks, title).splitlines()
    lines = [
        f"{f'{kind} ({len(layers)})':<38} | Sparsity: {100 * (1 - density(layers)):.2f}%"
        for kind, layers in kinds.items()
    ]
    return "\n".join([head, *lines, overall, remaining])


def print_sparsity(layers: Mapping[str, nn.Module], family: str) -> float:
    """Print the sparsity report and return the percentage that remains; see `check_sparsity_vit`."""
    masks = {name: getattr(module, "weight_mask", module.weight).detach() != 0 for name, module in layers.items()}
    print(sparsity_report(masks, family))
    return 100 * density(masks)


def units_report(
    model: nn.Module,
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    kept_before: Mapping[str, list[int]],
    kept_after: Mapping[str, list[int]],
    masks_before: Masks,
    masks_after: Masks,
    cost: Callable[[nn.Module, Kept], dict[str, int]],
) -> str:
    """What a step does to the units, as text: a line per layer, then totals.

    Args:
        model: the dense one.
        scores: [count] per key, or [1] where a layer's units are pruned as one.
        cost: counts the units of each kind and the parameters, as a family's `cost` does.
    """
    lines = []
    for key, group in units.items():
        before, after = kept_before[key], kept_after[key]
        layers = {name.rpartition(".")[0] for name in group.parts} & masks_after.keys()
        sparsity = [
            100 * (1 - density({name: masks[name] for name in layers})) for masks in (masks_before, masks_after)
        ]
        values = scores[key].tolist()
        if len(values) < group.count:
            detail = f"scored as a whole {values[0]:.4g}"
        elif group.listed:
            detail = f"kept {after}, scores {' '.join(f'{value:.4g}' for value in values)}"
        else:
            stay = [values[unit] for unit in after]
            gone = [values[unit] for unit in set(before) - set(after)]
            detail = f"lowest kept score {min(stay):.4g}" if stay else "none kept"
            detail += f", highest removed {max(gone):.4g}" if gone else ""
        lines.append(
            f"  {key:<15} {group.kind + 's':>7} {len(before):>4} -> {len(after):<4} "
            f"sparsity {sparsity[0]:6.2f}% -> {sparsity[1]:6.2f}%  {detail}"
        )
    old, new = cost(model, kept_before), cost(model, kept_after)
    attention = [name for name in masks_after if ".attn." in name]
    totals = f"  {len(masks_after)} masks"
    if attention:
        totals += f": {len(attention)} attention, {len(masks_after) - len(attention)} MLP"
    for kind in ("heads", "neurons", "filters"):
        if kind in old:
            totals += f"; {kind} {old[kind]:,} -> {new[kind]:,}"
    lines.append(totals)
    for title, layers in (("attention", attention), ("prunable", list(masks_after))):
        if layers:
            counts = [count_kept({name: masks[name] for name in layers}) for masks in (masks_before, masks_after)]
            lines.append(f"  {title} weights {counts[0]:,} -> {counts[1]:,}")
    lines.append(f"  parameters {old['parameters']:,} -> {new['parameters']:,}")
    return "\n".join(lines)
