"""From scores to updates, against the paper's formulas written out for single heads (eq. 6 to 13)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from llamafactory_hera.calibration.plan import (
    Plan,
    candidates,
    choose_targets,
    find_anchors,
    low_rank,
    make_plan,
    trimmed_mean,
    units,
)
from llamafactory_hera.calibration.profile import Profile
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.weights import HeadWeights, Slice
from llamafactory_hera.heads import Target
from tests.calibration.tiny import calibration_model, random_profile

# -- targets ---------------------------------------------------------------------------------------------------------

MANY = RahConfig(p_isal=40, p_caf=60, layers="all")


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 32).double(), torch.randn(6, 32).double()


def naive_targets(saliency: torch.Tensor, influence: torch.Tensor, layers: list[int]) -> set[tuple[int, int]]:
    low, high = np.percentile(saliency.numpy(), 40, axis=1), np.percentile(influence.numpy(), 60, axis=1)
    heads = ((layer, head) for layer in layers for head in range(32))
    return {head for head in heads if saliency[head] < low[head[0]] and influence[head] > high[head[0]]}


def test_targets_are_weak_and_influential_in_their_layer_highest_caf_first() -> None:
    saliency, influence = scores()
    chosen = choose_targets(saliency, influence, replace(MANY, layers="0,2-3"))
    assert set(chosen) == naive_targets(saliency, influence, [0, 2, 3])
    caf = [influence[head].item() for head in chosen]
    assert chosen
    assert caf == sorted(caf, reverse=True)
    saliency = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, -3.0]])
    influence = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    assert choose_targets(saliency, influence, RahConfig(layers="all")) == [Target(1, 2)]  # equal heads: no outlier


def test_inverse_targets_are_the_most_cross_modal_and_without_caf_the_first_condition_alone_decides() -> None:
    saliency, influence = scores()
    inverse = choose_targets(saliency, influence, replace(MANY, targets="inverse"))
    assert set(inverse) == naive_targets(-saliency, influence, list(range(6)))
    chosen = choose_targets(saliency, influence, RahConfig(layers="all", targets="no_caf"))
    assert set(chosen) == {(layer, int(head)) for layer in range(6) for head in saliency[layer].argsort()[:5]}


def test_random_targets_are_as_many_in_each_layer_and_depend_on_the_seed_alone() -> None:
    saliency, influence = scores()
    paper = choose_targets(saliency, influence, MANY)
    drawn = [choose_targets(saliency, influence, replace(MANY, targets="random", seed=seed)) for seed in (0, 0, 1)]
    assert sorted(head.layer for head in drawn[0]) == sorted(head.layer for head in paper)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == len(paper)


# -- anchors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_candidates_lie_beta_deviations_above_the_mean(beta: float) -> None:
    raw = torch.rand(2, 16)
    saliency = Profile(raw.double(), raw, raw).saliency
    bound = raw[1].double().mean() + beta * raw[1].double().std(correction=0)
    target = Target(1, int(raw[1].argmin()))
    assert candidates(saliency, target, beta) == [Target(1, head) for head in range(16) if raw[1, head] > bound]


def test_a_layer_without_anchors_looks_beside_itself_and_then_two_away() -> None:
    saliency = torch.zeros(6, 3)
    expected: list[Target] = []
    for (layer, head), found in (
        ((5, 0), []),  # three layers away
        ((0, 2), [Target(0, 2)]),
        ((4, 1), [Target(0, 2), Target(4, 1)]),
        ((3, 0), [Target(3, 0)]),
        ((2, 0), [Target(3, 0)]),  # a target is never its own anchor
        ((2, 1), [Target(2, 1)]),
    ):
        assert candidates(saliency, Target(2, 0), 1.0) == expected
        saliency[layer, head] = 2.0
        expected = found
    assert candidates(saliency, Target(2, 0), 1.0) == expected


HEADS, D = 8, 8
CONFIG = RahConfig(p_isal=50, p_caf=30, beta=0.5, k=2, rank=3, layers="all")


def planned(name: str, config: RahConfig = CONFIG) -> tuple[Plan, Profile, HeadWeights]:
    profile, weights = random_profile(), HeadWeights(calibration_model(name))
    return make_plan(profile, weights, config), profile, weights


def cut(weights: HeadWeights, head: Target, kind: Slice) -> torch.Tensor:
    """A head's value rows or output columns, cut by hand."""
    whole = weights.projections[head.layer, kind].weight.detach()
    kv = head.head // (weights.layout.n_heads // weights.layout.n_kv_heads)
    return whole[kv * D : (kv + 1) * D] if kind == "value" else whole[:, head.head * D : (head.head + 1) * D]


