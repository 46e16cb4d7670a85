"""The weights that a model starts from: a model and a source in, a report of what went where out.

    report = load_pretrained_weights(model, "weights.safetensors")

One law for all weights that are loaded: everything in the file is used and everything in the model is filled. What may
differ is the classifier and the geometry of the position and patch embeddings, where the caller allows it and the log
says so; anything else is an error that names tensors, or allowed by name (`partial`).
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path

from torch import Tensor, nn

from models.embedding import is_stage_of_stem
from models.weight_files import MisfitError, PretrainedError, import_timm, read_weights, without_prefixes

log = logging.getLogger(__name__)

PATCH_EMBED = ("resample", "reinit")
PARTIAL = "--allow_partial"


@dataclass
class TransferReport:
    """Which tensors of a model came from pretrained weights, by name."""

    transferred: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)  # the model's tensors that kept their random values
    skipped: list[str] = field(default_factory=list)  # the file's tensors that have no place in the model
    failure: str = ""  # why all weights are random although pretrained ones were asked for, one line
    classifier: str = ""  # the file's classifier that was kept, in words
    gaps: str = ""  # what neither fits nor was to be adapted and was allowed, one line

    def summary(self) -> str:
        return (
            f"{len(self.transferred)} tensors transferred, {len(self.resampled)} resampled, "
            f"{len(self.reinitialised)} re-initialised, {len(self.skipped)} skipped{self.classifier}"
        )


def initialise(
    model: nn.Module,
    arch: str,
    pretrained: bool | str | Path,
    source: str | Path | None,
    patch_embed: str = "resample",
    fallback: bool = False,
    partial: bool = False,
) -> None:
    """Give a model the weights that it starts from, and `model.pretrained_report`: None when these are random.

    Args:
        arch: the name that warnings show.
        pretrained: whether pretrained weights are asked for.
        source, patch_embed, partial: as in `load_pretrained_weights`; source None when there are no public weights.
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
            model.pretrained_report = load_pretrained_weights(model, source, patch_embed=patch_embed, partial=partial)
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


def load_pretrained_weights(
    model: nn.Module, source: str | Path, *, patch_embed: str = "resample", partial: bool = False
) -> TransferReport:
    """Copy pretrained weights into `model`, ours or one of timm's, in place; all of them or, on an error, none.

    Everything is copied by name, the classification heads only when the number of classes is the same. Names that
    authors published under are translated by timm's own filter for the model (`checkpoint_filter_fn`). Position and
    patch embedding are resampled to the model's geometry with timm's `resample_abs_pos_embed` (bicubic; the positions
    of prefix tokens stay) and `resample_patch_embed` (pseudo-inverse of bicubic resizing, Beyer et al., "FlexiViT",
    CVPR 2023). A convolutional stem keeps its random weights where the pretrained ones have none.

    Args:
        source: as in `weight_files.read_weights`; `.npz` files are in the layout of Google's vision_transformer or
            big_vision.
        patch_embed: "resample", or "reinit" to keep the model's random patch embedding.
        partial: tensors that only the model or only the file has are a warning, and no error.

    Raises:
        PretrainedError: the file is missing or damaged; timm is not installed; no network.
        MisfitError: the weights are of another architecture, or only a part of this one's.
        ValueError: source is neither a file nor a timm model with public weights, or `patch_embed` is unknown.
    """
    if patch_embed not in PATCH_EMBED:
        raise ValueError(f"--patch_embed {patch_embed}: choose from {', '.join(PATCH_EMBED)}")
    weights, said = read_weights(source, "--pretrained", public=True), f"--pretrained {source}"
    own = model.state_dict()
    weights = without_prefixes(weights, own)
    anew = patch_embed == "reinit"
    if any(map(is_stage_of_stem, own)) and not any(map(is_stage_of_stem, weights)):
        log.info("--stem conv: %s has patches for a plain embedding; the stem starts from random weights", source)
        anew = True
    free = (*_head_prefixes(model), *(("patch_embed.",) if anew else ()))
    report = _fill(model, weights, said, free, anew, partial)
    heads = [name for name in report.transferred if name.startswith(_head_prefixes(model)) and name.endswith("weight")]
    if heads:
        report.classifier = f"; its classifier of {len(own[heads[0]])} classes is kept"
    log.info("pretrained weights from %s: %s", source, report.summary())
    adapted = report.resampled + report.reinitialised
    if adapted and not report.gaps:
        log.info("adapted to this model: %s resampled; %s start from random values", _named(report.resampled),
                 _named(report.reinitialised))  # fmt: skip
    for kind in ("transferred", "resampled", "reinitialised", "skipped"):
        log.debug("%s: %s", kind, ", ".join(getattr(report, kind)) or "none")
    return report


