"""Alignment objectives; each is one registered class."""

from . import cka, contrastive, feature  # noqa: F401 (registers their classes)
from .base import Objective, Options, PooledBatch, create, find, names, register
from .tokens import Plan, Step, TokenBatch, TokenObjective

__all__ = [
    "Objective",
    "Options",
    "Plan",
    "PooledBatch",
    "Step",
    "TokenBatch",
    "TokenObjective",
    "create",
    "find",
    "names",
    "register",
]
