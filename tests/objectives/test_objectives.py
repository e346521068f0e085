"""Every objective compared with its definition; the registry, and the example objectives of CONTRIBUTING.md."""

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llamafactory_hera.config import OBJECTIVE_KEYS, HeraConfig
from llamafactory_hera.objectives import TokenBatch, TokenObjective, base, create, find, names, register
from tests.terms import D_TEACHER, OPTIONS, TARGETS, D, N, cosine, options, pooled
from tests.tiny_models import snapshot
from tests.training.test_aligner import LAYER, Run


def naive_projection(objective: nn.Module, target: int, vector: Tensor) -> Tensor:
    """Applies two linear layers with the exact GELU, or three with SiLU, to one vector."""
    layers = list(objective.projectors[target if len(objective.projectors) > 1 else 0])[::2]
    for i, layer in enumerate(layers):
        if i > 0:
            gelu = 0.5 * (1 + torch.erf(vector / math.sqrt(2)))
            vector = vector * (gelu if len(layers) == 2 else 1 / (1 + torch.exp(-vector)))
        vector = layer.weight @ vector + layer.bias
    return vector


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


PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Registers both objectives of the page for one test, and returns the name of the first."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        assert len(code.strip().splitlines()) <= 36
        exec(code, {})
    return "distances"


@pytest.mark.parametrize(
    "keys", [{"objective": "distances"}, LAYER | {"objective": "quarter"}], ids=["heads", "a plan"]
)
def test_the_examples_of_the_page_train_and_learn_their_parameters(example, keys):
    run = Run(**keys)
    before = snapshot(run.aligner.objective)
    terms = [run.step() for _ in range(16)]
    assert sum(terms[-2:]) < 0.8 * sum(terms[:2])
    assert not any(torch.equal(tensor, before[name]) for name, tensor in run.aligner.objective.state_dict().items())


def test_the_example_computes_the_losses_of_the_samples_of_its_process(example):
    objective, z, teacher = create(example, OPTIONS), torch.randn(TARGETS, N, D), torch.randn(N, D_TEACHER)
    parts = [objective(pooled(z, teacher, VALID[1], rows)) for rows in (slice(0, 3), slice(3, N))]
    torch.testing.assert_close(torch.cat(parts, dim=1), objective(pooled(z, teacher, VALID[1])))


def test_the_key_accepts_the_name_of_the_example(example):
    HeraConfig(heads="L0H1", objective=example)
    with pytest.raises(ValueError, match=f"hera_objective: 'nothing' is unknown; .*{example}, .*or give"):
        HeraConfig(heads="L0H1", objective="nothing")


def test_all_objectives_are_registered():
    ours = {"contrastive", "feature", "cka", "viral", "ross", "jarvis", "gram"}
    assert ours <= set(names())
    on_tokens = {name for name in ours if issubclass(find(name), TokenObjective)}
    assert on_tokens == {"feature", "viral", "ross", "jarvis", "gram"}
    assert {name for name in ours if "hera_memory" in find(name).reads} == {"contrastive"}
    assert all({*find(name).reads} <= {*OBJECTIVE_KEYS} for name in ours)


def test_a_registered_name_cannot_be_used_again():
    with pytest.raises(ValueError, match="hera_objective: 'cka' is taken by CKA"):
        register("cka")(find("feature"))


SHOWN = torch.tensor([True, True, False])


def gram_loss(tokens: Tensor, teacher: Tensor) -> Tensor:
    return create("gram", options(2, 5, 3))(TokenBatch(tokens, None, teacher, SHOWN))


def test_gram_is_the_mean_squared_difference_over_pairs_of_tokens_of_an_image():
    tokens, teacher = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 3)
    found = gram_loss(tokens, teacher)
    for target in range(2):
        for image in range(3):
            ours, theirs = tokens[target, image], teacher[image]
            pairs = itertools.product(range(4), repeat=2)
            errors = [(cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) ** 2 for i, j in pairs]
            torch.testing.assert_close(found[target, image], sum(errors) / 16, rtol=1e-4, atol=0)


def test_gram_is_0_for_rotated_and_scaled_patches_of_the_teacher():
    teacher = torch.randn(3, 4, 3)
    rotation, _ = torch.linalg.qr(torch.randn(5, 3))
    lengths = torch.rand(2, 3, 4, 1) + 0.5
    assert gram_loss(lengths * (teacher @ rotation.T), teacher).abs().max() < 1e-10


def test_rows_of_zeros_have_finite_gradients_in_gram():
    tokens = torch.where(SHOWN.view(-1, 1, 1), torch.randn(2, 3, 4, 5), 0.0).requires_grad_()
    gram_loss(tokens, torch.where(SHOWN.view(-1, 1, 1), torch.randn(3, 4, 3), 0.0)).sum().backward()
    assert tokens.grad.isfinite().all()
    assert ((tokens.grad != 0).flatten(2).any(2) == SHOWN).all()
