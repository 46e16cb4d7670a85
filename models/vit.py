"""Vision Transformers (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021), ready to be pruned.

    model = vit_tiny(num_classes=10)                        # 32 px, patch 4, 2,697,610 parameters
    model = vit_small(num_classes=10, pretrained=True)      # timm's ImageNet weights, embeddings resampled
    logits = model(images)                                  # [B, 3, H, W] -> [B, classes]

Parameter names, shapes and values are timm's (`timm.models.vision_transformer.VisionTransformer`), so a state
dict goes either way with `strict=True`. What differs is that a block may hold fewer heads than dim / head_dim,
any number of MLP neurons, or none of either: an empty branch is exactly its output bias.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        """Tokens [B, 1 + patches, D] behind the last block and its norm; named as timm's, as is `forward_head`."""
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


CONFIGS = {
    "vit_mini": VitConfig(32, 4, 96, 6, 3, 2.0, 10, None),
    "vit_tiny": VitConfig(32, 4, 192, 9, 3, 2.0, 10, None),
    "vit_small": VitConfig(32, 4, 384, 12, 6, 4.0, 10, "vit_small_patch16_224"),
    "vit_base": VitConfig(32, 4, 768, 12, 12, 4.0, 10, "vit_base_patch16_224"),
    "vit_small_imagenet": VitConfig(224, 16, 384, 12, 6, 4.0, 1000, "vit_small_patch16_224"),
    "vit_base_imagenet": VitConfig(224, 16, 768, 12, 12, 4.0, 1000, "vit_base_patch16_224"),
    "vit_large_imagenet": VitConfig(224, 16, 1024, 24, 16, 4.0, 1000, "vit_large_patch16_224"),
}


def build(name: str, num_classes: int | None = None, img_size: int | None = None, **overrides) -> VisionTransformer:
    """A model of `CONFIGS` with random weights; `overrides` are arguments of `VisionTransformer`."""
    config = CONFIGS[name]
    geometry = {
        "img_size": config.img_size if img_size is None else img_size,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": config.num_classes if num_classes is None else num_classes,
    }
    return VisionTransformer(**{**geometry, **overrides})


def _build(name: str, num_classes: int | None, img_size: int | None, pretrained: bool | str | Path, overrides: dict):
    model = build(name, num_classes, img_size, **overrides)
    initialise(model, name, pretrained, CONFIGS[name].timm_name if pretrained is True else pretrained)
    return model


def vit_mini(num_classes=None, img_size=None, pretrained=False, **overrides) -> VisionTransformer:
    """32 px, patch 4, dim 96, depth 6, 3 heads, MLP ratio 2: 460,906 parameters with 10 classes, for small studies."""
    return _build("vit_mini", num_classes, img_size, pretrained, overrides)


def vit_tiny(num_classes=None, img_size=None, pretrained=False, **overrides) -> VisionTransformer:
    """32 px, patch 4, dim 192, depth 9, 3 heads, MLP ratio 2: 2,697,610 parameters with 10 classes."""
    return _build("vit_tiny", num_classes, img_size, pretrained, overrides)


def vit_small(num_classes=None, img_size=None, pretrained=False, **overrides) -> VisionTransformer:
    """32 px, patch 4, dim 384, depth 12, 6 heads, MLP ratio 4: 21,342,346 parameters with 10 classes."""
    return _build("vit_small", num_classes, img_size, pretrained, overrides)


def vit_base(num_classes=None, img_size=None, pretrained=False, **overrides) -> VisionTransformer:
    """32 px, patch 4, dim 768, depth 12, 12 heads, MLP ratio 4: 85,152,010 parameters with 10 classes."""
    return _build("vit_base", num_classes, img_size, pretrained, overrides)


def vit_small_imagenet(num_classes=None, img_size=None, pretrained=False, **overrides) -> VisionTransformer:
    """224 px, patch 16, dim 384, depth 12, 6 heads, MLP ratio 4: 22,050,664 parameters with 1000 classes."""
    return _build("vit_small_imagenet", num_classes, img_size, pretrained, overrides)


def vit_base_imagenet(num_classes=None, img_size=None, pretrained=False, **overrides) -> VisionTransformer:
    """224 px, patch 16, dim 768, depth 12, 12 heads, MLP ratio 4: 86,567,656 parameters with 1000 classes."""
    return _build("vit_base_imagenet", num_classes, img_size, pretrained, overrides)


def vit_large_imagenet(num_classes=None, img_size=None, pretrained=False, **overrides) -> VisionTransformer:
    """224 px, patch 16, dim 1024, depth 24, 16 heads, MLP ratio 4: 304,326,632 parameters with 1000 classes."""
    return _build("vit_large_imagenet", num_classes, img_size, pretrained, overrides)
