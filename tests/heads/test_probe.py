"""The averages of all heads and layers, read in one pass, and the output projections of the layers."""

import weakref
from functools import partial

import pytest
import torch
from tests.heads.test_capture_adapters import adapt
from tests.tiny_models import VLMS, text_batch, text_model, vlm

from llamafactory_hera.heads.families import decoder_layers, text_decoder
from llamafactory_hera.heads.probe import pooled_heads, projection_weights


def averages(model, module, batch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Runs a module of the model, and returns the averages over all tokens."""
    return pooled_heads(model, batch["attention_mask"].bool(), partial(module, **batch, use_cache=False))


@pytest.mark.parametrize("name", VLMS)
def test_the_text_decoder_of_a_vlm_runs_on_token_ids_alone(name):
    model = vlm(name).eval()
    heads, _ = averages(model, text_decoder(model), text_batch())
    assert all(of_layer.isfinite().all() for of_layer in heads)


def test_single_tokens_are_not_kept_in_memory():
    model = text_model("llama").eval()
    batch, entered = text_batch(), []
    for layer in decoder_layers(model):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: entered.append(weakref.ref(inputs[0])))

    def run() -> None:
        model(**batch)
        assert [reference() for reference in entered] == [None, None]

    pooled_heads(model, batch["attention_mask"].bool(), run)


@pytest.mark.parametrize("adapter", [None, {}, {"use_dora": True}], ids=["plain", "LoRA", "DoRA"])
def test_the_projection_of_a_layer_is_its_merged_weight(adapter):
    model = text_model("qwen3", attention_bias=True)
    if adapter is not None:
        model = adapt(model, lora_dropout=0.5, **adapter).eval()
    found, tolerance = list(projection_weights(model)), 0 if adapter is None else 1e-5
    merged = model if adapter is None else model.merge_and_unload()
    for weight, layer in zip(found, decoder_layers(merged), strict=True):
        torch.testing.assert_close(weight, layer.self_attn.o_proj.weight.data, atol=tolerance, rtol=10 * tolerance)


def test_the_projection_of_a_4_bit_layer_is_its_dequantized_weight():
    bnb = pytest.importorskip("bitsandbytes")
    model = text_model("llama").eval()
    layer = decoder_layers(model)[0]
    weight = layer.self_attn.o_proj.weight.data.clone()
    packed = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.self_attn.o_proj = packed.to("cpu")
    unpacked = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    torch.testing.assert_close(next(projection_weights(model)), unpacked.view_as(weight), atol=1e-6, rtol=1e-5)
