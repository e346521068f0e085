"""Runs the host's SFT workflow with its own trainer under the HeRA mixin."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.transformers import HeraTrainerMixin
from llamafactory_hera.objectives import find
from llamafactory_hera.teachers.checkpoint import teacher_fingerprint, teacher_folder
from llamafactory_hera.training.checkpoint import check_checkpoint, checkpoint_of

from .auto import resolve_targets
from .checks import check_model, check_run, checked_dataset


class HeraSftTrainer(HeraTrainerMixin, CustomSeq2SeqTrainer):
    """The host's SFT trainer with HeRA."""


def run_hera(
    workflow: ModuleType,
    run_sft: Callable[..., None],
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    generating_args: Any,
    callbacks: list | None = None,
) -> None:
    """Trains with HeRA; without ``do_train`` it is the host's SFT workflow.

    Args:
        workflow: The host's ``train.sft.workflow`` module.
        run_sft: Its unwrapped function.
        model_args: The host's five sets of arguments and its callbacks.
        data_args: See ``model_args``.
        training_args: See ``model_args``.
        finetuning_args: See ``model_args``; holds the ``hera_*`` keys.
        generating_args: See ``model_args``.
        callbacks: See ``model_args``.

    Raises:
        ValueError: A setting, the teacher, the model or the data does not fit; before weights are loaded.
    """
    arguments = (model_args, data_args, training_args, finetuning_args, generating_args, callbacks)
    if not training_args.do_train:
        return run_sft(*arguments)
    log_through_host()
    config = HeraConfig.from_keys(finetuning_args)
    check_run(config, model_args, data_args, training_args)
    check_model(config, model_args)
    checkpoint = checkpoint_of(training_args)
    training_args.resume_from_checkpoint = checkpoint  # `false` written out is no path
    targets = resolve_targets(config, model_args, data_args, training_args, finetuning_args)
    check_model(config, model_args, targets)
    if checkpoint is not None:
        check_checkpoint(checkpoint, targets, teacher_fingerprint(teacher_folder(config.teacher)), config)

    def plot_loss(folder: str, keys: list[str]) -> None:
        workflow_plot(folder, keys=[*keys, *curves(config.objective)])

    def create_card(trainer: HeraSftTrainer, *rest: Any) -> None:
        workflow_card(trainer, *rest)
        trainer.write_hera_card()  # the host goes by the trainer's own method only when it pushes

    workflow_plot, workflow_card = workflow.plot_loss, workflow.create_modelcard_and_push
    replacements = {
        "get_dataset": checked_dataset(workflow.get_dataset),
        "CustomSeq2SeqTrainer": partial(HeraSftTrainer, hera=config, targets=targets),
        "plot_loss": plot_loss,
        "create_modelcard_and_push": create_card,
    }
    with _replaced(workflow, replacements):
        return run_sft(*arguments)


def curves(objective: str) -> list[str]:
    """What `plot_loss: true` draws beside the host's own."""
    measured = ["hera_mknn"] if find(objective).view == "pooled" else []
    return ["lm_loss", "hera_loss", *measured, *find(objective).logged]


def log_through_host() -> None:
    """Hands the method's messages to the host's logger, which has the handlers, of terminal and web UI alike."""
    ours = logging.getLogger("llamafactory_hera")
    if not any(isinstance(handler, _ToHost) for handler in ours.handlers):
        ours.addHandler(_ToHost())
        ours.setLevel(logging.INFO)
        ours.propagate = False


class _ToHost(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        host = logging.getLogger("llamafactory.hera")
        if host.isEnabledFor(record.levelno):
            host.handle(record)


@contextmanager
def _replaced(module: ModuleType, replacements: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in replacements}
    vars(module).update(replacements)
    try:
        yield
    finally:
        vars(module).update(before)
