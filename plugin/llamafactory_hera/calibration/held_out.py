"""The model on samples that profiling did not see, and how far a change takes it (the batch B of eq. 15)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..selection.batches import plan_batches, run_batches
from ..selection.source import Collate, Features
from .forward import Forward
from .trust_region import check_finite, divergence


class HeldOut:
    """Held-out samples with the logits of the unchanged model, which wait in the CPU's memory.

    Args:
        forward: Around the model as it is.
        features: The samples.
        collate: From samples to a batch.
        batch_size: Samples in a pass; halved when memory runs out.

    Raises:
        ValueError: The logits are not finite.
    """

    def __init__(self, forward: Forward, features: Sequence[Features], collate: Collate, batch_size: int) -> None:
        self._forward = forward
        self._batches: list[tuple[dict[str, Any], Tensor]] = []
        batches = plan_batches([len(sample["input_ids"]) for sample in features], batch_size)
        with torch.no_grad():

            def run(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
                return batch, forward.logits(batch)[0].cpu()

            self._batches = [result for _, result in run_batches(batches, features, collate, run)]
        check_finite(self.kl())

    @torch.no_grad()
    def kl(self) -> float:
        """Mean over samples of the mean divergence over their tokens, of the model as it is now from what it was."""
        values: list[Tensor] = []
        for batch, before in self._batches:
            now, counted = self._forward.logits(batch)
            # one sample at a time: two distributions over the vocabulary in single precision are large
            for row in range(len(now)):
                kept = counted[row]
                earlier = before[row][kept.cpu()].to(now.device)
                values.append(divergence(earlier, now[row][kept]).double().mean())
        return torch.stack(values).mean().item()
