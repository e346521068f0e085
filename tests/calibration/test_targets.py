"""Target selection against percentiles that numpy takes (eq. 6 and 7), and its ablations."""

import numpy as np
import torch

from llamafactory_hera.calibration.targets import choose_targets
from llamafactory_hera.heads import Target

LAYERS, HEADS = 6, 32


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(LAYERS, HEADS).double(), torch.randn(LAYERS, HEADS).double()


def naive(saliency: torch.Tensor, influence: torch.Tensor, layers: list[int], p_isal: float, p_caf: float) -> set:
    chosen = set()
    for layer in layers:
        low = np.percentile(saliency[layer].numpy(), p_isal)
        high = np.percentile(influence[layer].numpy(), p_caf)
        for head in range(HEADS):
            if saliency[layer, head] < low and influence[layer, head] > high:
                chosen.add((layer, head))
    return chosen


def test_targets_are_weak_and_influential_in_their_layer() -> None:
    saliency, influence = scores()
    chosen = choose_targets(saliency, influence, [0, 2, 3], 40.0, 60.0)
    assert set(chosen) == naive(saliency, influence, [0, 2, 3], 40.0, 60.0)
    assert chosen


def test_targets_come_with_the_highest_caf_first() -> None:
    saliency, influence = scores()
    chosen = choose_targets(saliency, influence, range(LAYERS), 40.0, 60.0)
    caf = [influence[head].item() for head in chosen]
    assert caf == sorted(caf, reverse=True)


def test_without_caf_the_first_condition_alone_decides() -> None:
    saliency, influence = scores()
    chosen = choose_targets(saliency, influence, range(LAYERS), 15.0, 70.0, rule="no_caf")
    expected = {(layer, int(head)) for layer in range(LAYERS) for head in saliency[layer].argsort()[:5]}
    assert set(chosen) == expected


def test_inverse_targets_are_the_most_cross_modal() -> None:
    saliency, influence = scores()
    inverse = choose_targets(saliency, influence, range(LAYERS), 40.0, 60.0, rule="inverse")
    assert set(inverse) == naive(-saliency, influence, list(range(LAYERS)), 40.0, 60.0)


def test_random_targets_are_as_many_in_each_layer_and_depend_on_the_seed_alone() -> None:
    saliency, influence = scores()
    paper = choose_targets(saliency, influence, range(LAYERS), 40.0, 60.0)
    drawn = [choose_targets(saliency, influence, range(LAYERS), 40.0, 60.0, "random", seed) for seed in (0, 0, 1)]
    assert sorted(head.layer for head in drawn[0]) == sorted(head.layer for head in paper)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == len(paper)


def test_equal_heads_have_no_outlier() -> None:
    assert choose_targets(torch.zeros(2, 4), torch.randn(2, 4), [0, 1], 15.0, 70.0) == []


def test_heads_are_named_by_layer_and_head() -> None:
    saliency = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, -3.0]])
    influence = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    assert choose_targets(saliency, influence, [0, 1], 15.0, 70.0) == [Target(1, 2)]
