"""The margin loss and CAF against the paper's formulas (eq. 5)."""

import pytest
import torch

from llamafactory_hera.calibration.influence import causal_attention_flow, margin_loss


def test_margin_loss_is_the_log_ratio_of_the_two_largest_probabilities() -> None:
    logits = torch.randn(2, 5, 9) * 3
    positions = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()
    for row, loss in enumerate(margin_loss(logits, positions)):
        ratios = []
        for t in range(5):
            if positions[row, t]:
                first, second, *_ = sorted(logits[row, t].softmax(dim=0).tolist(), reverse=True)
                ratios.append(torch.tensor(first / second).log().item())
        assert loss.item() == pytest.approx(-sum(ratios) / len(ratios), rel=1e-5)


def test_logits_outside_of_the_positions_have_no_influence() -> None:
    logits = torch.randn(1, 3, 4)
    positions = torch.tensor([[True, False, True]])
    changed = logits.clone()
    changed[0, 1] = torch.nan
    assert torch.equal(margin_loss(logits, positions), margin_loss(changed, positions))


def test_caf_is_the_mean_gradient_and_its_weighted_mean_square() -> None:
    gradients = torch.randn(6, 2, 3)
    caf = causal_attention_flow(gradients, 0.5)
    for layer in range(2):
        for head in range(3):
            values = gradients[:, layer, head].tolist()
            expected = sum(values) / 6 + 0.5 * sum(value**2 for value in values) / 6
            assert caf[layer, head].item() == pytest.approx(expected, rel=1e-5)


def test_the_first_term_keeps_its_sign() -> None:
    gradients = torch.tensor([[[-1.0, 1.0]]])
    assert causal_attention_flow(gradients, 0.0).tolist() == [[-1.0, 1.0]]
