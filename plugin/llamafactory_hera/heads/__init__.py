"""Which attention heads or layers, and how to read them from a model of transformers."""

from typing import TYPE_CHECKING, Any

from .targets import Target, Targets

if TYPE_CHECKING:
    from .capture import HeadCapture, LayerCapture

__all__ = ["HeadCapture", "LayerCapture", "Target", "Targets"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from . import capture  # with torch and transformers, which reading names and scores can do without

    return getattr(capture, name)
