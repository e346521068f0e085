"""Trying updates in place, and giving the weights back."""

import pytest
import torch

from llamafactory_hera.calibration.edits import Edit, Update, applied
from llamafactory_hera.calibration.weights import HeadWeights
from llamafactory_hera.heads import Target
from tests.calibration.tiny import calibration_model


def updates(weights: HeadWeights) -> list[tuple[Update, float]]:
    hidden, d = weights.layout.hidden_size, weights.layout.head_dim
    output = Edit(1, "output", 3, torch.randn(hidden, 2), torch.randn(2, d))
    value = Edit(0, "value", 2, torch.randn(d, 3), torch.randn(3, hidden))
    return [(Update((Target(1, 3),), (output,)), 0.1), (Update((Target(0, 2),), (value,)), 0.05)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_named_slices_change_and_only_meanwhile(dtype: torch.dtype) -> None:
    model = calibration_model().to(dtype)
    weights = HeadWeights(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = updates(weights)
    expected = {name: value.clone() for name, value in before.items()}
    layers = "model.language_model.layers"
    for (update, alpha), key in zip(steps, ("1.self_attn.o_proj", "0.self_attn.v_proj"), strict=True):
        (edit,) = update.edits
        rows = slice(edit.index * 8, edit.index * 8 + 8)
        block = (slice(None), rows) if edit.part == "output" else (rows, slice(None))
        name = f"{layers}.{key}.weight"
        expected[name][block] = (before[name][block].float() + alpha * (edit.left @ edit.right)).to(dtype)
        assert not torch.equal(expected[name], before[name])
    with applied(weights, steps):
        changed = model.state_dict()
        assert all(torch.equal(changed[name], expected[name]) for name in expected)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_weights_come_back_after_an_error() -> None:
    model = calibration_model()
    weights = HeadWeights(model)
    before = weights.slice(1, "output", 3).clone()
    with pytest.raises(KeyError), applied(weights, updates(weights)):
        raise KeyError
    assert torch.equal(weights.slice(1, "output", 3), before)
