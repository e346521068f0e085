"""Which attention heads or layers, and how to read them from a model of transformers."""

from .capture import HeadCapture, LayerCapture
from .targets import Target, Targets

__all__ = ["HeadCapture", "LayerCapture", "Target", "Targets"]
