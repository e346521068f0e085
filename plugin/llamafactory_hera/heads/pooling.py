"""Which tokens a head representation is averaged over, and the average."""

from collections.abc import Collection
from typing import Literal, get_args

import torch
from torch import Tensor

Pooling = Literal["answer", "text", "mean", "last"]
IGNORE_INDEX = -100


def token_mask(
    pooling: Pooling,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    media_token_ids: Collection[int] = (),
) -> Tensor:
    """The tokens that enter the average, for one batch.

    ``answer`` is the paper's choice (app. A): the tokens that enter the LM loss, which are the caption in stage 1 and
    the assistant's turns in stage 2. The others are this project's options: ``text`` takes every token that is
    neither padding nor a placeholder of an image or a video, ``mean`` every token but padding, ``last`` the last
    token but padding.

    Args:
        pooling: One of the four.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 0 for padding; absent means no padding.
        labels: ``[B, T]`` with -100 where no loss is taken; needed by ``answer``.
        media_token_ids: Placeholder ids that image and video features replace; used by ``text``.

    Returns:
        Boolean ``[B, T]``. A row may be empty (a sample without an answer): it has no representation.

    Raises:
        ValueError: Unknown pooling, or ``answer`` without labels.
    """
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if pooling == "answer":
        if labels is None:
            raise ValueError("hera_pooling: 'answer' averages over the tokens with a label, and the batch has none.")
        return (labels != IGNORE_INDEX) & attended
    if pooling == "text":
        media = torch.tensor(sorted(media_token_ids), dtype=input_ids.dtype, device=input_ids.device)
        return attended & ~torch.isin(input_ids, media)
    if pooling == "mean":
        return attended
    if pooling == "last":
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(attended, positions, -1).amax(dim=1, keepdim=True)
        return attended & (positions == last)
    raise ValueError(f"hera_pooling: {pooling!r} is unknown; choose one of {', '.join(get_args(Pooling))}.")


def pool_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of ``mask``; zero for a row without any.

    Args:
        hidden: ``[B, T, X]``.
        mask: ``[B, T]``, true or 1 for the tokens that enter.

    Returns:
        ``[B, X]`` in the dtype of ``hidden``.
    """
    # divided in single precision and before the product: float16 can hold neither a large count nor a long sum
    wide = mask.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = wide / wide.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.bmm(weights.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)
