"""timm's attention classes for any number of heads, and `load_model`, which loads an exported model that needs them.

    module.__class__ = NarrowEvaAttention            # its parameters keep their names and values

timm's EvaAttention, SwinV2's and BEiT's attention and ParallelScalingBlock assume that their heads together are as wide
as a token, Swin's that there is a head, and a LayerNorm between heads or neurons that all of them are there.

Exports of such models hold a copy of this file as load_model.py. It needs timm, torch and safetensors, and nothing else
of the program that wrote them:

    from load_model import load_model

    model = load_model(".")                          # the folder of config.json and model.safetensors
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import beit, swin_transformer, swin_transformer_v2, vision_transformer
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn


def queries_keys_values(attn: nn.Module, x: Tensor) -> Tensor:
    """[..., D] -> [..., 3 * heads * head_dim], from one layer or three, with biases in the layer or apart from it."""
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


class NarrowBeitAttention(beit.Attention):
    """BEiT's attention, with its table of relative positions, with any number of heads."""

    def forward(self, x: Tensor, shared_rel_pos_bias: None = None) -> Tensor:
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        return self.proj_drop(self.proj(_attend(self, *_by_head(self, queries_keys_values(self, x)), bias)))

    def _get_rel_pos_bias(self) -> Tensor:
        index = self.relative_position_index
        return self.relative_position_bias_table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)[None]


class NarrowWindowAttention(swin_transformer.WindowAttention):
    """Swin's attention with any number of heads; without one it is its output bias."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) if self.num_heads else self.proj_drop(self.proj(x[..., :0]))


class NarrowWindowAttentionV2(swin_transformer_v2.WindowAttention):
    """SwinV2's attention with any number of heads; without one it is its output bias."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.num_heads == 0:
            return self.proj_drop(self.proj(x[..., :0]))
        if self.proj.weight.shape[1] == self.dim:
            return super().forward(x, mask)
        bias = None if self.q_bias is None else torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        weights = weights + 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        if mask is not None:
            weights = (weights.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj_drop(self.proj((self.attn_drop(weights.softmax(-1)) @ v).transpose(1, 2).flatten(2)))


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

    A masked head or neuron outputs zero, and mean and variance count it; they still do after its removal.
    """

    def forward(self, x: Tensor) -> Tensor:
        missing = self.normalized_shape[0] - x.shape[-1]
        whole = F.layer_norm(F.pad(x, (0, missing)), self.normalized_shape, eps=self.eps)
        return torch.addcmul(self.bias, whole[..., : x.shape[-1]], self.weight)


# ------------------------------------------------------------------------------------------ an exported model

NARROW: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.Attention: vision_transformer.Attention,  # computes with any number as it is
    AttentionRope: NarrowAttentionRope,
    EvaAttention: NarrowEvaAttention,
    beit.Attention: NarrowBeitAttention,
    swin_transformer.WindowAttention: NarrowWindowAttention,
    swin_transformer_v2.WindowAttention: NarrowWindowAttentionV2,
    ParallelScalingBlock: NarrowParallelScalingBlock,
}


def load_model(folder: str | Path = ".") -> nn.Module:
    """timm's model with the heads and neurons that config.json counts and the weights of model.safetensors, in eval
    mode on the CPU.

    Raises:
        FileNotFoundError: the folder does not hold both files.
        RuntimeError: the weights are not those that config.json describes.
    """
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    weights = load_file(Path(folder) / "model.safetensors")
    model = timm.create_model(**(config["swin"] if "swin" in config else config["timm"]))
    for name in config.get("folded", ()):  # factors that are multiplied into the weights before them
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Identity() if leaf.startswith("ls") else None)
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if getattr(layer, leaf).shape != tensor.shape:
            setattr(layer, leaf, nn.Parameter(tensor))
            if isinstance(layer, nn.LayerNorm):
                layer.__class__ = NarrowLayerNorm
    attentions = [module for module in model.modules() if type(module) in NARROW]
    for attn, heads, neurons in zip(attentions, config["heads"], config["neurons"], strict=True):
        _set_sizes(attn, heads, neurons, config.get("head_dim"))
    model.load_state_dict(weights)
    return model.eval()


def _set_sizes(attn: nn.Module, heads: int, neurons: int, head_dim: int | None) -> None:
    """The attributes by which timm's classes know how many heads, and parallel blocks how many neurons, they have."""
    attn.__class__ = NARROW[type(attn)]
    attn.num_heads = heads
    if head_dim is not None:
        attn.head_dim, attn.num_kv_heads, attn.attn_dim = head_dim, heads, heads * head_dim
        attn.fused_attn = attn.fused_attn and heads > 0
    if isinstance(attn, ParallelScalingBlock):
        attn.in_split = [neurons, *3 * [attn.attn_dim]]
    if getattr(attn, "k_bias", None) is not None:  # zeros
        attn.k_bias = torch.zeros_like(attn.q_bias)
