"""How many units each layer keeps before every state: one object, made once from the flags.

    allocation = allocation_of(args, family, model, units)
    kept = allocation.choose(state, scores, kept, run)      # {units key: ids}
    allocation.plan()                                       # the same choice for every state, by even scores

What is limited decides the class: `Ratios` of all units, `Budget` of MACs or parameters, `Timed` milliseconds, `Listed`
counts of a file, `Whole` blocks or branches, `Filters` by the density of single weights. The arithmetic stands in
pruning/budget.py, milliseconds are measured by latency.py, what layers can spare by sensitivity.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine import latency
from engine.sensitivity import sensitivity_curves
from families import Family
from models.merging import unmerged
from pruning.budget import (
    CLOSE,
    Cost,
    Counts,
    best_units,
    emptied_levels,
    global_counts,
    levels_of,
    scheduled_counts,
    scheduled_limit,
    uniform_counts,
)
from pruning.curves import least_loss_counts
from pruning.depth import DEPTH, candidates, depth_note, is_attention, rank_branches
from pruning.ranking import (
    filter_count,
    keep_count,
    mark_removed,
    rank_units,
    scheduled_ratio,
    select_filters,
    target_ratios,
)
from pruning.rounding import fitting_count
from pruning.units import Kept, Units
from settings.effect import takes_all, target_of
from settings.flags import SENSITIVITY, SORTING
from utils import RunError, cause

if TYPE_CHECKING:
    from engine.run import Run

log = logging.getLogger(__name__)

Scores = Mapping[str, Tensor]  # float64 [count] per units key, -inf for units that are gone
RULES = {"layer-wise": uniform_counts, "global": global_counts}  # by --sorting_mode
COUNTED = {"target_macs": "macs", "target_params": "parameters"}  # flag -> what a family's `cost` calls it
WORDS = {"target_macs": "MACs", "target_params": "parameters", None: "MACs"}  # without a target: of --rate
LATENCY = "target_latency_ms"


def allocates(args: argparse.Namespace) -> bool:
    """Whether a target or a file, and not ratios of heads and of neurons, says how many units stay."""
    return target_of(vars(args)) is not None or args.unit_counts is not None or takes_all(vars(args))


class Allocation(ABC):
    """What all ways to share units out have in common.

    Attributes:
        remark: what the plan leaves open, for people.
        by_density: whether the masks of single weights say how many units stay.
        by_branch: whether scores are those of whole branches, [1] per units key.
    """

    remark = ""
    by_density = by_branch = False

    def __init__(self, args: argparse.Namespace, family: Family, model: nn.Module, units: Mapping[str, Units]):
        self.args, self.family, self.model, self.units = args, family, model, units
        self.states = args.pruning_times
        self.schedule = "constant" if args.struct == "oneshot" else args.ratio_schedule
        self.probes = args.ratio_allocation == SENSITIVITY

    @abstractmethod
    def choose(self, state: int, scores: Scores, kept: Kept, run: Run | None = None, worth: Scores | None = None):
        """Which units stay before `state`, which is not the first one: {units key: ids, ascending}.

        Args:
            kept: the ids that are left.
            run: measures what layers can spare, and milliseconds; without it, in a plan, all give the same share.
            worth: as in `budget.step_values`, where branches go as a whole.
        """

    def said(self, state: int, kept: Kept) -> str:
        """A line on the choice for the log; empty where there is nothing to say."""
        return ""

    def plan(self) -> list[Kept]:
        """What layers keep in each state if the units of every layer are worth evenly less, from the first to the last:
        the totals of a run, and of a uniform one each layer's count."""
        even = self._even_scores()
        found: list[Kept] = [{key: list(range(group.count)) for key, group in self.units.items()}]
        for state in range(1, self.states):
            scores = even if self.by_branch else mark_removed(even, found[-1])
            found.append(self.choose(state, scores, found[-1]))
        return found

    def _even_scores(self) -> dict[str, Tensor]:
        return {key: torch.arange(group.count, 0, -1).double() / group.count for key, group in self.units.items()}

    def _levels(self, scores: Scores, worth: Scores | None = None) -> dict[str, list[int]]:
        return levels_of(self.units, scores, self.args.min_units, self.args.round_to)


