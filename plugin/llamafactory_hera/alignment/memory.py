"""Cross-batch memory: the last M (representation, teacher vector) pairs as further candidates of the contrastive loss.

Small global batches hold too few candidates by themselves. Remembering recent detached pairs follows cross-batch
memory for embedding learning (Wang et al., CVPR 2020, arXiv 1912.06798). It is this project's addition, off by
default.
"""

import torch
from torch import Tensor


class CrossBatchMemory:
    """A first-in-first-out queue of detached pairs, equal on every rank because every rank adds the gathered batch.

    Args:
        size: How many pairs are kept; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.representations: Tensor | None = None  # [n_heads, m, D]
        self.teacher: Tensor | None = None  # [m, D_teacher]

    def __len__(self) -> int:
        return 0 if self.teacher is None else self.teacher.shape[0]

    def append(self, representations: Tensor, teacher: Tensor) -> None:
        """Adds pairs, dropping the oldest beyond ``size``.

        Args:
            representations: ``[n_heads, n, D]``.
            teacher: ``[n, D_teacher]``.
        """
        if self.size == 0 or teacher.shape[0] == 0:
            return
        representations, teacher = representations.detach(), teacher.detach()
        if self.representations is not None and self.teacher is not None:
            representations = torch.cat([self.representations.to(representations), representations], dim=1)
            teacher = torch.cat([self.teacher.to(teacher), teacher])
        # clone: a view would keep the whole batch alive
        self.representations = representations[:, -self.size :].clone()
        self.teacher = teacher[-self.size :].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The queue's tensors, empty when nothing is held."""
        if self.representations is None or self.teacher is None:
            return {}
        return {"memory.representations": self.representations, "memory.teacher": self.teacher}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave, cut to this queue's size."""
        self.representations = self.teacher = None
        if self.size and "memory.teacher" in state:
            self.append(state["memory.representations"], state["memory.teacher"])
