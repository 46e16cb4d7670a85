"""timm's modules with fewer heads or neurons than they allow for: what they compute, at any width.

    module.__class__ = NarrowEvaAttention            # its parameters keep their names and values

timm's EvaAttention, its BEiT's Attention and ParallelScalingBlock take the width of the tokens for that of their heads,
and a LayerNorm between heads or neurons counts them all. These classes need timm; they are imported where one is met.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn


def queries_keys_values(attn: nn.Module, x: Tensor) -> Tensor:
    """[..., D] -> [..., 3 * heads * head_dim], from one layer or three, with biases in the layer or beside it."""
    if attn.qkv is None:
        return torch.cat([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], dim=-1)
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    return F.linear(x, attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))


def _by_head(attn: nn.Module, x: Tensor) -> list[Tensor]:
    """q, k and v [B, heads, N, head_dim] of [B, N, 3 * heads * head_dim]."""
    parts = x.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
    return [part.transpose(1, 2) for part in parts]


def _attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """[B, N, heads * head_dim] of attention with timm's switch between fused and explicit products."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        weights = attn.scale * q @ k.transpose(-2, -1)
        x = attn.attn_drop((weights if bias is None else weights + bias).softmax(-1)) @ v
    return x.transpose(1, 2).flatten(2)


def rope_of_heads(attn: nn.Module, rope: Tensor | None) -> Tensor | None:
    """RoPE [N, 2 * head_dim] of all heads alike, or [heads, N, 2 * head_dim], of which the first are those left."""
    return rope[: attn.num_heads] if rope is not None and rope.ndim == 3 else rope


class NarrowAttentionRope(AttentionRope):
    """AttentionRope where RoPE is mixed per head, for all blocks in one tensor that keeps its width."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, rope_of_heads(self, rope), attn_mask, is_causal)


class NarrowEvaAttention(EvaAttention):
    """EvaAttention with any number of heads."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        gate = self.gate(x).sigmoid() if getattr(self, "gate", None) is not None else None
        q, k, v = _by_head(self, queries_keys_values(self, x))
        q, k, rope = self.q_norm(q), self.k_norm(k), rope_of_heads(self, rope)
        if rope is not None:
            first, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
            q, k = (
                torch.cat([t[:, :, :first], apply_rot_embed_cat(t[:, :, first:], rope, half=half)], dim=2).type_as(v)
                for t in (q, k)
            )
        x = self.norm(_attend(self, q, k, v, None))
        return self.proj_drop(self.proj(x if gate is None else x * gate))


class NarrowBeitAttention(BeitAttention):
    """BEiT's attention, with its table of relative positions, with any number of heads."""

    def forward(self, x: Tensor, shared_rel_pos_bias: None = None) -> Tensor:
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        return self.proj_drop(self.proj(_attend(self, *_by_head(self, queries_keys_values(self, x)), bias)))

    def _get_rel_pos_bias(self) -> Tensor:
        index = self.relative_position_index
        return self.relative_position_bias_table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)[None]


class NarrowParallelScalingBlock(ParallelScalingBlock):
    """ParallelScalingBlock with any number of heads and neurons."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        hidden, attended = self.in_proj(self.in_norm(x)).split([self.in_split[0], sum(self.in_split[1:])], dim=-1)
        hidden = hidden if self.mlp_bias is None else hidden + self.mlp_bias
        if self.num_heads:  # no heads attend to nothing, and exporters refuse to split a width of zero
            q, k, v = _by_head(self, attended)
            attended = _attend(self, self.q_norm(q), self.k_norm(k), v, None)
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if self.out_proj is None:
            y = self.attn_out_proj(attended) + self.mlp_out_proj(hidden)
        else:
            y = self.out_proj(torch.cat([attended, hidden], dim=-1))
        return x + self.drop_path(self.ls(y))


class NarrowLayerNorm(nn.LayerNorm):
    """The LayerNorm over `normalized_shape` values of which only the first are given: the others are zeros.

    A masked head or neuron gives zero, and mean and variance count it. So do they once it is gone.
    """

    def forward(self, x: Tensor) -> Tensor:
        missing = self.normalized_shape[0] - x.shape[-1]
        whole = F.layer_norm(F.pad(x, (0, missing)), self.normalized_shape, eps=self.eps)
        return torch.addcmul(self.bias, whole[..., : x.shape[-1]], self.weight)
