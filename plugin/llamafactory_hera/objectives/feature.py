"""Feature matching, a row of the paper's ablation (table 1): representations are mapped onto teacher features."""

import torch
from torch import Tensor

from ..alignment.losses import cosine_loss
from .base import Objective, Options, PooledBatch, register
from .projector import Projector


@register("feature")
class Feature(Objective):
    """One minus the cosine of the projected representation and the teacher's feature, mean over samples.

    The paper names the row and does not say how it is computed: projector and cosine are this project's choice.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.projector = Projector(options.n_targets, options.dim, options.teacher_dim)

    def forward(self, batch: PooledBatch) -> Tensor:
        """The loss of each target."""
        losses = cosine_loss(self.projector(batch.z), batch.teacher)
        return torch.where(batch.valid, losses, 0.0).sum(dim=1) / batch.valid.sum().clamp(min=1)
