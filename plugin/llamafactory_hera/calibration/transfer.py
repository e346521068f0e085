"""From anchors to an update of few directions (RAH-LoRA, eq. 12 and 13)."""

import torch
from torch import Tensor


def trimmed_mean(stack: Tensor, trim: float) -> Tensor:
    """Element-wise mean without the ``floor(trim * k)`` lowest and as many highest values (eq. 12).

    With the paper's three anchors and 0.1 nothing is cut off, and this is the mean.

    Args:
        stack: The anchors' slices, ``[k, ...]``.
        trim: Fraction at either end, below 0.5.

    Returns:
        ``[...]`` in fp32.
    """
    k = stack.shape[0]
    cut = int(trim * k)
    return stack.float().sort(dim=0).values[cut : k - cut].mean(dim=0)


def low_rank(difference: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The largest singular directions of a difference as a product (eq. 13), singular values shared by both factors.

    Args:
        difference: ``W_RAH - W``, ``[m, n]``.
        rank: How many directions are kept; None keeps all.

    Returns:
        Left ``[m, r]`` and right ``[r, n]`` in fp32. Directions without weight are dropped, so ``r`` is 0 where there
        is no difference.
    """
    u, sigma, v = torch.linalg.svd(difference.float(), full_matrices=False)
    noise = torch.finfo(sigma.dtype).eps * max(difference.shape) * sigma[:1]
    kept = int((sigma > noise).sum())
    r = kept if rank is None else min(rank, kept)
    root = sigma[:r].sqrt()
    return u[:, :r] * root, root[:, None] * v[:r]
