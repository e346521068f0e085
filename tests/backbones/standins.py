"""Tiny random stand-ins for the existing VLMs of the recipes, with real special tokens, templates and processors."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from llamafactory_hera.backbones.build import build_backbone

from .tiny import CHAT_TEMPLATES, SQUARE, VISION, byte_level, save_language_model, save_tower, text_sizes


def _save(name: str, config: Any, processor: Any, folder: Path) -> None:
    getattr(tf, f"{name}ForConditionalGeneration")(config).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _qwen_vl(folder: Path, name: str, patch: int, vision: dict[str, Any], processor: str = "", **text: Any) -> None:
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks]
    tokenizer = byte_level(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = getattr(tf, f"{name}Config")(
        text_config=text_sizes(tokenizer, **{"rope_parameters": rope} | text),
        vision_config=vision | {"depth": 2, "num_heads": 2, "patch_size": patch},
        **dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True)),
    )
    pixels = {"patch_size": patch, "size": {"shortest_edge": 4 * patch * patch, "longest_edge": 64 * patch * patch}}
    kind = processor or name
    videos = getattr(tf, f"{kind.replace('2_5_', '2')}VideoProcessor")(**pixels)
    _save(name, config, getattr(tf, f"{kind}Processor")(tf.Qwen2VLImageProcessor(**pixels), tokenizer, videos), folder)


def _qwen2_5_vl(folder: Path) -> None:
    # This model is also used for QLoRA, whose 4-bit quantization needs blocks of 64 values.
    vision = {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64}
    _qwen_vl(folder, "Qwen2_5_VL", 14, vision | {"fullatt_block_indexes": [1], "window_size": 28}, hidden_size=64)


_HALF_ROPE: dict[str, Any] = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_HALF_ROPE["rope_parameters"] |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_QWEN3_VISION = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48, "num_position_embeddings": 16}


def _qwen3_vl(folder: Path) -> None:
    _qwen_vl(folder, "Qwen3VL", 16, _QWEN3_VISION | {"deepstack_visual_indexes": [0]}, head_dim=16)


def _qwen3_vl_moe(folder: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    vision = _QWEN3_VISION | {"deepstack_visual_indexes": [0]}
    _qwen_vl(folder, "Qwen3VLMoe", 16, vision, "Qwen3VL", head_dim=16, **experts)


def _qwen3_5(folder: Path) -> None:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2}
    _qwen_vl(folder, "Qwen3_5", 16, _QWEN3_VISION, "Qwen3VL", num_hidden_layers=4, **linear, **_HALF_ROPE)


def _glm4v(folder: Path) -> None:
    marks = ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>"]
    specials = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    specials += ["<think>", "</think>", "</answer>", *marks, "<|end_of_video|>"]
    tokenizer = byte_level(specials, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id")
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
    config = tf.Glm4vConfig(
        text_config=text_sizes(tokenizer, **_HALF_ROPE),
        vision_config=vision | {"image_size": 56},
        **dict(zip(names, tokenizer.convert_tokens_to_ids(marks[:4]), strict=True)),
    )
    pixels = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    processor = tf.Glm4vProcessor(tf.Glm4vImageProcessor(**pixels), tokenizer, tf.Glm4vVideoProcessor(**pixels))
    _save("Glm4v", config, processor, folder)


def _llava_1_5(folder: Path) -> None:
    llm = save_language_model("vicuna", folder.with_name(f"{folder.name}_llm"))
    tower = save_tower("clip", folder.with_name(f"{folder.name}_tower"))
    build_backbone(str(llm), str(tower), folder)


def _llava_next(folder: Path) -> None:
    tokenizer = byte_level(["<s>", "</s>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="</s>")
    grid = [[32, 64], [64, 32]]
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.MistralConfig(**text_sizes(tokenizer, head_dim=16)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        vision_feature_select_strategy="default",
    )
    sizes = {"size": {"shortest_edge": 32}, "crop_size": SQUARE, "image_grid_pinpoints": grid}
    layout = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    _save("LlavaNext", config, tf.LlavaNextProcessor(tf.LlavaNextImageProcessor(**sizes), tokenizer, **layout), folder)


def _internvl3(folder: Path, text: Any = tf.Qwen2Config) -> None:
    marks = {"start_image_token": "<img>", "end_image_token": "</img>"}
    marks |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks.values()]
    tokenizer = byte_level(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=marks)
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**VISION | {"image_size": [32, 32], "patch_size": [8, 8]}),
        text_config=text(**text_sizes(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images, videos = tf.GotOcr2ImageProcessor(size=SQUARE), tf.InternVLVideoProcessor(size=SQUARE)
    _save("InternVL", config, tf.InternVLProcessor(images, tokenizer, videos, image_seq_length=4), folder)


def _gemma3(folder: Path) -> None:
    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *marks.values()]
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = byte_level(specials, **named, extra_special_tokens=marks)
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**text_sizes(tokenizer, head_dim=16)),
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        **{f"{name}_index": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )
    processor = tf.Gemma3Processor(tf.Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)
    _save("Gemma3", config, processor, folder)


def _gemma4(folder: Path) -> None:
    marks = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    marks |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    specials = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|video|>"]
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = byte_level([*specials, *marks.values()], **named, extra_special_tokens=marks)
    # the last two layers use the keys and values of the first two, as in E2B and E4B
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    shared |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 32}
    shared["vocab_size_per_layer_input"] = len(tokenizer)
    vision = VISION | {"head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 256}
    ids = {f"{name.replace('token', 'token_id')}": tokenizer.convert_tokens_to_ids(m) for name, m in marks.items()}
    config = tf.Gemma4Config(
        text_config=tf.Gemma4TextConfig(**text_sizes(tokenizer, head_dim=16, **shared)),
        vision_config=tf.Gemma4VisionConfig(**vision),
        audio_config=None,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        **ids,
    )
    images = {"patch_size": 8, "max_soft_tokens": 70}
    parts = tf.Gemma4AudioFeatureExtractor(), tf.Gemma4ImageProcessor(**images), tokenizer
    _save("Gemma4", config, tf.Gemma4Processor(*parts, tf.Gemma4VideoProcessor(**images)), folder)


#: Maps the key of an existing VLM in the table to the function that saves its stand-in in a folder.
NATIVE = {"qwen2_5_vl_7b": _qwen2_5_vl, "qwen3_vl_4b": _qwen3_vl, "llava_1_5_7b": _llava_1_5}
NATIVE |= {"llava_next_7b": _llava_next, "internvl3_8b": _internvl3, "gemma3_4b": _gemma3}
NATIVE |= {"qwen3_5_4b": _qwen3_5, "qwen3_5_9b": _qwen3_5, "qwen3_vl_8b": _qwen3_vl, "gemma4_e4b": _gemma4}
NATIVE |= {"qwen3_vl_30b_a3b": _qwen3_vl_moe, "glm4_1v_9b": _glm4v}
NATIVE["internvl3_5_8b"] = partial(_internvl3, text=tf.Qwen3Config)


def save_native(key: str, folder: Path) -> Path:
    """Saves a stand-in for the existing VLM ``key``."""
    torch.manual_seed(9)
    NATIVE[key](folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES["finished"][key], encoding="utf-8")
    return folder


def save_paper_llm(family: str, sizes: Any, folder: Path) -> Path:
    """Saves a language model with the table's numbers of layers and heads, so that the paper's heads exist."""
    heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "head_dim": 4}
    widths = {"hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": sizes.tied}
    return save_language_model(family, folder, num_hidden_layers=sizes.layers, **heads, **widths)