class Ratios(Allocation):
    """--rate of the heads and --mlp_prune_ratio of the neurons, or of the filters, are gone in the end."""

    def choose(self, state, scores, kept, run=None, worth=None):
        args = self.args
        goals = target_ratios(args.vit_prune_target, args.rate, args.mlp_prune_ratio)
        ratios = {kind: scheduled_ratio(self.schedule, ratio, state, self.states) for kind, ratio in goals.items()}
        if self.probes and run:
            return self._by_sensitivity(run, scores, ratios)
        options = args.sorting_mode, args.min_units, args.rank_by, args.round_to
        return rank_units(self.model, self.units, scores, ratios, *options)

    def _by_sensitivity(self, run: Run, scores: Scores, ratios: Mapping[str, float]) -> Kept:
        levels, counts = self._levels(scores), {}
        curves = sensitivity_curves(run, scores, levels)
        for kind, ratio in ratios.items():
            pool = {key: steps for key, steps in levels.items() if self.units[key].kind == kind}
            limit = keep_count(sum(len(scores[key]) for key in pool), ratio, len(pool) * self.args.min_units)
            counts |= least_loss_counts(curves, pool, partial(_units_left, pool), limit)
        return best_units(scores, counts)

    def _even_scores(self):
        even = super()._even_scores()
        if self.args.rank_by == "score":
            return even
        return {key: value * self.units[key].macs(self.model, self.units[key]) for key, value in even.items()}

    @property
    def remark(self) -> str:
        if self.args.rank_by == "score_per_mac":
            return "Ranked by score per MAC: which units go is up to the scores; the MACs are as above."
        return ""


def _units_left(pool: Mapping[str, list[int]], counts: Mapping[str, int]) -> int:
    return sum(counts.get(key, steps[0]) for key, steps in pool.items())


class Listed(Allocation):
    """Each layer keeps in the end what a file says."""

    def choose(self, state, scores, kept, run=None, worth=None):
        totals = {key: group.count for key, group in self.units.items()}
        counts = scheduled_counts(self.args.unit_counts, totals, self.schedule, state, self.states)
        return best_units(scores, counts)


class Budget(Allocation):
    """MACs or parameters that are left in the end; without a target, the MACs that --rate leaves of all units."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.target = target_of(vars(self.args))

    def choose(self, state, scores, kept, run=None, worth=None):
        return best_units(scores, self._rule(scores, run, worth)(self.cost, self.limit(state)))

    def cost(self, counts: Mapping[str, int]) -> float:
        """What the network costs with so many units left."""
        return self.family.cost(self.model, _ranges(counts))[COUNTED[self.target or "target_macs"]]

    @property
    def dense_cost(self) -> float:
        """Of the dense network, which merges no tokens even where this one does."""
        return self.family.cost(unmerged(self.model), {})[COUNTED[self.target or "target_macs"]]

    @property
    def goal(self) -> float:
        """What may be left in the end."""
        if self.target:
            return getattr(self.args, self.target) * self.dense_cost
        removable = sum(group.count * group.macs(self.model, group) for group in self.units.values())
        return self.cost({}) - self.args.rate * removable

    def limit(self, state: int) -> float:
        """What may be left in `state`."""
        return self._scheduled(state, self.cost({}), self.goal)

    def _scheduled(self, state: int, whole: float, goal: float) -> float:
        return scheduled_limit(whole, min(goal, whole), self.schedule, state, self.states)

    def _rule(self, scores: Scores, run: Run | None, worth: Scores | None) -> Callable[[Cost, float], Counts]:
        """How a limit on a cost is shared out among layers; what they can spare, all processes measure together."""
        levels = self._levels(scores, worth)
        if self.probes and run:
            return partial(least_loss_counts, sensitivity_curves(run, scores, levels), levels)
        if worth:
            return partial(global_counts, scores, levels, worth=worth)
        return partial(RULES[self.args.sorting_mode], scores, levels)

    def _levels(self, scores, worth=None):
        levels = super()._levels(scores)
        return emptied_levels(levels, self.units, scores, worth or {}) if takes_all(vars(self.args)) else levels

    def lowest(self) -> dict[str, int]:
        """The fewest units that layers may keep."""
        return {key: steps[-1] for key, steps in self._levels(Allocation._even_scores(self)).items()}

    def _even_scores(self):
        """Every layer's unit is worth what it costs, so that one ranking takes the same share of all."""
        whole, lowest = self.cost({}), self.lowest()
        unit = {
            key: (whole - self.cost({key: lowest[key]})) / max(1, group.count - lowest[key])
            for key, group in self.units.items()
        }
        return {key: value * unit[key] for key, value in super()._even_scores().items()}

    def check(self, flag: str) -> None:
        least, dense = self.cost(self.lowest()), self.dense_cost
        if least > self.goal:
            raise RunError(
                f"{flag}: {least / dense:.4f} of the {WORDS[self.target]} stay at least; ask for more, lower "
                "--min_units, or let more units go (--vit_prune_target both)"
            )

    def said(self, state, kept):
        dense, limit = self.dense_cost, self.limit(state)
        share, asked = self.cost({key: len(ids) for key, ids in kept.items()}) / dense, limit / dense
        coarse = "; the next unit would pass it" if share < (1 - CLOSE) * asked else ""
        return f"budget: {share:.4f} of the {WORDS[self.target]}, asked {asked:.4f}{coarse}"

    @property
    def remark(self) -> str:
        if takes_all(vars(self.args)):
            return "Ranked over all layers, branches as a whole, too: how many of each kind go is up to the scores."
        if self.args.sorting_mode == "global":
            return "Units are ranked over all layers: how many of each kind go is up to the scores."
        return "The counts of two layers may differ by what fills the target; how, is up to the scores."


