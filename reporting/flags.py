"""Which flags of a run matter: what makes two runs the same experiment, and the command line that repeats one."""

from __future__ import annotations

import json
import re
import shlex

from pruning.depth import DEPTH
from reporting.runs import Run
from settings.flags import FLAGS, complete, idle_flags

KINDS = {"head": "heads", "mlp": "neurons", "both": "heads+neurons", "all": "heads+neurons+branches", **DEPTH}
TARGETS = {name: flag.words for name, flag in FLAGS.items() if name.startswith("target_")}


def flags_without_effect(run: Run) -> set[str]:
    """Flags that this run's other flags leave without effect, and `units` of `identity` where none are removed."""
    has_units = True if run.args.get("vit_structured") else has_filters(run)
    return set(idle_flags({**run.args, "has_units": has_units})) | ({"units"} if run.method == "dense" else set())


def has_filters(run: Run) -> bool | None:
    """Whether its units are filters, as its rows say; None before the first epoch, when it has no row."""
    return "filters" in run.counts if run.counts else None


def identity(run: Run) -> dict:
    """What makes two runs the same experiment: all flags with effect but the seed, and the units that go."""
    args = complete(run.args)
    if run.method != "dense":
        whole = KINDS.get(args.get("vit_prune_target"), "units") if args.get("vit_structured") else None
        args["units"] = whole or ("filters" if has_filters(run) and run.method != "imp" else "weights")
    if args.get("mlp_prune_ratio") is None:
        args["mlp_prune_ratio"] = args.get("rate")
    own = args.pop("dense_epochs", None)
    own = args["epochs"] if own is None else own
    if run.method != "dense":
        args["dense_epochs"] = own
    elif args["struct"] != "dense":  # a single state
        args["epochs"] = own
    if args.get("unit_counts") or args.get("ratio_allocation") in ("uniform", "global"):
        args.pop("ratio_allocation")  # what the file holds counts, and what --sorting_mode says
    if args["struct"] == "dense":  # one schedule over all epochs, milestones and all
        args["epochs"] *= args["pruning_times"]
        milestones = re.findall(r"\d+", str(args.get("decreasing_lr") or ""))
        args["decreasing_lr"] = ",".join(str(int(epoch) * args["pruning_times"]) for epoch in milestones)
        args["pruning_times"] = 1
    args["struct"] = run.method
    left_out = flags_without_effect(run) | {name for name, flag in FLAGS.items() if not flag.computes}
    left_out |= {"seed", "vit_structured", "vit_prune_target", "notes", "pretrained_note"}
    flags = {name: value for name, value in args.items() if name not in left_out}
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
    left_out = flags_without_effect(run) | {"save_dir", "resume", "checkpoint", "overwrite", "dry_run", "config"}
    lines = ["python main_imp_fillback.py"]
    for name, value in run.args.items():
        if name in left_out or name not in FLAGS or name.startswith("wandb_"):
            continue
        for typed in FLAGS[name].typed(value):
            option, sign, text = typed.partition("=")
            word = option if not sign else f"{option}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}"
            if len(lines[-1]) + len(word) < 96:
                lines[-1] += f" {word}"
            else:
                lines.append(f"    {word}")
    return " \\\n".join(lines)
