"""Runs the host's SFT workflow with its own trainer under the HeRA mixin."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Any

from llamafactory.data.parser import get_dataset_list
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from transformers import TrainerCallback

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.distributed import on_first
from llamafactory_hera.files import locked
from llamafactory_hera.heads.targets import AUTO
from llamafactory_hera.integrations.transformers import HeraTrainerMixin
from llamafactory_hera.objectives import TokenObjective, find
from llamafactory_hera.selection.resolve import resolve_targets
from llamafactory_hera.teachers.encoder import teacher_fingerprint, teacher_folder
from llamafactory_hera.training.checkpoint import check_checkpoint, checkpoint_of

from .checks import check_run, checked_dataset
from .inputs import selecting_run
from .recipe import HostArguments

logger = logging.getLogger("llamafactory_hera")


class HeraSftTrainer(HeraTrainerMixin, CustomSeq2SeqTrainer):
    """The host's SFT trainer with HeRA."""


class _Proof(TrainerCallback):
    """Stops a run before its first step whose trainer is not ours."""

    trainer: HeraSftTrainer | None = None

    def make(self, *args: Any, hub_datasets: list[str], **kwargs: Any) -> HeraSftTrainer:
        """Makes our trainer, as the host makes its own."""
        self.trainer = HeraSftTrainer(*args, **kwargs)
        self.trainer.hub_datasets = hub_datasets
        return self.trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer is None:
            raise RuntimeError(
                "stage: hera: LLaMA-Factory's SFT workflow trains without HeRA, with another trainer than "
                "CustomSeq2SeqTrainer. Remove the setting that chose it, or use stage: sft."
            )


def run_hera(workflow: ModuleType, run_sft: Callable[..., None], *arguments: Any) -> None:
    """Trains with HeRA; without ``do_train`` it is the host's SFT workflow.

    ``run_sft`` is the function of the host's ``train.sft.workflow`` that takes its sets of arguments and callbacks.

    Raises:
        ValueError: A setting, the teacher, the model or the data does not fit; before weights are loaded.
        RuntimeError: The host's workflow begins to train with another trainer.
    """
    host = HostArguments(*arguments[:4])
    if not host.training.do_train:
        return run_sft(*arguments)
    _log_through_host()
    config = HeraConfig.from_keys(host.finetuning)
    layout = check_run(config, host)
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked(host.training.output_dir)))
        checkpoint = checkpoint_of(host.training)
        host.training.resume_from_checkpoint = checkpoint  # `false` written out is no path
        targets = resolve_targets(config, selecting_run(config, host, layout))
        if config.named_targets == AUTO:
            setattr(host.finetuning, config.targets_key, str(targets))
        if checkpoint is not None:
            check_checkpoint(checkpoint, targets, teacher_fingerprint(teacher_folder(config.teacher)), config)

        def create_card(trainer: HeraSftTrainer, *rest: Any) -> None:
            workflow_card(trainer, *rest)
            trainer.write_hera_card()  # the host goes by the trainer's own method only when it pushes

        named = get_dataset_list(host.data.dataset, host.data.dataset_dir)
        hub_datasets = [each.dataset_name for each in named if each.load_from == "hf_hub"]
        proof = _Proof()
        workflow_plot, workflow_card = workflow.plot_loss, workflow.create_modelcard_and_push
        replacements: dict[str, Any] = {
            "get_dataset": checked_dataset(workflow.get_dataset, find(config.objective)),
            "CustomSeq2SeqTrainer": partial(proof.make, hera=config, targets=targets, hub_datasets=hub_datasets),
            "plot_loss": lambda folder, keys: workflow_plot(folder, keys=[*keys, *_curves(config.objective)]),
            "create_modelcard_and_push": create_card,
        }
        stack.callback(vars(workflow).update, {name: getattr(workflow, name) for name in replacements})
        vars(workflow).update(replacements)
        run_sft(*arguments[:-1], [*(arguments[-1] or []), proof])


def _curves(objective: str) -> list[str]:
    """What `plot_loss: true` draws beside the host's own."""
    measured = [] if issubclass(find(objective), TokenObjective) else ["hera_mknn"]
    return ["lm_loss", "hera_loss", *measured, *find(objective).logged]


def _log_through_host() -> None:
    """Hands the method's messages to the host's logger, which has the handlers, of terminal and web UI alike."""
    ours = logging.getLogger("llamafactory_hera")
    ours.parent = logging.getLogger("llamafactory")
    ours.setLevel(logging.NOTSET)  # forgets, too, which levels were switched off before
