"""Units of a Vision Transformer: what a head or a neuron is, how it is scored, chosen, counted and removed.

    units  = vit_units(model)                                    # {"blocks.0.attn": Units(...), "blocks.0.mlp": ...}
    scores = score_units(model, units, "magnitude")              # {"blocks.0.attn": float64 [heads], ...}
    kept   = select_units(scores, ratio=0.33)                    # {"blocks.0.attn": [0, 2], ...}
    remove_units(model, units, kept)                             # the model is smaller now

Everything that has to know which rows and columns belong to a unit asks its `parts`: masks, penalty, removal and
scores alike. A unit of another kind (a convolutional filter, a single output row) is one more list of parts.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

log = logging.getLogger(__name__)

SCORE_BATCHES = 10
PRUNABLE_SUFFIXES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

Kept = Mapping[str, Sequence[int]]  # units key -> ids that stay, ascending


# Where a plain ViT's Attention and Mlp come from; others compute something else with the same layers.
PLAIN_MODULES = ("models.vit", "timm.layers.attention", "timm.layers.mlp", "timm.models.vision_transformer")


class LayoutError(ValueError):
    """A model whose blocks cannot be pruned by unit; the message gives the reason."""


# ---------------------------------------------------------------------------------------------- what a unit is


@dataclass(frozen=True)
class Layout:
    """How one tensor dimension is divided among units: `dim` has length lead * count * width, in that order.

    The rows of `attn.qkv` are (3, heads, head_dim), its consumer's columns (1, heads, head_dim), the neurons of
    an MLP (1, hidden, 1).
    """

    dim: int
    lead: int
    count: int
    width: int

    def split(self, tensor: Tensor) -> Tensor:
        """[..., lead * count * width, ...] -> [..., lead, count, width, ...]."""
        return tensor.unflatten(self.dim, (self.lead, self.count, self.width))

    def per_unit(self, tensor: Tensor) -> Tensor:
        """A weight tensor as [count, elements of each unit]."""
        return self.split(tensor).movedim(self.dim + 1, 0).flatten(1)

    def per_image(self, activation: Tensor) -> Tensor:
        """An activation [images, ...] as [images, count, values of each unit]; `dim` counts from the end."""
        dim = self.dim % activation.ndim
        split = activation.unflatten(dim, (self.lead, self.count, self.width))
        return split.movedim(dim + 1, 1).flatten(2)

    def select(self, tensor: Tensor, kept: Tensor) -> Tensor:
        """Only the kept units' share of `tensor`, in the same order of dimensions."""
        return self.split(tensor).index_select(self.dim + 1, kept).flatten(self.dim, self.dim + 2)

    def scatter_(self, tensor: Tensor, small: Tensor, kept: Tensor) -> Tensor:
        """Write `small`, as `select` returned it, back into `tensor` in place."""
        share = small.unflatten(self.dim, (self.lead, len(kept), self.width))
        self.split(tensor).index_copy_(self.dim + 1, kept, share)
        return tensor

    def mask(self, like: Tensor, kept: Sequence[int]) -> Tensor:
        """0/1 tensor of `like`'s shape, 1 on the kept units' elements."""
        mask = torch.zeros_like(like)
        index = torch.as_tensor(kept, dtype=torch.long, device=like.device)
        self.split(mask).index_fill_(self.dim + 1, index, 1)
        return mask


@dataclass(frozen=True)
class Tap:
    """A place in the network where units show as activations: a module's input or output."""

    module: str
    side: str  # "input" or "output"
    layout: Layout


@dataclass(frozen=True)
class Units:
    """All units of one kind in one layer.

    `parts` maps parameter names to the layout of the units in them. The first one is the weight that weight
    criteria score. `output` is where l1 and l2 look, `contribution` where saliency looks.

    `followers` are tensors that do not belong to a unit but go with it when it is physically cut out: what reads it,
    and statistics of it. `place` names a buffer that says where the outputs of the kept units go in a wider tensor.
    Units that are not `removable` stay in the smaller network, at zero.
    """

    kind: str  # "head", "neuron", "filter", "row"
    layer: int
    count: int
    parts: Mapping[str, Layout]
    output: Tap
    contribution: Tap
    followers: Mapping[str, Layout] = field(default_factory=dict)
    place: str | None = None
    removable: bool = True

    @property
    def scored(self) -> tuple[str, Layout]:
        return next(iter(self.parts.items()))

    @property
    def cut_out(self) -> Iterator[tuple[str, Layout]]:
        """All tensors that get shorter when units are physically removed."""
        return chain(self.parts.items(), self.followers.items()) if self.removable else iter(())


