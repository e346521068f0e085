"""Gathering rows of all ranks into the global batch, with gradient."""

import torch
import torch.distributed as dist
from torch import Tensor


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
