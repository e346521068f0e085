"""The term of one step: the global batch, the teacher's neighbors, the objective's loss, statistics (eq. 8-9)."""

import logging
import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..alignment.gather import common_row_count, gather_rows, rank, world_size
from ..alignment.memory import CrossBatchMemory
from ..alignment.neighbors import mutual_knn, teacher_candidates
from ..objectives.base import Objective, PooledBatch, TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TermOutput:
    """The term of a step and what is worth logging of it; on the device, where nobody waits for it."""

    loss: Tensor  #: Scalar with gradient; 0 when no sample entered, or a value was not finite.
    mknn: Tensor  #: In-batch agreement of student and teacher ``[n_targets]``; NaN where it is not measured.
    chance: Tensor  #: The MKNN that unrelated features would reach in this batch, a scalar; NaN likewise.
    n_samples: Tensor  #: Samples of the global batch that entered.
    n_duplicates: Tensor  #: Pairs of samples that show the same image and were kept apart.
    sound: Tensor  #: Every value was finite; where not, the gradient is 0, too. Equal on every rank.
    broken: Tensor  #: Targets that gave a value that is not ``[n_targets]``; none when it was the teacher.
    comparable: Tensor  #: Every sample that entered must have a gradient.


@dataclass(eq=False)
class HeraTerm:
    """Computes the term of a step over the global batch, for an objective of view ``pooled``.

    Every rank must call it in every step, also when none of its samples has an image: it gathers over ranks.
    """

    objective: Objective
    k: int  #: Teacher neighbors per sample; at most half of the candidates, with one warning.
    normalize: bool = True  #: Cosine similarity when true, dot product otherwise; for student and teacher.
    memory: CrossBatchMemory = field(default_factory=partial(CrossBatchMemory, 0))
    _fewest: Tensor | None = field(default=None, init=False)  # candidates of a sample that entered, so far
    _warned: bool = field(default=False, init=False)

    def __call__(
        self, representations: Tensor, teacher: Tensor, valid: Tensor, n_rows: int | None = None
    ) -> TermOutput:
        """Computes the term of this rank's ``[n_targets, B, D]`` and ``[B, D_teacher]``: anything where not valid.

        Args:
            representations: Of the student.
            teacher: Features of the same samples.
            valid: Boolean ``[B]``.
            n_rows: No rank has more samples; without it the ranks agree on a number, and wait for it.
        """
        batch, all_teacher = self._batch(*self._gather(representations, teacher, valid, n_rows))
        z, candidates, enters = batch.z, batch.candidates, self.objective.entering(batch)
        by_target = self.objective(batch)
        finite, teacher_finite = _finite(z, batch.teacher, by_target)
        sound = finite.all() & teacher_finite
        known = sound
        if self.memory.size:  # not comparable until it is full: among fewer candidates more agree by chance
            known = sound & (self.memory.pairs is not None and self.memory.pairs[2].all())
        if self.objective.uses_candidates:
            fewest = torch.where(enters & known, candidates.allowed.sum(dim=1), 2 * self.k).amin()
            self._fewest = fewest if self._fewest is None else torch.minimum(self._fewest, fewest)
        mknn = mutual_knn(batch.everything, all_teacher, self.k, self.normalize, candidates.allowed)
        self.memory.append(z, batch.teacher, batch.valid & sound)
        return TermOutput(
            _left_out(by_target.mean(), sound, z),
            torch.where(known, mknn, math.nan),
            torch.where(known, candidates.chance, math.nan),
            enters.sum(),
            candidates.duplicates,
            sound,
            ~finite,
            self.objective.comparable(batch) & sound,
        )

    def _batch(self, z: Tensor, teacher: Tensor, valid: Tensor) -> tuple[PooledBatch, Tensor]:
        """The global batch, and the teacher's features of it with those of remembered samples behind them."""
        everything, all_teacher, filled = z, teacher, None
        if self.memory.pairs is not None:
            older, older_teacher, filled = self.memory.pairs
            everything, filled = torch.cat([z, older.to(z)], dim=1), filled.to(valid)
            all_teacher = torch.cat([teacher, older_teacher.to(teacher)])
        candidates = teacher_candidates(all_teacher, valid, self.k, self.normalize, filled)
        return PooledBatch(z, everything, teacher, valid, candidates, self.normalize), all_teacher

    def _gather(self, z: Tensor, teacher: Tensor, valid: Tensor, n_rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
        missing = 0
        if world_size() > 1:
            n_rows = common_row_count(len(valid), valid.device) if n_rows is None else n_rows
            missing = n_rows - len(valid)
            if missing < 0:
                raise ValueError(
                    f"per_device_train_batch_size: it makes {n_rows} samples, and this process has {len(valid)}; let "
                    "the loader make batches of at most that size."
                )
        rows = z.transpose(0, 1).float()  # [B, n_targets, D]: ranks are concatenated along the first axis
        # not a product with the mask: a non-finite value outside it must not spread
        rows = torch.where(valid.view(-1, 1, 1), rows, 0.0)
        teacher = torch.where(valid.view(-1, 1), teacher.float(), 0.0)
        if missing:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing))
            teacher = torch.nn.functional.pad(teacher, (0, 0, 0, missing))
            valid = torch.nn.functional.pad(valid, (0, missing))
        gathered_valid = gather_rows(valid.to(torch.uint8)).bool()
        return gather_rows(rows).transpose(0, 1), gather_rows(teacher), gathered_valid

    def warn_when_few(self) -> None:
        """Warns, once, when k was more than half of a sample's candidates; the host waits for the device here."""
        if self._warned or self._fewest is None or rank() > 0:
            return
        fewest = int(self._fewest)
        if fewest < 2 * self.k:
            self._warned = True
            logger.warning(
                f"hera_k: {self.k} neighbors are more than half of the {fewest} candidates that a sample had, and at "
                "most half are taken: all would leave the teacher no choice. Use a larger batch per device, more "
                f"processes, or hera_memory: {max(4 * self.k, 64)}."
            )


