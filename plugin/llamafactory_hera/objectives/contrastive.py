"""HeRA's objective, which pulls a sample's teacher neighbors close in the student's space (paper, eq. 4 and 8)."""

import math

import torch
from torch import Tensor, nn

from ..alignment.losses import sample_losses
from ..alignment.neighbors import neighbor_mask, similarity
from ..distributed import gather_rows
from .base import Objective, Options, PooledBatch, register


@register("contrastive")
class Contrastive(Objective):
    """InfoNCE with several positives and a temperature whose logarithm is learned (paper, sec. 3)."""

    reads = (*Objective.reads, "hera_temperature", "hera_memory", "hera_accumulate")
    least_samples = 3  # each sample then has two candidates; with only one, the loss is log 1 = 0
    logged = ("hera_temperature",)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(options.config.temperature)))

    def forward(self, batch: PooledBatch) -> Tensor:
        """Computes the loss of each target and of each sample of this process, 0 for a sample without a neighbor.

        The candidates carry no gradient, so the backward pass needs no communication. Instead, this method adds to
        each sample the gradient from the losses of all samples compared with it, on any process. This is possible
        because similarities are symmetric, the samples of a pair are candidates of each other, and every process
        sends the sums and the neighbors of its samples.
        """
        found, temperature, n_all = batch.candidates, self.log_temperature.exp(), batch.z.shape[1]
        similarities = similarity(batch.own, batch.z_all.detach(), batch.normalize)
        losses, logits, sums = sample_losses(similarities, found.neighbors, temperature, found.allowed)
        sent = torch.cat([sums.detach().T, found.neighbors.to(sums)], dim=1)
        sums, neighbors = gather_rows(sent).split([len(sums), sent.shape[1] - len(sums)], dim=1)
        with torch.no_grad():  # derivatives of all samples' losses with respect to their similarity to each own sample
            place = neighbors.long() - found.first
            place = place.where((place >= 0) & (place < losses.shape[-1]), -1)
            counts = (neighbors >= 0).sum(dim=-1)
            positive = neighbor_mask(place, losses.shape[-1]).T / counts.clamp(min=1)
            slope = (logits[..., :n_all] - sums.T.unsqueeze(1)).exp_().sub_(positive)
            slope.masked_fill_(counts == 0, 0.0).div_(temperature)
        received = (slope * similarities[..., :n_all]).sum(dim=-1)
        return losses + received - received.detach()

    def entering(self, batch: PooledBatch) -> Tensor:
        """Returns which samples of this process have a neighbor and thus enter the loss."""
        return batch.candidates.known

    def gradient_expected(self, batch: PooledBatch) -> Tensor:
        """Expects gradients if every valid sample of this process has a neighbor."""
        enters = self.entering(batch)
        return enters.any() & (enters | ~batch.valid[batch.rows]).all()

    def values(self) -> dict[str, float]:
        """Returns the temperature."""
        return {"hera_temperature": math.exp(self.log_temperature.item())}
