"""Scores of all heads at once against the published procedure: D-sized vectors, full sort, set intersection."""

import logging
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import profile

from llamafactory_hera.alignment import nearest_neighbors, scoring
from llamafactory_hera.alignment.scoring import (
    count_shared,
    full_precision,
    head_grams,
    plan_tiles,
    score_features,
    score_heads,
    similarity_factors,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive_score(vectors: torch.Tensor, teacher_neighbors: torch.Tensor, normalize: bool) -> float:
    vectors = vectors.double()
    if normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    # Equal similarities come out of the product a few units of rounding apart: make them equal again.
    similarities = (vectors @ vectors.T).round(decimals=10).fill_diagonal_(-torch.inf)
    k = teacher_neighbors.shape[1]
    order = similarities.sort(dim=-1, descending=True, stable=True).indices[:, :k].tolist()
    shared = [
        len(set(student) & set(teacher)) for student, teacher in zip(order, teacher_neighbors.tolist(), strict=True)
    ]
    return sum(shared) / (k * len(shared))


def naive_scores(pooled, weights, teacher_neighbors, normalize=True) -> torch.Tensor:
    _, n_layers, n_heads, d = pooled.shape
    return torch.tensor(
        [
            [
                naive_score(
                    pooled[:, layer, head].double() @ weights[layer].double()[:, head * d : (head + 1) * d].T,
                    teacher_neighbors,
                    normalize,
                )
                for head in range(n_heads)
            ]
            for layer in range(n_layers)
        ]
    )


def model(n, n_layers, n_heads, d, dim, seed=0, aligned=1.0):
    """Head outputs that share something with the teacher, so that scores differ from chance and from one another."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 6, generator=generator)
    mix = torch.randn(6, n_layers * n_heads * d, generator=generator)
    pooled = aligned * (latent @ mix) + torch.randn(n, n_layers * n_heads * d, generator=generator)
    weights = [torch.randn(dim, n_heads * d, generator=generator) for _ in range(n_layers)]
    return pooled.view(n, n_layers, n_heads, d), weights, latent


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("n", "n_heads", "d", "dim", "k"),
    [
        (11, 3, 4, 9, 10),  # every other sample is a neighbour
        (12, 3, 4, 9, 10),
        (2, 1, 4, 9, 1),
        (64, 5, 8, 20, 10),
        (40, 2, 3, 10, 5),
        (40, 2, 1, 10, 5),
        (97, 2, 16, 64, 7),  # no column group divides 97
        (97, 2, 8, 5, 10),  # rank 5 of 8: the Gram matrix is singular
        (150, 4, 32, 1, 10),  # rank 1: cosines are 1 and -1, all rows are ties
        (130, 2, 8, 40, 60),
    ],
)
def test_scores_equal_the_naive_procedure(n, n_heads, d, dim, k, normalize):
    pooled, weights, latent = model(n, 2, n_heads, d, dim)
    neighbors = nearest_neighbors(latent, k)
    scores = score_heads(pooled, weights, neighbors, normalize)
    assert scores.shape == (2, n_heads)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores.double(), naive_scores(pooled, weights, neighbors, normalize).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_equal_similarities_rank_by_index(seed, normalize):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randint(-1, 2, (90, 1, 3, 4), generator=generator).float()  # few distinct vectors, zeros among them
    pooled[::7] *= 3  # same direction, other length: ties of cosines only
    weights = [torch.randint(-2, 3, (6, 12), generator=generator).float()]
    weights[0][:, 4] = 0  # a null space: different outputs, same contribution
    neighbors = torch.rand(90, 90, generator=generator).fill_diagonal_(-1).topk(10).indices
    expected = naive_scores(pooled, weights, neighbors, normalize)
    torch.testing.assert_close(score_heads(pooled, weights, neighbors, normalize), expected, atol=1e-6, rtol=0)


def test_copies_of_one_sample_and_empty_samples_rank_by_index():
    pooled, weights, _ = model(60, 1, 2, 8, 24)
    pooled[20:40] = pooled[5]
    pooled[50:] = 0
    forward = (torch.arange(60)[:, None] + torch.arange(1, 11)) % 60
    expected = naive_scores(pooled, weights, forward)
    torch.testing.assert_close(score_heads(pooled, weights, forward), expected, atol=1e-6, rtol=0)
    # All alike: the neighbours are the ten lowest indices, whatever arithmetic does.
    lowest = torch.arange(11).repeat(60, 1)
    lowest = torch.stack([row[row != i][:10] for i, row in enumerate(lowest)])
    alike = pooled[5].expand(60, 1, 2, 8)
    assert score_heads(alike, weights, lowest).tolist() == [[1.0, 1.0]]
    assert score_heads(torch.zeros_like(pooled), weights, lowest).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("normalize", [True, False])
def test_outputs_that_the_projection_removes_count_as_zero(normalize):
    pooled, weights, latent = model(60, 1, 1, 8, 5)
    pooled, weight = pooled.double(), weights[0].double()
    null_space = torch.linalg.svd(weight).Vh[5:]
    pooled[::5, 0, 0] = pooled[::5, 0, 0, :3] @ null_space
    neighbors = nearest_neighbors(latent, 10)
    vectors = pooled[:, 0, 0] @ weight.T
    assert 0 < vectors[::5].abs().max() < 1e-12  # rounding alone
    vectors[::5] = 0
    expected = naive_score(vectors, neighbors, normalize)
    assert score_heads(pooled, [weight], neighbors, normalize).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-5])
def test_nearly_constant_outputs_are_ranked_beyond_fp32(spread):
    pooled, weights, latent = model(120, 1, 2, 16, 48)
    pooled = 1 + spread * pooled
    neighbors = nearest_neighbors(latent, 10)
    vectors = pooled[:, 0, 0].double() @ weights[0][:, :16].double().T
    gaps = torch.nn.functional.normalize(vectors, dim=-1)
    gaps = (gaps @ gaps.T).sort(dim=-1).values.diff(dim=-1)
    if spread <= 1e-4:
        assert gaps.median() < 2e-7  # fp32 could not tell most of them apart
    shared = [
        len(set(a) & set(b)) for a, b in zip(nearest_neighbors(vectors, 10).tolist(), neighbors.tolist(), strict=True)
    ]
    assert score_heads(pooled, weights, neighbors)[0, 0].item() == pytest.approx(sum(shared) / 1200, abs=1e-6)


@pytest.mark.parametrize("heads", [1, 4, 6])
@pytest.mark.parametrize("rows", [1, 7, 50, 101])
def test_pieces_of_any_size_give_the_same_scores(heads, rows, monkeypatch):
    pooled, weights, latent = model(101, 1, 6, 8, 24)
    pooled[30:35] = pooled[3]
    neighbors = nearest_neighbors(latent, 10)
    tiles = replace(plan_tiles(101, 8, 6, 0, 1 << 30, CPU), heads=heads, rows=rows)
    monkeypatch.setattr(scoring, "_plan_layer", lambda *_: tiles)
    expected = naive_scores(pooled, weights, neighbors)
    torch.testing.assert_close(score_heads(pooled, weights, neighbors), expected, atol=1e-6, rtol=0)


def peak_bytes(call) -> int:
    with profile(profile_memory=True, acc_events=True) as recorded:
        call()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [1 << 20, 16 << 20])
def test_memory_limit_holds(limit, tied):
    pooled, weights, latent = model(300, 1, 4, 16, 64)
    if tied:
        pooled[20:] = pooled[:1]  # nearly every row is ranked a second time
    neighbors = nearest_neighbors(latent, 5)
    peak = peak_bytes(lambda: score_heads(pooled, weights, neighbors, memory_limit_bytes=limit))
    assert limit // 10 < peak <= limit


def test_too_little_memory_is_refused_with_what_is_needed():
    pooled, weights, latent = model(400, 1, 2, 16, 64)
    neighbors = nearest_neighbors(latent, 10)
    with pytest.raises(ValueError, match=r"memory_limit_bytes=1000 is too little.*at least (\d+)") as error:
        score_heads(pooled, weights, neighbors, memory_limit_bytes=1000)
    enough = int(str(error.value).split("at least ")[1].split(",")[0])
    smallest = score_heads(pooled, weights, neighbors, memory_limit_bytes=enough)
    torch.testing.assert_close(smallest, score_heads(pooled, weights, neighbors), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_scored_by_their_own_values(dtype):
    pooled, weights, latent = model(80, 2, 2, 8, 24)
    pooled, weights = pooled.to(dtype), [weight.to(dtype) for weight in weights]
    neighbors = nearest_neighbors(latent, 10)
    before = pooled.clone()
    expected = naive_scores(pooled, weights, neighbors)
    torch.testing.assert_close(score_heads(pooled, weights, neighbors), expected, atol=1e-6, rtol=0)
    assert torch.equal(pooled, before)


@pytest.mark.parametrize("factor", [1e-22, 1e15])
def test_outputs_whose_squares_leave_fp32_are_still_scored(factor):
    pooled, weights, latent = model(50, 1, 2, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    expected = naive_scores(pooled, weights, neighbors)
    torch.testing.assert_close(score_heads(pooled * factor, weights, neighbors), expected, atol=1e-6, rtol=0)


def test_a_broken_head_is_nan_and_named_and_alone(caplog):
    pooled, weights, latent = model(60, 3, 4, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    expected = naive_scores(pooled, weights, neighbors)
    pooled[7, 1, 2, 3] = torch.nan
    pooled[9, 0, 0, 0] = -torch.inf
    weights[2][5, 3 * 8 + 1] = torch.inf
    expected[1, 2] = expected[0, 0] = expected[2, 3] = torch.nan
    with caplog.at_level(logging.WARNING):
        scores = score_heads(pooled, weights, neighbors)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0, equal_nan=True)
    assert [name in caplog.text for name in ("L1H2", "L0H0", "L2H3")] == [True] * 3
    assert caplog.text.count("H") == 3


def test_layers_may_come_one_at_a_time():
    pooled, weights, latent = model(40, 3, 2, 8, 24)
    neighbors = nearest_neighbors(latent, 10)
    done = []
    lazily = score_heads(
        (pooled[:, layer].clone() for layer in range(3)), iter(weights), neighbors, progress=done.append
    )
    assert torch.equal(lazily, score_heads(pooled, weights, neighbors))
    assert done == [1, 2, 3]


@pytest.mark.parametrize("normalize", [True, False])
def test_layer_outputs_equal_the_naive_procedure(normalize):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 70, 33, generator=generator)
    features[1, 10:20] = features[1, 4]
    neighbors = nearest_neighbors(features[0] + torch.randn(70, 33, generator=generator), 9)
    before = features.clone()
    scores = score_features(features, neighbors, normalize)
    expected = torch.tensor([naive_score(one, neighbors, normalize) for one in features])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    assert torch.equal(features, before)
    assert score_features(features[2], neighbors, normalize).item() == scores[2].item()
    features[1, 0, 0] = torch.nan
    assert score_features(features, neighbors).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", ["random", "constant", "stretched", "singular", "shifted"])
@pytest.mark.parametrize("normalize", [True, False])
def test_rounding_stays_within_its_bound(kind, normalize):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 200, 64, generator=generator)
    weight = torch.randn(900, 64, generator=generator)
    if kind == "constant":
        outputs = 1 + 0.01 * outputs
    elif kind == "stretched":
        scale = torch.logspace(0, -2, 64)
        outputs, weight = outputs / scale, weight * scale
    elif kind == "singular":
        weight[:, 32:] = weight[:, :32]
    elif kind == "shifted":
        weight = weight + 3
    vectors = outputs[0].double() @ weight.double().T
    if normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    factors = similarity_factors(outputs.clone(), head_grams(weight, 1), normalize)
    error = ((factors.queries[0] @ factors.keys[0].T).double() - vectors @ vectors.T).abs()
    rounding = factors.rounding[0].double()
    share = error / torch.maximum(rounding[:, None], rounding)
    assert factors.sound.all()
    assert share.max() < 0.6
    assert share.max() > 1e-3  # a bound that is never approached would send every row to fp64


def test_fp32_settles_nearly_every_row():
    pooled, weights, latent = model(512, 1, 8, 32, 256, aligned=0.3)
    neighbors = nearest_neighbors(latent, 10)
    factors = similarity_factors(pooled[:, 0].transpose(0, 1).contiguous(), head_grams(weights[0], 8), True)
    _, open_rows = count_shared(factors, neighbors, plan_tiles(512, 32, 8, 0, 1 << 30, CPU))
    assert open_rows.float().mean() < 0.01


def test_reduced_matmul_precision_of_the_caller_is_suspended():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision("cpu"):
                left, right = torch.rand(64, 512), torch.rand(512, 64)
                product = left @ right
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert (left @ right).dtype == torch.bfloat16
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