def load_whole(model: nn.Module, source: str | Path, flag: str, partial: bool | None = None) -> TransferReport:
    """As `load_pretrained_weights`, of weights of exactly this model: classifier and embeddings fit as they are.

    Args:
        partial: as there; None: not to be had.

    Raises:
        PretrainedError, MisfitError, ValueError: as there.
    """
    weights = without_prefixes(read_weights(source, flag), model.state_dict())
    return _fill(model, weights, f"{flag} {source}", None, False, partial)


def _fill(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    said: str,
    free: tuple[str, ...] | None,
    anew: bool,
    partial: bool | None,
) -> TransferReport:
    """Put `weights` into the model, under timm's names where its filter for the model finds them.

    Args:
        said: what an error begins with.
        free: beginnings of names that need not be in the file or used from it, nor have one shape; None: nothing may
            differ, not the geometry of the embeddings either.
        anew: the patch embedding keeps its values.
    """
    loaded, report, misfit = _matched(model, weights, free, anew)
    if misfit or _gaps(report, free):
        translated = _translated(model, weights)
        found = translated and _matched(model, translated, free, anew)
        changed = _resized_by_filter(weights, found[0]) if found else []
        if found and not (found[2] or _gaps(found[1], free) or (changed and free is None)):
            loaded, report, misfit = found
            report.transferred = [name for name in report.transferred if name not in changed]
            report.resampled += [name for name in changed if name not in report.resampled]
            log.info("%s: names translated by timm's filter for this model", said)
    if misfit:
        raise MisfitError(f"{said}: {misfit}; give weights of the same architecture")
    report.gaps = _gaps(report, free)
    if report.gaps and not partial:
        way_out = "" if partial is None else f", or accept it by {PARTIAL}"
        raise MisfitError(f"{said}: {report.gaps}; give weights of the same architecture{way_out}")
    if report.gaps:
        log.warning("%s: %s (%s)", said, report.gaps, PARTIAL)
    model.load_state_dict({**model.state_dict(), **loaded})
    return report


def _matched(
    model: nn.Module, weights: Mapping[str, Tensor], free: tuple[str, ...] | None, anew: bool
) -> tuple[dict[str, Tensor], TransferReport, str]:
    """Which tensor goes where, and a shape that cannot be adapted in words, or that no name fits; else nothing."""
    own, heads = model.state_dict(), free or ()
    report, loaded = TransferReport(skipped=sorted(weights.keys() - own.keys())), {}
    for name, current in own.items():
        value = weights.get(name)
        if (
            value is None
            or (anew and name.startswith("patch_embed."))
            or (heads and name.startswith(heads) and value.shape != current.shape)
        ):
            report.reinitialised.append(name)
            continue
        resampled = None
        if value.shape != current.shape:
            resampled = None if free is None else _resample(name, value, current, model)
            if resampled is None:
                return {}, report, f"{name} is {tuple(value.shape)} there and {tuple(current.shape)} in the model"
        (report.transferred if resampled is None else report.resampled).append(name)
        loaded[name] = value if resampled is None else resampled
    return loaded, report, "" if report.transferred else "no tensor has a name of this model's"


def _gaps(report: TransferReport, free: tuple[str, ...] | None) -> str:
    """What is missing and what is left over, by number and name, in one line; empty where nothing is."""
    missing, left = (
        [n for n in names if not n.startswith(free or ())] for names in (report.reinitialised, report.skipped)
    )
    count = len(report.transferred) + len(report.resampled) + len(report.reinitialised)
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} of the model's {count} tensors ({_named(missing)})")
    if left:
        parts.append(f"the model has no place for {len(left)} of its tensors ({_named(left)})")
    return " and ".join(parts)


def _named(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def _translated(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights under timm's names, by the filter of the file that defines the model's class; None where that has
    none, or cannot make anything of them."""
    convert = _filter_of(model)
    if convert is None:
        return None
    try:
        return {name: value for name, value in convert(dict(weights), model).items() if isinstance(value, Tensor)}
    except Exception:  # filters take their author's layout for granted, and fail on others as they come
        return None


def _filter_of(model: nn.Module) -> Callable | None:
    """timm's `checkpoint_filter_fn` for a model; our own ViTs have the names of timm's."""
    try:
        timm = import_timm("--pretrained")
    except PretrainedError:
        return None
    found = [getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None) for cls in type(model).__mro__]
    ours = [timm.models.vision_transformer.checkpoint_filter_fn] if type(model).__module__ == "models.vit" else []
    convert = next((each for each in (*found, *ours) if each is not None), None)
    if convert is not None and "adapt_layer_scale" in inspect.signature(convert).parameters:
        return bound(convert, adapt_layer_scale=True)  # gamma_1 of DeiT-III
    return convert


def _resized_by_filter(weights: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    """timm's filters resample on their way: tensors that have another size than in the file."""
    return [name for name, tensor in loaded.items() if name in weights and weights[name].numel() != tensor.numel()]


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's tensors begin with; distilled models have two heads."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


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
