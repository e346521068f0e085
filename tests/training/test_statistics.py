import math

import pytest
import torch

from llamafactory_hera.training.statistics import RunningMeans


def test_means_and_counts_since_the_last_time():
    statistics = RunningMeans()
    for loss, mknn in ((1.0, 0.5), (2.0, math.nan), (6.0, 0.1)):
        statistics.add(loss=torch.tensor(loss), mknn=torch.tensor(mknn))
    statistics.count(duplicates=2, skipped=0)
    statistics.count(duplicates=1)
    assert statistics.take() == pytest.approx({"loss": 3.0, "mknn": 0.3, "duplicates": 3})
    assert statistics.take() == {}
    statistics.add(loss=torch.tensor(4.0))
    assert statistics.take() == {"loss": 4.0}


def test_a_value_that_is_never_known_is_not_reported():
    statistics = RunningMeans()
    statistics.add(mknn=torch.tensor(math.nan))
    assert statistics.take() == {}


def test_many_small_values_add_up_in_double_precision():
    statistics = RunningMeans()
    for value in (1e8, *([1.0] * 100)):
        statistics.add(loss=torch.tensor(value))
    assert statistics.take()["loss"] == pytest.approx((1e8 + 100) / 101, rel=1e-12)
