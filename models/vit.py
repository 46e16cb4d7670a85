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
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embedding import STEMS, is_stage_of_stem
from utils import check_finite

log = logging.getLogger(__name__)


FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".npz")
PATCH_EMBED = ("resample", "reinit")


class PretrainedError(RuntimeError):
    """Pretrained weights that cannot be had; one line that says what to do."""


class MisfitError(PretrainedError):
    """Pretrained weights that were read and belong to another architecture."""


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


@dataclass
class TransferReport:
    """Which tensors of a model came from pretrained weights, by name."""

    transferred: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)  # the model's tensors that kept their random values
    skipped: list[str] = field(default_factory=list)  # the file's tensors that have no place in the model
    failure: str = ""  # why all weights are random although pretrained ones were asked for, one line

    def summary(self) -> str:
        return (
            f"{len(self.transferred)} tensors transferred, {len(self.resampled)} resampled, "
            f"{len(self.reinitialised)} re-initialised, {len(self.skipped)} skipped"
        )


def initialise(
    model: nn.Module,
    arch: str,
    pretrained: bool | str | Path,
    source: str | Path | None,
    patch_embed: str = "resample",
    fallback: bool = False,
) -> None:
    """Give a model the weights that it starts from, and `model.pretrained_report`: None when these are random.

    Args:
        arch: the name that warnings show.
        pretrained: whether pretrained weights are asked for.
        source, patch_embed: as in `load_pretrained_weights`; source None when there are no public weights.
        fallback: weights that cannot be had are a warning and random ones instead. Weights of another
            architecture are an error all the same.

    Raises:
        PretrainedError, ValueError: as `load_pretrained_weights`.
    """
    model.pretrained_report = None
    if not pretrained:
        if arch == "vit_large_imagenet":
            log.warning("vit_large_imagenet from scratch needs far more data and epochs than ImageNet-1k usually gets")
        return
    try:
        if source is not None:
            model.pretrained_report = load_pretrained_weights(model, source, patch_embed=patch_embed)
            return
        failure = f"{arch} has no public pretrained weights; it starts from scratch"
    except MisfitError:
        raise
    except PretrainedError as error:
        if not fallback:
            raise
        failure = f"{error}; --pretrained_fallback: {arch} starts from random weights"
    log.warning("%s", failure)
    model.pretrained_report = TransferReport(reinitialised=list(model.state_dict()), failure=failure)


def load_pretrained_weights(model: nn.Module, source: str | Path, *, patch_embed: str = "resample") -> TransferReport:
    """Copy pretrained weights into `model`, ours or one of timm's, in place; all of them or, on an error, none.

    Blocks, norms and prefix tokens are copied by name, the classification heads only when the number of classes is
    the same. Position and patch embedding are resampled to the model's geometry with timm's
    `resample_abs_pos_embed` (bicubic; the positions of prefix tokens stay) and `resample_patch_embed`
    (pseudo-inverse of bicubic resizing, Beyer et al., "FlexiViT", CVPR 2023). A convolutional stem keeps its random
    weights where the pretrained ones have none.

    Args:
        source: a `.safetensors`, `.pth`, `.pt` or `.tar` file of tensors, an `.npz` file in the layout of Google's
            vision_transformer or big_vision, or the name of a timm model whose weights timm downloads.
        patch_embed: "resample", or "reinit" to keep the model's random patch embedding.

    Raises:
        PretrainedError: the file is missing or damaged; timm is not installed; no network.
        RunError: a tensor is not finite.
        MisfitError: the weights are of another architecture.
        ValueError: source is neither a file nor a timm model with public weights, or `patch_embed` is unknown.
    """
    if patch_embed not in PATCH_EMBED:
        raise ValueError(f"--patch_embed {patch_embed}: choose from {', '.join(PATCH_EMBED)}")
    weights = _read_pretrained(source)
    check_finite(weights, f"--pretrained {source}")
    own = model.state_dict()
    heads = _head_prefixes(model)
    report = TransferReport(skipped=sorted(weights.keys() - own.keys()))
    anew = patch_embed == "reinit"
    if any(map(is_stage_of_stem, own)) and not any(map(is_stage_of_stem, weights)):
        log.info("--stem conv: %s has patches for a plain embedding; the stem starts from random weights", source)
        anew = True
    loaded = {}
    for name, current in own.items():
        value = weights.get(name)
        if (
            value is None
            or (anew and name.startswith("patch_embed."))
            or (name.startswith(heads) and value.shape != current.shape)
        ):
            report.reinitialised.append(name)
        elif value.shape == current.shape:
            report.transferred.append(name)
            loaded[name] = value
        else:
            resampled = _resample(name, value, current, model)
            if resampled is None:
                raise MisfitError(
                    f"--pretrained {source}: {name} is {tuple(value.shape)} there and "
                    f"{tuple(current.shape)} in the model; give weights of the same architecture"
                )
            report.resampled.append(name)
            loaded[name] = resampled
    if not report.transferred:
        raise MisfitError(
            f"--pretrained {source}: no tensor has a name of this model's; give weights of the same architecture"
        )
    model.load_state_dict(loaded, strict=False)
    log.info("pretrained weights from %s: %s", source, report.summary())
    for kind in ("transferred", "resampled", "reinitialised", "skipped"):
        log.debug("%s: %s", kind, ", ".join(getattr(report, kind)) or "none")
    return report


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's tensors begin with; distilled models have two heads."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return tuple(f"{name}." for name in ("head", "head_dist", *names))


