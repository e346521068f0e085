"""Samples that do not enter the HeRA term, too few candidates, and values that are not finite."""

import logging
import math

import pytest
import torch
from tests.terms import ContrastiveTerm
from torch import Tensor

from llamafactory_hera.alignment import contrastive_loss, nearest_neighbors
from llamafactory_hera.alignment.memory import CrossBatchMemory

HEADS, N, D, D_TEACHER = 3, 9, 6, 5
TAU = torch.tensor(0.2)


@pytest.fixture
def z() -> Tensor:
    return torch.randn(HEADS, N, D).requires_grad_()


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(N, D_TEACHER)


def all_valid(n: int = N) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


# -- rows that do not enter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1e30, math.inf, math.nan])
def test_a_row_that_is_not_valid_changes_nothing_and_gets_no_gradient(z, teacher, value):
    keep = [0, 1, 2, 4, 5, 6, 8]
    valid = all_valid()
    valid[[3, 7]] = False
    with torch.no_grad():
        z[:, [3, 7]] = value
        teacher[[3, 7]] = value
    output = ContrastiveTerm(3)(z, teacher, valid, TAU)
    alone = z.detach()[:, keep].requires_grad_()
    expected = ContrastiveTerm(3)(alone, teacher[keep], all_valid(7), TAU)
    assert output.finite
    assert output.n_samples == 7
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.mknn, expected.mknn)
    output.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(z.grad[:, keep], alone.grad)
    assert (z.grad[:, [3, 7]] == 0).all()


def test_a_row_that_is_not_valid_is_not_remembered(z, teacher):
    valid = all_valid()
    valid[[0, 4]] = False
    term = ContrastiveTerm(3, memory=CrossBatchMemory(20))
    term(z, teacher, valid, TAU)
    assert torch.equal(term.memory.teacher, teacher[valid])
    assert torch.equal(term.memory.representations, z.detach()[:, valid])


def test_a_batch_without_valid_rows_is_zero_with_a_gradient_of_zero(z, teacher):
    output = ContrastiveTerm(3, memory=CrossBatchMemory(4))(z, teacher, ~all_valid(), TAU)
    assert (output.loss.item(), output.n_samples, output.finite) == (0.0, 0, True)
    assert output.mknn.isnan().all()
    assert output.chance.isnan()
    output.loss.backward()
    assert (z.grad == 0).all()


def test_a_sample_alone_does_not_enter(z, teacher):
    valid = ~all_valid()
    valid[4] = True
    output = ContrastiveTerm(3)(z, teacher, valid, TAU)
    assert (output.loss.item(), output.n_samples) == (0.0, 0)
    output.loss.backward()
    assert (z.grad == 0).all()


def test_a_batch_of_one_image_only_does_not_enter(z, teacher):
    output = ContrastiveTerm(3)(z, teacher[:1].expand(N, -1), all_valid(), TAU)
    assert (output.loss.item(), output.n_samples, output.n_duplicates) == (0.0, 0, N * (N - 1) // 2)
    assert output.finite


# -- few candidates --------------------------------------------------------------------------------------------------


def test_k_shrinks_to_the_candidates_with_one_warning(z, teacher, caplog):
    caplog.set_level(logging.WARNING)
    term = ContrastiveTerm(20)
    for _ in range(3):
        output = term(z, teacher, all_valid(), TAU)
    torch.testing.assert_close(output.loss, contrastive_loss(z, nearest_neighbors(teacher, N - 1), TAU))
    assert output.chance.item() == 1.0
    assert output.mknn.tolist() == [1.0] * HEADS  # every candidate is a neighbour on both sides
    assert len(caplog.records) == 1
    assert "hera_k: 20 neighbours" in caplog.text
    assert f"has {N - 1} candidates" in caplog.text
    assert "hera_memory" in caplog.text


def test_enough_candidates_give_no_warning(z, teacher, caplog):
    term = ContrastiveTerm(N - 1)
    term(z, teacher, all_valid(), TAU)
    term(z, teacher, ~all_valid(), TAU)  # a batch without images says nothing about k
    assert not caplog.records


def test_a_copy_can_leave_a_sample_with_fewer_candidates_than_the_others(z, teacher, caplog):
    teacher[1] = teacher[0]
    output = ContrastiveTerm(N - 1)(z, teacher, all_valid(), TAU)
    assert output.chance.item() == 1.0
    assert f"has {N - 2} candidates" in caplog.text


# -- values that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_value_that_is_not_finite_leaves_the_term_out(z, teacher, value, normalize, side):
    with torch.no_grad():
        (z[1, 4] if side == "student" else teacher[4])[2] = value
    term = ContrastiveTerm(3, normalize, CrossBatchMemory(20))
    output = term(z, teacher, all_valid(), TAU)
    assert not output.finite
    assert output.loss.item() == 0
    assert not output.loss.requires_grad
    assert output.mknn.shape == (HEADS,)
    assert output.mknn.isnan().all()
    assert len(term.memory) == 0


def test_a_value_that_is_not_finite_is_never_remembered(teacher):
    """Alone in its batch a sample has no candidates and gives no loss, but its memory would spoil all later ones."""
    term = ContrastiveTerm(3, memory=CrossBatchMemory(20))
    broken = torch.full((HEADS, 1, D), math.nan)
    assert not term(broken, teacher[:1], all_valid(1), TAU).finite
    output = term(torch.randn(HEADS, N, D), teacher, all_valid(), TAU)
    assert output.finite
    assert term.memory.representations.isfinite().all()
