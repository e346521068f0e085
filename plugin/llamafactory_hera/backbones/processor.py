"""The processor of a built model: the language model's tokenizer with ``<image>``, its chat template, and images.

A message's content is a string, or a list of ``{"type": "image"}`` and ``{"type": "text", "text": …}`` parts. The chat
template renders what the host's template of the same name makes of the conversation in training.
"""

from typing import Any

import torch
from PIL import Image, ImageOps

from ..hub import CONFIG_FILE
from .sources import LANGUAGE_KEY, TOWERS, VISION_KEY, Source, one_line

IMAGE_TOKEN = "<image>"

_PROBE = "What is shown in this image? A red car, 2 people."
_ANSWER = "An answer."
_IMAGE_SETTINGS = "preprocessor_config.json"

# In front of a template that takes strings: contents become strings, images become the image token.
_FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set content = message['content'] -%}"
    "{%- else -%}"
    "{%- set part = namespace(text='') -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{%- set part.text = part.text + '" + IMAGE_TOKEN + "\\n' -%}"
    "{%- else -%}{%- set part.text = part.text + item['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set content = part.text -%}"
    "{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=content)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}\n"
)

_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_LLAMA3 = (
    "{%- for message in messages -%}"
    "{{- (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- message['content'] + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)

# The format of Vicuna 1.1 and 1.5 and of LLaVA-1.5.
_VICUNA = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- messages[0]['content'] -}}{%- set messages = messages[1:] -%}"
    "{%- else -%}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. '"
    ' + "The assistant gives helpful, detailed, and polite answers to the user\'s questions." -}}'
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- (' ' if loop.first else '') + 'USER: ' + message['content'] + ' ASSISTANT:' -}}"
    "{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)


def make_processor(language: Source, vision: Source, pad: bool) -> tuple[Any, tuple[int, int], str | None]:
    """The processor, height and width in pixels of the images that it makes, and the host's template that fits it."""
    from tokenizers import AddedToken
    from transformers import LlavaProcessor

    image_processor, size = _image_processor(vision, pad)
    tokenizer = _tokenizer(language)
    # one token of its own; where it is a token already, that one
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    template = _host_template(language.config.model_type, tokenizer)
    tokenizer.chat_template = _chat_template(tokenizer, template)
    if "bos_token" in (tokenizer.chat_template or ""):
        # the template writes it; a tokenizer that adds one would begin a rendered chat with two
        tokenizer.add_bos_token = False
    has_cls = TOWERS[vision.config.model_type].has_cls
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy="default" if has_cls else "full",
        num_additional_image_tokens=int(has_cls),
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )
    return processor, size, template


def chat_end(tokenizer: Any) -> int | None:
    """The special token right behind an answer in the chat template; None where there is no template or no such token.

    Raises:
        ValueError: The template cannot render a question and its answer.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _ANSWER}]
    try:
        rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)[2]
    except Exception as error:  # a template raises what it likes
        raise ValueError(
            f"{LANGUAGE_KEY}: its chat template cannot render a question and an answer ({one_line(error)}). Copy "
            "chat_template.jinja, or tokenizer_config.json where the template is there, of the same model into it."
        ) from error
    end = next(iter(tokenizer.encode(rest, add_special_tokens=False)), None)
    return end if end in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[end].special else None


def _image_processor(vision: Source, pad: bool) -> tuple[Any, tuple[int, int]]:
    """The encoder's image processor, and the size of its images: one, and the size that the encoder takes."""
    from transformers import AutoImageProcessor

    folder = vision.folder
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        probes = [Image.new("RGB", size) for size in ((64, 48), (48, 80))]
        sizes: set[Any] = {tuple(_pixels(processor, probe).shape[-2:]) for probe in probes}
    except Exception as error:  # transformers raises whatever a broken setting leads to
        raise ValueError(
            f"{VISION_KEY}: the image processor of {folder} cannot be used ({one_line(error)}). Copy or download "
            f"{_IMAGE_SETTINGS} of the same model into it, whole."
        ) from error
    side = vision.config.image_size
    taken = (side, side) if isinstance(side, int) else tuple(side)
    if len(sizes) != 1 or (sizes != {taken} and not TOWERS[vision.config.model_type].any_size):
        raise ValueError(
            f"{VISION_KEY}: the image processor of {folder} makes images of {sorted(sizes)} pixels, LLaVA takes "
            f"those of one size, the vision tower's {taken} (image_size in {CONFIG_FILE}). Set do_center_crop, size "
            f"and crop_size to {taken} in {_IMAGE_SETTINGS}, or copy that of the same model into the folder."
        )
    return _padding(processor, probes) if pad else processor, sizes.pop()


