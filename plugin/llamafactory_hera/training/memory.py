"""Cross-batch memory: the last M pairs of representation and teacher feature as additional candidates.

A small global batch holds too few candidates. Remembering recent detached pairs follows cross-batch memory for
embedding learning (Wang et al., CVPR 2020, arXiv 1912.06798). It is this project's addition to the paper.
"""

import torch
from torch import Tensor


class CrossBatchMemory:
    """A first-in-first-out queue of detached pairs; all processes hold the same, as each adds the gathered batch.

    The queue has its full size from the first batch on, with empty places first and zero. Only the device knows how
    many are filled, so the host never waits to learn it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        #: Representations ``[n_targets, size, D]``, teacher ``[size, D_teacher]``, and which are filled, ``[size]``.
        self.pairs: tuple[Tensor, Tensor, Tensor] | None = None

    def append(self, representations: Tensor, teacher: Tensor, valid: Tensor) -> None:
        """Adds the ``valid [n]`` pairs of ``[n_targets, n, D]`` and ``[n, D_teacher]``, and drops the oldest."""
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
        # a stable sort puts empty places first and keeps the order of the others
        last = filled.byte().argsort(stable=True)[-self.size :]
        filled = filled[last]
        rows = filled.unsqueeze(1)
        # torch.where instead of a product with the mask, which would keep a non-finite value
        self.pairs = torch.where(rows, z[:, last], 0.0), torch.where(rows, teacher[last], 0.0), filled

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the pairs it holds; empty if there are none."""
        if self.pairs is None or not self.pairs[2].any():
            return {}
        z, teacher, filled = self.pairs
        return {"memory.representations": z[:, filled], "memory.teacher": teacher[filled]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the result of :meth:`state_dict`, cut to the size of this queue."""
        self.pairs = None
        if "memory.teacher" in state:
            teacher = state["memory.teacher"]
            self.append(state["memory.representations"], teacher, torch.ones(len(teacher), dtype=torch.bool))
