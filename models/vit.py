"""Vision Transformers (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021), ready to be pruned.

    model = vit_tiny(num_classes=10)                        # 32 px, patch 4, 2,697,610 parameters
    model = vit_small(num_classes=10, pretrained=True)      # timm's ImageNet weights, embeddings resampled
    logits = model(images)                                  # [B, 3, H, W] -> [B, classes]

Parameter names, shapes and values are timm's (`timm.models.vision_transformer.VisionTransformer`), so a state
dict loads in both directions with `strict=True`. What differs is that a block may hold fewer heads than dim / head_dim,
any number of MLP neurons, or none of either: an empty branch is exactly its output bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embedding import STEMS
from models.pretrained import initialise
from models.pretrained import load_pretrained_weights as load_pretrained_weights  # a documented name of this module


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v of [B, heads, N, head_dim] tensors."""
    # Half precision with gradients on a CPU: explicit products took 0.2 to 0.6 of the time of fused attention for 5 to
    # 577 tokens. Fused is 1.1 to 1.7 times as fast in float32, and without gradients it needs no N x N matrix.
    if q.is_cpu and q.requires_grad and q.dtype in (torch.bfloat16, torch.float16):
        logits = scale * q @ k.transpose(-2, -1)
        return (logits if bias is None else logits + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D].

    The attention width `attn_dim = num_heads * head_dim` is independent of D, and `scale` stays
    head_dim ** -0.5 however many heads are left, so that removing a head changes nothing but its own share.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int | None = None):
        super().__init__()
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"dim {dim} is not divisible by {num_heads} heads")
            head_dim = dim // num_heads
        self.num_heads, self.head_dim, self.attn_dim = num_heads, head_dim, num_heads * head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * self.attn_dim)
        self.proj = nn.Linear(self.attn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        if self.num_heads == 0:
            return self.proj.bias.expand(B, N, -1)
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each [B, heads, N, head_dim]
        x = attend(q, k, v, self.scale)
        return self.proj(x.transpose(1, 2).reshape(B, N, self.attn_dim))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) over tokens [B, N, D] with `hidden` neurons."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel at the end of a branch (Touvron et al., CaiT, ICCV 2021); named as timm's."""

    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block; with `init_values` its branches end in a LayerScale that starts there."""

    def __init__(self, dim: int, num_heads: int, hidden: int, init_values: float | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = nn.Identity()  # where training may drop the branch, as in timm
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Class token, learned position embedding, pre-norm blocks, linear head; images [B, C, H, W] to [B, classes].

    `stem` says how patches become tokens, see `models.embedding.STEMS`.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 192,
        depth: int = 9,
        num_heads: int = 3,
        mlp_ratio: float = 2.0,
        init_values: float | None = None,
        stem: str = "patch",
    ):
        super().__init__()
        self.num_classes, self.embed_dim, self.init_values = num_classes, embed_dim, init_values
        self.patch_embed = STEMS[stem](img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, hidden, init_values) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights: truncated normal of std 0.02, biases zero, class token near zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.patch_embed.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B, 1 + patches, D] after the last block and its norm; named as timm's, as is `forward_head`."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the class token."""
        return self.head(x[:, 0])


@dataclass(frozen=True)
class VitConfig:
    """Geometry of a named model; `timm_name` is where its public weights come from, None when there are none."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    num_classes: int
    timm_name: str | None


CONFIGS = {  # the comments count parameters
    "vit_mini": VitConfig(32, 4, 96, 6, 3, 2.0, 10, None),  # 460,906, for small studies
    "vit_tiny": VitConfig(32, 4, 192, 9, 3, 2.0, 10, None),  # 2,697,610
    "vit_small": VitConfig(32, 4, 384, 12, 6, 4.0, 10, "vit_small_patch16_224"),  # 21,342,346
    "vit_base": VitConfig(32, 4, 768, 12, 12, 4.0, 10, "vit_base_patch16_224"),  # 85,152,010
    "vit_small_imagenet": VitConfig(224, 16, 384, 12, 6, 4.0, 1000, "vit_small_patch16_224"),  # 22,050,664
    "vit_base_imagenet": VitConfig(224, 16, 768, 12, 12, 4.0, 1000, "vit_base_patch16_224"),  # 86,567,656
    "vit_large_imagenet": VitConfig(224, 16, 1024, 24, 16, 4.0, 1000, "vit_large_patch16_224"),  # 304,326,632
}


def build(name: str, num_classes: int | None = None, img_size: int | None = None, **overrides) -> VisionTransformer:
    """A model of `CONFIGS` with random weights; `overrides` are arguments of `VisionTransformer`."""
    config = CONFIGS[name]
    geometry = {name: value for name, value in vars(config).items() if name != "timm_name"}
    geometry |= {} if img_size is None else {"img_size": img_size}
    geometry |= {} if num_classes is None else {"num_classes": num_classes}
    return VisionTransformer(**{**geometry, **overrides})


def build_pretrained(
    name: str, num_classes: int | None = None, img_size: int | None = None, pretrained: bool | str | Path = False,
    **overrides,
) -> VisionTransformer:  # fmt: skip
    """The same; `pretrained` is True for public weights, or the path of a file of weights."""
    model = build(name, num_classes, img_size, **overrides)
    initialise(model, name, pretrained, CONFIGS[name].timm_name if pretrained is True else pretrained)
    return model


vit_mini = partial(build_pretrained, "vit_mini")
vit_tiny = partial(build_pretrained, "vit_tiny")
vit_small = partial(build_pretrained, "vit_small")
vit_base = partial(build_pretrained, "vit_base")
vit_small_imagenet = partial(build_pretrained, "vit_small_imagenet")
vit_base_imagenet = partial(build_pretrained, "vit_base_imagenet")
vit_large_imagenet = partial(build_pretrained, "vit_large_imagenet")
