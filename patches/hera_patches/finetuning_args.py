"""Adds the ``hera_*`` keys and the value ``stage: hera`` to the host's fine-tuning arguments.

Why: the host parses exactly five dataclasses, so the keys must live in one of them. ``stage: hera`` becomes
``stage: sft`` plus ``use_hera``: everywhere but in the trainer HeRA is supervised fine-tuning, and the host forbids
SFT's options to any other stage value. Can go when the host lets plugins add arguments.
"""

from typing import Any

from .registry import require

FUNCTIONS = {"FinetuningArguments.__post_init__": "self", "FinetuningArguments.to_dict": "self"}


def apply(module: Any) -> None:
    from llamafactory_hera.integrations.llamafactory.arguments import extend

    module.FinetuningArguments = extend(module.FinetuningArguments, require)
