"""Anchors and their similarity against the paper's formulas (eq. 8 to 11)."""

import math

import pytest
import torch

from llamafactory_hera.calibration.anchors import (
    anchor_pool,
    candidates,
    functional_similarity,
    nearest_anchors,
    parametric_similarity,
)
from llamafactory_hera.calibration.saliency import standardize
from llamafactory_hera.heads import Target


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_anchors_lie_beta_deviations_above_the_mean() -> None:
    raw = torch.rand(2, 16)
    saliency = standardize(raw)
    for beta in (0.0, 0.5, 1.0):
        row = raw[1].double()
        bound = row.mean() + beta * row.std(correction=0)
        expected = [Target(1, head) for head in range(16) if row[head] > bound]
        assert anchor_pool(saliency, 1, beta) == expected


def test_a_layer_without_anchors_looks_beside_itself_and_then_two_away() -> None:
    saliency = torch.zeros(6, 3)
    target = Target(2, 0)
    assert candidates(saliency, target, 1.0) == []
    saliency[5, 1] = 2.0  # three layers away
    assert candidates(saliency, target, 1.0) == []
    saliency[0, 2] = 2.0
    assert candidates(saliency, target, 1.0) == [Target(0, 2)]
    saliency[4, 1] = 2.0
    assert candidates(saliency, target, 1.0) == [Target(0, 2), Target(4, 1)]
    saliency[3, 0] = 2.0
    assert candidates(saliency, target, 1.0) == [Target(3, 0)]
    saliency[2, 1] = 2.0
    assert candidates(saliency, target, 1.0) == [Target(2, 1)]


def test_a_target_is_never_its_own_anchor() -> None:
    saliency = torch.tensor([[3.0, 2.0, 0.0]])
    assert candidates(saliency, Target(0, 0), 1.0) == [Target(0, 1)]
    assert candidates(saliency[:, ::2], Target(0, 0), 1.0) == []


def test_functional_similarity_is_the_cosine_of_the_maps() -> None:
    a, b = torch.rand(7), torch.rand(7)
    assert functional_similarity(a, b) == pytest.approx(cosine(a.tolist(), b.tolist()), rel=1e-6)


def test_parametric_similarity_weighs_the_cosines_of_value_and_output() -> None:
    target, anchor = ([torch.randn(2, 5), torch.randn(5, 2)] for _ in range(2))
    expected = 0.7 * cosine(target[0].flatten().tolist(), anchor[0].flatten().tolist())
    expected += 0.3 * cosine(target[1].flatten().tolist(), anchor[1].flatten().tolist())
    assert parametric_similarity(target, anchor, (0.7, 0.3)) == pytest.approx(expected, rel=1e-5)


FUNCTIONAL = {Target(0, 0): 0.9, Target(0, 1): 0.1, Target(0, 2): 0.5, Target(0, 3): 0.5}
PARAMETRIC = {Target(0, 0): 0.0, Target(0, 1): 1.0, Target(0, 2): 0.5, Target(0, 3): 0.5}


@pytest.mark.parametrize("rho, expected", [(1.0, [0, 2, 3]), (0.0, [1, 2, 3]), (0.6, [0, 2, 3]), (0.5, [1, 2, 3])])
def test_the_nearest_anchors_come_first_and_ties_by_their_names(rho: float, expected: list[int]) -> None:
    found = nearest_anchors(list(FUNCTIONAL), FUNCTIONAL.__getitem__, PARAMETRIC.__getitem__, rho, 3)
    assert [anchor.head.head for anchor in found] == expected
    for anchor in found:
        assert anchor.similarity == pytest.approx(rho * anchor.functional + (1 - rho) * anchor.parametric)


def test_fewer_candidates_than_k_are_all_taken() -> None:
    pool = list(FUNCTIONAL)[:2]
    assert len(nearest_anchors(pool, FUNCTIONAL.__getitem__, PARAMETRIC.__getitem__, 0.6, 3)) == 2
