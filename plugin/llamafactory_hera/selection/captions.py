"""Samples for the language model alone: the assistant's text, without prompt, template or image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..heads.pooling import IGNORE_INDEX
from .source import Features
from ..teachers.images import ImageLike


class CaptionSource:
    """A dataset's captions as token ids.

    Special tokens that the tokenizer itself puts around a text (a leading BOS) are fed and take no part in the
    average, as they take none in the training loss.

    Args:
        n_rows: Number of samples.
        images: From a row to its images.
        caption: From a row to the assistant's text.
        tokenizer: A transformers tokenizer.
        max_length: Tokens after which a caption is cut.
    """

    def __init__(
        self,
        n_rows: int,
        images: Callable[[int], list[ImageLike]],
        caption: Callable[[int], str],
        tokenizer: Any,
        max_length: int,
    ) -> None:
        self._n_rows = n_rows
        self.images = images
        self._caption = caption
        self._tokenizer = tokenizer
        self._max_length = max_length

    def __len__(self) -> int:
        return self._n_rows

    def encode(self, row: int) -> Features | None:
        """The caption of a row; None for an empty one."""
        text = self._caption(row).strip()
        if not text:
            return None
        encoded = self._tokenizer(
            text, truncation=True, max_length=self._max_length, return_special_tokens_mask=True, return_tensors=None
        )
        labels = [
            IGNORE_INDEX if special else token
            for token, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        ]
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": [1] * len(encoded["input_ids"]),
            "labels": labels,
        }


def collate_captions(features: list[Features], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Pads captions on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]``.
    """
    longest = max(len(feature["input_ids"]) for feature in features)
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: torch.tensor([feature[name] + [pad] * (longest - len(feature[name])) for feature in features])
        for name, pad in padding.items()
    }