def token_term(objective: Objective, batch: TokenBatch) -> TermOutput:
    """Computes this rank's part of a term over samples whose vectors (visual tokens) are too many to be gathered.

    The mean over ranks is the term: the loss of a process is scaled by the number of processes over the samples of all
    of them, so that the engine's averaging of gradients gives the gradient of the mean over the global batch. The
    objective's own parameters are in no engine's hands: their gradients must be averaged over the processes. Every
    rank must call it in every step, also when none of its samples has an image; where not valid it may hold anything.
    """
    valid = batch.valid
    tokens = torch.where(valid.view(1, -1, 1, 1), batch.tokens.float(), 0.0)
    teacher = torch.where(valid.view(-1, 1, 1), batch.teacher.float(), 0.0)
    projections = None if batch.projections is None else batch.projections.float()
    batch = replace(batch, tokens=tokens, teacher=teacher, projections=projections)
    losses = objective(batch)
    if losses.shape != (len(tokens), len(valid)):
        raise ValueError(
            f"{type(objective).__name__} returns a loss of shape {list(losses.shape)}; on tokens it is one "
            f"for each target and sample, {[len(tokens), len(valid)]}."
        )
    by_target = torch.where(valid, losses, 0.0).sum(dim=1)
    finite, teacher_finite = _finite(tokens, teacher, by_target)
    facts = torch.cat([valid.sum().view(1), ~teacher_finite.view(1), ~finite]).float()
    if world_size() > 1:
        dist.all_reduce(facts)
    n_samples, sound, broken = facts[0], ~facts[1:].any(), facts[2:] > 0
    loss = by_target.mean() * world_size() / n_samples.clamp(min=1)
    loss = _left_out(loss, sound, tokens, *([] if projections is None else [projections]))
    unknown = torch.full_like(by_target.detach(), math.nan)
    duplicates = torch.zeros_like(n_samples)
    return TermOutput(loss, unknown, unknown[0], n_samples, duplicates, sound, broken, sound & (n_samples > 0))


def _finite(z: Tensor, teacher: Tensor, by_target: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets gave finite values ``[n_targets]``, and whether the teacher did."""
    # The loss does not tell it all: a sample without candidates has none, and a NaN of the teacher only misleads.
    finite, teacher_finite = z.isfinite().flatten(1).all(dim=1), teacher.isfinite().all()
    return finite & (by_target.isfinite() | ~teacher_finite), teacher_finite


def _left_out(loss: Tensor, sound: Tensor, *inputs: Tensor) -> Tensor:
    """``loss``, or where it is not sound 0, with a gradient of 0 for the ``inputs`` that it was computed from."""
    for values in inputs:
        if values.requires_grad:  # not a product: 0 times what is not finite would reach the model
            values.register_hook(lambda gradient: torch.where(sound, gradient, 0.0))
    return torch.where(sound, loss, 0.0)
