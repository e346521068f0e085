"""Running means of step statistics between two log lines."""

import math
from collections import defaultdict

import torch
from torch import Tensor


class RunningMeans:
    """Sums on the device, read once per log line, so that a step waits for no number.

    NaN values (a step without any sample to measure) do not enter a mean.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._numbers: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, **values: Tensor) -> None:
        """Adds scalar tensors to the means of their names."""
        for name, value in values.items():
            known = ~torch.isnan(value)
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(known, value, 0.0).double()
            self._numbers[name] = self._numbers.get(name, 0) + known

    def count(self, **increments: int) -> None:
        """Adds to counters; a counter that stays 0 is not reported."""
        for name, increment in increments.items():
            self._counts[name] += increment

    def take(self) -> dict[str, float]:
        """Means and counts since the last call; NaN where no value was known."""
        means = {
            name: total.item() / n if (n := int(self._numbers[name])) else math.nan
            for name, total in self._sums.items()
        }
        counts = {name: value for name, value in self._counts.items() if value}
        self._sums, self._numbers, self._counts = {}, {}, defaultdict(int)
        return means | counts
