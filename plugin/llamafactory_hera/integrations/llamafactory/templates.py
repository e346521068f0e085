"""Chat templates of LLaVA-style models, registered with the host.

Each is the host's own template of the language model, with the data plugin of LLaVA, which puts image tokens in.
Only the patch of the host's ``data.template`` imports this, once that module is there; their names are in
``backbones.table``.
"""

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory.data.template import Template
from typing_extensions import override

#: Name -> the host's template that it is made of, and what is changed of it.
#:
#: - ``llava_qwen3`` is without thinking: plain ChatML, as Qwen3's Instruct-2507 models have it. The empty thought that
#:   the hybrid models put in front of an answer is left out in training and, by `build`, in the model's own template.
#: - ``llava_llama3``: the host's second stop word is Llama 3.1's; here it would add a token to the vocabulary.
#: - ``llava_vicuna``: LLaVA-1.5's format. The host's ``vicuna`` and ``llava`` leave the BOS token out.
_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava_qwen2_5": ("qwen", {}),
    "llava_qwen3": ("qwen3_nothink", {}),
    "llava_llama3": ("llama3", {"stop_words": ["<|eot_id|>"]}),
    "llava_vicuna": ("vicuna", {"replace_jinja_template": False}),
}


def register(host: ModuleType) -> None:
    """Registers the templates with the host's ``data.template`` module, leaving names that it already has alone."""
    bos = host.EmptyFormatter(slots=[{"bos_token"}])
    settings: dict[str, dict[str, Any]] = {
        "llava_plain": {
            "format_prefix": bos,
            # LLaVA ends a caption by a line break and nothing else
            "format_assistant": host.StringFormatter(slots=["{{content}}\n"]),
            "template_class": PlainTemplate,
        }
    }
    for name, (base, changes) in _BASES.items():
        template = host.TEMPLATES[base]
        own = {field.name: getattr(template, field.name) for field in fields(template)}
        settings[name] = {**own, "template_class": type(template), **changes}
    settings["llava_vicuna"] |= {"format_prefix": bos, "template_class": VicunaTemplate}
    for name, own in settings.items():
        if name not in host.TEMPLATES:
            plugin = get_mm_plugin(name="llava", image_token="<image>")
            host.register_template(**own | {"name": name, "mm_plugin": plugin})


@dataclass
class PlainTemplate(Template):
    """LLaVA's stage 1: an image, then its caption; of a user's turn its images alone, and no system message."""

    @override
    def _encode(
        self, tokenizer: Any, messages: list[dict[str, str]], system: str | None, tools: str | None
    ) -> list[list[int]]:
        # the plugin has put the image's tokens in already, instead of its placeholder
        token = self.mm_plugin.image_token
        images_only = [
            {**message, "content": token * message["content"].count(token)} if message["role"] == "user" else message
            for message in messages
        ]
        return super()._encode(tokenizer, images_only, None, None)


@dataclass
class VicunaTemplate(Template):
    """A user's turn that follows an answer is encoded behind its EOS token: alone, SentencePiece would add a space."""

    @override
    def _encode(
        self, tokenizer: Any, messages: list[dict[str, str]], system: str | None, tools: str | None
    ) -> list[list[int]]:
        encoded = super()._encode(tokenizer, messages, system, tools)
        for i, message in enumerate(messages[2:], 2):
            if message["role"] == "user":
                text = "".join(self.format_user.apply(content=message["content"], idx=str(i // 2)))
                encoded[i] = tokenizer.encode(tokenizer.eos_token + text, add_special_tokens=False)[1:]
        return encoded
