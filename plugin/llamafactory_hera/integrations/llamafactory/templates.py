"""Chat templates of LLaVA-style models, registered with the host.

Each template is the host's template of the language model with the host's data plugin for LLaVA, which inserts the
image tokens. ``backbones/models.yaml`` names the templates. Only the patch of the host's ``data.template`` imports
this module.
"""

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory.data.template import Template

#: Name of a template -> the host's template that it is based on, and the fields that differ.
#:
#: - ``llava_qwen3`` has no thinking: it is plain ChatML, as for Qwen3's Instruct-2507 models. The hybrid models put an
#:   empty thought before an answer; training leaves it out, and `build` removes it from the model's own template.
#: - ``llava_llama3``: the host's second stop word belongs to Llama 3.1 and would add a token to the vocabulary.
#: - ``llava_smollm2``: the host's default system message ends with a period that the model's own lacks.
#: - ``llava_vicuna`` is the format of LLaVA-1.5. The host's ``vicuna`` and ``llava`` lack the BOS token.
_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava_qwen2_5": ("qwen", {}),
    "llava_qwen3": ("qwen3_nothink", {}),
    "llava_llama3": ("llama3", {"stop_words": ["<|eot_id|>"]}),
    "llava_smollm2": (
        "smollm2",
        {"default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
    ),
    "llava_vicuna": ("vicuna", {"replace_jinja_template": False}),
}


def register(host: ModuleType) -> None:
    """Registers the templates with the host's ``data.template`` module, unless it has a template of that name."""
    bos = host.EmptyFormatter(slots=[{"bos_token"}])
    settings: dict[str, dict[str, Any]] = {
        "llava_plain": {
            "format_prefix": bos,
            # LLaVA ends a caption with a line break only.
            "format_assistant": host.StringFormatter(slots=["{{content}}\n"]),
            "template_class": PlainTemplate,
        }
    }
    for name, (base, changes) in _BASES.items():
        template = host.TEMPLATES[base]
        copied = {field.name: getattr(template, field.name) for field in fields(template)}
        settings[name] = {**copied, "template_class": type(template), **changes}
    settings["llava_vicuna"] |= {"format_prefix": bos, "template_class": VicunaTemplate}
    for name, values in settings.items():
        if name not in host.TEMPLATES:
            plugin = get_mm_plugin(name="llava", image_token="<image>")
            host.register_template(**values | {"name": name, "mm_plugin": plugin})


@dataclass
class PlainTemplate(Template):
    """The format of LLaVA's stage 1: an image and its caption, without the user's text or a system message."""

    def _encode(self, tokenizer: Any, messages: list[dict[str, str]], system: Any, tools: Any) -> list[list[int]]:
        # The plugin has already replaced each placeholder with the tokens of its image.
        token = self.mm_plugin.image_token
        images_only = [
            {**message, "content": token * message["content"].count(token)} if message["role"] == "user" else message
            for message in messages
        ]
        return super()._encode(tokenizer, images_only, None, None)


@dataclass
class VicunaTemplate(Template):
    """Encodes a user's turn together with the EOS token before it, because SentencePiece would add a space."""

    def _encode(self, tokenizer: Any, messages: list[dict[str, str]], system: Any, tools: Any) -> list[list[int]]:
        encoded = super()._encode(tokenizer, messages, system, tools)
        for i, message in enumerate(messages[2:], 2):
            if message["role"] == "user":
                text = "".join(self.format_user.apply(content=message["content"], idx=str(i // 2)))
                encoded[i] = tokenizer.encode(tokenizer.eos_token + text, add_special_tokens=False)[1:]
        return encoded
