"""Which heads are taken, given their scores."""

import math
import random
from collections.abc import Sequence

from ..heads.targets import Target
from .settings import Strategy

Scores = Sequence[Sequence[float]]


def ranking(scores: Scores) -> list[Target]:
    """All heads with a score, least aligned first; equal scores are ordered by (layer, head), NaN is left out."""
    scored = [
        (score, Target(layer, head))
        for layer, row in enumerate(scores)
        for head, score in enumerate(row)
        if not math.isnan(score)
    ]
    return [head for _, head in sorted(scored)]


def choose_heads(scores: Scores, strategy: Strategy, m: int, seed: int = 0) -> tuple[Target, ...]:
    """Chooses ``m`` heads.

    ``worst`` is the paper's choice: the least aligned, least first. ``top`` is the most aligned, most first;
    ``random`` is drawn by seed, ordered by (layer, head). ``middle`` is this project's reading of the paper's ablation
    "middle layer" for single heads: the least aligned of the middle decoder layer (``L // 2``), so that ``m`` is the
    same in every strategy.

    Args:
        scores: ``[L][H]``; NaN where a head could not be scored, which is never chosen.
        strategy: One of the four.
        m: How many.
        seed: For ``random``.

    Raises:
        ValueError: Fewer than ``m`` heads have a score.
    """
    heads = ranking(scores)
    if strategy == "middle":
        heads = [head for head in heads if head.layer == len(scores) // 2]
    if len(heads) < m:
        where = f"in layer L{len(scores) // 2} " if strategy == "middle" else ""
        raise ValueError(f"hera_select_m: {m} heads are asked for, and {len(heads)} {where}have a score; lower it.")
    if strategy == "top":
        heads.sort(key=lambda head: (-scores[head.layer][head.head], head))
    if strategy == "random":
        return tuple(sorted(random.Random(seed).sample(sorted(heads), m)))
    return tuple(heads[:m])


def choose_layers(scores: Sequence[float], strategy: Strategy, m: int, seed: int = 0) -> tuple[int, ...]:
    """Chooses ``m`` layers by the scores of their own outputs, as :func:`choose_heads` chooses heads.

    Args:
        scores: ``[L]``; NaN where a layer could not be scored, which is never chosen.
        strategy: ``worst``, ``top`` or ``random``.
        m: How many.
        seed: For ``random``.

    Raises:
        ValueError: Fewer than ``m`` layers have a score.
    """
    scored = sum(not math.isnan(score) for score in scores)
    if scored < m:
        raise ValueError(f"hera_select_m: {m} layers are asked for, and {scored} have a score; lower it.")
    return tuple(head.layer for head in choose_heads([[score] for score in scores], strategy, m, seed))
