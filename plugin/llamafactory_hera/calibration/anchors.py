"""Which heads a target learns from (RAH-LoRA, eq. 8 to 11)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..heads.targets import Target


class Anchor(NamedTuple):
    """An anchor of one target, with the parts of its similarity."""

    head: Target
    similarity: float
    functional: float
    parametric: float


def anchor_pool(saliency: Tensor, layer: int, beta: float) -> list[Target]:
    """Heads of a layer whose I-SAL lies ``beta`` deviations above the layer's mean (eq. 8).

    Args:
        saliency: Standardised I-SAL, ``[L, H]``: its mean is 0 and its deviation 1 in each layer.
        layer: The layer.
        beta: The paper's beta.
    """
    return [Target(layer, head) for head in (saliency[layer] > beta).nonzero().flatten().tolist()]


def candidates(saliency: Tensor, target: Target, beta: float) -> list[Target]:
    """A target's candidates: the pool of its own layer, else of the layers beside it, else of those two away.

    A target that belongs to the pool itself (random and inverse targets can) is left out; other targets are not, since
    eq. 8 asks for nothing but I-SAL.
    """
    for distance in (0, 1, 2):
        layers = {target.layer - distance, target.layer + distance} & set(range(saliency.shape[0]))
        pool = [head for layer in sorted(layers) for head in anchor_pool(saliency, layer, beta) if head != target]
        if pool:
            return pool
    return []


def functional_similarity(target_map: Tensor, anchor_map: Tensor) -> float:
    """Cosine of two heads' average text-to-image attention maps (eq. 10), ``[n]`` each."""
    return cosine_similarity(target_map.double(), anchor_map.double(), dim=0).item()


def parametric_similarity(target: Sequence[Tensor], anchor: Sequence[Tensor], weights: Sequence[float]) -> float:
    """Weighted cosines of two heads' weight slices (eq. 11).

    Args:
        target: The target's value and output slices.
        anchor: The anchor's, of the same shapes.
        weights: ``w_V`` and ``w_O``.
    """
    return sum(
        weight * cosine_similarity(ours.flatten().float(), theirs.flatten().float(), dim=0).item()
        for weight, ours, theirs in zip(weights, target, anchor, strict=True)
    )


def nearest_anchors(
    pool: Sequence[Target],
    functional: Callable[[Target], float],
    parametric: Callable[[Target], float],
    rho: float,
    k: int,
) -> list[Anchor]:
    """The ``k`` candidates most similar to a target by ``rho s_func + (1 - rho) s_param`` (eq. 9), nearest first.

    Equal similarities are ordered by (layer, head).

    Args:
        pool: Candidates.
        functional: Eq. 10 of the target and a candidate.
        parametric: Eq. 11 of the target and a candidate.
        rho: Weight of the functional part.
        k: How many.
    """

    def rated() -> Iterator[Anchor]:
        for head in pool:
            func, param = functional(head), parametric(head)
            yield Anchor(head, rho * func + (1 - rho) * param, func, param)

    return sorted(rated(), key=lambda anchor: (-anchor.similarity, anchor.head))[:k]
