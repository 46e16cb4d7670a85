"""Token merging in Vision Transformers (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023).

    merge_tokens_(model, 8)                    # from now on every block merges 8 tokens of each image
    token_counts(model)                        # [(197, 189), (189, 181), ...]: tokens that attention and MLP see

Between attention and MLP of a block, r tokens become part of others. Tokens belong to two sets in turn, A and B; each
of A looks for its most similar one in B by the cosine of their keys, summed over heads; the r most similar pairs merge
into averages weighted by how many patches each stands for. Attention then adds the logarithm of that number to its
logits (proportional attention, eq. 1), so that what merged weighs as much as it did apart. Class and other prefix
tokens never merge. Where a model reads more than those after its last block, each patch is given the token that it was
merged into.

Parameters, their names and their values do not change, so a state dict fits with and without merging.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vit import attend

PLACES = ("models.vit", "timm.models.vision_transformer")  # where Block and forward_features are the plain ones
ATTENTION = ("models.vit", "timm.layers.attention", "timm.models.vision_transformer")

Watch = Callable[[int, Tensor], Tensor]


def merge_tokens_(model: nn.Module, tokens: int) -> nn.Module:
    """Let every block of `model` merge that many tokens per image, in place; 0 changes nothing.

    Where fewer than twice as many patch tokens are left, a block merges half of them.

    Raises:
        ValueError: its blocks are not those of a plain ViT, or not even the first of them could merge so many.
    """
    if not tokens:
        return model
    flag, kind = f"--token_merge {tokens}", type(model).__name__
    reason = _problem(model)
    if reason:
        raise ValueError(f"{flag}: {kind} {reason}; leave it out")
    most = model.patch_embed.num_patches // 2
    if tokens > most:
        raise ValueError(f"{flag}: a block merges at most half of the patches, here {most}; give {most} or less")
    model.blocks.__class__ = MergingBlocks
    model.blocks.rate, model.blocks.prefix, model.blocks.watch = tokens, model.num_prefix_tokens, None
    only_prefix = getattr(model, "global_pool", "token") == "token" and getattr(model, "attn_pool", None) is None
    model.blocks.restores = not only_prefix
    return model


def _problem(model: nn.Module) -> str | None:
    features = getattr(type(model), "forward_features", None)
    if getattr(features, "__module__", "") not in PLACES or not isinstance(model.blocks, nn.Sequential):
        return "is not a plain ViT, whose tokens go through one row of blocks"
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        for where, module, name, places in (("", block, "Block", PLACES), (".attn", attention, "Attention", ATTENTION)):
            if type(module).__name__ != name or type(module).__module__ not in places:
                return f"has a {type(module).__name__} at blocks.{index}{where}, which is not a plain ViT's {name}"
    return None


class MergingBlocks(nn.Sequential):
    """The blocks of a ViT, tokens [B, N, D] to tokens, of which each block merges some between attention and MLP.

    Attributes:
        rate: tokens of each image that a block merges, as long as twice as many are left.
        prefix: tokens at the front that never merge.
        restores: what is given has N tokens again, each patch's being the one that it went into.
        watch: where set, is called with the number of a block and its choice, and what it gives is merged.
    """

    rate: int
    prefix: int
    restores: bool
    watch: Watch | None

    def forward(self, x: Tensor) -> Tensor:
        size = source = None
        for index, block in enumerate(self):
            count = mergeable(x.shape[1], self.prefix, self.rate)
            attended, metric = _attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(attended))
            if count:
                choice = match(metric, count, self.prefix)
                choice = self.watch(index, choice) if self.watch else choice
                x, size, place = merge(x, size, choice)
                if self.restores:
                    source = place if source is None else place.gather(1, source)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x if source is None else _rows(x, source)


def mergeable(tokens: int, prefix: int, rate: int) -> int:
    """How many of so many tokens a block merges: `rate`, but at most half of those that are no prefix."""
    return min(rate, (tokens - prefix) // 2)


def _attend(attn: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over [B, N, D], ours or timm's, with any number of heads; and what tokens are compared by [B, N, d].

    That is the sum of their keys over the heads, before any norm of keys: removed heads give as little to it as masked
    ones. Where no head is left it is the first channels of x.
    """
    sketch = x[..., : attn.head_dim].detach()
    if attn.num_heads == 0:
        return attn(x), sketch
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).transpose(1, 3).unbind(2)
    keys = k.detach().sum(1)
    metric = torch.where(keys.any(2, keepdim=True).any(1, keepdim=True), keys, sketch.to(keys.dtype))
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if size is None else size.log().to(q.dtype)[:, None, None]
    y = attend(q, k, v, attn.scale, bias).transpose(1, 2).flatten(2)
    if hasattr(attn, "norm"):
        y = attn.norm(y)
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(x).sigmoid()
    y = attn.proj(y)
    return attn.proj_drop(y) if hasattr(attn, "proj_drop") else y, metric


