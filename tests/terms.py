"""Options and small batches for objectives, and a HeRA term that receives its temperature with each batch."""

from typing import Any

import torch
from torch import Tensor

from llamafactory_hera.alignment.neighbors import teacher_candidates
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.objectives import Options, PooledBatch
from llamafactory_hera.objectives.contrastive import Contrastive
from llamafactory_hera.training.memory import CrossBatchMemory
from llamafactory_hera.training.term import HeraTerm, TermOutput

TARGETS, N, D, D_TEACHER = 2, 6, 4, 3


def options(
    n_targets: int = 1, dim: int = 1, teacher_dim: int = 1, side: int = 0, initializer_range: float = 0.02, **keys: Any
) -> Options:
    """Makes options with the given sizes and ``hera_*`` keys."""
    return Options(HeraConfig(heads="L0H0", **keys), n_targets, dim, teacher_dim, side, initializer_range)


OPTIONS = options(TARGETS, D, D_TEACHER)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def pooled(z: Tensor, teacher: Tensor, valid: Tensor, rows: slice = slice(None)) -> PooledBatch:
    """Makes a batch without memory, as the term does."""
    z = torch.where(valid.view(1, -1, 1), z, 0.0)
    teacher = torch.where(valid.view(-1, 1), teacher, 0.0)
    candidates = teacher_candidates(teacher, valid, 2, True, rows=rows)
    return PooledBatch(z, z, teacher, valid, rows, z[:, rows], candidates, True)


class ContrastiveTerm(HeraTerm):
    """The contrastive HeRA term; each call sets the temperature."""

    def __init__(self, k: int, normalize: bool = True, memory: CrossBatchMemory | None = None) -> None:
        memory = CrossBatchMemory(0) if memory is None else memory
        objective = Contrastive(options())
        del objective.log_temperature  # each call sets it to a tensor, which a parameter would not allow
        super().__init__(objective, k, normalize, memory)

    def __call__(
        self, representations: Tensor, teacher: Tensor, valid: Tensor, temperature: Tensor, n_rows: int | None = None
    ) -> TermOutput:
        self.objective.log_temperature = temperature.log()
        return super().__call__(representations, teacher, valid, n_rows)