def _ranges(counts: Mapping[str, int]) -> dict[str, range]:
    return {key: range(count) for key, count in counts.items()}


class Timed(Budget):
    """Milliseconds that a batch takes the small network in the end, measured on the run's device."""

    remark = "Milliseconds are measured when the run starts: how many units later states keep is known then."

    def choose(self, state, scores, kept, run=None, worth=None):
        rule = self._rule(scores, run, worth)
        # of several processes the first one measures, and its choice counts
        return best_units(scores, self._timed_counts(state, run, rule) if run.processes.first else {})

    def _timed_counts(self, state: int, run: Run, rule: Callable[[Cost, float], Counts]) -> Counts:
        """What is measured for a state stays in latency.json, so that the run chooses the same when it is resumed."""
        table = latency.read_table(run.save_dir) or self.measure(run)
        allocate = partial(rule, latency.table_cost(table))

        def measured(counts: Counts) -> float:
            small, dense = latency.small_ms(self.model, self.units, counts, self.args.latency_batch)
            return small / dense * table["dense_ms"]  # on a busy machine both take longer

        if str(state) not in table["states"]:
            wanted = self._scheduled(state, table["dense_ms"], self.args.target_latency_ms)
            table["states"][str(state)] = latency.meet(wanted, allocate, latency.table_cost(table), measured)
            latency.write_table(run.save_dir, table)
        record = table["states"][str(state)]
        if abs(record["measured_ms"] - record["asked_ms"]) > latency.WITHIN * record["asked_ms"]:
            log.warning("budget: no choice was measured within 5% of what was asked; is the device busy?")
        log.info(
            f"budget: {record['measured_ms']:.3f} ms measured, asked {record['asked_ms']:.3f}, dense "
            f"{table['dense_ms']:.3f} (batch {self.args.latency_batch}; {len(record['tried'])} tried)"
        )
        return allocate(record["limit_ms"])

    def plan(self):
        return [{key: list(range(group.count)) for key, group in self.units.items()}]

    def check(self, flag: str) -> None:
        """What can be had is measured when the run starts, see `measure`."""

    def said(self, state, kept):
        return ""

    def measure(self, run: Run) -> dict:
        """Measure what the run's network and its layers take, into latency.json, before anything is trained.

        Raises:
            RunError: the target cannot be met, or is met already.
        """
        batch, goal, lowest = self.args.latency_batch, self.args.target_latency_ms, self.lowest()
        table = latency.measure_table(self.model, self.units, batch, lowest)
        small, dense = latency.small_ms(self.model, self.units, lowest, batch)
        least, flag = small / dense * table["dense_ms"], f"--{LATENCY} {goal:g}"
        found = f"a batch of {batch} takes the dense network {table['dense_ms']:.3f} ms on {run.device}"
        if goal >= table["dense_ms"]:
            raise RunError(f"{flag}: {found} already; ask for less", code=1)
        if goal * (1 + latency.WITHIN) < least:
            raise RunError(f"{flag}: {found}, and the smallest one {least:.3f} ms; ask for more", code=1)
        latency.write_table(run.save_dir, table)
        log.info(f"latency: {found}, the smallest one {least:.3f} ms; what layers take stands in {latency.FILE}")
        return table

    def measure_result(self, run: Run) -> None:
        """What the network that the run ends with takes, into log and latency.json."""
        counts = {key: len(ids) for key, ids in run.progress.kept.items()}
        small, dense = latency.small_ms(self.model, self.units, counts, self.args.latency_batch)
        table, asked = latency.read_table(run.save_dir) or self.measure(run), self.args.target_latency_ms
        table["model"] = {"measured_ms": small, "asked_ms": asked, "dense_ms": dense}
        latency.write_table(run.save_dir, table)
        log.info(f"latency: {small:.2f} ms measured, asked {asked:.2f}; the dense network takes {dense:.2f} ms now")


