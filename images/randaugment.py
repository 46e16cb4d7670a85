"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) of a whole batch at once, on the device where the pixels live.

Pixels are 0..255, float32 [B, C, H, W]. Operations and magnitude (9 of 30) are those of torchvision's `RandAugment`,
which image folders use. Every operation is computed for every image, and each takes the result of its own, so that
nothing waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
PER_IMAGE = 2

MAGNITUDE = 9 / 30  # of what follows
SHEAR, SHIFT, DEGREES, BLEND = 0.3, 150 / 331, 30.0, 0.9  # the shift is a share of the side
SOLARIZE_FROM = 255 * (1 - MAGNITUDE)
POSTERIZE_STEP = 2 ** round(4 * MAGNITUDE)
GREY = (0.2989, 0.587, 0.114)


def draw_operations(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each of `count` images its operations, int64 [count, 2] into `OPERATIONS`, and their directions, 1 or -1."""
    kinds = torch.randint(len(OPERATIONS), (count, PER_IMAGE), generator=generator)
    signs = 2 * torch.randint(2, (count, PER_IMAGE), generator=generator) - 1
    return kinds, signs


def rand_augment(pixels: Tensor, kinds: Tensor, signs: Tensor) -> Tensor:
    """All images with their operations, one after the other; kinds and signs [B, 2] as `draw_operations` returns."""
    for turn in range(PER_IMAGE):
        pixels = _apply(pixels, kinds[:, turn], signs[:, turn].to(pixels.dtype))
    return pixels


def _apply(pixels: Tensor, kind: Tensor, sign: Tensor) -> Tensor:
    pixels = _moved(pixels, kind, sign)
    blended = _blended(pixels, kind, sign)
    results = {
        "posterize": (pixels / POSTERIZE_STEP).floor() * POSTERIZE_STEP,
        "solarize": torch.where(pixels >= SOLARIZE_FROM, 255 - pixels, pixels),
        "autocontrast": _autocontrast(pixels),
        "equalize": _equalize(pixels),
    }
    for name, result in results.items():
        blended = torch.where(_is(kind, name)[:, None, None, None], result, blended)
    return blended


def _is(kind: Tensor, *names: str) -> Tensor:
    """Which images get one of these operations, bool [B]."""
    found = [kind == OPERATIONS.index(name) for name in names]
    return torch.stack(found).any(0)


def _moved(pixels: Tensor, kind: Tensor, sign: Tensor) -> Tensor:
    """Shear (from the upper left corner), shift and rotation (about the centre), nearest pixel, black outside."""
    batch, channels, height, width = pixels.shape
    zero, shear = torch.zeros_like(sign), sign * (SHEAR * MAGNITUDE)
    angle = torch.where(_is(kind, "rotate"), sign, zero) * (DEGREES * MAGNITUDE * torch.pi / 180)
    shear_x, shear_y = torch.where(_is(kind, "shear_x"), shear, zero), torch.where(_is(kind, "shear_y"), shear, zero)
    shift_x = torch.where(_is(kind, "translate_x"), sign, zero) * int(SHIFT * MAGNITUDE * width)
    shift_y = torch.where(_is(kind, "translate_y"), sign, zero) * int(SHIFT * MAGNITUDE * height)

    y = torch.arange(height, dtype=pixels.dtype, device=pixels.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=pixels.dtype, device=pixels.device) - (width - 1) / 2
    cos, sin, shift_x, shift_y, shear_x, shear_y = (
        value[:, None, None] for value in (angle.cos(), angle.sin(), shift_x, shift_y, shear_x, shear_y)
    )
    # where the pixel at (x, y) comes from
    source_x = cos * x - sin * y + shear_x * (y + height / 2) - shift_x + (width - 1) / 2
    source_y = sin * x + cos * y + shear_y * (x + width / 2) - shift_y + (height - 1) / 2
    column, row = source_x.round().long(), source_y.round().long()  # [B, H, W]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = (row * width + column).where(inside, 0).view(batch, 1, -1).expand(-1, channels, -1)
    return pixels.flatten(2).gather(2, index).view(pixels.shape) * inside[:, None]


def _blended(pixels: Tensor, kind: Tensor, sign: Tensor) -> Tensor:
    """Brightness, colour, contrast and sharpness: nearer to, or farther from, black, grey, mean grey and blur."""
    channels = pixels.shape[1]
    grey = pixels
    if channels == 3:
        weights = torch.tensor(GREY, dtype=pixels.dtype, device=pixels.device)
        grey = (pixels * weights[:, None, None]).sum(1, keepdim=True).floor()
    box = torch.ones(3, 3, dtype=pixels.dtype, device=pixels.device)
    box[1, 1] = 5
    kernel = (box / box.sum()).expand(channels, 1, 3, 3)
    blur = pixels.clone()  # the border stays
    blur[:, :, 1:-1, 1:-1] = F.conv2d(pixels, kernel, groups=channels).round()
    others = {
        "brightness": torch.zeros((), dtype=pixels.dtype, device=pixels.device),
        "color": grey,
        "contrast": grey.mean(dim=(1, 2, 3), keepdim=True),
        "sharpness": blur,
    }
    other = pixels
    for name, value in others.items():
        other = torch.where(_is(kind, name)[:, None, None, None], value, other)
    factor = 1 + sign[:, None, None, None] * (BLEND * MAGNITUDE)
    mixed = (factor * pixels + (1 - factor) * other).clamp_(0, 255).floor_()
    return torch.where(_is(kind, *others)[:, None, None, None], mixed, pixels)


def _autocontrast(pixels: Tensor) -> Tensor:
    """Each channel from its darkest and brightest pixel to 0 and 255; flat ones as they are."""
    darkest, brightest = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    flat = darkest == brightest
    scale = torch.where(flat, 1, (brightest - darkest) / 255)
    return ((pixels - darkest.where(~flat, 0)) / scale).clamp_(0, 255).floor_()


def _equalize(pixels: Tensor) -> Tensor:
    """Each channel with its histogram as even as Pillow's `ImageOps.equalize` makes it."""
    levels = pixels.flatten(2).long()  # [B, C, H W]
    counts = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    brightest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    found = torch.where(step > 0, table.gather(2, levels), levels)
    return found.view(pixels.shape).to(pixels.dtype)
