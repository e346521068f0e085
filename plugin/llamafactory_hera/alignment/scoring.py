"""Computes the MKNN of every head of a model against a teacher, without computing the contributions of the heads.

The contribution of a head to sample ``i`` is ``c_i = W o_i`` (paper, eq. 7), so ``<c_i, c_j> = o_iᵀ (WᵀW) o_j``.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .neighbors import ROWS, full_precision

logger = logging.getLogger("llamafactory_hera")


def score_heads(
    pooled: Iterable[Tensor], o_proj_weights: Iterable[Tensor], teacher_neighbors: Tensor, normalize: bool = True
) -> Tensor:
    """Computes the MKNN (paper, eq. 2-3) of every head's contribution to the residual stream (eq. 7).

    The result equals that of the direct computation in fp32, except that similarities that differ only by rounding
    may change places.

    Args:
        pooled: Head outputs of each layer, averaged over tokens, ``[N, H, d]``; sizes may differ between layers.
        o_proj_weights: ``o_proj.weight`` of each layer, ``[D, H * d]``; read one layer at a time.
        teacher_neighbors: ``[N, k]`` from ``nearest_neighbors``.
        normalize: True for cosine similarity, false for the dot product.

    Returns:
        ``[L, H]`` in fp32 on the device of the features, where H is the largest number of heads of a layer. NaN
        marks heads that do not exist and, with a warning, heads whose outputs or weights contain NaN or infinity.
    """
    neighbors = head_neighbors(pooled, o_proj_weights, teacher_neighbors.shape[1], normalize)
    return mean_shared(shared_neighbors(neighbors, teacher_neighbors), teacher_neighbors.shape[1])


def head_neighbors(
    pooled: Iterable[Tensor], o_proj_weights: Iterable[Tensor], k: int, normalize: bool = True
) -> Tensor:
    """Finds the ``k`` nearest neighbors ``[L, H, N, k]`` of every sample for every head; -1 if a head has none.

    The arguments are those of ``score_heads``; heads that have no score there have no neighbors here.
    """
    layers = []
    for number, (outputs, weight) in enumerate(zip(pooled, o_proj_weights, strict=True)):
        rows, n_heads = torch.arange(len(outputs)), outputs.shape[1]
        heads = zip(outputs.unbind(1), weight.unflatten(1, outputs.shape[1:]).unbind(1), strict=True)
        layer = torch.full((n_heads, len(outputs), k), -1, dtype=torch.int32, device=outputs.device)
        for head, (features, columns) in enumerate(heads):
            layer[head] = nearest_samples(features, columns, rows, k, normalize)
            if layer[head, 0, 0] < 0:
                logger.warning("L%dH%d has no score: its output or weight contains NaN or infinity.", number, head)
        layers.append(layer)
    return pad_sequence(layers, True, -1)


def shared_neighbors(neighbors: Tensor, teacher_neighbors: Tensor) -> Tensor:
    """Counts the neighbors that each sample shares with the teacher: ``[..., N]`` in fp32, NaN without neighbors.

    ``neighbors`` are ``[..., N, k]``, for instance of every head, and ``teacher_neighbors`` are ``[N, k]``.
    """
    n, teacher = neighbors.shape[-2], teacher_neighbors.to(neighbors.device)
    if n != len(teacher):
        raise ValueError(f"teacher_neighbors has {len(teacher)} samples, but neighbors has {n}; use the same samples.")
    # one head at a time, because the comparison takes k times the memory of the head's neighbors
    heads = neighbors.view(-1, *neighbors.shape[-2:])
    counts = [(head[:, :, None] == teacher[:, None]).sum((1, 2)) for head in heads]
    shared = torch.stack(counts).view(neighbors.shape[:-1]).float()
    return shared.masked_fill(neighbors[..., 0] < 0, torch.nan)


def mean_shared(counts: Tensor, k: int) -> Tensor:
    """Turns the counts ``[..., N]`` of ``shared_neighbors`` into MKNN, in fp32."""
    return (counts.mean(-1, dtype=torch.float64) / k).float()


@torch.no_grad()
def nearest_samples(features: Tensor, weight: Tensor | None, rows: Tensor, k: int, normalize: bool = True) -> Tensor:
    """Finds the ``k`` nearest neighbors ``[Q, k]`` of the samples ``rows [Q]``, nearest first, then by index.

    A ``weight [D, d]``, such as a head's columns of ``o_proj.weight``, projects the ``features [N, d]``. All
    neighbors are -1 if features or weight contain NaN or infinity.
    """
    parts = []
    with full_precision(features.device.type):
        queries, keys, finite = _factors(features, weight, normalize)
        for chunk in rows.to(features.device).split(ROWS):
            similarities = (queries[chunk] @ keys.T).scatter_(1, chunk[:, None], -torch.inf)
            best, nearest = similarities.topk(k + 1)
            tied = (best[:, 1:] == best[:, :-1]).any(1)  # topk orders equal values arbitrarily
            nearest[tied] = similarities[tied].sort(dim=1, descending=True, stable=True).indices[:, : k + 1]
            parts.append(nearest[:, :k])
    return torch.cat(parts).where(finite, -1)


def _factors(features: Tensor, weight: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns two fp32 factors ``[N, d]`` whose product sorts like the similarities, and whether all are finite."""
    queries = features.float()
    gram = None if weight is None else (columns := weight.to(queries)).T @ columns
    if not normalize:
        # a power of two brings all values near 1, so that squares neither overflow nor underflow
        queries = queries * torch.exp2(-torch.frexp(queries.abs().amax()).exponent.clamp(min=-126))
        keys = queries if gram is None else queries @ gram
        return queries, keys, keys.isfinite().all()
    queries = queries.double()
    keys = queries if gram is None else queries @ gram.double()
    norm = 1.0 if gram is None else gram.abs().sum(-1).amax()  # an upper bound of the symmetric matrix's spectral norm
    squares = torch.linalg.vecdot(queries, keys)
    # if |W o|² is below eight rounding units of |W|² |o|², o lies in the null space of W
    floor = 8 * torch.finfo(torch.float32).eps * norm * torch.linalg.vecdot(queries, queries)
    inverse = squares.rsqrt().masked_fill(squares <= floor, 0.0)[:, None]
    queries, keys = queries * inverse, keys * inverse
    # Subtracting the mean shifts a sample's similarities equally, so that fp32 can represent small differences.
    return queries.float(), (keys - keys.mean(0)).float(), squares.isfinite().all()
