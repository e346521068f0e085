"""Runs the host's SFT workflow with the HeRA trainer in the place of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from llamafactory_hera.objectives import find
from llamafactory_hera.teachers.checkpoint import teacher_fingerprint, teacher_folder

from .auto import resolve_sites
from .checks import check_model, check_run
from .dataset_checks import checked_dataset
from .model_card import write_card
from .state import check_checkpoint, checkpoint_of
from .trainer import HeraTrainer


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
    check_run(model_args, data_args, training_args, finetuning_args)
    check_model(model_args, finetuning_args)
    checkpoint = checkpoint_of(training_args)
    sites = resolve_sites(model_args, data_args, training_args, finetuning_args)
    check_model(model_args, finetuning_args, sites)
    if checkpoint is not None:
        fingerprint = teacher_fingerprint(teacher_folder(finetuning_args.hera_teacher))
        check_checkpoint(checkpoint, sites, fingerprint, finetuning_args)
    curves = _curves(finetuning_args.hera_objective)

    def plot_loss(folder: str, keys: list[str]) -> None:
        workflow_plot(folder, keys=[*keys, *curves])

    def create_card(trainer: HeraTrainer, *rest: Any) -> None:
        workflow_card(trainer, *rest)
        write_card(trainer)  # the host goes by the trainer's own method only when it pushes

    workflow_plot, workflow_card = workflow.plot_loss, workflow.create_modelcard_and_push
    replacements = {
        "get_dataset": checked_dataset(workflow.get_dataset),
        "CustomSeq2SeqTrainer": partial(HeraTrainer, sites),
        "plot_loss": plot_loss,
        "create_modelcard_and_push": create_card,
    }
    with _replaced(workflow, replacements):
        return run_sft(*arguments)


def _curves(objective: str) -> list[str]:
    """What `plot_loss: true` draws beside the host's own."""
    measured = ["hera_mknn"] if find(objective).view == "pooled" else []
    return ["lm_loss", "hera_loss", *measured, *find(objective).logged]


@contextmanager
def _replaced(module: ModuleType, replacements: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in replacements}
    vars(module).update(replacements)
    try:
        yield
    finally:
        vars(module).update(before)
