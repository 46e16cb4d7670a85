"""One table of builders: `build_model("vit_tiny", num_classes=10)`."""

from __future__ import annotations

from torch import nn

from models import vit

BUILDERS = {name: getattr(vit, name) for name in vit.CONFIGS}


def build_model(
    arch: str, num_classes: int, img_size: int | None = None, pretrained: bool | str = False, **overrides
) -> nn.Module:
    """Build the model that `--arch` names.

    Args:
        arch: a key of `BUILDERS`.
        num_classes: outputs of the classifier.
        img_size: input pixels; None for the architecture's own.
        pretrained: True for public weights, a path for a file, False for random ones.
        overrides: geometry that differs from the named model's, such as `patch_size=7`.

    Raises:
        ValueError: unknown arch (the message lists the known ones), or a geometry that does not divide.
    """
    if arch not in BUILDERS:
        raise ValueError(f"unknown arch {arch!r}; choose from {', '.join(BUILDERS)}")
    return BUILDERS[arch](num_classes=num_classes, img_size=img_size, pretrained=pretrained, **overrides)
