"""Which attention heads, and how to read them from a model of transformers."""

from .capture import HeadCapture
from .head_set import HeadId, HeadSet

__all__ = ["HeadCapture", "HeadId", "HeadSet"]
