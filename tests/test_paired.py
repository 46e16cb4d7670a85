"""Laws of paired comparisons: intervals by closed formulas, coverage over many draws, Holm's example, verdicts."""

import math

import numpy as np
import pytest

import reporting.paired as rules
from reporting.paired import Difference, corrected, paired

WIDE = (-9.0, 9.0)


def test_t_interval_by_hand():
    found = paired([1, 2, 3, 4, 5])
    assert (found.n, found.mean, found.sd) == (5, 3, pytest.approx(math.sqrt(2.5)))
    # a table of Student's t gives 2.776445 at 0.975 and 4 degrees; sd / sqrt(n) = sqrt(0.5)
    reach = 2.776445 * math.sqrt(0.5)
    assert found.interval == pytest.approx((3 - reach, 3 + reach), abs=1e-6)
    # Student's distribution of 4 degrees in closed form: P(|T| < t) = sin(angle) (1 + cos(angle)^2 / 2)
    angle = math.atan(3 / math.sqrt(0.5) / 2)
    assert found.p == pytest.approx(1 - math.sin(angle) * (1 + math.cos(angle) ** 2 / 2))
    assert found.corrected == found.interval
    assert found.p_holm == found.p
    # 5 numbers drawn from 1 to 5: their mean's sd is sqrt(2 / 5); the differences are symmetric, so is BCa
    assert found.bootstrap == pytest.approx((3 - 1.96 * math.sqrt(0.4), 3 + 1.96 * math.sqrt(0.4)), abs=0.1)
    assert paired([1, 2, 3, 4, 5]) == found  # the same random numbers every time


def test_bootstrap_leans_to_the_side_of_an_outlier():
    found = paired([0, 0.1, 0.2, 0.3, 4])
    low, high = (abs(end - found.mean) for end in found.bootstrap)
    assert high > 1.5 * low
    assert paired(-np.array([0, 0.1, 0.2, 0.3, 4])).interval == pytest.approx([-end for end in found.interval[::-1]])


def test_corrected_intervals_by_hand():
    # quantiles in closed form: one degree tan(pi (q - 1/2)), two (2 q - 1) / sqrt(2 q (1 - q))
    two, three, single, equal = paired([1, 3]), paired([1, 2, 3]), paired([7]), paired([0, 0])
    assert two.interval == pytest.approx((2 - math.tan(0.475 * math.pi), 2 + math.tan(0.475 * math.pi)))
    assert two.p == pytest.approx(1 - 2 / math.pi * math.atan(2))
    found = corrected([two, single, three, equal])
    q = 1 - 0.05 / 3 / 2  # three of them can be tested
    assert [each.comparisons for each in found] == [3, 1, 3, 3]
    reach = math.tan(math.pi * (q - 0.5))
    assert found[0].corrected == pytest.approx((2 - reach, 2 + reach))
    reach = (2 * q - 1) / math.sqrt(2 * q * (1 - q)) / math.sqrt(3)
    assert found[2].corrected == pytest.approx((2 - reach, 2 + reach))
    assert found[0].interval == two.interval
    assert [math.isnan(each.corrected[0]) for each in found] == [False, True, False, True]


def test_holm_by_hand():
    values = [0.01, 0.04, 0.03, math.nan, 0.005, 0.9]
    found = corrected([Difference(5, 1.0, 1.0, WIDE, WIDE, p) for p in values])
    # 5 x 0.005, 4 x 0.01, 3 x 0.03, then 2 x 0.04 below the last one, so that stays; 1 x 0.9
    expected = [0.04, 0.09, 0.09, math.nan, 0.025, 0.9]
    assert [each.p_holm for each in found] == pytest.approx(expected, nan_ok=True)
    assert corrected([]) == []


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(rules, "RESAMPLES", 99)
    rng = np.random.default_rng(3)
    pairs = [paired(0.7 + rng.normal(size=2)) for _ in range(3000)]
    fours = [paired(0.7 + rng.normal(size=4)) for _ in range(300)]

    def share(intervals):
        return np.mean([low <= 0.7 <= high for low, high in intervals])

    assert 0.94 < share([each.interval for each in pairs]) < 0.96
    assert 0.93 < share([each.interval for each in fours]) < 0.97
    assert 0.75 < share([each.bootstrap for each in fours]) < 0.92  # too narrow with few seeds, as its module says
    families = [corrected(pairs[start : start + 5]) for start in range(0, 3000, 5)]
    alone = np.mean([all(low <= 0.7 <= high for low, high in (a.interval for a in each)) for each in families])
    together = np.mean([all(low <= 0.7 <= high for low, high in (a.corrected for a in each)) for each in families])
    assert alone < 0.85  # 0.95^5 = 0.77
    assert together > 0.93


@pytest.mark.parametrize(("mean", "n", "sd", "interval", "bootstrap", "wide", "said"), [
    (1, 5, 1, (0.5, 1.5), (0.5, 1.5), (0.1, 1.9), "better"),
    (-1, 5, 1, (-1.5, -0.5), (-1.5, -0.5), (-1.9, -0.1), "worse"),
    (1, 5, 1, (0.5, 1.5), (0.5, 1.5), (-0.1, 2.1), "no difference found"),
    (1, 5, 1, (-0.5, 2.5), (0.5, 1.5), (-1, 3), "no difference found (t and bootstrap disagree about zero)"),
    (1, 5, 1, (0.5, 1.5), (0.0, 1.5), (0.1, 1.9), "better (t and bootstrap disagree about zero)"),
    (1, 2, 1, (0.5, 1.5), rules.NONE, (0.1, 1.9), "better"),
    (1, 1, math.nan, rules.NONE, rules.NONE, rules.NONE, "no interval (n = 1)"),
    (1, 3, 1e-17, rules.NONE, rules.NONE, rules.NONE, "no interval (no spread)"),
    (1e-17, 3, 0, rules.NONE, rules.NONE, rules.NONE, "the same in every pair"),
])  # fmt: skip
def test_verdicts(mean, n, sd, interval, bootstrap, wide, said):
    assert Difference(n, mean, sd, interval, bootstrap, 0.01, 4, wide, 0.04).verdict == said


def test_few_or_equal_pairs_give_no_interval():
    for values, said in (
        ([0.3], "no interval (n = 1)"),
        ([0.62 - 0.6, 0.72 - 0.7, 0.82 - 0.8], "no interval (no spread)"),  # equal but for rounding
        ([0, 0], "the same in every pair"),
    ):
        (found,) = corrected([paired(values)])
        assert found.verdict == said
        assert np.isnan([*found.interval, *found.bootstrap, *found.corrected]).all()
        assert found.agree is None
    assert np.isnan(paired([1, 3]).bootstrap).all()
    assert paired([1, 3]).agree is None
    for values in ([], [1, math.nan], [math.inf], [[1, 2]]):
        with pytest.raises(ValueError, match="finite difference"):
            paired(values)
