"""Selects tokens of a sample: the tokens over which a representation is averaged, and the tokens of an image."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .targets import Pooling

IGNORE_INDEX = -100

#: Model types that turn every image into one square grid of tokens, row by row.
_FIXED_GRID = ("llava", "vipllava")


def token_mask(
    pooling: Pooling,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    media_token_ids: Collection[int] = (),
) -> Tensor:
    """Marks the tokens to average, boolean ``[B, T]``; all tensors have this shape.

    ``answer`` is the paper's choice (app. A): the labeled tokens, that is, the caption in stage 1 and the assistant's
    turns in stage 2. The other options are this project's: ``text`` is all text, ``mean`` is all tokens except
    padding, and ``last`` is the last token. ``mean`` and ``last`` include ``media_token_ids``, the placeholders of
    images and videos. Without an attention mask, no token is padding.
    Raises ``ValueError`` if the mask has another shape.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"data_collator: its attention_mask has the shape {list(attention_mask.shape)}, but its input_ids "
            f"have {list(input_ids.shape)}; keep one padded row per sample (disable data_flatten and packing)."
        )
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if pooling in ("answer", "text"):
        for token in media_token_ids:  # a loop, because a tensor of the few ids would be copied to the device
            attended = attended & (input_ids != token)
    if pooling == "answer":
        if labels is None:
            raise ValueError("hera_pooling: answer averages over labeled tokens, but the batch has none; set text.")
        return attended & (labels != IGNORE_INDEX)
    if pooling != "last":
        return attended
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = torch.where(attended, positions, -1).amax(dim=1, keepdim=True)
    return attended & (positions == last)


def check_row_count(batch: dict[str, Any], samples: int) -> None:
    """Raises ``ValueError`` unless a collator made one row per sample."""
    if (rows := len(batch["input_ids"])) != samples:
        raise ValueError(
            f"data_collator: it makes {rows} rows from {samples} samples; keep one row per sample, in the same order "
            "(packed rows need pieces_of)."
        )


def by_piece(batch: dict[str, Any], pieces: Tensor, count: int) -> dict[str, Any]:
    """Views a batch of packed rows as ``count`` samples, one per piece, with tensors ``[count, B * T]``.

    Each sample has the tokens of all rows, but attends only to the tokens of its piece. ``pieces`` ``[B, T]`` contains
    the number of each token's piece, counted from 1, or 0 for a token outside all pieces.
    """
    names = [name for name in ("input_ids", "labels") if name in batch]
    tokens: dict[str, Any] = {name: batch[name].view(1, -1).expand(count, -1) for name in names}
    numbers = torch.arange(1, count + 1, device=pieces.device).unsqueeze(1)
    return {**batch, **tokens, "attention_mask": pieces.view(1, -1) == numbers}


def pool_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Averages ``[B, T, X]`` over a mask ``[B, T]``, or ``[N, B * T]`` for packed rows; 0 if the mask is empty."""
    packed = hidden.shape[:-1] != mask.shape
    if packed and (hidden.dim() < 3 or mask.shape[1:] != (hidden.shape[:2].numel(),)):
        raise ValueError(
            f"mask: its shape {list(mask.shape)} does not fit a layer that returns {list(hidden.shape)}; give a "
            "boolean mask with the shape of input_ids, and use a model whose layers return [batch, tokens, size]."
        )
    # Weights are divided in fp32 before the product, because large counts and long sums overflow float16.
    wide = mask.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = (wide / wide.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden.dtype)
    used = (mask.any(dim=0) if packed else mask.bool()).view(hidden.shape[:-1])
    hidden = hidden.masked_fill(~used.unsqueeze(-1), 0)  # a weight of 0 would not remove a NaN
    with torch.autocast(hidden.device.type, enabled=False):  # keep the precision of an fp32 residual stream
        return weights @ hidden.flatten(0, 1) if packed else torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)


def grid_side(config: Any, objective: str) -> int:
    """Returns the number of tokens per side of an image's grid; raises ``ValueError`` if there is no square grid."""
    tower: Any = getattr(config, "vision_config", None)
    problem = ""
    if config.model_type not in _FIXED_GRID:
        problem = f"{config.model_type!r} models do not create such a grid"
    elif getattr(config, "vision_feature_select_strategy", "default") == "full" and "siglip" not in tower.model_type:
        problem = "this model also keeps the CLS token of its vision tower"
    elif not isinstance(tower.image_size, int):
        problem = f"the image_size of this model's vision tower is {tower.image_size}, not one number"
    if problem:
        raise ValueError(
            f"hera_objective: {objective} needs images that become a fixed square grid of tokens, but {problem}; use "
            "a LLaVA-style model (`llamafactory-hera build` makes one from an LLM), or another objective."
        )
    return tower.image_size // tower.patch_size


def token_positions(
    input_ids: Tensor, attention_mask: Tensor | None, image: Tensor, token_id: int, per_image: int
) -> Tensor:
    """Finds the token positions of one image per sample, ``[B, per_image]``; arbitrary for a sample without images.

    ``input_ids`` and the attention mask are ``[B, L]``; the mask is 0 for padding and for a host's dummy image.
    ``image`` ``[B, 2]`` is the image's index and the number of images. Each has ``per_image`` tokens ``token_id``.
    """
    visual = _visual(input_ids, attention_mask, token_id)
    length = input_ids.shape[1]
    places = torch.where(visual, torch.arange(length, device=input_ids.device), length - 1).sort(dim=1).values
    columns = image[:, :1] * per_image + torch.arange(per_image, device=input_ids.device)
    return places.gather(1, columns.clamp(max=length - 1))


def _visual(input_ids: Tensor, attention_mask: Tensor | None, token_id: int) -> Tensor:
    visual = input_ids == token_id
    return visual if attention_mask is None else visual & attention_mask.bool()


def check_image_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, image: Tensor, token_id: int, per_image: int
) -> None:
    """Raises ``ValueError`` unless every sample contains all tokens of its images; expects a batch on the CPU."""
    count, found = image[:, 1], _visual(input_ids, attention_mask, token_id).sum(dim=1)
    wrong = (found != count * per_image) & (count > 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"dataset: a sample with {int(count[row])} images has {int(found[row])} image tokens instead of "
            f"{int(count[row]) * per_image}; raise the maximum length of a sample if tokens were cut off, or use "
            "another objective if the number of tokens per image varies in this model."
        )
