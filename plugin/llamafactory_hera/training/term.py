"""The HeRA term of one step: global batch, teacher neighbours, contrastive loss, statistics (paper, eq. 8-9)."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..alignment.gather import common_row_count, gather_rows
from ..alignment.memory import CrossBatchMemory
from ..alignment.mknn import neighbor_mask, rank_neighbors, similarity
from ..alignment.objectives import multi_target_info_nce

logger = logging.getLogger(__name__)

# Cosine similarity above which two teacher vectors are taken for the same image: only rounding lies between.
SAME_IMAGE = 1 - 1e-5


@dataclass(frozen=True)
class Candidates:
    """What the teacher says about a batch of N queries and M candidates."""

    allowed: Tensor  # [N, M]
    positives: Tensor  # [N, M]
    duplicates: int


@dataclass(frozen=True)
class TermOutput:
    """The HeRA term of a step and what is worth logging of it.

    Attributes:
        loss: Scalar with gradient; 0 when no sample had a candidate.
        mknn: In-batch agreement of student and teacher per head ``[n_heads]``; NaN without a sample.
        chance: The MKNN that unrelated features would reach in this batch, a scalar; NaN without a sample.
        n_samples: Samples of the global batch that entered.
        n_duplicates: Pairs of samples that show the same image and were kept apart.
        broken: None, or when a value was not finite and the term was left out: boolean ``[n_heads]``, true for the
            heads that gave it, false everywhere when it was the teacher. Equal on every rank.
        comparable: Every sample with an image had at least two candidates, so each one's representation has a
            gradient; with a single candidate the loss is the logarithm of 1.
    """

    loss: Tensor
    mknn: Tensor
    chance: Tensor
    n_samples: int
    n_duplicates: int
    broken: Tensor | None = None
    comparable: bool = False

    @property
    def finite(self) -> bool:
        """Whether the term is one: false when it was left out."""
        return self.broken is None


def teacher_candidates(teacher: Tensor, memory: Tensor | None, valid: Tensor, k: int, normalize: bool) -> Candidates:
    """Finds each sample's candidates and, among them, its ``k`` nearest neighbours in the teacher's space.

    A sample is no candidate of itself, and neither is another copy of its image, in the batch or in the memory.
    Where fewer than ``k`` candidates exist, all of them are neighbours.

    Args:
        teacher: ``[N, D_teacher]`` features of the batch; rows that are not valid may hold anything.
        memory: ``[m, D_teacher]`` features of remembered samples.
        valid: Boolean ``[N]``.
        k: Neighbours per sample.
        normalize: Cosine similarity when true, dot product otherwise.
    """
    n = teacher.shape[0]
    everything = teacher if memory is None else torch.cat([teacher, memory.to(teacher)])
    usable = torch.ones(everything.shape[0], dtype=torch.bool, device=teacher.device)
    usable[:n] = valid
    same_image = similarity(teacher, everything) > SAME_IMAGE
    itself = torch.zeros_like(same_image)
    itself.fill_diagonal_(True)
    pairs = valid.unsqueeze(1) & usable & ~itself
    allowed = pairs & ~same_image
    ranked = rank_neighbors(similarity(teacher, everything, normalize), min(k, everything.shape[0]), excluded=~allowed)
    positives = neighbor_mask(ranked, everything.shape[0]) & allowed
    duplicates = int((pairs & same_image)[:, :n].sum()) // 2
    return Candidates(allowed, positives, duplicates)


class HeraTerm:
    """Computes ``L_HeRA`` of a step over the global batch.

    Every rank must call it in every step, also when none of its samples has an image: it gathers over ranks.

    Args:
        k: Teacher neighbours per sample; shrinks, with one warning, where fewer candidates exist.
        normalize: Cosine similarity when true, dot product otherwise; for student and teacher.
        memory: Remembered pairs that extend the candidates.
    """

    def __init__(self, k: int, normalize: bool = True, memory: CrossBatchMemory | None = None) -> None:
        self.k = k
        self.normalize = normalize
        self.memory = memory if memory is not None else CrossBatchMemory(0)
        self._warned = False

    def __call__(self, representations: Tensor, teacher: Tensor, valid: Tensor, temperature: Tensor) -> TermOutput:
        """Computes the term.

        Args:
            representations: ``[n_heads, B, D]`` of this rank, with gradient.
            teacher: ``[B, D_teacher]`` of this rank; anything where not valid.
            valid: Boolean ``[B]``: the sample has an image and pooled tokens.
            temperature: Scalar tensor, above 0.
        """
        z, teacher, valid = self._gather(representations, teacher, valid)
        memory_z = memory_teacher = None
        if len(self.memory):
            memory_z, memory_teacher = self.memory.representations.to(z), self.memory.teacher
        candidates = teacher_candidates(teacher, memory_teacher, valid, self.k, self.normalize)
        enters = candidates.positives.any(dim=1)
        n_samples = int(enters.sum())
        self._warn_when_few(candidates, enters, n_samples)

        everything = z if memory_z is None else torch.cat([z, memory_z], dim=1)
        similarities = similarity(z, everything, self.normalize)
        losses = multi_target_info_nce(similarities, candidates.positives, candidates.allowed, temperature)
        of_heads = torch.where(enters, losses, 0.0).sum(dim=1) / max(n_samples, 1)
        # The loss does not tell it all: a sample without candidates has none, and a NaN of the teacher only misleads.
        sound = of_heads.isfinite() & z.isfinite().flatten(1).all(dim=1)
        if not (sound.all() & teacher.isfinite().all()):
            unknown = z.new_full((z.shape[0],), math.nan)
            return TermOutput(z.new_zeros(()), unknown, unknown[0], n_samples, 0, ~sound)
        mknn = self._mutual_knn(similarities.detach(), candidates, enters)
        share = candidates.positives.sum(dim=1) / candidates.allowed.sum(dim=1).clamp(min=1)
        self.memory.append(z[:, valid], teacher[valid])
        comparable = n_samples > 0 and bool((candidates.allowed.sum(dim=1)[valid] > 1).all())
        return TermOutput(
            of_heads.mean(),
            mknn,
            share[enters].mean(),
            n_samples,
            candidates.duplicates,
            comparable=comparable,
        )

    def _gather(self, z: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n_rows = common_row_count(valid.shape[0], valid.device)
        missing = n_rows - valid.shape[0]
        rows = z.transpose(0, 1).float()  # [B, n_heads, D]: ranks are concatenated along the first axis
        # not a product with the mask: a non-finite value outside it must not spread
        rows = torch.where(valid.view(-1, 1, 1), rows, 0.0)
        teacher = torch.where(valid.view(-1, 1), teacher.float(), 0.0)
        if missing:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing))
            teacher = torch.nn.functional.pad(teacher, (0, 0, 0, missing))
            valid = torch.nn.functional.pad(valid, (0, missing))
        gathered_valid = gather_rows(valid.to(torch.uint8)).bool()
        return gather_rows(rows).transpose(0, 1), gather_rows(teacher), gathered_valid

    def _mutual_knn(self, similarities: Tensor, candidates: Candidates, enters: Tensor) -> Tensor:
        if not enters.any():
            return similarities.new_full((similarities.shape[0],), math.nan)
        counts = candidates.positives.sum(dim=1)
        ranked = rank_neighbors(similarities, min(self.k, similarities.shape[-1]), excluded=~candidates.allowed)
        hits = candidates.positives.expand_as(similarities).gather(-1, ranked).sum(dim=-1)
        return (hits / counts.clamp(min=1))[:, enters].mean(dim=1)

    def _warn_when_few(self, candidates: Candidates, enters: Tensor, n_samples: int) -> None:
        if self._warned or not n_samples:
            return
        fewest = int(candidates.allowed.sum(dim=1)[enters].min())
        if fewest < self.k:
            self._warned = True
            logger.warning(
                f"hera_k: {self.k} neighbours are asked for and a sample of this batch has {fewest} candidates; k "
                "shrinks to what there is. Use a larger global batch, or hera_memory to remember recent samples."
            )
