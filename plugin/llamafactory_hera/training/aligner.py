"""The alignment of one run (paper, eq. 9): selects the tokens to read and computes the weighted term.

Any training loop can use it (docs/plain_trainer.md); integrations/transformers.py adds it to every kind of Trainer.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HeraConfig
from ..files import reading
from ..heads import Targets
from ..heads.capture import HeadCapture, LayerCapture
from ..heads.families import head_layout, media_token_ids, model_config
from ..heads.tokens import by_piece, check_row_count, token_mask
from ..objectives import Options, TokenBatch, TokenObjective, create
from ..teachers.images import ImageLike, sample_images
from .checkpoint import RunIdentity, earlier_values
from .checks import check_parallelism, check_trainable, named_targets
from .collator import NO_IMAGE, PREFIX, HeraCollator, PiecesOf
from .gradcache import GradientCache
from .memory import CrossBatchMemory
from .optimizer import ObjectiveOptimizer
from .teacher_features import TeacherFeatures
from .term import HeraTerm, Prepared, TermOutput
from .token_term import TokenReader, student_images, token_term
from .watch import Watch


class Aligner:
    """HeRA's state and steps during one run, independent of any trainer.

    For each micro-batch, a loop calls ``prepare``, runs the model, adds ``loss`` to the LM loss, backpropagates, and
    calls ``after_backward``. It calls ``optimizer_step`` with each optimizer step, and ``close`` at the end.

    Under FSDP2, backpropagate the term together with the LM loss (https://github.com/pytorch/pytorch/issues/173709).

    Args:
        model: A transformers model, bare or under PEFT, before an engine wraps it.
        config: The ``hera_*`` keys.
        targets: The heads or layers to align; by default those in ``config``.
        device: The device of the training steps; by default, the device of the model's first parameter.
        dtype: The teacher's compute dtype.
        seed: The seed for initializing the objective and for its random numbers.
        image_processor: The student's, for an objective on visual tokens; by default, loaded from the model's folder.

    Raises:
        ValueError: A target is not in the model, nothing before the targets is trained, or the teacher is unsuitable.
    """

    def __init__(
        self,
        model: nn.Module,
        config: HeraConfig,
        targets: Targets | str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        image_processor: Any = None,
    ) -> None:
        device = next(model.parameters()).device if device is None else device
        self.config, model_configuration = config, model_config(model)
        if targets is None:
            targets = named_targets(config, model)
        self.targets = Targets.parse(targets, config.granularity, model_configuration)
        capture_class = LayerCapture if self.targets.granularity == "layer" else HeadCapture
        self.capture: HeadCapture | LayerCapture = capture_class(model, self.targets)
        check_parallelism(None, model)
        check_trainable(model, self.targets)
        student = student_images(config, model_configuration, image_processor)
        self.teacher = TeacherFeatures(config, device, dtype, student)
        self.objective = create(
            config.objective,
            Options(
                config,
                n_targets=len(self.targets.items),
                dim=head_layout(model_configuration).hidden_size,
                teacher_dim=self.teacher.encoder.dim,
                side=student.side if student else 0,
                initializer_range=getattr(model_configuration.get_text_config(), "initializer_range", 0.02),
            ),
            seed,
        ).to(device)
        self.optimizer = ObjectiveOptimizer(self.objective)
        if config.objective_from is not None and config.reads("hera_objective_from"):
            self.optimizer.load_values(earlier_values(config))
        self.memory = CrossBatchMemory(config.remembered, 4 * config.k)
        self.term = HeraTerm(self.objective, config.k, config.normalize, self.memory)
        self.reader: TokenReader | None = None
        if student is not None:
            assert isinstance(self.objective, TokenObjective)
            self.objective.attach(model)
            self.reader = TokenReader(self.objective, student, model_configuration.image_token_id, seed)
        self.cached = GradientCache()
        self.watch = Watch(config, self.targets, self.objective, device)
        #: The largest micro-batch of any process, in samples; if None, the processes agree on it for each micro-batch.
        self.batch_size: int | None = None
        #: True if each row packs several samples; the processes then agree on a number of samples per micro-batch.
        self.packed = False
        self._media_token_ids = media_token_ids(model_configuration)
        self._n_steps = 0  # the optimizer steps that changed the objective's parameters
        n_trained = sum(parameter.requires_grad for parameter in model.parameters())
        self._identity = RunIdentity(self.targets, self.teacher.encoder.fingerprint, config, n_trained)

    def collator(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        images_of: Callable[[Any], list[ImageLike]] = sample_images,
        drop: tuple[str, ...] = (),
        decode: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        pieces_of: PiecesOf | None = None,
    ) -> HeraCollator:
        """Creates the collator of the training batches, which adds the teacher's inputs; see ``HeraCollator``."""
        reader, self.packed = self.reader, pieces_of is not None
        return HeraCollator(
            collate,
            processor=getattr(self.teacher.encoder, "processor", None) if reader is None else None,
            cache=self.teacher.cache,
            image_index=self.config.image_index,
            images_of=images_of,
            drop=drop,
            decode=decode,
            tokens=None if reader is None else (reader.image_token, reader.student.side**2),
            pieces_of=pieces_of,
        )

    # -- one micro-batch -------------------------------------------------------------------------------------------

    def prepare(self, batch: dict[str, Any]) -> Prepared | None:
        """Pops the teacher's inputs from a batch and sets the tokens to read; call it before the forward pass.

        Returns the argument of ``loss``, or None for a batch from a different collator, such as an evaluation
        batch. Raises ``ValueError`` if the batch does not have one row per sample, or if the first batch with
        images lacks the model's image inputs or labels all text as the answer.
        """
        inputs = {name: batch.pop(name) for name in list(batch) if name.startswith(PREFIX)}
        if not inputs:
            return None
        self.capture.install()
        self.capture.watch_gradients = not self.watch.gradient_checked
        has_image = inputs["hera_source"] != NO_IMAGE
        if "hera_labels" in inputs:  # a trainer may pass the model only the labels of the last tokens
            batch = {**batch, "labels": inputs.pop("hera_labels")}
        if "hera_pieces" in inputs:
            batch = by_piece(batch, inputs["hera_pieces"], len(has_image))
        check_row_count(batch, len(has_image))
        self.watch.check_batch(batch, has_image, self._media_token_ids)
        if self.reader is not None:
            return self.reader.prepare(batch, inputs, has_image, self.capture)
        ids, attention_mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
        mask = token_mask(self.config.pooling, ids, attention_mask, labels, self._media_token_ids)
        self.capture.pool(mask)
        return Prepared(has_image & mask.any(dim=1), inputs)

    def loss(self, prepared: Prepared | None) -> Tensor:
        """Computes the weighted term of the latest forward pass; every process must call it."""
        if prepared is None:
            raise ValueError("loss: prepare returned None; use a batch from aligner.collator, or skip the term.")
        representations = self.capture.representations()
        if len(self.cached):
            term = self.cached.take(representations)
            if not self.watch.gradient_checked:
                self.cached.check()
        else:
            output = self._term(representations, prepared)
            self.watch.record(output, prepared.planned)
            term = self.config.weight * output.loss
        self.watch.before_backward(representations, prepared.valid)
        return term

    @property
    def _n_rows(self) -> int | None:
        return None if self.packed else self.batch_size

    def _term(self, representations: Tensor, prepared: Prepared) -> TermOutput:
        features = self.teacher.features(prepared.inputs, prepared.pixels)
        if self.reader is None:
            return self.term(representations, features, prepared.valid, self._n_rows, prepared.inputs["hera_keys"])
        projections = self.capture.projections() if isinstance(self.capture, HeadCapture) else None
        batch = TokenBatch(representations, projections, features, prepared.valid, prepared.context)
        return token_term(self.reader.objective, batch)

    def after_backward(self) -> None:
        """Stops reading tokens; raises ``RuntimeError`` if the first backward pass sent the targets no gradient."""
        self.watch.after_backward(bool(self.capture.gradient_seen), self._n_steps)
        self.capture.pool(None)

    def optimizer_step(self, learning_rate: float, scale: float | Tensor = 1.0, peak: float | None = None) -> None:
        """Updates the objective's parameters if every term was finite, then clears their gradients.

        Every process must call this method.

        Args:
            learning_rate: The run's learning rate at this step.
            scale: The loss scale that the gradients still include; 1 without a loss scaler.
            peak: The peak of the run's learning rate schedule; ``hera_objective_lr`` needs a peak above 0.
        """
        if self.config.objective_lr is not None:
            if not peak:
                raise ValueError(
                    f"hera_objective_lr: {self.config.objective_lr} is a peak learning rate, but the run's peak is "
                    "unset or 0; call optimizer_step(learning_rate, peak=...), or remove the key."
                )
            learning_rate *= self.config.objective_lr / peak
        if self._n_steps < self.objective.silent_steps and learning_rate > 0:
            gradients = (p.grad for p in self.objective.parameters() if p.grad is not None)
            self._n_steps += any(bool(gradient.any()) for gradient in gradients)
        self.optimizer.step(learning_rate, scale, self.watch.left_out)
        self.watch.left_out = None

    # -- gradient caching: all micro-batches of an optimizer step run without a graph, then each runs with a graph ----

    def collect(self, prepared: Prepared) -> None:
        """Stores the latest forward pass, which ran without a graph, for ``solve``."""
        inputs, rows = prepared.inputs, self.capture.representations()
        self.cached.add(rows, self.teacher.features(inputs), prepared.valid, inputs["hera_keys"])
        self.capture.pool(None)

    def solve(self, scale: float | Tensor = 1.0) -> None:
        """Computes the term of all collected passes, for ``loss``; for ``scale`` see ``optimizer_step``."""
        self.watch.record(self.cached.solve(self.term, self.config.weight, scale, self._n_rows))

    # -- the run ---------------------------------------------------------------------------------------------------

    def logs(self) -> dict[str, float]:
        """Returns the statistics since the last call; for pooled objectives they are equal on all processes.

        Raises ``RuntimeError`` if ``hera_max_nan`` consecutive terms were not finite, or if the outputs of the two
        passes of gradient caching differ.
        """
        self.cached.check()
        self.watch.sync()
        return {**self.watch.statistics.take(), **self.objective.values()}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the targets and the state of the objective, optimizer and memory into ``folder/hera``, atomically."""
        counted = {} if self.reader is None else {"micro_batches": torch.tensor(self.reader.n_micro_batches)}
        state = {**self.optimizer.state(), **self.memory.state_dict(), **counted}
        self._identity.save(folder, state, self.objective.values())

    def check(self, folder: str | os.PathLike) -> None:
        """Raises ``ValueError`` if a checkpoint does not belong to this run; loads nothing."""
        self._identity.check(folder)

    def load(self, folder: str | os.PathLike) -> None:
        """Restores the state from ``save``; raises ``ValueError`` if a different run saved it."""
        state = self._identity.load(folder)
        with reading(folder, "a checkpoint of this run"):
            self.optimizer.load_state(state)
            self.memory.load_state_dict(state)
            if self.reader is not None:
                self.reader.n_micro_batches = int(state["micro_batches"])

    def close(self) -> None:
        """Ends the run: removes the hooks and writes the pending teacher features to the cache."""
        self.cached.check()
        self.watch.close()
        self.release()
        self.teacher.flush()

    def release(self) -> None:
        """Removes the hooks from the model."""
        self.capture.remove()
        if self.reader is not None:
            self.reader.objective.detach()
