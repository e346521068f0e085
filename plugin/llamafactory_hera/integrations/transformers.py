"""HeRA in transformers' Trainer, and in every trainer that is built on it.

``HeraTrainer`` is the plain Trainer with HeRA. ``class MyHeraTrainer(HeraTrainerMixin, MyTrainer)`` adds HeRA to
another trainer. The mixin only overrides methods of transformers' Trainer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..config import HeraConfig
from ..heads import Targets
from ..selection.resolve import untouched_random_state
from ..teachers.images import IMAGE_COLUMNS, ImageLike, sample_images, undecoded
from ..training import Aligner
from ..training.checks import check_settings
from ..training.collator import PiecesOf
from ..training.gradcache import keep_random_state
from .messages import compared_at_once, in_python, log_outcome, log_setup, log_share, show_messages, translated
from .method_trainer import MethodTrainerMixin
from .model_card import write_card
from .trainer_rows import check_rows, targets_of, teacher_dtype


class HeraTrainerMixin(MethodTrainerMixin):
    """Adds ``hera_weight * L_HeRA`` to the loss of the trainer class listed after the mixin.

    Args:
        *args: The trainer's positional arguments.
        hera: The ``hera_*`` keys.
        targets: The heads or layers to align; by default, ``hera`` names them. If ``hera`` says ``auto``, they are
            selected now and written into ``output_dir/hera``, where the next run with the same settings finds them.
        images_of: Maps a row of the training data to its images. The default reads the ``images`` and ``image``
            columns, and the image parts of chat messages.
        pieces_of: Maps a packed row of the training data to its samples, which must not attend to each other. By
            default, every row is one sample.
        **kwargs: The trainer's keyword arguments.

    Raises:
        ValueError: A setting, the data, the model or the teacher is unsuitable; the message states the value and the
            remedy.
    """

    # In addition to its base, the mixin uses these private names of transformers' Trainer, as of 5.5.4:
    # `_signature_columns`, `_set_signature_columns_if_needed` and `_prepare_inputs`.

    #: Hub ids of the training data, for the model card.
    hub_datasets: Sequence[str] = ()
    #: Rewrites the keys in a message as the user writes them; ``str`` keeps the keys, for hosts with a YAML file.
    in_words: Callable[[str], str] = staticmethod(in_python)
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        hera: HeraConfig,
        targets: Targets | None = None,
        images_of: Callable[[Any], list[ImageLike]] = sample_images,
        pieces_of: PiecesOf | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(hera, HeraConfig):
            raise ValueError(f"hera: {hera!r} is not a HeraConfig; HeraConfig.from_keys creates one from hera_* keys.")
        super().__init__(*args, **kwargs)
        self.pieces_of = pieces_of
        show_messages()
        with translated(self.in_words):
            self._prepare_hera(hera, targets, images_of)

    def _prepare_hera(self, hera: HeraConfig, targets: Targets | None, images_of: Callable) -> None:
        self.check_collator(hera)
        check_settings(hera, self)
        if self.train_dataset is not None:
            with untouched_random_state():
                check_rows(self, images_of)
        if targets is None:
            targets = targets_of(self, images_of, hera)
        dtype = teacher_dtype(self.args)
        processor = getattr(self.processing_class, "image_processor", None)
        self.aligner = Aligner(self.model, hera, targets, self.args.device, dtype, self.args.seed, processor)
        self._images_of = images_of
        self._to_collect: list[dict[str, Any]] = []
        self._random_states: list[Callable[[], None]] = []
        self.use(self.aligner)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the trainer does; messages name the keys as the user writes them."""
        with translated(self.in_words):
            return super().train(*args, **kwargs)

    def check_collator(self, hera: HeraConfig) -> None:
        """Raises ``ValueError`` if a collator that the trainer created itself is unsuitable for the settings."""

    # -- the training data -----------------------------------------------------------------------------------------

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Returns the trainer's loader, whose batches also hold the teacher's view of each sample."""
        dataset, collate, columns = self.train_dataset, self.data_collator, self._signature_columns
        hidden: tuple[str, ...] = ()
        if self.args.remove_unused_columns:
            # The images stay in the rows for the teacher; the trainer's collator does not see them.
            self._set_signature_columns_if_needed()
            columns = self._signature_columns
            hidden = tuple(name for name in IMAGE_COLUMNS if name not in columns)
            self._signature_columns = [*columns, *hidden]
        self.train_dataset, decode = undecoded(dataset, self._images_of)
        self.data_collator = self.aligner.collator(collate, self._images_of, hidden, decode, self.pieces_of)
        try:
            return super().get_train_dataloader(*args, **kwargs)
        finally:  # evaluation keeps the trainer's collator
            self.train_dataset, self.data_collator, self._signature_columns = dataset, collate, columns

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Returns the micro-batches of an optimizer step, and keeps them for the first pass of gradient caching."""
        batches, n_items = super().get_batch_samples(*args, **kwargs)
        if self.args.gradient_accumulation_steps > 1 and self.aligner.config.gradcache:
            self._to_collect = batches
        return batches, n_items

    # -- one run, and one micro-batch ------------------------------------------------------------------------------

    def on_start(self) -> None:
        """Clears the state of an attempt that ran out of memory, and logs the setup."""
        aligner, args = self.aligner, self.args
        aligner.objective.zero_grad()
        aligner.watch.statistics.take()
        aligner.batch_size = self.state.train_batch_size  # smaller than the argument after an out-of-memory error
        if not self.state.global_step:  # a resumed run keeps the memory of its checkpoint
            aligner.memory.clear()
        aligner.memory.settle(compared_at_once(aligner, args))
        log_setup(aligner, self.model, args, self.state)

    def on_end(self) -> None:
        """Logs whether the alignment changed."""
        log_outcome(self.aligner, self.state.log_history, self.state.global_step)

    def before_step(self, model: nn.Module) -> None:
        """Runs the first pass of gradient caching before the first micro-batch of a step."""
        if self._to_collect:
            self._collect(model)
        if self._random_states:
            self._random_states.pop(0)()

    def _collect(self, model: nn.Module) -> None:
        """Runs all micro-batches of a step without a graph, and computes their joint term."""
        batches, self._to_collect = self._to_collect, []
        self._random_states = []
        self.aligner.cached.clear()  # terms of a step that failed
        model.train()
        for batch in batches:
            self._random_states.append(keep_random_state(self.args.device))
            inputs = self._prepare_inputs(dict(batch))
            prepared = self.aligner.prepare(inputs)
            if prepared is None:
                continue
            # Without labels the model computes no loss, and TRL does not count the tokens twice.
            inputs.pop("labels", None)
            with torch.no_grad(), self.compute_loss_context_manager():
                model(**inputs)
            self.aligner.collect(prepared)
        self.aligner.solve(self.loss_scale())

    # -- log lines and the model card ------------------------------------------------------------------------------

    def on_log(self, logs: dict[str, float]) -> None:
        """Logs the term's share of the loss once per run."""
        if not any(line.get("hera_loss") for line in self.state.log_history):
            log_share(logs, self.aligner.config.weight)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the trainer's model card and adds the section on alignment."""
        super().create_model_card(*args, **kwargs)
        self.write_hera_card()

    def write_hera_card(self) -> None:
        """Writes ``hera/card.json`` and the model card's section on alignment; only the first process does this."""
        if self.is_world_process_zero():
            write_card(self)

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        self.aligner.teacher.flush()
        super()._save_checkpoint(model, trial, **kwargs)


class HeraTrainer(HeraTrainerMixin, Trainer):
    """transformers' Trainer with HeRA:

    HeraTrainer(model, args, hera=HeraConfig(heads="L13H12,L7H6"), train_dataset=rows, data_collator=collate)
    """
