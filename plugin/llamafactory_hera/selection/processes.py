"""The processes of a launch, as selection needs them."""

from typing import Any

import torch.distributed as dist


def rank() -> int:
    """This process's number; 0 without a launcher."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def from_first(value: Any) -> Any:
    """The first process's value, on every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
