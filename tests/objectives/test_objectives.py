"""Each objective against its definition, and its gradients against finite differences."""

import math

import pytest
import torch
from torch import Tensor, nn

from llamafactory_hera.objectives import Options, PatchBatch, create, find, names
from llamafactory_hera.objectives.feature import Feature
from llamafactory_hera.objectives.projector import Projector

from .batches import D_TEACHER, OPTIONS, TARGETS, D, N, pooled


def naive_projection(projector: Projector, target: int, vector: Tensor) -> Tensor:
    """Two linear layers with the exact GELU between them, for one vector."""
    hidden = vector @ projector.weight_in[target] + projector.bias_in[target, 0]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ projector.weight_out[target] + projector.bias_out[target, 0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def naive_cka(x: Tensor, y: Tensor) -> Tensor:
    """Kornblith et al., eq. 3 with the HSIC of linear kernels written out: H K H by a centring matrix."""
    n = len(x)
    centring = torch.eye(n, dtype=x.dtype) - 1 / n

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ a.T @ centring @ b @ b.T @ centring) / (n - 1) ** 2

    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


VALID = [torch.ones(N, dtype=torch.bool), torch.tensor([True, False, True, True, False, True])]


@pytest.mark.parametrize("valid", VALID, ids=["all valid", "gaps"])
def test_feature_is_one_minus_the_cosine_to_the_teacher(valid: Tensor) -> None:
    objective = create("feature", OPTIONS)
    z, teacher = torch.randn(TARGETS, N, D), torch.randn(N, D_TEACHER)
    expected = [
        torch.stack(
            [1 - cosine(naive_projection(objective.projector, s, z[s, i]), teacher[i]) for i in range(N) if valid[i]]
        ).mean()
        for s in range(TARGETS)
    ]
    torch.testing.assert_close(objective(pooled(z, teacher, valid)), torch.stack(expected))


