"""Tiny stand-ins for the finished VLMs of the recipes: random models of their real classes, with real processors.

Sizes are small; tokens, templates and image processing are those of the real models. A 64-pixel picture takes a few
dozen tokens at most.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from llamafactory_hera.backbones.build import build_backbone

from .tiny import byte_level, new_tokenizer, save_language_model, save_tower

_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **changes,
    }


def _tokenizer(specials: list[str], **named: Any) -> tf.PreTrainedTokenizerFast:
    return tf.PreTrainedTokenizerFast(tokenizer_object=byte_level(specials), **named)


def _save(model: nn.Module, processor: Any, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _qwen_vl(folder: Path, name: str, patch: int, vision: dict[str, Any], **text: Any) -> None:
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks]
    tokenizer = _tokenizer(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = getattr(tf, f"{name}Config")(
        text_config=_text(tokenizer, rope_parameters=rope, **text),
        vision_config=vision | {"depth": 2, "num_heads": 2, "patch_size": patch},
        **dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True)),
    )
    pixels = {"patch_size": patch, "size": {"shortest_edge": 4 * patch * patch, "longest_edge": 64 * patch * patch}}
    processor = getattr(tf, f"{name}Processor")(
        tf.Qwen2VLImageProcessor(**pixels),
        tokenizer,
        getattr(tf, f"{name.replace('2_5_', '2')}VideoProcessor")(**pixels),
    )
    _save(getattr(tf, f"{name}ForConditionalGeneration")(config), processor, folder)


def _qwen2_5_vl(folder: Path) -> None:
    # widths are multiples of 64, the block of 4-bit quantization: this model serves QLoRA too
    vision = {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"fullatt_block_indexes": [1], "window_size": 28}
    _qwen_vl(folder, "Qwen2_5_VL", 14, vision, hidden_size=64)


def _qwen3_vl(folder: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    _qwen_vl(folder, "Qwen3VL", 16, vision, head_dim=16)


def _llava_1_5(folder: Path) -> None:
    llm = save_language_model("vicuna", folder.with_name(f"{folder.name}_llm"))
    tower = save_tower("clip", folder.with_name(f"{folder.name}_tower"))
    build_backbone(str(llm), str(tower), folder)


def _llava_next(folder: Path) -> None:
    tokenizer = _tokenizer(["<s>", "</s>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="</s>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    grid = [[32, 64], [64, 32]]
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION, image_size=32, patch_size=8),
        text_config=tf.MistralConfig(**_text(tokenizer, head_dim=16)),
        image_token_index=image,
        image_grid_pinpoints=grid,
        vision_feature_select_strategy="default",
    )
    square = {"height": 32, "width": 32}
    image_processor = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size=square, image_grid_pinpoints=grid
    )
    processor = tf.LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    _save(tf.LlavaNextForConditionalGeneration(config), processor, folder)


def _internvl3(folder: Path) -> None:
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks.values()]
    tokenizer = _tokenizer(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=marks)
    vision = tf.InternVLVisionConfig(**_VISION, image_size=[32, 32], patch_size=[8, 8])
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config=tf.Qwen2Config(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    size = {"height": 32, "width": 32}
    processor = tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(size=size), tokenizer, tf.InternVLVideoProcessor(size=size), image_seq_length=4
    )
    _save(tf.InternVLForConditionalGeneration(config), processor, folder)


def _gemma3(folder: Path) -> None:
    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *marks.values()]
    tokenizer = _tokenizer(
        specials, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=marks
    )
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(list(marks.values())), strict=True))
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**_text(tokenizer, head_dim=16)),
        vision_config=tf.SiglipVisionConfig(**_VISION, image_size=32, patch_size=8, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )
    size = {"height": 32, "width": 32}
    processor = tf.Gemma3Processor(tf.Gemma3ImageProcessor(size=size), tokenizer, image_seq_length=4)
    _save(tf.Gemma3ForConditionalGeneration(config), processor, folder)


#: Key of a native model in the table -> writes its stand-in into a folder.
NATIVE: dict[str, Callable[[Path], None]] = {
    "qwen2_5_vl_7b": _qwen2_5_vl,
    "qwen3_vl_4b": _qwen3_vl,
    "llava_1_5_7b": _llava_1_5,
    "llava_next_7b": _llava_next,
    "internvl3_8b": _internvl3,
    "gemma3_4b": _gemma3,
}


_CHATML = (
    "{%- for message in messages -%}"
    "%SYSTEM%"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '%IMAGE%' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_SYSTEM = (
    "{%- if loop.first and message['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
)
_PARTS = (  # images first, then text
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] + ' ' -}}{%- endfor -%}"
)
#: The makers' chat templates, in short forms that render the same for questions with images and their answers.
CHAT = {
    "qwen2_5_vl_7b": _CHATML.replace("%SYSTEM%", _QWEN_SYSTEM).replace("%IMAGE%", _QWEN_IMAGE),
    "qwen3_vl_4b": _CHATML.replace("%SYSTEM%", "").replace("%IMAGE%", _QWEN_IMAGE),
    "llava_1_5_7b": "{%- for message in messages -%}{{- message['role'].upper() + ': ' -}}" + _PARTS + "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}",
    "llava_next_7b": "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{- '[INST] ' -}}"
    + _PARTS
    + "{{- '[/INST]' -}}{%- else -%}{{- ' ' + message['content'][0]['text'] + '</s> ' -}}{%- endif -%}"
    "{%- endfor -%}",
    "internvl3_8b": _CHATML.replace("%SYSTEM%", "").replace("%IMAGE%", "<IMG_CONTEXT>\\n"),
    "gemma3_4b": "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{- '<start_of_image>' -}}"
    "{%- else -%}{{- part['text'] | trim -}}{%- endif -%}{%- endfor -%}{{- '<end_of_turn>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}",
}


def save_native(key: str, folder: Path) -> Path:
    """A stand-in for the native model ``key``."""
    torch.manual_seed(9)
    NATIVE[key](folder)
    (folder / "chat_template.jinja").write_text(CHAT[key], encoding="utf-8")
    return folder


def save_paper_llm(family: str, sizes: Any, folder: Path) -> Path:
    """A language model with the layers and heads of the table, each head four values wide: the paper's heads exist."""
    return save_language_model(
        family,
        folder,
        layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=4,
        hidden_size=32,
        intermediate_size=48,
        tie_word_embeddings=sizes.tied,
        rows=len(new_tokenizer(family)),
    )
