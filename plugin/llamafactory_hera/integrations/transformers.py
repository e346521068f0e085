"""HeRA in transformers' Trainer, and in every trainer that is built on it.

``HeraTrainer`` is the plain one; ``class MyHeraTrainer(HeraTrainerMixin, MyTrainer)`` adds HeRA to another. Everything
that is overridden is a method of transformers' Trainer.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
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
from ..training.checkpoint import checkpoint_step, load_renamed_weights
from ..training.checks import check_settings
from ..training.gradcache import keep_random_state
from .model_card import write_card
from .trainer_rows import check_rows, targets_of, teacher_dtype, undecoded_rows

logger = logging.getLogger("llamafactory_hera")

# for a type checker the mixin is a Trainer; at run time it goes in front of any
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class HeraTrainerMixin(_Base):
    """``L = L_LM + hera_weight * L_HeRA``; everything else is the trainer's that it is put in front of.

    Args:
        *args: As for that trainer.
        hera: The ``hera_*`` keys.
        targets: The heads or layers to align, by default those that ``hera`` names; ``auto`` selects them here and
            writes them into ``output_dir/hera``, where the next run with the same settings finds them.
        images_of: From a row of the training data to its images, by default what its columns ``images`` or ``image``,
            or the image parts of its messages, hold.
        **kwargs: As for that trainer.

    Raises:
        ValueError: A setting, the data, the model or the teacher does not fit; names what, the value and the remedy.
    """

    #: Hub ids of the training data, for the model card.
    hub_datasets: Sequence[str] = ()
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
        **kwargs: Any,
    ) -> None:
        if not isinstance(hera, HeraConfig):
            raise ValueError(f"hera: {hera!r} is not a HeraConfig; HeraConfig.from_keys reads hera_* keys into one.")
        super().__init__(*args, **kwargs)
        _show_messages()
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
        self.add_callback(_AlignerCallback(self))
        self._compute_loss_called = False
        self._best_step: int | None = None
        self._to_collect: list[dict[str, Any]] = []
        self._random_states: list[Callable[[], None]] = []
        self._engine_scale: float | None = None  # DeepSpeed's, where accelerate has no scaler
        self._lock = ExitStack()

    def check_collator(self, hera: HeraConfig) -> None:
        """For trainers that make their own collator: raises ``ValueError`` where it does not fit the settings."""

    def get_train_dataloader(self) -> DataLoader:
        """As the trainer's, with the teacher's view of each sample; evaluation keeps the trainer's collator."""
        dataset, collate, columns = self.train_dataset, self.data_collator, self._signature_columns
        hidden: tuple[str, ...] = ()
        if self.args.remove_unused_columns:  # images stay for the teacher, out of the trainer's own collator's sight
            self._set_signature_columns_if_needed()
            columns = self._signature_columns
            hidden = tuple(name for name in IMAGE_COLUMNS if name not in columns)
            self._signature_columns = [*columns, *hidden]
        self.train_dataset, decode = undecoded_rows(dataset, self._images_of)
        self.data_collator = self.aligner.collator(collate, self._images_of, drop=hidden, decode=decode)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator, self._signature_columns = dataset, collate, columns

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of an optimizer step; under gradient caching they are all run before the first step."""
        batches, n_items = super().get_batch_samples(*args, **kwargs)
        if self.args.gradient_accumulation_steps > 1 and self.aligner.config.gradcache:
            self._to_collect = batches
        return batches, n_items

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, forward and backward."""
        engine = getattr(getattr(self.accelerator, "deepspeed_engine_wrapped", None), "engine", None)
        if engine is not None:  # before its backward pass, which at the end of a step changes the scale
            self._engine_scale = float(getattr(engine.optimizer, "loss_scale", 1.0))
        if self._to_collect:
            self._collect(model)
        if self._random_states:
            self._random_states.pop(0)()
        self._compute_loss_called = False
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._compute_loss_called:
            name = super().training_step.__qualname__
            raise RuntimeError(f"{name} does not call compute_loss, so HeRA has no part in the loss.")
        self.aligner.after_backward()
        return loss

    def _collect(self, model: torch.nn.Module) -> None:
        """The first pass of gradient caching: every micro-batch of the step without a graph, and their term."""
        batches, self._to_collect = self._to_collect, []
        self._random_states = []
        self.aligner.cached.clear()  # of a step cut short
        model.train()
        for batch in batches:
            self._random_states.append(keep_random_state(self.args.device))
            inputs = self._prepare_inputs(dict(batch))
            micro_batch = self.aligner.prepare(inputs)
            if micro_batch is None:
                continue
            # without labels: no loss is needed, and none is counted by a trainer that counts tokens there
            inputs.pop("labels", None)
            with torch.no_grad(), self.compute_loss_context_manager():
                model(**inputs)
            self.aligner.collect(micro_batch)
        self.aligner.solve(self._loss_scale())

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The LM loss, plus the weighted HeRA term for batches of the training data."""
        self._compute_loss_called = True
        micro_batch = self.aligner.prepare(inputs)
        kwargs |= {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        result: Any = super().compute_loss(model, inputs, **kwargs)
        if micro_batch is None:
            return result
        loss, *outputs = result if return_outputs else (result,)
        term, lm_loss = self.aligner.loss(micro_batch), loss.detach()
        if not self._divides_by_steps(num_items_in_batch):
            # the LM loss is this micro-batch's share of the step's; the term becomes one, too
            term = term / self.current_gradient_accumulation_steps
            lm_loss = lm_loss * self.current_gradient_accumulation_steps
        self.aligner.watch.statistics.add(lm_loss=lm_loss)
        loss = loss + term.to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    def _divides_by_steps(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether ``training_step`` will divide the loss by the number of accumulated micro-batches.

        Asked at each step: trainers set ``model_accepts_loss_kwargs`` after the constructor, too.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # newer releases say it themselves
        if scaled is not None:
            return not scaled
        counts_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not counts_items and self.compute_loss_func is None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the HeRA curves to the training log lines."""
        if "loss" in logs:
            logs = {**logs, **mean_over_ranks(self.aligner.logs(), self.args.device)}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's, with the section on alignment: what ``push_to_hub`` uploads has it."""
        super().create_model_card(*args, **kwargs)
        self.write_hera_card()

    def write_hera_card(self) -> None:
        """Writes the section on alignment into the model card, and ``hera/card.json``; on one process."""
        if self.is_world_process_zero():
            state, run = self.state, (self.args.output_dir, self.aligner)
            write_card(*run, state.log_history, state.global_step, self._best_step, self.hub_datasets)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any, **kwargs: Any) -> None:
        # first, so that a checkpoint with weights is never without the HeRA state
        if self.args.should_save:
            folder = f"{self._get_output_dir(trial=trial)}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.aligner.save(folder)
        self.aligner.teacher.flush()
        super()._save_checkpoint(model, trial, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        self.aligner.check(resume_from_checkpoint)
        if self.is_fsdp_enabled or not load_renamed_weights(target, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not load_renamed_weights(self.model, best):
            super()._load_best_model()
        self.aligner.load(best)
        self._best_step = checkpoint_step(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # first, as torch does not say whose tensors do not fit
            self.aligner.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _loss_scale(self) -> float | Tensor:
        scaler = self.accelerator.scaler
        if self._engine_scale is not None:
            return self._engine_scale
        # not get_scale, which waits for the device
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.args.device))

    def _log_summary(self) -> None:
        """Logs objective, targets, teacher, batch sizes and candidates."""
        if not self.is_world_process_zero():
            return
        config, aligner = self.aligner.config, self.aligner
        size, steps = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        micro_batch = size * world_size()
        together = micro_batch * (steps if config.gradcache else 1)
        candidates = together - 1 + config.memory
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        own = sum(p.numel() for p in aligner.objective.parameters() if p.requires_grad)
        lines = {
            aligner.targets.what: str(aligner.targets),
            "teacher": f"{config.teacher} ({aligner.teacher.encoder.dim} values)",
            "objective": f"{config.objective}, weight {config.weight}",
            "global batch": f"{micro_batch * steps} ({world_size()} processes x {size} x {steps} accumulation steps)",
            "trainable parameters": f"{trainable:,} of the model, {own:,} of the objective",
        }
        lines |= {key.removeprefix("hera_"): f"{value:.4g}" for key, value in aligner.objective.values().items()}
        if config.reads("hera_memory"):
            up_to = "up to " if config.memory else ""  # the memory fills while training
            counted = f"({together - 1} of the batch, {up_to}{config.memory} remembered)"
            counted += "; hera_mknn is logged from when they are all there" * (config.memory > 0)
            lines |= {"neighbors": str(config.k), "candidates per sample": f"{up_to}{candidates} {counted}"}
        for name, value in lines.items():
            logger.info(f"HeRA | {name}: {value}")


class HeraTrainer(HeraTrainerMixin, Trainer):
    """transformers' Trainer with HeRA::

    HeraTrainer(model, args, hera=HeraConfig(heads="L13H12,L7H6"), train_dataset=rows, data_collator=collate)
    """


class _AlignerCallback(TrainerCallback):
    """Steps what the objective trains together with the weights, and leaves the final state beside them."""

    def __init__(self, trainer: HeraTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lock = locked(args.output_dir)
        on_first(lambda: self._trainer._lock.enter_context(lock))
        # an attempt that ran out of memory leaves its own, which are no part of the next one
        self._trainer.aligner.objective.zero_grad()
        self._trainer.aligner.watch.statistics.take()
        self._trainer.aligner.batch_size = state.train_batch_size  # which may be smaller than asked for
        self._trainer._log_summary()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.aligner.optimizer_step(trainer._get_learning_rate(), trainer._loss_scale(), args.learning_rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.aligner.close()
        if args.should_save:
            self._trainer.aligner.save(args.output_dir)
        self._trainer._lock.close()


def _show_messages() -> None:
    """Lets the messages of a run be seen: INFO and above, on standard error where no handler is set up."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(levelname)s|%(name)s] %(asctime)s >> %(message)s"))
        logger.addHandler(handler)
