"""The processor of a built model: the language model's tokenizer with ``<image>``, its chat template, and images.

The content of a message is a string or a list of ``{"type": "image"}`` and ``{"type": "text", "text": …}`` parts. If
the model has a training template, the chat template renders exactly the text that training uses.
"""

from typing import Any

from PIL import Image
from tokenizers import AddedToken
from transformers import AutoImageProcessor, AutoTokenizer, LlavaImageProcessor, LlavaProcessor

from .sources import TOWERS, Source

IMAGE_TOKEN = "<image>"

_QUESTION = "What is shown in this image? A red car, 2 people."
_ANSWER = "An answer."

# Precedes a template that takes strings: joins the parts of each message, with the image token in place of images.
_FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set content = message['content'] -%}{%- else -%}"
    "{%- set part = namespace(text='') -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{%- set part.text = part.text + '" + IMAGE_TOKEN + "\\n' -%}"
    "{%- else -%}{%- set part.text = part.text + item['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- set content = part.text -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=content)] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}\n"
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

# The format of Vicuna 1.1, Vicuna 1.5 and LLaVA-1.5.
_VICUNA = (
    "{{- bos_token -}}{%- if messages[0]['role'] == 'system' -%}"
    "{{- messages[0]['content'] -}}{%- set messages = messages[1:] -%}{%- else -%}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. '"
    ' + "The assistant gives helpful, detailed, and polite answers to the user\'s questions." -}}'
    "{%- endif -%}{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{{- (' ' if loop.first else '') + 'USER: ' + message['content'] + ' ASSISTANT:' -}}"
    "{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)


def make_processor(language: Source, vision: Source, pad: bool) -> tuple[Any, int, str | None]:
    """Makes the processor of a built model.

    Returns:
        The processor, the number of tokens of one image, and the training template of stage 2, if there is one.
    """
    image_processor: Any = AutoImageProcessor.from_pretrained(vision.folder)
    if pad:
        # LLaVA's image processor crops by default. SigLIP's settings do not mention cropping.
        settings = {"do_center_crop": False} | image_processor.to_dict() | {"do_pad": True}
        image_processor = LlavaImageProcessor.from_dict(settings)
    # The processor decides on the size: DINOv2's makes images of another size than the model's configuration names.
    height, width = image_processor(Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"].shape[-2:]

    tokenizer: Any = AutoTokenizer.from_pretrained(language.folder)
    # transformers opens a folder without tokenizer files as an empty tokenizer.
    ids = set(tokenizer(_QUESTION, add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}
    if not ids or max(ids) >= language.config.vocab_size:
        raise ValueError(
            f"{language.key}: {language.name} has no tokenizer, or another model's; copy tokenizer.json and "
            "tokenizer_config.json of this model into it."
        )
    # A tokenizer that has the token already keeps it.
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    template = _training_template(language.config.model_type, tokenizer)
    tokenizer.chat_template = _chat_template(tokenizer, template)
    if "bos_token" in (tokenizer.chat_template or ""):
        # The chat template writes the BOS token. The tokenizer must not add a second one.
        tokenizer.add_bos_token = False

    has_cls, patch = TOWERS[vision.config.model_type].has_cls, vision.config.patch_size
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default" if has_cls else "full",
        num_additional_image_tokens=int(has_cls),
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )
    return processor, (height // patch) * (width // patch), template


def chat_end(tokenizer: Any) -> int | None:
    """Returns the special token that follows an answer in the chat template, or None."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)[2]
    end = next(iter(tokenizer.encode(rest, add_special_tokens=False)), None)
    return end if end in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[end].special else None


def _training_template(model_type: str, tokenizer: Any) -> str | None:
    if model_type == "llama":
        if "<|eot_id|>" in tokenizer.get_vocab():
            return "llava_llama3"
        return "llava_vicuna" if tokenizer.chat_template is None else None
    return {"qwen2": "llava_qwen2_5", "qwen3": "llava_qwen3"}.get(model_type)


def _chat_template(tokenizer: Any, template: str | None) -> str | None:
    """Chooses the chat template of the built model.

    Hybrid Qwen3 models get plain ChatML, without thinking. Vicuna and the base models of Llama 3 have no chat template
    and get the one that they are trained with here. All other models keep theirs.
    """
    chat = tokenizer.chat_template
    if template == "llava_qwen3" and chat is not None and "enable_thinking" in chat:
        chat = _CHATML
    elif chat is None and template == "llava_llama3":
        chat = _LLAMA3
    elif chat is None and template == "llava_vicuna":
        chat, bos = _VICUNA, tokenizer.bos_token
        alone, after_bos = (tokenizer.encode(text, add_special_tokens=False) for text in ("A", f"{bos}A"))
        if bos is not None and after_bos[1:] != alone:
            # Training encodes the text after BOS separately, and SentencePiece puts a space before it. Most tokenizers
            # put none after a BOS token inside a text, so the chat template must write the space.
            chat = chat.replace("{{- bos_token -}}", "{{- bos_token -}}{{- ' ' -}}")
    return None if chat is None else _FLATTEN + chat
