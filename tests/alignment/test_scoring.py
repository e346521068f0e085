"""Scores of all heads, compared with the published procedure, which computes all similarities of contributions."""

import logging

import pytest
import torch

from llamafactory_hera.alignment import nearest_neighbors, score_heads, scoring
from llamafactory_hera.alignment.neighbors import full_precision
from llamafactory_hera.alignment.scoring import nearest_samples


def naive_range(vectors, neighbors, normalize, slack):
    """Computes in fp64 the lowest and highest MKNN if similarities closer than ``slack`` may swap ranks."""
    vectors = vectors.double()
    if normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    similarities = vectors @ vectors.T
    slack *= similarities.abs().max().item()
    k, least, most = neighbors.shape[1], 0, 0
    index = torch.arange(len(vectors))
    for i, row in enumerate(similarities):
        near = neighbors[i][:, None]
        gaps = row - row[near]
        earlier = (gaps == 0) & (index < near) & (slack == 0)
        others = (index != i) & (index != near)
        least += int((((gaps > -slack) | earlier) & others).sum(1).lt(k).sum())
        most += int((((gaps > slack) | earlier) & others).sum(1).lt(k).sum())
    return least / neighbors.numel(), most / neighbors.numel()


def assert_scores(scores, pooled, weights, neighbors, normalize=True, slack=3e-6, undecided=0.01):
    """Checks every score against the naive range, which must not be wider than ``undecided``."""
    d = pooled.shape[-1]
    for layer, row in enumerate(scores.tolist()):
        for head, score in enumerate(row):
            contributions = pooled[:, layer, head].double() @ weights[layer].double()[:, head * d : (head + 1) * d].T
            least, most = naive_range(contributions, neighbors, normalize, slack)
            assert least - 1e-6 <= score <= most + 1e-6
            assert most - least <= undecided


