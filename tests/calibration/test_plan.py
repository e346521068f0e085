"""Heads, anchors, updates and the trust region, compared with the paper's formulas for single heads (eq. 6 to 15)."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from llamafactory_hera.calibration.plan import (
    Divergence,
    Plan,
    candidates,
    choose_heads,
    held_out_divergence,
    low_rank,
    make_plan,
    trimmed_mean,
    try_updates,
)
from llamafactory_hera.calibration.profile import Profile
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.weights import Edit, HeadWeights, Slice, Update
from llamafactory_hera.heads import Target
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import HEAD_DIM, HEADS, calibration_model, collate, features, random_profile
from tests.tiny_models import IMAGE

# -- heads -----------------------------------------------------------------------------------------------------------

MANY = RahConfig(p_isal=40, p_caf=60, layers="all")


@pytest.fixture
def scores() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 32).double(), torch.randn(6, 32).double()


def naive_choice(saliency: torch.Tensor, influence: torch.Tensor, layers: list[int]) -> set[tuple[int, int]]:
    low, high = np.percentile(saliency.numpy(), 40, axis=1), np.percentile(influence.numpy(), 60, axis=1)
    heads = ((layer, head) for layer in layers for head in range(32))
    return {head for head in heads if saliency[head] < low[head[0]] and influence[head] > high[head[0]]}


def test_chosen_heads_are_weak_and_influential_in_their_layer_highest_caf_first(scores):
    saliency, influence = scores
    chosen = choose_heads(saliency, influence, replace(MANY, layers="0,2-3"))
    assert set(chosen) == naive_choice(saliency, influence, [0, 2, 3]) != set()
    caf = [influence[head].item() for head in chosen]
    assert caf == sorted(caf, reverse=True)


def test_inverse_mirrors_the_first_condition_and_no_caf_omits_the_second(scores):
    saliency, influence = scores
    inverse = choose_heads(saliency, influence, replace(MANY, targets="inverse"))
    assert set(inverse) == naive_choice(-saliency, influence, list(range(6)))
    chosen = choose_heads(saliency, influence, RahConfig(layers="all", targets="no_caf"))
    assert set(chosen) == {(layer, int(head)) for layer in range(6) for head in saliency[layer].argsort()[:5]}


def test_random_heads_keep_the_number_per_layer_and_depend_only_on_the_seed(scores):
    saliency, influence = scores
    paper = choose_heads(saliency, influence, MANY)
    drawn = [choose_heads(saliency, influence, replace(MANY, targets="random", seed=seed)) for seed in (0, 0, 1)]
    assert sorted(head.layer for head in drawn[0]) == sorted(head.layer for head in paper)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == len(paper)


# -- anchors ---------------------------------------------------------------------------------------------------------


def test_a_layer_without_candidates_uses_layers_one_away_and_then_two_away():
    saliency = torch.zeros(6, 3)
    for added, found in (
        ((5, 0), []),  # three layers away
        ((0, 2), [(0, 2)]),
        ((4, 1), [(0, 2), (4, 1)]),
        ((3, 0), [(3, 0)]),
        ((2, 0), [(3, 0)]),  # a head is not its own anchor
        ((2, 1), [(2, 1)]),
    ):
        saliency[added] = 2.0
        assert candidates(saliency, Target(2, 0), 1.0) == found


CONFIG = RahConfig(p_isal=50, p_caf=30, beta=0.5, k=2, rank=3, layers="all")


def planned(name: str, config: RahConfig = CONFIG) -> tuple[Plan, Profile, HeadWeights]:
    profile, weights = random_profile(), HeadWeights(calibration_model(name))
    return make_plan(profile, weights, config), profile, weights


def cut(weights: HeadWeights, head: Target, kind: Slice) -> torch.Tensor:
    """Slices a head's value rows or output columns by hand."""
    matrix = weights.projections[head.layer, kind].weight.detach()
    if kind == "value":
        return matrix.unflatten(0, (-1, HEAD_DIM))[head.head // (HEADS // weights.n_kv_heads)]
    return matrix.unflatten(1, (-1, HEAD_DIM))[:, head.head]


@pytest.mark.parametrize("rho", [0.6, 0.0, 1.0])
@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2"])
def test_anchors_are_the_most_similar_candidates(name, rho):
    plan, profile, weights = planned(name, replace(CONFIG, rho=rho))
    compared = 0
    for head in plan.heads:
        expected = []
        for other in (Target(head.layer, h) for h in range(HEADS) if profile.saliency[head.layer, h] > 0.5):
            value, output = (
                cosine_similarity(cut(weights, head, kind).flatten(), cut(weights, other, kind).flatten(), dim=0)
                for kind in ("value", "output")
            )
            functional = cosine_similarity(profile.maps[head], profile.maps[other], dim=0).item()
            parametric = (0.7 * value + 0.3 * output).item()
            expected.append((rho * functional + (1 - rho) * parametric, functional, parametric, other))
        if expected:
            compared += 1
            for (*similarities, other), anchor in zip(sorted(expected)[:-3:-1], plan.anchors[head], strict=True):
                assert anchor.head == other
                assert anchor[1:] == pytest.approx(similarities, rel=1e-5, abs=1e-6)
    assert compared


# -- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, trim, cut", [(3, 0.1, 0), (3, 0.34, 1), (10, 0.1, 1), (10, 0.25, 2), (1, 0.4, 0)])
def test_a_trimmed_mean_drops_the_extremes_of_every_element(k, trim, cut):
    stack = torch.randn(k, 2, 3)
    kept = np.sort(stack.numpy(), axis=0)[cut : k - cut]
    assert np.allclose(trimmed_mean(stack, trim), kept.mean(axis=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(4, 20), (20, 4)])
@pytest.mark.parametrize("rank, kept", [(0, 0), (1, 1), (3, 3), (9, 3), ("full", 3)])
def test_low_rank_is_the_nearest_matrix_of_that_rank_without_zero_directions(shape, rank, kept):
    difference = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    left, right = low_rank(difference, rank)
    assert (left.shape, right.shape) == ((shape[0], kept), (kept, shape[1]))
    assert torch.allclose(left @ right, truncated(difference, kept), atol=1e-5)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-5)  # both factors have equal norms


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def representative(plan: Plan, weights: HeadWeights, head: Target, kind: Slice) -> torch.Tensor:
    return torch.stack([cut(weights, anchor.head, kind) for anchor in plan.anchors[head]]).mean(dim=0)


