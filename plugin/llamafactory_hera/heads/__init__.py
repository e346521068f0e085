"""The names of attention heads and layers, and the hooks that read heads and layers from a transformers model."""

from typing import TYPE_CHECKING, Any

from .targets import Target, Targets

if TYPE_CHECKING:
    from .capture import HeadCapture, LayerCapture

__all__ = ["HeadCapture", "LayerCapture", "Target", "Targets"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from . import capture  # imports torch and transformers, which names and scores do not need

    return getattr(capture, name)
