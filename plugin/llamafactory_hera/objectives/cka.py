"""CKA, the objective of CMAR, which matches all similarities between samples of a batch to the teacher's."""

import torch
from torch import Tensor

from ..alignment.losses import cka_loss
from .base import Objective, PooledBatch, register


@register("cka")
class CKA(Objective):
    """One minus the linear CKA of representations and teacher features over the global batch."""

    reads = (*Objective.reads, "hera_accumulate")
    least_samples = 3  # two centered samples are always collinear, so their CKA is 1

    def forward(self, batch: PooledBatch) -> Tensor:
        """Computes the loss of each target over the global batch; 0 for fewer than three samples."""
        # not a sum over samples, so every process computes the whole loss
        enough = batch.valid.sum() >= self.least_samples
        return torch.where(enough, cka_loss(batch.z, batch.teacher, batch.valid & enough), 0.0)

    def gradient_expected(self, batch: PooledBatch) -> Tensor:
        """Expects gradients only if the batch contains at least two different images."""
        return super().gradient_expected(batch) & batch.candidates.allowed.any()
