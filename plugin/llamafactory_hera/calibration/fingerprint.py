"""A fingerprint of a model in memory: whether a profile belongs to it."""

import hashlib

from torch import nn

_VALUES = 256


def model_fingerprint(model: nn.Module) -> str:
    """A digest of the name, type, shape and some evenly spread values of every weight.

    Any training changes all weights, so a few hundred values of each tell models apart in a moment.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // _VALUES)].float().cpu()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()
