"""Means over seeds with 95 % intervals, paired by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval, None where one value alone says nothing of its spread."""

    mean: float
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values, at level 0.95.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("values: none is given")
    from scipy.stats import t

    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, None, None, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def paired_interval(values: dict[int, float], baseline: dict[int, float]) -> Interval:
    """The interval of the difference to a baseline, over the seeds that both have.

    Args:
        values: By seed.
        baseline: By seed.
    """
    return mean_interval([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])