def _resample(name: str, value: Tensor, current: Tensor, model: nn.Module) -> Tensor | None:
    """`value` in the model's geometry; None when more than the grid or the patch size differs."""
    if value.ndim != current.ndim:
        return None
    if name == "pos_embed" and value.ndim == 3 and value.shape[::2] == current.shape[::2]:
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        patches = value.shape[1] - prefix
        if patches < 1 or math.isqrt(patches) ** 2 != patches:
            return None  # other prefix tokens than the model's: timm would tear the grid
        grid = list(model.patch_embed.grid_size)
        return import_timm("--pretrained").layers.resample_abs_pos_embed(value.float(), grid, num_prefix_tokens=prefix)
    if name == "patch_embed.proj.weight" and value.ndim == 4 and value.shape[:2] == current.shape[:2]:
        return import_timm("--pretrained").layers.resample_patch_embed(value.float(), list(current.shape[2:]))
    return None


def import_timm(who: str) -> ModuleType:
    """timm, or a PretrainedError that names who needs it."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch is a RuntimeError
        raise PretrainedError(
            f"{who}: needs timm, which cannot be imported ({reason(error)}); pip install timm"
        ) from error
    return timm


def reason(error: Exception) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own line recommends unsafe loading
        return "damaged, or holds more than tensors"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_pretrained(source: str | Path) -> dict[str, Tensor]:
    path = Path(source)
    if path.suffix not in FILE_SUFFIXES:
        if path.exists():
            raise ValueError(f"--pretrained {source}: not a weights file; known are {', '.join(FILE_SUFFIXES)}")
        return _fetch(str(source))
    timm = import_timm(f"--pretrained {source}") if path.suffix == ".npz" else None
    try:
        if path.suffix == ".npz":
            weights = _read_npz(path, timm)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(str(path))
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader raises its own types on a damaged file
        raise PretrainedError(
            f"--pretrained {source}: cannot be read ({reason(error)}); give a file of weights"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise PretrainedError(f"--pretrained {source}: not a dictionary of tensors; give a file of weights")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _fetch(name: str) -> dict[str, Tensor]:
    timm = import_timm(f"--pretrained {name}")
    if not timm.models.is_model_pretrained(name):
        raise ValueError(
            f"--pretrained {name}: neither a weights file ({', '.join(FILE_SUFFIXES)}) nor a timm model with weights"
        )
    try:
        with _quiet_hub():
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # hub and network errors have no common base class
        raise PretrainedError(
            f"--pretrained: timm could not fetch {name} ({reason(error)}); check the network, "
            "or give a file with --pretrained PATH"
        ) from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without a network the hub warns of two dozen retries; the error after them says it once."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _read_npz(path: Path, timm: ModuleType) -> dict[str, Tensor]:
    """A ViT in Google's layout, by timm's own reader into a timm model of the file's geometry."""
    import numpy as np

    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        names = set(file.files)
        prefixes = ("", "opt/target/", "params/", "params/img/")
        prefix = next((prefix for prefix in prefixes if f"{prefix}embedding/kernel" in names), None)
        if prefix is None or f"{prefix}conv_root/kernel" in names:
            raise ValueError("not a plain ViT in Google's layout")

        def shape(start: str, end: str) -> tuple[int, ...]:
            found = next((name for name in names if name.startswith(prefix + start) and name.endswith(end)), None)
            if found is None:
                raise ValueError(f"not a plain ViT in Google's layout: no {prefix}{start}...{end}")
            return file[found].shape

        trunk = f"{prefix}Transformer/"
        blocks = {name.removeprefix(trunk).split("/")[0] for name in names if name.startswith(f"{trunk}encoderblock")}
        stacked = blocks == {"encoderblock"}  # one tensor for all blocks
        first = f"Transformer/encoderblock{'' if stacked else '_0'}/"
        patch, _, channels, dim = file[f"{prefix}embedding/kernel"].shape
        positions = shape("", "pos_embedding")[-2]
        class_token = f"{prefix}cls" in names
        embedded = class_token and math.isqrt(positions) ** 2 != positions  # the class token has a position, too
        grid = math.isqrt(positions - embedded)
        if grid**2 != positions - embedded:
            raise ValueError(f"{positions} positions are not a square grid")
        pooled = "token" if class_token else "avg"
        geometry = {
            "img_size": grid * patch,
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": dim,
            "depth": shape(first, "LayerNorm_0/scale")[0] if stacked else len(blocks),
            "num_heads": shape(first, "query/kernel")[-2],
            "mlp_ratio": (shape(first, "Dense_0/kernel")[-1] + 0.5) / dim,  # timm rounds the product down
            "num_classes": shape("head/", "bias")[-1] if f"{prefix}head/bias" in names else 0,
            "class_token": class_token,
            "no_embed_class": not embedded,
            "global_pool": "map" if any(f"{prefix}MAPHead_0/" in name for name in names) else pooled,
            "fc_norm": False,
        }
    model = timm.models.VisionTransformer(**geometry)
    model.load_pretrained(str(path))
    return model.state_dict()
