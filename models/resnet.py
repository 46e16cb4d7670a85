"""ResNets for small images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016), ready to be pruned.

    model = res20s(num_classes=10)          # 269,722 parameters
    logits = model(images)                  # [B, 3, H, W] -> [B, classes]; any H and W

res20s, res32s and res56s are section 4.2's networks for CIFAR: three stages of 16, 32 and 64 channels, shortcuts
without parameters (option A). res18 is the ImageNet network with a 3x3 stem and no pooling before the blocks. Parameter
names are torchvision's. What differs is that a block's convolutions may hold fewer filters than its stage has channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(channels: int, filters: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel_size=3, stride=stride, padding=1, bias=False)


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides."""

    def __init__(self, channels: int, filters: int):
        super().__init__()
        self.before = (filters - channels) // 2
        self.after = filters - channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    `out_index` places the filters of a shortened `conv2` in the block's residual stream, whose width is unchanged; None
    when it has them all.
    """

    out_index: Tensor | None

    def __init__(self, channels: int, filters: int, stride: int, projected: bool):
        super().__init__()
        self.conv1 = _conv3x3(channels, filters, stride)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = _conv3x3(filters, filters)
        self.bn2 = nn.BatchNorm2d(filters)
        self.register_buffer("out_index", None, persistent=False)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != filters:
            self.downsample = PaddedShortcut(channels, filters)
            if projected:
                projection = nn.Conv2d(channels, filters, kernel_size=1, stride=stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = self.downsample(x)
        out = shortcut + out if self.out_index is None else shortcut.index_add(1, self.out_index, out)
        return F.relu(out)


class ResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks, global average pooling, a linear classifier.

    Args:
        depths: blocks per stage; each stage after the first halves height and width.
        widths: channels per stage.
        projected: 1x1 convolutions as shortcuts where the shape changes (option B), else none (option A).
        img_size: pixels the model is meant for; only the count of MACs uses it.
    """

    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], projected: bool, num_classes: int = 10, img_size: int = 32
    ):
        super().__init__()
        self.depths, self.widths, self.projected = tuple(depths), tuple(widths), projected
        self.num_classes, self.img_size = num_classes, img_size
        self.conv1 = _conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        for stage, (depth, filters) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and index == 0 else 1
                blocks.append(BasicBlock(channels, filters, stride, projected))
                channels = filters
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights of the convolutions: normal, of variance 2 / (9 x filters)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The map [B, C, H', W'] of the last stage; named as timm's, as is `forward_head`."""
        x = F.relu(self.bn1(self.conv1(images)))
        for stage in range(len(self.depths)):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the map's mean."""
        return self.fc(x.mean(dim=(2, 3)))


def _build(
    depths: Sequence[int], widths: Sequence[int], projected: bool,
    num_classes: int | None = None, img_size: int | None = None,
) -> ResNet:  # fmt: skip
    return ResNet(depths, widths, projected, num_classes or 10, img_size or 32)


_CIFAR = (16, 32, 64)
res20s = partial(_build, [3, 3, 3], _CIFAR, False)  # 269,722 parameters with 10 classes
res32s = partial(_build, [5, 5, 5], _CIFAR, False)  # 464,154
res56s = partial(_build, [9, 9, 9], _CIFAR, False)  # 853,018
res18 = partial(_build, [2, 2, 2, 2], (64, 128, 256, 512), True)  # 11,173,962
BUILDERS = {"res20s": res20s, "res32s": res32s, "res56s": res56s, "res18": res18}
