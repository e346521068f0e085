"""The tokens of a sample that are read: those over which a representation is averaged, and those of an image."""

from collections.abc import Collection
from typing import Any, get_args

import torch
from torch import Tensor

from .targets import Pooling

IGNORE_INDEX = -100

#: Model types in which every image is one square grid of tokens, row by row.
_FIXED_GRID = ("llava", "vipllava")


def token_mask(
    pooling: Pooling,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    media_token_ids: Collection[int] = (),
) -> Tensor:
    """Marks the tokens that enter the average, boolean ``[B, T]``.

    ``answer`` is the paper's choice (app. A): the tokens that enter the LM loss, which are the caption in stage 1 and
    the assistant's turns in stage 2. The other options are this project's: ``text`` is all text, ``mean`` is
    everything except padding, and ``last`` is the last token. Only ``mean`` and ``last`` include placeholders of
    images and videos.

    Args:
        pooling: One of these four.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``; None if no token is padding.
        labels: ``[B, T]``, needed for ``answer``.
        media_token_ids: Placeholders of images and videos.

    Raises:
        ValueError: ``answer`` without labels, or an unknown option.
    """
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if pooling == "answer":
        if labels is None:
            raise ValueError("hera_pooling: answer averages over labeled tokens, and the batch has none; set text.")
        return (labels != IGNORE_INDEX) & text_mask(input_ids, attended, media_token_ids)
    if pooling == "text":
        return text_mask(input_ids, attended, media_token_ids)
    if pooling == "mean":
        return attended
    if pooling == "last":
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(attended, positions, -1).amax(dim=1, keepdim=True)
        return attended & (positions == last)
    raise ValueError(f"hera_pooling: {pooling!r} is unknown; choose one of {', '.join(get_args(Pooling))}.")


def text_mask(input_ids: Tensor, attended: Tensor, media_token_ids: Collection[int]) -> Tensor:
    """Marks the attended tokens that are not placeholders of an image or a video, boolean ``[B, T]``."""
    for token in media_token_ids:  # a loop over the few ids, because a tensor of them would be copied to the device
        attended = attended & (input_ids != token)
    return attended


def pool_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Averages ``[B, T, X]`` over the tokens of ``mask`` ``[B, T]``, in the same dtype; 0 for a row without tokens.

    Raises:
        ValueError: The mask has another shape, or a layer returns several streams at once.
    """
    if hidden.dim() == 3 and hidden.shape[:-1] != mask.shape:
        raise ValueError(
            f"mask: its shape {list(mask.shape)} does not fit a pass over {list(hidden.shape[:-1])} tokens; give a "
            "boolean with the shape of input_ids."
        )
    if hidden.shape[:-1] != mask.shape:
        raise ValueError(
            f"model: a layer returns {list(hidden.shape)} for {mask.shape[0]} rows of {mask.shape[1]} tokens, several "
            "streams at once as in Gemma 3n, and cannot be read; align heads, or use another model."
        )
    # Weights are divided in single precision, before the product: float16 holds neither a large count nor a long sum.
    wide = mask.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = wide / wide.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.bmm(weights.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)


def grid_side(config: Any, objective: str) -> int:
    """Returns the tokens along each side of an image's grid; raises ``ValueError`` if it is not a fixed square."""
    needs = f"hera_objective: {objective} needs images that become a fixed square grid of tokens"
    remedy = "use a LLaVA-style model (`llamafactory-hera build` makes one from an LLM), or another objective"
    if config.model_type not in _FIXED_GRID:
        raise ValueError(f"{needs}, which those of {config.model_type!r} models do not; {remedy}.")
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    if whole and "siglip" not in config.vision_config.model_type:
        raise ValueError(f"{needs}, but this model also keeps the CLS token of its tower; {remedy}.")
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise ValueError(f"{needs}, but this model's images have {size[0]} x {size[1]} pixels; {remedy}.")
        size = size[0]
    return size // patch


def token_positions(
    input_ids: Tensor, attention_mask: Tensor | None, image: Tensor, token_id: int, per_image: int
) -> Tensor:
    """Finds the tokens of one image of each sample.

    Args:
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``; 0 for padding and for the dummy image that a host may add.
        image: ``[B, 2]``, which image of how many; ``(0, 0)`` for a sample without an image.
        token_id: The placeholder of an image.
        per_image: How many of them an image has.

    Returns:
        Positions ``[B, per_image]``; arbitrary for a sample without an image.
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
    """Checks that every sample has the image tokens of its images; arguments as for :func:`token_positions`.

    It runs in the collator, while the batch is on the CPU.

    Raises:
        ValueError: Tokens were cut off, or an image of this model has another number of tokens.
    """
    count, found = image[:, 1], _visual(input_ids, attention_mask, token_id).sum(dim=1)
    wrong = (found != count * per_image) & (count > 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"A sample with {int(count[row])} images has {int(found[row])} image tokens instead of "
            f"{int(count[row]) * per_image} ({per_image} per image). If they were cut off, raise the maximum length "
            "of a sample; a model whose images take other numbers of tokens does not work with this objective."
        )
