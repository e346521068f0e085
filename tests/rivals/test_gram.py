"""The Gram objective compared with sums over pairs of tokens."""

import math

import torch
from torch import Tensor

from llamafactory_hera.objectives import TokenBatch, create
from tests.terms import options

SHOWN = torch.tensor([True, True, False])


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def loss_of(tokens: Tensor, teacher: Tensor) -> Tensor:
    return create("gram", options(2, 5, 3))(TokenBatch(tokens, None, teacher, SHOWN))


def test_the_loss_is_the_mean_squared_difference_over_pairs_of_tokens_of_an_image():
    tokens, teacher = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 3)
    found = loss_of(tokens, teacher)
    for target in range(2):
        for image in range(3):
            ours, theirs = tokens[target, image].tolist(), teacher[image].tolist()
            errors = [
                (cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) ** 2 for i in range(4) for j in range(4)
            ]
            assert math.isclose(found[target, image].item(), sum(errors) / 16, rel_tol=1e-4)


def test_the_loss_is_0_for_rotated_and_scaled_patches_of_the_teacher():
    teacher = torch.randn(3, 4, 3)
    rotation, _ = torch.linalg.qr(torch.randn(5, 3))
    lengths = torch.rand(2, 3, 4, 1) + 0.5
    assert loss_of(lengths * (teacher @ rotation.T), teacher).abs().max() < 1e-10


def test_rows_of_zeros_have_finite_gradients():
    tokens = torch.where(SHOWN.view(-1, 1, 1), torch.randn(2, 3, 4, 5), 0.0).requires_grad_()
    loss_of(tokens, torch.where(SHOWN.view(-1, 1, 1), torch.randn(3, 4, 3), 0.0)).sum().backward()
    assert tokens.grad.isfinite().all()
    assert ((tokens.grad != 0).flatten(2).any(2) == SHOWN).all()
