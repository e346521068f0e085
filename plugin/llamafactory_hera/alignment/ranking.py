"""Which of the teacher's neighbours are among the student's ``k`` nearest, without finding the student's neighbours.

Teacher neighbour ``j`` of ``i`` is one of the student's ``k`` exactly when fewer than ``k`` others come before it. A
cheap lower bound on the ``k``-th similarity of each row rules out most teacher neighbours; the few above it are ranked
by counting, which costs far less than sorting their rows. The first pass runs in fp32 and leaves a row open where
rounding could decide (exact ties above all); open rows are ranked again in fp64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import EXACT_ROWS
from .gram import Factors

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
