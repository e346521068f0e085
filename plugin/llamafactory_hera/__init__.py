"""HeRA (Head-Wise Representation Alignment, arXiv 2606.23885) as a stage of LLaMA-Factory.

The names in ``__all__`` are loaded on first use, because importing LLaMA-Factory also imports this package:

    from llamafactory_hera import HeraConfig, HeraTrainer
"""

from importlib import import_module

TYPE_CHECKING = False  # importing `typing` would take longer than the rest of this module
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.3.0"

_MODULES = {
    "Aligner": "training",
    "HeraConfig": "config",
    "HeraSFTTrainer": "integrations.trl",
    "HeraTrainer": "integrations.transformers",
    "mutual_knn": "alignment",
    "select_heads": "selection.rows",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> "Any":
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
