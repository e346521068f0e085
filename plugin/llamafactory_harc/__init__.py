"""HARC (Harmfulness-And-Refusal Coupling, arXiv 2607.00572): a second method on the foundation of llamafactory_hera.

Two directions in a chat model's residual stream, harmfulness and refusal, are read at two positions of the prompt, and
twice more over the response. Training couples them: harmful rows are pushed along the directions, benign rows are
pushed off them, and a KL term keeps the model close to its base on benign text. docs/harc.md says what to expect.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "HarcConfig": "config",
    "Coupler": "coupler",
    "HarcTrainer": "trainer",
    "HarcTrainerMixin": "trainer",
    "HarcSFTTrainer": "trl",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)
