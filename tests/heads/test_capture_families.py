"""Heads and layers of every text family, bare and inside a VLM, compared with the model's own blocks."""

import pytest
import torch
from tests.head_reference import check_heads, check_layers, check_pooled
from tests.tiny_models import (
    BARE,
    HEADS,
    IMAGE,
    LAYERS,
    TEXT_CONFIGS,
    UNKNOWN,
    VLMS,
    text_batch,
    text_model,
    vlm,
    vlm_batch,
)

from llamafactory_hera.heads.capture import HeadCapture
from llamafactory_hera.heads.families import FAMILIES, decoder_layers, head_layout, media_token_ids

READERS = [check_heads, check_layers, check_pooled]
every_reader = pytest.mark.parametrize("check", READERS, ids=lambda c: c.__name__)


@pytest.mark.parametrize("model_type", BARE)
def test_heads_and_layers_of_a_bare_decoder_match_its_blocks(model_type):
    model, batch = text_model(model_type), text_batch()
    layout = head_layout(model.config)
    assert (layout.model_type, layout.n_layers) == (model_type, LAYERS)
    assert layout.layers[1].n_heads == HEADS
    mask = batch["attention_mask"].bool()
    mask[:, :3] = False
    # the layers of Gemma 3n return several streams
    for check in [check_heads] if model_type == "gemma3n_text" else READERS:
        check(model, batch, mask)


@pytest.mark.parametrize("name", VLMS)
def test_heads_and_layers_of_a_decoder_inside_a_vlm_match_its_blocks(name):
    model = vlm(name)
    batch = vlm_batch(model)
    mask = batch["attention_mask"].bool()
    mask[:, :3] = False  # some tokens of the image and all of the text
    for check in READERS:
        check(model, batch, mask)


def test_every_family_appears_inside_a_vlm_with_known_image_placeholders():
    configs = [vlm(name).config for name in VLMS if name not in UNKNOWN]
    missing = {"gemma3n_text", *(f"{name}_text" for name in UNKNOWN)}
    assert {head_layout(config).model_type for config in configs} == FAMILIES - missing
    assert TEXT_CONFIGS.keys() == FAMILIES
    for config in configs:
        assert IMAGE in media_token_ids(config)
        assert not media_token_ids(config.get_text_config())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_vl_text", "gemma2", "gemma3_text"])
def test_the_bias_of_the_output_projection_belongs_to_no_head(model_type):
    model, batch = text_model(model_type, attention_bias=True), text_batch()
    for layer in decoder_layers(model):
        assert layer.self_attn.o_proj.bias.abs().max() > 0.01
    check_heads(model, batch, batch["attention_mask"].bool())


@every_reader
def test_left_padding_and_a_row_without_tokens_are_read_correctly(check):
    model = text_model("qwen3")
    ids = torch.randint(3, 50, (3, 8))
    attended = torch.ones_like(ids)
    attended[0, :4] = attended[1, :1] = 0
    mask = attended.bool()
    mask[:, -2:] = False
    mask[2] = False
    check(model, {"input_ids": ids, "attention_mask": attended}, mask)


@every_reader
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_weights_are_read_correctly(dtype, tolerance, check):
    model, batch = text_model("qwen3").to(dtype), text_batch()
    check(model, batch, batch["attention_mask"].bool(), tolerance=tolerance)


def test_autocast_gives_bfloat16_representations():
    model, batch = text_model("qwen3"), text_batch()
    mask = batch["attention_mask"].bool()
    with HeadCapture(model, "L0H1,L1H2") as capture:
        capture.pool(mask)
        model(**batch)
        expected = capture.representations()
        capture.pool(mask)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
        got = capture.representations()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())
