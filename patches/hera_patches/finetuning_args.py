"""Adds the ``hera_*`` keys and the value ``stage: hera`` to the host's fine-tuning arguments.

Why: the host parses exactly five dataclasses, so the keys must live in one of them. ``stage: hera`` becomes
``stage: sft`` plus ``use_hera``: everywhere but in the trainer HeRA is supervised fine-tuning, and the host forbids
SFT's options to any other stage value. Can go when the host lets plugins add arguments.
"""

from dataclasses import is_dataclass
from typing import Any

from .registry import require

WHAT = "stage: hera and the hera_* keys in FinetuningArguments"


def check(module: Any) -> str | None:
    """Says what the host's class lacks, or None."""
    host = getattr(module, "FinetuningArguments", None)
    if not (isinstance(host, type) and is_dataclass(host)):
        return "FinetuningArguments is not a dataclass"
    missing = [name for name in ("stage", "__post_init__", "to_dict") if not hasattr(host, name)]
    if missing:
        return f"FinetuningArguments has no {', '.join(missing)}"
    taken = [name for name in host.__dataclass_fields__ if name.startswith("hera_")]
    return f"FinetuningArguments already has {', '.join(taken)}" if taken else None


def apply(module: Any) -> None:
    """Rebinds ``FinetuningArguments`` to a subclass."""
    from llamafactory_hera.integrations.llamafactory.arguments import extend

    module.FinetuningArguments = extend(module.FinetuningArguments, require)
