"""The generator of recipes, and configurations of the table's models at full size, for the meta device."""

from typing import Any

import torch
import transformers as tf
from torch import nn

from llamafactory_hera.backbones.build import padded_vocabulary
from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from recipes.generate import ablations, memory, recipes
from recipes.generate.sizes import SIZES

__all__ = ["NATIVE", "SIZES", "VISION", "ablations", "memory", "on_meta", "recipes", "text_config", "vlm_config"]

#: Configuration of the paper's vision encoder: 27 x 27 patch tokens, no CLS token.
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
#: Checkpoint's template -> type of the language model's configuration, and entries of its tokenizer.
_LANGUAGE = {
    "llava_qwen2_5": ("qwen2", 151665),
    "llava_qwen3": ("qwen3", 151669),
    "llava_vicuna": ("llama", 32000),
    "llava_llama3": ("llama", 128256),
}
#: Key -> types of the whole and of the text configuration, further entries of the text half, and the vision half's.
NATIVE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None]] = {
    "qwen2_5_vl_7b": (
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
    "qwen3_vl_4b": (
        "qwen3_vl",
        "qwen3_vl_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}},
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    ),
    "llava_1_5_7b": ("llava", "llama", {}, None),
    "llava_next_7b": ("llava_next", "mistral", {"sliding_window": None}, None),
    "internvl3_8b": (
        "internvl",
        "qwen2",
        {},
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
    ),
    "gemma3_4b": ("gemma3", "gemma3_text", {}, VISION | {"image_size": 896}),
}


def text_config(key: str) -> dict[str, Any]:
    """The entries of a model's text configuration."""
    sizes = SIZES[key]
    template = LANGUAGE_MODELS[key].template if key in LANGUAGE_MODELS else None
    model_type, extra = (_LANGUAGE[template][0], {}) if template else NATIVE[key][1:3]
    return {
        "model_type": model_type,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": sizes.tied,
        **extra,
    }


def vlm_config(key: str) -> dict[str, Any]:
    """The entries of a finished VLM's configuration, or of the LLaVA-style one that `build` makes of an LLM."""
    text = text_config(key)
    whole = {"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}
    if key in NATIVE:
        model_type, _, _, vision = NATIVE[key]
        return {"model_type": model_type, **whole, **({"vision_config": vision} if vision else {})}
    tokens = _LANGUAGE[LANGUAGE_MODELS[key].template][1]
    text["vocab_size"] = padded_vocabulary(text["vocab_size"], tokens + 1)
    return {
        "model_type": "llava",
        **whole,
        "vision_config": VISION,
        "image_token_index": tokens,
        "image_seq_length": 729,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def on_meta(auto_class: Any, values: dict[str, Any]) -> nn.Module:
    """A model without values."""
    config = tf.AutoConfig.for_model(**values)
    with torch.device("meta"):
        return auto_class.from_config(config, dtype=torch.bfloat16)
