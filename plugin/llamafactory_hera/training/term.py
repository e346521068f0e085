"""The alignment term of one step over the global batch, with its statistics (paper, eq. 8 and 9)."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..alignment.neighbors import teacher_candidates
from ..distributed import common_row_count, gather_rows, rank, sum_over_ranks, world_size
from ..objectives.base import Objective, PooledBatch
from .memory import CrossBatchMemory


@dataclass(frozen=True)
class TermOutput:
    """The term of a step with its statistics. All tensors stay on the device, so that no step waits for them.

    All values except ``gradient_expected`` describe the global batch and are equal on every process.
    """

    loss: Tensor  #: A scalar with gradients; 0 if no sample entered or a value was not finite.
    n_samples: Tensor  #: The number of samples that entered the loss.
    n_duplicates: Tensor  #: The number of sample pairs that were not compared because both show the same image.
    finite: Tensor  #: True if every value was finite; if false, loss and gradient are 0.
    broken: Tensor  #: Boolean ``[n_targets]``, true for targets with a non-finite value.
    gradient_expected: Tensor  #: True if the backward pass must reach this process's samples in the loss.
    comparable: Tensor  #: True if the loss is comparable with that of other steps, and is therefore logged.
    #: The MKNN of student and teacher in the batch, ``[n_targets]``; NaN if not measured, None for token objectives.
    mknn: Tensor | None = None
    chance: Tensor | None = None  #: The MKNN of unrelated features in this batch; NaN or None whenever ``mknn`` is.


@dataclass(frozen=True)
class Prepared:
    """A micro-batch between ``Aligner.prepare`` and ``Aligner.loss``."""

    valid: Tensor  #: Boolean ``[B]``, true if the sample has an image and tokens to read.
    inputs: dict[str, Tensor]  #: The tensors that ``HeraCollator`` added to the batch.
    planned: bool = False  #: True if the objective chose the samples in the loss, possibly none.
    pixels: Tensor | None = None  #: The images as the student sees them, for an objective on tokens.
    context: dict[str, Tensor] = field(default_factory=dict)  #: The tensors of the objective's plan.


@dataclass(eq=False)
class HeraTerm:
    """Computes the term over the global batch, for an objective on pooled vectors."""

    objective: Objective
    #: Teacher neighbors per sample; at most half of a sample's candidates become its neighbors.
    k: int
    #: The similarity, for student and teacher: cosine similarity if true, the dot product if false.
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
            valid: Boolean ``[B]``; the values of invalid samples are arbitrary.
            n_rows: An upper bound on B over all processes. If None, the processes communicate to agree on a bound.
            keys: The keys of the images, uint8 ``[B, 16]``; 0 if unknown.
        """
        batch, image_ids = self._batch(representations, teacher, valid, n_rows, keys)
        found, n_targets = batch.candidates, len(batch.own)
        agreement = found.agreement(batch.z_all, self.normalize).sum(dim=1)
        statistics = (agreement, found.chance.sum(), found.has_neighbor.sum(), found.duplicates)
        losses = self.objective(batch)
        check_shape(self.objective, losses, [n_targets, len(found.has_neighbor)], [n_targets])
        teacher, enters = batch.teacher[batch.rows], self.objective.entering(batch)
        term, (shared, chance, n_known, n_duplicates) = mean_term(losses, enters, (batch.own,), teacher, *statistics)
        comparable = term.finite
        if self.memory.size:  # until the memory is full, fewer candidates lower the loss and raise chance agreement
            comparable = comparable & (self.memory.pairs is not None and self.memory.pairs[2].all())
        self.memory.append(batch.z, batch.teacher, batch.valid & term.finite, image_ids)
        return replace(
            term,
            n_duplicates=n_duplicates,
            gradient_expected=self.objective.gradient_expected(batch) & term.finite,
            comparable=comparable,
            mknn=torch.where(comparable, shared / n_known, math.nan),
            chance=torch.where(comparable, chance / n_known, math.nan),
        )

    def _batch(
        self, representations: Tensor, teacher: Tensor, valid: Tensor, n_rows: int | None, keys: Tensor | None
    ) -> tuple[PooledBatch, Tensor]:
        """Gathers the samples of all processes, padded to the same number on each; also returns the image ids."""
        missing = 0
        if world_size() > 1:
            n_rows = common_row_count(len(valid), valid.device) if n_rows is None else n_rows
            missing = n_rows - len(valid)
            if missing < 0:
                raise ValueError(
                    f"per_device_train_batch_size: {n_rows} is less than the {len(valid)} samples of this batch; let "
                    f"the data loader create batches of at most {n_rows}."
                )
        ids = valid.new_zeros(len(valid), 2, dtype=torch.float32) if keys is None else _image_ids(keys)
        # torch.where instead of a product with the mask: a non-finite value outside the mask must not spread
        own = torch.where(valid.view(1, -1, 1), representations.float(), 0.0)
        teacher = torch.where(valid.view(-1, 1), teacher.float(), 0.0)
        others = torch.cat([ids, valid.view(-1, 1).float(), teacher], dim=1)
        own, others = pad(own, (0, 0, 0, missing)), pad(others, (0, 0, 0, missing))
        # one collective for all tensors; it concatenates the processes along the first axis
        gathered = gather_rows(torch.cat([others, own.transpose(0, 1).flatten(1)], dim=1))
        ids, valid, teacher = gathered[:, : others.shape[1]].detach().split([2, 1, teacher.shape[1]], dim=1)
        z, valid = gathered[:, others.shape[1] :].unflatten(1, (len(own), -1)).transpose(0, 1), valid.squeeze(1) > 0
        self.memory.settle(len(valid))
        z_all, all_teacher, all_ids, filled = z, teacher, ids, None
        if self.memory.pairs is not None:
            older, older_teacher, filled, older_ids = self.memory.pairs
            z_all, filled = torch.cat([z, older.to(z)], dim=1), filled.to(valid)
            all_teacher = torch.cat([teacher, older_teacher.to(teacher)])
            all_ids = torch.cat([ids, older_ids.to(ids)])
        rows = slice(rank() * own.shape[1], (rank() + 1) * own.shape[1])
        candidates = teacher_candidates(all_teacher, valid, self.k, self.normalize, filled, all_ids, rows)
        return PooledBatch(z, z_all, teacher, valid, rows, own, candidates, self.normalize), ids


