"""Running means of step statistics between two log lines."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from ..alignment.gather import world_size


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


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each value over the ranks that know it; left out where none does.

    Args:
        values: NaN where unknown; every rank has the same names, so that all take part in one reduction.
        device: Of the process group's tensors.
    """
    if world_size() == 1:
        return {name: value for name, value in values.items() if not math.isnan(value)}
    names = sorted(values)
    mine = torch.tensor([values[name] for name in names], dtype=torch.float32, device=device)
    known = ~mine.isnan()
    table = torch.stack([torch.where(known, mine, 0.0), known.float()])
    dist.all_reduce(table)
    sums, numbers = table.tolist()
    return {name: total / n for name, total, n in zip(names, sums, numbers, strict=True) if n}
