"""Each objective compared with its definition, and its gradients with finite differences."""

import math

import pytest
import torch
from torch import Tensor, nn

from llamafactory_hera.objectives import TokenBatch, TokenObjective, create, find, names
from tests.terms import D_TEACHER, OPTIONS, TARGETS, D, N, options, pooled


def naive_projection(objective: nn.Module, target: int, vector: Tensor) -> Tensor:
    """Applies two linear layers with the exact GELU, or three with SiLU, to one vector."""
    layers = list(objective.projectors[target if len(objective.projectors) > 1 else 0])[::2]
    for i, layer in enumerate(layers):
        if i > 0:
            gelu = 0.5 * (1 + torch.erf(vector / math.sqrt(2)))
            vector = vector * (gelu if len(layers) == 2 else 1 / (1 + torch.exp(-vector)))
        vector = layer.weight @ vector + layer.bias
    return vector


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def naive_cka(x: Tensor, y: Tensor) -> Tensor:
    """Follows Kornblith et al., eq. 3, with linear kernels and a centering matrix."""
    n = len(x)
    centering = torch.eye(n, dtype=x.dtype) - 1 / n

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ a.T @ centering @ b @ b.T @ centering) / (n - 1) ** 2

    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


VALID = [torch.ones(N, dtype=torch.bool), torch.tensor([True, False, True, True, False, True])]


@pytest.mark.parametrize("valid", VALID, ids=["all valid", "gaps"])
def test_cka_matches_its_definition(valid):
    z, teacher = torch.randn(TARGETS, N, D), torch.randn(N, D_TEACHER)
    expected = torch.stack([1 - naive_cka(z[s][valid], teacher[valid]) for s in range(TARGETS)])
    torch.testing.assert_close(create("cka", OPTIONS)(pooled(z, teacher, valid)), expected)


@pytest.mark.parametrize("n_valid", [0, 1, 2, 3])
def test_cka_needs_three_samples(n_valid):
    z = torch.randn(TARGETS, N, D, requires_grad=True)
    objective = create("cka", OPTIONS)
    batch = pooled(z, torch.randn(N, D_TEACHER), torch.arange(N) < n_valid)
    loss = objective(batch)
    loss.sum().backward()
    assert objective.gradient_expected(batch) == (n_valid == 3)
    assert bool((loss > 0).all()) == bool((z.grad != 0).any()) == (n_valid == 3)


def test_cka_of_equal_samples_has_a_finite_gradient():
    objective, one_image = create("cka", OPTIONS), torch.ones(N, D_TEACHER)
    for z, teacher in (
        (torch.randn(TARGETS, N, D), one_image),
        (torch.ones(TARGETS, N, D), torch.randn(N, D_TEACHER)),
    ):
        batch = pooled(z.requires_grad_(), teacher, VALID[0])
        objective(batch).sum().backward()
        assert z.grad.isfinite().all()
        assert objective.gradient_expected(batch) == (teacher is not one_image)


@pytest.mark.parametrize("projector", ["shared", "separate"])
@pytest.mark.parametrize("kind", ["layer", "head"])
def test_feature_compares_each_visual_token_with_the_patch_at_its_place(projector, kind):
    objective = create("feature", options(TARGETS, D, D_TEACHER, projector=projector))
    tokens, teacher = torch.randn(TARGETS, 2, 4, D), torch.randn(2, 4, D_TEACHER)
    projections, z = None, tokens
    if kind == "head":
        tokens, projections = torch.randn(TARGETS, 2, 4, 3), torch.randn(TARGETS, 3, D)
        z = torch.einsum("sbto,sod->sbtd", tokens, projections)
    found = objective(TokenBatch(tokens, projections, teacher, torch.ones(2, dtype=torch.bool)))
    assert found.shape == (TARGETS, 2)
    for target in range(TARGETS):
        for image in range(2):
            losses = [
                1 - cosine(naive_projection(objective, target, z[target, image, t]), teacher[image, t])
                for t in range(4)
            ]
            torch.testing.assert_close(found[target, image], torch.stack(losses).mean())


def test_initial_values_depend_only_on_the_seed_and_the_random_state_is_kept():
    before = torch.get_rng_state()
    first = create("feature", OPTIONS, seed=3)
    assert torch.get_rng_state().equal(before)
    torch.rand(5)
    again, other = create("feature", OPTIONS, seed=3), create("feature", OPTIONS, seed=4)
    for name, parameter in first.named_parameters():
        assert parameter.equal(again.get_parameter(name))
        assert name.endswith("bias") or not parameter.equal(other.get_parameter(name))


@pytest.mark.parametrize("name", [name for name in names() if name != "ross"])  # ross is random: rivals/test_ross.py
def test_gradients_match_finite_differences(name):
    objective = create(name, options(TARGETS, D, D_TEACHER, projector="separate")).double()
    parameters = dict(objective.named_parameters())
    if issubclass(find(name), TokenObjective):
        z, teacher = torch.randn(TARGETS, 2, 4, D).double(), torch.randn(2, 4, D_TEACHER).double()
        places = torch.tensor([[3, 1, 1, 0], [0, 1, 2, 3]])  # the tokens that jarvis compares

        def loss(z: Tensor, *values: Tensor) -> Tensor:
            batch = TokenBatch(z, None, teacher, torch.ones(2, dtype=torch.bool), {"places": places})
            return torch.func.functional_call(objective, dict(zip(parameters, values, strict=True)), (batch,))
    else:
        z, teacher = torch.randn(TARGETS, N, D).double(), torch.randn(N, D_TEACHER).double()

        def loss(z: Tensor, *values: Tensor) -> Tensor:
            batch = pooled(z, teacher, VALID[1])
            found = torch.func.functional_call(objective, dict(zip(parameters, values, strict=True)), (batch,))
            return found.view(TARGETS, -1).sum(dim=1)  # the gradients of single samples' losses are not defined

    values = [parameter.detach().clone().requires_grad_() for parameter in parameters.values()]
    assert torch.autograd.gradcheck(loss, (z.requires_grad_(), *values))
