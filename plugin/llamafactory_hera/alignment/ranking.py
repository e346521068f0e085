"""Which of the teacher's neighbours are among the student's ``k`` nearest, sorting as few rows as possible.

A cheap lower bound on the ``k``-th similarity of a row rules out most teacher neighbours; only rows that keep one are
searched for their ``k``-th similarity. The first pass runs in fp32 and leaves a row open where rounding could decide
(exact ties above all); open rows are ranked again in fp64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import Factors

# On a CPU a similarity tile is read several times right after it is written: it should still be in the cache then.
_CPU_TILE_BYTES = 16 << 20
# Groups of columns whose maxima bound the k-th similarity. More groups: a tighter bound, a dearer top-k over them.
_MIN_GROUPS = 16
# Rows of N fp32 values that ranking one row in fp64 takes: similarities, differences, tolerances, comparisons.
_EXACT_ROWS = 12


@dataclass(frozen=True)
class Tiles:
    """How the work is cut, and the memory for it: allocating a tile anew each time would cost more than filling it.

    Attributes:
        heads: Heads at a time.
        rows: Rows of ``N`` similarities, of each of those heads, at a time.
        similarities: ``heads * rows * N`` values in fp32.
        picked: Room for a quarter of the rows, those to be searched.
    """

    heads: int
    rows: int
    similarities: Tensor
    picked: Tensor


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
    if spare < 4 * _EXACT_ROWS * row_bytes:
        raise ValueError(
            f"memory_limit_bytes={memory_limit_bytes} is too little for {n_samples} samples of {dim} values: "
            f"give at least {needed + 4 * _EXACT_ROWS * row_bytes}, or fewer samples."
        )
    tile_bytes = spare // 4
    if device.type == "cpu":
        tile_bytes = min(tile_bytes, max(_CPU_TILE_BYTES, _EXACT_ROWS * row_bytes))
    heads = max(1, min(n_heads, tile_bytes // (row_bytes * n_samples), spare // 4 // head_bytes))
    rows = min(n_samples, tile_bytes // (heads * row_bytes))
    similarities = torch.empty(heads * rows * n_samples, device=device)
    picked = torch.empty(-(-heads * rows // 4), n_samples, device=device)
    return Tiles(heads, rows, similarities, picked)


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


def _count_rows(similarities: Tensor, slack: Tensor, neighbors: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    k = neighbors.shape[-1]
    targets = similarities.gather(2, neighbors.expand(len(similarities), -1, -1))
    above_bound = targets >= _kth_lower_bound(similarities, k)[..., None] - slack
    low, high = (targets - slack).flatten(0, 1), (targets + slack).flatten(0, 1)
    rows_to_search = above_bound.any(-1).flatten().nonzero().squeeze(-1)

    surely = torch.zeros_like(low, dtype=torch.bool)
    perhaps = torch.zeros_like(surely)
    for rows in rows_to_search.split(len(picked)):
        searched = torch.index_select(similarities.flatten(0, 1), 0, rows, out=picked[: len(rows)])
        kth, next_one = searched.topk(k + 1, dim=-1).values[:, -2:].split(1, dim=-1)
        surely[rows] = low[rows] > next_one  # at most k reach it, and it is one of them
        perhaps[rows] = high[rows] >= kth
    is_open = (perhaps & ~surely).any(-1)
    return surely.sum(-1).view(targets.shape[:2]), is_open.view(targets.shape[:2])


def _kth_lower_bound(similarities: Tensor, k: int) -> Tensor:
    """What ``k`` entries of a row reach at least: the ``k``-th largest of the maxima over disjoint column groups."""
    groups = min(similarities.shape[-1], max(_MIN_GROUPS, k + k // 2))
    columns = similarities.shape[-1] // groups * groups  # a few columns left out only make the bound a little lower
    maxima = similarities[..., :columns].unflatten(-1, (groups, -1)).amax(-1)
    return maxima.topk(k, dim=-1, sorted=False).values.amin(-1)


def count_shared_exactly(factors: Factors, neighbors: Tensor, rows: Tensor, tiles: Tiles) -> Tensor:
    """Teacher neighbours that are among the ``k`` nearest, ties by rising index, for the given rows of one head.

    Args:
        factors: Of one head (``B = 1``), in fp64. Similarities closer than their rounding errors are equal.
        neighbors: Teacher neighbours ``[N, k]``.
        rows: Row indices ``[R]``.
        tiles: Sets how many rows are ranked at a time.

    Returns:
        Counts ``[R]`` (int64).
    """
    k = neighbors.shape[-1]
    queries, keys = factors.queries[0], factors.keys[0]
    # Wider than the error of a difference by a factor of four: a tie missed is worse than one too many at 1e-13.
    slack = 8 * factors.rounding[0]
    index = torch.arange(queries.shape[0], device=queries.device)
    counts = []
    for part in rows.split(max(1, tiles.heads * tiles.rows // _EXACT_ROWS)):
        similarities = queries[part] @ keys.T
        similarities.scatter_(1, part[:, None], -torch.inf)
        shared = torch.zeros_like(part)
        for column in neighbors[part].T[..., None]:
            gaps = similarities - similarities.gather(1, column)
            ties = torch.maximum(slack[None], torch.maximum(slack[part, None], slack[column]))
            before = (gaps > ties) | ((gaps >= -ties) & (index < column))
            shared += before.sum(-1) < k
        counts.append(shared)
    return torch.cat(counts)
