import itertools
from dataclasses import dataclass

import pytest
import torch
from tests.terms import ContrastiveTerm
from torch import Tensor

from llamafactory_hera.alignment import contrastive_loss, mutual_knn, nearest_neighbors
from llamafactory_hera.alignment.memory import CrossBatchMemory

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


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def naive_term(
    z: Tensor, teacher: Tensor, valid: list[bool], temperature: Tensor, k: int, normalize: bool, n_queries: int
) -> Naive:
    """The first ``n_queries`` rows are the batch, the rest the memory."""
    compare = cosine if normalize else torch.dot
    samples = [i for i in range(z.shape[1]) if valid[i]]
    same = {(i, j) for i in samples for j in samples if i != j and cosine(teacher[i], teacher[j]) > 1 - 1e-5}
    losses, hits, chances = [], [], []
    for i in (i for i in samples if i < n_queries):
        candidates = [j for j in samples if j != i and (i, j) not in same]
        if not candidates:
            continue
        near = sorted(candidates, key=lambda j, i=i: (-compare(teacher[i], teacher[j]).item(), j))[:k]
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
def test_it_is_the_definition(z, normalize, remembered, gaps, copies):
    # all different signs of four ones: products and norms are exact, so that copies of an image tie exactly
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))[torch.randperm(16)]
    teacher, memory_teacher = signs[:N].clone(), signs[N : N + remembered].clone()
    for copy, original in copies.items():
        teacher[copy] = teacher[original] * 4  # the same direction: the same image
    memory_z = torch.randn(HEADS, remembered, D)
    if remembered:
        memory_teacher[1] = teacher[2]  # an image of the batch, seen before
    memory = CrossBatchMemory(remembered)
    memory.append(memory_z, memory_teacher)
    valid = all_valid()
    valid[list(gaps)] = False
    temperature = TAU.clone().requires_grad_()

    output = ContrastiveTerm(3, normalize, memory)(z, teacher, valid, temperature)
    expected = naive_term(
        torch.cat([z, memory_z], dim=1),
        torch.cat([teacher, memory_teacher]),
        valid.tolist() + [True] * remembered,
        temperature,
        3,
        normalize,
        N,
    )
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(output.loss, (z, temperature))
    wanted = torch.autograd.grad(expected.loss, (z, temperature))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert output.mknn.tolist() == pytest.approx(expected.mknn, abs=1e-6)
    assert output.chance.item() == pytest.approx(expected.chance, abs=1e-6)
    assert (output.n_samples, output.n_duplicates) == (expected.n_samples, expected.n_duplicates)
    assert output.n_samples == N - len(gaps)
    assert output.n_duplicates == (3 if copies else 0)
    assert output.finite


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot"])
def test_without_memory_and_copies_it_is_the_public_functions(z, teacher, normalize):
    output = ContrastiveTerm(4, normalize)(z, teacher, all_valid(), TAU)
    neighbors = nearest_neighbors(teacher, 4, normalize)
    torch.testing.assert_close(output.loss, contrastive_loss(z, neighbors, TAU, normalize))
    torch.testing.assert_close(output.mknn, mutual_knn(z.detach(), teacher, 4, normalize))
    assert output.chance.item() == pytest.approx(4 / (N - 1))


def test_a_slightly_different_image_is_no_copy(z, teacher):
    teacher[1] = teacher[0] + 0.02 * torch.randn(D_TEACHER)
    assert ContrastiveTerm(3)(z, teacher, all_valid(), TAU).n_duplicates == 0


def test_half_precision_representations_are_compared_in_single_precision(z, teacher):
    half = z.detach().bfloat16().requires_grad_()
    output = ContrastiveTerm(3)(half, teacher, all_valid(), TAU)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, ContrastiveTerm(3)(half.float(), teacher, all_valid(), TAU).loss)
    output.loss.backward()
    assert half.grad.dtype == torch.bfloat16


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_batch_of_one_learns_from_the_memory():
    term = ContrastiveTerm(2, memory=CrossBatchMemory(3))
    losses = []
    for _ in range(4):
        z = torch.randn(HEADS, 1, D, requires_grad=True)
        output = term(z, torch.randn(1, D_TEACHER), all_valid(1), TAU)
        losses.append(output.loss.item())
        output.loss.backward()
        assert z.grad.abs().max() > 0 or len(losses) < 3
    assert losses[0] == losses[1] == 0  # no candidate, then a single one: nothing to tell apart
    assert losses[2] > 0
    assert losses[3] > 0
    assert len(term.memory) == 3


def test_the_memory_takes_in_a_batch_after_its_loss(z, teacher):
    term = ContrastiveTerm(3, memory=CrossBatchMemory(N))
    first = term(z, teacher, all_valid(), TAU)
    torch.testing.assert_close(first.loss, ContrastiveTerm(3)(z, teacher, all_valid(), TAU).loss)
    # the same batch again: every remembered row is a copy of a sample, excluded for that sample alone
    again = term(z, teacher, all_valid(), TAU)
    assert again.n_duplicates == 0  # pairs of the batch only
    twice = naive_term(
        torch.cat([z, z.detach()], dim=1), torch.cat([teacher, teacher]), [True] * 2 * N, TAU, 3, True, N
    )
    torch.testing.assert_close(again.loss, twice.loss)
