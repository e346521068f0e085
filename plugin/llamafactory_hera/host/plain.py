"""The chat template of LLaVA's stage 1: an image, then its caption, and no instruction."""

from dataclasses import dataclass
from typing import Any

from llamafactory.data.template import Template
from typing_extensions import override


@dataclass
class PlainTemplate(Template):
    """Keeps of a user's turn its images alone, and takes no system message (LLaVA's version "plain")."""

    @override
    def _encode(
        self, tokenizer: Any, messages: list[dict[str, str]], system: str | None, tools: str | None
    ) -> list[list[int]]:
        # the plugin has put the image's tokens in already, in the place of its placeholder
        token = self.mm_plugin.image_token
        images_only = [
            {**message, "content": token * message["content"].count(token)} if message["role"] == "user" else message
            for message in messages
        ]
        return super()._encode(tokenizer, images_only, None, None)
