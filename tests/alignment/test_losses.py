import pytest
import torch
from torch import Tensor

from llamafactory_hera.alignment import cka_loss, contrastive_loss, nearest_neighbors

N, D, K = 7, 5, 3


def naive_loss(z: Tensor, neighbors: Tensor, temperature: Tensor | float, normalize: bool, allowed=None) -> Tensor:
    """Computes equation 4 literally, one sample and one neighbor at a time; autograd differentiates it."""
    if normalize:
        z = torch.stack([row / row.square().sum().sqrt() for row in z])
    losses = []
    for i, row in enumerate(neighbors.tolist()):
        candidates = [m for m in range(len(z)) if m != i and (allowed is None or allowed[i, m])]
        positives = [j for j in row if j >= 0]
        if positives:
            denominator = sum(torch.exp(z[i] @ z[m] / temperature) for m in candidates)
            logs = [torch.log(torch.exp(z[i] @ z[j] / temperature) / denominator) for j in positives]
            losses.append(-sum(logs) / len(positives))
    return torch.stack(losses).mean()


@pytest.fixture
def neighbors() -> Tensor:
    return nearest_neighbors(torch.randn(N, 4), K)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(N, D), (4, N, D)], ids=["one head", "several heads"])
@pytest.mark.parametrize("masked", [False, True], ids=["all others", "allowed candidates"])
def test_value_and_gradients_match_equation_4(neighbors, normalize, shape, masked):
    """With a mask, only the first 5 samples are queries; one has a single neighbor, and one has no candidate."""
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    allowed = None
    if masked:
        allowed = (torch.rand(5, N) < 0.7).fill_diagonal_(False)
        allowed[1], allowed[3], allowed[3, [2, 4]] = False, False, True
        neighbors = nearest_neighbors(torch.randn(N, 4), K, allowed=allowed)
        assert (neighbors[[1, 3]] >= 0).sum(1).tolist() == [0, 1]
    loss = contrastive_loss(z, neighbors, temperature, normalize, allowed)
    by_head = [naive_loss(head, neighbors, temperature, normalize, allowed) for head in z.view(-1, N, D)]
    expected = torch.stack(by_head).mean()
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, wanted = torch.autograd.grad(loss, (z, temperature)), torch.autograd.grad(expected, (z, temperature))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert wanted[1].abs() > 1e-4


def test_half_precision_representations_give_a_single_precision_loss_that_does_not_overflow(neighbors):
    z = torch.randn(N, D).bfloat16().requires_grad_()
    loss = contrastive_loss(z, neighbors, 0.07)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, naive_loss(z.float(), neighbors, 0.07, True), rtol=1e-5, atol=0)
    (loss + contrastive_loss(z, neighbors, 1e-3)).backward()
    assert z.grad.dtype == torch.bfloat16
    assert z.grad.isfinite().all()


def test_samples_without_any_candidate_give_a_loss_and_gradient_of_zero():
    z, temperature = torch.randn(2, N, D, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    empty = torch.zeros(N, N, dtype=torch.bool)
    none = nearest_neighbors(torch.randn(N, 3), 2, allowed=empty)
    loss = contrastive_loss(z, none, temperature, allowed=empty)
    assert loss == 0
    loss.backward()
    assert not z.grad.any()
    assert not temperature.grad


def test_neighbors_of_the_wrong_shape_are_refused(neighbors):
    for wrong in (neighbors[:-1], neighbors[:1], neighbors.flatten()):
        with pytest.raises(ValueError, match=rf"neighbors: .*\[{N}, k\]"):
            contrastive_loss(torch.randn(2, N, D), wrong, 0.07)


@pytest.mark.parametrize("name", ["contrastive", "cka"])
def test_autocast_changes_neither_the_loss_nor_its_gradient(neighbors, name):
    z, teacher = torch.randn(N, D, requires_grad=True), torch.randn(N, 4)
    losses = {
        "contrastive": lambda: contrastive_loss(z, neighbors, 0.07),
        "cka": lambda: cka_loss(z, teacher, torch.ones(N, dtype=torch.bool)),
    }
    expected = torch.autograd.grad(losses[name](), z)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses[name]()
    torch.testing.assert_close(torch.autograd.grad(loss, z), expected, rtol=1e-6, atol=1e-7)


def test_no_masked_candidate_enters_the_loss_of_large_dot_products():
    z = 3e4 * torch.randn(N, D).abs()
    z[3] = -1e5 * z[2]  # its similarities are far below -1e9
    allowed = ~torch.eye(N, dtype=torch.bool)
    allowed[3, 2] = False
    neighbors = nearest_neighbors(torch.randn(N, 4), 2, allowed=allowed)
    loss = contrastive_loss(z, neighbors, 1.0, normalize=False, allowed=allowed)
    z, expected = z.double(), 0.0
    for i, row in enumerate(neighbors.tolist()):
        log_softmax = (z[i] @ z[allowed[i]].T).log_softmax(0)
        places = allowed[i].nonzero().flatten().tolist()
        expected -= sum(log_softmax[places.index(j)] for j in row).item() / len(row) / N
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_zero_vector_gets_a_bounded_gradient(neighbors):
    z = torch.randn(N, D)
    z[2] = 0
    z.requires_grad_()
    contrastive_loss(z, neighbors, 0.1).backward()
    assert z.grad[2].norm() < 10 / 0.1
