"""The processor of a built model: the language model's tokenizer with ``<image>``, its chat template, and images.

A message's content is a string, or a list of ``{"type": "image"}`` and ``{"type": "text", "text": …}`` parts. The chat
template renders what the host's template of the same name makes of the conversation in training.
"""

from typing import Any

from PIL import Image

from ..hub import CONFIG_FILE
from .sources import LANGUAGE_KEY, TOWERS, VISION_KEY, Source, one_line

IMAGE_TOKEN = "<image>"

# Each set holds a whole vocabulary; transformers reads any of them.
_VOCABULARY_FILES = (
    ("tokenizer.json",),
    ("*.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("*.tiktoken",),
    ("tekken.json",),
)
_PROBE = "What is shown in this image? A red car, 2 people."
_IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")

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


def make_processor(language: Source, vision: Source) -> tuple[Any, tuple[int, int], str | None]:
    """The processor, height and width in pixels of the images that it makes, and the host's template that fits it.

    Raises:
        ValueError: Tokenizer or image processor is missing, broken, or another model's.
    """
    from transformers import LlavaProcessor

    image_processor, size = _image_processor(vision)
    tokenizer = _tokenizer(language)
    _add_image_token(tokenizer)
    template = _host_template(language.config.model_type, tokenizer)
    tokenizer.chat_template = _chat_template(tokenizer, template)
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


def _image_processor(vision: Source) -> tuple[Any, tuple[int, int]]:
    """The encoder's image processor, and the size of its images: one, and the size that the encoder takes."""
    from transformers import AutoImageProcessor

    folder, settings = vision.folder, _IMAGE_SETTINGS[0]
    if not any((folder / name).is_file() for name in _IMAGE_SETTINGS):
        raise ValueError(
            f"{VISION_KEY}: {folder} holds no {settings}, which says how images are prepared; copy that of the same "
            "model into it."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        probes = [Image.new("RGB", size) for size in ((64, 48), (48, 80))]
        sizes = {tuple(processor(probe, return_tensors="pt")["pixel_values"].shape[-2:]) for probe in probes}
    except Exception as error:  # transformers raises whatever a broken setting leads to
        raise ValueError(
            f"{VISION_KEY}: the image processor of {folder} cannot be used ({one_line(error)}). Copy or download its "
            f"{settings} again, whole."
        ) from error
    if len(sizes) != 1:
        raise ValueError(
            f"{VISION_KEY}: the image processor of {folder} makes images of different sizes ({sorted(sizes)}); LLaVA "
            f"needs one size. Set do_center_crop, or a height and a width, in its {settings}."
        )
    height, width = sizes.pop()
    side = vision.config.image_size
    taken = (side, side) if isinstance(side, int) else tuple(side)
    if (height, width) != taken and not TOWERS[vision.config.model_type].any_size:
        wanted = f"{taken[0]} x {taken[1]}"
        raise ValueError(
            f"{VISION_KEY}: the image processor of {folder} makes images of {height} x {width} pixels (size and "
            f"crop_size in {settings}), the vision tower takes {wanted} (image_size in {CONFIG_FILE}). Set them to "
            f"{wanted}, or copy the {settings} of the same model into the folder."
        )
    return processor, (height, width)


def _tokenizer(language: Source) -> Any:
    """The language model's tokenizer.

    transformers makes an empty tokenizer of a folder that holds none, so the files are looked for here, and what the
    tokenizer does is tried.
    """
    from transformers import AutoTokenizer

    folder = language.folder
    if not any(all(any(folder.glob(name)) for name in names) for names in _VOCABULARY_FILES):
        raise ValueError(
            f"{LANGUAGE_KEY}: {folder} holds no tokenizer: neither tokenizer.json, nor tokenizer.model, nor "
            "vocab.json with merges.txt. Copy the tokenizer's files (tokenizer.json, tokenizer_config.json and what "
            "is beside them) of the same model into it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        misfit = _misfit(tokenizer, encoded, language.config)
    except Exception as error:  # transformers and its parsers raise whatever a broken file leads to
        raise ValueError(
            f"{LANGUAGE_KEY}: the tokenizer in {folder} cannot be opened ({one_line(error)}). Copy or download its "
            "files again, whole."
        ) from error
    if misfit:
        raise ValueError(
            f"{LANGUAGE_KEY}: the tokenizer in {folder} is not this model's: {misfit}. Copy tokenizer.json, "
            "tokenizer_config.json and what is beside them of the same model into it."
        )
    return tokenizer


def _misfit(tokenizer: Any, encoded: list[int], config: Any) -> str | None:
    """Why a tokenizer is another model's, or None."""
    if not set(encoded) - {tokenizer.unk_token_id}:
        return f"it encodes the text {_PROBE!r} to {'unknown tokens alone' if encoded else 'nothing'}"
    # Tokens that were added behind the vocabulary may lack a row (Gemma 3's image token does): they get new ones.
    added = tokenizer.get_added_vocab()
    word, number = max(
        ((word, number) for word, number in tokenizer.get_vocab().items() if word not in added),
        key=lambda item: item[1],
        default=("", -1),
    )
    if number >= config.vocab_size:
        return f"its word {word!r} has the number {number}, vocab_size in config.json is {config.vocab_size}"
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for end in ends:
        if end is not None and end >= len(tokenizer):
            return f"eos_token_id in config.json is {end}, and it has {len(tokenizer)} tokens"
    return None


def _add_image_token(tokenizer: Any) -> None:
    """Makes ``<image>`` one special token; one of that name that is there already is taken as it is."""
    from tokenizers import AddedToken

    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    elif IMAGE_TOKEN not in tokenizer.get_added_vocab():
        raise ValueError(
            f"{LANGUAGE_KEY}: its tokenizer has {IMAGE_TOKEN} as an ordinary word, whose embedding means something to "
            "the model; rename that entry in the tokenizer's files, or give another language model."
        )


def _host_template(model_type: str, tokenizer: Any) -> str | None:
    """The host's template for stage 2 of a language model; None where this project has none for it."""
    if model_type == "llama":
        if "<|eot_id|>" in tokenizer.get_vocab():
            return "llava_llama3"
        return "llava_vicuna" if tokenizer.chat_template is None else None
    return {"qwen2": "llava_qwen2_5", "qwen3": "llava_qwen3"}.get(model_type)


def _chat_template(tokenizer: Any, template: str | None) -> str | None:
    """The template for processor and tokenizer; None where the language model has none and none is known.

    The hybrid Qwen3 models think, and put an empty thought in front of an answer when told not to; the host's
    ``llava_qwen3`` does neither, so they get plain ChatML. Vicuna has no template of its own.
    """
    own = tokenizer.chat_template
    if template == "llava_qwen3" and own is not None and "enable_thinking" in own:
        own = _CHATML
    elif own is None and template == "llava_vicuna":
        own = _VICUNA
    return None if own is None else _FLATTEN + own
