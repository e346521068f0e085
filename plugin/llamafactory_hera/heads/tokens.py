"""Which tokens of a sample are read: those that a representation is averaged over, and those of an image."""

from collections.abc import Collection
from typing import Any, get_args

import torch
from torch import Tensor

from .targets import Pooling

IGNORE_INDEX = -100

#: Model types whose images are all one square grid of tokens, row by row.
_FIXED_GRID = ("llava", "vipllava")


def token_mask(
    pooling: Pooling,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    media_token_ids: Collection[int] = (),
) -> Tensor:
    """The tokens that enter the average, boolean ``[B, T]``; a row without any has no representation.

    ``answer`` is the paper's choice (app. A): the tokens that enter the LM loss, which are the caption in stage 1 and
    the assistant's turns in stage 2. The others are this project's options: ``text`` takes every token but padding,
    ``mean`` every one, ``last`` the last one. Placeholders of images and videos (``media_token_ids``) are no text:
    only ``mean`` and ``last`` take them, labeled or not.
    """
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if pooling == "answer":
        if labels is None:
            raise ValueError("hera_pooling: 'answer' averages over the tokens with a label, and the batch has none.")
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
    """The attended tokens that are no placeholder of an image or a video, boolean ``[B, T]``."""
    for token in media_token_ids:  # few; as a tensor they would have to be copied to the device
        attended = attended & (input_ids != token)
    return attended


def pool_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``[B, T, X]`` over the tokens of ``mask`` ``[B, T]``, in the same dtype; 0 for a row without any.

    Raises:
        ValueError: The mask is not of these tokens, or layers hand on several streams at once.
    """
    if hidden.dim() == 3 and hidden.shape[:-1] != mask.shape:
        raise ValueError(
            f"mask: {list(mask.shape)} does not fit a pass over {list(hidden.shape[:-1])} tokens; give a boolean of "
            "the shape of its input_ids."
        )
    if hidden.shape[:-1] != mask.shape:
        raise ValueError(
            f"model_name_or_path: a layer hands on {list(hidden.shape)} for {mask.shape[0]} rows of {mask.shape[1]} "
            "tokens: several streams, as in Gemma 3n. Its layers cannot be read; use another model."
        )
    # divided in single precision and before the product: float16 can hold neither a large count nor a long sum
    wide = mask.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = wide / wide.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.bmm(weights.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)


def grid_side(config: Any, objective: str) -> int:
    """Tokens along a side of an image's grid, which ``objective`` needs to be a fixed square: others are refused."""
    needs = f"hera_objective: {objective} needs images that are a fixed square grid of tokens"
    remedy = "use a LLaVA-style model (`llamafactory-hera build` makes one from an LLM), or another objective"
    if config.model_type not in _FIXED_GRID:
        raise ValueError(f"{needs}, and those of {config.model_type!r} models are not; {remedy}.")
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    if whole and "siglip" not in config.vision_config.model_type:
        raise ValueError(f"{needs}, and this model keeps its tower's CLS token, too; {remedy}.")
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise ValueError(f"{needs}, and this model's images are {size[0]} x {size[1]} pixels; {remedy}.")
        size = size[0]
    return size // patch


def token_positions(
    input_ids: Tensor, attention_mask: Tensor | None, image: Tensor, token_id: int, per_image: int
) -> Tensor:
    """Positions ``[B, per_image]`` of the tokens of one image of each sample.

    The attention mask is 0 for padding and the host's dummy image; ``image`` ``[B, 2]`` says which image, of how many,
    ``(0, 0)`` for a sample without one, which gives any position.
    """
    shown = _shown(input_ids, attention_mask, token_id)
    length = input_ids.shape[1]
    places = torch.where(shown, torch.arange(length, device=input_ids.device), length - 1).sort(dim=1).values
    columns = image[:, :1] * per_image + torch.arange(per_image, device=input_ids.device)
    return places.gather(1, columns.clamp(max=length - 1))


def _shown(input_ids: Tensor, attention_mask: Tensor | None, token_id: int) -> Tensor:
    shown = input_ids == token_id
    return shown if attention_mask is None else shown & attention_mask.bool()


def check_image_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, image: Tensor, token_id: int, per_image: int
) -> None:
    """Refuses a batch, while it is on the CPU, whose samples have other numbers of ``token_id`` than their images.

    Args:
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``.
        image: As for :func:`token_positions`.
        token_id: The placeholder.
        per_image: How many an image has.

    Raises:
        ValueError: Tokens were cut off, or the model's images have another number.
    """
    count, found = image[:, 1], _shown(input_ids, attention_mask, token_id).sum(dim=1)
    wrong = (found != count * per_image) & (count > 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"A sample with {int(count[row])} images has {int(found[row])} image tokens instead of "
            f"{int(count[row]) * per_image} ({per_image} an image). Raise the length at which samples are cut "
            "(cutoff_len, max_length) if they were cut off; a model whose images take other numbers of tokens does "
            "not work with this objective."
        )
