"""The forward passes of selection and calibration: which samples run together, within the memory that there is."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Mode
from ..heads.families import media_token_ids, model_config, text_decoder
from ..heads.targets import Pooling
from ..heads.tokens import token_mask
from .samples import Collate, Features

logger = logging.getLogger(__name__)

#: Samples of one forward pass, by their numbers.
Batch = tuple[int, ...]


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[Batch]:
    """Batches of samples of like length, longest first: little padding, and memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def run_batches(
    batches: list[Batch],
    features: Sequence[Features],
    collate: Collate,
    run: Callable[[dict[str, Any]], Any],
    num_workers: int = 0,
) -> Iterator[tuple[Batch, Any]]:
    """Yields each batch, whole or, once memory has run out, in parts, with the result of its pass."""
    pending = list(batches)
    while pending:
        dataset: Any = pending  # anything with a length and items will do
        make = partial(_collated, features=features, collate=collate)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=make)
        for done, inputs in enumerate(loader):
            try:
                result = run(inputs)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or len(pending[done]) == 1:
                    raise
                result = None
            if result is None:  # outside of the handler, where the failed pass's tensors are let go of
                limit = len(pending[done]) // 2
                pending = [
                    batch[start : start + limit] for batch in pending[done:] for start in range(0, len(batch), limit)
                ]
                clear_device_cache()
                logger.warning("Out of memory: going on with batches of %d samples.", limit)
                break
            yield pending[done], result
        else:
            return


def _collated(batch: Batch, features: Sequence[Features], collate: Collate) -> dict[str, Any]:
    return collate([dict(features[row]) for row in batch])  # copies: the host's collator takes samples apart


class Forward:
    """How a batch goes through a model: without labels, without a cache, without logits that nobody reads.

    The model is one of transformers, bare or under PEFT; ``llm`` runs its text decoder alone. ``autocast`` is the type
    to compute in, where it is not the weights' own.
    """

    def __init__(self, model: nn.Module, mode: Mode = "mllm", autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        #: Token ids that stand for images or other media.
        self.media = media_token_ids(model_config(model))
        self._target = text_decoder(model) if mode == "llm" else model
        self._autocast = autocast
        peft_model: Any = model
        inner = peft_model.get_base_model() if hasattr(model, "get_base_model") else model
        self._can_skip_logits = mode == "mllm" and "logits_to_keep" in inspect.signature(inner.forward).parameters

    def run(self, batch: dict[str, Any]) -> None:
        """A pass for what is captured on the way."""
        # by index: of a slice, not contiguous, PyTorch multiplies bfloat16 by a copy of lm_head for each sample
        self._call(batch, torch.zeros(1, dtype=torch.long, device=self.device))

    def logits(self, batch: dict[str, Any], positions: Tensor) -> Tensor:
        """Logits ``[B, P, V]`` at some positions ``[P]``, on the model's device, of every sample."""
        logits = self._call(batch, positions).logits
        return logits if self._can_skip_logits else logits[:, positions]

    def tokens(self, pooling: Pooling, batch: dict[str, Any]) -> Tensor:
        """The tokens of a batch that a pooling takes, boolean ``[B, T]`` on the model's device."""
        attended, labels = batch.get("attention_mask"), batch.get("labels")
        return token_mask(pooling, batch["input_ids"], attended, labels, self.media).to(self.device)

    def _call(self, batch: dict[str, Any], keep: int | Tensor) -> Any:
        inputs = send_to_device({name: value for name, value in batch.items() if name != "labels"}, self.device)
        options = {"logits_to_keep": keep} if self._can_skip_logits else {}
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return self._target(**inputs, use_cache=False, **options)
