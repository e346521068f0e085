"""The names of attention heads and layers, and the hooks that read heads and layers from a transformers model."""

from .targets import Target, Targets

__all__ = ["Target", "Targets"]
