"""One table of builders: `build_model("vit_tiny", num_classes=10)`, or `build_model("timm/NAME", num_classes=10)`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from models import resnet, vit
from models.embedding import is_stage_of_stem
from models.merging import merge_tokens_
from models.pretrained import initialise
from models.weight_files import MisfitError, PretrainedError, import_timm, reason

# name -> builder(num_classes, img_size, **overrides) of a model with random weights
BUILDERS = {**{name: partial(vit.build, name) for name in vit.CONFIGS}, **resnet.BUILDERS}
TIMM = "timm/"


def build_model(
    arch: str,
    num_classes: int,
    img_size: int | None = None,
    pretrained: bool | str | Path = False,
    *,
    pretrained_tag: str | None = None,
    patch_embed: str = "resample",
    pretrained_fallback: bool = False,
    allow_partial: bool = False,
    **overrides,
) -> nn.Module:
    """Build the model that `--arch` names.

    Args:
        arch: a key of `BUILDERS`, or "timm/NAME".
        num_classes: outputs of the classifier.
        img_size: input pixels; None for the architecture's own.
        pretrained: True for public weights, a path for a file, False for random ones.
        pretrained_tag: which of timm's weights for the architecture, such as "augreg_in21k"; None for the default.
        patch_embed: "resample" pretrained patch embeddings, or "reinit" them.
        pretrained_fallback: random weights and a warning when the pretrained ones cannot be had.
        allow_partial: weights that fit only in part are a warning, and no error.
        overrides: geometry that differs from the named model's, such as `patch_size=7`.

    Returns:
        the model, whose `pretrained_report` is a `models.pretrained.TransferReport`, or None when no pretrained weights
        were asked for. timm's models also have `arch_name` ("timm/NAME") and `arch_args`, with which
        `timm.create_model(NAME, **arch_args)` builds the same architecture.

    Raises:
        ValueError: unknown arch or tag (the message lists known ones), or a geometry that does not divide.
        PretrainedError: pretrained weights cannot be had, or are of another architecture.
    """
    check_arch(arch)
    source = _source(arch, pretrained, pretrained_tag)
    model = _build(arch, num_classes, img_size, overrides)
    initialise(model, arch, pretrained, source, patch_embed, pretrained_fallback, allow_partial)
    return model


def _build(arch: str, num_classes: int, img_size: int | None, overrides: dict) -> nn.Module:
    if arch.startswith(TIMM):
        return _build_timm(arch, num_classes=num_classes, img_size=img_size, **overrides)
    if arch in resnet.BUILDERS and overrides:
        name, value = next(iter(overrides.items()))
        raise ValueError(f"--{name} {value}: {arch} is a ResNet and has none; leave it out or choose a ViT")
    return BUILDERS[arch](num_classes=num_classes, img_size=img_size, **overrides)


def check_arch(arch: str) -> None:
    """Raise a ValueError that says what there is when `arch` is not known."""
    if arch in BUILDERS:
        return
    if not arch.startswith(TIMM):
        raise ValueError(f"unknown arch {arch!r}; choose from {', '.join(BUILDERS)} or timm/NAME")
    name = arch.removeprefix(TIMM)
    timm = _import_timm(arch)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        known = f"did you mean {' or '.join(TIMM + match for match in close)}?" if close else "see timm.list_models()"
        raise ValueError(f"unknown arch {arch!r}: timm {timm.__version__} has no such model; {known}")
    base, _, tag = name.partition(".")
    if tag:
        _check_tag(timm, f"--arch {arch}", base, tag)


def pretrained_source(arch: str, tag: str | None = None) -> str | None:
    """The timm name that public weights come from, such as "vit_small_patch16_224.augreg_in21k"; None without any.

    Raises:
        ValueError: the architecture has no weights of that tag; the message lists those it has.
    """
    if arch.startswith(TIMM):
        name = arch.removeprefix(TIMM)
        if not _import_timm(arch).models.is_model_pretrained(name):
            name = None
    else:
        name = vit.CONFIGS[arch].timm_name if arch in vit.CONFIGS else None
    if not tag:
        return name
    flag = f"--pretrained_tag {tag}"
    if name is None:
        raise ValueError(f"{flag}: {arch} has no public pretrained weights; leave the tag out")
    if "." in name:
        raise ValueError(f"{flag}: --arch {arch} names a tag already; give one of them")
    _check_tag(import_timm(flag), flag, name, tag)
    return f"{name}.{tag}"


def _source(arch: str, pretrained: bool | str | Path, tag: str | None) -> str | Path | None:
    """What to load, after refusing requests that cannot be meant."""
    if tag and not pretrained:
        raise ValueError(f"--pretrained_tag {tag}: says which public weights; give --pretrained, too")
    if not pretrained:
        return None
    if arch in resnet.BUILDERS:
        if pretrained is not True:
            raise ValueError(f"--pretrained {pretrained}: {arch} takes weights of a file by --init {pretrained}")
        raise ValueError(f"--pretrained: {arch} has no public weights; leave it out or choose a ViT")
    if pretrained is not True:
        if tag:
            raise ValueError(f"--pretrained_tag {tag}: --pretrained {pretrained} is a file; give one of them")
        return pretrained
    source = pretrained_source(arch, tag)
    if source is None and arch.startswith(TIMM):
        raise ValueError(f"--pretrained: timm has no weights for {arch}; give a file with --pretrained PATH")
    return source


def _import_timm(arch: str):
    try:
        return import_timm(f"--arch {arch}")
    except PretrainedError as error:
        raise ValueError(str(error)) from error


def _check_tag(timm, flag: str, name: str, tag: str) -> None:
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if tag not in tags:
        raise ValueError(f"{flag}: timm has no such weights of {name}; choose from {', '.join(tags) or 'none'}")


def _build_timm(arch: str, **arguments) -> nn.Module:
    """timm's model with random weights, from the arguments that are not None."""
    timm = _import_timm(arch)
    given = {name: value for name, value in arguments.items() if value is not None}
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    try:
        model = timm.create_model(arch.removeprefix(TIMM), pretrained=False, **given)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"--arch {arch}: cannot be built with {said} ({reason(error)})") from error
    embed = getattr(model, "patch_embed", None)
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    # some of timm's own geometries do not divide either; the last pixels are then not seen
    if {"img_size", "patch_size"} & given.keys() and size and patch and (size[0] % patch[0] or size[1] % patch[1]):
        raise ValueError(f"--arch {arch}: img_size {size[0]} is not a multiple of patch_size {patch[0]}")
    model.arch_name, model.arch_args = arch, given
    return model


