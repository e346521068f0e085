"""Tiny stand-ins for the finished VLMs of the recipes: random models of the real classes, with real processors.

The sizes are small. Special tokens, templates and image processing are those of the real models.
"""

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from llamafactory_hera.backbones.build import build_backbone

from .tiny import CHAT_TEMPLATES, SQUARE, VISION, byte_level, save_language_model, save_tower, text_sizes


def _save(name: str, config: Any, processor: Any, folder: Path) -> None:
    getattr(tf, f"{name}ForConditionalGeneration")(config).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _qwen_vl(folder: Path, name: str, patch: int, vision: dict[str, Any], **text: Any) -> None:
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks]
    tokenizer = byte_level(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = getattr(tf, f"{name}Config")(
        text_config=text_sizes(tokenizer, rope_parameters=rope, **text),
        vision_config=vision | {"depth": 2, "num_heads": 2, "patch_size": patch},
        **dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True)),
    )
    pixels = {"patch_size": patch, "size": {"shortest_edge": 4 * patch * patch, "longest_edge": 64 * patch * patch}}
    videos = getattr(tf, f"{name.replace('2_5_', '2')}VideoProcessor")(**pixels)
    processor = getattr(tf, f"{name}Processor")(tf.Qwen2VLImageProcessor(**pixels), tokenizer, videos)
    _save(name, config, processor, folder)


def _qwen2_5_vl(folder: Path) -> None:
    # Blocks of 4-bit quantization have 64 values, and this model is also used for QLoRA.
    vision = {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64}
    _qwen_vl(folder, "Qwen2_5_VL", 14, vision | {"fullatt_block_indexes": [1], "window_size": 28}, hidden_size=64)


def _qwen3_vl(folder: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48, "num_position_embeddings": 16}
    _qwen_vl(folder, "Qwen3VL", 16, vision | {"deepstack_visual_indexes": [0]}, head_dim=16)


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


def _internvl3(folder: Path) -> None:
    marks = {"start_image_token": "<img>", "end_image_token": "</img>"}
    marks |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks.values()]
    tokenizer = byte_level(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=marks)
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**VISION | {"image_size": [32, 32], "patch_size": [8, 8]}),
        text_config=tf.Qwen2Config(**text_sizes(tokenizer)),
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


#: Key of a native model in the table -> writes the stand-in into a folder.
NATIVE = {"qwen2_5_vl_7b": _qwen2_5_vl, "qwen3_vl_4b": _qwen3_vl, "llava_1_5_7b": _llava_1_5}
NATIVE |= {"llava_next_7b": _llava_next, "internvl3_8b": _internvl3, "gemma3_4b": _gemma3}


def save_native(key: str, folder: Path) -> Path:
    """Saves a stand-in for the native model ``key``."""
    torch.manual_seed(9)
    NATIVE[key](folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES["finished"][key], encoding="utf-8")
    return folder


def save_paper_llm(family: str, sizes: Any, folder: Path) -> Path:
    """Saves a language model with as many layers and heads as in the table, so that the paper's heads exist."""
    heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "head_dim": 4}
    widths = {"hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": sizes.tied}
    return save_language_model(family, folder, num_hidden_layers=sizes.layers, **heads, **widths)
