import math

import pytest
import torch
from torch import Tensor

from llamafactory_hera.alignment import contrastive_loss, nearest_neighbors

N, D, K = 7, 5, 3


def naive_loss(z: Tensor, neighbors: Tensor, temperature: Tensor | float, normalize: bool) -> Tensor:
    """Equation 4 as it is written, one sample and one neighbour at a time; autograd differentiates it."""
    if normalize:
        z = torch.stack([row / row.square().sum().sqrt() for row in z])
    total = z.new_zeros(())
    for i in range(z.shape[0]):
        denominator = sum(torch.exp(z[i] @ z[m] / temperature) for m in range(z.shape[0]) if m != i)
        for j in neighbors[i].tolist():
            numerator = torch.exp(z[i] @ z[j] / temperature)
            total = total - torch.log(numerator / denominator) / neighbors.shape[1] / z.shape[0]
    return total


@pytest.fixture
def neighbors() -> Tensor:
    return nearest_neighbors(torch.randn(N, 4), K)


@pytest.mark.parametrize("normalize", [True, False])
def test_value_and_gradients_are_those_of_equation_4(neighbors, normalize):
    z = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(z, neighbors, temperature, normalize)
    expected = naive_loss(z, neighbors, temperature, normalize)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, wanted = torch.autograd.grad(loss, (z, temperature)), torch.autograd.grad(expected, (z, temperature))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert wanted[1].abs() > 1e-3


def test_cosine_is_the_default_and_differs_from_dot(neighbors):
    z = torch.randn(N, D)
    assert contrastive_loss(z, neighbors, 0.07) == contrastive_loss(z, neighbors, 0.07, normalize=True)
    assert contrastive_loss(z, neighbors, 0.07) != contrastive_loss(z, neighbors, 0.07, normalize=False)


@pytest.mark.parametrize("normalize", [True, False])
def test_several_heads_give_the_mean_of_their_losses(neighbors, normalize):
    heads = torch.randn(4, N, D, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(heads, neighbors, 0.07, normalize)
    expected = torch.stack([naive_loss(head, neighbors, 0.07, normalize) for head in heads]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (got,), (wanted,) = torch.autograd.grad(loss, heads), torch.autograd.grad(expected, heads)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_numerical_gradients_agree(neighbors):
    z = torch.randn(2, N, D, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, t: contrastive_loss(z, neighbors, t), (z, temperature))
    allowed = torch.rand(4, N) < 0.7
    neighbors = nearest_neighbors(torch.randn(N, 4), 3, allowed=allowed)
    assert torch.autograd.gradcheck(
        lambda z, t: contrastive_loss(z, neighbors, t, allowed=allowed, per_head=True), (z, temperature)
    )


def test_half_precision_representations_give_a_single_precision_loss(neighbors):
    z = torch.randn(N, D).bfloat16().requires_grad_()
    loss = contrastive_loss(z, neighbors, 0.07)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, naive_loss(z.float(), neighbors, 0.07, True), rtol=1e-5, atol=0)
    loss.backward()
    assert z.grad.dtype == torch.bfloat16
    assert z.grad.isfinite().all()


def test_a_sharp_temperature_does_not_overflow(neighbors):
    z = torch.randn(N, D, requires_grad=True)
    loss = contrastive_loss(z, neighbors, 1e-3)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_only_allowed_candidates_enter_the_softmax():
    z = torch.tensor([[1.0], [2.0], [1.0], [50.0], [-1.0]], requires_grad=True)  # similarities of the first with all
    allowed = torch.tensor([[False, True, True, False, True]])
    loss = contrastive_loss(z, torch.tensor([[2, 4]]), torch.tensor(0.5), normalize=False, allowed=allowed)
    partition = math.log(sum(math.exp(s / 0.5) for s in (2.0, 1.0, -1.0)))
    assert loss.item() == pytest.approx(((partition - 1.0 / 0.5) + (partition + 1.0 / 0.5)) / 2)
    loss.backward()
    assert z.grad[3] == 0
    assert (z.grad[[0, 1, 2, 4]] != 0).all()


def test_each_sample_divides_by_its_own_number_of_neighbors_and_those_without_do_not_enter():
    heads = torch.zeros(2, 5, 3)
    neighbors = torch.tensor([[3, -1, -1], [2, 0, 3], [-1, -1, -1]])
    allowed = ~torch.eye(3, 5, dtype=torch.bool)
    losses = contrastive_loss(heads, neighbors, 1.0, allowed=allowed, per_head=True)
    assert losses.tolist() == pytest.approx([math.log(4)] * 2)
    assert contrastive_loss(heads, neighbors[2:], 1.0, allowed=allowed[:1], per_head=True).tolist() == [0, 0]


def test_samples_without_candidates_give_no_loss_and_a_finite_zero_gradient():
    z = torch.randn(2, 5, 4, requires_grad=True)
    temperature = torch.tensor(0.5, requires_grad=True)
    allowed = torch.ones(5, 5, dtype=torch.bool).fill_diagonal_(False)
    allowed[1], allowed[:, 1] = False, False
    neighbors = nearest_neighbors(torch.randn(5, 3), 2, allowed=allowed)
    loss = contrastive_loss(z, neighbors, temperature, allowed=allowed)
    others = z[:, [0, 2, 3, 4]]
    renumbered = torch.tensor([0, -1, 1, 2, 3])[neighbors[[0, 2, 3, 4]]]
    torch.testing.assert_close(loss, contrastive_loss(others, renumbered, temperature))
    loss.backward()
    assert (z.grad[:, 1] == 0).all()
    assert z.grad.isfinite().all()
    assert temperature.grad.isfinite()


@pytest.mark.parametrize("temperature", [0.0, -0.07])
def test_a_temperature_of_zero_or_less_is_refused(neighbors, temperature):
    with pytest.raises(ValueError, match=rf"temperature={temperature}.* above 0"):
        contrastive_loss(torch.randn(N, D), neighbors, temperature)


def test_neighbors_of_other_samples_are_refused(neighbors):
    for wrong in (neighbors[:-1], neighbors[:1], neighbors.flatten()):
        with pytest.raises(ValueError, match=rf"neighbors .*\[{N}, k\]"):
            contrastive_loss(torch.randn(2, N, D), wrong, 0.07)
