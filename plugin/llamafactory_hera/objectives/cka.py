"""CKA, CMAR's objective: the similarities among the samples of a batch must be the teacher's, all of them."""

from torch import Tensor

from ..alignment.losses import cka_loss
from .base import Objective, PooledBatch, register


@register("cka")
class CKA(Objective):
    """One minus the linear CKA of representations and teacher features over the samples of the global batch."""

    least_samples = 3  # two centred samples are always collinear: their CKA is 1

    def forward(self, batch: PooledBatch) -> Tensor:
        """The loss of each target; 0 below three samples."""
        enters = self.entering(batch)
        if not enters.any():
            return 0.0 * batch.z.sum(dim=(1, 2))
        return cka_loss(batch.z[:, enters], batch.teacher[enters])

    def comparable(self, batch: PooledBatch) -> bool:
        """Where all samples show one image there is no structure to learn."""
        return super().comparable(batch) and bool(batch.candidates.allowed.any())
