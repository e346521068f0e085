"""Small batches for objectives."""

import torch
from torch import Tensor

from llamafactory_hera.alignment.neighbors import teacher_candidates
from llamafactory_hera.objectives import PooledBatch
from tests.terms import options

TARGETS, N, D, D_TEACHER = 2, 6, 4, 3
OPTIONS = options(TARGETS, D, D_TEACHER)


def pooled(z: Tensor, teacher: Tensor, valid: Tensor | None = None, k: int = 2) -> PooledBatch:
    """Makes a batch without memory, as the term does."""
    valid = torch.ones(len(teacher), dtype=torch.bool) if valid is None else valid
    z = torch.where(valid.view(1, -1, 1), z, 0.0)
    teacher = torch.where(valid.view(-1, 1), teacher, 0.0)
    candidates = teacher_candidates(teacher, valid, k, True)
    return PooledBatch(z, z, teacher, valid, slice(0, len(valid)), z, candidates, True)
