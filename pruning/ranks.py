"""Ranks of attention: heads with fewer dimensions, in bases where those that go carry next to nothing.

    small, kept = narrow_ranks(model, units, branches, images, 32)

Queries and keys meet only in q.k, values and output projection only in their product, each head for itself, so their
inner bases are free. Over calibration images, for each head of d dimensions and a rank r <= d:

- q, k: G_Q = E[q q^T], G_K = covariance of k centred per image, as softmax ignores what all keys of an image share.
  With the SVD G_Q^1/2 G_K^1/2 = U s V^T, q' = (s_r^1/2 U_r^T G_Q^-1/2) q and k' = (s_r^1/2 V_r^T G_K^-1/2) k. No pair
  of rank r has a smaller squared error over all pairs of calibration queries and centred keys (Eckart and Young).
- v, proj: z = a head's output, C = Cov(z), W_o its columns of proj. With the SVD C^1/2 W_o^T = U s V^T and
  R = C^-1/2 U_r, v' = R^T v; then proj is solved for once by least squares over z' of all heads, the mean in its bias.
- Only the products count, so their singular values are shared out evenly between both factors (`_balance`): rows of one
  factor would else be many times those of the other, which an optimizer with one step size destroys.

A module of one rank for all is its own class again: its scale becomes r^-1/2, for which q and k make up. Bases of q
and k are not free under RoPE or norms of q and k, those of v not under a gate or a norm in front of proj.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.moments import reading
from pruning.scores import captured, evaluating
from pruning.units import LayoutError, Units

_FLOOR = 1e-6  # of eigenvalues, as a share of their mean: keeps every basis invertible
_BATCH = 64


@dataclass
class _Seen:
    """Sums over calibration images of one attention: query products and centred key products, [heads, d, d]."""

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class RankKept:
    """Shares of s^2 that the dimensions left hold, all heads together, and row norms (median, largest) of q, k, v."""

    qk: float
    vo: float
    before: tuple[float, float]
    after: tuple[float, float]


def rank_problem(module: nn.Module) -> str | None:
    """Why the heads of an attention have no free rank of one size for q, k and v; None where they have."""
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(module, name, None) or nn.Identity(), nn.Identity):
            return "norms of queries and keys fix their basis: only v and proj have a free rank"
    if "rope" in type(module).__name__.lower() or "Eva" in type(module).__name__:
        return "RoPE fixes the basis of queries and keys: only v and proj have a free rank"
    if hasattr(module, "logit_scale"):
        return "cosine attention (SwinV2) fixes the basis of queries and keys"
    if getattr(module, "gate", None) is not None:
        return "a gate in front of proj fixes the basis of the values"
    if not isinstance(getattr(module, "norm", None) or nn.Identity(), nn.Identity):
        return "a norm in front of proj fixes the basis of the values"
    if hasattr(module, "in_split"):
        return "attention and MLP share their layers in parallel blocks"
    return None


@torch.no_grad()
def narrow_ranks(
    model: nn.Module,
    units: Mapping[str, Units],
    branches: Iterable,
    images: Tensor | Iterable[Tensor],
    rank: int | Mapping[str, int],
) -> tuple[nn.Module, dict[str, RankKept]]:
    """A copy of `model` whose heads have `rank` dimensions, for q, k and v alike, and what each attention kept.

    Args:
        units, branches: those of the model's family: `family.units(model)` and `family.branches(model)`.
        images: [N, C, H, W] or batches of such.
        rank: of all attentions, or by units key; one that is not named stays as it is.

    At the full rank it is the same function. Raises:
        LayoutError: the basis of q and k or that of v is not free.
        ValueError: a rank that is not in 1 .. head_dim, no images.
    """
    chosen = {}
    for key, module, branch in branches:
        if branch.kind == "head" and (not isinstance(rank, Mapping) or key in rank):
            wanted = rank[key] if isinstance(rank, Mapping) else rank
            if reason := rank_problem(module):
                raise LayoutError(f"{key} cannot be narrowed: {reason}")
            width = min(branch.width(module), module.proj.out_features)
            if not 1 <= wanted <= width:
                raise ValueError(f"rank {wanted} of {key} must lie in 1 .. {width}, its head dimension")
            if branch.count(module):
                chosen[key] = (wanted, branch)
    batches = list(images.split(_BATCH)) if isinstance(images, Tensor) else list(images)
    seen, moments = _collect(model, {key: units[key] for key in chosen}, batches)
    small, kept = copy.deepcopy(model), {}
    for key, (wanted, branch) in chosen.items():
        kept[key] = _narrow(small.get_submodule(key), branch, wanted, seen[key], moments[units[key].reader.layer])
    return small, kept


def _collect(model: nn.Module, units: Mapping[str, Units], batches: list[Tensor]):
    taps = {key: group.output for key, group in units.items()}
    layers = dict.fromkeys(group.reader.layer for group in units.values())
    seen: dict[str, _Seen] = {}
    parameter = next(model.parameters())
    with evaluating(model), captured(model, taps) as found, reading(model, layers) as moments:
        for images in batches:
            model(images.to(parameter.device, parameter.dtype))
            for key, tap in taps.items():
                activation = found[key] if found[key].dtype == torch.float64 else found[key].float()
                q, k, _ = tap.layout.split(activation).unbind(-3)  # [images or windows, N, heads, d]
                k = k - k.mean(-3, keepdim=True)
                with torch.autocast(q.device.type, enabled=False):
                    products = [torch.einsum("...hi,...hj->hij", x, x).double() for x in (q, k)]
                if key in seen:
                    seen[key].queries += products[0]
                    seen[key].keys += products[1]
                else:
                    seen[key] = _Seen(*products)
    if not batches:
        raise ValueError("no calibration images were given; ranks need at least one")
    return seen, moments


# ------------------------------------------------------------------------------------------ the bases


def _roots(products: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of positive semidefinite matrices [h, d, d] and their inverses, of eigenvalues above `_FLOOR`."""
    values, vectors = torch.linalg.eigh(products)
    mean = values.clamp_min(0).mean(-1, keepdim=True)
    values = torch.where(mean > 0, values.clamp_min(0) + _FLOOR * mean, 1.0)
    roots = values.sqrt()
    return (vectors * roots[:, None]) @ vectors.mT, (vectors / roots[:, None]) @ vectors.mT


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [h, m, r] and [h, r, n] of the same products whose columns and rows have equal norms in both."""
    first, second = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, s, vt = torch.linalg.svd(first.R @ second.R.mT)
    root = s.sqrt()
    return (first.Q @ u) * root[:, None], root[:, :, None] * (vt @ second.Q.mT)


def _narrow(attn: nn.Module, branch, rank: int, seen: _Seen, moments) -> RankKept:
    layer, width, count = getattr(attn, branch.output_name(attn)), branch.width(attn), branch.count(attn)
    weights, biases = _inputs(attn, branch)  # [3, heads, d, D], [3, heads, d]
    before = _row_norms(weights)
    (q, k, v), (q_bias, _, v_bias) = weights.unbind(0), biases.unbind(0)

    (root_q, inverse_q), (root_k, inverse_k) = _roots(seen.queries.to(q)), _roots(seen.keys.to(q))
    u, s, vt = torch.linalg.svd(root_q @ root_k)
    level = s[:, :rank, None].sqrt()
    to_q, to_k = level * u[:, :, :rank].mT @ inverse_q, level * vt[:, :rank] @ inverse_k
    new_q = torch.cat([to_q @ q, to_q @ q_bias[:, :, None]], 2)
    # timm scales by r^-1/2 where this was d^-1/2; the key's bias adds the same to all keys
    shared_q, shared_k = _balance((rank / width) ** 0.5 * new_q.mT, to_k @ k)
    qk = float(s[:, :rank].square().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny))

    takes_means = layer.bias is not None
    second = moments.covariance() if takes_means else moments.second()
    blocks = second.unflatten(0, (count, width)).unflatten(2, (count, width))
    blocks = torch.stack([blocks[head, :, head] for head in range(count)]).to(v)
    root, inverse = _roots(blocks)
    columns = layer.weight.detach().to(v)  # [D, heads * d]
    by_head = columns.unflatten(1, (count, width)).transpose(0, 1)  # [heads, D, d]
    u, s, _ = torch.linalg.svd(root @ by_head.mT, full_matrices=False)
    basis = inverse @ u[:, :, :rank]  # [heads, d, r]
    vo = float(s[:, :rank].square().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny))
    new = by_head @ root @ u[:, :, :rank]  # [heads, D, r], each head for itself
    new, offset = _all_heads(columns, new, basis, second.to(v), moments.mean().to(v), takes_means)
    values = torch.cat([basis.mT @ v, basis.mT @ v_bias[:, :, None]], 2)
    shared_o, shared_v = _balance(new, values)

    new_weights = torch.stack([shared_q.mT[..., :-1], shared_k, shared_v[..., :-1]])
    zeros = torch.zeros_like(shared_v[..., -1])
    new_biases = torch.stack([shared_q[:, -1], zeros, shared_v[..., -1]])
    _write(attn, branch, new_weights, new_biases)
    layer.weight = _parameter(shared_o.transpose(0, 1).flatten(1), layer.weight)
    layer.in_features = layer.weight.shape[1]
    if offset is not None:
        layer.bias.data += offset.to(layer.bias)
    attn.head_dim, attn.scale = rank, rank**-0.5
    branch.resize(attn, count)
    return RankKept(qk, vo, before, _row_norms(new_weights))


def _all_heads(columns, new, basis, second, mean, takes_means) -> tuple[Tensor, Tensor | None]:
    """proj [heads, D, r] by least squares over the new dimensions of all heads, and what its bias takes besides."""
    count, _, rank = basis.shape
    change = torch.block_diag(*basis)  # [heads * d, heads * r]
    flat = new.transpose(0, 1).flatten(1)
    lost = columns - flat @ change.T
    reads = change.T @ second @ change  # the identity within each head
    reads = reads + _FLOOR * torch.eye(len(reads)).to(reads)
    values, vectors = torch.linalg.eigh(reads)
    # heads that compute the same are interchangeable
    inverse = torch.where(values > 1e-6, 1 / values.clamp_min(1e-6), 0.0)
    flat = flat + (lost @ second @ change @ vectors * inverse) @ vectors.T
    offset = (columns - flat @ change.T) @ mean if takes_means else None
    return flat.unflatten(1, (count, rank)).transpose(0, 1), offset


# ------------------------------------------------------------------------------------------ in and out of a module


def _layers(attn: nn.Module, branch) -> list[tuple[nn.Linear, int]]:
    found = [(getattr(attn, name, None), streams) for name, streams in branch.inputs.items()]
    return [(layer, streams) for layer, streams in found if layer is not None]


def _inputs(attn: nn.Module, branch) -> tuple[Tensor, Tensor]:
    """Weights [3, heads, d, D] and biases [3, heads, d] of queries, keys and values, in float64."""
    shape = (branch.count(attn), branch.width(attn))
    weights, biases = [], []
    for layer, streams in _layers(attn, branch):
        weight = layer.weight.detach().double()
        weights.append(weight.unflatten(0, (streams, *shape)))
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
        biases.append(bias.unflatten(0, (streams, *shape)))
    bias = torch.cat(biases)
    for name, (_, stream) in branch.tensors.items():
        if stream is not None and getattr(attn, name, None) is not None:
            bias[stream] += getattr(attn, name).detach().double().unflatten(0, shape)
    return torch.cat(weights), bias


def _write(attn: nn.Module, branch, weights: Tensor, biases: Tensor) -> None:
    start = 0
    for layer, streams in _layers(attn, branch):
        layer.weight = _parameter(weights[start : start + streams].flatten(0, 2), layer.weight)
        layer.out_features = len(layer.weight)
        if layer.bias is not None:
            layer.bias = _parameter(biases[start : start + streams].flatten(), layer.bias)
        start += streams
    for name, (_, stream) in branch.tensors.items():
        if stream is not None and getattr(attn, name, None) is not None:
            setattr(attn, name, _parameter(biases[stream].flatten(), getattr(attn, name)))
    for name in branch.followers:
        if getattr(attn, name, None) is not None:
            setattr(attn, name, torch.zeros(biases[0].numel()).to(getattr(attn, name)))


def _parameter(values: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.to(like).contiguous(), requires_grad=like.requires_grad)


def _row_norms(weights: Tensor) -> tuple[float, float]:
    norms = weights.norm(dim=-1).flatten()
    return float(norms.median()), float(norms.max())
