"""CKA, CMAR's objective: the similarities among the samples of a batch must be the teacher's, all of them."""

import torch
from torch import Tensor

from ..alignment.losses import cka_loss
from .base import Objective, PooledBatch, register


@register("cka")
class CKA(Objective):
    """One minus the linear CKA of representations and teacher features over the samples of the global batch."""

    least_samples = 3  # two centered samples are always collinear: their CKA is 1

    def forward(self, batch: PooledBatch) -> Tensor:
        """The loss of each target; 0 below three samples."""
        enters = self.entering(batch)
        return torch.where(enters.any(), cka_loss(batch.z, batch.teacher, enters), 0.0)

    def comparable(self, batch: PooledBatch) -> Tensor:
        """Where all samples show one image there is no structure to learn."""
        return super().comparable(batch) & batch.candidates.allowed.any()
