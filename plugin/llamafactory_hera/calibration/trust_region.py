"""How far an update may go (RAH-LoRA, eq. 14 and 15)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """A step that was tried, and the divergence that it caused, in nats."""

    alpha: float
    kl: float


def divergence(base: Tensor, changed: Tensor) -> Tensor:
    """KL(p || p') of next-token distributions (the expectation's argument in eq. 15).

    Args:
        base: Logits of the model as it is, ``[..., V]``.
        changed: Logits of the changed model, ``[..., V]``.

    Returns:
        ``[...]`` in fp32, in nats.
    """
    log_p = torch.log_softmax(base.float(), dim=-1)
    log_q = torch.log_softmax(changed.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def largest_step(
    kl: Callable[[float], float], alpha_max: float, delta: float, halvings: int
) -> tuple[float, list[Step]]:
    """The first of ``alpha_max, alpha_max / 2, ...`` with a divergence of ``delta`` or less (eq. 15, text under it).

    Args:
        kl: Mean divergence of a step.
        alpha_max: Where to start.
        delta: The bound.
        halvings: After how many the update is given up.

    Returns:
        The step, 0 where none holds, and all that were tried.

    Raises:
        ValueError: A divergence is not finite.
    """
    tried: list[Step] = []
    for halving in range(halvings + 1):
        alpha = alpha_max / 2**halving
        value = kl(alpha)
        check_finite(value)
        tried.append(Step(alpha, value))
        if value <= delta:
            return alpha, tried
    return 0.0, tried


def roll_back(kl: Callable[[int], float], n: int, delta: float) -> tuple[int, list[Step]]:
    """How many of ``n`` updates, the first ones, stay together within ``delta``; the last are given up one by one.

    Args:
        kl: Mean divergence of the first so many updates together.
        n: Number of updates.
        delta: The bound.

    Returns:
        How many stay, and what was measured on the way, ``alpha`` being the number of updates.

    Raises:
        ValueError: A divergence is not finite.
    """
    measured: list[Step] = []
    while n > 0:
        value = kl(n)
        check_finite(value)
        measured.append(Step(n, value))
        if value <= delta:
            break
        n -= 1
    return n, measured


def check_finite(value: float) -> None:
    """Refuses a divergence that is NaN or infinite.

    Raises:
        ValueError: It is.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"model_name_or_path: the KL divergence between the model and its changed copy is {value}: its logits "
            "hold NaN or infinity, or its activations do not fit fp16. Use bf16 or fp32, or another checkpoint."
        )
