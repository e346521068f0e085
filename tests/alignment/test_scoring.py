"""Scores of all heads at once against the published procedure: D-sized vectors, all similarities, set intersection."""

import logging
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from llamafactory_hera.alignment import nearest_neighbors, score_features, score_heads, scoring
from llamafactory_hera.alignment.scoring import full_precision


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive_range(vectors: Tensor, neighbors: Tensor, normalize: bool, slack: float = 3e-6) -> tuple[float, float]:
    """The least and the most that MKNN can be when similarities closer than ``slack`` may change places, in fp64.

    With ``slack=0`` equal similarities are ordered by rising index, and both are the score.
    """
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


def contributions(pooled: Tensor, weights: list[Tensor], layer: int, head: int) -> Tensor:
    d = pooled.shape[-1]
    return pooled[:, layer, head].double() @ weights[layer].double()[:, head * d : (head + 1) * d].T


def assert_scores(scores: Tensor, pooled: Tensor, weights: list[Tensor], neighbors: Tensor, normalize=True, **how):
    """Every head's score is the naive one, up to ties within rounding; those must be few (``undecided``)."""
    undecided = how.pop("undecided", 0.01)
    for layer, row in enumerate(scores.tolist()):
        for head, score in enumerate(row):
            least, most = naive_range(contributions(pooled, weights, layer, head), neighbors, normalize, **how)
            assert least - 1e-6 <= score <= most + 1e-6
            assert most - least <= undecided


def model(n, n_layers, n_heads, d, dim, seed=0):
    """Head outputs that share something with the teacher, so that scores differ from chance and from one another."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 6, generator=generator)
    mix = torch.randn(6, n_layers * n_heads * d, generator=generator)
    pooled = latent @ mix + torch.randn(n, n_layers * n_heads * d, generator=generator)
    weights = [torch.randn(dim, n_heads * d, generator=generator) for _ in range(n_layers)]
    return pooled.view(n, n_layers, n_heads, d), weights, latent


def whole_numbers(seed: int = 0) -> tuple[Tensor, list[Tensor], Tensor]:
    """Few distinct vectors of whole numbers, copies, zeros, a null space: dot products are exact and often equal."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randint(-1, 2, (90, 1, 3, 4), generator=generator).float()
    pooled[::7] *= 3  # same direction, other length: ties of cosines only
    pooled[40:50] = pooled[5]
    pooled[80:] = 0
    weights = [torch.randint(-2, 3, (6, 12), generator=generator).float()]
    weights[0][:, 4] = 0
    return pooled, weights, torch.rand(90, 90, generator=generator).fill_diagonal_(-1).topk(10).indices


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("n", "n_heads", "d", "dim", "k", "undecided"),
    [
        (11, 3, 4, 9, 10, 0),  # every other sample is a neighbor
        (12, 3, 4, 9, 10, 0.01),
        (2, 1, 4, 9, 1, 0),
        (64, 5, 8, 20, 10, 0.01),
        (40, 2, 1, 10, 5, 1),  # cosines are 1 and -1: all rows are ties
        (97, 2, 16, 64, 7, 0.01),  # no group of columns divides 97
        (97, 2, 8, 5, 10, 0.01),  # rank 5 of 8: the Gram matrix is singular
        (300, 2, 8, 40, 3, 0.01),
        (130, 2, 8, 40, 60, 0.01),
    ],
)
def test_scores_equal_the_naive_procedure(n, n_heads, d, dim, k, undecided, normalize):
    pooled, weights, latent = model(n, 2, n_heads, d, dim)
    neighbors = nearest_neighbors(latent, k)
    scores = score_heads(pooled, weights, neighbors, normalize)
    assert scores.shape == (2, n_heads)
    assert scores.dtype == torch.float32
    assert_scores(scores, pooled, weights, neighbors, normalize, undecided=undecided)


