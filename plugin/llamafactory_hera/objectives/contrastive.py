"""HeRA's objective: a sample's neighbors in the teacher's space must be near (paper, eq. 4 and 8)."""

import math

import torch
from torch import Tensor, nn

from ..alignment.losses import contrastive_loss
from .base import Objective, Options, PooledBatch, register


@register("contrastive")
class Contrastive(Objective):
    """Multi-target InfoNCE with a temperature that is learned in log scale (paper, sec. 3)."""

    uses_candidates = True
    least_samples = 3  # of two candidates one is the neighbor; with one the loss is the logarithm of 1
    logged = ("hera_temperature",)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        log_temperature = torch.tensor(math.log(options.temperature))
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=options.learn_temperature)

    def temperature(self) -> Tensor:
        """The temperature, with gradient while it is learned."""
        return self.log_temperature.exp()

    def forward(self, batch: PooledBatch) -> Tensor:
        """The loss of each target: the mean over samples that have a neighbor."""
        neighbors, allowed = batch.candidates.neighbors, batch.candidates.allowed
        return contrastive_loss(
            batch.everything, neighbors, self.temperature(), batch.normalize, allowed, per_head=True
        )

    def entering(self, batch: PooledBatch) -> Tensor:
        """Samples with a neighbor."""
        return batch.candidates.known

    def comparable(self, batch: PooledBatch) -> Tensor:
        """All that are valid enter, which each have a gradient."""
        enters = self.entering(batch)
        return enters.any() & (enters | ~batch.valid).all()

    def values(self) -> dict[str, float]:
        """The temperature."""
        return {"hera_temperature": math.exp(self.log_temperature.item())}
