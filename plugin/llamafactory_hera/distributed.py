"""The processes of a launch, and gathering their rows into the global batch with gradient."""

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class _AllGather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather has a wrong backward on gloo for non-contiguous gradients, so the
    # backward is written out: every rank computes the loss of the whole batch, hence the sum over ranks of the
    # gradient of this rank's slice, which the engine's averaging over ranks turns into the gradient of that loss.

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        world_size = dist.get_world_size()
        gathered = rows.new_empty(world_size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        ctx.n_rows = rows.shape[0]
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # a copy: autograd may hand the same tensor to other nodes, and the reduction works in place
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.n_rows
        return gradient[start : start + ctx.n_rows]


def world_size() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a launcher."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        dist.barrier()


def end_launch() -> None:
    """Ends the default group, if there is one: a process that ends with it may abort (PyTorch's issue 190489).

    gloo's threads let go of an operation's tensors after it has returned, and abort if Python is gone by then.
    DistributedDataParallel keeps the threads past the group's end, so that nothing but time can be given to them.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)


def on_first(compute: Callable[[], Result]) -> Result:
    """What the first process computes, on every process; if it refuses its input, every process does.

    Raises:
        ValueError: As ``compute``.
    """
    shared: list[Any] = [None]
    if rank() == 0:
        try:
            shared[0] = compute()
        except ValueError as error:
            shared[0] = error
    if world_size() > 1:
        dist.broadcast_object_list(shared, src=0)
    if isinstance(shared[0], ValueError):
        raise shared[0]
    return shared[0]


def of_all(value: Result) -> list[Result]:
    """What each process gives, in rank order, on every process."""
    held: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(held, value)
    return held


def common_row_count(n_rows: int, device: torch.device) -> int:
    """The largest ``n_rows`` over all ranks: what each rank pads to before :func:`gather_rows`."""
    if world_size() == 1:
        return n_rows
    count = torch.tensor(n_rows, device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates ``rows`` of all ranks, in rank order.

    The backward sums the gradients that the ranks hold for a slice. When each rank computes the full loss over the
    gathered rows and the engine averages gradients over ranks (DDP, ZeRO, FSDP), each parameter gets the gradient of
    one process with the whole batch; no factor is needed.

    Args:
        rows: ``[B, ...]``, of the same shape on every rank.

    Returns:
        ``[world_size * B, ...]``; ``rows`` itself with one process.
    """
    return rows if world_size() == 1 else _AllGather.apply(rows)


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each value over the ranks that know it; left out where none does.

    Args:
        values: NaN where unknown; every rank has the same names, so that all take part in one reduction.
        device: Of the process group's tensors.
    """
    if world_size() == 1:
        return {name: value for name, value in values.items() if not math.isnan(value)}
    names = sorted(values)
    mine = torch.tensor([values[name] for name in names], dtype=torch.float32, device=device)
    known = ~mine.isnan()
    table = torch.stack([torch.where(known, mine, 0.0), known.float()])
    dist.all_reduce(table)
    sums, numbers = table.tolist()
    return {name: total / n for name, total, n in zip(names, sums, numbers, strict=True) if n}