@pytest.mark.parametrize("valid", VALID, ids=["all valid", "gaps"])
def test_cka_is_its_definition(valid: Tensor) -> None:
    z, teacher = torch.randn(TARGETS, N, D), torch.randn(N, D_TEACHER)
    expected = torch.stack([1 - naive_cka(z[s][valid], teacher[valid]) for s in range(TARGETS)])
    torch.testing.assert_close(create("cka", OPTIONS)(pooled(z, teacher, valid)), expected)


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    teacher = torch.randn(N, D)
    rotation = torch.linalg.qr(torch.randn(D, D)).Q
    z = torch.stack([teacher, 7 * teacher @ rotation + 3])
    batch = pooled(z, teacher)
    torch.testing.assert_close(create("cka", OPTIONS)(batch), torch.zeros(TARGETS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_valid", [0, 1, 2, 3])
def test_cka_needs_three_samples(n_valid: int) -> None:
    z = torch.randn(TARGETS, N, D, requires_grad=True)
    objective = create("cka", OPTIONS)
    batch = pooled(z, torch.randn(N, D_TEACHER), torch.arange(N) < n_valid)
    loss = objective(batch)
    loss.sum().backward()
    assert objective.comparable(batch) == (n_valid == 3)
    assert bool((loss > 0).all()) == bool((z.grad != 0).any()) == (n_valid == 3)


def test_cka_of_one_image_only_is_finite_and_has_nothing_to_learn() -> None:
    z = torch.randn(TARGETS, N, D, requires_grad=True)
    objective = create("cka", OPTIONS)
    batch = pooled(z, torch.ones(N, D_TEACHER))
    objective(batch).sum().backward()
    assert z.grad.isfinite().all()
    assert not objective.comparable(batch)


def test_cka_of_a_head_that_says_the_same_of_every_sample_has_a_finite_gradient() -> None:
    z = torch.ones(TARGETS, N, D, requires_grad=True)
    create("cka", OPTIONS)(pooled(z, 100 * torch.randn(N, D_TEACHER))).sum().backward()
    assert z.grad.isfinite().all()


def bilinear(patches: Tensor, side: int) -> Tensor:
    """``[h, w, D]`` to ``[side, side, D]``: the mean of the four patches around each place, by their distance."""
    h, w, _ = patches.shape
    rows = []
    for y in range(side):
        for x in range(side):
            v = min(max((y + 0.5) * h / side - 0.5, 0), h - 1)
            u = min(max((x + 0.5) * w / side - 0.5, 0), w - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            b, r = v - top, u - left
            rows.append(
                (1 - b) * ((1 - r) * patches[top, left] + r * patches[top, right])
                + b * ((1 - r) * patches[bottom, left] + r * patches[bottom, right])
            )
    return torch.stack(rows).view(side, side, -1)


@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (2, 2), (5, 4)], ids=str)
def test_viral_compares_each_visual_token_with_the_patch_at_its_place(grid: tuple[int, int]) -> None:
    side, objective = 3, create("viral", OPTIONS)
    z, teacher = torch.randn(TARGETS, 2, side * side, D), torch.randn(2, *grid, D_TEACHER)
    found = objective(PatchBatch(z, teacher, torch.ones(2, dtype=torch.bool)))
    assert found.shape == (TARGETS, 2)
    for target in range(TARGETS):
        for image in range(2):
            targets = bilinear(teacher[image], side)
            losses = [
                1
                - cosine(
                    naive_projection(objective.projector, target, z[target, image, t]), targets[t // side, t % side]
                )
                for t in range(side * side)
            ]
            torch.testing.assert_close(found[target, image], torch.stack(losses).mean())


@pytest.mark.parametrize("name", names())
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    objective = create(name, OPTIONS).double()
    parameters = dict(objective.named_parameters())
    if find(name).view == "patches":
        z, teacher = torch.randn(TARGETS, 2, 4, D).double(), torch.randn(2, 3, 3, D_TEACHER).double()

        def loss(z: Tensor, *values: Tensor) -> Tensor:
            batch = PatchBatch(z, teacher, torch.ones(2, dtype=torch.bool))
            return torch.func.functional_call(objective, dict(zip(parameters, values, strict=True)), (batch,))
    else:
        z, teacher = torch.randn(TARGETS, N, D).double(), torch.randn(N, D_TEACHER).double()

        def loss(z: Tensor, *values: Tensor) -> Tensor:
            batch = pooled(z, teacher, VALID[1])
            return torch.func.functional_call(objective, dict(zip(parameters, values, strict=True)), (batch,))

    values = [parameter.detach().clone().requires_grad_() for parameter in parameters.values()]
    assert torch.autograd.gradcheck(loss, (z.requires_grad_(), *values))


def test_projectors_start_equal_everywhere_and_touch_no_other_random_number() -> None:
    before = torch.get_rng_state()
    first = create("feature", OPTIONS, seed=3)
    assert torch.get_rng_state().equal(before)
    torch.rand(5)
    again, other = create("feature", OPTIONS, seed=3), create("feature", OPTIONS, seed=4)
    for name, parameter in first.named_parameters():
        assert parameter.equal(again.get_parameter(name))
        assert not parameter.equal(other.get_parameter(name))


def test_a_projector_is_drawn_as_linear_layers_are() -> None:
    projector = Projector(4, 64, 32)
    linear = nn.Linear(64, 32)
    for ours, theirs in ((projector.weight_in, linear.weight), (projector.bias_in, linear.bias)):
        assert ours.abs().max() <= 1 / 8
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2)


def test_only_what_is_asked_for_is_trained() -> None:
    assert isinstance(create("feature", OPTIONS), Feature)
    assert not list(create("cka", OPTIONS).parameters())
    fixed = create("contrastive", Options(1, 1, 1, temperature=0.2, learn_temperature=False))
    assert fixed.values() == {"hera_temperature": pytest.approx(0.2)}
    assert not fixed.log_temperature.requires_grad
