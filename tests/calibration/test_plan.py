"""From a profile to updates, against the paper's formulas written out for single heads."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from llamafactory_hera.calibration.plan import Plan, make_plan, units
from llamafactory_hera.calibration.profile import Profile
from llamafactory_hera.calibration.settings import RahSettings
from llamafactory_hera.calibration.weights import HeadWeights
from llamafactory_hera.heads import Target
from tests.calibration.tiny import calibration_model, random_profile

HEADS, D = 8, 8
SETTINGS = RahSettings(p_isal=50, p_caf=30, beta=0.5, k=2, rank=3, layers="all")


def planned(name: str, settings: RahSettings = SETTINGS) -> tuple[Plan, Profile, HeadWeights]:
    profile, weights = random_profile(), HeadWeights(calibration_model(name))
    return make_plan(profile, weights, settings), profile, weights


def slices(weights: HeadWeights, head: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """A head's value rows and output columns, cut by hand."""
    share = weights.layout.n_heads // weights.layout.n_kv_heads
    value, output = (weights._modules[head.layer, part].weight.detach() for part in ("value", "output"))
    kv = head.head // share
    return value[kv * D : (kv + 1) * D], output[:, head.head * D : (head.head + 1) * D]


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2", "llava-qwen3"])
def test_anchors_are_the_nearest_of_the_pool(name: str) -> None:
    plan, profile, weights = planned(name)
    assert plan.targets
    for target in plan.targets:
        pool = [Target(target.layer, h) for h in range(HEADS) if profile.saliency[target.layer, h] > 0.5]
        if not pool:
            continue
        scores = {}
        for head in pool:
            func = cosine_similarity(profile.maps[target], profile.maps[head], dim=0).item()
            param = [
                cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item()
                for ours, theirs in zip(slices(weights, target), slices(weights, head), strict=True)
            ]
            scores[head] = 0.6 * func + 0.4 * (0.7 * param[0] + 0.3 * param[1])
        expected = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
        assert [anchor.head for anchor in plan.anchors[target]] == expected
        assert plan.anchors[target][0].similarity == pytest.approx(scores[expected[0]], rel=1e-5)


def test_multi_head_targets_change_value_and_output() -> None:
    plan, _, weights = planned("llava-llama")
    assert [update.heads for update in plan.updates] == [(target,) for target in plan.targets if plan.anchors[target]]
    for update in plan.updates:
        (head,) = update.heads
        assert [(edit.part, edit.layer, edit.index) for edit in update.edits] == [
            ("output", *head),
            ("value", *head),
        ]
        for edit, part in zip(update.edits, (1, 0), strict=True):
            aim = torch.stack([slices(weights, anchor.head)[part] for anchor in plan.anchors[head]]).mean(dim=0)
            expected = truncated(aim - slices(weights, head)[part], 3)
            assert torch.allclose(edit.left @ edit.right, expected, atol=1e-5)


def test_a_shared_value_block_changes_only_with_its_whole_group() -> None:
    plan, _, weights = planned("llava-qwen3", replace(SETTINGS, p_isal=80, p_caf=10, beta=0.2))
    alone = [update for update in plan.updates if len(update.heads) == 1]
    whole = [update for update in plan.updates if len(update.heads) == 2]
    assert alone
    assert whole
    for update in alone:
        assert [edit.part for edit in update.edits] == ["output"]
        partner = Target(update.heads[0].layer, update.heads[0].head ^ 1)
        assert not plan.anchors.get(partner)
    for update in whole:
        first, second = update.heads
        assert (first.head % 2, second.head) == (0, first.head + 1)
        assert [(edit.part, edit.index) for edit in update.edits] == [
            ("output", first.head),
            ("output", second.head),
            ("value", first.head // 2),
        ]
        aims = [
            torch.stack([slices(weights, anchor.head)[0] for anchor in plan.anchors[head]]).mean(dim=0)
            for head in update.heads
        ]
        expected = truncated((aims[0] + aims[1]) / 2 - slices(weights, first)[0], 3)
        assert torch.allclose(update.edits[2].left @ update.edits[2].right, expected, atol=1e-5)


def test_every_target_with_anchors_is_in_one_update() -> None:
    plan, _, weights = planned("llava-qwen2", replace(SETTINGS, p_isal=80, p_caf=10))
    heads = [head for update in plan.updates for head in update.heads]
    assert sorted(heads) == sorted(target for target in plan.targets if plan.anchors[target])
    grouped = units([Target(0, 5), Target(0, 1), Target(0, 4)], weights)
    assert grouped == [(Target(0, 4), Target(0, 5)), (Target(0, 1),)]


def test_full_rank_reaches_the_representative() -> None:
    plan, _, weights = planned("llava-llama", replace(SETTINGS, rank="full"))
    for update in plan.updates:
        for edit, part in zip(update.edits, (1, 0), strict=True):
            aim = torch.stack([slices(weights, a.head)[part] for a in plan.anchors[update.heads[0]]]).mean(dim=0)
            assert torch.allclose(slices(weights, update.heads[0])[part] + edit.left @ edit.right, aim, atol=1e-5)


def test_targets_without_any_anchor_are_kept_in_the_plan() -> None:
    plan, _, _ = planned("llava-llama", replace(SETTINGS, beta=50))
    assert plan.targets
    assert not plan.updates
    assert all(anchors == [] for anchors in plan.anchors.values())


def test_a_head_that_equals_its_anchors_has_nothing_to_learn() -> None:
    profile, model = random_profile(), calibration_model("llava-llama")
    weights = HeadWeights(model)
    for layer in range(weights.layout.n_layers):
        for head in range(1, HEADS):
            for ours, first in zip(
                weights.of_head(Target(layer, head)), weights.of_head(Target(layer, 0)), strict=True
            ):
                ours.copy_(first)
    plan = make_plan(profile, weights, replace(SETTINGS, beta=0))
    assert plan.updates
    assert all(not update.edits for update in plan.updates)
