"""Compares the table of backbones with full-size models on the meta device."""

from pathlib import Path

import pytest
import transformers as tf
from torch import nn

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS
from llamafactory_hera.heads import Targets
from llamafactory_hera.heads.families import decoder_layers, head_layout, text_decoder
from recipes.generate import coverage
from recipes.generate.sizes import SIZES

from .full_size import on_meta, text_config, vlm_config


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_layers(model: nn.Module, key: str) -> None:
    layers, layout, sizes = decoder_layers(model), head_layout(model.config), SIZES[key]
    assert len(layers) == layout.n_layers == sizes.layers
    for layer, heads in zip(layers, layout.layers, strict=True):
        if heads.mixer == "attention":
            # the global layers of Gemma 4 have wider heads
            width = sizes.head_dim * (2 if heads.head_dim == 512 else 1)
            assert (heads.n_heads, heads.head_dim) == (sizes.heads, width)
            assert layer.self_attn.o_proj.weight.shape == (sizes.hidden, sizes.heads * width)
        if heads.mixer == "attention" and hasattr(layer.self_attn, "v_proj"):
            assert layer.self_attn.v_proj.weight.shape == (sizes.kv_heads * width, sizes.hidden)
    linear = [module for module in text_decoder(model).modules() if isinstance(module, nn.Linear)]
    assert sum(module.in_features + module.out_features for module in linear) == sizes.lora(1)


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_the_heads_of_the_paper_exist_in_the_built_model(key):
    sizes = SIZES[key]
    assert count(on_meta(tf.AutoModelForCausalLM, text_config(key))) == sizes.n_parameters
    model = on_meta(tf.AutoModelForImageTextToText, vlm_config(key))
    check_layers(model, key)
    heads = Targets.parse(LANGUAGE_MODELS[key].heads)
    heads.check(head_layout(model.config))
    assert len(heads.items) == 5
    rows = model.get_input_embeddings().num_embeddings
    assert rows % 64 == 0
    assert rows > model.config.image_token_index
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == sizes.tied
    added = (rows - sizes.vocabulary) * sizes.hidden * (1 if sizes.tied else 2)
    other_parts = count(model.model.multi_modal_projector) + count(model.model.vision_tower)
    assert count(model) == sizes.n_parameters + added + other_parts


@pytest.mark.parametrize("key", NATIVE_MODELS)
def test_a_native_model_has_the_sizes_in_the_table(key):
    model = on_meta(tf.AutoModelForImageTextToText, vlm_config(key))
    assert count(model) == SIZES[key].n_parameters
    check_layers(model, key)
    assert len([name for name, _ in model.named_modules() if name.endswith(SIZES[key].projector)]) == 1


def test_the_page_contains_the_table():
    page = (Path(__file__).parents[2] / "docs/backbones.md").read_text(encoding="utf-8")
    for key, model in LANGUAGE_MODELS.items():
        sizes = SIZES[key]
        cells = [f"`{key}`", model.checkpoint, sizes.layers, sizes.heads, sizes.kv_heads, sizes.head_dim]
        cells += [f"`{model.template}`", model.heads.replace(",", " ")]
        assert f"| {' | '.join(map(str, cells))} |" in page


def test_the_page_lists_the_models_of_the_installed_transformers():
    page = (Path(__file__).parents[2] / "docs/backbones.md").read_text(encoding="utf-8")
    assert len(coverage.read_types()[0]) >= 55  # may only grow
    if f"\ntransformers {tf.__version__} has" in page:
        assert f"{coverage.MARKS[0]}\n{coverage.table()}\n{coverage.MARKS[1]}" in page