def vit_units(model: nn.Module, kinds: Iterable[str] = ("head", "neuron")) -> dict[str, Units]:
    """The heads ("blocks.N.attn") and neurons ("blocks.N.mlp") of a ViT, in the order of its layers.

    Head h owns rows {c * A + h * d + i : c = 0, 1, 2; i < d} of `attn.qkv`, their biases, and columns
    h * d .. (h + 1) * d - 1 of `attn.proj` (A = heads * d). Neuron j owns row and bias j of `mlp.fc1` and column
    j of `mlp.fc2`.

    Raises:
        LayoutError: the blocks are not those of a plain ViT.
    """
    reason = layout_problem(model)
    if reason:
        raise LayoutError(reason)
    units = {}
    for layer, block in enumerate(model.blocks):
        if "head" in kinds:
            units[f"blocks.{layer}.attn"] = _heads_of(block.attn, f"blocks.{layer}.attn.", layer)
        if "neuron" in kinds:
            units[f"blocks.{layer}.mlp"] = _neurons_of(block.mlp, f"blocks.{layer}.mlp.", layer)
    return units


def _heads_of(attn: nn.Module, prefix: str, layer: int) -> Units:
    count, width = attn.num_heads, attn.head_dim
    parts = {f"{prefix}qkv.weight": Layout(0, 3, count, width)}
    if attn.qkv.bias is not None:
        parts[f"{prefix}qkv.bias"] = Layout(0, 3, count, width)
    parts[f"{prefix}proj.weight"] = Layout(1, 1, count, width)
    output = Tap(f"{prefix}qkv", "output", Layout(-1, 3, count, width))
    contribution = Tap(f"{prefix}proj", "input", Layout(-1, 1, count, width))
    return Units("head", layer, count, parts, output, contribution)


def _neurons_of(mlp: nn.Module, prefix: str, layer: int) -> Units:
    count = mlp.fc1.out_features
    parts = {f"{prefix}fc1.weight": Layout(0, 1, count, 1)}
    if mlp.fc1.bias is not None:
        parts[f"{prefix}fc1.bias"] = Layout(0, 1, count, 1)
    parts[f"{prefix}fc2.weight"] = Layout(1, 1, count, 1)
    output = Tap(f"{prefix}fc1", "output", Layout(-1, 1, count, 1))
    contribution = Tap(f"{prefix}fc2", "input", Layout(-1, 1, count, 1))
    return Units("neuron", layer, count, parts, output, contribution)


def row_units(layers: Mapping[str, nn.Module]) -> dict[str, Units]:
    """The output rows of each layer as units, keyed by the layer's name; what element-wise refill ranks."""
    units = {}
    for index, (name, module) in enumerate(layers.items()):
        rows = module.weight.shape[0]
        tap = Tap(name, "output", Layout(-1 if isinstance(module, nn.Linear) else 1, 1, rows, 1))
        units[name] = Units("row", index, rows, {f"{name}.weight": Layout(0, 1, rows, 1)}, tap, tap)
    return units


def layout_problem(model: nn.Module) -> str | None:
    """Why this model's blocks cannot be pruned by head and neuron; None when they can."""
    kind = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(blocks) == 0:
        return f"{kind} has no transformer blocks at .blocks; only plain ViTs are supported"
    embed = getattr(model, "patch_embed", None)
    if not isinstance(getattr(embed, "proj", None), nn.Conv2d) or not hasattr(embed, "num_patches"):
        return f"{kind}'s patch embedding is not one convolution (hybrid, NaFlex); not a plain ViT"
    for index, block in enumerate(blocks):
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        where = f"{kind}.blocks.{index}"
        if not all(isinstance(getattr(attn, part, None), nn.Linear) for part in ("qkv", "proj")):
            return f"{where}.attn has no linear qkv and proj (windowed or split attention); not a plain ViT"
        if not all(isinstance(getattr(mlp, part, None), nn.Linear) for part in ("fc1", "fc2")):
            return f"{where}.mlp has no linear fc1 and fc2; not a plain ViT"
        heads, width = getattr(attn, "num_heads", None), getattr(attn, "head_dim", None)
        if heads is None or width is None or attn.qkv.out_features != 3 * heads * width:
            return f"{where}.attn: qkv does not hold 3 x heads x head_dim rows; not a plain ViT"
        if attn.proj.in_features != heads * width:
            return f"{where}.attn: qkv and proj disagree on the number of heads"
        if getattr(attn, "gate", None) is not None:
            return f"{where}.attn is gated; gated attention is not supported"
        if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            return f"{where}.attn has a norm after attention (sub-LayerNorm), which mixes heads"
        if mlp.fc1.out_features != mlp.fc2.in_features:
            return f"{where}.mlp gates its hidden layer (SwiGLU, GLU): fc1 and fc2 widths differ"
        if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
            return f"{where}.mlp has a norm inside (sub-LayerNorm), which mixes neurons"
        for place, part, known in (("attn", attn, "Attention"), ("mlp", mlp, "Mlp")):
            if type(part).__name__ != known or type(part).__module__ not in PLAIN_MODULES:
                found = f"{type(part).__module__}.{type(part).__name__}"
                return f"{where}.{place} is a {found}, not a plain ViT's {known}"
    return None