def _image_ids(keys: Tensor) -> Tensor:
    """Turns the first six bytes of keys ``[B, 16]`` into two numbers that float32 represents exactly, ``[B, 2]``."""
    first = keys[:, :6].float()
    return (first[:, :2] * 256 + first[:, 2:4]) * 256 + first[:, 4:]


def check_shape(objective: Objective, losses: Tensor, *shapes: list[int]) -> None:
    """Raises ``ValueError`` if an objective's losses have none of these shapes."""
    if list(losses.shape) not in shapes:
        raise ValueError(
            f"{type(objective).__name__} returns losses of shape {list(losses.shape)}; return one per pair of a "
            f"target and a sample of the process, {', or one per target, '.join(map(str, shapes))}."
        )


def mean_term(
    losses: Tensor, enters: Tensor, inputs: tuple[Tensor, ...], teacher: Tensor, *statistics: Tensor
) -> tuple[TermOutput, tuple[Tensor, ...]]:
    """Computes the term from the losses of this process's samples; every process must call it.

    The value of the term is the mean over the global batch. Its gradient comes from the losses of this process, times
    the number of processes, so an engine that averages gradients yields the gradient of the mean.

    Args:
        losses: ``[n_targets, n]``, or ``[n_targets]`` if every process computed the loss of the global batch.
        enters: Boolean ``[n]``, true for samples that enter the loss.
        inputs: The representations ``[n_targets, n, ...]``, and other inputs of the losses. They receive a gradient of
            0 if any value on any process is not finite.
        teacher: The teacher's features of the same samples.
        *statistics: Tensors to sum over the processes in the same collective.
    """
    by_target = losses.sum(dim=1) if losses.dim() == 2 else losses
    # Checking only the loss is not enough: a sample without candidates does not enter the loss, and a NaN in the
    # teacher's features merely reorders neighbors.
    broken = (~inputs[0].isfinite().flatten(1).all(dim=1), ~by_target.isfinite(), ~teacher.isfinite().all())
    total, n_samples, *sums = sum_over_ranks(by_target, enters.sum(), *broken, *statistics)
    of_inputs, of_losses, of_teacher = sums[:3]
    finite = ~(of_inputs | of_losses | of_teacher).any()
    loss = by_target.mean()
    if losses.dim() == 2:
        loss = loss * world_size() / n_samples.clamp(min=1)
        loss = loss + (total.mean() / n_samples.clamp(min=1) - loss).detach()
    for values in inputs:
        if values.requires_grad:  # torch.where, because 0 times a non-finite gradient is NaN
            values.register_hook(lambda gradient: torch.where(finite, gradient, 0.0))
    entered = finite & (n_samples > 0)
    term = TermOutput(
        loss=torch.where(finite, loss, 0.0),
        n_samples=n_samples,
        n_duplicates=torch.zeros_like(n_samples),
        finite=finite,
        broken=of_inputs | of_losses & ~of_teacher,
        gradient_expected=entered,
        comparable=entered,  # a micro-batch without samples does not count in a mean
    )
    return term, tuple(sums[3:])
