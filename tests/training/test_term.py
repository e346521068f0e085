"""The terms on pooled samples and on visual tokens, compared with loops over samples."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llamafactory_hera.alignment import contrastive_loss, nearest_neighbors
from llamafactory_hera.objectives import Objective, TokenBatch, create
from llamafactory_hera.training.memory import CrossBatchMemory
from llamafactory_hera.training.token_term import token_term
from tests.terms import ContrastiveTerm, cosine, options

HEADS, N, D, D_TEACHER = 3, 9, 6, 5
TAU = torch.tensor(0.2)


@dataclass
class Naive:
    """The term by definition, one sample at a time."""

    loss: Tensor
    mknn: list[float]
    chance: float
    n_samples: int
    n_duplicates: int


def naive_term(
    z: Tensor, teacher: Tensor, valid: list[bool], temperature: Tensor, k: int, normalize: bool, n_queries: int
) -> Naive:
    """Computes the term by definition; the first ``n_queries`` rows are the batch, the rest are the memory."""
    compare = cosine if normalize else torch.dot
    samples = [i for i in range(z.shape[1]) if valid[i]]
    same = {(i, j) for i in samples for j in samples if i != j and cosine(teacher[i], teacher[j]) > 1 - 1e-5}
    losses, hits, chances = [], [], []
    for i in (i for i in samples if i < n_queries):
        candidates = [j for j in samples if j != i and (i, j) not in same]
        k_here = min(k, len(candidates) // 2)
        if not k_here:
            continue
        near = sorted(candidates, key=lambda j, i=i: (-compare(teacher[i], teacher[j]).item(), j))[:k_here]
        chances.append(len(near) / len(candidates))
        for head in z:
            scores = {j: compare(head[i], head[j]) for j in candidates}
            partition = torch.stack([score / temperature for score in scores.values()]).logsumexp(0)
            losses.append(torch.stack([partition - scores[j] / temperature for j in near]).mean())
            best = sorted(candidates, key=lambda j, s=scores: (-s[j].item(), j))[: len(near)]
            hits.append(len(set(best) & set(near)) / len(near))
    return Naive(
        torch.stack(losses).mean(),
        torch.tensor(hits).view(-1, z.shape[0]).mean(0).tolist(),
        sum(chances) / len(chances),
        len(chances),
        sum(i < j < n_queries for i, j in same),
    )


@pytest.fixture
def z() -> Tensor:
    return torch.randn(HEADS, N, D).requires_grad_()


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(N, D_TEACHER)


def all_valid(n: int = N) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("remembered", [0, 4], ids=["no memory", "memory"])
@pytest.mark.parametrize("gaps", [(), (0, 5)], ids=["all valid", "invalid rows"])
@pytest.mark.parametrize("copies", [{}, {7: 2, 8: 2}], ids=["different images", "copies"])
def test_the_term_matches_its_definition(z, normalize, remembered, gaps, copies):
    # all sign patterns of four ones: products and norms are exact, so copies of an image tie exactly
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))[torch.randperm(16)]
    teacher, memory_teacher = signs[:N].clone(), signs[N : N + remembered].clone()
    for copy, original in copies.items():
        teacher[copy] = teacher[original] * 4  # the same direction: the same image
    memory_z = torch.randn(HEADS, remembered, D)
    if remembered:
        memory_teacher[1] = teacher[2]  # an image of the batch, seen before
    memory = CrossBatchMemory(remembered)
    memory.append(memory_z, memory_teacher, all_valid(remembered))
    valid = all_valid()
    valid[list(gaps)] = False
    temperature = TAU.clone().requires_grad_()

    output = ContrastiveTerm(3, normalize, memory)(z, teacher, valid, temperature)
    samples = torch.cat([z, memory_z], dim=1), torch.cat([teacher, memory_teacher])
    expected = naive_term(*samples, valid.tolist() + [True] * remembered, temperature, 3, normalize, N)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(output.loss, (z, temperature))
    wanted = torch.autograd.grad(expected.loss, (z, temperature))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert output.mknn.tolist() == pytest.approx(expected.mknn, abs=1e-6)
    assert output.chance.item() == pytest.approx(expected.chance, abs=1e-6)
    assert (output.n_samples.item(), output.n_duplicates.item()) == (expected.n_samples, expected.n_duplicates)
    assert output.n_samples == N - len(gaps)
    assert output.n_duplicates == (3 if copies else 0)
    assert output.finite


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_batch_enters_the_memory_after_its_loss(z, teacher):
    term = ContrastiveTerm(3, memory=CrossBatchMemory(N))
    first = term(z, teacher, all_valid(), TAU)
    torch.testing.assert_close(first.loss, ContrastiveTerm(3)(z, teacher, all_valid(), TAU).loss)
    # the same batch again: every remembered row is a copy of a sample, and excluded only for that sample
    again = term(z, teacher, all_valid(), TAU)
    assert again.n_duplicates == 0  # pairs of the batch only
    samples = torch.cat([z, z.detach()], dim=1), torch.cat([teacher, teacher])
    torch.testing.assert_close(again.loss, naive_term(*samples, [True] * 2 * N, TAU, 3, True, N).loss)


def test_values_are_comparable_once_the_memory_is_full():
    term = ContrastiveTerm(3, memory=CrossBatchMemory(2 * N))
    outputs = [term(torch.randn(HEADS, N, D), torch.randn(N, D_TEACHER), all_valid(), TAU) for _ in range(4)]
    assert [output.comparable.item() for output in outputs] == [False, False, True, True]
    assert [output.mknn.isfinite().all().item() for output in outputs] == [False, False, True, True]
    chances = [math.nan] * 2 + [3 / (3 * N - 1)] * 2
    assert [output.chance.item() for output in outputs] == pytest.approx(chances, nan_ok=True)
    assert all(output.loss > 0 for output in outputs)


# -- samples that do not enter, and few candidates -------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1e30, math.inf, math.nan])
def test_an_invalid_row_changes_nothing_and_is_not_remembered(z, teacher, value):
    valid = all_valid()
    valid[[3, 7]] = False
    with torch.no_grad():
        z[:, ~valid] = value
        teacher[~valid] = value
    term = ContrastiveTerm(3, memory=CrossBatchMemory(20))
    output = term(z, teacher, valid, TAU)
    valid_z = z.detach()[:, valid].requires_grad_()
    expected = ContrastiveTerm(3)(valid_z, teacher[valid], all_valid(7), TAU)
    assert (output.finite.item(), output.n_samples.item()) == (True, 7)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(ContrastiveTerm(3)(z, teacher, valid, TAU).mknn, expected.mknn)
    output.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(z.grad[:, valid], valid_z.grad)
    assert (z.grad[:, ~valid] == 0).all()
    remembered = term.memory.state_dict()
    assert torch.equal(remembered["memory.teacher"], teacher[valid])
    assert torch.equal(remembered["memory.representations"], z.detach()[:, valid])


@pytest.mark.parametrize("case", ["none valid", "one alone", "one image only"])
def test_without_candidates_the_term_and_its_gradient_are_zero(z, teacher, case):
    valid = all_valid() if case == "one image only" else torch.arange(N) < (case == "one alone")
    if case == "one image only":
        teacher = teacher[:1].expand(N, -1)
    output = ContrastiveTerm(3, memory=CrossBatchMemory(4))(z, teacher, valid, TAU)
    assert (output.loss.item(), output.n_samples.item(), output.finite.item()) == (0.0, 0, True)
    assert output.n_duplicates == (N * (N - 1) // 2 if case == "one image only" else 0)
    assert output.mknn.isnan().all()
    assert output.chance.isnan()
    output.loss.backward()
    assert (z.grad == 0).all()


def test_k_is_at_most_half_of_the_candidates(z, teacher):
    half, term = (N - 1) // 2, ContrastiveTerm(20)
    output = term(z, teacher, all_valid(), TAU)
    torch.testing.assert_close(output.loss, contrastive_loss(z, nearest_neighbors(teacher, half), TAU))
    assert output.chance.item() == pytest.approx(half / (N - 1))
    assert not torch.equal(term(z, teacher.flip(0), all_valid(), TAU).loss, output.loss)  # the teacher decides


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_non_finite_value_omits_the_term_and_is_never_remembered(z, teacher, value, normalize, side):
    broken, broken_teacher = z.detach().clone(), teacher.clone()
    (broken[1, 4] if side == "student" else broken_teacher[4])[2] = value
    term = ContrastiveTerm(3, normalize, CrossBatchMemory(20))
    # a sample alone in its batch gives no loss, but remembering it would spoil all later losses
    for rows in (slice(None), slice(4, 5)):
        selected = broken[:, rows].requires_grad_()
        output = term(selected, broken_teacher[rows], all_valid()[rows], TAU)
        assert output.broken.tolist() == [False, side == "student", False]
        assert output.loss.item() == 0
        output.loss.backward()
        assert not selected.grad.any()
        assert (output.finite.item(), output.gradient_expected.item()) == (False, False)
        assert output.mknn.shape == (HEADS,)
        assert output.mknn.isnan().all()
        assert not term.memory.pairs[2].any()
    assert term(z, teacher, all_valid(), TAU).finite
    assert term.memory.pairs[0].isfinite().all()


# -- visual tokens ---------------------------------------------------------------------------------------------------

LAYERS, B, SIDE = 2, 4, 2


@pytest.fixture
def viral() -> Objective:
    return create("viral", options(LAYERS, D, D_TEACHER))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(LAYERS, B, SIDE * SIDE, D).requires_grad_()


@pytest.fixture
def patches() -> Tensor:
    return torch.randn(B, SIDE * SIDE, D_TEACHER)


@pytest.mark.parametrize("valid", [[True] * 4, [True, False, True, False], [False, True, False, False], [False] * 4])
def test_the_term_is_the_mean_over_layers_and_images(viral, tokens, patches, valid):
    output = token_term(viral, TokenBatch(tokens, None, patches, torch.tensor(valid)))
    one = torch.tensor([True])
    losses = [viral(TokenBatch(tokens[:, i : i + 1], None, patches[i : i + 1], one)) for i in range(B) if valid[i]]
    expected = torch.cat(losses, dim=1).mean() if losses else 0 * tokens.sum()
    torch.testing.assert_close(output.loss, expected)
    wanted = torch.autograd.grad(expected, tokens)[0]
    torch.testing.assert_close(torch.autograd.grad(output.loss, tokens)[0], wanted)
    assert (output.n_samples.item(), output.finite.item()) == (sum(valid), True)
    assert output.gradient_expected.item() == any(valid)
    assert output.mknn is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_an_invalid_image_changes_nothing(viral, tokens, patches, value):
    valid = torch.tensor([True, True, False, True])
    expected = token_term(viral, TokenBatch(tokens, None, patches, valid)).loss
    with torch.no_grad():
        tokens[:, 2], patches[2] = value, value
    output = token_term(viral, TokenBatch(tokens, None, patches, valid))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert tokens.grad.isfinite().all()
    assert not tokens.grad[:, 2].any()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_non_finite_image_omits_the_term(viral, tokens, patches, side):
    with torch.no_grad():
        (tokens[1] if side == "student" else patches)[0] = math.nan
    output = token_term(viral, TokenBatch(tokens, None, patches, all_valid(B)))
    output.loss.backward()
    assert (output.loss.item(), output.finite.item()) == (0, False)
    assert not tokens.grad.any()
    assert output.broken.tolist() == [False, side == "student"]
