"""The term of one step: the global batch, the teacher's neighbours, the objective's loss, statistics (eq. 8-9)."""

import logging
import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..alignment.gather import common_row_count, gather_rows, rank, world_size
from ..alignment.memory import CrossBatchMemory
from ..alignment.neighbors import Candidates, mutual_knn, teacher_candidates
from ..objectives.base import Objective, PooledBatch, TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TermOutput:
    """The term of a step and what is worth logging of it."""

    loss: Tensor  #: Scalar with gradient; 0 when no sample entered.
    mknn: Tensor  #: In-batch agreement of student and teacher ``[n_targets]``; NaN where it is not measured.
    chance: Tensor  #: The MKNN that unrelated features would reach in this batch, a scalar; NaN likewise.
    n_samples: int  #: Samples of the global batch that entered.
    n_duplicates: int  #: Pairs of samples that show the same image and were kept apart.
    #: When a value was not finite and the term was left out: boolean ``[n_targets]``, equal on every rank: true for
    #: the targets that gave it, false everywhere when it was the teacher.
    broken: Tensor | None = None
    comparable: bool = False  #: Every sample that entered must have a gradient.


@dataclass(eq=False)
class HeraTerm:
    """Computes the term of a step over the global batch, for an objective of view ``pooled``.

    Every rank must call it in every step, also when none of its samples has an image: it gathers over ranks.
    """

    objective: Objective
    k: int  #: Teacher neighbours per sample; at most half of the candidates, with one warning.
    normalize: bool = True  #: Cosine similarity when true, dot product otherwise; for student and teacher.
    memory: CrossBatchMemory = field(default_factory=partial(CrossBatchMemory, 0))
    _warned: bool = field(default=False, init=False)

    def __call__(self, representations: Tensor, teacher: Tensor, valid: Tensor) -> TermOutput:
        """Computes the term of this rank's ``[n_targets, B, D]`` and ``[B, D_teacher]``: anything where not valid."""
        batch, all_teacher = self._batch(*self._gather(representations, teacher, valid))
        enters = self.objective.entering(batch)
        n_samples = int(enters.sum())
        if self.objective.uses_candidates:
            self._warn_when_few(batch.candidates, enters, n_samples)

        by_target = self.objective(batch)
        z, candidates = batch.z, batch.candidates
        sound, teacher_finite = _sound(z, batch.teacher, by_target)
        if not (sound.all() & teacher_finite):
            return _left_out(~sound, n_samples)
        mknn = mutual_knn(batch.everything, all_teacher, self.k, self.normalize, candidates.allowed)
        chance = candidates.chance
        if len(self.memory) < self.memory.size:  # not comparable yet: among fewer candidates more agree by chance
            mknn, chance = torch.full_like(mknn, math.nan), torch.full_like(chance, math.nan)
        self.memory.append(z[:, batch.valid], batch.teacher[batch.valid])
        loss, comparable = by_target.mean(), self.objective.comparable(batch)
        return TermOutput(loss, mknn, chance, n_samples, candidates.duplicates, comparable=comparable)

    def _batch(self, z: Tensor, teacher: Tensor, valid: Tensor) -> tuple[PooledBatch, Tensor]:
        """The global batch, and the teacher's features of it with those of remembered samples behind them."""
        everything, all_teacher = z, teacher
        if self.memory.representations is not None and self.memory.teacher is not None:
            everything = torch.cat([z, self.memory.representations.to(z)], dim=1)
            all_teacher = torch.cat([teacher, self.memory.teacher.to(teacher)])
        candidates = teacher_candidates(all_teacher, valid, self.k, self.normalize)
        return PooledBatch(z, everything, teacher, valid, candidates, self.normalize), all_teacher

    def _gather(self, z: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n_rows = common_row_count(valid.shape[0], valid.device)
        missing = n_rows - valid.shape[0]
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

    def _warn_when_few(self, candidates: Candidates, enters: Tensor, n_samples: int) -> None:
        if self._warned or not n_samples or rank() > 0:
            return
        fewest = int(candidates.allowed.sum(dim=1)[enters].min())
        if fewest < 2 * self.k:
            self._warned = True
            logger.warning(
                f"hera_k: {self.k} neighbours are asked for and a sample of this batch has {fewest} candidates, of "
                "which at most half are taken: all would leave the teacher no choice. Use a larger global batch, or "
                "hera_memory to remember recent samples."
            )


@dataclass(eq=False)
class TokenTerm:
    """Computes a term that is a mean over samples, whose vectors (visual tokens) are too many to be gathered.

    The loss of a process is scaled by the number of processes over the samples of all of them, so that the engine's
    averaging of gradients gives the gradient of the mean over the global batch. The objective's own parameters are in
    no engine's hands: their gradients must be averaged over the processes. Every rank must call it in every step, also
    when none of its samples has an image.
    """

    objective: Objective

    def __call__(self, batch: TokenBatch) -> TermOutput:
        """Computes this rank's part, of anything where a sample is not valid; the mean over ranks is the term."""
        valid = batch.valid
        tokens = torch.where(valid.view(1, -1, 1, 1), batch.tokens.float(), 0.0)
        teacher = torch.where(valid.view(-1, 1, 1), batch.teacher.float(), 0.0)
        projections = None if batch.projections is None else batch.projections.float()
        batch = replace(batch, tokens=tokens, teacher=teacher, projections=projections)
        losses = self.objective(batch)
        if losses.shape != (len(tokens), len(valid)):
            raise ValueError(
                f"{type(self.objective).__name__} returns a loss of shape {list(losses.shape)}; on tokens it is one "
                f"for each target and sample, {[len(tokens), len(valid)]}."
            )
        by_target = torch.where(valid, losses, 0.0).sum(dim=1)
        sound, teacher_finite = _sound(tokens, teacher, by_target)
        facts = torch.cat([valid.sum().view(1), ~teacher_finite.view(1), ~sound]).float()
        if world_size() > 1:
            dist.all_reduce(facts)
        n_samples, broken = int(facts[0]), facts[2:] > 0
        if facts[1:].any():
            return _left_out(broken, n_samples)
        unknown = torch.full_like(by_target.detach(), math.nan)
        loss = by_target.mean() * world_size() / max(n_samples, 1)
        return TermOutput(loss, unknown, unknown[0], n_samples, 0, comparable=n_samples > 0)


def _sound(z: Tensor, teacher: Tensor, by_target: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets gave finite values ``[n_targets]``, and whether the teacher did."""
    # The loss does not tell it all: a sample without candidates has none, and a NaN of the teacher only misleads.
    finite, teacher_finite = z.isfinite().flatten(1).all(dim=1), teacher.isfinite().all()
    return finite & (by_target.isfinite() | ~teacher_finite), teacher_finite


def _left_out(broken: Tensor, n_samples: int) -> TermOutput:
    """The output of a term that is not finite: a constant 0."""
    unknown = torch.full(broken.shape, math.nan, device=broken.device)
    return TermOutput(unknown.new_zeros(()), unknown, unknown[0], n_samples, 0, broken)