@pytest.mark.parametrize("seed", range(4))
def test_equal_similarities_rank_by_rising_index(seed):
    pooled, weights, neighbors = whole_numbers(seed)
    scores = score_heads(pooled, weights, neighbors, normalize=False)
    assert_scores(scores, pooled, weights, neighbors, normalize=False, slack=0, undecided=0)
    assert_scores(score_heads(pooled, weights, neighbors), pooled, weights, neighbors, undecided=1)
    # all alike: the neighbors are the ten lowest indices
    lowest = torch.stack([torch.tensor([j for j in range(11) if j != i][:10]) for i in range(90)])
    assert score_heads(pooled[5].expand_as(pooled), weights, lowest, normalize=False).tolist() == [[1.0] * 3]
    assert score_heads(torch.zeros_like(pooled), weights, lowest).tolist() == [[1.0] * 3]


def test_outputs_that_the_projection_removes_count_as_zero():
    pooled, weights, latent = model(60, 1, 1, 8, 5)
    weights = [weights[0].double()]
    null_space = torch.linalg.svd(weights[0]).Vh[5:]
    pooled[::5, 0, 0] = pooled[::5, 0, 0, :3] @ null_space.float()
    neighbors = nearest_neighbors(latent, 10)
    expected = contributions(pooled, weights, 0, 0)
    assert 0 < expected[::5].abs().max() < 1e-5  # rounding alone
    expected[::5] = 0
    exact, _ = naive_range(expected, neighbors, normalize=True, slack=0)
    assert score_heads(pooled, weights, neighbors).item() == pytest.approx(exact, abs=1e-6)
    least, most = naive_range(expected, neighbors, normalize=False)
    assert least <= score_heads(pooled, weights, neighbors, normalize=False).item() <= most


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_nearly_constant_outputs_are_ranked_beyond_fp32(spread):
    pooled, weights, latent = model(120, 1, 2, 16, 48)
    pooled = 1 + spread * pooled
    neighbors = nearest_neighbors(latent, 10)
    similarities = torch.nn.functional.normalize(contributions(pooled, weights, 0, 0), dim=-1)
    gaps = (similarities @ similarities.T).sort(dim=-1).values.diff(dim=-1)
    if spread <= 1e-3:
        assert gaps.median() < torch.finfo(torch.float32).eps  # fp32 could not tell most of them apart
    assert_scores(score_heads(pooled, weights, neighbors), pooled, weights, neighbors, slack=1e-3 * spread**2)


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_pieces_of_any_size_give_the_same_scores(rows, monkeypatch):
    pooled, weights, neighbors = whole_numbers()
    expected = score_heads(pooled, weights, neighbors, normalize=False)
    monkeypatch.setattr(scoring, "_rows_at_a_time", lambda *_: rows)
    assert torch.equal(score_heads(pooled, weights, neighbors, normalize=False), expected)


def peak_bytes(call) -> int:
    with profile(profile_memory=True, acc_events=True) as recorded:
        call()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [1 << 20, 8 << 20])
def test_memory_limit_holds(limit, tied, dtype):
    pooled, weights, latent = model(600, 1, 4, 16, 64)
    if tied:
        pooled[20:] = pooled[:1]
    pooled, weights = pooled.to(dtype), [weight.to(dtype) for weight in weights]
    neighbors = nearest_neighbors(latent, 5)
    peak = peak_bytes(lambda: score_heads(pooled, weights, neighbors, memory_limit_bytes=limit))
    assert limit // 10 < peak <= limit


