"""What each recipe trains, decided by the host on a model of full size on the meta device."""

from functools import cache
from typing import Any

import pytest
import transformers as tf
from torch import nn

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS

from ..backbones.full_size import SIZES, on_meta, recipes, vlm_config

RECIPES = {recipe.name: recipe for recipe in recipes.all_recipes()}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def meta_model(key: str) -> nn.Module:
    return on_meta(tf.AutoModelForImageTextToText, vlm_config(key))


#: Full tuning sets flags, so one model serves several recipes; adapters would stay.
shared_meta_model = cache(meta_model)

#: Adapters on hundreds of modules take seconds: all but one are with the slow tests.
QUICK = ("qwen3_vl_4b",)
LORA_KEYS = [
    pytest.param(key, marks=[] if key in QUICK else [pytest.mark.slow]) for key in (*LANGUAGE_MODELS, *NATIVE_MODELS)
]


def tuned(values: dict[str, Any], key: str) -> nn.Module:
    """The model as the host sets it up for training by these keys."""
    from llamafactory.hparams import get_train_args
    from llamafactory.model.adapter import init_adapter

    # sharding does not decide what is trained, and would want a process group
    keys = {name: value for name, value in values.items() if name != "deepspeed"} | {"use_cpu": True}
    model_args, _, _, finetuning_args, _ = get_train_args(keys)
    full = finetuning_args.finetuning_type == "full"
    model = shared_meta_model(key).requires_grad_(True) if full else meta_model(key)
    return init_adapter(model.config, model, model_args, finetuning_args, is_trainable=True)


def split(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Names and sizes of the trained parameters, and of the frozen ones."""
    sizes = [(name, p.numel(), p.requires_grad) for name, p in model.named_parameters()]
    return {n: size for n, size, on in sizes if on}, {n: size for n, size, on in sizes if not on}


def of(names: dict[str, int], *parts: str) -> set[str]:
    return {name for name in names if any(part in name for part in parts)}


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_stage_one_trains_the_projector_alone(key: str, values: dict) -> None:
    trained, frozen = split(tuned(values[f"{key}_pretrain"], key))
    assert set(trained) == {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert sum(trained.values()) == recipes.n_projector(SIZES[key]) == RECIPES[f"{key}_pretrain"].work.n_trained
    assert not of(frozen, "multi_modal_projector")


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
@pytest.mark.parametrize("kind", ["hera", "sft"])
def test_stage_two_trains_llm_and_projector(key: str, kind: str, values: dict) -> None:
    trained, frozen = split(tuned(values[f"{key}_{kind}"], key))
    assert of(trained, "language_model", "lm_head", "multi_modal_projector") == set(trained)
    assert of(frozen, "vision_tower") == set(frozen)
    added = sum(trained.values()) - RECIPES[f"{key}_{kind}"].work.n_trained
    assert 0 <= added <= 2 * 64 * SIZES[key].hidden  # rows for the image token
    assert sum(frozen.values()) == RECIPES[f"{key}_{kind}"].work.n_frozen


@pytest.mark.parametrize("key", LORA_KEYS)
def test_lora_trains_adapters_of_the_llm_and_the_projector(key: str, values: dict) -> None:
    trained, _ = split(tuned(values[f"{key}_hera_lora"], key))
    adapters = of(trained, "lora_")
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapters} == LINEAR
    assert len(adapters) == 2 * len(LINEAR) * SIZES[key].layers
    assert of(trained, "vision", "visual") <= of(trained, values[f"{key}_hera_lora"]["additional_target"])
    assert sum(trained[name] for name in adapters) == SIZES[key].lora(recipes.LORA_RANK)
    rest = set(trained) - adapters
    assert rest
    assert rest == of(trained, f"{values[f'{key}_hera_lora']['additional_target']}.modules_to_save")
    if key in LANGUAGE_MODELS:
        assert sum(trained.values()) == RECIPES[f"{key}_hera_lora"].work.n_trained


@pytest.mark.parametrize("key", NATIVE_MODELS)
def test_a_native_model_trains_llm_and_projector(key: str, values: dict) -> None:
    trained, frozen = split(tuned(values[f"{key}_hera"], key))
    projector = SIZES[key].projector
    assert of(trained, projector)
    assert of(trained, "language_model", "lm_head", projector, "image_newline") == set(trained)
    assert not of(frozen, "language_model", "lm_head", f"{projector}.")
    assert of(frozen, "vision", "visual") == set(frozen)


@pytest.mark.slow
def test_qlora_trains_adapters_alone(values: dict) -> None:
    # the same keys without the quantization, which needs weights
    keys = {k: v for k, v in values["qwen2_5_vl_7b_hera_qlora"].items() if "quantization" not in k}
    trained, _ = split(tuned(keys, "qwen2_5_vl_7b"))
    assert of(trained, "lora_") == set(trained)
    assert sum(trained.values()) == RECIPES["qwen2_5_vl_7b_hera_qlora"].work.n_trained