@pytest.mark.parametrize("rho", [0.6, 0.0, 1.0])
@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2", "llava-qwen3"])
def test_anchors_are_the_most_similar_of_the_pool(name: str, rho: float) -> None:
    plan, profile, weights = planned(name, replace(CONFIG, rho=rho))
    compared = 0
    for target in plan.targets:
        scores = {}
        for head in (Target(target.layer, h) for h in range(HEADS) if profile.saliency[target.layer, h] > 0.5):
            value, output = (
                cosine_similarity(cut(weights, target, kind).flatten(), cut(weights, head, kind).flatten(), dim=0)
                for kind in ("value", "output")
            )
            functional = cosine_similarity(profile.maps[target], profile.maps[head], dim=0)
            scores[head] = (functional.item(), (0.7 * value + 0.3 * output).item())
        total = {head: rho * functional + (1 - rho) * parametric for head, (functional, parametric) in scores.items()}
        if total:
            anchors = plan.anchors[target]
            assert [anchor.head for anchor in anchors] == sorted(total, key=total.__getitem__, reverse=True)[:2]
            for anchor in anchors:
                assert anchor[1:] == pytest.approx((total[anchor.head], *scores[anchor.head]), rel=1e-5, abs=1e-6)
            compared += 1
    assert compared


def test_equal_anchors_are_ordered_by_their_names_and_fewer_than_k_are_all_taken() -> None:
    weights = HeadWeights(calibration_model())
    for kind in ("value", "output"):
        for head in range(1, HEADS):
            weights.of_head(Target(1, head), kind).copy_(weights.of_head(Target(1, 0), kind))
    flow = torch.zeros(4, HEADS, dtype=torch.double)
    flow[1] = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1])
    profile = Profile(flow, torch.ones(4, HEADS, 5), torch.randn(6, 4, HEADS))
    for k, heads in ((2, [3, 5]), (9, [3, 5, 7])):
        anchors = find_anchors(Target(1, 0), profile, weights, replace(CONFIG, k=k))
        assert [anchor.head for anchor in anchors] == [Target(1, head) for head in heads]


