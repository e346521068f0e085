"""How much a head's output decides what the model is sure of: CAF (RAH-LoRA, eq. 5)."""

import torch
from torch import Tensor


def margin_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """The label-free margin loss of each sample, ``-1/T sum_t log(p_t1 / p_t2)`` (text under eq. 5).

    The log ratio of two probabilities of one softmax is the difference of their logits, so no softmax is computed.

    Args:
        logits: ``[B, T, V]``.
        positions: Boolean ``[B, T]``, the tokens ``t``; at least one in each row.

    Returns:
        ``[B]`` in fp32; 0 or less.
    """
    top = torch.topk(logits, 2, dim=-1).values.float()
    margin = (top[..., 0] - top[..., 1]).masked_fill(~positions, 0)
    return -margin.sum(dim=1) / positions.sum(dim=1)


def causal_attention_flow(gradients: Tensor, curvature_weight: float) -> Tensor:
    """CAF (eq. 5): the mean gradient of the loss with respect to a head's gate, plus the mean of its square.

    As in the paper the first term keeps its sign.

    Args:
        gradients: ``dL/dgamma`` at ``gamma = 1`` of each probe sample, ``[N, L, H]``.
        curvature_weight: The paper's lambda.

    Returns:
        ``[L, H]`` in fp64.
    """
    values = gradients.double()
    return values.mean(dim=0) + curvature_weight * values.square().mean(dim=0)
