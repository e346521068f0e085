"""A fingerprint of a model in memory: whether a profile belongs to it."""

import hashlib

import torch
from torch import Tensor, nn

_WORD = 8  # bytes


def model_fingerprint(model: nn.Module) -> str:
    """A digest of the name, type, shape and every value of every weight.

    A calibrated adapter changes a few rows or columns of a few projections, so a sample of values would not do. Of a
    matrix not its bytes are hashed, but their sums over rows and over columns, which the model's device computes
    where the weights lie. The sums are of whole numbers, so that no order of addition changes them.

    Returns:
        64 hexadecimal digits, the same on every device.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        for part in _condensed(parameter.detach().contiguous()):
            digest.update(part.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _condensed(weight: Tensor) -> list[Tensor]:
    """Sums of a matrix's bytes, read as whole numbers, by column and by row; anything else as it is."""
    if weight.dim() < 2 or weight[0].nbytes % _WORD or weight.data_ptr() % _WORD:
        return [weight.flatten()]
    words = weight.flatten(1).view(torch.int64)
    return [words.sum(dim=0), words.sum(dim=1)]
