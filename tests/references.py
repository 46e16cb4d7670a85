"""Independent references for the tests of masks, scores and removal: a full sort in NumPy, scores by hooks, unit by
unit, masks of heads and neurons by plain indexing."""

import copy

import numpy as np
import torch
from micro import assert_same_tensors as assert_same_tensors
from micro import clones as clones

from pruning.units import unit_masks


def largest(weights, masks, keep):
    """The `keep` largest survivors of `masks` by a stable sort, as 0/1 arrays; of equals the first in (layer, index)
    order stays, and NaN counts as larger than infinity. float64 holds every type exactly."""
    alive = np.concatenate([mask.double().numpy().ravel() != 0 for mask in masks.values()])
    values = np.abs(np.concatenate([weights[name].detach().double().numpy().ravel() for name in masks]))
    positions = np.flatnonzero(alive)
    order = np.lexsort((-values[positions], ~np.isnan(values[positions])))
    flat = np.zeros(len(values))
    flat[positions[order[: max(0, keep)]]] = 1
    ends = np.cumsum([mask.numel() for mask in masks.values()])[:-1]
    return {name: part.reshape(masks[name].shape) for name, part in zip(masks, np.split(flat, ends), strict=True)}


def assert_masks(masks, expected):
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask.double().numpy(), np.asarray(expected[name]), err_msg=name)


def random_masks(weights, density=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.rand(w.shape, generator=generator) < density).to(w) for name, w in weights.items()}


@torch.no_grad()
def assert_same_function(one, other, images):
    """In both precisions, on copies; the bounds of SPEC 5.8."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        expected, found = (copy.deepcopy(model).to(dtype).eval()(images.to(dtype)) for model in (one, other))
        assert expected.isfinite().all()
        assert (expected - found).abs().max() <= bound * max(1.0, float(expected.abs().max())), dtype


def vit_places(model):
    """{units key: (layer, its rows of each unit, layer that reads them, its columns of each unit)}, by hand."""
    found = {}
    for i, block in enumerate(model.blocks):
        heads, width = block.attn.num_heads, block.attn.head_dim
        # q rows, then k rows, then v rows
        rows = [[c * heads * width + h * width + j for c in range(3) for j in range(width)] for h in range(heads)]
        columns = [[h * width + j for j in range(width)] for h in range(heads)]
        found[f"blocks.{i}.attn"] = (f"blocks.{i}.attn.qkv", rows, f"blocks.{i}.attn.proj", columns)
        neurons = [[n] for n in range(block.mlp.fc1.out_features)]
        found[f"blocks.{i}.mlp"] = (f"blocks.{i}.mlp.fc1", neurons, f"blocks.{i}.mlp.fc2", neurons)
    return found


def masks_by_hand(model, kept):
    """0/1 masks of weights and biases by parameter name for {units key: kept ids}, unit by unit."""
    masks = {}
    for key, (first, rows, second, columns) in vit_places(model).items():
        parts = [(first, "weight", 0, rows), (first, "bias", 0, rows), (second, "weight", 1, columns)]
        for layer, leaf, dim, ids in parts if key in kept else ():
            tensor = getattr(model.get_submodule(layer), leaf)
            if tensor is not None:
                masks[f"{layer}.{leaf}"] = mask = torch.zeros_like(tensor.detach())
                for unit in kept[key]:
                    mask.movedim(dim, 0)[ids[unit]] = 1
    return masks


@torch.no_grad()
def masked_by_hand(model, masks):
    masked = copy.deepcopy(model)
    for name, mask in masks.items():
        masked.get_parameter(name).mul_(mask)
    return masked


def cross_entropy_sum(logits, labels):
    return sum(torch.logsumexp(row, 0) - row[label] for row, label in zip(logits, labels, strict=True))


def unit_scores(model, criteria, places, masks=None, batches=None, loss=cross_entropy_sum):
    """{key: [scores]} of one unit after the other.

    Args:
        model: with the weights to score, in float32 or float64; it is left in eval mode.
        places: {key: (layer, its rows of each unit, layer that reads the units, its columns of each unit)}; rows in
            place of the last two means that saliency looks at the output, as l1 and l2 do.
    """
    if criteria in ("remain", "magnitude") or batches is None:
        power = 2 if criteria == "l2" else 1
        tensors = {key: masks[place[0]] if criteria == "remain" else model.get_submodule(place[0]).weight.detach()
                   for key, place in places.items()}  # fmt: skip
        return {
            key: [float((tensors[key][rows].double().abs() ** power).sum()) for rows in place[1]]
            for key, place in places.items()
        }
    saliency, seen, hooks = criteria == "saliency", {}, []
    for key, (layer, _, *reader) in places.items():
        if saliency and reader:
            module = model.get_submodule(reader[0])
            hooks.append(module.register_forward_pre_hook(lambda _, given, key=key: seen.update({key: given[0]})))
        else:
            module = model.get_submodule(layer)
            hooks.append(module.register_forward_hook(lambda _, __, out, key=key: seen.update({key: out})))
    totals, images_seen = {key: np.zeros(len(place[1])) for key, place in places.items()}, 0
    for images, labels in batches:
        with torch.set_grad_enabled(saliency):
            value = loss(model.eval()(images.detach().requires_grad_(saliency)), labels)
        gradients = torch.autograd.grad(value, list(seen.values())) if saliency else [None] * len(seen)
        for (key, activation), gradient in zip(seen.items(), gradients, strict=True):
            axis = 1 if activation.ndim == 4 else 2  # [images, channels, H, W] or [images, tokens, channels]
            a = activation.detach().double().movedim(axis, 1)
            g = gradient.double().movedim(axis, 1) if saliency else None
            channels = places[key][3] if saliency and len(places[key]) > 2 else places[key][1]
            for unit, ids in enumerate(channels):
                part = a[:, ids].flatten(1)
                per_image = {"l1": lambda p: p.abs().mean(1), "l2": lambda p: p.square().mean(1)}.get(criteria)
                found = (part * g[:, ids].flatten(1)).sum(1).abs() if saliency else per_image(part)
                totals[key][unit] += float(found.sum())
        images_seen += len(images)
    for hook in hooks:
        hook.remove()
    means = {key: total / images_seen for key, total in totals.items()}
    return {key: (np.sqrt(mean) if criteria == "l2" else mean).tolist() for key, mean in means.items()}


def kept_by(rules, units, which):
    """Random units of each group, ascending: `rules[which](group, its ids in random order)` are those that stay."""
    generator = torch.Generator().manual_seed(len(which))
    orders = {key: torch.randperm(group.count, generator=generator).tolist() for key, group in units.items()}
    return {key: sorted(rules[which](units[key], order)) for key, order in orders.items()}


@torch.no_grad()
def masked_copy(model, units, kept):
    """A copy whose other units' parts are zero."""
    model = copy.deepcopy(model)
    for name, mask in unit_masks(units, kept, dict(model.named_parameters())).items():
        model.get_parameter(name).mul_(mask)
    return model
