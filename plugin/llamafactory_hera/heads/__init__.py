"""Which attention heads or layers, and how to read them from a model of transformers."""

from .capture import HeadCapture
from .head_set import HeadId, HeadSet
from .layer_capture import LayerCapture
from .layer_set import LayerSet

__all__ = ["HeadCapture", "HeadId", "HeadSet", "LayerCapture", "LayerSet", "Sites"]

#: What a run aligns.
Sites = HeadSet | LayerSet
