"""The losses of HARC: hinges on cosines, and the KL divergence from the base model, all in fp32."""

import torch
from torch import Tensor
from torch.nn import functional

from llamafactory_hera.distributed import sum_over_ranks, world_size


def cosines(rows: Tensor, directions: Tensor) -> Tensor:
    """Returns the cosines ``[S, B]`` of rows ``[S, B, D]`` with the direction ``[S, D]`` of their layer."""
    return functional.cosine_similarity(rows.float(), directions.float().unsqueeze(1), dim=-1)


def coupling(refusal: Tensor, harm: Tensor, harmful: Tensor, margin: float) -> Tensor:
    """Averages hinges that push the cosines ``[S, B]`` of harmful rows above the margin, and others below 0."""
    pair = torch.stack([refusal, harm])
    return torch.where(harmful, (margin - pair).relu(), pair.relu()).sum(0).mean()


def kl_to_base(adapted: Tensor, base: Tensor) -> Tensor:
    """Averages KL(base || adapted) over the tokens ``[N, V]`` of all processes; 0 if there are none."""
    inputs, targets = (logits.float().log_softmax(-1) for logits in (adapted, base))
    total = functional.kl_div(inputs, targets, reduction="sum", log_target=True)
    (count,) = sum_over_ranks(torch.tensor(len(base), device=total.device))
    return total * world_size() / count.clamp(min=1)  # an engine averages gradients over processes