# -- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, trim, cut", [(3, 0.1, 0), (3, 0.34, 1), (10, 0.1, 1), (10, 0.25, 2), (1, 0.4, 0)])
def test_trimmed_mean_drops_both_ends_of_every_element(k: int, trim: float, cut: int) -> None:
    stack = torch.randn(k, 2, 3)
    found = trimmed_mean(stack, trim)
    for i in range(2):
        for j in range(3):
            kept = sorted(stack[:, i, j].tolist())[cut : k - cut]
            assert found[i, j].item() == pytest.approx(sum(kept) / len(kept), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("shape", [(4, 20), (20, 4)])
@pytest.mark.parametrize("rank", [1, 3, 4, 9, None])
def test_low_rank_is_the_nearest_matrix_of_that_rank(shape: tuple[int, int], rank: int | None) -> None:
    difference = torch.randn(shape)
    left, right = low_rank(difference, rank)
    u, sigma, v = torch.linalg.svd(difference.double(), full_matrices=False)
    kept = min(rank or 4, 4)
    expected = sum(sigma[i] * torch.outer(u[:, i], v[i]) for i in range(kept))
    assert (left.shape, right.shape) == ((shape[0], kept), (kept, shape[1]))
    assert torch.allclose((left @ right).double(), expected, atol=1e-5)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-5)  # both factors have the same size
    # Eckart-Young: what is missing are the smaller singular values
    rest = (difference - left @ right).double().norm()
    assert rest.item() == pytest.approx(sigma[kept:].square().sum().sqrt().item(), abs=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_directions_without_weight_are_dropped(rank: int) -> None:
    left, right = low_rank(torch.randn(6, rank) @ torch.randn(rank, 9), None)
    assert (left.shape, right.shape) == ((6, rank), (rank, 9))


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def representative(plan: Plan, weights: HeadWeights, head: Target, kind: Slice) -> torch.Tensor:
    return torch.stack([cut(weights, anchor.head, kind) for anchor in plan.anchors[head]]).mean(dim=0)


@pytest.mark.parametrize("rank", [3, "full"])
def test_multi_head_targets_change_value_and_output(rank: int | str) -> None:
    plan, _, weights = planned("llava-llama", replace(CONFIG, rank=rank))
    assert plan.updates
    assert [update.heads for update in plan.updates] == [(target,) for target in plan.targets if plan.anchors[target]]
    for update in plan.updates:
        (head,) = update.heads
        assert [(edit.kind, edit.layer, edit.index) for edit in update.edits] == [("output", *head), ("value", *head)]
        for edit in update.edits:
            difference = representative(plan, weights, head, edit.kind) - cut(weights, head, edit.kind)
            expected = truncated(difference, rank) if isinstance(rank, int) else difference
            assert torch.allclose(edit.left @ edit.right, expected, atol=1e-5)


def test_a_shared_value_block_changes_only_with_its_whole_group() -> None:
    plan, _, weights = planned("llava-qwen3", replace(CONFIG, p_isal=80, p_caf=10, beta=0.2))
    alone = [update for update in plan.updates if len(update.heads) == 1]
    whole = [update for update in plan.updates if len(update.heads) == 2]
    assert alone
    assert whole
    for update in alone:
        assert [edit.kind for edit in update.edits] == ["output"]
        partner = Target(update.heads[0].layer, update.heads[0].head ^ 1)
        assert not plan.anchors.get(partner)
    for update in whole:
        first, second = update.heads
        assert (first.head % 2, second.head) == (0, first.head + 1)
        assert [(edit.kind, edit.index) for edit in update.edits] == [
            ("output", first.head),
            ("output", second.head),
            ("value", first.head // 2),
        ]
        aim = sum(representative(plan, weights, head, "value") for head in update.heads) / 2
        expected = truncated(aim - cut(weights, first, "value"), 3)
        assert torch.allclose(update.edits[2].left @ update.edits[2].right, expected, atol=1e-5)


def test_every_target_with_anchors_is_in_one_update() -> None:
    plan, _, weights = planned("llava-qwen2", replace(CONFIG, p_isal=80, p_caf=10))
    heads = [head for update in plan.updates for head in update.heads]
    assert sorted(heads) == sorted(target for target in plan.targets if plan.anchors[target])
    grouped = units([Target(0, 5), Target(0, 1), Target(0, 4)], weights)
    assert grouped == [(Target(0, 4), Target(0, 5)), (Target(0, 1),)]


def test_a_head_that_equals_its_anchors_has_no_edit() -> None:
    weights = HeadWeights(calibration_model("llava-llama"))
    for layer in range(weights.layout.n_layers):
        for head in range(1, HEADS):
            for kind in ("value", "output"):
                weights.of_head(Target(layer, head), kind).copy_(weights.of_head(Target(layer, 0), kind))
    plan = make_plan(random_profile(), weights, replace(CONFIG, beta=0))
    assert plan.updates
    assert all(not update.edits for update in plan.updates)
