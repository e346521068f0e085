"""The table of backbones, against models of full size on the meta device."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from llamafactory_hera.backbones.entries import padded_vocabulary
from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS, VISION_CONFIG
from llamafactory_hera.heads import HeadSet
from llamafactory_hera.heads.families import decoder_layers, head_layout, output_projection


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(auto_class: type, model_type: str, values: dict) -> nn.Module:
    config = tf.AutoConfig.for_model(model_type, **{k: v for k, v in values.items() if k != "model_type"})
    with torch.device("meta"):
        return auto_class.from_config(config)


def check_layers(model: nn.Module, sizes) -> None:
    layers, layout = decoder_layers(model), head_layout(model.config)
    assert len(layers) == layout.n_layers == sizes.layers
    assert (layout.n_heads, layout.n_kv_heads, layout.head_dim) == (sizes.heads, sizes.kv_heads, sizes.head_dim)
    for layer in layers:
        assert output_projection(layer, sizes.model_type).weight.shape == (sizes.hidden, sizes.heads * sizes.head_dim)
        assert layer.self_attn.v_proj.weight.shape == (sizes.kv_heads * sizes.head_dim, sizes.hidden)


@pytest.mark.parametrize("backbone", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_a_language_model_has_the_sizes_of_the_table(backbone) -> None:
    model = on_meta(tf.AutoModelForCausalLM, backbone.text.model_type, backbone.text.config())
    assert count(model) == backbone.n_parameters
    check_layers(model, backbone.text)


@pytest.mark.parametrize("backbone", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_the_papers_heads_exist_in_the_assembled_model(backbone) -> None:
    model = on_meta(tf.AutoModelForImageTextToText, "llava", backbone.llava_config(VISION_CONFIG))
    check_layers(model, backbone.text)
    layout = head_layout(model.config)
    heads = HeadSet.parse(backbone.heads)
    heads.check(layout.n_layers, layout.n_heads)
    assert len(heads.heads) == 5
    assert model.get_input_embeddings().num_embeddings % 64 == 0
    assert model.get_input_embeddings().num_embeddings > model.config.image_token_index == backbone.tokens
    assert model.config.image_seq_length == 729
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == backbone.text.tied
    projector = count(model.model.multi_modal_projector)
    assert projector == 1152 * backbone.text.hidden + backbone.text.hidden**2 + 2 * backbone.text.hidden
    added = model.get_input_embeddings().num_embeddings - backbone.text.vocabulary
    rows = added * backbone.text.hidden * (1 if tied else 2)
    assert count(model) == backbone.n_parameters + rows + projector + count(model.model.vision_tower)


@pytest.mark.parametrize("backbone", NATIVE_MODELS.values(), ids=NATIVE_MODELS)
def test_a_native_model_has_the_sizes_of_the_table(backbone) -> None:
    model = on_meta(tf.AutoModelForImageTextToText, backbone.model_type, backbone.config())
    assert count(model) == backbone.n_parameters
    check_layers(model, backbone.text)
    named = [name for name, _ in model.named_modules() if name.endswith(backbone.projector)]
    assert len(named) == 1, named


@pytest.mark.parametrize(
    "rows, tokens, expected", [(32000, 32001, 32064), (128256, 128257, 128320), (151936, 151666, 151936), (64, 64, 64)]
)
def test_the_vocabulary_grows_to_a_multiple_of_64_only_where_it_must(rows: int, tokens: int, expected: int) -> None:
    assert padded_vocabulary(rows, tokens) == expected


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/backbones.md").read_text(encoding="utf-8")
    for model in LANGUAGE_MODELS.values():
        sizes = model.text
        cells = [f"`{model.key}`", model.checkpoint, sizes.layers, sizes.heads, sizes.kv_heads, sizes.head_dim]
        cells += [f"`{model.template}`", model.heads.replace(",", " ")]
        assert f"| {' | '.join(map(str, cells))} |" in page
