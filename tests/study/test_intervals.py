"""Means with intervals, against scipy's own and a formula written out."""

import math

import pytest
from scipy import stats

from llamafactory_hera.study.intervals import mean_interval, paired_interval

# 97.5 % points of Student's t, from a printed table
T_TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 7: 2.365}


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_against_the_formula_and_scipy(count):
    values = [0.3 + 0.1 * math.sin(5 * i) for i in range(count)]
    found = mean_interval(values)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = T_TABLE[count - 1] * deviation / math.sqrt(count)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == (pytest.approx(mean - half, abs=1e-4), pytest.approx(mean + half, abs=1e-4))
    theirs = stats.t.interval(0.95, count - 1, loc=mean, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(theirs)


def test_differences_are_taken_seed_by_seed():
    baseline = {0: 0.1, 1: 0.5, 2: 0.9}
    # the seeds differ much, the methods by little: unpaired the interval would be wide
    found = paired_interval({2: 0.92, 0: 0.12, 1: 0.51}, baseline)
    theirs = stats.ttest_rel([0.12, 0.51, 0.92], [0.1, 0.5, 0.9]).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.05 / 3)
    assert (found.low, found.high) == pytest.approx(tuple(theirs))
    assert found.high - found.low < 0.05


def test_one_value_has_no_interval():
    found = mean_interval([0.5])
    assert (found.mean, found.low, found.high, found.count) == (0.5, None, None, 1)
