"""Templates whose tokens the host's own class cannot give."""

from dataclasses import dataclass
from typing import Any

from llamafactory.data.template import Template
from typing_extensions import override


@dataclass
class PlainTemplate(Template):
    """LLaVA's stage 1: an image, then its caption; of a user's turn its images alone, and no system message."""

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


@dataclass
class VicunaTemplate(Template):
    """A user's turn that follows an answer is encoded behind its end-of-sequence token, as it stands in the text.

    Encoded alone it would get the space that SentencePiece puts in front of a text; whether it has one behind a
    special token is the tokenizer's affair.
    """

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
