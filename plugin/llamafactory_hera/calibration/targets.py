"""Which heads are calibrated (RAH-LoRA, eq. 6 and 7, and the paper's ablations of that choice)."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..heads.targets import Target
from .settings import TargetRule


def weak_heads(saliency: Tensor, percentile: float) -> Tensor:
    """Heads below a percentile of I-SAL in their layer (eq. 6).

    Args:
        saliency: Standardised, ``[L, H]``.
        percentile: From 0 to 100, linear between heads.

    Returns:
        Boolean ``[L, H]``.
    """
    return saliency < _percentile(saliency, percentile)


def influential_heads(influence: Tensor, percentile: float) -> Tensor:
    """Heads above a percentile of CAF in their layer (the condition of eq. 7).

    Args:
        influence: CAF, ``[L, H]``.
        percentile: From 0 to 100, linear between heads.

    Returns:
        Boolean ``[L, H]``.
    """
    return influence > _percentile(influence, percentile)


def choose_targets(
    saliency: Tensor,
    influence: Tensor,
    layers: Sequence[int],
    p_isal: float,
    p_caf: float,
    rule: TargetRule = "paper",
    seed: int = 0,
) -> list[Target]:
    """The targets (eq. 6 and 7), highest CAF first.

    ``no_caf`` leaves the second condition out. ``inverse`` takes heads above the mirrored percentile of I-SAL.
    ``random`` draws, in each layer, as many heads as ``paper`` would take.

    Args:
        saliency: Standardised I-SAL, ``[L, H]``.
        influence: CAF, ``[L, H]``.
        layers: Layers that may be calibrated.
        p_isal: Percentile of I-SAL.
        p_caf: Percentile of CAF.
        rule: The paper's rule or one of its ablations.
        seed: Of the random draw.
    """
    weak, influential = weak_heads(saliency, p_isal), influential_heads(influence, p_caf)
    if rule == "inverse":
        weak = weak_heads(-saliency, p_isal)
    chosen = weak if rule == "no_caf" else weak & influential
    draw = random.Random(seed)
    heads: list[Target] = []
    for layer in layers:
        found = chosen[layer].nonzero().flatten().tolist()
        if rule == "random":
            found = draw.sample(range(saliency.shape[1]), len(found))
        heads += [Target(layer, head) for head in found]
    return sorted(heads, key=lambda head: (-influence[head].item(), head))


def _percentile(values: Tensor, percentile: float) -> Tensor:
    return torch.quantile(values, percentile / 100, dim=1, keepdim=True)
