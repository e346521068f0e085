"""Runs the HeRA workflow instead of plain SFT when the arguments ask for it.

Why: the host chooses its trainer inside ``run_sft``. The wrapper calls the original for every other run, so
``stage: sft`` is untouched. Can go when the host lets plugins add stages.
"""

from typing import Any

from . import tuner
from .registry import around

FUNCTIONS = {"run_sft": "model_args data_args training_args finetuning_args generating_args callbacks"}
#: What the HeRA workflow replaces while it runs.
USED = {"run_sft": "get_dataset CustomSeq2SeqTrainer plot_loss create_modelcard_and_push"}


def apply(module: Any) -> None:

    @around(module)
    def run_sft(
        host: Any,
        model_args: Any,
        data_args: Any,
        training_args: Any,
        finetuning_args: Any,
        generating_args: Any,
        callbacks: list | None = None,
    ) -> None:
        arguments = (model_args, data_args, training_args, finetuning_args, generating_args, callbacks)
        if not getattr(finetuning_args, "use_hera", False):
            return host(*arguments)
        from llamafactory_hera.integrations.llamafactory.workflow import run_hera

        tuner.arrived()
        return run_hera(module, host, *arguments)
