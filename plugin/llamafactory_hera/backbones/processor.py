"""The processor of a built model: a tokenizer with ``<image>``, a chat template and an image processor."""

from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoImageProcessor, AutoTokenizer, LlavaImageProcessor, LlavaProcessor

from .sources import TOWERS, Source

IMAGE_TOKEN = "<image>"
_QUESTION, _ANSWER = "What is shown in this image? A red car, 2 people.", "An answer."
_CHAT = yaml.safe_load(Path(__file__).with_name("chat_templates.yaml").read_bytes())


def make_processor(language: Source, vision: Source, pad: bool) -> tuple[Any, int, str | None]:
    """Returns the processor of a built model, the number of tokens of one image, and the training template, if any."""
    image_processor: Any = AutoImageProcessor.from_pretrained(vision.folder)
    if pad:
        # LLaVA's image processor crops by default. SigLIP's settings do not mention cropping.
        settings = {"do_center_crop": False} | image_processor.to_dict() | {"do_pad": True}
        image_processor = LlavaImageProcessor.from_dict(settings)
    # The processor determines the size: DINOv2's processor uses a size that differs from the model's configuration.
    height, width = image_processor(Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"].shape[-2:]

    tokenizer: Any = AutoTokenizer.from_pretrained(language.folder)
    # transformers opens a folder without tokenizer files as an empty tokenizer.
    ids = set(tokenizer(_QUESTION, add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}
    if not ids or max(ids) >= language.config.vocab_size:
        remedy = "copy tokenizer.json and tokenizer_config.json of this model into it."
        raise ValueError(f"{language.key}: {language.name} has no tokenizer, or that of a different model; {remedy}")
    # A tokenizer that already has the token keeps its id.
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    smollm = "llava_smollm2" if "named SmolLM" in (tokenizer.chat_template or "") else None
    vicuna = "llava_vicuna" if tokenizer.chat_template is None else smollm
    llama = "llava_llama3" if "<|eot_id|>" in tokenizer.get_vocab() else vicuna
    templates = {"qwen2": "llava_qwen2_5", "qwen3": "llava_qwen3", "llama": llama}
    template = templates.get(language.config.model_type)
    tokenizer.chat_template = _chat_template(tokenizer, template)
    if "bos_token" in (tokenizer.chat_template or ""):
        tokenizer.add_bos_token = False  # the chat template adds it

    has_cls, patch = TOWERS[vision.config.model_type].has_cls, vision.config.patch_size
    layout = {"patch_size": patch, "num_additional_image_tokens": int(has_cls)}
    layout |= {"vision_feature_select_strategy": "default" if has_cls else "full"}
    processor = LlavaProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template, **layout)
    return processor, (height // patch) * (width // patch), template


def chat_end(tokenizer: Any) -> int | None:
    """Returns the special token that follows an answer in the chat template, or None."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)[2]
    end = next(iter(tokenizer.encode(rest, add_special_tokens=False)), None)
    return end if end in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[end].special else None


def _chat_template(tokenizer: Any, template: str | None) -> str | None:
    """Returns the language model's chat template or, without one, that of training; for hybrid Qwen3, plain ChatML."""
    chat = tokenizer.chat_template or _CHAT.get(template)
    if template == "llava_qwen3" and "enable_thinking" in (chat or ""):
        chat = _CHAT["chatml"]
    if chat == _CHAT["llava_vicuna"]:
        bos = tokenizer.bos_token
        alone, after_bos = (tokenizer.encode(text, add_special_tokens=False) for text in ("A", f"{bos}A"))
        if bos is not None and after_bos[1:] != alone:
            # Training encodes the text after BOS separately, and SentencePiece then puts a space before it. Most
            # tokenizers put no space there if BOS is part of the text.
            chat = chat.replace("{{- bos_token -}}", "{{- bos_token -}}{{- ' ' -}}")
    return None if chat is None else _CHAT["flatten"] + chat
