"""Runs the host's SFT workflow with the HeRA mixin in front of the host's trainer."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from llamafactory.data.parser import get_dataset_list
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from transformers import TrainerCallback

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.distributed import on_first
from llamafactory_hera.files import locked
from llamafactory_hera.heads.targets import AUTO
from llamafactory_hera.integrations.messages import show_messages
from llamafactory_hera.integrations.transformers import HeraTrainerMixin
from llamafactory_hera.objectives import TokenObjective
from llamafactory_hera.selection.resolve import resolve_targets
from llamafactory_hera.teachers.encoder import teacher_fingerprint, teacher_folder
from llamafactory_hera.training.checkpoint import RunIdentity, checkpoint_of

from .checks import check_run, checked_dataset, packed_pieces, resolved_mode
from .inputs import selecting_run
from .recipe import HostArguments, host_words


class HeraSftTrainer(HeraTrainerMixin, CustomSeq2SeqTrainer):
    """The host's SFT trainer with HeRA."""

    in_words = str


@host_words()
def run_hera(workflow: ModuleType, run_sft: Callable[..., None], *arguments: Any) -> None:
    """Trains with HeRA; without ``do_train`` it runs the host's SFT workflow unchanged.

    ``workflow`` is the host's ``train.sft.workflow`` module, and ``arguments`` are the arguments of its ``run_sft``.
    """
    host = HostArguments(*arguments[:4])
    if not host.training.do_train:
        return run_sft(*arguments)
    show_messages(logging.getLogger("llamafactory"))  # its handlers include the web UI's
    config = HeraConfig.from_keys(host.finetuning)
    configuration = check_run(config, host)
    if config.named_targets == AUTO:
        config = resolved_mode(config, host)
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked(host.training.output_dir)))
        checkpoint = checkpoint_of(host.training)
        host.training.resume_from_checkpoint = checkpoint  # the host would read the word `false` as a path
        targets = resolve_targets(config, selecting_run(config, host, configuration))
        if config.named_targets == AUTO:
            setattr(host.finetuning, config.targets_key, str(targets))
        if checkpoint is not None:
            RunIdentity(targets, teacher_fingerprint(teacher_folder(config.teacher)), config).check(checkpoint)

        named = get_dataset_list(host.data.dataset, host.data.dataset_dir)
        objective = config.objective_class()
        plot_loss, create_card = workflow.plot_loss, workflow.create_modelcard_and_push

        def make_trainer(*args: Any, **kwargs: Any) -> HeraSftTrainer:
            pieces_of = packed_pieces if host.data.neat_packing else None
            trainer = HeraSftTrainer(*args, hera=config, targets=targets, pieces_of=pieces_of, **kwargs)
            trainer.hub_datasets = [each.dataset_name for each in named if each.load_from == "hf_hub"]
            return trainer

        def plot_curves(folder: str, keys: list[str]) -> None:
            mknn = [] if issubclass(objective, TokenObjective) else ["hera_mknn"]
            plot_loss(folder, keys=[*keys, "lm_loss", "hera_loss", *mknn, *objective.logged])

        def create_card_and_push(trainer: HeraSftTrainer, *rest: Any) -> None:
            create_card(trainer, *rest)
            trainer.write_hera_card()  # the host calls the trainer's own method only if it pushes to a hub

        replacements: dict[str, Any] = {
            "get_dataset": checked_dataset(workflow.get_dataset),
            "plot_loss": plot_curves,
            "create_modelcard_and_push": create_card_and_push,
        }
        run_replaced(workflow, run_sft, arguments, make_trainer, replacements)


def run_replaced(
    workflow: ModuleType,
    run_sft: Callable[..., None],
    arguments: Sequence[Any],
    make_trainer: Callable[..., Any],
    replacements: dict[str, Any],
) -> None:
    """Runs the host's SFT workflow with another trainer and other functions; fails if the trainer is not used."""
    proof = _Proof()

    def make_known(*args: Any, **kwargs: Any) -> Any:
        proof.trainer = make_trainer(*args, **kwargs)
        return proof.trainer

    replacements = {**replacements, "CustomSeq2SeqTrainer": make_known}
    before = {name: getattr(workflow, name) for name in replacements}
    vars(workflow).update(replacements)
    try:
        run_sft(*arguments[:-1], [*(arguments[-1] or []), proof])
    finally:
        vars(workflow).update(before)


class _Proof(TrainerCallback):
    """Stops a run before its first step if the workflow did not create the trainer of the stage."""

    trainer: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer is None:
            raise RuntimeError(
                "stage: LLaMA-Factory's SFT workflow does not use CustomSeq2SeqTrainer, so "
                "it trains without HeRA or HARC. Remove the setting that chose another trainer, or use stage: sft."
            )
