"""The alignment term of one step over the global batch, with its statistics (paper, eq. 8 and 9)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..alignment.neighbors import mutual_knn, teacher_candidates
from ..distributed import common_row_count, gather_rows, world_size
from ..objectives.base import Objective, PooledBatch
from .memory import CrossBatchMemory


@dataclass(frozen=True)
class TermOutput:
    """The term of a step with its statistics. All tensors stay on the device, so that no step waits for them."""

    loss: Tensor  #: A scalar with gradients; 0 if no sample entered or a value was not finite.
    n_samples: Tensor  #: The number of samples of the global batch that entered the loss.
    n_duplicates: Tensor  #: The number of pairs of samples that were not compared because both show the same image.
    sound: Tensor  #: True if every value was finite; if false, loss and gradient are 0. Equal on every process.
    broken: Tensor  #: ``[n_targets]``, those with a non-finite value; all false if the teacher produced one.
    gradient_expected: Tensor  #: True if the backward pass must reach every sample in the loss.
    comparable: Tensor  #: True if the loss can be compared with the loss of other steps, and is therefore logged.
    #: The MKNN of student and teacher in the batch, ``[n_targets]``; NaN if not measured, None for tokens.
    mknn: Tensor | None = None
    chance: Tensor | None = None  #: The MKNN of unrelated features in this batch; NaN or None whenever ``mknn`` is.


@dataclass(frozen=True)
class Prepared:
    """A micro-batch between ``Aligner.prepare`` and ``Aligner.loss``."""

    valid: Tensor  #: Boolean ``[B]``, true if the sample has an image and tokens to read.
    inputs: dict[str, Tensor]  #: The tensors that :class:`~.collator.HeraCollator` added to the batch.
    planned: bool = False  #: True if the objective chose the samples that enter; choosing none is then no error.
    pixels: Tensor | None = None  #: The images as the student sees them, for an objective on tokens.
    context: dict[str, Tensor] = field(default_factory=dict)  #: The tensors of the objective's plan.


@dataclass(eq=False)
class HeraTerm:
    """Computes the term over the global batch, for an objective on pooled vectors."""

    objective: Objective
    #: Teacher neighbors per sample; at most half of a sample's candidates become its neighbors.
    k: int
    #: True for cosine similarity, false for the dot product; for student and teacher.
    normalize: bool
    memory: CrossBatchMemory

    def __call__(
        self,
        representations: Tensor,
        teacher: Tensor,
        valid: Tensor,
        n_rows: int | None = None,
        keys: Tensor | None = None,
    ) -> TermOutput:
        """Computes the term from the samples of this process; every process must call it, even without images.

        Args:
            representations: Student representations, ``[n_targets, B, D]``.
            teacher: Teacher features of the same samples, ``[B, D_teacher]``.
            valid: Boolean ``[B]``; the values of the other samples are arbitrary.
            n_rows: An upper bound on B over all processes. If None, the processes communicate to agree on a bound.
            keys: The keys of the images, uint8 ``[B, 16]``; 0 if unknown.
        """
        numbers = valid.new_zeros(len(valid), 2, dtype=torch.float32) if keys is None else _numbers(keys)
        rows, features, known, numbers = _gather(representations, teacher, valid, numbers, n_rows)
        self.memory.settle(len(numbers))
        batch, all_teacher = self._batch(rows, features, known, numbers)
        z, candidates = batch.z, batch.candidates
        by_target = self.objective(batch)
        finite, teacher_finite = finite_parts(z, batch.teacher, by_target)
        sound = finite.all() & teacher_finite
        comparable = sound
        if self.memory.size:  # until the memory is full, fewer candidates lower the loss and raise chance agreement
            comparable = sound & (self.memory.pairs is not None and self.memory.pairs[2].all())
        mknn = mutual_knn(batch.z_all, all_teacher, self.k, self.normalize, candidates.allowed)
        self.memory.append(z, batch.teacher, batch.valid & sound, numbers)
        return TermOutput(
            loss=zero_unless(sound, by_target.mean(), z),
            n_samples=self.objective.entering(batch).sum(),
            n_duplicates=candidates.duplicates,
            sound=sound,
            broken=~finite,
            gradient_expected=self.objective.gradient_expected(batch) & sound,
            comparable=comparable,
            mknn=torch.where(comparable, mknn, math.nan),
            chance=torch.where(comparable, candidates.chance, math.nan),
        )

    def _batch(self, z: Tensor, teacher: Tensor, valid: Tensor, numbers: Tensor) -> tuple[PooledBatch, Tensor]:
        """Builds the global batch, and its teacher features followed by those of the remembered samples."""
        z_all, all_teacher, filled = z, teacher, None
        if self.memory.pairs is not None:
            older, older_teacher, filled, older_numbers = self.memory.pairs
            z_all, filled = torch.cat([z, older.to(z)], dim=1), filled.to(valid)
            all_teacher = torch.cat([teacher, older_teacher.to(teacher)])
            numbers = torch.cat([numbers, older_numbers.to(numbers)])
        candidates = teacher_candidates(all_teacher, valid, self.k, self.normalize, filled, numbers)
        return PooledBatch(z, z_all, teacher, valid, candidates, self.normalize), all_teacher


def _numbers(keys: Tensor) -> Tensor:
    """Turns the first six bytes of keys ``[B, 16]`` into two numbers that float32 represents exactly, ``[B, 2]``."""
    first = keys[:, :6].float()
    return (first[:, :2] * 256 + first[:, 2:4]) * 256 + first[:, 4:]


def _gather(z: Tensor, teacher: Tensor, valid: Tensor, numbers: Tensor, n_rows: int | None) -> list[Tensor]:
    """Pads the samples of this process to a common number and gathers the first four arguments across processes."""
    missing = 0
    if world_size() > 1:
        n_rows = common_row_count(len(valid), valid.device) if n_rows is None else n_rows
        missing = n_rows - len(valid)
        if missing < 0:
            raise ValueError(
                f"per_device_train_batch_size: {n_rows} is less than the {len(valid)} samples of this batch; let "
                "the data loader create batches of at most that size."
            )
    rows = z.transpose(0, 1).float()  # [B, n_targets, D], because ranks are concatenated along the first axis
    # torch.where instead of a product with the mask: a non-finite value outside the mask must not spread
    rows = torch.where(valid.view(-1, 1, 1), rows, 0.0)
    teacher = torch.where(valid.view(-1, 1), teacher.float(), 0.0)
    facts = torch.cat([teacher, valid.view(-1, 1).float(), numbers], dim=1)  # one collective instead of three
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing))
        facts = torch.nn.functional.pad(facts, (0, 0, 0, missing))
    teacher, valid, numbers = gather_rows(facts).split([teacher.shape[1], 1, 2], dim=1)
    return [gather_rows(rows).transpose(0, 1), teacher, valid.squeeze(1) > 0, numbers]


def finite_parts(z: Tensor, teacher: Tensor, by_target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which targets produced finite values, ``[n_targets]``, and whether the teacher did, a scalar."""
    # Checking only the loss is not enough: a sample without candidates does not enter the loss, and a NaN in the
    # teacher's features merely reorders neighbors.
    finite, teacher_finite = z.isfinite().flatten(1).all(dim=1), teacher.isfinite().all()
    return finite & (by_target.isfinite() | ~teacher_finite), teacher_finite


def zero_unless(sound: Tensor, loss: Tensor, *inputs: Tensor) -> Tensor:
    """Returns ``loss`` if ``sound`` is true, otherwise 0; the ``inputs`` of the loss then receive a gradient of 0."""
    for values in inputs:
        if values.requires_grad:  # torch.where, because 0 times a non-finite gradient is NaN
            values.register_hook(lambda gradient: torch.where(sound, gradient, 0.0))
    return torch.where(sound, loss, 0.0)
