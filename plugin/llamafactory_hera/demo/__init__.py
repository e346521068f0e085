"""A tiny model, teacher and dataset that are built offline, to try the whole path in minutes."""

from .build import build_demo

__all__ = ["build_demo"]
