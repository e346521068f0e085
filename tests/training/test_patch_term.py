"""The term over visual tokens against a loop over images, and what it does with samples without one."""

import math

import pytest
import torch
from torch import Tensor

from llamafactory_hera.objectives import Options, PatchBatch, create
from llamafactory_hera.training.own_parameters import OwnParameters
from llamafactory_hera.training.patch_term import PatchTerm

SITES, B, SIDE, D, D_TEACHER = 2, 4, 2, 5, 3


@pytest.fixture
def term() -> PatchTerm:
    return PatchTerm(create("viral", Options(SITES, D, D_TEACHER)))


@pytest.fixture
def z() -> Tensor:
    return torch.randn(SITES, B, SIDE * SIDE, D).requires_grad_()


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(B, 3, 3, D_TEACHER)


@pytest.mark.parametrize("valid", [[True] * 4, [True, False, True, False], [False, True, False, False]])
def test_it_is_the_mean_over_sites_and_images_one_by_one(
    term: PatchTerm, z: Tensor, teacher: Tensor, valid: list[bool]
) -> None:
    output = term(z, teacher, torch.tensor(valid))
    losses = [
        term.objective(PatchBatch(z[:, i : i + 1], teacher[i : i + 1], torch.tensor([True])))
        for i in range(B)
        if valid[i]
    ]
    expected = torch.cat(losses, dim=1).mean()
    torch.testing.assert_close(output.loss, expected)
    wanted = torch.autograd.grad(expected, z)[0]
    torch.testing.assert_close(torch.autograd.grad(output.loss, z)[0], wanted)
    assert output.n_samples == sum(valid)
    assert output.comparable
    assert output.finite
    assert output.mknn.isnan().all()
    assert output.chance.isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_sample_without_an_image_changes_nothing(term: PatchTerm, z: Tensor, teacher: Tensor, value: float) -> None:
    valid = torch.tensor([True, True, False, True])
    expected = term(z, teacher, valid).loss
    with torch.no_grad():
        z[:, 2], teacher[2] = value, value
    output = term(z, teacher, valid)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert z.grad.isfinite().all()
    assert not z.grad[:, 2].any()


def test_no_image_at_all_is_zero_with_a_gradient_of_zero(term: PatchTerm, z: Tensor, teacher: Tensor) -> None:
    output = term(z, teacher, torch.zeros(B, dtype=torch.bool))
    assert (output.loss.item(), output.n_samples, output.comparable) == (0.0, 0, False)
    output.loss.backward()
    assert not z.grad.any()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_value_that_is_not_finite_leaves_the_term_out(
    term: PatchTerm, z: Tensor, teacher: Tensor, side: str
) -> None:
    with torch.no_grad():
        (z[1] if side == "student" else teacher)[0] = math.nan
    output = term(z, teacher, torch.ones(B, dtype=torch.bool))
    assert not output.finite
    assert not output.loss.requires_grad
    assert output.broken.tolist() == [False, side == "student"]


def test_projectors_resume_to_the_last_bit(z: Tensor, teacher: Tensor) -> None:
    def steps(own: OwnParameters, term: PatchTerm, n: int) -> list[float]:
        losses = []
        for _ in range(n):
            loss = term(z, teacher, torch.ones(B, dtype=torch.bool)).loss
            loss.backward()
            own.step(0.01)
            losses.append(loss.item())
        return losses

    options = Options(SITES, D, D_TEACHER)
    straight, resumed = create("viral", options), create("viral", options, seed=9)
    own, other = OwnParameters(straight), OwnParameters(resumed)
    steps(own, PatchTerm(straight), 3)
    other.load_state(own.state())
    assert steps(own, PatchTerm(straight), 3) == steps(other, PatchTerm(resumed), 3)
