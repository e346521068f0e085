"""Small batches for objectives."""

import torch
from torch import Tensor

from llamafactory_hera.alignment.neighbors import teacher_candidates
from llamafactory_hera.objectives import Options, PooledBatch

TARGETS, N, D, D_TEACHER = 2, 6, 4, 3
OPTIONS = Options(n_targets=TARGETS, dim=D, teacher_dim=D_TEACHER)


def pooled(z: Tensor, teacher: Tensor, valid: Tensor | None = None, k: int = 2) -> PooledBatch:
    """A batch without memory, as the term makes it."""
    valid = torch.ones(len(teacher), dtype=torch.bool) if valid is None else valid
    z = torch.where(valid.view(1, -1, 1), z, 0.0)
    teacher = torch.where(valid.view(-1, 1), teacher, 0.0)
    return PooledBatch(z, z, teacher, valid, teacher_candidates(teacher, valid, k, True))
