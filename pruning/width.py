"""Width of the residual stream of a pre-norm ViT: fewer channels by a rotation, without adapters.

    small, share = narrow_width(model, 256, images)

Every layer reads the stream through a LayerNorm and writes to it by addition, so the stream may be turned at will.
For d -> d' channels:

1. LayerScale goes into the layer before it, a LayerNorm's gain and bias into the layers behind it. What writes is
   centred over channels, which no LayerNorm sees.
2. S = sum over all LayerNorms of E[n n^T], n their normalised inputs; U = its d' - 1 leading eigenvectors orthogonal to
   1, rho = their share of the trace; E = an orthonormal basis of what is orthogonal to 1 in d' channels; T = E U^T.
3. Writers W become T W, biases and embeddings likewise; eps of each LayerNorm becomes eps d / d'.
4. Readers W become W B, with B the linear regression of the old n on the new n' of the same image: W T^T sqrt(rho d/d')
   and what least squares adds to it. A reader's bias takes the mean.

At d' = d it is the same function. The result is an ordinary ViT of width d', but for its eps, with as many heads and
neurons, as wide as before. That a network is invariant under rotations of its residual stream, and may then be sliced,
is of Ashkboos et al., "SliceGPT", ICLR 2024 (arXiv 2401.15024), who turn LayerNorms into RMSNorms for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.moments import Moments
from pruning.scores import evaluating
from pruning.units import LayoutError

_RIDGE = 1e-8  # of the regression of old on new inputs, whose factor d' x d' is singular along 1
_BATCH = 64
_TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")
_INPUTS = {"attn": ("qkv", "q_proj", "k_proj", "v_proj"), "mlp": ("fc1", "fc1_g", "fc1_x")}
_OUTPUTS = {"attn": "proj", "mlp": "fc2"}


def width_problem(model: nn.Module) -> str | None:
    """Why the residual stream of a model cannot be turned; None when it can."""
    kind = type(model).__name__
    if kind != "VisionTransformer" or not isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d):
        return f"{kind} is no plain Vision Transformer with a convolution as patch embedding"
    for name in ("norm_pre", "attn_pool"):
        if not isinstance(getattr(model, name, None) or nn.Identity(), nn.Identity):
            return f"{kind}.{name} reads or writes the residual stream otherwise than the blocks"
    if not isinstance(getattr(model.patch_embed, "norm", None) or nn.Identity(), nn.Identity):
        return f"{kind}.patch_embed.norm writes the residual stream"
    for index, block in enumerate(model.blocks):
        if type(block).__name__ != "Block" or not hasattr(block, "norm1"):
            return f"{kind}.blocks.{index} is a {type(block).__name__}, not a pre-norm block"
        if getattr(block.attn, "gate", None) is not None:
            return f"{kind}.blocks.{index}.attn has a gate that reads the residual stream"
    for norm, readers in _norms(model):
        if type(norm) is not nn.LayerNorm and type(norm).__name__ != "LayerNorm":
            return f"{kind} has a {type(norm).__name__}, not a LayerNorm"
        if any(reader.bias is None for reader in readers):
            return f"{kind} has a layer without bias behind a LayerNorm, whose bias it cannot take"
    return None


def _norms(model: nn.Module) -> Iterator[tuple[nn.LayerNorm, list[nn.Linear]]]:
    """Each LayerNorm on the stream, and the layers that read it."""
    for block in model.blocks:
        for norm, name in ((block.norm1, "attn"), (block.norm2, "mlp")):
            module = getattr(block, name)
            yield norm, [getattr(module, n) for n in _INPUTS[name] if getattr(module, n, None) is not None]
    heads = [getattr(model, name, None) for name in ("head", "head_dist")]
    last = [norm for norm in (model.norm, getattr(model, "fc_norm", None)) if isinstance(norm, nn.LayerNorm)]
    yield last[-1], [head for head in heads if isinstance(head, nn.Linear)]


@torch.no_grad()
def narrow_width(model: nn.Module, width: int, images: Tensor | Iterable[Tensor]) -> tuple[nn.Module, float]:
    """A copy of `model` whose residual stream has `width` channels, and rho, the share of the norms' outputs it holds.

    Args:
        images: [N, C, H, W], or batches of such; labels are not needed.

    Raises:
        LayoutError: the stream of this model cannot be turned; `width_problem` says why.
        ValueError: a width that is not in 2 .. the present one, or no images.
    """
    if reason := width_problem(model):
        raise LayoutError(f"width: {reason}")
    dense = next(norm for norm, _ in _norms(model)).weight.numel()
    if not 2 <= width <= dense:
        raise ValueError(f"width {width} must lie in 2 .. {dense}")
    batches = list(images.split(_BATCH)) if isinstance(images, Tensor) else list(images)
    if not batches:
        raise ValueError("no calibration images were given; width needs at least one")
    small = copy.deepcopy(model)
    _fold(small)
    norms = [norm for norm, _ in _norms(small)]
    seen = _collect(small, norms, batches, dense, lambda norm, x: _normalised(x, dense, norm.eps))
    turn, share = _rotation(sum(moments.second() for moments in seen), width)
    ratio = dense / width

    def both(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        turned = (x.double() @ turn.T).to(x)
        return torch.cat([_normalised(x, dense, norm.eps), _normalised(turned, width, norm.eps * ratio)], -1)

    pairs = _collect(small, norms, batches, dense + width, both)
    for (norm, readers), moments in zip(_norms(small), pairs, strict=True):
        back, offset = _regression(moments, turn, (share * ratio) ** 0.5, dense)
        for reader in readers:
            weight = reader.weight.double()
            reader.bias += (weight @ offset).to(reader.bias)
            reader.weight = _parameter(weight @ back, reader.weight)
            reader.in_features = width
        norm.weight, norm.bias = (_parameter(tensor[:width], tensor) for tensor in (norm.weight, norm.bias))
        norm.normalized_shape, norm.eps = (width,), norm.eps * ratio
    _turn_writers(small, turn)
    for name in ("embed_dim", "num_features", "head_hidden_size"):
        if hasattr(small, name):
            setattr(small, name, width)
    return small, share


def _normalised(x: Tensor, width: int, eps: float) -> Tensor:
    return F.layer_norm(x, (width,), eps=eps)


def _fold(model: nn.Module) -> None:
    """LayerScale into the layer before it, gain and bias of each LayerNorm into those behind it, in place."""
    for block in model.blocks:
        for name, output in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            factor = getattr(getattr(block, name, None), "gamma", None)
            if factor is not None:
                output.weight *= factor[:, None]
                if output.bias is not None:
                    output.bias *= factor
                setattr(block, name, nn.Identity())
    for norm, readers in _norms(model):
        for reader in readers:
            reader.bias += reader.weight @ norm.bias
            reader.weight *= norm.weight
        norm.weight.fill_(1)
        norm.bias.zero_()


def _collect(model, norms, batches, width, compute) -> list[Moments]:
    """The moments of `compute(norm, its input)` at each norm, over all images and tokens."""
    moments = [Moments(width, norm.weight.device) for norm in norms]
    handles = [
        norm.register_forward_pre_hook(
            lambda norm, args, seen=seen: seen.add(compute(norm, args[0]).reshape(-1, width))
        )
        for norm, seen in zip(norms, moments, strict=True)
    ]
    try:
        with evaluating(model):
            for images in batches:
                model(images.to(norms[0].weight.device, norms[0].weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _complement(width: int, like: Tensor) -> Tensor:
    """An orthonormal basis [width, width - 1] of what is orthogonal to 1."""
    columns = torch.eye(width).to(like)[:, : width - 1]
    ones = torch.ones(width, 1).to(like)
    return torch.linalg.qr(torch.cat([ones, columns], 1)).Q[:, 1:]


def _rotation(second: Tensor, width: int) -> tuple[Tensor, float]:
    """T [d', d] and rho."""
    inside = _complement(len(second), second)
    values, vectors = torch.linalg.eigh(inside.T @ second @ inside)
    leading = inside @ vectors[:, len(values) - (width - 1) :]
    total = float(values.sum())
    return _complement(width, second) @ leading.T, float(values[-(width - 1) :].sum()) / total if total > 0 else 1.0


def _regression(moments: Moments, turn: Tensor, factor: float, dense: int) -> tuple[Tensor, Tensor]:
    """B [d, d'] and E n - B E n'."""
    covariance, mean = moments.covariance(), moments.mean()
    first = turn.T * factor
    old_new, new = covariance[:dense, dense:], covariance[dense:, dense:]
    level = _RIDGE * new.diagonal().mean().clamp_min(1e-30)
    change = torch.linalg.solve(new + level * torch.eye(len(new)).to(new), (old_new - first @ new).T).T
    back = first + change
    return back, mean[:dense] - back @ mean[dense:]


def _turn_writers(model: nn.Module, turn: Tensor) -> None:
    width = len(turn)
    outputs = [getattr(getattr(block, name), _OUTPUTS[name]) for block in model.blocks for name in _OUTPUTS]
    for layer in (model.patch_embed.proj, *outputs):
        layer.weight = _parameter(torch.tensordot(turn, layer.weight.double(), 1), layer.weight)
        if layer.bias is not None:
            layer.bias = _parameter(turn @ layer.bias.double(), layer.bias)
        setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", width)
    for name in _TOKENS:
        tensor = getattr(model, name, None)
        if tensor is not None:
            setattr(model, name, _parameter(tensor.double() @ turn.T, tensor))


def _parameter(values: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.detach().to(like).clone().contiguous(), requires_grad=like.requires_grad)
