"""The changes that a run of the plugin's stages needs. Each patch imports the plugin only when it is applied."""

import os
import sys
from collections.abc import Mapping
from dis import opmap
from pkgutil import resolve_name
from typing import Any

from .registry import around, patch, require

_OURS = ("llamafactory_hera.", "llamafactory_harc.", "hera_patches.")
#: The stage of a run from the moment its arguments are parsed until its workflow starts.
_pending: str | None = None


@patch(
    "llamafactory.hparams.finetuning_args",
    functions={"FinetuningArguments.__post_init__": "self", "FinetuningArguments.to_dict": "self"},
)
def finetuning_args(module: Any) -> None:
    """Adds the plugin's stages and their keys to the fine-tuning arguments.

    The host parses exactly five dataclasses, so the keys must be fields of one of them. ``stage: hera`` becomes
    ``stage: sft`` plus ``own_stage``, because the host accepts the options of SFT under no other stage.
    """
    from llamafactory_hera.integrations.llamafactory.arguments import extend

    module.FinetuningArguments = extend(module.FinetuningArguments, require)


@patch(
    "llamafactory.train.sft.workflow",
    functions={"run_sft": "model_args data_args training_args finetuning_args generating_args callbacks"},
    # the names that a stage replaces during a run
    used={"run_sft": "get_dataset CustomSeq2SeqTrainer plot_loss create_modelcard_and_push"},
)
def sft_workflow(module: Any) -> None:
    """Runs SFT with the trainer of the plugin's stage; runs of other stages call the original function."""

    @around(module)
    def run_sft(host, model_args, data_args, training_args, finetuning_args, generating_args, callbacks=None):
        global _pending
        arguments = (model_args, data_args, training_args, finetuning_args, generating_args, callbacks)
        stage = getattr(finetuning_args, "own_stage", None)
        if stage is None:
            return host(*arguments)
        from llamafactory_hera.integrations.llamafactory import STAGES

        _pending = None
        return resolve_name(STAGES[stage].run)(module, host, *arguments)


@patch(
    "llamafactory.train.tuner",
    functions={"get_train_args": "args", "_training_function": "config", "run_exp": "args callbacks"},
    used={"_training_function": "get_train_args", "run_exp": "_training_function"},
)
def tuner(module: Any) -> None:
    """Raises an error if a HeRA run trained without HeRA, and prints refusals as one line.

    The host chooses a workflow by arguments and environment variables, and each release adds more. The patch therefore
    checks that the HeRA workflow starts before the host reads data (``data_loader``), or before the host ends.
    """

    @around(module)
    def get_train_args(host: Any, args: Any = None) -> Any:
        global _pending
        from llamafactory_hera.integrations.llamafactory.arguments import STAGES, check_names

        options = (word[2:].partition("=")[0] for word in args or () if word.startswith("--"))
        # before the host refuses unknown keys without a suggestion
        check_names(args if isinstance(args, Mapping) else options)
        try:
            parsed = host(args)
        except ValueError as error:
            values = args.values() if isinstance(args, Mapping) else args or ()
            if not any(stage in values for stage in STAGES) or _is_refusal(error):
                raise
            raise ValueError(str(error)) from error  # turns the host's error into a refusal
        _pending = getattr(parsed[3], "own_stage", None) if parsed[2].do_train else None
        return parsed

    @around(module)
    def _training_function(host: Any, config: dict[str, Any]) -> None:
        host(config)
        _check_arrived("has trained")

    @around(module)
    def run_exp(host: Any, args: Any = None, callbacks: Any = None) -> None:
        try:
            host(args, callbacks)
        except (ValueError, RuntimeError) as error:
            # a program that passes `args` handles the error itself
            if args is not None or os.environ.get("HERA_DEBUG", "0") not in ("", "0") or not _is_refusal(error):
                raise
            sys.exit(f"llamafactory-hera: {error}")


@patch(
    "llamafactory.data.loader",
    functions={"get_dataset_list": "dataset_names dataset_dir", "has_tokenized_data": "path"},
    used={"_get_merged_dataset": "get_dataset_list", "get_dataset": "_get_merged_dataset has_tokenized_data"},
)
def data_loader(module: Any) -> None:
    """Stops a HeRA run that is about to train without HeRA; every workflow reads its data through these functions."""

    @around(module)
    def get_dataset_list(host: Any, *args: Any) -> Any:
        _check_arrived("was about to train")
        return host(*args)

    @around(module)
    def has_tokenized_data(host: Any, *args: Any) -> Any:
        _check_arrived("was about to train")
        return host(*args)


@patch(
    "llamafactory.train.callbacks",
    functions={
        "LogCallback.on_log": "self args state control kwargs",
        "LogCallback._write_log": "self output_dir logs",
    },
    used={"LogCallback.on_log": "_write_log"},
)
def log_callback(module: Any) -> None:
    """Adds HeRA's values to the fixed set of keys in `trainer_log.jsonl`, which the web UI plots."""

    @around(module.LogCallback)
    def on_log(host: Any, self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.log_history[-1] if state.log_history else {}
        extra = {key: value for key, value in last.items() if key == "lm_loss" or key.startswith(("hera_", "harc_"))}
        if not extra:
            return host(self, args, state, control, **kwargs)
        write = self._write_log
        # another thread writes the line later, so the values are bound now
        self._write_log = lambda output_dir, logs: write(output_dir, {**logs, **extra})
        try:
            return host(self, args, state, control, **kwargs)
        finally:
            del self._write_log


@patch("llamafactory.data.template")
def templates(module: Any) -> None:
    """Adds chat templates for LLaVA-style models; the host has one only for the Vicuna format."""
    from llamafactory_hera.integrations.llamafactory.templates import register

    register(module)


def _check_arrived(what: str) -> None:
    global _pending
    stage, _pending = _pending, None  # a process may train again after the error
    if stage is not None:
        raise ValueError(
            f"stage: {stage}: LLaMA-Factory {what} without it, in another backend's workflow. Remove the backend's "
            "setting (such as use_hyper_parallel: true, USE_MCA=1 or USE_MEGATRON_BRIDGE=1), or use stage: sft."
        )


def _is_refusal(error: Exception) -> bool:
    """Returns whether a ``raise`` statement of the plugin raised the error; other errors keep their traceback."""
    last: Any = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == opmap["RAISE_VARARGS"]
    return raised and last.tb_frame.f_globals["__name__"].startswith(_OURS)
