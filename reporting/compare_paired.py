"""Paired comparisons of groups of runs, seed by seed, as rows of compare_paired.csv and as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from reporting.groups import Group, Point, equal_density, equal_levels
from reporting.paired import Difference, corrected, difference_columns, paired
from reporting.words import escaped, giga, md_table, percent

ALL_PAIRS = 6  # up to so many groups all pairs are compared, beyond that each group with the first
SAME_MACS = 0.02  # MACs this close, relative to each other, count as equal
LONG = 24  # characters; groups with longer labels are numbered instead
Member = tuple[Group, Point]
Unpaired = tuple[Group, Group, str]  # seeds that the first group has and the second has not


@dataclass
class Comparison:
    """Two groups at an equal density or cost: A - B of the test accuracies of the seeds that both have."""

    equal: str  # `density`, `MACs`, or `nothing pruned`
    level: float  # the mean density or MACs
    a: Member
    b: Member
    seeds: list[str]
    difference: Difference

    @property
    def place(self) -> str:
        """The level as text."""
        if self.equal == "nothing pruned":
            return "dense"
        return f"density {percent(self.level)}" if self.equal == "density" else f"MACs {giga(self.level)}"


def paired_comparisons(groups: Sequence[Group]) -> tuple[list[Comparison], list[Unpaired]]:
    """All comparisons of one data set, corrected for their number, and the unpaired seeds.

    Two groups are compared where they reach the same density below 100%, or the same MACs at different densities, as
    heads and neurons do. Dense runs are compared with each other and with every pruned state. Up to ALL_PAIRS groups,
    all pairs are compared; beyond that each group with the first of its level, so that the number of comparisons, which
    widens the corrected intervals, grows only linearly. No two states are compared twice.
    """
    found: list[Comparison] = []
    unpaired: dict[tuple, Unpaired] = {}
    made = set()
    for equal, members in _levels(groups):
        pairs = [(a, b) for place, a in enumerate(members) for b in members[place + 1 :]]
        if len(groups) > ALL_PAIRS:
            pairs = [(a, members[0]) for a in members[1:]]
        reached = [_measure(equal, point) for group, point in members if group.method != "dense"]
        level = statistics.fmean(reached or [1.0])
        for a, b in pairs:
            states = frozenset((id(group), point.state) for group, point in (a, b))
            if states in made:
                continue
            made.add(states)
            left, right = _accuracies(a), _accuracies(b)
            shared = [key for key in left if key in right]
            for (group, _), own, (other, _) in ((a, left, b), (b, right, a)):
                alone = ", ".join(key[0] for key in own if key not in shared)
                if alone:
                    unpaired[id(group), id(other), alone] = (group, other, alone)
            if shared:
                difference = paired([left[key] - right[key] for key in shared])
                found.append(Comparison(equal, level, a, b, [key[0] for key in shared], difference))
    for comparison, difference in zip(found, corrected([each.difference for each in found]), strict=True):
        comparison.difference = difference
    return found, list(unpaired.values())


def _levels(groups: Sequence[Group]) -> Iterable[tuple[str, list[Member]]]:
    """Members that can be compared, and what is equal; dense runs come last in each level."""
    dense = [(group, group.points[-1]) for group in groups if group.method == "dense"]
    pruned = [group for group in groups if group.method != "dense"]
    yield "nothing pruned", dense
    levels = [[each for each in members if each[1].density < 1] for members in equal_density(pruned)]
    in_levels = {(id(group), point.state) for members in levels for group, point in members}
    points = [(group, point) for group in pruned for point in group.points if point.density < 1]
    levels += [[each] for each in points if (id(each[0]), each[1].state) not in in_levels]
    for members in sorted((members for members in levels if members), key=lambda members: -members[0][1].density):
        yield "density", members + dense
    for members in equal_levels(pruned, _log_macs, math.log(1 + SAME_MACS)):
        smaller = [(group, point) for group, point in members if _measure("MACs", point) < _whole_macs(group)]
        yield "MACs", smaller


def _measure(equal: str, point: Point) -> float:
    return point.counts.get("macs", math.nan) if equal == "MACs" else point.density


def _log_macs(point: Point) -> float:
    macs = _measure("MACs", point)
    return math.log(macs) if macs > 0 else math.nan


def _whole_macs(group: Group) -> float:
    """MACs below which units were removed; zeros among single weights save no MACs."""
    return _measure("MACs", group.points[0]) / (1 + SAME_MACS)


def _accuracies(member: Member) -> dict[tuple, float]:
    """Test accuracies in that state by seed, training and validation images, which the runs of a pair share."""
    group, point = member
    found = {}
    for run in group.runs:
        key = (str(run.args["seed"]), run.args.get("train_limit"), run.args.get("val_fraction"))
        for row in run.states:
            if row["state"] == point.state and math.isfinite(row.get("test_accuracy", math.nan)):
                found[key] = row["test_accuracy"]
    return found


def paired_rows(data: str, comparisons: Iterable[Comparison]) -> list[dict]:
    """Rows of compare_paired.csv: accuracies as fractions, as in compare.csv; missing values are empty."""
    rows = []
    for each in comparisons:
        found = each.difference
        row = {"dataset": data, "equal": each.equal, "level": each.level}
        for name, (group, point) in (("a", each.a), ("b", each.b)):
            row |= {name: group.label, f"{name}_state": point.title}
        row |= {"n": found.n, "seeds": " ".join(each.seeds), "mean": found.mean, "sd": found.sd}
        intervals = {"t": found.interval, "corrected": found.corrected, "bootstrap": found.bootstrap}
        for name, (low, high) in intervals.items():
            row |= {f"{name}_low": low, f"{name}_high": high}
        row |= {"p": found.p, "p_holm": found.p_holm, "comparisons": found.comparisons, "verdict": found.verdict}
        rows.append(blank_nan(row))
    return rows


def blank_nan(row: Mapping) -> dict:
    """The row of a CSV file with empty cells for NaN."""
    return {name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def paired_text(
    data: str, groups: Sequence[Group], comparisons: Sequence[Comparison], unpaired: Sequence[Unpaired]
) -> list[str]:
    """Paragraphs of compare.md about the differences; none where nothing can be compared."""
    if not comparisons and not unpaired:
        return []
    parts = [f"### Paired differences: {escaped(data)}"]
    numbered = max(len(group.label) for group in groups) > LONG
    names = {id(group): f"group {place}" if numbered else group.label for place, group in enumerate(groups, 1)}
    if numbered:
        parts.append("\n".join(f"- {names[id(group)]}: {escaped(group.label)}" for group in groups))
    tested = sum(each.difference.n > 1 for each in comparisons)
    if tested:
        parts += [_rules(tested, len(groups)), _table(comparisons, names)]
    else:
        parts.append("No two groups that can be compared share two seeds: their differences have no interval.")
    if unpaired:
        parts.append(
            "Seeds left out, because the other group has no run of them with the same training and validation images:"
        )
        lines = [f"{names[id(group)]} against {names[id(other)]}: {seeds}" for group, other, seeds in unpaired]
        parts.append("\n".join(f"- {escaped(line)}" for line in lines))
    return parts


def _rules(tested: int, groups: int) -> str:
    many = f" With more than {ALL_PAIRS} groups, each is compared with the first of its level."
    return (
        "A - B is the difference of test accuracies in percentage points, pair by pair: two runs of one seed, with the "
        "same training and validation images. The 95% interval is Student's t; the corrected one is wider, so that "
        f"those of all comparisons of this table ({tested} have two pairs or more) hold together at 95% (Bonferroni). "
        "A is called better or worse than B only where the corrected interval excludes zero. The bootstrap's 95% "
        f"interval (BCa) is a second check, too narrow with few seeds.{many if groups > ALL_PAIRS else ''}"
    )


def _table(comparisons: Sequence[Comparison], names: Mapping[int, str]) -> str:
    columns = {
        "equal in": lambda each: each.place,
        "A - B": lambda each: f"{names[id(each.a[0])]} - {names[id(each.b[0])]}",
        "A is": lambda each: each.difference.verdict,
        "states": lambda each: f"{each.a[1].title}, {each.b[1].title}",
        **difference_columns(lambda each: each.difference),
    }
    return md_table(comparisons, columns, left=3)