# ------------------------------------------------------------------------------------------- how it is scored


@dataclass(frozen=True)
class Criterion:
    """How much each unit matters.

    `score` gets, in float64:
        needs "weights":  the scored weights [units, elements]                 -> [units]
        needs "mask":     the element-wise mask of the same shape              -> [units]
        needs "output":   output activations [images, units, values]           -> [images, units]
        needs "gradient": activations and dL/da, both [images, units, values]  -> [images, units]
        needs "seed":     the number of units and a torch.Generator            -> [units]
    Values per image are averaged over all images; `finish` is applied to that mean. `without_data` scores
    weights in place of missing activations.
    """

    needs: str
    score: Callable[..., Tensor]
    finish: Callable[[Tensor], Tensor] | None = None
    without_data: Callable[[Tensor], Tensor] | None = None


def _abs_sum(weights: Tensor) -> Tensor:
    return weights.abs().sum(1)


CRITERIA: dict[str, Criterion | Callable[[Tensor], Tensor]] = {
    # A plain function scores the weights: CRITERIA["largest"] = lambda weights: weights.abs().amax(1)
    "remain": Criterion("mask", lambda mask: mask.sum(1)),
    "magnitude": Criterion("weights", _abs_sum),
    "l1": Criterion("output", lambda a: a.abs().mean(2), without_data=_abs_sum),
    "l2": Criterion(
        "output", lambda a: a.square().mean(2), finish=torch.sqrt, without_data=lambda w: w.square().sum(1)
    ),
    # First-order Taylor expansion of the loss in the unit's output: Molchanov et al., "Pruning Convolutional
    # Neural Networks for Resource Efficient Inference", ICLR 2017, eq. 5-7; Michel et al., "Are Sixteen Heads
    # Really Better than One?", NeurIPS 2019, eq. 2.
    "saliency": Criterion("gradient", lambda a, gradient: (a * gradient).sum(2).abs()),
    "random": Criterion("seed", lambda count, generator: torch.rand(count, generator=generator)),
}