def _padding(own: Any, probes: list[Image.Image]) -> Any:
    """LLaVA's image processor with an encoder's own settings: images become squares first, in their mean color."""
    from transformers import LlavaImageProcessor

    settings = {"do_center_crop": False} | own.to_dict()
    processor: Any = LlavaImageProcessor.from_dict(settings | {"do_pad": True})
    color = tuple(int(255 * mean) for mean in processor.image_mean)
    squares = [ImageOps.pad(probe, (max(probe.size),) * 2, color=color) for probe in probes]
    if not all(
        torch.allclose(_pixels(processor, probe), _pixels(own, square), atol=0.05)  # a few levels of 256
        for probe, square in zip(probes, squares, strict=True)
    ):
        raise ValueError(
            f"--image-aspect-ratio: pad cannot be had with a {type(own).__name__}, which does more with its settings "
            f"({_IMAGE_SETTINGS} of {VISION_KEY}) than LLaVA's image processor does; give square."
        )
    return processor


def _pixels(processor: Any, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


def _tokenizer(language: Source) -> Any:
    """The language model's tokenizer, tried: transformers makes an empty one of a folder that holds none."""
    from transformers import AutoTokenizer

    config = language.config
    try:
        tokenizer = AutoTokenizer.from_pretrained(language.folder)
        encoded = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        # Tokens that were added behind the vocabulary may lack a row (Gemma 3's image token does): they get new ones.
        added = tokenizer.get_added_vocab()
        largest = max((number for word, number in tokenizer.get_vocab().items() if word not in added), default=-1)
    except Exception as error:  # transformers and its parsers raise whatever a broken file leads to
        raise ValueError(
            f"{LANGUAGE_KEY}: the tokenizer in {language.folder} cannot be opened ({one_line(error)}). Copy or "
            "download its files again, whole."
        ) from error
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    last_end = max((end for end in ends if end is not None), default=-1)
    misfit = None
    if not set(encoded) - {tokenizer.unk_token_id}:
        misfit = f"it encodes the text {_PROBE!r} to {'unknown tokens alone' if encoded else 'nothing'}"
    elif largest >= config.vocab_size:
        misfit = f"it has a word with the number {largest}, vocab_size in {CONFIG_FILE} is {config.vocab_size}"
    elif last_end >= len(tokenizer):
        misfit = f"eos_token_id in {CONFIG_FILE} is {last_end}, and it has {len(tokenizer)} tokens"
    if misfit:
        raise ValueError(
            f"{LANGUAGE_KEY}: the tokenizer in {language.folder} is not this model's: {misfit}. Copy tokenizer.json, "
            "tokenizer_config.json and what is beside them of the same model into it."
        )
    return tokenizer


def _host_template(model_type: str, tokenizer: Any) -> str | None:
    """The host's template for stage 2 of a language model; None where this project has none for it."""
    if model_type == "llama":
        if "<|eot_id|>" in tokenizer.get_vocab():
            return "llava_llama3"
        return "llava_vicuna" if tokenizer.chat_template is None else None
    return {"qwen2": "llava_qwen2_5", "qwen3": "llava_qwen3"}.get(model_type)


def _chat_template(tokenizer: Any, template: str | None) -> str | None:
    """The template for processor and tokenizer, or None.

    Hybrid Qwen3 models get ChatML, which does not think; Llama 3's base models and Vicuna, which have none, theirs.
    """
    own = tokenizer.chat_template
    if template == "llava_qwen3" and own is not None and "enable_thinking" in own:
        own = _CHATML
    elif own is None and template == "llava_llama3":
        own = _LLAMA3
    elif own is None and template == "llava_vicuna":
        own, bos = _VICUNA, tokenizer.bos_token
        alone, behind = (tokenizer.encode(text, add_special_tokens=False) for text in ("A", f"{bos}A"))
        if bos is not None and behind[1:] != alone:
            # SentencePiece puts a space in front of a text, and most tokenizers none behind a BOS that is written out
            own = own.replace("{{- bos_token -}}", "{{- bos_token -}}{{- ' ' -}}")
    return None if own is None else _FLATTEN + own
