"""Groups of runs that differ only in their seed, and the densities at which groups can be compared."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reporting.flags import flags_without_effect, identity, same, seed_for_all
from reporting.runs import COUNTS, METHODS, RunFiles

SAME_DENSITY = 0.01  # densities this close count as equal


@dataclass
class Point:
    """Means over the seeds of a group in one state; accuracies as (mean, standard deviation), NaN below two seeds."""

    state: int
    n: int
    density: float
    counts: dict[str, float]  # heads, neurons or filters, parameters, macs
    val: tuple[float, float]
    test: tuple[float, float]
    top5: tuple[float, float] = (math.nan, math.nan)  # of the test images; NaN where not measured
    finish: bool = False  # the final training after the last state

    @property
    def title(self) -> int | str:
        return "finish" if self.finish else self.state


@dataclass
class Group:
    """Runs that differ only in their seed."""

    flags: dict
    runs: list[RunFiles]
    label: str = ""

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def points(self) -> list[Point]:
        return [self._point(rows) for rows in zip(*(run.states for run in self.runs), strict=False)]

    def _point(self, rows: Sequence[dict]) -> Point:
        """Of one row of states.csv from each run."""
        state = rows[0]["state"]
        names = [name for name in (*COUNTS, "parameters", "macs") if any(name in row for row in rows)]
        density, *accuracies = (
            mean_and_sd(row.get(name, math.nan) for row in rows)
            for name in ("density", "best_accuracy", "test_accuracy", "test_top5")
        )
        counts = {name: mean_and_sd(row.get(name, math.nan) for row in rows)[0] for name in names}
        return Point(state, len(rows), density[0], counts, *accuracies, state == self.runs[0].finish)


def mean_and_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of the finite values; NaN where there are too few."""
    values = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def data_of(run: RunFiles) -> str:
    """The data set of a run; folders of images are distinguished by their path."""
    name = str(run.args["dataset"])
    return f"{name} {run.args.get('data')}" if name == "folder" else name


def _key(flags: dict) -> str:
    return json.dumps({name: same(value) for name, value in flags.items() if value or None}, sort_keys=True)


def group_runs(runs: Sequence[RunFiles]) -> list[Group]:
    """Groups in the order of their first run; labels name the method and the flags that differ.

    Runs whose initial weights or teachers differ only by the run's own seed in their path are one group.
    """
    found: dict[str, Group] = {}
    identities = [identity(run) for run in runs]
    seeds: dict[str, set] = {}
    for run, flags in zip(runs, identities, strict=True):
        seeds.setdefault(_key(flags), set()).add(run.args["seed"])
    for run, flags in zip(runs, identities, strict=True):
        if len(seeds[_key(flags)]) == 1:
            flags = seed_for_all(flags, run.args["seed"])
        found.setdefault(_key(flags), Group(flags, [])).runs.append(run)
    groups = list(found.values())
    taken: dict[str, int] = {}
    for group in groups:
        # a dense run always has one long schedule, which only distinguishes it from other dense runs
        same_kind = [other for other in groups if (other.method == "dense") == (group.method == "dense")]
        words = []
        for name, value in group.flags.items():
            others = same_kind if name in ("epochs", "pruning_times", "decreasing_lr") else groups
            values = {
                same(other.flags.get(name)) for other in others if name not in flags_without_effect(other.runs[0])
            }
            if name != "struct" and len(values) > 1:
                words.append(_flag_words(name, value))
        label = METHODS.get(group.method, (group.method,))[0] + (f" ({', '.join(words)})" if words else "")
        taken[label] = taken.get(label, 0) + 1
        group.label = label if taken[label] == 1 else f"{label} #{taken[label]}"
    return groups


def _flag_words(name: str, value) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if name in ("arch", "criteria", "opt", "sched", "units"):  # the value alone is clear
        return str(value)
    if isinstance(value, str) and os.sep in value:
        value = Path(value).name
    return f"{name} {'none' if value is None else f'{value:g}' if isinstance(value, float) else value}"


def equal_density(groups: Sequence[Group]) -> list[list[tuple[Group, Point]]]:
    """Levels of density that two groups or more reach within SAME_DENSITY of each other, dense first."""
    return equal_levels(groups, lambda point: point.density, SAME_DENSITY)


def equal_levels(
    groups: Sequence[Group], measure: Callable[[Point], float], tolerance: float
) -> list[list[tuple[Group, Point]]]:
    """Levels of a measure that two groups or more reach within the tolerance of each other, largest first.

    A level has one point of a group at most. The closest points are joined first; a remaining point gets a level of its
    own with all points that are close enough. Points whose measure is NaN are left out.
    """
    points = [
        (index, point) for index, group in enumerate(groups) for point in group.points if math.isfinite(measure(point))
    ]

    def near(members: Sequence[tuple[int, Point]]) -> bool:
        reached = [measure(point) for _, point in members]
        once = len({index for index, _ in members}) == len(members)
        return once and max(reached) - min(reached) <= tolerance + 1e-9

    level = {id(point): [(index, point)] for index, point in points}
    pairs = [
        (abs(measure(a) - measure(b)), -measure(a), i, a.state, j, b.state, a, b)
        for position, (i, a) in enumerate(points)
        for j, b in points[position + 1 :]
        if i != j and abs(measure(a) - measure(b)) <= tolerance + 1e-9
    ]
    for *_, a, b in sorted(pairs, key=lambda pair: pair[:6]):
        if level[id(a)] is not level[id(b)] and near(level[id(a)] + level[id(b)]):
            merged = level[id(a)] + level[id(b)]
            for _, point in merged:
                level[id(point)] = merged
    levels = list({id(members): members for members in level.values() if len(members) > 1}.values())
    for index, point in points:
        if len(level[id(point)]) == 1:
            members = [(index, point)]
            for other in sorted(points, key=lambda entry: abs(measure(entry[1]) - measure(point))):
                if near([*members, other]):
                    members.append(other)
            if len(members) > 1:
                levels.append(members)
    levels.sort(key=lambda members: -statistics.fmean(measure(point) for _, point in members))
    return [[(groups[index], point) for index, point in sorted(members, key=lambda m: m[0])] for members in levels]
