"""When a flag has an effect: the other flags in, "" or the reason why it has none out.

The flags are those of a command or of a run's args.yaml, so a note in the log, the identity of a run and a search read
the same rules. Runs of older versions lack flags: `complete` gives them the defaults. `has_units` among them says
whether units are removed rather than single weights; None where only the model would tell.
"""

from __future__ import annotations

from pruning.depth import DEPTH
from settings.flag import Flags

DENSE = "where nothing is pruned"
TARGETS = ("target_macs", "target_params", "target_latency_ms")


def prunes(flags: Flags) -> str:
    return DENSE if flags["struct"] == "dense" or flags["pruning_times"] == 1 else ""


def target_of(flags: Flags) -> str | None:
    """The flag that sets a target, None where a run has none."""
    return next((name for name in TARGETS if flags[name] is not None), None)


def takes_all(flags: Flags) -> bool:
    """Whether heads, neurons and whole branches are ranked together; without a target, --rate is the share of the MACs
    of all of them that goes."""
    return bool(flags["vit_structured"]) and flags["vit_prune_target"] == "all"


def _counted(flags: Flags) -> str:
    """Why ratios do not say how many units stay."""
    if target := target_of(flags):
        return f"with --{target}, which says how many units stay"
    if flags["unit_counts"] is not None:
        return "with the file of --ratio_allocation, which says how many units stay"
    return ""


def structured(flags: Flags) -> str:
    return prunes(flags) or ("" if flags["vit_structured"] else "without --vit_structured")


def _by_layer(flags: Flags) -> str:
    target = flags["vit_prune_target"]
    whole = flags["vit_structured"] and target in DEPTH
    return f"where {DEPTH[target]} are ranked over the whole model, by --rate alone" if whole else ""


def _one_ranking(flags: Flags) -> str:
    return "where all kinds are ranked together by score per cost" if takes_all(flags) else ""


def _probed(flags: Flags) -> str:
    return "where layers go by their sensitivity" if flags["ratio_allocation"] == "sensitivity" else ""


def rate(flags: Flags) -> str:
    if flags["nm"]:
        return f"with --nm {flags['nm']}, which says how many weights stay"
    single = flags["criteria"] == "remain" or (flags["vit_structured"] and not flags["refill"])
    return prunes(flags) or ("" if single else _counted(flags))


def mlp_prune_ratio(flags: Flags) -> str:
    only_heads = "with --vit_prune_target head" if flags["vit_prune_target"] == "head" else ""
    return structured(flags) or only_heads or _by_layer(flags) or _one_ranking(flags) or _counted(flags)


def sorting_mode(flags: Flags) -> str:
    file = flags["unit_counts"] is not None
    needed = "" if target_of(flags) else structured(flags)
    found = prunes(flags) or needed or _by_layer(flags) or _probed(flags) or (_counted(flags) if file else "")
    return found or ("" if flags["sorting_mode"] == "global" else _one_ranking(flags))


def ratio_schedule(flags: Flags) -> str:
    return prunes(flags) or ("" if flags["nm"] or _counted(flags) else structured(flags))


def rank_by(flags: Flags) -> str:
    return structured(flags) or _by_layer(flags) or _one_ranking(flags) or _counted(flags) or _probed(flags)


def min_units(flags: Flags) -> str:
    return prunes(flags) or ("" if _counted(flags) else structured(flags)) or _by_layer(flags)


def round_to(flags: Flags) -> str:
    if flags["vit_structured"] and flags["vit_prune_target"] == "head":
        return "on heads"
    single = "on single weights" if not flags["vit_structured"] and flags.get("has_units") is False else ""
    file = flags["unit_counts"] is not None
    return prunes(flags) or single or _by_layer(flags) or (_counted(flags) if file else "")


def ratio_allocation(flags: Flags) -> str:
    needed = "" if flags["vit_structured"] or target_of(flags) else "without --vit_structured or a target"
    return prunes(flags) or needed or _by_layer(flags) or _one_ranking(flags)


def criteria(flags: Flags) -> str:
    if flags["vit_structured"]:
        return prunes(flags)
    none = flags["struct"] == "imp" or (flags.get("has_units") is False and not flags["fillback_rate"])
    return prunes(flags) or ("where single weights go by magnitude" if none else "")


def fillback_rate(flags: Flags) -> str:
    element_wise = not flags["vit_structured"] and flags["struct"] in ("refill", "rsst")
    return "" if element_wise else "but in element-wise refill and rsst, which give weights back"


def prune_patch_embed(flags: Flags) -> str:
    return prunes(flags) or ("on heads and neurons" if flags["vit_structured"] else "")


def repair_images(flags: Flags) -> str:
    return prunes(flags) or ("" if flags["repair"] in ("mean", "ls") else "where nothing is repaired at the cut")


def dense_epochs(flags: Flags) -> str:
    return "with --struct dense, which has one schedule over all epochs" if flags["struct"] == "dense" else ""


def rsst(flags: Flags) -> str:
    return prunes(flags) or ("" if flags["struct"] == "rsst" else f"with --struct {flags['struct']}")


def exponents(flags: Flags) -> str:
    other = flags["RST_schedule"] != "exp_custom_exponents"
    return rsst(flags) or (f"with --RST_schedule {flags['RST_schedule']}" if other else "")


def rewind_epoch(flags: Flags) -> str:
    other = flags["prune_type"] != "rewind_lt"
    return prunes(flags) or (f"with --prune_type {flags['prune_type']}" if other else "")


def decreasing_lr(flags: Flags) -> str:
    return "with --sched cosine" if flags["sched"] == "cosine" else ""


def momentum(flags: Flags) -> str:
    return "with --opt adamw" if flags["opt"] == "adamw" else ""


def patch_embed(flags: Flags) -> str:
    anew = flags["stem"] == "conv" and flags["patch_embed"] == "resample"
    return "on a conv stem, which has no patches to resample" if anew else ""


def teacher(flags: Flags) -> str:
    wants = flags["kd_alpha"] != 0 or flags["kd_features"]  # None: it follows, and is not 0
    return "" if wants else "with --kd_alpha 0 and no --kd_features, which leave it no share of the loss"


def kd_hard(flags: Flags) -> str:
    return "" if flags["kd_alpha"] else "with --kd_alpha 0"
