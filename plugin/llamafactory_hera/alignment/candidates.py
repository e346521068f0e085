"""Whom a sample of a batch is compared with, and who of them are its neighbours in the teacher's space."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .mknn import neighbor_mask, rank_neighbors, similarity

# Cosine similarity above which two teacher vectors are taken for the same image: only rounding lies between.
SAME_IMAGE = 1 - 1e-5


@dataclass(frozen=True)
class Candidates:
    """What the teacher says about a batch of N queries and M candidates."""

    allowed: Tensor  # [N, M]
    positives: Tensor  # [N, M]
    duplicates: int


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