class Whole(Allocation):
    """--rate of the blocks or branches is gone in the end."""

    by_branch = True

    def choose(self, state, scores, kept, run=None, worth=None):
        target, ratio = self.args.vit_prune_target, scheduled_ratio(self.schedule, self.args.rate, state, self.states)
        return rank_branches(scores, scores, target, ratio, kept)

    def _even_scores(self):
        """The last ones go, of attentions and MLPs the same share."""
        kinds = [[key for key in self.units if is_attention(key) == of] for of in (True, False)]
        order = {key: len(keys) - place for keys in kinds for place, key in enumerate(keys)}
        return {key: torch.tensor([float(order[key])], dtype=torch.float64) for key in self.units}

    def said(self, state, kept):
        return f"state {state}: {depth_note(self.units, self.args.vit_prune_target, kept)}"

    @property
    def remark(self) -> str:
        target = self.args.vit_prune_target
        branches = self.family.branches_as_units(self.model)
        costs = {key: branch.macs(self.model, branch) / 1e9 for key, branch in branches.items()}
        macs = [sum(costs[key] for key in keys) for keys in candidates(branches, target).values()]
        shares = ", of attentions and MLPs the same share" if target == "branch" else ""
        each = f"One costs {min(macs):.4f} to {max(macs):.4f} G MACs" if min(macs) < max(macs) else "All cost the same"
        return f"Which {DEPTH[target]} go is up to the scores; here it is the last ones{shares}. {each}."


class Filters(Allocation):
    """The density of a layer in the masks of single weights, and refill, say how many whole filters it keeps."""

    by_density = True
    remark = "How many filters a layer keeps follows its density; here all layers are taken as equally dense."

    def choose(self, state, scores, kept, run=None, worth=None):
        return select_filters(run.progress.elementwise, scores, self.args.fillback_rate, self.args.round_to)

    def plan(self):
        args = self.args
        layers = self.family.prunable_layers(self.model, args.prune_patch_embed).values()
        prunable = sum(layer.weight.numel() for layer in layers)
        found: list[Kept] = []
        for state in range(self.states):
            left = round(prunable * (1 - args.rate) ** state) / prunable
            counts = {key: filter_count(group.count, left, args.fillback_rate) for key, group in self.units.items()}
            found.append(
                {
                    key: range(fitting_count(counts[key], group.count, group.count, round_to=args.round_to))
                    for key, group in self.units.items()
                }
            )
        return found


def allocation_of(
    args: argparse.Namespace, family: Family, model: nn.Module, units: Mapping[str, Units]
) -> Allocation | None:
    """How a run of these flags shares its units out; None where it removes none.

    Raises:
        RunError: the units cannot be as few, or as many, as the flags ask for; names what can be had.
    """
    if args.struct == "dense":
        return None
    target, parts = target_of(vars(args)), (args, family, model, units)
    flag = f"--{target} {getattr(args, target):g}" if target else f"--ratio_allocation {args.ratio_allocation}"
    if not target and takes_all(vars(args)):
        flag = f"--rate {args.rate:g}"
    if not units:
        if allocates(args):
            raise RunError(f"{flag}: counts whole units; add --vit_structured, for filters --struct refill or rsst")
        return None
    if not allocates(args):
        if family.counts_by == "density":
            return Filters(*parts)
        return (Whole if args.vit_prune_target in DEPTH else Ratios)(*parts)
    filters = next(iter(units.values())).kind == "filter"
    if filters and args.criteria == "remain":
        raise RunError(f"{flag}: --criteria remain goes by single weights, and none are pruned here; choose another")
    if args.unit_counts is not None:
        _check_counts(args, units, flag, max(1, args.min_units) if filters else args.min_units)
        return Listed(*parts)
    allocation = (Timed if target == LATENCY else Budget)(*parts)
    allocation.check(flag)
    return allocation


def _check_counts(args: argparse.Namespace, units: Mapping[str, Units], flag: str, floor: int) -> None:
    for key, count in args.unit_counts.items():
        if key not in units:
            known = f"{next(iter(units))} to {list(units)[-1]}"
            raise RunError(f"{flag}: {key} is no layer whose units go in this run; they are {known}")
        if not floor <= count <= units[key].count:
            raise RunError(f"{flag}: {key} keeps {floor} (--min_units) to {units[key].count} units, not {count}")


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
