"""A memory of the latest (representation, teacher feature) pairs, which serve as additional candidates.

It follows cross-batch memory for embedding learning (Wang et al., CVPR 2020, arXiv 1912.06798). HeRA's paper has no
such memory; it is this project's addition for small global batches.
"""

import torch
from torch import Tensor


class CrossBatchMemory:
    """A first-in-first-out queue of detached pairs, equal on all processes because they all add the gathered batch.

    It always has ``size`` slots, empty slots first, so the CPU never waits to learn how many are filled. Without a
    given size, ``settle`` chooses the smallest size that gives every sample the ``needed`` candidates.
    """

    def __init__(self, size: int | None, needed: int = 0) -> None:
        self._given, self._needed = size, needed
        self.clear()

    def clear(self) -> None:
        """Forgets all pairs, and the size if ``settle`` chose it."""
        self.size = self._given
        #: Representations ``[n_targets, size, D]``, teacher features ``[size, D_teacher]``, a boolean mask of filled
        #: slots ``[size]``, and the ids of their images ``[size, 2]``.
        self.pairs: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def settle(self, n_compared: int) -> None:
        """Chooses the size, if it is not yet set, for ``n_compared`` samples that are compared at once."""
        if self.size is None:
            self.size = max(0, self._needed - (n_compared - 1))

    def append(self, representations: Tensor, teacher: Tensor, valid: Tensor, image_ids: Tensor | None = None) -> None:
        """Adds the valid pairs of n samples and drops the oldest; for the shapes see ``pairs``."""
        if not self.size:
            return
        z, teacher = representations.detach(), teacher.detach()
        image_ids = valid.new_zeros(len(valid), 2, dtype=torch.float32) if image_ids is None else image_ids
        old_z, old_teacher, filled, old_image_ids = self.pairs or (
            z.new_zeros(len(z), self.size, z.shape[-1]),
            teacher.new_zeros(self.size, teacher.shape[-1]),
            valid.new_zeros(self.size),
            image_ids.new_zeros(self.size, 2),
        )
        z, teacher = torch.cat([old_z.to(z), z], dim=1), torch.cat([old_teacher.to(teacher), teacher])
        filled, image_ids = torch.cat([filled.to(valid), valid]), torch.cat([old_image_ids.to(image_ids), image_ids])
        # a stable sort puts empty slots first and keeps the order of the others
        last = filled.byte().argsort(stable=True)[-self.size :]
        filled = filled[last]
        rows = filled.unsqueeze(1)
        # torch.where instead of a product with the mask, which would keep a non-finite value
        self.pairs = torch.where(rows, z[:, last], 0.0), torch.where(rows, teacher[last], 0.0), filled, image_ids[last]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the stored pairs as tensors, with the size of the queue; empty if no pair is stored."""
        if self.pairs is None or not self.pairs[2].any():
            return {}
        z, teacher, filled, image_ids = self.pairs
        kept = {"representations": z[:, filled], "teacher": teacher[filled], "image_ids": image_ids[filled]}
        return {f"memory.{name}": each for name, each in {**kept, "size": torch.tensor(self.size)}.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the result of ``state_dict``; a smaller given size drops the oldest pairs."""
        self.clear()
        if "memory.teacher" in state:
            teacher, image_ids = state["memory.teacher"], state["memory.image_ids"]
            self.size = int(state["memory.size"]) if self.size is None else self.size
            filled = torch.ones(len(teacher), dtype=torch.bool)
            self.append(state["memory.representations"], teacher, filled, image_ids)
