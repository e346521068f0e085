"""The processes of a launch, as selection needs them."""

import torch.distributed as dist


def rank() -> int:
    """This process's number; 0 without a launcher."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
