import math

import pytest
import torch
from tests.ranks import run_ranks

from llamafactory_hera.alignment.gather import mean_over_ranks
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
    taken = statistics.take()
    assert math.isnan(taken["mknn"])
    assert mean_over_ranks(taken | {"loss": 2.0}, torch.device("cpu")) == {"loss": 2.0}


def _means(rank: int) -> dict[str, float]:
    statistics = RunningMeans()
    statistics.add(
        loss=torch.tensor(math.nan if rank else 3.0), mknn=torch.tensor(0.25 + rank), lost=torch.tensor(math.nan)
    )
    return mean_over_ranks(statistics.take(), torch.device("cpu"))


def test_a_value_that_one_rank_does_not_know_is_the_others(tmp_path):
    assert run_ranks(_means, 2, tmp_path) == [{"loss": 3.0, "mknn": 0.75}] * 2


def test_many_small_values_add_up_in_double_precision():
    statistics = RunningMeans()
    for value in (1e8, *([1.0] * 100)):
        statistics.add(loss=torch.tensor(value))
    assert statistics.take()["loss"] == pytest.approx((1e8 + 100) / 101, rel=1e-12)
