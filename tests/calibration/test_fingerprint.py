"""The fingerprint of a model in memory changes with any change that an adapter can make."""

import pytest
import torch
from torch import nn

from llamafactory_hera.calibration.fingerprint import model_fingerprint
from tests.calibration.tiny import calibration_model

N = 256  # as in real models, a multiple of any even stride


def projection(dtype: torch.dtype = torch.float32, width: int = N) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(width, N, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def test_the_same_weights_have_the_same() -> None:
    assert model_fingerprint(calibration_model()) == model_fingerprint(calibration_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [N, 33])  # rows of 33 bf16 values are no whole number of words
def test_every_single_value_counts(dtype: torch.dtype, width: int) -> None:
    linear = projection(dtype, width)
    seen = {model_fingerprint(linear)}
    places = [(0, 0), (0, width - 1), (N - 1, 0), (100, 17), (101, 17), (100, 18), (7, 32)]
    for row, column in places:
        changed = projection(dtype, width)
        with torch.no_grad():
            changed.weight[row, column] *= 1.01
        seen.add(model_fingerprint(changed))
    with torch.no_grad():
        linear.bias[N - 1] *= 1.01
    seen.add(model_fingerprint(linear))
    assert len(seen) == len(places) + 2


def test_heads_in_another_order_count() -> None:
    linear, before = projection(), model_fingerprint(projection())
    for dim in (0, 1):
        with torch.no_grad():
            linear.weight.copy_(projection().weight.roll(64, dims=dim))
        assert model_fingerprint(linear) != before


def test_the_output_of_any_head_counts() -> None:
    """What a calibration changes: one head's columns, of a width that a stride over the flat weight would miss."""
    width = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    fingerprints = set()
    for head in range(-1, 8):
        model = calibration_model("llava-llama", **width)
        if head >= 0:
            with torch.no_grad():
                model.get_decoder().layers[1].self_attn.o_proj.weight[:, head * 32 : (head + 1) * 32].mul_(1.001)
        fingerprints.add(model_fingerprint(model))
    assert len(fingerprints) == 9


def test_weights_need_not_start_at_a_whole_word() -> None:
    flat = torch.randn(4 * 4 + 1)
    module = nn.Module()
    module.weight = nn.Parameter(flat[1:].view(4, 4))
    assert len(model_fingerprint(module)) == 64
