"""One way to run a batch for all that calibration measures: which tokens count, and their logits."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.families import media_token_ids, model_config
from ..heads.pooling import token_mask
from .settings import Positions

# What the model takes no part of: calibration reads no label.
_NOT_INPUTS = ("labels",)
_POOLING = {"text": "text", "all": "mean", "last": "last"}


class Forward:
    """Runs batches through a model.

    Args:
        model: A transformers model, bare, in evaluation mode.
        positions: Tokens whose next-token distribution is looked at.
        autocast: The type to compute in, where it is not the weights' own.
    """

    def __init__(self, model: nn.Module, positions: Positions = "text", autocast: torch.dtype | None = None) -> None:
        self.model, self._positions, self._autocast = model, positions, autocast
        self.device = next(model.parameters()).device
        self._media = media_token_ids(model_config(model))
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def run(self, batch: dict[str, Any]) -> None:
        """A pass for what is captured on the way; as few logits as can be."""
        with self._context():
            self.model(**self._inputs(batch), use_cache=False, **({"logits_to_keep": 1} if self._keeps else {}))

    def logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits at the tokens that count in any sample of the batch.

        Returns:
            Logits ``[B, P, V]`` and the tokens among them that count in each sample, boolean ``[B, P]``.
        """
        inputs = self._inputs(batch)
        pooling = _POOLING[self._positions]
        mask = token_mask(pooling, inputs["input_ids"], inputs.get("attention_mask"), None, self._media)
        kept = mask.any(dim=0).nonzero().flatten()
        with self._context():
            if self._keeps:
                logits = self.model(**inputs, use_cache=False, logits_to_keep=kept).logits
            else:
                logits = self.model(**inputs, use_cache=False).logits[:, kept]
        return logits, mask[:, kept]

    def modalities(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Text tokens and image tokens of a batch, boolean ``[B, T]`` each; padding is neither."""
        ids, attended = batch["input_ids"], batch.get("attention_mask")
        text = token_mask("text", ids, attended, None, self._media)
        return text.to(self.device), (token_mask("mean", ids, attended) & ~text).to(self.device)

    def count_image_tokens(self, input_ids: list[int]) -> int:
        """How many tokens of a sample stand for its images."""
        return sum(token in self._media for token in input_ids)

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name not in _NOT_INPUTS
        }

    def _context(self) -> AbstractContextManager:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)
