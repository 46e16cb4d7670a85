"""Paired comparisons: mean, intervals and verdict of the differences of two methods over the same seeds.

    found = corrected([paired(a - b) for a, b in comparisons])     # a, b: one accuracy a seed, in the same order
    found[0].mean, found[0].interval, found[0].corrected, found[0].verdict

Means and intervals have the unit of the differences. Two runs of one seed share initial weights, batches and random
crops, which cancel in the difference, so its interval is narrower than the two standard deviations suggest.

The rule for claims: A is better or worse than B only where the *corrected* interval, which holds for all comparisons of
a table at once, excludes zero. The bootstrap is a second check that needs no normal distribution; where the two 95%
intervals disagree about zero, the verdict says so. With a few seeds the bootstrap's interval is too narrow (it covers
less than 95%), so it makes no claim by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reporting import need

ALPHA = 0.05  # of an interval, and of all corrected intervals of a table together
RESAMPLES = 9999  # of the bootstrap
ROUNDING = 1e-12  # a spread or a difference below it is rounding
NONE = (math.nan, math.nan)


@dataclass(frozen=True)
class Difference:
    """A - B over n pairs; an interval is (low, high), NaN where the pairs give none."""

    n: int
    mean: float
    sd: float  # sample standard deviation, n - 1; NaN below two pairs
    interval: tuple[float, float]  # of Student's t, at 95%
    bootstrap: tuple[float, float]  # at 95%, from three pairs on
    p: float  # two-sided, of no difference; NaN below two pairs, 1 without a spread
    comparisons: int = 1  # that the two below are corrected for
    corrected: tuple[float, float] = NONE  # of Student's t: all of a table hold together at 95%
    p_holm: float = math.nan

    @property
    def agree(self) -> bool | None:
        """Whether both 95% intervals, t and bootstrap, exclude zero or both contain it; None where one is missing."""
        if math.isnan(self.interval[0]) or math.isnan(self.bootstrap[0]):
            return None
        return excludes_zero(self.interval) == excludes_zero(self.bootstrap)

    @property
    def claim(self) -> str:
        """`better`, `worse`, or nothing where no difference was found."""
        word = self.verdict.partition(" ")[0]
        return word if word in ("better", "worse") else ""

    @property
    def verdict(self) -> str:
        """How A compares with B: `better` and `worse` need a corrected interval without zero."""
        if self.n < 2:
            return f"no interval (n = {self.n})"
        if self.sd <= ROUNDING:
            return "the same in every pair" if abs(self.mean) <= ROUNDING else "no interval (no spread)"
        words = "no difference found"
        if excludes_zero(self.corrected):
            words = "better" if self.mean > 0 else "worse"
        return words + (" (t and bootstrap disagree about zero)" if self.agree is False else "")


def excludes_zero(interval: tuple[float, float]) -> bool:
    """Whether zero lies outside; False for a missing interval."""
    return interval[0] > 0 or interval[1] < 0


def paired(differences: Sequence[float]) -> Difference:
    """Mean difference of pairs with its 95% intervals, as a single comparison; `corrected` is for several.

    The t interval is mean -+ t(0.975, n - 1) * sd / sqrt(n) (Student 1908, "The probable error of a mean"): exact for
    normal differences. The bootstrap is BCa (Efron 1987, "Better bootstrap confidence intervals"), with fixed random
    numbers. One pair has no interval; two give the t interval of one degree of freedom, 9 sd wide to either side, and
    no bootstrap (three means are all that it could draw). Pairs without a spread have none either: they would claim
    certainty, and come from test sets too small to show a difference.

    Args:
        differences: A - B of each pair, (n,).

    Raises:
        ValueError: none, or one is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"needs a finite difference or more, in one row; got {differences!r}")
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Difference(n, mean, math.nan, NONE, NONE, math.nan)
    sd = float(values.std(ddof=1))
    if sd <= ROUNDING:
        return Difference(n, mean, sd, NONE, NONE, 1.0, p_holm=1.0)
    interval = _t_interval(n, mean, sd, ALPHA)
    p = float(2 * need("scipy.special").stdtr(n - 1, -abs(mean) / (sd / math.sqrt(n))))
    bootstrap = NONE
    if n > 2:
        rng = np.random.default_rng(0)
        options = {"confidence_level": 1 - ALPHA, "n_resamples": RESAMPLES, "method": "BCa", "rng": rng}
        found = need("scipy.stats").bootstrap((values,), np.mean, **options).confidence_interval
        bootstrap = (float(found.low), float(found.high))
    return Difference(n, mean, sd, interval, bootstrap, p, corrected=interval, p_holm=p)


def _t_interval(n: int, mean: float, sd: float, alpha: float) -> tuple[float, float]:
    reach = -float(need("scipy.special").stdtrit(n - 1, alpha / 2)) * sd / math.sqrt(n)
    return mean - reach, mean + reach


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same comparisons, corrected for there being so many of them.

    Of m comparisons with two pairs or more, each gets the t interval at 1 - 0.05 / m: by Bonferroni's
    inequality all m hold together with 95% or more, dependent or not (Dunn 1961, "Multiple comparisons among means").
    They make the verdicts. `p_holm` is Holm's p (1979, "A simple sequentially rejective multiple test procedure"): with
    p in rising order, the largest (m - i) p(i) up to there, i from 0. It tests the same 5%, with more power than
    Bonferroni, but has no intervals of its own; it may fall below 0.05 where the interval just holds zero.
    """
    tested = sorted((each.p, place) for place, each in enumerate(differences) if not math.isnan(each.p))
    count, largest, found = len(tested), 0.0, list(differences)
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, (count - rank) * p))
        each = differences[place]
        wide = NONE if each.sd <= ROUNDING else _t_interval(each.n, each.mean, each.sd, ALPHA / count)
        found[place] = replace(each, comparisons=count, corrected=wide, p_holm=largest)
    return found


def points(interval: tuple[float, float]) -> str:
    """An interval of fractions, in percentage points."""
    low, high = (100 * end for end in interval)
    return f"{low:+.2f} to {high:+.2f}" if math.isfinite(low) else "-"


def difference_columns(difference: Callable[[object], Difference]) -> dict[str, Callable[[object], object]]:
    """The last columns of every table of differences, in percentage points; each is a function of a row.

    Args:
        difference: gives the difference of a row, in fractions.
    """
    return {
        "n": lambda row: difference(row).n,
        "difference": lambda row: f"{100 * difference(row).mean:+.2f}",
        "95% interval": lambda row: points(difference(row).interval),
        "corrected": lambda row: points(difference(row).corrected),
        "bootstrap": lambda row: points(difference(row).bootstrap),
    }
