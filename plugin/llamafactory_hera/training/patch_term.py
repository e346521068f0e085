"""The term of one step over visual tokens: each process sees its own samples, and only their number is shared."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..alignment.gather import world_size
from ..objectives.base import Objective, PatchBatch
from .term import TermOutput, left_out


class PatchTerm:
    """Computes a term that is a mean over samples, whose vectors are too many to be gathered.

    The loss of a process is scaled by the number of processes over the samples of all of them, so that the engine's
    averaging of gradients gives the gradient of the mean over the global batch. The objective's own parameters are in
    no engine's hands: their gradients must be averaged over the processes.

    Every rank must call it in every step, also when none of its samples has an image.

    Args:
        objective: Gives the loss of each site and sample; of view ``patches``.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, representations: Tensor, teacher: Tensor, valid: Tensor) -> TermOutput:
        """Computes the term; its ``loss`` is this rank's part, the mean over ranks is the term.

        Args:
            representations: ``[n_sites, B, T, D]`` of this rank, with gradient.
            teacher: ``[B, h, w, D_teacher]`` of this rank; anything where not valid.
            valid: Boolean ``[B]``: the sample has an image.
        """
        # not a product with the mask: a non-finite value outside it must not spread
        z = torch.where(valid.view(1, -1, 1, 1), representations.float(), 0.0)
        batch = PatchBatch(z, torch.where(valid.view(-1, 1, 1, 1), teacher.float(), 0.0), valid)
        of_sites = torch.where(valid, self.objective(batch), 0.0).sum(dim=1)
        finite, teacher_finite = z.isfinite().flatten(1).all(dim=1), batch.teacher.isfinite().all()
        sound = finite & (of_sites.isfinite() | ~teacher_finite)  # a teacher's NaN is no site's
        facts = torch.cat([valid.sum().view(1), ~teacher_finite.view(1), ~sound]).float()
        if world_size() > 1:
            dist.all_reduce(facts)
        n_samples, broken = int(facts[0]), facts[2:] > 0
        if facts[1:].any():
            return left_out(broken, n_samples)
        unknown = torch.full_like(of_sites.detach(), math.nan)
        loss = of_sites.mean() * world_size() / max(n_samples, 1)
        return TermOutput(loss, unknown, unknown[0], n_samples, 0, comparable=n_samples > 0)
