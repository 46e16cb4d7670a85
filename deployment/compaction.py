"""Makes the physically smaller copy of a masked model and measures how far its logits are from the masked one's."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from families import family_of
from models.merging import choices, merged_tokens
from pruning.removal import remove_units
from pruning.scores import evaluating
from pruning.units import Kept

BOUND = 1e-5  # times max(1, largest logit)
EXACT_IMAGES, EXACT_MACS = 2000, 256 * 10**9  # that are compared in float64, whichever is reached first


def compact(model: nn.Module, kept: Kept | None = None) -> tuple[nn.Module, dict[str, list[int]]]:
    """The physically smaller copy of a masked model, and the ids of the units that it keeps; without empty blocks.

    Args:
        kept: the units to keep; None finds the dead ones among weights that were pruned one by one and first folds what
            biases of dead heads and neurons emit into their branch's output bias.
    """
    small = copy.deepcopy(model)
    family = family_of(small)
    units = family.units(small)
    if kept is None:
        kept = family.working_units_(small)
    kept = {key: list(kept[key]) if key in kept else list(range(group.count)) for key, group in units.items()}
    remove_units(small, units, kept)
    family.drop_empty_blocks_(small)
    return small, kept


def without_empty_layers(model: nn.Module) -> nn.Module:
    """The copy in eval mode that exporters are shown: the same function without any layer of width zero."""
    plain = copy.deepcopy(model).eval()
    family_of(plain).bypass_empty_(plain)
    return plain


def macs(model: nn.Module) -> int:
    """Forward multiply-accumulates per image of the model as it is."""
    return family_of(model).cost(model, {})["macs"]


def affordable(model: nn.Module) -> int:
    """Images of a batch of about 64 GMACs, 64 at most: with more, large models keep a CPU busy for minutes."""
    return max(1, min(64, 64 * 10**9 // max(1, macs(model))))


def worst_of(so_far: float, value: Tensor) -> float:
    """max() that lets no NaN pass: Python's max(0.0, nan) is 0.0."""
    return float(torch.maximum(torch.tensor(so_far, dtype=torch.float64), value.detach().cpu().double()))


@torch.no_grad()
def parity(masked: nn.Module, small: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
    """How far the small model's logits are from the masked one's.

    Float64 says whether they are the same function. It is measured on a CPU copy of both, on at most 2,000 images and
    about 256 GMACs, but one affordable batch at least. Float32 is measured on all images, on the models' own device,
    whose kernels may round: TF32 convolutions of GPUs keep 10 bits of a number. Where tokens merge and two pairs are as
    similar as rounding can tell, the models may merge different ones: such images are counted, and compared when the
    small model merges what the masked one does.

    Returns:
        largest absolute differences, the largest logit, the bound that float64 has to meet, top-1 agreement and the
        small model's accuracy by the labels of `batches`; where tokens merge also the images that are
        "merged_otherwise".
    """
    parameter = next(masked.parameters())
    left = min(EXACT_IMAGES, max(affordable(masked), EXACT_MACS // max(1, macs(masked))))
    doubles = [copy.deepcopy(model).cpu().double() for model in (masked, small)]
    images_seen = agreed = right = otherwise = exact_images = 0
    difference = largest = exact = 0.0
    with evaluating(masked), evaluating(small), evaluating(doubles[0]), evaluating(doubles[1]):
        for images, labels in batches:
            for part in images[: left - exact_images].split(affordable(masked)):
                expected, _, compared, _ = _side_by_side(*doubles, part.cpu().double())
                exact = worst_of(exact, (expected - compared).abs().max())
                exact_images += len(part)
            images = images.to(parameter.device, parameter.dtype)
            expected, found, compared, different = _side_by_side(masked, small, images)
            difference = worst_of(difference, (expected - compared).abs().max())
            otherwise += different
            largest = max(largest, float(expected.abs().max()))
            agreed += int((expected.argmax(1) == found.argmax(1)).sum())
            right += int((found.argmax(1).cpu() == labels.cpu()).sum())
            images_seen += len(images)
    merging = {"merged_otherwise": otherwise} if merged_tokens(masked) else {}
    return {
        "images": images_seen,
        "images_float64": exact_images,
        "max_difference_float32": difference,
        "max_difference_float64": exact,
        "largest_logit": largest,
        "bound": BOUND * max(1.0, largest),
        "top1_agreement": agreed / images_seen,
        "accuracy": right / images_seen,
        **merging,
    }


def _with_choices(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and which tokens each block chose to merge."""
    made: list[Tensor] = []

    def note(_, choice: Tensor) -> Tensor:
        made.append(choice)
        return choice

    with choices(model, note):
        return model(images), made


def _side_by_side(masked: nn.Module, small: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Logits of both; the small model's with the masked one's choice of tokens that merge; images that need that."""
    expected, chosen = _with_choices(masked, images)
    found, own = _with_choices(small, images)
    different = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for first, second in zip(chosen, own, strict=True):
        different |= (first != second).flatten(1).any(1)
    compared = found
    if different.any():
        given = iter([choice[different] for choice in chosen])
        with choices(small, lambda *_: next(given)):
            compared = found.index_put((different,), small(images[different]))
    return expected, found, compared, int(different.sum())