@pytest.mark.parametrize("rank", [3, "full"])
def test_without_grouped_queries_a_head_changes_its_value_and_output(rank):
    plan, _, weights = planned("llava-llama", replace(CONFIG, rank=rank))
    assert plan.updates
    assert [update.heads for update in plan.updates] == [(head,) for head in plan.heads if plan.anchors[head]]
    for update in plan.updates:
        (head,) = update.heads
        assert [(edit.kind, edit.head) for edit in update.edits] == [("output", head), ("value", head)]
        for edit in update.edits:
            difference = representative(plan, weights, head, edit.kind) - cut(weights, head, edit.kind)
            expected = truncated(difference, rank) if isinstance(rank, int) else difference
            assert torch.allclose(edit.left @ edit.right, expected, atol=1e-5)


def test_a_shared_value_block_changes_only_if_all_of_its_heads_do():
    plan, _, weights = planned("llava-qwen3", replace(CONFIG, p_isal=80, p_caf=10, beta=0.2))
    heads = [head for update in plan.updates for head in update.heads]
    assert sorted(heads) == sorted(head for head in plan.heads if plan.anchors[head])
    assert {len(update.heads) for update in plan.updates} == {1, 2}
    for update in plan.updates:
        first, *rest = update.heads
        if not rest:
            assert [edit.kind for edit in update.edits] == ["output"]
            assert not plan.anchors.get(Target(first.layer, first.head ^ 1))
            continue
        assert rest == [Target(first.layer, first.head | 1)] != [first]
        expected_edits = [("output", first), ("output", *rest), ("value", first)]
        assert [(edit.kind, edit.head) for edit in update.edits] == expected_edits
        mean = sum(representative(plan, weights, head, "value") for head in update.heads) / 2
        expected = truncated(mean - cut(weights, first, "value"), 3)
        assert torch.allclose(update.edits[2].left @ update.edits[2].right, expected, atol=1e-5)


