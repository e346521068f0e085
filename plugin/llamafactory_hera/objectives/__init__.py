"""Alignment objectives; each is one registered class."""

from . import cka, contrastive, feature
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
    "cka",
    "contrastive",
    "create",
    "feature",
    "find",
    "names",
    "register",
]
