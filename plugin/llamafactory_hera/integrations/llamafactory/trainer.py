"""The host's SFT trainer with the HeRA term added to its loss (paper, eq. 9)."""

from typing import Any

import torch
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from llamafactory_hera.alignment.gather import mean_over_ranks
from llamafactory_hera.heads import Sites
from llamafactory_hera.training.random_state import RandomState

from .collator import HeraCollator
from .model_card import write_card
from .resume import load_renamed_weights
from .step import HeraStep
from .summary import start_summary


class HeraTrainer(CustomSeq2SeqTrainer):
    """``L = L_LM + hera_weight * L_HeRA``; everything else is the host's.

    Args:
        sites: The heads or layers to align.
        **kwargs: As for the host's trainer.
    """

    def __init__(self, sites: Sites, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dtype = torch.float32
        if self.args.device.type != "cpu" and (self.args.bf16 or self.args.fp16):
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        self.hera = HeraStep(self.model, sites, self.finetuning_args, self.args.device, dtype, self.args.seed)
        self.add_callback(_StepObjective(self))
        self._log_start = True
        accumulates = self.args.gradient_accumulation_steps > 1
        self._look_ahead = accumulates and self.finetuning_args.hera_accumulate == "gradcache"
        self._to_collect: list[dict[str, Any]] = []
        self._random_states: list[RandomState] = []

    @override
    def get_train_dataloader(self) -> DataLoader:
        """As the host's, with the teacher's view of each sample; evaluation keeps the host's collator."""
        host_collator = self.data_collator
        self.data_collator = HeraCollator(
            host_collator,
            self.hera.teaching.teacher.processor,
            self.hera.teaching.cache,
            self.finetuning_args.hera_image_index,
            names_image=self.hera.objective.view == "patches",
        )
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = host_collator

    @override
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of an optimizer step; under gradient caching they are all run before the first step."""
        batches, n_items = super().get_batch_samples(*args, **kwargs)
        if self._look_ahead:
            self._to_collect = batches
        return batches, n_items

    @override
    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, forward and backward."""
        if self._log_start:
            self._log_start = False
            start_summary(self)
        if self._to_collect:
            self._collect(model)
        if self._random_states:
            self._random_states.pop(0).restore()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.hera.end()
        return loss

    def _collect(self, model: torch.nn.Module) -> None:
        """The first pass of gradient caching: every micro-batch of the step without a graph, and their term."""
        batches, self._to_collect = self._to_collect, []
        model.train()
        for batch in batches:
            self._random_states.append(RandomState(self.args.device))
            inputs = self._prepare_inputs(dict(batch))
            teacher_inputs = self.hera.take_inputs(inputs)
            valid = self.hera.begin(inputs, teacher_inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                super().compute_loss(model, inputs)
            self.hera.collect(valid, teacher_inputs)
        scaler = self.accelerator.scaler
        self.hera.solve(1.0 if scaler is None else scaler.get_scale())

    @override
    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The LM loss, plus the weighted HeRA term for batches of the training data."""
        teacher_inputs = self.hera.take_inputs(inputs)
        if not teacher_inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        valid = self.hera.begin(inputs, teacher_inputs)
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, *outputs = result if return_outputs else (result,)
        term = self.hera.finish(valid, teacher_inputs)
        self.hera.statistics.add(lm_loss=loss.detach())
        if self.compute_loss_func is not None:
            # with a loss function of its own the trainer does not divide by the accumulation steps
            term = term / self.current_gradient_accumulation_steps
        loss = loss + term.to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    @override
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the HeRA curves to the training log lines."""
        if "loss" in logs:
            logs = {**logs, **mean_over_ranks(self.hera.logs(), self.args.device)}
        super().log(logs, *args, **kwargs)

    @override
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the host's, with the section on alignment: what ``push_to_hub`` uploads has it."""
        super().create_model_card(*args, **kwargs)
        write_card(self)

    @override
    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # first, so that a checkpoint with weights is never without the HeRA state
        if self.args.should_save:
            folder = f"{self._get_output_dir(trial=trial)}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.hera.state.save(folder)
        self.hera.teaching.flush()
        super()._save_checkpoint(model, trial)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self.is_fsdp_enabled or not load_renamed_weights(target, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @override
    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not load_renamed_weights(self.model, best):
            super()._load_best_model()
        self.hera.state.load(best)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.hera.state.load(checkpoint)


class _StepObjective(TrainerCallback):
    """Steps the objective's own parameters together with the weights, and leaves the final state beside them."""

    def __init__(self, trainer: HeraTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scaler = self._trainer.accelerator.scaler
        if scaler is not None:
            self._trainer.hera.own.scale_gradients(1 / scaler.get_scale())
        self._trainer.hera.own.step(self._trainer._get_learning_rate())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hera = self._trainer.hera
        hera.warn_when_idle()
        hera.capture.remove()
        hera.teaching.flush()
        if args.should_save:
            hera.state.save(args.output_dir)
