"""HeRA's objective, which pulls a sample's teacher neighbors close in the student's space (paper, eq. 4 and 8)."""

import math

import torch
from torch import Tensor, nn

from ..alignment.losses import contrastive_loss
from .base import Objective, Options, PooledBatch, register


@register("contrastive")
class Contrastive(Objective):
    """InfoNCE with several positives and a temperature whose logarithm is learned (paper, sec. 3)."""

    reads = (*Objective.reads, "hera_temperature", "hera_fixed_temperature", "hera_memory", "hera_accumulate")
    least_samples = 3  # each sample then has two candidates; with only one, the loss is log 1 = 0
    logged = ("hera_temperature",)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        log_temperature = torch.tensor(math.log(options.config.temperature))
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=not options.config.fixed_temperature)

    def forward(self, batch: PooledBatch) -> Tensor:
        """Computes the loss of each target, averaged over the samples that have a neighbor."""
        neighbors, allowed = batch.candidates.neighbors, batch.candidates.allowed
        temperature = self.log_temperature.exp()
        return contrastive_loss(batch.z_all, neighbors, temperature, batch.normalize, allowed, per_head=True)

    def entering(self, batch: PooledBatch) -> Tensor:
        """Returns which samples have a neighbor and thus enter the loss."""
        return batch.candidates.known

    def gradient_expected(self, batch: PooledBatch) -> Tensor:
        """Expects gradients if every valid sample has a neighbor."""
        enters = self.entering(batch)
        return enters.any() & (enters | ~batch.valid).all()

    def values(self) -> dict[str, float]:
        """Returns the temperature."""
        return {"hera_temperature": math.exp(self.log_temperature.item())}
