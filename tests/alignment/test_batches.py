"""An order of rows whose slices are batches of neighbors."""

import math
import operator

import numpy as np
import pytest
import torch
from torch import Tensor

from llamafactory_hera.alignment import batches as batches_module
from llamafactory_hera.alignment.batches import NeighborSampler


def order(features: Tensor, batch_size: int, k: int, shown: list[bool] | None = None, **how: object) -> list[int]:
    shown = [True] * len(features) if shown is None else shown
    return list(NeighborSampler(np.array(shown), lambda rows: features[torch.tensor(rows)], batch_size, k, **how))


def cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def naive_nearest(features: Tensor, k: int, normalize: bool) -> list[int]:
    """Of the first row, by definition."""
    first, *others = features.double().tolist()
    lengths = [math.sqrt(sum(x * x for x in other)) if normalize else 1.0 for other in others]
    scores = [sum(map(operator.mul, first, other)) / length for other, length in zip(others, lengths, strict=True)]
    return sorted(range(1, len(features)), key=lambda row: -scores[row - 1])[:k]


def clusters(n: int, size: int) -> Tensor:
    """Features of ``n`` clusters far apart, one behind the other."""
    return (10 * torch.eye(n, 32)).repeat_interleave(size, dim=0) + torch.rand(n * size, 32)


@pytest.mark.parametrize(
    ("n", "batch_size", "k", "share"),
    [(1, 4, 10, 1.0), (3, 4, 1, 1.0), (50, 8, 10, 1.0), (50, 8, 3, 0.5), (57, 10, 2, 0.1), (40, 100, 10, 0.9)],
)
@pytest.mark.parametrize("pool", [4096, 16])
def test_each_row_comes_once_an_epoch_and_the_order_is_that_of_seed_and_epoch(
    n: int, batch_size: int, k: int, share: float, pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "POOL", pool)
    features, shown = torch.randn(n, 5), (torch.rand(n) < share).tolist()
    shown[0] = True
    found = {(s, e): order(features, batch_size, k, shown, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)}
    assert all(sorted(rows) == list(range(n)) for rows in found.values())
    assert order(features, batch_size, k, shown, seed=1, epoch=1) == found[1, 1]
    assert n < 10 or len({tuple(rows) for rows in found.values()}) == 4


@pytest.mark.parametrize(("batch_size", "k", "size"), [(12, 5, 6), (12, 100, 6), (16, 3, 4), (16, 10, 8)])
def test_a_batch_is_whole_groups_of_neighbors_and_at_least_two(batch_size: int, k: int, size: int) -> None:
    for batch in cut(order(clusters(12, size), batch_size, k), batch_size):
        of_cluster = np.bincount([row // size for row in batch])
        assert set(of_cluster) <= {0, size}
        assert sum(of_cluster > 0) >= 2


@pytest.mark.parametrize("normalize", [True, False])
def test_a_pool_s_first_sample_has_its_true_nearest_beside_it(normalize: bool) -> None:
    features = torch.randn(48, 6) * torch.rand(48, 1).mul(3).exp()
    for seed in range(3):
        dealt = batches_module._groups(features, [16] * 3, 7, normalize, np.random.default_rng(seed))
        beside = next(set(batch) for batch in dealt if 0 in batch)
        assert beside >= set(naive_nearest(features, 7, normalize))


def test_groups_share_a_batch_at_random_and_rows_of_a_batch_stand_in_random_order() -> None:
    features = clusters(12, 6)
    batches = [cut(order(features, 12, 5, epoch=epoch), 12) for epoch in (0, 1)]
    together = [{frozenset(row // 6 for row in batch) for batch in found} for found in batches]
    assert together[0] != together[1]
    assert any(len({row // 6 for row in batch[:6]}) == 2 for batch in batches[0])


def test_the_last_batches_of_a_pool_are_as_alike_as_the_first() -> None:
    features = torch.nn.functional.normalize(torch.randn(2048, 8), dim=1)
    alike = [(features[rows] @ features[rows].T).mean().item() for rows in cut(order(features, 16, 7), 16)]
    assert sum(alike[:32]) / 32 == pytest.approx(sum(alike[-32:]) / 32, abs=0.05)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rows_without_an_image_are_spread_evenly(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "POOL", 16)
    shown = [row < share * 205 for row in range(205)]
    for batch in cut(order(torch.randn(205, 5), 10, 3, shown), 10):
        assert abs(sum(shown[row] for row in batch) - share * len(batch)) <= 1


def test_copies_of_an_image_are_in_different_groups() -> None:
    features = clusters(2, 6).repeat(2, 1)  # each of 12 images twice
    for batch in cut(order(features, 12, 5), 12):
        of_cluster = np.bincount([image // 6 for image in {row % 12 for row in batch}])
        assert set(of_cluster) <= {0, 6}  # not three images of it with their copies
    assert sorted(order(torch.ones(20, 4), 8, 3)) == list(range(20))
    assert sorted(order(torch.zeros(20, 4), 8, 3)) == list(range(20))


def test_features_are_asked_for_pool_by_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "POOL", 16)
    asked: list[int] = []

    def features_of(rows: np.ndarray) -> Tensor:
        asked.append(len(rows))
        return torch.randn(len(rows), 4)

    sampler = NeighborSampler(np.ones(64, dtype=bool), features_of, 8, 3)
    walk = iter(sampler)
    assert len(sampler) == 64
    assert not asked
    next(walk)
    assert asked == [16]
    list(walk)
    assert asked == [16] * 4
