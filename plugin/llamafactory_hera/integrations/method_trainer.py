"""A protocol for methods that add a term to the loss of transformers' Trainer, and a mixin that runs such a method."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..distributed import mean_over_ranks, on_first
from ..files import locked
from ..training.checkpoint import load_renamed_weights
from ..training.watch import RunningMeans

# For a type checker, the mixin is a Trainer. At run time, it goes in front of any Trainer class.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class Method(Protocol):
    """The state and the steps of a method during one run, independent of any trainer."""

    def prepare(self, batch: dict[str, Any]) -> Any:
        """Removes the method's inputs from a batch before the forward pass; returns None if the batch has none."""

    def loss(self, prepared: Any) -> Tensor:
        """Computes the weighted term of the latest forward pass."""

    def after_backward(self) -> None:
        """Ends a micro-batch."""

    def optimizer_step(self, learning_rate: float, scale: float | Tensor, peak: float | None) -> None:
        """Runs before each step of the trainer's optimizer."""

    def logs(self) -> dict[str, float]:
        """Returns the statistics since the last call."""

    def save(self, folder: str) -> None:
        """Writes the state into a folder. ``load`` restores it; ``check`` refuses the state of another run."""

    def check(self, folder: str) -> None: ...

    def load(self, folder: str) -> None: ...

    def close(self) -> None:
        """Ends a finished run. After an error, ``release`` only removes the hooks from the model."""

    def release(self) -> None: ...


class MethodTrainerMixin(_Base):
    """Adds the term of ``method`` to the loss of the trainer class listed after the mixin."""

    # The mixin relies on private names of transformers' Trainer, as of 5.5.4. It overrides `_save_checkpoint`,
    # `_load_from_checkpoint`, `_load_best_model` and `_load_optimizer_and_scheduler`. It uses `_get_output_dir` and
    # `_get_learning_rate`. tests/test_private_names.py lists the private names that other modules use.

    method: Method
    #: The step of the checkpoint that ``load_best_model_at_end`` loaded, if any, for the model card.
    best_step: int | None = None
    model: Any
    args: Any

    def use(self, method: Method) -> None:
        """Sets the method of the run."""
        self.method = method
        self._lock = ExitStack()
        self._compute_loss_called = False
        self._lm_losses = RunningMeans()
        self._engine_scale: float | None = None  # DeepSpeed's loss scale; accelerate then has no scaler
        self.add_callback(_MethodCallback(self))

    def on_start(self) -> None:
        """Runs when training starts, and when it restarts after running out of memory."""

    def on_end(self) -> None:
        """Runs after the last step."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the trainer does, and removes the hooks from the model, even after an error or Ctrl-C."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.method.release()
            self._lock.close()

    # -- one micro-batch -------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Runs the forward and backward passes of a micro-batch, and checks that the loss contains the term."""
        engine = getattr(getattr(self.accelerator, "deepspeed_engine_wrapped", None), "engine", None)
        if engine is not None:  # the backward pass of the last micro-batch changes the scale
            self._engine_scale = float(getattr(engine.optimizer, "loss_scale", 1.0))
        self.before_step(model)
        self._compute_loss_called = False
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._compute_loss_called:
            name = super().training_step.__qualname__
            raise RuntimeError(
                f"{name} does not call compute_loss, so the term of the method is not part of the loss."
            )
        self.method.after_backward()
        return loss

    def before_step(self, model: nn.Module) -> None:
        """Runs before the forward pass of a micro-batch."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes the trainer's loss, and adds the weighted term to it for training batches."""
        self._compute_loss_called = True
        prepared = self.method.prepare(inputs)
        kwargs |= {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        result: Any = super().compute_loss(model, inputs, **kwargs)
        if prepared is None:
            return result
        loss, *outputs = result if return_outputs else (result,)
        term, lm_loss = self.method.loss(prepared), loss.detach()
        if not self._divides_by_steps(num_items_in_batch):
            # The trainer has divided the LM loss by the accumulation steps, so the term is divided, too.
            term = term / self.current_gradient_accumulation_steps
            lm_loss = lm_loss * self.current_gradient_accumulation_steps
        self._lm_losses.add(lm_loss=lm_loss)
        loss = self.with_term(loss, term)
        return (loss, *outputs) if return_outputs else loss

    def with_term(self, loss: Tensor, term: Tensor) -> Tensor:
        """Adds the term to the trainer's loss."""
        return loss + term.to(loss.device)

    def _divides_by_steps(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Returns whether ``training_step`` will divide the loss by the number of accumulated micro-batches.

        The answer may change after construction, because trainers set ``model_accepts_loss_kwargs`` later.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # an attribute of newer releases
        if scaled is not None:
            return not scaled
        counts_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return not counts_items and self.compute_loss_func is None

    def loss_scale(self) -> float | Tensor:
        """Returns the loss scale of mixed precision, which is a factor of the gradients."""
        if self._engine_scale is not None:
            return self._engine_scale
        scaler = self.accelerator.scaler
        # `get_scale` would make the CPU wait for the device.
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.args.device))

    # -- log lines and checkpoints ---------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the method's values together with the training loss."""
        if "loss" in logs:
            values = {**self._lm_losses.take(), **self.method.logs()}
            logs = {**logs, **mean_over_ranks(values, self.args.device)}
            self.on_log(logs)
        super().log(logs, *args, **kwargs)

    def on_log(self, logs: dict[str, float]) -> None:
        """Runs before a line with the training loss is logged."""

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        # The method's state is saved first, so every checkpoint with weights contains it.
        if self.args.should_save:
            folder = f"{self._get_output_dir(trial=trial)}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.method.save(folder)
        super()._save_checkpoint(model, trial, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.method.check(resume_from_checkpoint)
        loaded: Any = self.model if model is None else model
        if self.is_fsdp_enabled or not load_renamed_weights(loaded, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            # Load the method's state first: its error names the differing setting, unlike torch's optimizer error.
            self.method.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not load_renamed_weights(self.model, best):
            super()._load_best_model()
        self.method.load(best)
        self.best_step = int(best.rpartition("-")[2])


class _MethodCallback(TrainerCallback):
    """Locks the run's folder, steps the method with the optimizer, and saves the method's final state."""

    def __init__(self, trainer: MethodTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_first(lambda: self._trainer._lock.enter_context(locked(args.output_dir)))
        self._trainer._lm_losses.take()
        self._trainer.on_start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.method.optimizer_step(trainer._get_learning_rate(), trainer.loss_scale(), args.learning_rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.method.close()
        self._trainer.on_end()
        if args.should_save:
            self._trainer.method.save(args.output_dir)
