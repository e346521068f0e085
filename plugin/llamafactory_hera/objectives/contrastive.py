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
        """Computes the losses ``[n_targets, n]`` of this process's samples; 0 for a sample without a neighbor.

        A sample ``i`` is also a candidate in the losses of other samples ``j``, on any process. By eq. 4,

            dL_j / ds_ji = (softmax(s_j / temperature)_i - [i in P_j] / |P_j|) / temperature

        The process of sample ``i`` computes these derivatives, and adds them to the gradient of ``i``. It can, because
        ``s_ij = s_ji``, candidates are mutual, and every process sends its samples' neighbors and the log-sum-exp of
        their logits. So the candidates carry no gradient, and the backward pass needs no communication.
        """
        candidates, temperature, n_all = batch.candidates, self.log_temperature.exp(), batch.z.shape[1]
        similarities = similarity(batch.own, batch.z_all.detach(), batch.normalize)
        losses, logits, log_sums = sample_losses(similarities, candidates.neighbors, temperature, candidates.allowed)
        sent = torch.cat([log_sums.detach().T, candidates.neighbors.to(log_sums)], dim=1)
        log_sums, neighbors = gather_rows(sent).split([len(log_sums), sent.shape[1] - len(log_sums)], dim=1)
        with torch.no_grad():
            index = neighbors.long() - candidates.first  # in this process's samples; -1 for samples of other processes
            index = index.where((index >= 0) & (index < losses.shape[-1]), -1)
            counts = (neighbors >= 0).sum(dim=-1)
            wanted = neighbor_mask(index, losses.shape[-1]).T / counts.clamp(min=1)
            derivatives = (logits[..., :n_all] - log_sums.T.unsqueeze(1)).exp_().sub_(wanted)
            derivatives.masked_fill_(counts == 0, 0.0).div_(temperature)
        from_others = (derivatives * similarities[..., :n_all]).sum(dim=-1)
        return losses + from_others - from_others.detach()  # adds a gradient, but no value

    def entering(self, batch: PooledBatch) -> Tensor:
        """Marks this process's samples that have a neighbor and thus enter the loss."""
        return batch.candidates.has_neighbor

    def gradient_expected(self, batch: PooledBatch) -> Tensor:
        """Returns True if this process has valid samples, and each of them has a neighbor."""
        enters = self.entering(batch)
        return enters.any() & (enters | ~batch.valid[batch.rows]).all()

    def values(self) -> dict[str, float]:
        """Returns the temperature."""
        return {"hera_temperature": math.exp(self.log_temperature.item())}
