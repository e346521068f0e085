"""MKNN of every head of a model against one teacher: exact, batched over heads, in bounded memory."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of the projection that are multiplied at a time: few enough to be still in the cache when they are, and to keep
# the fp32 copy of half-precision weights small.
GRAM_ROWS = 128
# Squared norms outside this range have lost digits to underflow or overflow in fp32.
_SQUARE_RANGE = (1e-30, 1e30)
# |W o|² below this many units of rounding of |W|² |o|² is zero: o lies in the null space of W.
_VANISHING = 64


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in true fp32: no autocast, no TF32, no bf16 emulation, whatever the caller has switched on."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    per_backend = all(hasattr(backend, "fp32_precision") for backend in backends)
    if per_backend:
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if per_backend:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(before)


def head_grams(weight: Tensor, n_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``WᵀW`` of each head's columns of an output projection.

    Args:
        weight: ``o_proj.weight``, ``[D, H * d]``, any float type.
        n_heads: ``H``, query heads.
        dtype: Type to multiply in.

    Returns:
        ``[H, d, d]``.
    """
    d = weight.shape[1] // n_heads
    half = d // 2
    # The upper right quarter is the lower left one, transposed: it is not computed.
    left = torch.zeros(n_heads, d, half, dtype=dtype, device=weight.device)
    corner = torch.zeros(n_heads, d - half, d - half, dtype=dtype, device=weight.device)
    for rows in weight.split(GRAM_ROWS):
        columns = rows.to(dtype).view(-1, n_heads, d).transpose(0, 1).contiguous()
        left.baddbmm_(columns.mT, columns[..., :half])
        corner.baddbmm_(columns[..., half:].mT, columns[..., half:])
    right = torch.cat([left[:, half:].mT, corner], dim=1)
    return torch.cat([left, right], dim=2)


@dataclass(frozen=True)
class Factors:
    """Two sides whose product ``queries @ keysᵀ`` is the similarity matrix, for ``B`` heads at once.

    Attributes:
        queries: ``[B, N, d]``.
        keys: ``[B, N, d]``.
        rounding: ``[B, N]``; the similarity of ``i`` and ``j`` is off by at most the larger of their two values.
        sound: ``[B]``, whether that bound can be trusted for the head. False where a value is not finite, where a norm
            under- or overflows, and where a contribution is zero up to rounding.
    """

    queries: Tensor
    keys: Tensor
    rounding: Tensor
    sound: Tensor


def similarity_factors(features: Tensor, gram: Tensor | None, normalize: bool) -> Factors:
    """Factors of the similarity matrix of ``B`` sets of features.

    Args:
        features: ``[B, N, d]``, fp32 or fp64 (the type of the result). Overwritten when it is to be normalised.
        gram: ``[B, d, d]`` of the map that features go through before they are compared; None compares them directly.
        normalize: Cosine similarity when true, dot product otherwise.
    """
    d = features.shape[-1]
    eps = torch.finfo(features.dtype).eps
    squares = torch.linalg.vector_norm(features, dim=-1).square()
    if gram is None:
        keys, scale = features, features.new_ones(features.shape[0])
        image_squares = squares
    else:
        keys = torch.bmm(features, gram)
        # The largest absolute row sum bounds the spectral norm of a symmetric matrix.
        scale = gram.abs().sum(-1).amax(-1)
        image_squares = torch.linalg.vecdot(features, keys)
    reach_squares = scale[:, None] * squares
    vanishing = image_squares <= _VANISHING * eps * reach_squares
    low, high = _SQUARE_RANGE
    sound = ((image_squares > low) & (image_squares < high) & (reach_squares < high) & ~vanishing).all(-1)

    length_squares = image_squares
    if normalize:
        inverse = image_squares.rsqrt().masked_fill_(vanishing, 0.0)
        features.mul_(inverse[..., None])
        if gram is not None:
            keys.mul_(inverse[..., None])
        reach_squares = reach_squares * inverse.square()
        length_squares = torch.ones_like(inverse)
    # Two sources of error: the sums of d products, and the Gram matrix, whose error grows with |W|² |o_i|² / |W o_i|².
    # The bound is 1.5 to 3 times the largest error seen over random, skewed, low-rank and nearly constant features, d
    # from 64 to 8192.
    rounding = eps * ((8 + d**0.5 / 2) * length_squares + reach_squares)
    return Factors(features, keys, rounding, sound)


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


# On a CPU a similarity tile is read several times right after it is written: it should still be in the cache then.
_CPU_TILE_BYTES = 16 << 20
# Groups of columns whose maxima bound the k-th similarity. More groups: a tighter bound, a dearer top-k over them.
_MIN_GROUPS = 16


@dataclass(frozen=True)
class Tiles:
    """How the work is cut, and the memory for it: allocating a tile anew each time would cost more than filling it.

    Attributes:
        heads: Heads at a time.
        rows: Rows of ``N`` similarities, of each of those heads, at a time.
        similarities: ``heads * rows * N`` values in fp32.
        picked: Room for some rows, twice: those in which a neighbour's rank is counted, and the comparisons.
    """

    heads: int
    rows: int
    similarities: Tensor
    picked: tuple[Tensor, Tensor]


