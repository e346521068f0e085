"""Configurations of the models in the table at full size, for models on the meta device."""

from typing import Any

import torch
import transformers as tf
from torch import nn

from llamafactory_hera.backbones.build import padded_vocabulary
from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from recipes.generate.sizes import SIZES

_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
#: The configuration of the paper's vision encoder: 27 x 27 patch tokens, no CLS token.
VISION = dict(zip(_WIDTHS, (1152, 4304, 27, 16, 384, 14), strict=True))
VISION |= {"model_type": "siglip_vision_model", "vision_use_head": False}
# By training template: the type of the language model's configuration, and the size of its tokenizer.
_LANGUAGE = {"llava_qwen2_5": ("qwen2", 151665), "llava_qwen3": ("qwen3", 151669)}
_LANGUAGE |= {"llava_vicuna": ("llama", 32000), "llava_llama3": ("llama", 128256)}


def _qwen_vision(depth: int, hidden: int, intermediate: int, output: int, **layers: list[int]) -> dict[str, Any]:
    sizes = {"depth": depth, "hidden_size": hidden, "intermediate_size": intermediate, "out_hidden_size": output}
    return sizes | {"num_heads": 16, **layers}


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_DEEPSTACK = {"deepstack_visual_indexes": [8, 16, 24]}
#: By key: the model type of the VLM, some entries of its text config, and its vision config.
_NATIVE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl_7b": ("qwen2_5_vl", _rope(16, 24, 24), _qwen_vision(32, 1280, 3420, 3584)),
    "qwen3_vl_4b": (
        "qwen3_vl", _rope(24, 20, 20), _qwen_vision(24, 1024, 4096, 2560, deepstack_visual_indexes=[5, 11, 17])
    ),
    "qwen3_vl_8b": ("qwen3_vl", _rope(24, 20, 20), _qwen_vision(27, 1152, 4304, 4096, **_DEEPSTACK)),
    "qwen3_vl_30b_a3b": ("qwen3_vl_moe", _EXPERTS, _qwen_vision(27, 1152, 4304, 2048, **_DEEPSTACK)),
    "qwen3_5_4b": ("qwen3_5", {}, _qwen_vision(24, 1024, 4096, 2560)),
    "qwen3_5_9b": ("qwen3_5", {}, _qwen_vision(27, 1152, 4304, 4096)),
    "llava_1_5_7b": ("llava", {"model_type": "llama"}, {}),
    "llava_next_7b": ("llava_next", {"model_type": "mistral", "sliding_window": None}, {}),
    "internvl3_8b": ("internvl", {"model_type": "qwen2"}, {"attention_bias": True}),
    "internvl3_5_8b": ("internvl", {"model_type": "qwen3"}, {"attention_bias": True}),
    "gemma3_4b": ("gemma3", {}, VISION | {"image_size": 896}),
    "gemma4_e4b": ("gemma4", {"num_kv_shared_layers": 18}, {"use_clipped_linears": True}),
    "glm4_1v_9b": ("glm4v", {}, {}),
}  # fmt: skip


def text_config(key: str) -> dict[str, Any]:
    """Returns the entries of a model's text configuration."""
    sizes = SIZES[key]
    llm = LANGUAGE_MODELS.get(key)
    kind = {"model_type": _LANGUAGE[llm.template][0] if llm else f"{_NATIVE[key][0]}_text"}
    special = {} if llm else _NATIVE[key][1]
    attention = {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
    widths = {"hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate, "vocab_size": sizes.vocabulary}
    return attention | widths | {"num_hidden_layers": sizes.layers, "tie_word_embeddings": sizes.tied} | kind | special


def vlm_config(key: str) -> dict[str, Any]:
    """Returns the entries of the configuration of an existing VLM, or of the model that `build` makes from an LLM."""
    text = text_config(key)
    both = {"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}
    if key in _NATIVE:
        model_type, _, vision = _NATIVE[key]
        audio = {"audio_config": {"model_type": "gemma4_audio"}} if model_type == "gemma4" else {}
        return {"model_type": model_type, **both, **({"vision_config": vision} if vision else {}), **audio}
    tokens = _LANGUAGE[LANGUAGE_MODELS[key].template][1]
    text["vocab_size"] = padded_vocabulary(text["vocab_size"], tokens + 1)
    return {
        "model_type": "llava",
        **both,
        "vision_config": VISION,
        "image_token_index": tokens,
        "image_seq_length": 729,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def on_meta(auto_class: Any, values: dict[str, Any]) -> nn.Module:
    """Makes a model whose parameters have shapes but no values."""
    config = tf.AutoConfig.for_model(**values)
    with torch.device("meta"):
        return auto_class.from_config(config, dtype=torch.bfloat16)
