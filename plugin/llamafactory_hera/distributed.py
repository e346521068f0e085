"""Communication between the processes of a launch, including a gather of samples that keeps gradients."""

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class _AllGather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather is not used, because on gloo its backward is wrong for non-contiguous
    # gradients.

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        world_size = dist.get_world_size()
        gathered = rows.new_empty(world_size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        ctx.n_rows = rows.shape[0]
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(ctx.n_rows, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


def world_size() -> int:
    """Returns the number of processes in the default group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the rank of this process; 0 without a group."""
    return dist.get_rank() if world_size() > 1 else 0


def end_launch() -> None:
    """Destroys the default group, if any, before the process ends.

    Otherwise the process may abort (https://github.com/pytorch/pytorch/issues/190489): gloo's threads release tensors
    after their operation has returned, even after Python has ended. DDP keeps these threads alive for another moment.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)


def on_first(compute: Callable[[], Result]) -> Result:
    """Calls ``compute`` on the first process; all processes return its result or raise its ``ValueError``."""
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


def gather_objects(value: Result) -> list[Result]:
    """Returns the values of all processes, in rank order, on every process."""
    gathered: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def common_row_count(n_rows: int, device: torch.device) -> int:
    """Returns the largest ``n_rows`` of any process; each process pads to this number before ``gather_rows``."""
    count = torch.tensor(n_rows, device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows (samples) of all processes in rank order.

    Every process passes the same shape ``[B, ...]``. The backward pass sums the gradients of each process's rows over
    all processes. If each process computes its part of a mean over all rows, times the number of processes, and the
    engine averages gradients (DDP, ZeRO, FSDP), each parameter's gradient is the same as with all rows on one process.
    """
    return rows if world_size() == 1 else _AllGather.apply(rows)


def sum_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """Sums each tensor over all processes in one fp32 collective; a boolean is true if it is true on any process."""
    if world_size() == 1:
        return values
    flat = torch.cat([value.detach().flatten().float() for value in values])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return tuple(part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True))


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Averages each value over the processes where it is not NaN; all processes pass the same names."""
    if world_size() == 1:  # no copy to the device, and no rounding
        return {name: value for name, value in values.items() if not math.isnan(value)}
    names = sorted(values)
    own = torch.tensor([values[name] for name in names], dtype=torch.float32, device=device)
    sums, counts = sum_over_ranks(own.where(~own.isnan(), 0.0), (~own.isnan()).float())
    return {name: total / n for name, total, n in zip(names, sums.tolist(), counts.tolist(), strict=True) if n}
