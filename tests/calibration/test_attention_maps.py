"""Captured attention flow against the attention that the model itself returns."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from llamafactory_hera.calibration.attention_maps import AttentionFlow
from llamafactory_hera.calibration.forward import Forward
from llamafactory_hera.calibration.saliency import attention_flow
from llamafactory_hera.heads.families import attention_module, decoder_layers, head_layout
from tests.tiny_models import HEADS, IMAGE, LAYERS, VLMS, vlm, vlm_batch


def attentions(model: nn.Module) -> list[nn.Module]:
    return [attention_module(layer, head_layout(model.config).model_type) for layer in decoder_layers(model)]


def captured(model: nn.Module, batch: dict[str, Any], bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    forward = Forward(model)
    with AttentionFlow(model, bins) as flow, torch.no_grad():
        flow.expect(*forward.modalities(batch))
        forward.run(batch)
        return flow.take()


@pytest.mark.parametrize("name", VLMS)
def test_flow_is_that_of_the_attention_that_the_model_returns(name: str) -> None:
    model = vlm(name).eval()
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    batch = vlm_batch(model, rows=3)
    n_image = int((batch["input_ids"][0] == IMAGE).sum())
    flow, maps = captured(model, batch, n_image)
    assert flow.shape == (3, LAYERS, HEADS)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        returned = model(**batch, output_attentions=True, use_cache=False).attentions
    for row in range(3):
        attended = batch["attention_mask"][row].bool()
        image = batch["input_ids"][row] == IMAGE
        text, image = (attended & ~image).nonzero().flatten(), image.nonzero().flatten()
        for layer in range(LAYERS):
            expected_flow, expected_maps = attention_flow(returned[layer][row], text, image)
            assert torch.allclose(flow[row, layer], expected_flow, atol=1e-7)
            assert torch.allclose(maps[row, layer], expected_maps, atol=1e-7)


def test_one_layer_of_attention_is_held_at_a_time() -> None:
    model = vlm("llava-llama", num_hidden_layers=5).eval()
    alive: list[weakref.ref] = []
    most = 0

    def count(_: nn.Module, __: Any, output: tuple) -> None:
        nonlocal most
        alive.append(weakref.ref(output[1]))
        most = max(most, sum(reference() is not None for reference in alive))

    for attention in attentions(model):
        attention.register_forward_hook(count)
    captured(model, vlm_batch(model), 4)
    assert len(alive) == 5
    assert most == 1


def test_the_model_is_left_as_it_was() -> None:
    model = vlm("llava-qwen3").eval()
    batch = vlm_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
    with pytest.raises(KeyError), AttentionFlow(model, 4):
        raise KeyError
    captured(model, batch, 4)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert not any(attention._forward_hooks for attention in attentions(model))
    assert all(attention.config._attn_implementation == "sdpa" for attention in attentions(model))


def test_the_vision_tower_keeps_its_attention() -> None:
    model = vlm("llava-llama").eval()
    with AttentionFlow(model, 4):
        assert model.config.text_config._attn_implementation == "eager"
        assert model.config.vision_config._attn_implementation == "sdpa"


def test_samples_do_not_depend_on_their_batch() -> None:
    model = vlm("llava-qwen2").eval()
    batch = vlm_batch(model, rows=3)
    together, _ = captured(model, batch, 4)
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        assert torch.allclose(captured(model, alone, 4)[0][0], together[row], atol=1e-7)