@torch.no_grad()
def match(metric: Tensor, count: int, prefix: int) -> Tensor:
    """Which tokens merge into which (bipartite soft matching, section 3): [B, 2, count], places in the row of tokens.

    Tokens after the prefix belong to A and B in turn. The `count` of A that are most similar to one of B are in the
    first row, ascending, and the token that each merges into in the second. Of equally similar ones the first is taken.

    Args:
        metric: what tokens are compared by, [B, N, d]; in float32 at least, also under autocast.
    """
    kind, device = torch.promote_types(metric.dtype, torch.float32), metric.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        direction = F.normalize(metric[:, prefix:].to(kind), dim=-1)
        similarity = direction[:, ::2] @ direction[:, 1::2].transpose(1, 2)
        best, partner = similarity.nan_to_num(-2.0).max(-1)  # what is no number must not merge more than others
    number = torch.arange(best.shape[1], device=best.device)
    # counted, not sorted: ONNX has no stable sort
    mine, other = best[:, :, None], best[:, None]
    ahead = (other > mine) | ((other == mine) & (number < number[:, None]))
    chosen = ahead.sum(-1) < count
    slot = torch.where(chosen, chosen.cumsum(1) - 1, count)  # one more, for those that are not
    gone = torch.zeros_like(slot[:, : count + 1]).scatter(1, slot, number.expand_as(slot))[:, :count]
    return torch.stack([2 * gone, 2 * partner.gather(1, gone) + 1], 1) + prefix


def merge(x: Tensor, size: Tensor | None, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge tokens [B, N, D] as `match` chose; those that are left keep their order.

    Args:
        size: how many patches each of them stands for, [B, N]; None for one each.

    Returns:
        tokens [B, N - count, D], their sizes in float32 at least, and where each of the N went [B, N].
    """
    tokens, (gone, into) = x.shape[1], choice.unbind(1)
    left = tokens - gone.shape[1]
    if size is None:
        size = torch.ones_like(x[..., 0], dtype=torch.promote_types(x.dtype, torch.float32))
    everywhere = torch.arange(tokens, device=x.device).expand(x.shape[0], -1)
    stays = torch.ones_like(everywhere).scatter(1, gone, 0)
    place = stays.cumsum(1) - 1  # of the tokens that are kept
    target = place.gather(1, into)
    behind = torch.where(stays.bool(), place, left)  # one more place, for all that are merged
    kept = torch.zeros_like(everywhere[:, : left + 1]).scatter(1, behind, everywhere)[:, :left]
    place = place.scatter(1, gone, target)
    weight = size.gather(1, gone)
    size = size.gather(1, kept).scatter_add(1, target, weight)
    share = (weight / size.gather(1, target)).to(x.dtype)
    moved = (_rows(x, gone) - _rows(x, into)) * share[..., None]
    flat = _flat(target, left)
    merged = _rows(x, kept).flatten(0, 1).index_add(0, flat, moved.flatten(0, 1))
    return merged.view(x.shape[0], left, x.shape[2]), size, place


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Indices [B, K] into rows of so many tokens, as indices into one row of all images' [B * K]."""
    first = torch.arange(index.shape[0], device=index.device)[:, None] * tokens
    return (index + first).flatten()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The tokens [B, K, D] of [B, N, D] at indices [B, K]; whole rows are many times as fast as `gather`."""
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).view(*index.shape, x.shape[2])


# ------------------------------------------------------------------------------------------ what it does to a model


def merged_tokens(model: nn.Module) -> int:
    """How many tokens each block of the model merges; 0 where it merges none."""
    blocks = getattr(model, "blocks", None)
    return blocks.rate if isinstance(blocks, MergingBlocks) else 0


def token_counts(model: nn.Module) -> list[tuple[int, int]]:
    """How many tokens of an image the attention and the MLP of each block see, with and without merging."""
    counts, prefix, rate = [], model.num_prefix_tokens, merged_tokens(model)
    tokens = model.patch_embed.num_patches + prefix
    for _ in model.blocks:
        left = tokens - mergeable(tokens, prefix, rate)
        counts.append((tokens, left))
        tokens = left
    return counts


def matching_macs(model: nn.Module) -> int:
    """Multiply-accumulates an image of the similarities of A and B in all blocks."""
    rate, prefix, total = merged_tokens(model), model.num_prefix_tokens, 0
    for block, (tokens, left) in zip(model.blocks, token_counts(model), strict=True):
        patches = tokens - prefix
        total += (left < tokens) * (patches - patches // 2) * (patches // 2) * block.attn.head_dim if rate else 0
    return total


def merging_line(model: nn.Module) -> str:
    """What merging makes of a model's tokens, for log, plan and card; empty where nothing merges."""
    if not merged_tokens(model):
        return ""
    counts = token_counts(model)
    seen = " ".join(str(left) for _, left in counts)
    return f"token merging: {merged_tokens(model)} tokens a block; of {counts[0][0]} are left {seen} behind each"


def unmerged(model: nn.Module) -> nn.Module:
    """A copy of the model whose blocks merge nothing; the model itself where they do not."""
    if not merged_tokens(model):
        return model
    plain = copy.deepcopy(model)
    plain.blocks.__class__ = nn.Sequential
    return plain


def restore_tokens_(model: nn.Module) -> None:
    """Output a token for each patch after the last block again, so that it can be compared with another model's."""
    for module in model.modules():
        if isinstance(module, MergingBlocks):
            module.restores = True


@contextmanager
def choices(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Inside, `watch(block, choice)` sees what each block of the model would merge and says what it merges."""
    blocks = getattr(model, "blocks", None)
    before = getattr(blocks, "watch", None)
    if isinstance(blocks, MergingBlocks):
        blocks.watch = watch
    try:
        yield
    finally:
        if isinstance(blocks, MergingBlocks):
            blocks.watch = before
