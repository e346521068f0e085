"""Cross-batch memory: the last M (representation, teacher vector) pairs as further candidates of the contrastive loss.

Small global batches hold too few candidates by themselves. Remembering recent detached pairs follows cross-batch
memory for embedding learning (Wang et al., CVPR 2020, arXiv 1912.06798). It is this project's addition, off by
default.
"""

import torch
from torch import Tensor


class CrossBatchMemory:
    """A first-in-first-out queue of detached pairs, equal on every rank because every rank adds the gathered batch.

    It has all its places from the first batch on, the empty ones in front and zero: how many are filled only the
    device knows, and the host never waits to be told.

    Args:
        size: How many pairs are kept; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        #: Representations ``[n_heads, size, D]``, teacher ``[size, D_teacher]``, which are filled, boolean ``[size]``.
        self.pairs: tuple[Tensor, Tensor, Tensor] | None = None

    def append(self, representations: Tensor, teacher: Tensor, valid: Tensor) -> None:
        """Adds the pairs that are valid, dropping the oldest beyond ``size``.

        Args:
            representations: ``[n_heads, n, D]``.
            teacher: ``[n, D_teacher]``.
            valid: Boolean ``[n]``; rows of others may hold anything.
        """
        if self.size == 0:
            return
        z, teacher = representations.detach(), teacher.detach()
        old_z, old_teacher, filled = self.pairs or (
            z.new_zeros(len(z), self.size, z.shape[-1]),
            teacher.new_zeros(self.size, teacher.shape[-1]),
            valid.new_zeros(self.size),
        )
        z, teacher = torch.cat([old_z.to(z), z], dim=1), torch.cat([old_teacher.to(teacher), teacher])
        filled = torch.cat([filled.to(valid), valid])
        # a stable order: what is empty comes first, the rest as it came
        last = filled.byte().argsort(stable=True)[-self.size :]
        filled = filled[last]
        rows = filled.unsqueeze(1)  # not a product with the mask: a value that is not finite would stay
        self.pairs = torch.where(rows, z[:, last], 0.0), torch.where(rows, teacher[last], 0.0), filled

    def state_dict(self) -> dict[str, Tensor]:
        """The pairs that are held; empty when there are none."""
        if self.pairs is None or not self.pairs[2].any():
            return {}
        z, teacher, filled = self.pairs
        return {"memory.representations": z[:, filled], "memory.teacher": teacher[filled]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave, cut to this queue's size."""
        self.pairs = None
        if "memory.teacher" in state:
            teacher = state["memory.teacher"]
            self.append(state["memory.representations"], teacher, torch.ones(len(teacher), dtype=torch.bool))