def score_units(
    model: nn.Module,
    units: Mapping[str, Units],
    criteria: str,
    *,
    mask: Mapping[str, Tensor] | None = None,
    trained_weight: Mapping[str, Tensor] | None = None,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    max_batches: int = SCORE_BATCHES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every unit by one criterion; the only scorer there is.

    Args:
        units: what to score, such as `vit_units(model)`.
        criteria: a key of `CRITERIA`.
        mask: element-wise masks by layer name (`X` or `X.weight_mask`). A unit whose scored weights are all zero
            in it gets -inf, so that it is never chosen again.
        trained_weight: state dict to score in place of the model's own weights.
        batches: (images, labels); the first `max_batches` are read once, in eval mode.
        loss: for saliency; cross entropy by default, summed over images.
        seed: of criterion "random".

    Returns:
        {units key: float64 scores [count] on the CPU}, larger is more important.

    Raises:
        ValueError: unknown criterion, a missing input, or a score that is not a number.
    """
    if criteria not in CRITERIA:
        raise ValueError(f"unknown criterion {criteria!r}; choose from {', '.join(CRITERIA)}")
    criterion = CRITERIA[criteria]
    if not isinstance(criterion, Criterion):
        criterion = Criterion("weights", criterion)
    mask = normalise_names(mask) if mask is not None else None
    needs, score = criterion.needs, criterion.score
    if needs == "output" and batches is None:
        if criterion.without_data is None:
            raise ValueError(f"criterion {criteria!r} needs training data (train_loader)")
        log.info("criterion %s: no data given, scoring weights instead of activations", criteria)
        needs, score = "weights", criterion.without_data
    if needs == "mask" and mask is None:
        raise ValueError(f"criterion {criteria!r} needs the element-wise mask (current_mask)")
    if needs == "gradient" and batches is None:
        raise ValueError(f"criterion {criteria!r} needs training data (train_loader)")

    if needs in ("output", "gradient"):
        with trained_weights(model, trained_weight):
            means = _score_activations(model, units, needs, score, batches, loss, max_batches)
        finish = criterion.finish or (lambda mean: mean)
        scores = {key: finish(mean) for key, mean in means.items()}
    elif needs == "seed":
        scores = {}
        for key, group in units.items():
            # by name, so that a unit's score does not depend on what else is scored
            digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            scores[key] = score(group.count, generator).double()
    else:
        weights = plain_weights(trained_weight if trained_weight is not None else model.state_dict())
        source = {f"{name}.weight": m for name, m in mask.items()} if needs == "mask" else weights
        scores = {}
        for key, group in units.items():
            name, layout = group.scored
            if name not in source:
                raise ValueError(f"criterion {criteria!r}: {name} is missing in what was given")
            scores[key] = score(layout.per_unit(_float64(source[name]))).cpu()

    for key, group in units.items():
        if mask is not None:
            name, layout = group.scored
            layer_mask = mask.get(name.removesuffix(".weight"))
            if layer_mask is not None:
                dead = ~layout.per_unit(layer_mask).bool().any(1).cpu()
                scores[key] = scores[key].masked_fill(dead, -math.inf)
        if scores[key].isnan().any():
            raise ValueError(f"criterion {criteria!r}: a score of {key} is not a number")
    return scores


def _score_activations(model, units, needs, score, batches, loss, max_batches) -> dict[str, Tensor]:
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    taps = {key: group.output if needs == "output" else group.contribution for key, group in units.items()}
    totals = {key: torch.zeros(group.count, dtype=torch.float64) for key, group in units.items()}
    images_seen = 0
    with evaluating(model), captured(model, taps) as activations, torch.set_grad_enabled(needs == "gradient"):
        for images, labels in islice(batches, max_batches):
            activations.clear()
            images = images.detach().to(device, dtype).requires_grad_(needs == "gradient")
            logits = model(images)
            present = [key for key in units if key in activations]  # an emptied branch shows no activation
            if needs == "gradient":
                gradients = torch.autograd.grad(
                    _summed_loss(logits, labels.to(device), loss), [activations[key] for key in present]
                )
            for index, key in enumerate(present):
                layout = taps[key].layout
                inputs = [layout.per_image(_float64(activations[key]))]
                if needs == "gradient":
                    inputs.append(layout.per_image(_float64(gradients[index])))
                totals[key] += score(*inputs).sum(0).detach().cpu()
            images_seen += len(images)
    if images_seen == 0:
        raise ValueError("the training data given for scoring is empty")
    return {key: total / images_seen for key, total in totals.items()}


def _summed_loss(logits: Tensor, labels: Tensor, loss: Callable | None) -> Tensor:
    if loss is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    value = loss(logits, labels)
    return value * len(labels) if getattr(loss, "reduction", "mean") == "mean" else value


def _float64(tensor: Tensor) -> Tensor:
    # MPS has no float64
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


@contextmanager
def captured(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[dict[str, Tensor]]:
    """Record the tapped activations of each forward pass; the hooks are gone when the block is left."""
    found: dict[str, Tensor] = {}
    handles = []
    for key, tap in taps.items():
        module = model.get_submodule(tap.module)
        if tap.side == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, key=key: found.update({key: args[0]})))
        else:
            handles.append(module.register_forward_hook(lambda _, __, out, key=key: found.update({key: out})))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside the block; afterwards every module is back in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def trained_weights(model: nn.Module, weights: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
    """`model` with other weights inside the block, its own again afterwards; None changes nothing.

    Models under `torch.nn.utils.prune` keep their reparametrisation: inside the block their masks are all ones.
    """
    if weights is None:
        yield model
        return
    saved = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    replacement = dict(saved)
    for name, value in plain_weights(weights).items():
        if f"{name}_orig" in replacement:
            replacement[f"{name}_orig"] = value
            replacement[f"{name}_mask"] = torch.ones_like(value)
        elif name in replacement:
            replacement[name] = value
    try:
        model.load_state_dict(replacement)
        _recompute_pruned(model)
        yield model
    finally:
        model.load_state_dict(saved)
        _recompute_pruned(model)


def _recompute_pruned(model: nn.Module) -> None:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(module, None)


def plain_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without `torch.nn.utils.prune`'s pairs: X_orig and X_mask become X = X_orig * X_mask."""
    plain = {}
    for name, value in state_dict.items():
        if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in state_dict:
            stem = name.removesuffix("_orig")
            plain[stem] = value * state_dict[f"{stem}_mask"].to(value)
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state_dict):
            plain[name] = value
    return plain


