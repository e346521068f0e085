"""Runs the HeRA workflow instead of plain SFT when the arguments ask for it.

Why: the host chooses its trainer inside ``run_sft``. The wrapper calls the original for every other run, so
``stage: sft`` is untouched.

Tested with 0.9.5. Can go when the host lets plugins add stages.
"""

from functools import wraps
from typing import Any

from .registry import differs, require

WHAT = "stage: hera in run_sft"

_PARAMETERS = ["model_args", "data_args", "training_args", "finetuning_args", "generating_args", "callbacks"]
_REPLACED = ("get_dataset", "CustomSeq2SeqTrainer", "plot_loss", "create_modelcard_and_push")


def check(module: Any) -> str | None:
    """Says what the host's workflow lacks, or None."""
    if difference := differs(module, run_sft=_PARAMETERS):
        return difference
    used = module.run_sft.__code__.co_names
    missing = [name for name in _REPLACED if not hasattr(module, name) or name not in used]
    return f"run_sft does not use {', '.join(missing)}" if missing else None


def apply(module: Any) -> None:
    """Wraps ``run_sft``."""
    original = module.run_sft

    @wraps(original)
    def run_sft(
        model_args: Any,
        data_args: Any,
        training_args: Any,
        finetuning_args: Any,
        generating_args: Any,
        callbacks: list | None = None,
    ) -> None:
        arguments = (model_args, data_args, training_args, finetuning_args, generating_args, callbacks)
        if not getattr(finetuning_args, "use_hera", False):
            return original(*arguments)
        from llamafactory_hera.integrations.llamafactory.workflow import run_hera

        require()
        return run_hera(module, original, *arguments)

    module.run_sft = run_sft