def from_flags(args, facts, weights: bool = True) -> nn.Module:
    """The model of a run's flags for a data set's facts (classes, image_size, vit_image_size).

    Without `--img_size` ViTs for 32 pixels and ResNets take the data set's size, all others their own. Without
    `weights` it is the architecture alone, whatever `--pretrained` says. Raises as `build_model` does.
    """
    size = args.img_size
    if size is None and args.arch in resnet.BUILDERS:
        size = facts.image_size
    elif size is None and not args.arch.startswith(TIMM) and not args.arch.endswith("_imagenet"):
        size = facts.vit_image_size
    overrides = {"patch_size": args.patch_size} if args.patch_size else {}
    if getattr(args, "layer_scale", None):
        if args.arch in resnet.BUILDERS or args.arch.startswith(TIMM):
            raise ValueError(f"--layer_scale {args.layer_scale}: is for this program's own ViTs, not {args.arch}")
        overrides["init_values"] = args.layer_scale
    if getattr(args, "stem", None) == "conv":  # runs of older versions have no such flag
        if args.arch in resnet.BUILDERS or args.arch.startswith(TIMM):
            raise ValueError(f"--stem conv: is for this program's own ViTs, not {args.arch}; leave it out")
        overrides["stem"] = args.stem
    if weights:
        model = build_model(
            args.arch,
            facts.classes,
            size,
            args.pretrained,
            pretrained_tag=args.pretrained_tag,
            patch_embed=args.patch_embed,
            pretrained_fallback=args.pretrained_fallback,
            allow_partial=getattr(args, "allow_partial", False),  # runs of older versions have no such flag
            **overrides,
        )
    else:
        check_arch(args.arch)
        _source(args.arch, args.pretrained, args.pretrained_tag)  # refuses what cannot be meant
        model = _build(args.arch, facts.classes, size, overrides)
    return merge_tokens_(model, getattr(args, "token_merge", None) or 0)


def from_weights(arch: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model that `arch` names with these weights, in eval mode; classes, pixels and patch size are theirs.

    Raises:
        MisfitError: they belong to another architecture.
    """
    try:
        if arch in resnet.BUILDERS:
            model = build_model(arch, len(weights["fc.weight"]))
        else:
            stages = sum(is_stage_of_stem(name) for name in weights)
            patch = 2**stages if stages else weights["patch_embed.proj.weight"].shape[-1]
            grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
            parts = {"init_values": 1.0} if "blocks.0.ls1.gamma" in weights else {}
            parts |= {"stem": "conv"} if stages else {}
            model = build_model(arch, len(weights["head.weight"]), grid * patch, patch_size=patch, **parts)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _misfit(arch, error) from error
    load_weights(model, arch, weights)
    return model.eval()


def load_weights(model: nn.Module, arch: str, weights: Mapping[str, Tensor]) -> None:
    """Load weights into the model that `arch` names; raises MisfitError when they are not exactly its own."""
    try:
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise _misfit(arch, error) from error


def _misfit(arch: str, error: Exception) -> MisfitError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return MisfitError(f"--arch {arch}: the weights do not fit ({reason})")