# -- made-up divergences ---------------------------------------------------------------------------------------------


def updates(n: int) -> list[Update]:
    return [
        Update((Target(1, i),), (Edit(Target(1, i), "output", torch.randn(48, 2), torch.randn(2, 8)),))
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "kl, tried, alpha",
    [
        (lambda steps: 10 * steps[0][1] ** 2, [0.15, 0.075, 0.0375], 0.0375),
        (lambda steps: 0.05, [0.15], 0.15),  # the largest step is tried first, and the bound itself is allowed
        (lambda steps: 1.0, [0.15, 0.075, 0.0375, 0.01875], 0.0),
    ],
)
def test_a_step_is_halved_until_the_bound_holds(kl, tried, alpha):
    (trial,) = try_updates(updates(1), kl, RahConfig(delta=0.05, halvings=3)).trials
    assert trial.tried == [(step, kl([(trial.update, step)])) for step in tried]
    assert trial.alpha == alpha
    assert trial.state == ("calibrated" if alpha else "rolled back: no step is small enough")


@pytest.mark.parametrize(
    "together, kept", [(lambda n: 0.02 * n, 2), (lambda n: 0.04 if n == 1 else 1.0, 1), (lambda n: 0.04 * n, 1)]
)
def test_the_last_updates_are_rolled_back_until_the_total_holds(together, kept):
    tried = updates(5)
    outcome = try_updates(tried, lambda steps: together(len(steps)), RahConfig(delta=0.05))
    assert outcome.accepted == [(update, 0.15) for update in tried[:kept]]
    assert (outcome.kl_before, outcome.kl) == (together(5), together(kept))
    assert {trial.state for trial in outcome.trials[kept:]} == {"rolled back: total too large"}
    assert all(trial.alpha == 0 and trial.tried for trial in outcome.trials[kept:])


def test_an_update_without_edits_is_not_tried():
    last = updates(1)[0]
    outcome = try_updates([Update((Target(0, 0),), ()), last], lambda _: 0.0, RahConfig())
    assert [trial.state for trial in outcome.trials] == ["equals its anchors", "calibrated"]
    assert outcome.accepted == [(last, 0.15)]


# -- a model ---------------------------------------------------------------------------------------------------------


def held_out(model: torch.nn.Module) -> Divergence:
    return held_out_divergence(Forward(model), HeadWeights(model), features(5), collate, RahConfig(batch_size=4))


def test_divergence_is_the_mean_over_tokens_and_then_over_samples():
    model = calibration_model()
    divergence = held_out(model)
    assert divergence([]) == 0.0
    batches = [collate([sample]) for sample in features(5)]
    with torch.no_grad():
        before = [model(**batch).logits[0].log_softmax(-1) for batch in batches]
        model.model.language_model.layers[1].self_attn.o_proj.weight[:, :8] *= 1.5
        after = [model(**batch).logits[0].log_softmax(-1) for batch in batches]
    means = []
    for batch, log_p, log_q in zip(batches, before, after, strict=True):
        text = batch["input_ids"][0] != IMAGE
        means.append((log_p.exp() * (log_p - log_q)).sum(-1)[text].mean().item())
    assert divergence([]) == pytest.approx(sum(means) / 5, rel=1e-3)


def test_logits_that_are_not_finite_are_refused():
    model = calibration_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"model: it computes NaN or infinity; use bf16 or fp32"):
        held_out(model)


def test_a_change_after_which_the_model_computes_nan_is_rolled_back():
    tried = updates(2)
    outcome = try_updates(tried, lambda steps: math.nan if len(steps) == 2 else 0.0, RahConfig())
    assert outcome.accepted == [(tried[0], 0.15)]
    assert not try_updates(tried, lambda steps: math.nan, RahConfig(halvings=1)).accepted