def plan_tiles(
    n_samples: int, dim: int, n_heads: int, fixed_bytes: int, memory_limit_bytes: int, device: torch.device
) -> Tiles:
    """The largest useful tiles that keep the working memory, inputs not counted, below a limit.

    Args:
        n_samples: ``N``.
        dim: Size of the vectors that are compared.
        n_heads: Heads that can be batched.
        fixed_bytes: What the caller holds besides features and tiles.
        memory_limit_bytes: The limit.
        device: Where the work is done; a CPU prefers tiles that fit its cache.

    Raises:
        ValueError: Not even a few rows at a time fit.
    """
    head_bytes = 12 * n_samples * dim  # outputs, queries and keys in fp32
    row_bytes = 4 * n_samples
    needed = fixed_bytes + 3 * head_bytes  # one head, and the same once more in fp64
    spare = memory_limit_bytes - needed
    if spare < 4 * EXACT_ROWS * row_bytes:
        raise ValueError(
            f"memory_limit_bytes={memory_limit_bytes} is too little for {n_samples} samples of {dim} values: "
            f"give at least {needed + 4 * EXACT_ROWS * row_bytes}, or fewer samples."
        )
    tile_bytes = spare // 4
    if device.type == "cpu":
        tile_bytes = min(tile_bytes, max(_CPU_TILE_BYTES, EXACT_ROWS * row_bytes))
    heads = max(1, min(n_heads, tile_bytes // (row_bytes * n_samples), spare // 4 // head_bytes))
    rows = min(n_samples, tile_bytes // (heads * row_bytes))
    similarities = torch.empty(heads * rows * n_samples, device=device)
    picked_rows = -(-heads * rows // 16) if device.type == "cpu" else -(-heads * rows // 4)
    picked = torch.empty(2, picked_rows, n_samples, device=device)
    return Tiles(heads, rows, similarities, (picked[0], picked[1]))


def count_shared(factors: Factors, neighbors: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Teacher neighbours that are among the ``k`` nearest, for each row, as far as fp32 can tell.

    Args:
        factors: Of ``B`` heads, in fp32.
        neighbors: Teacher neighbours ``[N, k]``.
        tiles: Made for at least ``B`` heads of ``N`` samples.

    Returns:
        Counts ``[B, N]`` (int64), and which rows are open (``[B, N]``, bool): their counts hang on a difference
        within the rounding error.
    """
    n_heads, n, _ = factors.queries.shape
    slack = 2 * factors.rounding.amax(-1)[:, None, None]  # two similarities that differ by more are in the right order
    parts = []
    for start in range(0, n, tiles.rows):
        rows = slice(start, min(start + tiles.rows, n))
        height = rows.stop - start
        similarities = tiles.similarities[: n_heads * height * n].view(n_heads, height, n)
        torch.bmm(factors.queries[:, rows], factors.keys.mT, out=similarities)
        similarities[:, :, rows].diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        parts.append(_count_rows(similarities, slack, neighbors[rows], tiles.picked))
    counts, open_rows = zip(*parts, strict=True)
    return torch.cat(counts, dim=1), torch.cat(open_rows, dim=1)


def _count_rows(
    similarities: Tensor, slack: Tensor, neighbors: Tensor, picked: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    k = neighbors.shape[-1]
    targets = similarities.gather(2, neighbors.expand(len(similarities), -1, -1))
    bound = _kth_lower_bound(similarities, k)[..., None]
    candidates = (targets >= bound - slack).flatten().nonzero().squeeze(-1)

    inside = torch.zeros(targets.numel(), dtype=torch.bool, device=targets.device)
    undecided = torch.zeros_like(inside)
    all_rows, low, high = similarities.flatten(0, 1), (targets - slack).flatten(), (targets + slack).flatten()
    for part in candidates.split(len(picked[0])):
        rows, before = picked[0][: len(part)], picked[1][: len(part)]
        torch.index_select(all_rows, 0, part // k, out=rows)
        # Comparisons are written as floats: summing those is several times faster than summing booleans.
        surely_before = torch.gt(rows, high[part, None], out=before).sum(-1)
        perhaps_before = torch.ge(rows, low[part, None], out=before).sum(-1) - 1  # a neighbour is not before itself
        inside[part] = perhaps_before < k
        undecided[part] = (perhaps_before >= k) & (surely_before < k)
    return inside.view(targets.shape).sum(-1), undecided.view(targets.shape).any(-1)


def _kth_lower_bound(similarities: Tensor, k: int) -> Tensor:
    """What ``k`` entries of a row reach at least: the ``k``-th largest of the maxima over disjoint column groups."""
    groups = min(similarities.shape[-1], max(_MIN_GROUPS, k + k // 2))
    columns = similarities.shape[-1] // groups * groups  # a few columns left out only make the bound a little lower
    maxima = similarities[..., :columns].unflatten(-1, (groups, -1)).amax(-1)
    return maxima.topk(k, dim=-1, sorted=False).values.amin(-1)


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