def model(n, n_layers, n_heads, d, dim):
    """Makes head outputs, weights, and teacher features that share some structure with the outputs."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(n, 6, generator=generator)
    mix = torch.randn(6, n_layers * n_heads * d, generator=generator)
    pooled = latent @ mix + torch.randn(n, n_layers * n_heads * d, generator=generator)
    weights = [torch.randn(dim, n_heads * d, generator=generator) for _ in range(n_layers)]
    return pooled.view(n, n_layers, n_heads, d), weights, latent


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("n", "n_heads", "d", "dim", "k", "undecided"),
    [
        (11, 3, 4, 9, 10, 0),  # all other samples are neighbors
        (2, 1, 4, 9, 1, 0),
        (40, 2, 1, 10, 5, 1),  # every cosine is 1 or -1, so all rows have ties
        (97, 2, 8, 5, 10, 0.01),  # rank 5 of 8: the Gram matrix is singular
        (300, 2, 8, 40, 3, 0.01),
        (130, 2, 8, 40, 60, 0.01),
    ],
)
def test_scores_equal_the_published_procedure(n, n_heads, d, dim, k, undecided, normalize):
    pooled, weights, latent = model(n, 2, n_heads, d, dim)
    neighbors = nearest_neighbors(latent, k)
    scores = score_heads(pooled.unbind(1), weights, neighbors, normalize)
    assert (scores.shape, scores.dtype) == ((2, n_heads), torch.float32)
    assert_scores(scores, pooled, weights, neighbors, normalize, undecided=undecided)


@pytest.mark.parametrize("rows", [1, 50, 1024])
@pytest.mark.parametrize("seed", range(3))
def test_ties_break_by_increasing_index_for_any_number_of_rows_in_memory(seed, rows, monkeypatch):
    monkeypatch.setattr(scoring, "ROWS", rows)
    # integers with copies, zeros and a null space, so that many dot products are equal
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randint(-1, 2, (90, 1, 3, 4), generator=generator).float()
    pooled[::7] *= 3
    pooled[40:50] = pooled[5]
    pooled[80:] = 0
    weights = [torch.randint(-2, 3, (6, 12), generator=generator).float()]
    weights[0][:, 4] = 0
    neighbors = torch.rand(90, 90, generator=generator).fill_diagonal_(-1).topk(10).indices
    scores = score_heads(pooled.unbind(1), weights, neighbors, normalize=False)
    assert_scores(scores, pooled, weights, neighbors, normalize=False, slack=0, undecided=0)
    outputs, columns = pooled[:, 0, 1], weights[0][:, 4:8]
    expected = nearest_neighbors(outputs @ columns.T, 10, normalize=False)
    assert torch.equal(nearest_samples(outputs, columns, torch.arange(90), 10, normalize=False), expected)
    # if all samples are equal, neighbors are the ten with the lowest indices
    lowest = torch.stack([torch.tensor([j for j in range(11) if j != i][:10]) for i in range(90)])
    assert score_heads([torch.zeros(90, 3, 4)], weights, lowest).tolist() == [[1.0] * 3]


def test_outputs_that_the_projection_removes_count_as_zero():
    pooled, weights, latent = model(60, 1, 1, 8, 5)
    null_space = torch.linalg.svd(weights[0].double()).Vh[5:]
    pooled[::5, 0, 0] = pooled[::5, 0, 0, :3] @ null_space.float()
    neighbors = nearest_neighbors(latent, 10)
    contributions = pooled[:, 0, 0].double() @ weights[0].double().T
    assert 0 < contributions[::5].abs().max() < 1e-5  # only rounding errors
    contributions[::5] = 0
    exact, _ = naive_range(contributions, neighbors, normalize=True, slack=0)
    assert score_heads(pooled.unbind(1), weights, neighbors).item() == pytest.approx(exact, abs=1e-6)


def test_nearly_parallel_outputs_are_ordered_more_precisely_than_fp32_allows():
    pooled, weights, latent = model(120, 1, 2, 16, 48)
    pooled, neighbors = 1 + 1e-4 * pooled, nearest_neighbors(latent, 10)
    assert_scores(score_heads(pooled.unbind(1), weights, neighbors), pooled, weights, neighbors, slack=1e-11)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("factor", "dtype"), [(1e-30, torch.float32), (1e25, torch.float32), (1, torch.bfloat16)])
def test_scores_are_right_for_half_precision_and_for_outputs_with_squares_outside_fp32(factor, dtype, normalize):
    pooled, weights, latent = model(50, 1, 2, 8, 24)
    pooled, weights = pooled.to(dtype), [weight.to(dtype) for weight in weights]
    neighbors = nearest_neighbors(latent, 10)
    scores = score_heads((pooled * factor).unbind(1), weights, neighbors, normalize)
    assert_scores(scores, pooled, weights, neighbors, normalize)


def test_only_broken_heads_have_no_score_and_a_warning_names_them(caplog):
    pooled, weights, latent = model(60, 3, 4, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    expected = score_heads(pooled.unbind(1), weights, neighbors)
    pooled[7, 1, 2, 3], pooled[9, 0, 0, 0], weights[2][5, 3 * 8 + 1] = torch.nan, -torch.inf, torch.inf
    expected[1, 2] = expected[0, 0] = expected[2, 3] = torch.nan
    with caplog.at_level(logging.WARNING):
        scores = score_heads(iter(pooled.unbind(1)), iter(weights), neighbors)
    torch.testing.assert_close(scores, expected, atol=0, rtol=0, equal_nan=True)
    assert [message.split()[0] for message in caplog.messages] == ["L0H0", "L1H2", "L2H3"]
    assert (nearest_samples(pooled[:, 1, 2], None, torch.tensor([3]), 4) == -1).all()


def test_the_precision_that_the_caller_chose_is_suspended_and_restored():
    pooled, weights, latent = model(60, 1, 2, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    expected = score_heads(pooled.unbind(1), weights, neighbors)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision("cpu"):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                assert (torch.rand(2, 2) @ torch.rand(2, 2)).dtype == torch.float32
            assert (torch.rand(2, 2) @ torch.rand(2, 2)).dtype == torch.bfloat16
            assert torch.equal(score_heads(pooled.unbind(1), weights, neighbors), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_inconsistent_inputs_are_refused():
    pooled, weights, latent = model(30, 2, 2, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    with pytest.raises(ValueError, match="teacher_neighbors has 29 samples, but neighbors has 30; use the same"):
        score_heads(pooled.unbind(1), weights, neighbors[:29])
