"""Vision Transformers (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021), ready to be pruned.

    model = vit_tiny(num_classes=10)                        # 32 px, patch 4, 2,697,610 parameters
    model = vit_small(num_classes=10, pretrained=True)      # timm's ImageNet weights, embeddings resampled
    logits = model(images)                                  # [B, 3, H, W] -> [B, classes]

Parameter names, shapes and values are timm's (`timm.models.vision_transformer.VisionTransformer`), so a state
dict goes either way with `strict=True`. What differs is that a block may hold fewer heads than dim / head_dim,
any number of MLP neurons, or none of either: an empty branch is exactly its output bias.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)


class PretrainedError(RuntimeError):
    """Pretrained weights that cannot be had; one line that says what to do."""


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to patch tokens [B, (H/p)(W/p), D] by a convolution with stride p."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self.img_size:
            height, width = x.shape[-2:]
            raise ValueError(f"images are {height}x{width}, the model was built for {self.img_size[0]} pixels")
        return self.proj(x).flatten(2).transpose(1, 2)


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
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each [B, heads, N, head_dim]
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
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


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Class token, learned position embedding, pre-norm blocks, linear head; images [B, C, H, W] to [B, classes]."""

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
    ):
        super().__init__()
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights: truncated normal of std 0.02, biases zero, class token near zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.patch_embed.proj.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
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
    "vit_tiny": VitConfig(32, 4, 192, 9, 3, 2.0, 10, None),
    "vit_small": VitConfig(32, 4, 384, 12, 6, 4.0, 10, "vit_small_patch16_224"),
    "vit_base": VitConfig(32, 4, 768, 12, 12, 4.0, 10, "vit_base_patch16_224"),
    "vit_small_imagenet": VitConfig(224, 16, 384, 12, 6, 4.0, 1000, "vit_small_patch16_224"),
    "vit_base_imagenet": VitConfig(224, 16, 768, 12, 12, 4.0, 1000, "vit_base_patch16_224"),
    "vit_large_imagenet": VitConfig(224, 16, 1024, 24, 16, 4.0, 1000, "vit_large_patch16_224"),
}


def _build(name: str, num_classes: int | None, img_size: int | None, pretrained: bool | str, overrides: dict):
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
    model = VisionTransformer(**{**geometry, **overrides})
    if pretrained is True and config.timm_name is None:
        log.warning("%s has no public pretrained weights; it starts from scratch", name)
    elif pretrained:
        load_pretrained_weights(model, config.timm_name if pretrained is True else pretrained)
    elif name == "vit_large_imagenet":
        log.warning("vit_large_imagenet from scratch needs far more data and epochs than ImageNet-1k usually gets")
    return model


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


@dataclass
class TransferReport:
    """Which tensors of a model came from pretrained weights, by name."""

    transferred: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)  # the model's tensors that kept their random values
    skipped: list[str] = field(default_factory=list)  # the file's tensors that have no place in the model

    def summary(self) -> str:
        return (
            f"{len(self.transferred)} tensors transferred, {len(self.resampled)} resampled, "
            f"{len(self.reinitialised)} re-initialised, {len(self.skipped)} skipped"
        )


def load_pretrained_weights(model: nn.Module, source: str | Path) -> TransferReport:
    """Copy pretrained weights into `model` in place.

    Blocks, norms and class token are copied where the shapes agree, the classification head only when the number
    of classes does too. Position and patch embedding are resampled to the model's geometry with timm's
    `resample_abs_pos_embed` (bicubic) and `resample_patch_embed` (pseudo-inverse of bilinear resizing, Beyer et
    al., "FlexiViT", CVPR 2023).

    Args:
        source: a `.safetensors`, `.pth` or `.pt` file, or the name of a timm model whose weights timm downloads.

    Raises:
        PretrainedError: the file is missing, damaged or fits nothing; timm is not installed; no network.
    """
    weights = _read_pretrained(source)
    own = model.state_dict()
    report = TransferReport(skipped=sorted(weights.keys() - own.keys()))
    loaded = {}
    for name, current in own.items():
        value = weights.get(name)
        if value is None or (name.startswith("head.") and value.shape != current.shape):
            report.reinitialised.append(name)
        elif value.shape == current.shape:
            report.transferred.append(name)
            loaded[name] = value
        elif name in ("pos_embed", "patch_embed.proj.weight"):
            report.resampled.append(name)
            loaded[name] = _resample(name, value, model)
        else:
            raise PretrainedError(
                f"pretrained weights {source}: {name} is {tuple(value.shape)} there and "
                f"{tuple(current.shape)} in the model; give weights of the same architecture"
            )
    if not report.transferred:
        raise PretrainedError(f"pretrained weights {source}: no tensor has a name of this model's")
    model.load_state_dict(loaded, strict=False)
    log.info("pretrained weights from %s: %s", source, report.summary())
    for kind in ("transferred", "resampled", "reinitialised", "skipped"):
        log.debug("%s: %s", kind, ", ".join(getattr(report, kind)) or "none")
    return report


def _read_pretrained(source: str | Path) -> dict[str, Tensor]:
    path = Path(source)
    if path.suffix in (".safetensors", ".pth", ".pt", ".tar"):
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                weights = load_file(str(path))
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # every reader raises its own types on a damaged file
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise PretrainedError(f"pretrained weights {source}: cannot be read ({reason[0]})") from error
        for key in ("state_dict", "model"):
            if isinstance(weights, dict) and isinstance(weights.get(key), dict):
                weights = weights[key]
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise PretrainedError(f"pretrained weights {source}: not a dictionary of tensors")
        return weights
    try:
        import timm
    except ImportError as error:
        raise PretrainedError("pretrained weights come from timm: pip install timm") from error
    try:
        return timm.create_model(str(source), pretrained=True).state_dict()
    except Exception as error:  # hub and network errors have no common base class
        raise PretrainedError(
            f"pretrained weights {source}: timm could not fetch them; check the network, "
            "or give a file with --pretrained PATH"
        ) from error


def _resample(name: str, value: Tensor, model: nn.Module) -> Tensor:
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    if name == "pos_embed":
        return resample_abs_pos_embed(
            value, list(model.patch_embed.grid_size), num_prefix_tokens=model.num_prefix_tokens
        )
    return resample_patch_embed(value, list(model.patch_embed.patch_size))
