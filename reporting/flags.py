"""Which flags of a run matter: what makes two runs the same experiment, and the command line that repeats one."""

from __future__ import annotations

import json
import re
import shlex

from pruning.depth import DEPTH
from reporting.runs import Run

KINDS = {"head": "heads", "mlp": "neurons", "both": "heads+neurons", "all": "heads+neurons+branches", **DEPTH}
TARGETS = {  # flag -> what it says, in words
    "target_macs": "{:.4g} of the dense network's MACs are left in the end",
    "target_params": "{:.4g} of the dense network's parameters are left in the end",
    "target_latency_ms": "a batch takes the small network {:.4g} ms in the end",
}

# where and how a run was made, not what was computed
_CIRCUMSTANCES = {
    "save_dir", "exp_name", "device", "gpu", "workers", "print_freq", "verbose", "resume", "checkpoint", "overwrite",
    "checkpoint_every", "config", "data", "dry_run", "export", "list_archs", "notes", "pretrained_note",
}  # fmt: skip
_STRUCTURED = {
    "vit_prune_target", "mlp_prune_ratio", "sorting_mode", "ratio_schedule", "rank_by", "min_units", "refill",
    "compact_training",
}  # fmt: skip
_PENALTY = {
    "RST_schedule", "reg_granularity_prune", "exponents", "reg_form", "reg_clock", "reg_finish", "block_loss_grad",
}  # fmt: skip
_PRUNING = {
    "rate", "prune_type", "rewind_epoch", "criteria", "score_batches", "fillback_rate", "prune_patch_embed", "fc",
    "vit_structured", "round_to", "nm", *TARGETS, "latency_batch", "ratio_allocation", "unit_counts",
}  # fmt: skip
_NEGATED = {"export", "refill", "flip"}  # true unless --no-NAME is given
_TWO_WAY = {"compact_training"}  # --NAME and --no-NAME


def flags_without_effect(run: Run) -> set[str]:
    """Flags that this run's other flags leave without effect, and `units` of `identity` where none go."""
    args, without_effect = run.args, set()
    structured = bool(args.get("vit_structured"))
    if run.method == "dense":
        without_effect |= _PRUNING | _STRUCTURED | _PENALTY | {"units"}
    if args.get("nm"):
        without_effect.add("rate")
    allocated = args.get("unit_counts") or any(args.get(name) is not None for name in TARGETS)
    if not structured:
        by_schedule = {"ratio_schedule", "min_units"} if allocated else {"ratio_schedule"} if args.get("nm") else set()
        without_effect |= _STRUCTURED - by_schedule
    elif args.get("vit_prune_target") == "head":
        without_effect.add("mlp_prune_ratio")
    elif args.get("vit_prune_target") in DEPTH:
        without_effect |= {"mlp_prune_ratio", "sorting_mode", "min_units", "rank_by", "round_to"}
    elif args.get("vit_prune_target") == "all":
        without_effect |= {"mlp_prune_ratio", "sorting_mode", "rank_by"}
    heads_only = structured and args.get("vit_prune_target") == "head"
    single_weights = not structured and has_filters(run) is False
    if args.get("round_to", 1) == 1 or heads_only or single_weights:
        without_effect.add("round_to")
    if args.get("ratio_allocation") == "sensitivity":
        without_effect |= {"sorting_mode", "rank_by"}
    if allocated:
        without_effect |= {"mlp_prune_ratio", "rank_by"}
        if args.get("criteria") != "remain" and not (structured and args.get("refill") is False):
            without_effect.add("rate")
    if args["struct"] != "rsst":
        without_effect |= _PENALTY
    if args.get("RST_schedule") != "exp_custom_exponents":
        without_effect.add("exponents")
    if args.get("prune_type") != "rewind_lt":
        without_effect.add("rewind_epoch")
    if structured or args["struct"] not in ("refill", "rsst"):
        without_effect.add("fillback_rate")
    chooses_none = has_filters(run) is False and not args.get("fillback_rate")
    if not structured and (args["struct"] == "imp" or chooses_none):
        without_effect |= {"criteria", "score_batches"}
    if structured:
        without_effect.add("prune_patch_embed")
    if args.get("sched") == "cosine":
        without_effect.add("decreasing_lr")
    if args.get("stem") == "patch":  # runs of older versions have no other, and do not say so
        without_effect.add("stem")
    if args.get("flip", True) or args.get("aug") == "none":  # runs of older versions flip, and do not say so
        without_effect.add("flip")
    if args.get("opt") == "adamw":
        without_effect.add("momentum")
    return without_effect


def has_filters(run: Run) -> bool | None:
    """Whether its units are filters, as its rows say; None before the first epoch, when it has no row."""
    return "filters" in run.counts if run.counts else None


def identity(run: Run) -> dict:
    """What makes two runs the same experiment: all flags with effect but the seed, and the units that go."""
    args, without_effect = dict(run.args), flags_without_effect(run)
    if run.method != "dense":
        whole = KINDS.get(args.get("vit_prune_target"), "units") if args.get("vit_structured") else None
        args["units"] = whole or ("filters" if has_filters(run) and run.method != "imp" else "weights")
    if args.get("mlp_prune_ratio") is None:
        args["mlp_prune_ratio"] = args.get("rate")
    if args.get("unit_counts") or args.get("ratio_allocation") in ("uniform", "global"):
        args.pop("ratio_allocation")  # what the file holds counts, and what --sorting_mode says
    if args["struct"] == "dense":  # one schedule over all epochs, milestones and all
        args["epochs"] *= args["pruning_times"]
        milestones = re.findall(r"\d+", str(args.get("decreasing_lr") or ""))
        args["decreasing_lr"] = ",".join(str(int(epoch) * args["pruning_times"]) for epoch in milestones)
        args["pruning_times"] = 1
    args["struct"] = run.method
    left_out = without_effect | _CIRCUMSTANCES | {"seed", "vit_structured", "vit_prune_target"}
    flags = {name: value for name, value in args.items() if name not in left_out and not name.startswith("wandb_")}
    return flags | ({"pretrained_note": True} if run.args.get("pretrained_note") else {})


def seed_for_all(flags: dict, seed: int) -> dict:
    """The flags with {seed} for a run's own seed in the files that it starts from or learns of.

    The number must stand alone, and not in a decimal such as 0.5.
    """
    files = {name: flags[name] for name in ("init", "pretrained", "teacher") if isinstance(flags.get(name), str)}
    return flags | {name: re.sub(rf"(?<![\d.]){seed}(?!\d|\.\d)", "{seed}", value) for name, value in files.items()}


def same(value) -> str:
    """A flag's value for comparing; off, none, zero and a flag that an older run did not know are one."""
    return json.dumps(value or None, sort_keys=True, default=str)


def command(run: Run) -> str:
    """The command line that repeats a run, into a new folder: every flag with effect, as args.yaml has it."""
    left_out = flags_without_effect(run) | {
        "save_dir",
        "resume",
        "checkpoint",
        "overwrite",
        "dry_run",
        "config",
        "notes",
    }
    left_out |= {"pretrained_note", "unit_counts"}
    words = ["python main_imp_fillback.py"]
    for name, value in run.args.items():
        if name in left_out or name.startswith("wandb_") or value is None:
            continue
        if value is False and name in _NEGATED | _TWO_WAY:
            words.append(f"--no-{name}")
        elif value is True and name not in _NEGATED:
            words.append(f"--{name}")
        elif not isinstance(value, bool):
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < 96:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)
