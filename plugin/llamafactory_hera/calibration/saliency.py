"""How much a head's attention crosses between text and image: I-SAL (RAH-LoRA, eq. 3 and 4)."""

import torch
from torch import Tensor


def attention_flow(attention: Tensor, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention between text and image in both directions (eq. 3), and from text to each image token.

    Under a causal mask a text token behind the image is seen by no image token, so that the image-to-text half is
    what image tokens give to the text in front of them; it is kept as the paper has it.

    Args:
        attention: One sample's weights ``[H, T, T]``, queries before keys.
        text: Positions of its text tokens, ``[n_text]``.
        image: Positions of its image tokens, ``[n_image]``.

    Returns:
        ``r`` of eq. 3, ``[H]``, and the mean over text tokens of the attention to each image token, the
        ``A^{T->I}`` of eq. 10, ``[H, n_image]``; both in fp32.
    """
    to_image = attention[:, text][:, :, image].float()
    to_text = attention[:, image][:, :, text].float()
    return (to_image.mean(dim=(1, 2)) + to_text.mean(dim=(1, 2))) / 2, to_image.mean(dim=1)


def resize_map(attention_map: Tensor, size: int) -> Tensor:
    """An attention map over image tokens, in raster order, with ``size`` bins that keep its mass.

    Models with images of several resolutions give maps of several lengths, and their average needs one. The identity
    where the length is ``size`` already.

    Args:
        attention_map: ``[H, n_image]``.
        size: At most ``n_image``.

    Returns:
        ``[H, size]``.
    """
    length = attention_map.shape[-1]
    return torch.nn.functional.adaptive_avg_pool1d(attention_map, size) * (length / size)


def standardize(saliency: Tensor) -> Tensor:
    """Standard scores within each layer (eq. 4), with the population's deviation; zero where all heads are equal.

    Args:
        saliency: ``r``, ``[L, H]``.

    Returns:
        ``[L, H]`` in fp64.
    """
    values = saliency.double()
    centred = values - values.mean(dim=1, keepdim=True)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    # the paper's epsilon, far below any deviation that attention weights have, so that the unit stays a deviation
    return centred / (deviation + 1e-12)
