"""MKNN of every head of a model against one teacher, in bounded memory.

With the contributions ``c_i = W o_i`` of a head (paper, eq. 7), ``<c_i, c_j> = o_iᵀ (WᵀW) o_j``: the ``[d, d]`` Gram
matrix of its projection replaces every ``D``-sized vector. A teacher's neighbor is one of the student's when its
similarity reaches the ``k``-th largest of its row, so the rows are never sorted.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_LIMIT = 4 << 30
# On a CPU a tile of similarities is read several times right after it is written: it should still be in the cache.
_CPU_TILE_BYTES = 8 << 20
# Rows of a tile at least; ties are settled in an eighth of its rows at a time.
_LEAST_ROWS = 8
# |W o|² below this many units of rounding of |W|² |o|² is zero: o lies in the null space of W.
_VANISHING = 8


def score_heads(
    pooled: Tensor | Iterable[Tensor],
    o_proj_weights: Iterable[Tensor],
    teacher_neighbors: Tensor,
    normalize: bool = True,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT,
) -> Tensor:
    """MKNN (paper, eq. 2-3) of the contribution of every head (eq. 7) to the residual stream.

    The same as forming each ``W_O[:, h*d:(h+1)*d] @ o``, removing the diagonal of the similarities, sorting each row
    and intersecting with the teacher's neighbors, but in fp32: samples whose similarities differ by no more than its
    rounding may change places. Similarities that come out equal are ranked by rising index; those of copies of one
    sample do as a rule, which rests on the matrix product alone.

    Args:
        pooled: Head outputs averaged over tokens, ``[N, L, H, d]``, or one ``[N, H, d]`` a layer from any iterable (a
            generator that loads them holds one layer in memory). Any float type.
        o_proj_weights: ``o_proj.weight`` of each layer, ``[D, H * d]``; taken one at a time.
        teacher_neighbors: ``[N, k]`` from :func:`~llamafactory_hera.alignment.nearest_neighbors`.
        normalize: Cosine similarity when true, dot product otherwise.
        memory_limit_bytes: Bound on the working memory, inputs not counted.

    Returns:
        ``[L, H]`` in fp32 on the device of the features. NaN where a head's outputs or weights hold NaN or infinity;
        a warning names those heads.

    Raises:
        ValueError: Shapes do not fit together, or the memory limit is too small.
    """
    layers = pooled.unbind(1) if isinstance(pooled, Tensor) else pooled
    scores = []
    for index, (outputs, weight) in enumerate(zip(layers, o_proj_weights, strict=True)):
        if outputs.dim() != 3:
            raise ValueError(f"pooled head outputs of a layer have shape {list(outputs.shape)}: give [N, H, d].")
        _, n_heads, d = outputs.shape
        if weight.dim() != 2 or weight.shape[1] != n_heads * d:
            raise ValueError(
                f"o_proj weight of shape {list(weight.shape)} does not fit {n_heads} heads of size {d}: "
                f"give o_proj.weight as PyTorch stores it, [D, {n_heads * d}]."
            )
        of_layer = _score_sets(outputs.transpose(0, 1), weight, teacher_neighbors, normalize, memory_limit_bytes)
        broken = of_layer.isnan().nonzero().flatten().tolist()
        if broken:
            names = " ".join(f"L{index}H{head}" for head in broken)
            logger.warning("NaN or infinity in the outputs or weights of %s: scored as NaN.", names)
        scores.append(of_layer)
    return torch.stack(scores)


def score_features(
    features: Tensor,
    teacher_neighbors: Tensor,
    normalize: bool = True,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT,
) -> Tensor:
    """MKNN of features that are compared as they are, such as a layer's own output (paper, fig. 3 left).

    Args:
        features: ``[N, D]``, any float type.
        teacher_neighbors: ``[N, k]``.
        normalize: Cosine similarity when true, dot product otherwise.
        memory_limit_bytes: Bound on the working memory, inputs not counted.

    Returns:
        A scalar in fp32; NaN where they hold NaN or infinity.

    Raises:
        ValueError: Shapes do not fit together, or the memory limit is too small.
    """
    return _score_sets(features[None], None, teacher_neighbors, normalize, memory_limit_bytes)[0]


@torch.no_grad()
def nearest_samples(features: Tensor, weight: Tensor | None, rows: Tensor, k: int, normalize: bool = True) -> Tensor:
    """The neighbors that :func:`score_heads`, or without a weight :func:`score_features`, counts, of some samples.

    Args:
        features: Outputs of a layer's heads ``[N, H, d]`` with its ``o_proj.weight``, or the layer's own ``[N, D]``.
        weight: ``[D, H * d]``, or None.
        rows: The samples that are asked for, ``[Q]``.
        k: Neighbors of each.
        normalize: Cosine similarity when true, dot product otherwise.

    Returns:
        ``[H, Q, k]`` or ``[Q, k]``, nearest first; -1 where :func:`score_heads` gives NaN.
    """
    device, d, found = features.device, features.shape[-1], []
    rows = rows.to(device)
    with full_precision(device.type):
        for head, vectors in enumerate(features.transpose(0, 1) if weight is not None else [features]):
            columns = None if weight is None else weight[:, head * d : (head + 1) * d].to(device, torch.float32)
            queries, keys, sound = _factors(vectors, columns, normalize)
            similarities = (queries[rows] @ keys.T).scatter_(1, rows[:, None], -torch.inf)
            nearest = similarities.sort(dim=1, descending=True, stable=True).indices[:, :k]
            found.append(nearest.where(sound, -1))
    return torch.stack(found) if weight is not None else found[0]


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in true fp32: no autocast, no TF32, no bf16 emulation, whatever the caller has switched on."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    per_backend = all(hasattr(backend, "fp32_precision") for backend in backends)
    before = [backend.fp32_precision for backend in backends] if per_backend else torch.get_float32_matmul_precision()
    if per_backend:
        for backend in backends:
            backend.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if isinstance(before, str):
            torch.set_float32_matmul_precision(before)
        else:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


def _score_sets(features: Tensor, weight: Tensor | None, neighbors: Tensor, normalize: bool, limit: int) -> Tensor:
    """Scores ``[B]`` of features ``[B, N, d]`` that are compared after a projection ``[D, B * d]``, or as they are."""
    _, n, d = features.shape
    if neighbors.dim() != 2 or neighbors.shape[0] != n or not 1 <= neighbors.shape[1] < n:
        raise ValueError(
            f"teacher_neighbors of shape {list(neighbors.shape)} does not fit {n} samples: "
            f"give [{n}, k] with 1 <= k <= {n - 1}, for the same samples in the same order."
        )
    device = features.device
    height = _rows_at_a_time(neighbors, d, 0 if weight is None else weight.shape[0], limit, device)
    neighbors = neighbors.to(device)
    scores = []
    with torch.no_grad(), full_precision(device.type):
        tile = torch.empty(height, n, device=device)
        for index, vectors in enumerate(features):
            columns = None if weight is None else weight[:, index * d : (index + 1) * d].to(device, torch.float32)
            queries, keys, sound = _factors(vectors, columns, normalize)
            shared = torch.zeros((), dtype=torch.int64, device=device)
            for start in range(0, n, height):
                rows = slice(start, min(start + height, n))
                similarities = torch.mm(queries[rows], keys.T, out=tile[: rows.stop - start])
                similarities.diagonal(start).fill_(-torch.inf)
                shared += _count_shared(similarities, neighbors[rows])
            scores.append(torch.where(sound, shared.double() / neighbors.numel(), torch.nan))
    return torch.stack(scores).float()


def _rows_at_a_time(neighbors: Tensor, d: int, dim: int, limit: int, device: torch.device) -> int:
    """Rows of a tile, so that one head's vectors and what ranking a tile takes stay below the limit in bytes."""
    n, k = neighbors.shape
    vectors = 40 * n * d + 64 * n + 4 * dim * d + 16 * d * d  # of _factors
    row = 8 * n + 56 * math.isqrt(n * (k + 1))  # similarities and the settling of ties; the two searches of _largest
    if limit < vectors + _LEAST_ROWS * row:
        raise ValueError(
            f"memory_limit_bytes={limit} is too little for {n} samples of {d} values: "
            f"give at least {vectors + _LEAST_ROWS * row}, or fewer samples."
        )
    rows = (limit - vectors) // row
    if device.type == "cpu":
        rows = min(rows, max(_LEAST_ROWS, _CPU_TILE_BYTES // (4 * n)))
    return min(n, rows)


def _factors(vectors: Tensor, columns: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Two sides ``[N, d]``; ``queries @ keysᵀ`` orders each row as the similarities do. And whether all is finite.

    For dot products all vectors are brought near 1 by one power of two: squares of very large or small values would
    leave fp32. For cosines lengths are taken in fp64, a vector that the projection removes is zero, and keys are
    centered, which shifts each row by one number: fp32 would else lose that in which nearly parallel vectors differ.
    """
    queries = vectors.float()
    gram = None if columns is None else columns.T @ columns
    if not normalize:
        queries = queries * torch.exp2(-torch.frexp(queries.abs().amax()).exponent.clamp(min=-126))
        keys = queries if gram is None else queries @ gram
        return queries, keys, keys.isfinite().all()
    queries = keys = queries.double()
    reach = torch.ones((), device=queries.device)
    if gram is not None:
        keys = queries @ gram.double()
        reach = gram.abs().sum(-1).amax()  # at least the spectral norm of the symmetric matrix
    squares = torch.linalg.vecdot(queries, keys)
    floor = _VANISHING * torch.finfo(torch.float32).eps * reach * torch.linalg.vecdot(queries, queries)
    inverse = squares.rsqrt().masked_fill(squares <= floor, 0.0)[:, None]
    queries, keys = queries * inverse, keys * inverse
    return queries.float(), (keys - keys.mean(0)).float(), squares.isfinite().all()


def _count_shared(similarities: Tensor, neighbors: Tensor) -> Tensor:
    """How many of the teacher's neighbors ``[R, k]`` are among the ``k`` most similar of their rows ``[R, N]``."""
    k = neighbors.shape[1]
    best = _largest(similarities, k + 1)
    threshold = best[:, k - 1 : k]
    shared = (similarities.gather(1, neighbors) >= threshold).sum(-1)
    # The k-th and the next are equal: of those that equal them, the ones of lowest index are neighbors.
    tied = (best[:, k - 1] == best[:, k]).nonzero().squeeze(1)
    for rows in tied.split(max(1, len(similarities) // 8)):
        values, level = similarities[rows], threshold[rows]
        above, equal = values > level, values == level
        room = k - above.sum(-1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
        shared[rows] = chosen.gather(1, neighbors[rows]).sum(-1)
    return shared.sum()


def _largest(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest values ``[R, count]`` of each row ``[R, N]``, in falling order."""
    n = values.shape[1]
    size = max(1, math.isqrt(n // count))
    groups = n // size
    # Only the groups of columns with the largest maxima can hold them: two short searches instead of a long one.
    grouped = values[:, : groups * size].unflatten(1, (size, groups))
    best = grouped.amax(1).topk(count, sorted=False).indices
    picked = grouped.gather(2, best[:, None].expand(-1, size, -1)).flatten(1)
    return torch.cat([picked, values[:, groups * size :]], dim=1).topk(count).values
