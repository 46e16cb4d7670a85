"""The table of `--list_archs`: timm's models that can be pruned, with their sizes and units.

    print(list_archs("*dinov3*", verbose=True))                 # verbose: also those that cannot, and why

Models are built on the meta device, without weights. That takes about a second each, so results are cached in a file of
the user's cache folder, one for each version of timm; the cache is invalid once the code of families/ changes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm import tqdm

import families
from families import FAMILIES, family_of
from models import TIMM
from models.weight_files import PretrainedError, import_timm, reason
from pruning.units import LayoutError
from utils import RunError, format_table, write_text

log = logging.getLogger(__name__)

COLUMNS = ("name", "family", "pixels", "parameters", "MACs", "heads", "neurons")


def list_archs(pattern: str, verbose: bool = False) -> str:
    """The table for names that match `pattern`, a part of a name or one with wildcards.

    Raises:
        RunError: no name matches, or timm is missing.
    """
    names = _names(pattern.removeprefix(TIMM))
    found = _survey(names)
    accepted = [{"name": f"{TIMM}{name}", **found[name]} for name in names if "refused" not in found[name]]
    refused = {name: found[name]["refused"] for name in names if "refused" in found[name]}
    lines = [format_table(accepted, {title: title for title in COLUMNS})] if accepted else []
    if verbose:
        lines += [f"{TIMM}{name}: {why}" for name, why in refused.items()]
        lines += [f"{count:>4} x {why}" for why, count in Counter(map(_kind_of_reason, refused.values())).most_common()]
    hint = "" if verbose or not refused else "; --verbose shows which and why"
    lines.append(f"{len(names)} names: {len(accepted)} can be pruned, {len(refused)} not{hint}")
    return "\n".join(lines)


def _names(pattern: str) -> list[str]:
    """Matching names from those files of timm that the families know, sorted."""
    try:
        timm = import_timm("--list_archs")
    except PretrainedError as error:
        raise RunError(str(error)) from error
    wanted = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    files = [file for family in FAMILIES for file in getattr(family, "timm_files", ())]
    modules = [module for module in timm.list_modules() if any(fnmatch(module, file) for file in files)]
    names = sorted({name for module in modules for name in timm.list_models(module=module) if fnmatch(name, wanted)})
    if not names:
        raise RunError(f"--list_archs {pattern}: none of timm's ViTs has such a name; '*' lists all")
    return names


def _kind_of_reason(why: str) -> str:
    """A reason without block numbers, so that equal reasons can be counted."""
    return ".".join(part for part in why.split(".") if not part.isdigit())


def _survey(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Facts about each model, or why it is refused; cached."""
    path, digest = _cache_file(), _digest_of_families()
    known = _read(path, digest)
    missing = [name for name in names if name not in known]
    try:
        for name in tqdm(missing, desc="building without weights", leave=False, disable=None):
            known[name] = _facts(name)
    finally:
        if missing:
            _write(path, {"families": digest, "archs": known})
    return known


def _facts(name: str) -> dict[str, str]:
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = import_timm("--list_archs").create_model(name)
        family = family_of(model)
        units, cost = family.units(model), family.cost(model, {})
        pixels = family.image_size(model)
    except LayoutError as error:
        return {"refused": str(error)}
    except Exception as error:  # constructors raise their own types
        return {"refused": f"cannot be built without weights ({reason(error)})"}
    return {
        "family": family.title,
        "pixels": str(pixels),
        "parameters": f"{cost['parameters'] / 1e6:,.1f} M",
        "MACs": f"{cost['macs'] / 1e9:,.2f} G",
        **{
            f"{kind}s": _counts([group.count for group in units.values() if group.kind == kind])
            for kind in family.kinds
        },
    }


def _counts(counts: list[int]) -> str:
    """Twelve layers of 6, then two of 8, as "12 x 6 + 2 x 8"."""
    return " + ".join(f"{len(list(layers))} x {count}" for count, layers in itertools.groupby(counts))


# ------------------------------------------------------------------------------------------ the cache


def _cache_file() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prune-vit"
    return folder / f"archs-timm-{import_timm('--list_archs').__version__}.json"


def _digest_of_families() -> str:
    files = sorted(Path(families.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read(path: Path, digest: str) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        archs = content["archs"] if content["families"] == digest else {}
        return {name: facts for name, facts in archs.items() if isinstance(facts, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path, content: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=0, sort_keys=True))
    except (OSError, RunError) as error:
        log.debug("--list_archs: the cache cannot be written (%s)", error)
