"""Trimmed mean and truncated SVD against their definitions (eq. 12 and 13)."""

import pytest
import torch

from llamafactory_hera.calibration.transfer import low_rank, trimmed_mean


@pytest.mark.parametrize("k, trim, cut", [(3, 0.1, 0), (3, 0.34, 1), (10, 0.1, 1), (10, 0.25, 2), (1, 0.4, 0)])
def test_trimmed_mean_drops_both_ends_of_every_element(k: int, trim: float, cut: int) -> None:
    stack = torch.randn(k, 2, 3)
    found = trimmed_mean(stack, trim)
    for i in range(2):
        for j in range(3):
            kept = sorted(stack[:, i, j].tolist())[cut : k - cut]
            assert found[i, j].item() == pytest.approx(sum(kept) / len(kept), rel=1e-5, abs=1e-7)


def test_one_wild_anchor_is_cut_off() -> None:
    stack = torch.ones(3, 2)
    stack[1] = 1e6
    assert torch.equal(trimmed_mean(stack, 0.34), torch.ones(2))


@pytest.mark.parametrize("shape", [(4, 20), (20, 4)])
@pytest.mark.parametrize("rank", [1, 3, 4, 9, None])
def test_low_rank_is_the_nearest_matrix_of_that_rank(shape: tuple[int, int], rank: int | None) -> None:
    difference = torch.randn(shape)
    left, right = low_rank(difference, rank)
    u, sigma, v = torch.linalg.svd(difference.double(), full_matrices=False)
    kept = min(rank or 4, 4)
    expected = sum(sigma[i] * torch.outer(u[:, i], v[i]) for i in range(kept))
    assert left.shape == (shape[0], kept)
    assert right.shape == (kept, shape[1])
    assert torch.allclose((left @ right).double(), expected, atol=1e-5)
    # Eckart-Young: what is missing are the smaller singular values
    rest = (difference - left @ right).double().norm()
    assert rest.item() == pytest.approx(sigma[kept:].square().sum().sqrt().item(), abs=1e-5)


def test_directions_without_weight_are_dropped() -> None:
    product = torch.randn(6, 2) @ torch.randn(2, 9)
    left, right = low_rank(product, None)
    assert left.shape[1] == right.shape[0] == 2
    left, right = low_rank(torch.zeros(6, 9), 8)
    assert left.shape == (6, 0)
    assert right.shape == (0, 9)


def test_both_factors_have_the_same_size() -> None:
    left, right = low_rank(torch.randn(5, 30), 3)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-5)
