"""Which samples run together, and running them within the memory that there is."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from .source import Collate, Features

logger = logging.getLogger(__name__)

# A killed run loses at most one block on each process; blocks are what processes share out.
_BLOCK_SAMPLES = 32


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass, and the block that they belong to."""

    block: int
    rows: tuple[int, ...]


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[Batch]:
    """Batches of samples of like length, longest first: little padding, and memory runs out at once or never.

    The plan does not depend on the number of processes, so that each computes exactly what one process would.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    per_block = max(1, _BLOCK_SAMPLES // batch_size)
    return [
        Batch(number // per_block, tuple(order[start : start + batch_size]))
        for number, start in enumerate(range(0, len(order), batch_size))
    ]


def run_batches(
    batches: list[Batch],
    features: Sequence[Features],
    collate: Collate,
    run: Callable[[dict[str, Any]], Any],
    num_workers: int = 0,
) -> Iterator[tuple[Batch, Any]]:
    """Collates and runs batches in order; when memory runs out, halves them from there on and says so.

    Args:
        batches: What to run.
        features: All samples.
        collate: From samples to a batch; gets copies, because the host's takes samples apart.
        run: From a batch to its result.
        num_workers: Processes that collate.

    Yields:
        Each batch as it was run, whole or a part, with its result.

    Raises:
        torch.OutOfMemoryError: Not even one sample fits.
    """
    pending = list(batches)
    while pending:
        loader = DataLoader(
            _Collated(pending, features, collate), batch_size=None, shuffle=False, num_workers=num_workers
        )
        for done, inputs in enumerate(loader):
            try:
                result = run(inputs)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(pending[done].rows) == 1:
                    raise
                result = None
            if result is None:  # outside of the handler, where the failed pass's tensors are let go of
                limit = len(pending[done].rows) // 2
                pending = [part for batch in pending[done:] for part in _split(batch, limit)]
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                logger.warning("Out of memory: going on with batches of %d samples.", limit)
                break
            yield pending[done], result
        else:
            return


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory ran out; on the CPU it has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _split(batch: Batch, limit: int) -> list[Batch]:
    return [Batch(batch.block, batch.rows[start : start + limit]) for start in range(0, len(batch.rows), limit)]


class _Collated(torch.utils.data.Dataset):
    def __init__(self, batches: list[Batch], features: Sequence[Features], collate: Collate) -> None:
        self.batches, self.features, self.collate = batches, features, collate

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.collate([dict(self.features[row]) for row in self.batches[index].rows])
