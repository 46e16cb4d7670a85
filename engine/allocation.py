"""How many units each layer keeps in runs that do not go by ratios: flags and scores in, counts and kept units out.

A target says what the whole may cost (`--target_macs`, `--target_params`, `--target_latency_ms`), a file what each
layer keeps in the end (`--ratio_allocation FILE`). The arithmetic stands in `pruning/budget.py`, milliseconds are
measured by `engine/latency.py`.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import latency
from engine.sensitivity import SENSITIVITY, sensitivity_curves
from families import Family
from models.merging import unmerged
from pruning.budget import (
    CLOSE,
    Cost,
    Counts,
    Levels,
    best_units,
    emptied_levels,
    global_counts,
    levels_of,
    lowest_cost,
    scheduled_counts,
    scheduled_limit,
    uniform_counts,
)
from pruning.curves import least_loss_counts
from pruning.ranking import mark_removed
from pruning.units import Units
from utils import RunError, cause

log = logging.getLogger(__name__)

SORTING = {"uniform": "layer-wise", "global": "global"}  # --ratio_allocation -> --sorting_mode
COUNTED = {"target_macs": "macs", "target_params": "parameters"}  # flag -> what a family's `cost` calls it
WORDS = {"target_macs": "MACs", "target_params": "parameters", None: "MACs"}  # without a target: of --rate
LATENCY = "target_latency_ms"
TARGETS = (*COUNTED, LATENCY)
Rule = Callable[[Mapping[str, Tensor], Levels, Cost, float], Counts]  # scores, levels, cost, limit
RULES: dict[str, Rule] = {"layer-wise": uniform_counts, "global": global_counts}  # by --sorting_mode


def target_of(args: argparse.Namespace) -> str | None:
    """The flag that sets a target, None where a run has none."""
    return next((name for name in TARGETS if getattr(args, name) is not None), None)


def allocates(args: argparse.Namespace) -> bool:
    """Whether a target or a file, and not ratios of heads and of neurons, says how many units stay."""
    return target_of(args) is not None or args.unit_counts is not None or takes_all(args)


def takes_all(args: argparse.Namespace) -> bool:
    """Whether heads, neurons and whole branches are ranked together; without a target, --rate is the share of the MACs
    of all of them that goes."""
    return args.vit_structured and args.vit_prune_target == "all"


def read_counts(path: str) -> Counts:
    """{layer: units that it keeps} of a JSON file, or of the last state in the units.csv of a run.

    Raises:
        RunError: there is no such file, or it holds something else.
    """
    flag = f"--ratio_allocation {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".csv"):
            rows = list(csv.DictReader(text.splitlines()))
            last = max(int(row["state"]) for row in rows)
            counts = {row["layer"]: int(row["kept"]) for row in rows if int(row["state"]) == last}
        else:
            counts = json.loads(text)
    except OSError as error:
        raise RunError(
            f"{flag}: {error.strerror}; give {', '.join([*SORTING, SENSITIVITY])} or a file of counts"
        ) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"neither JSON nor the units.csv of a run ({cause(error)})"
        raise RunError(f"{flag}: {reason}; give counts by layer") from error
    if not (counts and isinstance(counts, dict) and all(type(count) is int for count in counts.values())):
        raise RunError(f'{flag}: must hold whole numbers by layer, such as {{"blocks.0.attn": 2}}')
    return counts


def check_allocation(args: argparse.Namespace, model: nn.Module, units: Mapping[str, Units], family: Family) -> None:
    """Whether this run's units can be as few, and as many, as its target or file asks for.

    Raises:
        RunError: naming what can be had.
    """
    target = target_of(args)
    if not allocates(args) or args.struct == "dense":
        return
    flag = f"--{target} {getattr(args, target):g}" if target else f"--ratio_allocation {args.ratio_allocation}"
    if not target and takes_all(args):
        flag = f"--rate {args.rate:g}"
    if not units:
        raise RunError(f"{flag}: counts whole units; add --vit_structured, for filters --struct refill or rsst")
    filters = next(iter(units.values())).kind == "filter"
    if filters and args.criteria == "remain":
        raise RunError(f"{flag}: --criteria remain goes by single weights, and none are pruned here; choose another")
    floor = max(1, args.min_units) if filters else args.min_units
    for key, count in (args.unit_counts or {}).items():
        if key not in units:
            known = f"{next(iter(units))} to {list(units)[-1]}"
            raise RunError(f"{flag}: {key} is no layer whose units go in this run; they are {known}")
        if not floor <= count <= units[key].count:
            raise RunError(f"{flag}: {key} keeps {floor} (--min_units) to {units[key].count} units, not {count}")
    if target != LATENCY and args.unit_counts is None:
        cost = counted(family, model, target)
        least, dense = lowest_cost(_all_levels(args, units), cost), _of_dense(family, model, target)
        if least > _asked(args, family, model, units):
            raise RunError(
                f"{flag}: {least / dense:.4f} of the {WORDS[target]} stay at least; ask for more, lower --min_units, "
                "or let more units go (--vit_prune_target both)"
            )


def _no_scores(units: Mapping[str, Units]) -> dict[str, Tensor]:
    return {key: torch.zeros(group.count, dtype=torch.float64) for key, group in units.items()}


def _levels(args: argparse.Namespace, units: Mapping[str, Units], scores, worth=None) -> dict[str, list[int]]:
    levels = levels_of(units, scores, args.min_units, args.round_to)
    return emptied_levels(levels, units, scores, worth or {}) if takes_all(args) else levels


def _all_levels(args: argparse.Namespace, units: Mapping[str, Units]) -> dict[str, list[int]]:
    return _levels(args, units, _no_scores(units))


def counted(family: Family, model: nn.Module, target: str | None) -> Cost:
    """What `model` costs by counts of units that are left, in MACs, also without a target, or parameters."""
    name = COUNTED[target or "target_macs"]

    def cost(counts: Mapping[str, int]) -> float:
        return family.cost(model, {key: range(count) for key, count in counts.items()})[name]

    return cost


def _of_dense(family: Family, model: nn.Module, target: str | None) -> float:
    """What the dense network costs, which merges no tokens even where `model` does."""
    return counted(family, unmerged(model), target)({})


def _asked(args: argparse.Namespace, family: Family, model: nn.Module, units: Mapping[str, Units]) -> float:
    """What may be left in the end, in MACs or parameters."""
    if target := target_of(args):
        return getattr(args, target) * _of_dense(family, model, target)
    whole = counted(family, model, None)({})
    return whole - args.rate * sum(group.count * group.macs(model, group) for group in units.values())


def _schedule(args: argparse.Namespace) -> str:
    return "constant" if args.struct == "oneshot" else args.ratio_schedule


def _limit(args: argparse.Namespace, whole: float, asked: float, state: int) -> float:
    """What may be left of `whole` in this state, where `asked` is what may be left in the end."""
    return scheduled_limit(whole, min(asked, whole), _schedule(args), state, args.pruning_times)


def _counts(
    args: argparse.Namespace,
    family: Family,
    model: nn.Module,
    units: Mapping[str, Units],
    scores,
    state: int,
    rule: Rule,
    worth=None,
) -> Counts:
    """What the layers keep in `state`, which is not the first one, by these scores of the units that are left."""
    if args.unit_counts is not None:
        totals = {key: group.count for key, group in units.items()}
        return scheduled_counts(args.unit_counts, totals, _schedule(args), state, args.pruning_times)
    cost = counted(family, model, target_of(args))
    limit = _limit(args, cost({}), _asked(args, family, model, units), state)
    return rule(scores, _levels(args, units, scores, worth), cost, limit)


def choose_by_budget(run, scores: Mapping[str, Tensor], worth: Mapping[str, Tensor] | None = None) -> dict:
    """Which units stay in the state that begins, {units key: ids}.

    Args:
        scores: -inf for units that are gone.
        worth: as in `budget.step_values`, where branches go as a whole.
    """
    args, state, target = run.args, run.progress.state, target_of(run.args)
    rule = _rule(run, scores, worth)
    if target == LATENCY:
        # of several processes the first one measures, and its choice counts
        return best_units(scores, _counts_by_latency(run, scores, rule, worth) if run.processes.first else {})
    kept = best_units(scores, _counts(args, run.family, run.dense, run.units, scores, state, rule, worth))
    if args.unit_counts is None:
        cost = counted(run.family, run.dense, target)
        dense = _of_dense(run.family, run.dense, target)
        asked = _limit(args, cost({}), _asked(args, run.family, run.dense, run.units), state) / dense
        share = cost({key: len(ids) for key, ids in kept.items()}) / dense
        coarse = "; the next unit would pass it" if share < (1 - CLOSE) * asked else ""
        log.info(f"budget: {share:.4f} of the {WORDS[target]}, asked {asked:.4f}{coarse}")
    return kept


def _rule(run, scores: Mapping[str, Tensor], worth: Mapping[str, Tensor] | None) -> Rule:
    """How the state that begins shares a limit out among layers; sensitivity is measured by all processes together."""
    args = run.args
    if args.ratio_allocation == SENSITIVITY:
        curves = sensitivity_curves(run, scores, _levels(args, run.units, scores))
        return lambda _, levels, cost, limit: least_loss_counts(curves, levels, cost, limit)
    return partial(global_counts, worth=worth) if worth else RULES[args.sorting_mode]


def _counts_by_latency(run, scores: Mapping[str, Tensor], rule: Rule, worth) -> Counts:
    """What is measured for a state stays in latency.json, so that the run chooses the same when it is resumed."""
    args, state = run.args, str(run.progress.state)
    table = latency.read_table(run.save_dir) or measure_run(run)
    cost, levels = latency.table_cost(table), _levels(args, run.units, scores, worth)

    def allocate(limit: float) -> Counts:
        return rule(scores, levels, cost, limit)

    def measure(counts: Counts) -> float:
        small, dense = latency.small_ms(run.dense, run.units, counts, args.latency_batch)
        return small / dense * table["dense_ms"]  # beside other work both take longer

    if state not in table["states"]:
        whole = table["dense_ms"]
        wanted = _limit(args, whole, args.target_latency_ms, run.progress.state)
        table["states"][state] = latency.meet(wanted, allocate, cost, measure)
        latency.write_table(run.save_dir, table)
    record = table["states"][state]
    if abs(record["measured_ms"] - record["asked_ms"]) > latency.WITHIN * record["asked_ms"]:
        log.warning("budget: no choice was measured within 5% of what was asked; is the device busy with other work?")
    log.info(
        f"budget: {record['measured_ms']:.3f} ms measured, asked {record['asked_ms']:.3f}, dense "
        f"{table['dense_ms']:.3f} (batch {args.latency_batch}; {len(record['tried'])} tried)"
    )
    return allocate(record["limit_ms"])


def measure_run(run) -> dict:
    """Measure what the run's network and its layers take, into latency.json, before anything is trained.

    Raises:
        RunError: the target cannot be met, or is met already.
    """
    args = run.args
    lowest = {key: steps[-1] for key, steps in _all_levels(args, run.units).items()}
    table = latency.measure_table(run.dense, run.units, args.latency_batch, lowest)
    small, dense = latency.small_ms(run.dense, run.units, lowest, args.latency_batch)
    least, flag = small / dense * table["dense_ms"], f"--{LATENCY} {args.target_latency_ms:g}"
    found = f"a batch of {args.latency_batch} takes the dense network {table['dense_ms']:.3f} ms on {run.device}"
    if args.target_latency_ms >= table["dense_ms"]:
        raise RunError(f"{flag}: {found} already; ask for less", code=1)
    if args.target_latency_ms * (1 + latency.WITHIN) < least:
        raise RunError(f"{flag}: {found}, and the smallest one {least:.3f} ms; ask for more", code=1)
    latency.write_table(run.save_dir, table)
    log.info(f"latency: {found}, the smallest one {least:.3f} ms; what layers take stands in {latency.FILE}")
    return table


def measure_result(run) -> None:
    """What the network that the run ends with takes, into log and latency.json."""
    counts = {key: len(ids) for key, ids in run.progress.kept.items()}
    small, dense = latency.small_ms(run.dense, run.units, counts, run.args.latency_batch)
    table = latency.read_table(run.save_dir) or measure_run(run)
    asked = run.args.target_latency_ms
    table["model"] = {"measured_ms": small, "asked_ms": asked, "dense_ms": dense}
    latency.write_table(run.save_dir, table)
    log.info(f"latency: {small:.2f} ms measured, asked {asked:.2f}; the dense network takes {dense:.2f} ms now")


def planned_counts(
    args: argparse.Namespace, family: Family, model: nn.Module, units: Mapping[str, Units], states: int
) -> list[Counts]:
    """What layers keep in each state where all units score alike and all layers give the same share: the totals of a
    run, and of a uniform one each layer's count to a unit."""
    scores, found = _no_scores(units), [{}]
    for state in range(1, states):
        found.append(_counts(args, family, model, units, scores, state, uniform_counts))
        scores = mark_removed(scores, best_units(scores, found[-1]))
    return found
