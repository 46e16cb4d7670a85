"""Independent references for the tests of masks and scores: a full sort in NumPy, and scores by hooks, unit by unit."""

import numpy as np
import torch


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


def clones(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_tensors(found, expected, skip=()):
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.startswith(tuple(skip)):
            assert torch.equal(found[name], expected[name]), name


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
