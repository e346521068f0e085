"""I-SAL against the sums that the paper writes (eq. 3 and 4)."""

import pytest
import torch

from llamafactory_hera.calibration.saliency import attention_flow, resize_map, standardize

TEXT, IMAGE = [0, 4, 5], [1, 2, 3, 6]


def causal_attention(heads: int = 5, length: int = 7) -> torch.Tensor:
    scores = torch.randn(heads, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return scores.softmax(dim=-1)


def test_flow_is_the_mean_of_both_directions() -> None:
    attention = causal_attention()
    flow, maps = attention_flow(attention, torch.tensor(TEXT), torch.tensor(IMAGE))
    for head in range(len(attention)):
        to_image = sum(attention[head, i, j] for i in TEXT for j in IMAGE) / (len(TEXT) * len(IMAGE))
        to_text = sum(attention[head, i, j] for i in IMAGE for j in TEXT) / (len(IMAGE) * len(TEXT))
        assert flow[head] == pytest.approx((0.5 * (to_image + to_text)).item(), rel=1e-6)
        expected = [sum(attention[head, i, j] for i in TEXT) / len(TEXT) for j in IMAGE]
        assert torch.allclose(maps[head], torch.stack(expected))


def test_image_tokens_give_nothing_to_the_text_behind_them() -> None:
    attention = causal_attention()
    image, behind = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6])
    flow, maps = attention_flow(attention, behind, image)
    assert torch.allclose(flow, maps.mean(dim=1) / 2)


def test_half_precision_weights_are_averaged_in_single_precision() -> None:
    attention = (torch.rand(2, 200, 200) * 1e-2).bfloat16()
    text, image = torch.arange(150), torch.arange(150, 200)
    flow, maps = attention_flow(attention, text, image)
    exact_flow, exact_maps = attention_flow(attention.float(), text, image)
    assert torch.equal(flow, exact_flow)
    assert torch.equal(maps, exact_maps)


def test_a_map_keeps_its_mass_and_its_length_where_it_fits() -> None:
    maps = torch.rand(3, 10)
    assert torch.equal(resize_map(maps, 10), maps)
    assert torch.allclose(resize_map(maps, 5), maps.unflatten(1, (5, 2)).sum(dim=2))


def test_standard_scores_of_each_layer() -> None:
    saliency = torch.rand(3, 8) * 1e-3  # attention weights over hundreds of tokens are small
    scores = standardize(saliency)
    for layer in range(3):
        row = saliency[layer].double()
        mean = sum(row) / 8
        deviation = (sum((value - mean) ** 2 for value in row) / 8) ** 0.5
        assert torch.allclose(scores[layer], (row - mean) / deviation, rtol=1e-6)


def test_equal_heads_stand_at_zero() -> None:
    assert torch.equal(standardize(torch.full((2, 4), 0.25)), torch.zeros(2, 4, dtype=torch.double))
