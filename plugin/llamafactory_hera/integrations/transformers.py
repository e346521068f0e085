"""HeRA in transformers' Trainer, and in every trainer that is built on it.

:class:`HeraTrainer` is the plain Trainer with HeRA. ``class MyHeraTrainer(HeraTrainerMixin, MyTrainer)`` adds HeRA to
another trainer. The mixin only overrides methods of transformers' Trainer.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import HeraConfig
from ..distributed import mean_over_ranks, on_first, world_size
from ..files import locked
from ..heads import Targets
from ..selection.resolve import untouched_random_state
from ..teachers.images import IMAGE_COLUMNS, ImageLike, sample_images
from ..training import Aligner
from ..training.checkpoint import load_renamed_weights
from ..training.checks import check_settings
from ..training.collator import PiecesOf
from ..training.gradcache import keep_random_state
from .messages import in_python, log_outcome, log_setup, log_share, show_messages, translated
from .model_card import write_card
from .trainer_rows import check_rows, targets_of, teacher_dtype, undecoded_rows

# For a type checker the mixin is a Trainer. At run time it goes in front of any class that is one.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class HeraTrainerMixin(_Base):
    """Adds ``hera_weight * L_HeRA`` to the loss of the trainer that it is put in front of.

    Args:
        *args: As for that trainer.
        hera: The ``hera_*`` keys.
        targets: The heads or layers to align. The default is those in ``hera``; ``auto`` selects them here and
            writes them into ``output_dir/hera``, where the next run with the same settings finds them.
        images_of: Maps a row of the training data to its images. The default reads the columns ``images`` and
            ``image``, and the image parts of chat messages.
        pieces_of: Maps a packed row of the training data to its samples, whose tokens must not attend to each other.
            By default, every row is one sample.
        **kwargs: As for that trainer.

    Raises:
        ValueError: A setting, the data, the model or the teacher does not fit; the message states the value and the
            remedy.
    """

    # The mixin touches private names of transformers' Trainer, seen in 5.5.4. It overrides `_save_checkpoint`,
    # `_load_from_checkpoint`, `_load_best_model` and `_load_optimizer_and_scheduler`. It uses `_signature_columns`,
    # `_set_signature_columns_if_needed`, `_prepare_inputs`, `_get_output_dir` and `_get_learning_rate`.
    # tests/test_private_names.py lists the private names that other modules use.

    #: Hub ids of the training data, for the model card.
    hub_datasets: Sequence[str] = ()
    #: The step of the checkpoint that ``load_best_model_at_end`` loaded, if any, for the model card.
    best_step: int | None = None
    model: Any
    args: Any
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
            raise ValueError(f"hera: {hera!r} is not a HeraConfig; HeraConfig.from_keys makes one of hera_* keys.")
        super().__init__(*args, **kwargs)
        self.pieces_of = pieces_of
        show_messages()
        with self.named_keys():
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
        self._lock = ExitStack()
        self._compute_loss_called = False
        self._to_collect: list[dict[str, Any]] = []
        self._random_states: list[Callable[[], None]] = []
        self._engine_scale: float | None = None  # DeepSpeed's loss scale; accelerate has no scaler with DeepSpeed
        self.add_callback(_AlignerCallback(self))

    def named_keys(self) -> AbstractContextManager[None]:
        """Names the keys in error messages as the user writes them; a host with a YAML file returns a null context."""
        return translated(in_python)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the trainer does; after an error or Ctrl-C, too, the model is free of hooks."""
        try:
            with self.named_keys():
                return super().train(*args, **kwargs)
        finally:
            self.aligner.release()
            self._lock.close()

    def check_collator(self, hera: HeraConfig) -> None:
        """Raises ``ValueError`` if a collator that the trainer created itself does not fit the settings."""

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
        self.train_dataset, decode = undecoded_rows(dataset, self._images_of)
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

    # -- one micro-batch -------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Runs the forward and backward passes of a micro-batch, and checks that the loss contains the HeRA term."""
        engine = getattr(getattr(self.accelerator, "deepspeed_engine_wrapped", None), "engine", None)
        if engine is not None:  # read now: the backward pass that ends a step changes it
            self._engine_scale = float(getattr(engine.optimizer, "loss_scale", 1.0))
        if self._to_collect:
            self._collect(model)
        if self._random_states:
            self._random_states.pop(0)()
        self._compute_loss_called = False
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._compute_loss_called:
            name = super().training_step.__qualname__
            raise RuntimeError(f"{name} does not call compute_loss, so the HeRA term is not part of the loss.")
        self.aligner.after_backward()
        return loss

    def _collect(self, model: nn.Module) -> None:
        """Runs all micro-batches of a step without a graph, and computes their common term."""
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
        self.aligner.solve(self._loss_scale())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes the trainer's loss, and adds the weighted HeRA term to it for training batches."""
        self._compute_loss_called = True
        prepared = self.aligner.prepare(inputs)
        kwargs |= {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        result: Any = super().compute_loss(model, inputs, **kwargs)
        if prepared is None:
            return result
        loss, *outputs = result if return_outputs else (result,)
        term, lm_loss = self.aligner.loss(prepared), loss.detach()
        if not self._divides_by_steps(num_items_in_batch):
            # The LM loss is already this micro-batch's share of the step's loss, so the term must become its share.
            term = term / self.current_gradient_accumulation_steps
            lm_loss = lm_loss * self.current_gradient_accumulation_steps
        self.aligner.watch.statistics.add(lm_loss=lm_loss)
        loss = loss + term.to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    def _divides_by_steps(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Returns whether ``training_step`` will divide the loss by the number of accumulated micro-batches.

        The answer may change after the constructor, because trainers set ``model_accepts_loss_kwargs`` later.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # an attribute of newer releases
        if scaled is not None:
            return not scaled
        counts_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not counts_items and self.compute_loss_func is None

    def _loss_scale(self) -> float | Tensor:
        """Returns the loss scale of mixed precision, a factor that the gradients contain."""
        if self._engine_scale is not None:
            return self._engine_scale
        scaler = self.accelerator.scaler
        # `get_scale` would make the CPU wait for the device.
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.args.device))

    # -- log lines and the model card ------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs HeRA's values together with the training loss; once per run, also the term's share of the loss."""
        if "loss" in logs:
            logs = {**logs, **mean_over_ranks(self.aligner.logs(), self.args.device)}
            if not any(line.get("hera_loss") for line in self.state.log_history):
                log_share(logs, self.aligner.config.weight)
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the trainer's model card and adds the section on alignment."""
        super().create_model_card(*args, **kwargs)
        self.write_hera_card()

    def write_hera_card(self) -> None:
        """Writes ``hera/card.json`` and the model card's section on alignment; only the first process does this."""
        if self.is_world_process_zero():
            write_card(self)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        # HeRA's state comes first, so every checkpoint with weights contains it.
        if self.args.should_save:
            folder = f"{self._get_output_dir(trial=trial)}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.aligner.save(folder)
        self.aligner.teacher.flush()
        super()._save_checkpoint(model, trial, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.aligner.check(resume_from_checkpoint)
        loaded: Any = self.model if model is None else model
        if self.is_fsdp_enabled or not load_renamed_weights(loaded, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            # HeRA's state first: its error states the difference, and torch's error about the optimizer does not.
            self.aligner.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not load_renamed_weights(self.model, best):
            super()._load_best_model()
        self.aligner.load(best)
        self.best_step = int(best.rpartition("-")[2])


class HeraTrainer(HeraTrainerMixin, Trainer):
    """transformers' Trainer with HeRA::

    HeraTrainer(model, args, hera=HeraConfig(heads="L13H12,L7H6"), train_dataset=rows, data_collator=collate)
    """


class _AlignerCallback(TrainerCallback):
    """Trains the objective's own parameters together with the weights, and saves HeRA's final state."""

    def __init__(self, trainer: HeraTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        aligner = self._trainer.aligner
        on_first(lambda: self._trainer._lock.enter_context(locked(args.output_dir)))
        # An attempt that ran out of memory leaves gradients and statistics behind.
        aligner.objective.zero_grad()
        aligner.watch.statistics.take()
        aligner.batch_size = state.train_batch_size  # after an out-of-memory error, smaller than the argument
        if not state.global_step:  # a resumed run keeps the memory of its checkpoint
            aligner.memory.clear()
        steps = args.gradient_accumulation_steps if aligner.config.gradcache else 1
        aligner.memory.settle(aligner.batch_size * world_size() * steps)
        log_setup(aligner, self._trainer.model, args, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.aligner.optimizer_step(trainer._get_learning_rate(), trainer._loss_scale(), args.learning_rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.aligner.close()
        log_outcome(self._trainer.aligner, state.log_history, state.global_step)
        if args.should_save:
            self._trainer.aligner.save(args.output_dir)
