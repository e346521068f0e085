"""The second look, in fp64, at rows of similarities whose order fp32 could not settle.

Usually that is a row or two of a head and a dozen samples in them: those are compared as the method defines it, by
their contributions in ``R^D``. Where many rows are open (samples that are copies of one another, a head that gives
nearly the same output for every sample) the whole head is compared again through its Gram matrix.
"""

import torch
from torch import Tensor

from .gram import Factors, head_grams, similarity_factors

# Rows of N fp32 values that ranking one row in fp64 takes: similarities, differences, tolerances, comparisons.
EXACT_ROWS = 12


def recount(
    factors: Factors,
    head: int,
    rows: Tensor,
    neighbors: Tensor,
    features: Tensor,
    weight: Tensor | None,
    normalize: bool,
    rows_at_a_time: int,
) -> Tensor:
    """Teacher neighbours that are among the ``k`` nearest, ties by rising index, for the given rows of one head.

    Args:
        factors: Of a batch of heads, in fp32.
        head: Position in the batch.
        rows: Row indices ``[R]``.
        neighbors: Teacher neighbours ``[N, k]``.
        features: ``[N, d]`` of that head, finite.
        weight: Its projection ``[D, d]``, or None when features are compared as they are.
        normalize: Cosine similarity when true, dot product otherwise.
        rows_at_a_time: Bounds the memory.

    Returns:
        Counts ``[R]`` (int64). Similarities closer than the rounding error of fp64 are taken as equal.
    """
    # Beyond d samples their contributions cost more than the Gram matrix.
    most = min(features.shape[1], features.shape[0] // 2)
    if len(rows) * (neighbors.shape[1] + 1) <= most:
        similarities = factors.queries[head, rows] @ factors.keys[head].T
        members = _contested(similarities, 2 * factors.rounding[head].amax(), rows, neighbors)
        if len(members) <= most:
            vectors = features[members].to(torch.float64, copy=True)
            if weight is not None:
                vectors = vectors @ weight.double().T
            exact = similarity_factors(vectors[None], None, normalize)
            similarities, rounding = similarities.double(), vectors.new_zeros(len(features))
            similarities[:, members] = exact.queries[0, torch.searchsorted(members, rows)] @ exact.keys[0].T
            rounding[members] = exact.rounding[0]
            return _count(similarities, rounding, rows, neighbors)

    gram = None if weight is None else head_grams(weight, 1, torch.float64)
    exact = similarity_factors(features[None].to(torch.float64, copy=True), gram, normalize)
    counts = []
    for part in rows.split(rows_at_a_time):
        counts.append(_count(exact.queries[0, part] @ exact.keys[0].T, exact.rounding[0], part, neighbors))
    return torch.cat(counts)


def _contested(similarities: Tensor, slack: Tensor, rows: Tensor, neighbors: Tensor) -> Tensor:
    """The samples that decide these rows: the rows, their teacher neighbours, and whatever is too close to those."""
    contested = torch.zeros(similarities.shape[1], dtype=torch.bool, device=rows.device)
    contested[rows] = True
    for column in neighbors[rows].T[..., None]:
        contested |= ((similarities - similarities.gather(1, column)).abs() <= slack).any(0)
    return contested.nonzero().squeeze(-1)


def _count(similarities: Tensor, rounding: Tensor, rows: Tensor, neighbors: Tensor) -> Tensor:
    k = neighbors.shape[-1]
    # A difference is off by at most twice the rounding; four times that, for a missed tie is worse than one at 1e-13.
    slack = 8 * rounding
    index = torch.arange(similarities.shape[1], device=similarities.device)
    similarities.scatter_(1, rows[:, None], -torch.inf)
    shared = torch.zeros_like(rows)
    for column in neighbors[rows].T[..., None]:
        gaps = similarities - similarities.gather(1, column)
        ties = torch.maximum(slack[None], torch.maximum(slack[rows, None], slack[column]))
        before = (gaps > ties) | ((gaps >= -ties) & (index < column))
        shared += before.sum(-1) < k
    return shared
