"""MKNN of every head of a model against one teacher: exact, batched over heads, in bounded memory."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .exact import EXACT_ROWS, recount
from .gram import GRAM_ROWS, full_precision, head_grams, similarity_factors
from .ranking import Tiles, count_shared, plan_tiles

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_LIMIT = 4 << 30


def score_heads(
    pooled: Tensor | Iterable[Tensor],
    o_proj_weights: Iterable[Tensor],
    teacher_neighbors: Tensor,
    normalize: bool = True,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """MKNN (paper, eq. 2-3) of the contribution of every head (eq. 7) to the residual stream.

    The same as forming each ``W_O[:, h*d:(h+1)*d] @ o``, removing the diagonal of the similarities, sorting each row
    (ties by rising index) and intersecting with the teacher's neighbours.

    Args:
        pooled: Head outputs averaged over tokens, ``[N, L, H, d]``, or one ``[N, H, d]`` a layer from any iterable (a
            generator that loads them holds one layer in memory). Any float type.
        o_proj_weights: ``o_proj.weight`` of each layer, ``[D, H * d]``; taken one at a time.
        teacher_neighbors: ``[N, k]`` from :func:`~llamafactory_hera.alignment.nearest_neighbors`.
        normalize: Cosine similarity when true, dot product otherwise.
        memory_limit_bytes: Bound on the working memory, inputs not counted.
        progress: Called with the number of layers done.

    Returns:
        ``[L, H]`` in fp32 on the device of the features. NaN where a head's outputs or weights hold NaN or infinity;
        a warning names those heads.

    Raises:
        ValueError: Shapes do not fit together, or the memory limit is too small.
    """
    layers = pooled.unbind(1) if isinstance(pooled, Tensor) else pooled
    scores, tiles, planned = [], None, None
    for index, (outputs, weight) in enumerate(zip(layers, o_proj_weights, strict=True)):
        shapes = _checked_shapes(outputs, weight, teacher_neighbors)
        if shapes != planned:
            tiles, planned = _plan_layer(outputs, weight, memory_limit_bytes), shapes
        scores.append(_score_layer(outputs, weight, teacher_neighbors, normalize, tiles))
        broken = scores[-1].isnan().nonzero().flatten().tolist()
        if broken:
            names = " ".join(f"L{index}H{head}" for head in broken)
            logger.warning("NaN or infinity in the outputs or weights of %s: scored as NaN.", names)
        if progress is not None:
            progress(index + 1)
    return torch.stack(scores)


def score_features(
    features: Tensor,
    teacher_neighbors: Tensor,
    normalize: bool = True,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT,
) -> Tensor:
    """MKNN of features that are compared as they are, such as a layer's own output (paper, fig. 3 left).

    Args:
        features: ``[N, D]``, or ``[M, N, D]`` for several sets of the same samples. Any float type.
        teacher_neighbors: ``[N, k]``.
        normalize: Cosine similarity when true, dot product otherwise.
        memory_limit_bytes: Bound on the working memory, inputs not counted.

    Returns:
        A scalar, or ``[M]``, in fp32; NaN for a set that holds NaN or infinity.

    Raises:
        ValueError: Shapes do not fit together, or the memory limit is too small.
    """
    sets = features.detach() if features.dim() == 3 else features.detach()[None]
    _check_neighbors(teacher_neighbors, sets.shape[1])
    neighbors = teacher_neighbors.to(sets.device)
    tiles = plan_tiles(sets.shape[1], sets.shape[2], sets.shape[0], 0, memory_limit_bytes, sets.device)
    with torch.no_grad(), full_precision(sets.device.type):
        scores = _score_sets(sets, None, neighbors, normalize, tiles)
    return scores if features.dim() == 3 else scores[0]


def _score_layer(outputs: Tensor, weight: Tensor, teacher_neighbors: Tensor, normalize: bool, tiles: Tiles) -> Tensor:
    outputs, weight = outputs.detach(), weight.detach().to(outputs.device)
    with torch.no_grad(), full_precision(outputs.device.type):
        return _score_sets(outputs.transpose(0, 1), weight, teacher_neighbors.to(outputs.device), normalize, tiles)


def _plan_layer(outputs: Tensor, weight: Tensor, memory_limit_bytes: int) -> Tiles:
    n, n_heads, d = outputs.shape
    # Gram matrices and their parts, the rows being multiplied, and one head's columns and contributions in fp64.
    weight_bytes = 8 * n_heads * d * (d + GRAM_ROWS) + 16 * weight.shape[0] * d
    if weight.device != outputs.device:
        weight_bytes += weight.nbytes
    return plan_tiles(n, d, n_heads, weight_bytes, memory_limit_bytes, outputs.device)


def _score_sets(features: Tensor, weight: Tensor | None, neighbors: Tensor, normalize: bool, tiles: Tiles) -> Tensor:
    """Scores ``[B]`` of features ``[B, N, d]`` that are compared after a projection ``[D, B * d]``, or as they are."""
    n_sets, _, d = features.shape
    broken = []
    grams = None if weight is None else head_grams(weight, n_sets)
    rows_at_a_time = max(1, tiles.heads * tiles.rows // EXACT_ROWS)
    shared = torch.empty(n_sets, dtype=torch.float64, device=features.device)
    for start in range(0, n_sets, tiles.heads):
        heads = slice(start, start + tiles.heads)
        batch = torch.empty(features[heads].shape, device=features.device).copy_(features[heads])
        factors = similarity_factors(batch, None if grams is None else grams[heads], normalize)
        counts, open_rows = count_shared(factors, neighbors, tiles)
        open_rows |= ~factors.sound[:, None]
        for slot in open_rows.any(-1).nonzero().flatten().tolist():
            head, rows = start + slot, open_rows[slot].nonzero().squeeze(-1)
            own, columns = features[head], None if weight is None else weight[:, head * d : (head + 1) * d]
            if factors.sound[slot] or (own.isfinite().all() and (columns is None or columns.isfinite().all())):
                counts[slot, rows] = recount(factors, slot, rows, neighbors, own, columns, normalize, rows_at_a_time)
            else:
                broken.append(head)
        shared[heads] = counts.sum(-1).double()
    shared[broken] = torch.nan
    return (shared / neighbors.numel()).float()


def _checked_shapes(outputs: Tensor, weight: Tensor, teacher_neighbors: Tensor) -> tuple[int, ...]:
    if outputs.dim() != 3:
        raise ValueError(f"pooled head outputs of a layer have shape {list(outputs.shape)}: give [N, H, d].")
    n, n_heads, d = outputs.shape
    if weight.dim() != 2 or weight.shape[1] != n_heads * d:
        raise ValueError(
            f"o_proj weight of shape {list(weight.shape)} does not fit {n_heads} heads of size {d}: "
            f"give o_proj.weight as PyTorch stores it, [D, {n_heads * d}]."
        )
    _check_neighbors(teacher_neighbors, n)
    return (*outputs.shape, *weight.shape)


def _check_neighbors(neighbors: Tensor, n_samples: int) -> None:
    if neighbors.dim() != 2 or neighbors.shape[0] != n_samples or not 1 <= neighbors.shape[1] < n_samples:
        raise ValueError(
            f"teacher_neighbors of shape {list(neighbors.shape)} does not fit {n_samples} samples: "
            f"give [{n_samples}, k] with 1 <= k <= {n_samples - 1}, for the same samples in the same order."
        )
