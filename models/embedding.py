"""From images to the tokens of a Vision Transformer: one convolution per patch, or a stack of small ones.

embed = STEMS["conv"](img_size=32, patch_size=4, in_chans=3, embed_dim=192)
tokens = embed(images)                                  # [B, 3, 32, 32] -> [B, 64, 192]
"""

from __future__ import annotations

import re
from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to patch tokens [B, (H/p)(W/p), D] by a convolution with stride p."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self._build(in_chans, embed_dim)

    def _build(self, in_chans: int, embed_dim: int) -> None:
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self.img_size:
            height, width = x.shape[-2:]
            raise ValueError(f"images are {height}x{width}, the model was built for {self.img_size[0]} pixels")
        return self.proj(self.features(x)).flatten(2).transpose(1, 2)

    def features(self, x: Tensor) -> Tensor:
        """What the projection sees."""
        return x

    def reset_parameters(self) -> None:
        """Draw initial weights as PyTorch does."""
        self.proj.reset_parameters()


class ConvEmbed(PatchEmbed):
    """Images to the same tokens by log2(p) convolutions 3x3 of stride 2, each with batch norm and ReLU, and one 1x1.

    The stem of Xiao et al., "Early Convolutions Help Transformers See Better" (arXiv:2106.14881), whose channels double
    up to D, as theirs do for D = 192 and 384 with p = 16; they remove a block in return, here all are kept. Compact
    Transformers (Hassani et al., arXiv:2104.05704) do likewise with pooling. Names, shapes and values are those of
    timm's `HybridEmbed` on a sequence of `ConvNormAct`.

    Raises:
        ValueError: the patch size is no power of two, 2 or more.
    """

    def _build(self, in_chans: int, embed_dim: int) -> None:
        (img_size, _), (patch_size, _) = self.img_size, self.patch_size
        stages = patch_size.bit_length() - 1
        if stages < 1 or patch_size != 2**stages:
            usable = [str(2**power) for power in range(1, img_size.bit_length()) if img_size % 2**power == 0]
            way_out = f"use --patch_size {' or '.join(usable)}" if usable else "choose an even --img_size"
            raise ValueError(
                f"--stem conv: its convolutions halve the image, and patch_size {patch_size} is not 2 to the power 1, "
                f"2, 3 ..; for {img_size} pixels {way_out}"
            )
        widths = [in_chans, *(max(1, embed_dim // 2**power) for power in reversed(range(stages)))]
        self.channels = list(pairwise(widths))
        self.backbone = nn.Sequential(*(self._stage(*channels) for channels in self.channels))
        self.proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs), act=nn.ReLU()))

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()


STEMS = {"patch": PatchEmbed, "conv": ConvEmbed}


def is_stage_of_stem(name: str) -> bool:
    """Whether a tensor of this name is a 3x3 convolution of a `ConvEmbed`."""
    return re.fullmatch(r"patch_embed\.backbone\.\d+\.conv\.weight", name) is not None
