"""Alignment objectives, registered by name: each is one class in one file of this folder."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Objective, Options, Plan, PooledBatch, Step, TokenBatch, create, find, names, register

__all__ = ["Objective", "Options", "Plan", "PooledBatch", "Step", "TokenBatch", "create", "find", "names", "register"]

for _module in iter_modules(__path__):
    import_module(f".{_module.name}", __name__)
