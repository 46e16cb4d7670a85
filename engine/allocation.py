"""How many units each layer keeps in runs that do not go by ratios: flags and scores in, counts and kept units out.

A target says what the whole may cost (`--target_macs`, `--target_params`), a file what each layer keeps in the end
(`--ratio_allocation FILE`). The arithmetic stands in `pruning/budget.py`.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from families import Family
from pruning.budget import (
    CLOSE,
    Cost,
    Counts,
    best_units,
    emptied_levels,
    global_counts,
    levels_of,
    lowest_cost,
    scheduled_counts,
    scheduled_limit,
    uniform_counts,
)
from pruning.units import Units
from utils import RunError

log = logging.getLogger(__name__)

SORTING = {"uniform": "layer-wise", "global": "global"}  # --ratio_allocation -> --sorting_mode
COUNTED = {"target_macs": "macs", "target_params": "parameters"}  # flag -> what a family's `cost` calls it
WORDS = {"target_macs": "MACs", "target_params": "parameters"}


def target_of(args: argparse.Namespace) -> str | None:
    """The flag that sets a target, None where a run has none."""
    return next((name for name in COUNTED if getattr(args, name) is not None), None)


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
        raise RunError(f"{flag}: {error.strerror}; give {', '.join(SORTING)} or a file of counts") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{flag}: neither JSON nor the units.csv of a run; give counts by layer") from error
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
    if args.unit_counts is None:
        cost = counted(family, model, target)
        least = lowest_cost(_levels(args, units, _no_scores(units)), cost) / cost({})
        if least > _asked(args, model, units, cost({})):
            raise RunError(
                f"{flag}: {least:.4f} of the {WORDS[target or 'target_macs']} stay at least; ask for more, "
                "lower --min_units, or let more units go (--vit_prune_target both)"
            )


def _no_scores(units: Mapping[str, Units]) -> dict[str, Tensor]:
    return {key: torch.zeros(group.count, dtype=torch.float64) for key, group in units.items()}


def counted(family: Family, model: nn.Module, target: str | None) -> Cost:
    """What `model` costs by counts of units that are left, in MACs, also without a target, or parameters."""

    def cost(counts: Mapping[str, int]) -> float:
        return family.cost(model, {key: range(count) for key, count in counts.items()})[
            COUNTED[target or "target_macs"]
        ]

    return cost


def _levels(args: argparse.Namespace, units: Mapping[str, Units], scores, worth=None) -> dict[str, list[int]]:
    levels = levels_of(units, scores, args.min_units, args.round_to)
    return emptied_levels(levels, units, scores, worth or {}) if takes_all(args) else levels


def _asked(args: argparse.Namespace, model: nn.Module, units: Mapping[str, Units], whole: float) -> float:
    """The share of the whole cost that may be left in the end."""
    target = target_of(args)
    if target:
        return getattr(args, target)
    return 1 - args.rate * sum(group.count * group.macs(model, group) for group in units.values()) / whole


def _schedule(args: argparse.Namespace) -> str:
    return "constant" if args.struct == "oneshot" else args.ratio_schedule


def _limit(args: argparse.Namespace, whole: float, asked: float, state: int) -> float:
    """What may be left of `whole` in this state, of which `asked` is the share that is left in the end."""
    return scheduled_limit(whole, asked * whole, _schedule(args), state, args.pruning_times)


def _counts(
    args: argparse.Namespace,
    family: Family,
    model: nn.Module,
    units: Mapping[str, Units],
    scores,
    state: int,
    worth=None,
) -> Counts:
    """What the layers keep in `state`, which is not the first one, by these scores of the units that are left."""
    if args.unit_counts is not None:
        totals = {key: group.count for key, group in units.items()}
        return scheduled_counts(args.unit_counts, totals, _schedule(args), state, args.pruning_times)
    cost = counted(family, model, target_of(args))
    limit = _limit(args, cost({}), _asked(args, model, units, cost({})), state)
    levels = _levels(args, units, scores, worth)
    if args.sorting_mode == "global":
        return global_counts(scores, levels, cost, limit, worth)
    return uniform_counts(scores, levels, cost, limit)


def choose_by_budget(run, scores: Mapping[str, Tensor], worth: Mapping[str, Tensor] | None = None) -> dict:
    """Which units stay in the state that begins, {units key: ids}.

    Args:
        scores: -inf for units that are gone.
        worth: as in `budget.step_values`, where branches go as a whole.
    """
    args, state = run.args, run.progress.state
    kept = best_units(scores, _counts(args, run.family, run.dense, run.units, scores, state, worth))
    target = target_of(args)
    if args.unit_counts is None:
        cost = counted(run.family, run.dense, target)
        asked = _limit(args, 1.0, _asked(args, run.dense, run.units, cost({})), state)
        share = cost({key: len(ids) for key, ids in kept.items()}) / cost({})
        coarse = "; the next unit would pass it" if share < (1 - CLOSE) * asked else ""
        log.info(f"budget: {share:.4f} of the {WORDS[target or 'target_macs']}, asked {asked:.4f}{coarse}")
    return kept


def planned_counts(
    args: argparse.Namespace, family: Family, model: nn.Module, units: Mapping[str, Units], state: int
) -> Counts:
    """What layers keep in `state` where all units score alike and all layers give the same share: the totals of a run,
    and of a uniform one each layer's count to a unit."""
    if state == 0:
        return {}
    uniform = argparse.Namespace(**{**vars(args), "sorting_mode": "layer-wise"})
    return _counts(uniform, family, model, units, _no_scores(units), state)
