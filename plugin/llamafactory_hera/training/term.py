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
    """The term of a step with its statistics. All of it stays on the device, so that no step waits for it.

    Attributes:
        loss: Scalar with gradient; 0 if no sample entered or a value was not finite.
        n_samples: How many samples of the global batch entered.
        n_duplicates: How many pairs of samples show the same image, and were therefore not compared.
        sound: True if every value was finite; otherwise the gradient is 0, too. Equal on every process.
        broken: The targets that produced a non-finite value, ``[n_targets]``; none if the teacher did.
        comparable: True if every sample that entered must receive a gradient.
        mknn: Agreement of student and teacher within the batch, ``[n_targets]``; NaN if it is not measured, None for
            an objective on tokens.
        chance: The MKNN that unrelated features would reach in this batch, a scalar; NaN or None as ``mknn``.
    """

    loss: Tensor
    n_samples: Tensor
    n_duplicates: Tensor
    sound: Tensor
    broken: Tensor
    comparable: Tensor
    mknn: Tensor | None = None
    chance: Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """A micro-batch between ``Aligner.prepare`` and ``Aligner.loss``.

    Attributes:
        valid: Boolean ``[B]``: the sample has an image, and tokens to read.
        inputs: The tensors that :class:`~.collator.HeraCollator` added to the batch.
        planned: The objective chose which samples enter, so that none is no fault.
        pixels: What the student sees, for an objective on tokens.
        context: Tensors of the objective's plan.
    """

    valid: Tensor
    inputs: dict[str, Tensor]
    planned: bool = False
    pixels: Tensor | None = None
    context: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class HeraTerm:
    """Computes the term of a step over the global batch, for an objective on pooled vectors.

    Every process must call it in every step, even if none of its samples has an image, because it gathers over them.
    """

    objective: Objective
    #: Teacher neighbors per sample; a sample gets at most half of its candidates.
    k: int
    #: Cosine similarity when true, dot product otherwise; for student and teacher.
    normalize: bool
    memory: CrossBatchMemory

    def __call__(
        self, representations: Tensor, teacher: Tensor, valid: Tensor, n_rows: int | None = None
    ) -> TermOutput:
        """Computes the term from the samples of this process; rows that are not valid may hold anything.

        Args:
            representations: Of the student, ``[n_targets, B, D]``.
            teacher: Features of the same samples, ``[B, D_teacher]``.
            valid: Boolean ``[B]``.
            n_rows: An upper bound on B over all processes. Without it the processes agree on one, and wait for it.
        """
        batch, all_teacher = self._batch(*_gather(representations, teacher, valid, n_rows))
        z, candidates = batch.z, batch.candidates
        by_target = self.objective(batch)
        finite, teacher_finite = finite_parts(z, batch.teacher, by_target)
        sound = finite.all() & teacher_finite
        known = sound
        if self.memory.size:  # until it is full, fewer candidates make agreement by chance more likely
            known = sound & (self.memory.pairs is not None and self.memory.pairs[2].all())
        mknn = mutual_knn(batch.z_all, all_teacher, self.k, self.normalize, candidates.allowed)
        self.memory.append(z, batch.teacher, batch.valid & sound)
        return TermOutput(
            loss=zero_unless(sound, by_target.mean(), z),
            n_samples=self.objective.entering(batch).sum(),
            n_duplicates=candidates.duplicates,
            sound=sound,
            broken=~finite,
            comparable=self.objective.comparable(batch) & sound,
            mknn=torch.where(known, mknn, math.nan),
            chance=torch.where(known, candidates.chance, math.nan),
        )

    def _batch(self, z: Tensor, teacher: Tensor, valid: Tensor) -> tuple[PooledBatch, Tensor]:
        """Builds the global batch, and the teacher's features of it followed by those of remembered samples."""
        z_all, all_teacher, filled = z, teacher, None
        if self.memory.pairs is not None:
            older, older_teacher, filled = self.memory.pairs
            z_all, filled = torch.cat([z, older.to(z)], dim=1), filled.to(valid)
            all_teacher = torch.cat([teacher, older_teacher.to(teacher)])
        candidates = teacher_candidates(all_teacher, valid, self.k, self.normalize, filled)
        return PooledBatch(z, z_all, teacher, valid, candidates, self.normalize), all_teacher


def _gather(z: Tensor, teacher: Tensor, valid: Tensor, n_rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pads the rows of this process to a common number and gathers them; returns ``[n_targets, N, D]`` and so on."""
    missing = 0
    if world_size() > 1:
        n_rows = common_row_count(len(valid), valid.device) if n_rows is None else n_rows
        missing = n_rows - len(valid)
        if missing < 0:
            raise ValueError(
                f"per_device_train_batch_size: it announces {n_rows} samples, and this process has {len(valid)}; let "
                "the data loader make batches of at most that size."
            )
    rows = z.transpose(0, 1).float()  # [B, n_targets, D], because ranks are concatenated along the first axis
    # torch.where instead of a product with the mask: a non-finite value outside the mask must not spread
    rows = torch.where(valid.view(-1, 1, 1), rows, 0.0)
    teacher = torch.where(valid.view(-1, 1), teacher.float(), 0.0)
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing))
        teacher = torch.nn.functional.pad(teacher, (0, 0, 0, missing))
        valid = torch.nn.functional.pad(valid, (0, missing))
    gathered_valid = gather_rows(valid.to(torch.uint8)).bool()
    return gather_rows(rows).transpose(0, 1), gather_rows(teacher), gathered_valid


def finite_parts(z: Tensor, teacher: Tensor, by_target: Tensor) -> tuple[Tensor, Tensor]:
    """Tells which targets produced finite values, ``[n_targets]``, and whether the teacher did, a scalar."""
    # The loss alone does not tell: a sample without candidates has none, and a NaN of the teacher merely reorders
    # neighbors.
    finite, teacher_finite = z.isfinite().flatten(1).all(dim=1), teacher.isfinite().all()
    return finite & (by_target.isfinite() | ~teacher_finite), teacher_finite


def zero_unless(sound: Tensor, loss: Tensor, *inputs: Tensor) -> Tensor:
    """Returns ``loss`` if ``sound``, otherwise 0, with a gradient of 0 for the ``inputs`` it was computed from."""
    for values in inputs:
        if values.requires_grad:  # a product would not do: 0 times a non-finite gradient is NaN
            values.register_hook(lambda gradient: torch.where(sound, gradient, 0.0))
    return torch.where(sound, loss, 0.0)
