"""The chat template of a built model: the language model's own, for messages with images.

A message's content is a string, or a list of ``{"type": "image"}`` and ``{"type": "text", "text": …}`` parts. The
template renders what the host's template of the same name makes of the conversation in training.
"""

from typing import Any

from .tokenizer import IMAGE_TOKEN

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


def host_template(model_type: str, tokenizer: Any) -> str | None:
    """The host's template for stage 2 of a language model; None where this project has none for it."""
    if model_type == "llama":
        if "<|eot_id|>" in tokenizer.get_vocab():
            return "llava_llama3"
        return "llava_vicuna" if tokenizer.chat_template is None else None
    return {"qwen2": "llava_qwen2_5", "qwen3": "llava_qwen3"}.get(model_type)


def chat_template(tokenizer: Any, template: str | None) -> str | None:
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
