"""Divergence, step size and roll-back (eq. 14 and 15)."""

import math

import pytest
import torch

from llamafactory_hera.calibration.trust_region import divergence, largest_step, roll_back


def test_divergence_of_each_distribution() -> None:
    base, changed = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    found = divergence(base, changed)
    for i in range(2):
        for j in range(3):
            p, q = base[i, j].softmax(dim=0).tolist(), changed[i, j].softmax(dim=0).tolist()
            expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert found[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_a_distribution_does_not_diverge_from_itself_and_the_order_matters() -> None:
    base, changed = torch.tensor([4.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    assert divergence(base, base).item() == 0.0
    assert divergence(base, changed).item() != pytest.approx(divergence(changed, base).item(), rel=0.1)


def test_the_step_is_halved_until_the_bound_holds() -> None:
    alpha, tried = largest_step(lambda alpha: 10 * alpha**2, alpha_max=0.15, delta=0.05, halvings=10)
    assert alpha == 0.15 / 4
    assert [step.alpha for step in tried] == [0.15, 0.075, 0.0375]
    assert [step.kl for step in tried] == [10 * step.alpha**2 for step in tried]


def test_the_largest_step_is_tried_first_and_the_bound_itself_is_allowed() -> None:
    assert largest_step(lambda alpha: 0.05, 0.15, 0.05, 10)[0] == 0.15


def test_a_bound_that_never_holds_gives_the_update_up() -> None:
    alpha, tried = largest_step(lambda alpha: 1.0, 0.15, 0.05, halvings=3)
    assert alpha == 0.0
    assert len(tried) == 4


def test_the_last_updates_are_rolled_back_one_by_one() -> None:
    kept, measured = roll_back(lambda n: 0.02 * n, n=5, delta=0.05)
    assert kept == 2
    assert [step.alpha for step in measured] == [5, 4, 3, 2]
    assert roll_back(lambda n: 1.0, n=3, delta=0.05)[0] == 0
    assert roll_back(lambda n: 1.0, n=0, delta=0.05) == (0, [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"model_name_or_path.*(nan|inf).*bf16 or fp32"):
        largest_step(lambda _: value, 0.15, 0.05, 3)
    with pytest.raises(ValueError, match="model_name_or_path"):
        roll_back(lambda _: value, 2, 0.05)