def test_too_little_memory_is_refused_with_what_is_needed():
    pooled, weights, latent = model(400, 1, 2, 16, 64)
    neighbors = nearest_neighbors(latent, 10)
    with pytest.raises(ValueError, match=r"memory_limit_bytes=1000 is too little.*at least (\d+)") as error:
        score_heads(pooled, weights, neighbors, memory_limit_bytes=1000)
    enough = int(str(error.value).split("at least ")[1].split(",")[0])
    scores = []
    peak = peak_bytes(lambda: scores.append(score_heads(pooled, weights, neighbors, memory_limit_bytes=enough)))
    assert peak <= enough
    assert_scores(scores[0], pooled, weights, neighbors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_scored_by_their_own_values(dtype):
    pooled, weights, latent = model(80, 2, 2, 8, 24)
    pooled, weights = pooled.to(dtype), [weight.to(dtype) for weight in weights]
    neighbors = nearest_neighbors(latent, 10)
    before = pooled.clone()
    assert_scores(score_heads(pooled, weights, neighbors), pooled, weights, neighbors)
    assert torch.equal(pooled, before)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_outputs_whose_squares_leave_fp32_are_still_scored(factor, normalize):
    pooled, weights, latent = model(50, 1, 2, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    assert_scores(score_heads(pooled * factor, weights, neighbors, normalize), pooled, weights, neighbors, normalize)


def test_a_broken_head_is_nan_and_named_and_alone(caplog):
    pooled, weights, latent = model(60, 3, 4, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    expected = score_heads(pooled, weights, neighbors)
    pooled[7, 1, 2, 3] = torch.nan
    pooled[9, 0, 0, 0] = -torch.inf
    weights[2][5, 3 * 8 + 1] = torch.inf
    expected[1, 2] = expected[0, 0] = expected[2, 3] = torch.nan
    with caplog.at_level(logging.WARNING):
        scores = score_heads(pooled, weights, neighbors)
    torch.testing.assert_close(scores, expected, atol=0, rtol=0, equal_nan=True)
    assert [name in caplog.text for name in ("L1H2", "L0H0", "L2H3")] == [True] * 3
    assert caplog.text.count("H") == 3


def test_layers_may_come_one_at_a_time():
    pooled, weights, latent = model(40, 3, 2, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    one_by_one = (pooled[:, layer].clone() for layer in range(3))
    lazily = score_heads(one_by_one, iter(weights), neighbors)
    assert torch.equal(lazily, score_heads(pooled, weights, neighbors))


@pytest.mark.parametrize("normalize", [True, False])
def test_layer_outputs_equal_the_naive_procedure(normalize):
    generator = torch.Generator().manual_seed(3)
    layers = torch.randn(3, 70, 33, generator=generator)
    neighbors = nearest_neighbors(layers[0] + torch.randn(70, 33, generator=generator), 9)
    before = layers.clone()
    for features in layers:
        least, most = naive_range(features, neighbors, normalize)
        assert least - 1e-6 <= score_features(features, neighbors, normalize).item() <= most + 1e-6
        assert most - least <= 0.01
    assert torch.equal(layers, before)
    layers[1, 0, 0] = torch.nan
    assert score_features(layers[1], neighbors).isnan()


def test_reduced_matmul_precision_of_the_caller_is_suspended():
    pooled, weights, latent = model(60, 1, 2, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    expected = score_heads(pooled, weights, neighbors)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision("cpu"):
                left, right = torch.rand(64, 512), torch.rand(512, 64)
                product = left @ right
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert (left @ right).dtype == torch.bfloat16
            assert torch.equal(score_heads(pooled, weights, neighbors), expected)
        assert product.dtype == torch.float32
        torch.testing.assert_close(product.double(), left.double() @ right.double(), atol=0, rtol=1e-6)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_shapes_that_do_not_fit_are_named():
    pooled, weights, latent = model(30, 2, 2, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    with pytest.raises(ValueError, match=r"\[24, 12\] does not fit 2 heads of size 8"):
        score_heads(pooled, [weight[:, :12] for weight in weights], neighbors)
    with pytest.raises(ValueError, match="does not fit 30 samples"):
        score_heads(pooled, weights, neighbors[:29])
    with pytest.raises(ValueError, match="give \\[N, H, d\\]"):
        score_heads([pooled], weights[:1], neighbors)
    with pytest.raises(ValueError, match="zip"):
        score_heads(pooled, weights[:1], neighbors)
    with pytest.raises(ValueError, match="does not fit 29 samples"):
        score_features(latent[:29], neighbors)