def normalise_names(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks keyed by layer name, whether they came as `X` or as `X.weight_mask`."""
    return {name.removesuffix(".weight_mask"): mask for name, mask in masks.items()}


def compute_vit_head_importance(
    model, criteria, current_mask=None, trained_weight=None, train_loader=None, criterion=None, seed=0
) -> dict[int, Tensor]:
    """Scores of all heads, {layer index: float64 [num_heads]}; see `score_units` for what is raised."""
    return _importance(model, "head", criteria, current_mask, trained_weight, train_loader, criterion, seed)


def compute_mlp_neuron_importance(
    model, criteria, current_mask=None, trained_weight=None, train_loader=None, criterion=None, seed=0
) -> dict[int, Tensor]:
    """Scores of all MLP neurons, {layer index: float64 [hidden]}; see `score_units` for what is raised."""
    return _importance(model, "neuron", criteria, current_mask, trained_weight, train_loader, criterion, seed)


def _importance(model, kind, criteria, mask, trained_weight, batches, loss, seed) -> dict[int, Tensor]:
    units = vit_units(model, kinds=(kind,))
    scores = score_units(
        model,
        units,
        criteria,
        mask=mask,
        trained_weight=trained_weight,
        batches=batches,
        loss=loss,
        seed=seed,
    )
    return {units[key].layer: value for key, value in scores.items()}


# ------------------------------------------------------------------------------------------ how it is chosen


def scheduled_ratio(schedule: str, ratio: float, state: int, states: int) -> float:
    """The fraction of all units that must be gone before `state` of `states` trains (1 <= state < states)."""
    progress = state / (states - 1)
    if schedule == "geometric":
        return 1 - (1 - ratio) ** progress
    if schedule == "linear":
        return ratio * progress
    if schedule == "constant":
        return ratio
    raise ValueError(f"unknown ratio schedule {schedule!r}; choose geometric, linear or constant")


def keep_count(count: int, ratio: float, minimum: int = 1) -> int:
    """How many of `count` units stay at `ratio`: max(minimum, floor(count (1 - ratio) + 1e-9))."""
    return max(minimum, math.floor(count * (1 - ratio) + 1e-9))


def best_first(scores: Tensor) -> Tensor:
    """Ids of the units that can be chosen, best first; of equal scores the lower id comes first."""
    values, order = torch.sort(scores, descending=True, stable=True)
    return order[values > -math.inf]


def select_units(
    scores: Mapping[str, Tensor], ratio: float, sorting_mode: str = "layer-wise", min_units: int = 1
) -> dict[str, list[int]]:
    """Which units stay, per layer and ascending: the one ranking rule for every kind of unit.

    Args:
        scores: float64 [count] per layer, all of one pool; -inf marks units that are gone already.
        ratio: fraction of all units of the pool that goes, in [0, 1].
        sorting_mode: "layer-wise" ranks each layer by itself, "global" the whole pool.
        min_units: how many a layer keeps at least, as far as it has them.
    """
    if sorting_mode not in ("layer-wise", "global"):
        raise ValueError(f"unknown sorting mode {sorting_mode!r}; choose layer-wise or global")
    ranked = {key: best_first(value) for key, value in scores.items()}
    if sorting_mode == "layer-wise":
        return {
            key: sorted(ranked[key][: keep_count(len(value), ratio, min_units)].tolist())
            for key, value in scores.items()
        }
    total = keep_count(sum(map(len, scores.values())), ratio, len(scores) * min_units)
    kept = {key: order[:min_units].tolist() for key, order in ranked.items()}
    rest = [
        (float(scores[key][unit]), key, unit) for key in scores for unit in sorted(ranked[key][min_units:].tolist())
    ]
    rest.sort(key=lambda entry: -entry[0])  # stable: ties stay in (layer, unit) order
    for _, key, unit in rest[: max(0, total - sum(map(len, kept.values())))]:
        kept[key].append(unit)
    return {key: sorted(ids) for key, ids in kept.items()}


# ------------------------------------------------------------------------------------------ how it is removed


def unit_masks(units: Mapping[str, Units], kept: Kept, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0/1 masks by parameter name, 1 on the kept units, for those parameters of theirs that `tensors` holds."""
    return {
        name: layout.mask(tensors[name], kept[key])
        for key, group in units.items()
        if key in kept
        for name, layout in group.parts.items()
        if name in tensors
    }


def follower_masks(units: Mapping[str, Units], kept: Kept, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0/1 masks by name of what goes with units when they are cut out, 1 where it stays; only where something goes."""
    return {
        name: layout.mask(tensors[name], kept[key])
        for key, group in units.items()
        if group.removable and len(kept.get(key, range(group.count))) < group.count
        for name, layout in group.followers.items()
        if name in tensors
    }


def slice_tensors(tensors: Mapping[str, Tensor], units: Mapping[str, Units], kept: Kept) -> dict[str, Tensor]:
    """The tensors of the smaller model: units that are not kept are cut out, everything else is cloned."""
    small = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for key, group in units.items():
        if key in kept:
            for name, layout in group.cut_out:
                if name in small:
                    index = torch.as_tensor(kept[key], dtype=torch.long, device=small[name].device)
                    small[name] = layout.select(small[name], index)
    return small


def scatter_tensors(small: Mapping[str, Tensor], units: Mapping[str, Units], kept: Kept) -> dict[str, Tensor]:
    """The inverse of `slice_tensors`: tensors of the dense shapes, zero where units were cut out."""
    dense = {name: tensor.detach().clone() for name, tensor in small.items()}
    for key, group in units.items():
        if key in kept:
            for name, layout in group.cut_out:
                if name in dense:
                    share = dense[name]
                    index = torch.as_tensor(kept[key], dtype=torch.long, device=share.device)
                    shape = list(share.shape)
                    shape[layout.dim] = layout.lead * layout.count * layout.width
                    dense[name] = layout.scatter_(share.new_zeros(shape), share, index)
    return dense


def remove_units(model: nn.Module, units: Mapping[str, Units], kept: Kept) -> nn.Module:
    """Cut the units that are not kept out of `model`, in place; `units` describes the model as it is before.

    The function stays the same wherever the removed units' columns in `attn.proj` and `mlp.fc2` are zero:
    head_dim, the scale head_dim ** -0.5, the output biases, the norms and the residual width are untouched.

    Raises:
        ValueError: the model is under `torch.nn.utils.prune`; make that permanent first (`remove_prune_vit`).
    """
    if prune.is_pruned(model):
        raise ValueError("the model is under torch.nn.utils.prune; call remove_prune_vit or remove_prune first")
    for key, group in units.items():
        if key not in kept:
            continue
        for name, layout in group.cut_out:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            tensor = getattr(module, leaf)
            index = torch.as_tensor(kept[key], dtype=torch.long, device=tensor.device)
            small = layout.select(tensor.detach(), index)
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, requires_grad=tensor.requires_grad)
            setattr(module, leaf, small)
            if leaf == "weight":
                _tell_size(module)
        if group.kind == "head":
            attn = model.get_submodule(key)
            attn.num_heads = len(kept[key])
            attn.attn_dim = attn.num_heads * attn.head_dim
            if attn.num_heads == 0 and hasattr(attn, "fused_attn"):
                attn.fused_attn = False  # timm's fused path dies on no heads at all under torch 2.9
        if group.place and len(kept[key]) < group.count:
            path, _, leaf = group.place.rpartition(".")
            block = model.get_submodule(path)
            earlier = getattr(block, leaf)  # where what is left of an earlier removal went
            setattr(block, leaf, index if earlier is None else earlier[index])
    return model


def _tell_size(module: nn.Module) -> None:
    """Bring a layer's own record of its size in line with its weight."""
    shape = module.weight.shape
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = shape[:2]
    elif isinstance(module, nn.BatchNorm2d):
        (module.num_features,) = shape
    else:
        module.out_features, module.in_features = shape


@torch.no_grad()
def find_working_units(model: nn.Module) -> dict[str, list[int]]:
    """Which heads and neurons still work, for a model whose weights were pruned one by one: {units key: ids}.

    A head is dead when its `attn.proj` columns are zero or its v rows are, a neuron when its `mlp.fc2` column or its
    `mlp.fc1` row is. `fold_dead_units_` has to come before they are removed.
    """
    alive = {}
    for key, group in vit_units(model).items():
        (rows_name, rows), *_, (columns_name, columns) = group.parts.items()
        incoming = rows.per_unit(model.get_parameter(rows_name))
        if group.kind == "head":
            incoming = incoming.unflatten(1, (3, -1))[:, 2]  # q and k only choose where v is read
        works = incoming.any(1)
        branch = model.get_submodule(key)
        if (branch.proj if group.kind == "head" else branch.fc2).bias is None:
            works[:] = True  # nothing to fold a constant into
        works &= columns.per_unit(model.get_parameter(columns_name)).any(1)
        alive[key] = works.nonzero().flatten().tolist()
    return alive


@torch.no_grad()
def fold_dead_units_(model: nn.Module, alive: Kept) -> None:
    """Add what dead units still emit, the constant of their biases, to the output bias of their branch, in place.

    A head whose v rows are zero emits its v bias whatever it attends to, a neuron with a zero row act(bias).
    """
    for key, group in vit_units(model).items():
        working = set(alive.get(key, range(group.count)))
        dead = [unit for unit in range(group.count) if unit not in working]
        branch = model.get_submodule(key)
        source, output = (branch.qkv, branch.proj) if group.kind == "head" else (branch.fc1, branch.fc2)
        if not dead or source.bias is None or output.bias is None:
            continue
        rows, columns = group.parts[f"{key}.{'qkv' if group.kind == 'head' else 'fc1'}.bias"], group.contribution.layout
        constant = rows.split(source.bias)[-1]  # [count, width]; of q, k and v the last
        if group.kind == "neuron":
            constant = branch.act(constant)
        weight = columns.split(output.weight)[:, 0]  # [D, count, width]
        output.bias += torch.einsum("duw,uw->d", weight[:, dead], constant[dead])


def prune_attention_heads_hard(attn_module: nn.Module, heads_to_prune: Iterable[int]) -> None:
    """Physically remove heads, by id, from an attention module with `qkv`, `proj`, `num_heads`, `head_dim`."""
    _remove_by_id(attn_module, _heads_of(attn_module, "", 0), heads_to_prune)


def prune_mlp_neurons_hard(mlp_module: nn.Module, neurons_to_prune: Iterable[int]) -> None:
    """Physically remove neurons, by id, from an MLP with `fc1` and `fc2`."""
    _remove_by_id(mlp_module, _neurons_of(mlp_module, "", 0), neurons_to_prune)


def _remove_by_id(module: nn.Module, group: Units, ids: Iterable[int]) -> None:
    doomed = set(map(int, ids))
    if not doomed <= set(range(group.count)):
        raise ValueError(f"{group.kind} ids must lie in 0..{group.count - 1}, got {sorted(doomed)}")
    remove_units(module, {"": group}, {"": [unit for unit in range(group.count) if unit not in doomed]})


def structured_prune_vit_heads(
    model: nn.Module, head_importance: Mapping[int, Tensor], prune_ratio: float | Mapping[int, float]
) -> dict[int, list[int]]:
    """Physically remove the least important heads, once, in place.

    Args:
        head_importance: {layer index: scores [num_heads]} of the layers to prune.
        prune_ratio: fraction of the heads that are there, for all layers or {layer index: fraction}; the nearest
            whole number goes (ties down), at least one head stays.

    Returns:
        {layer index: ids that stay}, counted in the model as it was.
    """
    return _prune_once(model, "head", head_importance, prune_ratio)


def structured_prune_mlp_neurons(
    model: nn.Module, neuron_importance: Mapping[int, Tensor], prune_ratio: float | Mapping[int, float]
) -> dict[int, list[int]]:
    """The same for MLP neurons; `neuron_importance` is {layer index: scores [hidden]}."""
    return _prune_once(model, "neuron", neuron_importance, prune_ratio)


def _prune_once(model, kind, importance, prune_ratio) -> dict[int, list[int]]:
    kept = {}
    units = {key: group for key, group in vit_units(model, (kind,)).items() if group.layer in importance}
    for key, group in units.items():
        scores = torch.as_tensor(importance[group.layer], dtype=torch.float64)
        if len(scores) != group.count:
            raise ValueError(f"layer {group.layer} has {group.count} {kind}s, but {len(scores)} scores were given")
        ratio = prune_ratio[group.layer] if isinstance(prune_ratio, Mapping) else prune_ratio
        if not 0 <= ratio < 1:
            raise ValueError(f"prune_ratio must lie in [0, 1), got {ratio}")
        stay = max(1, group.count - math.ceil(group.count * ratio - 0.5 - 1e-9))
        kept[key] = sorted(best_first(scores)[:stay].tolist())
    remove_units(model, units, kept)
    return {units[key].layer: ids for key, ids in kept.items()}


# ------------------------------------------------------------------------------------- what it counts and costs


def count_vit_parameters(model: nn.Module) -> int:
    """Number of parameters of the model as it is."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_vit_structure(model: nn.Module) -> list[dict[str, int]]:
    """Print heads, head width and neurons of each block and return them as rows.

    Raises:
        LayoutError: the layers of a block disagree with each other, or the model is not a plain ViT.
    """
    reason = layout_problem(model)
    if reason:
        raise LayoutError(reason)
    rows = [
        {
            "layer": layer,
            "heads": block.attn.num_heads,
            "head_dim": block.attn.head_dim,
            "neurons": block.mlp.fc1.out_features,
        }
        for layer, block in enumerate(model.blocks)
    ]
    print("[ViT Structure]")
    for row in rows:
        print("blocks.{layer:<3} | {heads:>3} heads of {head_dim} | {neurons:>5} neurons".format(**row))
    heads, neurons = (sum(row[name] for row in rows) for name in ("heads", "neurons"))
    print(f"total      | {heads:>3} heads | {neurons:,} neurons | {count_vit_parameters(model):,} parameters")
    return rows


def unit_weights(model: nn.Module, group: Units) -> int:
    """Prunable weights that one unit of the group holds (biases not counted)."""
    return _elements(model, group, [name for name in group.parts if _tensor(model, name).ndim > 1])


def unit_parameters(model: nn.Module, group: Units) -> int:
    """Parameters that go with one unit of the group, biases included."""
    return _elements(model, group, list(group.parts))


def _elements(model: nn.Module, group: Units, names: list[str]) -> int:
    return sum(_tensor(model, name).numel() for name in names) // max(1, group.count)


def _tensor(model: nn.Module, name: str) -> Tensor:
    # under torch.nn.utils.prune a weight is no parameter but an attribute
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def unit_macs(model: nn.Module, group: Units) -> int:
    """Forward multiply-accumulates per image that go with one unit (N tokens, width d, embedding D).

    A head costs N d D for each of q, k, v and the projection, and 2 N^2 d for its attention; a neuron 2 N D.
    """
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    attention = 2 * tokens * tokens * group.scored[1].width if group.kind == "head" else 0
    return tokens * unit_weights(model, group) + attention


def vit_macs(model: nn.Module, counts: Mapping[str, int] | None = None) -> int:
    """Forward multiply-accumulates per image of a ViT by closed form, norms and activations not counted.

    `torch.utils.flop_counter` does not see fused attention on the CPU, hence the formula. `counts` gives the
    units left per key of `vit_units`; None counts the model as it is.
    """
    units = vit_units(model)
    total = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    for key, group in units.items():
        left = group.count if counts is None else counts.get(key, group.count)
        total += left * unit_macs(model, group)
    if isinstance(model.head, nn.Linear):
        total += model.head.weight.numel()
    return total


def vit_cost(model: nn.Module, kept: Kept) -> dict[str, int]:
    """Heads, neurons, parameters and MACs of `model` once only the kept units are left (keys absent: all stay)."""
    units = vit_units(model)
    left = {key: len(kept[key]) if key in kept else group.count for key, group in units.items()}
    gone = sum((group.count - left[key]) * unit_parameters(model, group) for key, group in units.items())
    return {
        "heads": sum(left[key] for key, group in units.items() if group.kind == "head"),
        "neurons": sum(left[key] for key, group in units.items() if group.kind == "neuron"),
        "parameters": count_vit_parameters(model) - gone,
        "macs": vit_macs(model, left),
    }


def plan_structured(
    model: nn.Module,
    ratios: Mapping[str, float],
    states: int,
    schedule: str = "geometric",
    sorting_mode: str = "layer-wise",
    min_units: int = 1,
) -> list[dict[str, float]]:
    """What each state trains, before anything is trained: heads, neurons, parameters, MACs and density.

    `ratios` is {"head": fraction, "neuron": fraction}; the rows hold the totals, which do not depend on scores.
    """
    units = vit_units(model)
    weights = sum(group.count * unit_weights(model, group) for group in units.values())
    rows = []
    for state in range(states):
        left = {key: group.count for key, group in units.items()}
        for kind, ratio in ratios.items():
            pool = [key for key, group in units.items() if group.kind == kind]
            wanted = scheduled_ratio(schedule, ratio, state, states) if state else 0.0
            if sorting_mode == "layer-wise":
                left.update({key: keep_count(units[key].count, wanted, min_units) for key in pool})
            else:
                total = keep_count(sum(units[key].count for key in pool), wanted, len(pool) * min_units)
                # which layer they come from is up to the scores; all layers cost the same
                left.update({key: total // len(pool) + (i < total % len(pool)) for i, key in enumerate(pool)})
        row = vit_cost(model, {key: range(count) for key, count in left.items()})
        row["density"] = sum(left[key] * unit_weights(model, group) for key, group in units.items()) / weights
        rows.append({"state": state, **row})
    return rows
