"""Where the tokens of a sample's image are, for models that give every image the same square grid of tokens."""

from typing import Any

import torch
from torch import Tensor

#: Model types whose images are all one square grid of tokens, row by row.
_FIXED_GRID = ("llava", "vipllava")


def grid_side(config: Any, objective: str) -> int:
    """Tokens along a side of an image's grid.

    Args:
        config: The model's configuration.
        objective: Name of the objective that needs it, for the message.

    Raises:
        ValueError: Images of this model are no fixed square grid.
    """
    said = f"hera_objective: {objective} needs images that are a fixed square grid of tokens"
    remedy = "use a LLaVA-style model (`llamafactory-hera build` makes one from an LLM), or another objective"
    if config.model_type not in _FIXED_GRID:
        raise ValueError(f"{said}, and those of {config.model_type!r} models are none; {remedy}.")
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise ValueError(f"{said}, and this model's images are {size[0]} x {size[1]} pixels; {remedy}.")
        size = size[0]
    return size // patch


def image_token_id(config: Any) -> int:
    """The placeholder of an image in ``input_ids``."""
    found = getattr(config, "image_token_id", None)
    return config.image_token_index if found is None else found


def token_positions(
    input_ids: Tensor, attention_mask: Tensor | None, image: Tensor, token_id: int, per_image: int
) -> Tensor:
    """Positions of the tokens of one image of each sample.

    Args:
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 0 for padding and the host's dummy image; None for no padding.
        image: ``[B, 2]``: which image, of how many; ``(0, 0)`` for a sample without one, which gives any position.
        token_id: The placeholder.
        per_image: Tokens of an image.

    Returns:
        ``[B, per_image]``.

    Raises:
        ValueError: A sample has another number of image tokens than its images should have.
    """
    shown = input_ids == token_id
    if attention_mask is not None:
        shown &= attention_mask.bool()
    index, count = image.unbind(dim=1)
    found = shown.sum(dim=1)
    wrong = (found != count * per_image) & (count > 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"cutoff_len: a sample with {int(count[row])} images has {int(found[row])} image tokens in the place of "
            f"{int(count[row]) * per_image} ({per_image} an image). Raise cutoff_len if they were cut off; a model "
            "whose images take other numbers of tokens does not work with this objective."
        )
    length = input_ids.shape[1]
    places = torch.where(shown, torch.arange(length, device=input_ids.device), length - 1).sort(dim=1).values
    columns = index.unsqueeze(1) * per_image + torch.arange(per_image, device=input_ids.device)
    return places.gather(1, columns.clamp(max=length - 1))
