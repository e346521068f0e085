"""The parameters that each kind of recipe trains, as LLaMA-Factory decides on a full-size model without values."""

from typing import Any

import pytest
import transformers as tf

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS
from recipes.generate import recipes
from recipes.generate.sizes import SIZES

from ..backbones.full_size import on_meta, vlm_config

RECIPES = {recipe.name: recipe for recipe in recipes.all_recipes()}
BACKBONES = (*LANGUAGE_MODELS, *NATIVE_MODELS)


def trained(keys: dict[str, Any], key: str) -> dict[str, int]:
    """Names and sizes of the parameters that a run with these keys trains."""
    from llamafactory.hparams import get_train_args
    from llamafactory.model.adapter import init_adapter

    # sharding does not decide what is trained, and quantization needs values
    keys = {k: v for k, v in keys.items() if k != "deepspeed" and "quantization" not in k} | {"use_cpu": True}
    model_args, _, _, finetuning_args, _ = get_train_args(keys)
    model = on_meta(tf.AutoModelForImageTextToText, vlm_config(key))
    model = init_adapter(model.config, model, model_args, finetuning_args, is_trainable=True)
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_stage_1_trains_the_projector_only(key: str, values: dict) -> None:
    sizes = trained(values[f"{key}_pretrain"], key)
    assert all("multi_modal_projector" in name for name in sizes)
    assert sum(sizes.values()) == RECIPES[f"{key}_pretrain"].work.n_trained


@pytest.mark.parametrize("key", BACKBONES)
def test_full_recipes_train_the_llm_and_the_projector(key: str, values: dict) -> None:
    sizes, projector = trained(values[f"{key}_hera"], key), SIZES[key].projector
    parts = (projector, "language_model", "lm_head", "image_newline")
    assert all(any(part in name for part in parts) for name in sizes)
    assert any(projector in name for name in sizes)
    if key in LANGUAGE_MODELS:
        added = sum(sizes.values()) - RECIPES[f"{key}_hera"].work.n_trained
        assert 0 <= added <= 2 * 64 * SIZES[key].hidden  # rows for the image token


#: Adapters on hundreds of modules take seconds.
SOME = [pytest.param(key, marks=[] if key == "qwen3_vl_4b" else [pytest.mark.slow]) for key in BACKBONES]


@pytest.mark.parametrize("key", SOME)
def test_lora_recipes_train_adapters_of_the_llm_and_the_projector(key: str, values: dict) -> None:
    sizes = trained(values[f"{key}_hera_lora"], key)
    adapters = {name: size for name, size in sizes.items() if "lora_" in name}
    assert sum(adapters.values()) == SIZES[key].lora(recipes.LORA_RANK)
    rest = sizes.keys() - adapters.keys()
    assert rest
    assert all(f"{SIZES[key].projector}.modules_to_save" in name for name in rest)


@pytest.mark.slow
def test_qlora_trains_adapters_only(values: dict) -> None:
    sizes = trained(values["qwen2_5_vl_7b_hera_qlora"], "qwen2_5_vl_7b")
    assert all("lora_" in name for name in sizes)
    assert sum(sizes.values()) == RECIPES["qwen2_5_vl_7b_hera_qlora"].work.n_trained
