"""A memory of the latest pairs of representation and teacher feature, which serve as additional candidates.

A small global batch has too few candidates. Remembering recent detached pairs follows cross-batch memory for embedding
learning (Wang et al., CVPR 2020, arXiv 1912.06798). HeRA's paper has no such memory; it is this project's addition.
"""

import torch
from torch import Tensor


class CrossBatchMemory:
    """A first-in-first-out queue of detached pairs, equal on all processes because each adds the gathered batch.

    The queue has its full size from the first batch on; empty places come first and are zero. The number of filled
    places is kept on the device, so the CPU never waits for it.

    Args:
        size: The number of places. If None, :meth:`settle` chooses it.
        needed: The number of candidates that each sample then has, in the batch and the memory together.
    """

    def __init__(self, size: int | None, needed: int = 0) -> None:
        self._given, self._needed = size, needed
        self.clear()

    def clear(self) -> None:
        """Forgets all pairs, and the size if :meth:`settle` chose it."""
        self.size = self._given
        #: Representations ``[n_targets, size, D]``, teacher ``[size, D_teacher]``, and filled places, bool ``[size]``.
        self.pairs: tuple[Tensor, Tensor, Tensor] | None = None

    def settle(self, n_compared: int) -> None:
        """Chooses the size for ``n_compared`` samples that are compared at once, unless the size is known."""
        if self.size is None:
            self.size = max(0, self._needed - (n_compared - 1))

    def append(self, representations: Tensor, teacher: Tensor, valid: Tensor) -> None:
        """Adds the valid pairs and drops the oldest; shapes ``[n_targets, n, D]``, ``[n, D_teacher]`` and ``[n]``."""
        if not self.size:
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
        """Returns the stored pairs as tensors, with the size of the queue; empty if no pair is stored."""
        if self.pairs is None or not self.pairs[2].any():
            return {}
        z, teacher, filled = self.pairs
        size = torch.tensor(self.size)
        return {"memory.representations": z[:, filled], "memory.teacher": teacher[filled], "memory.size": size}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the result of :meth:`state_dict`, and drops the oldest pairs that exceed the size of this queue.

        A queue whose size is not given gets the stored size.
        """
        self.clear()
        if "memory.teacher" in state:
            teacher = state["memory.teacher"]
            self.size = int(state["memory.size"]) if self.size is None else self.size
            self.append(state["memory.representations"], teacher, torch.ones(len(teacher), dtype=torch.bool))
