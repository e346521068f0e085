"""The plan of a calibration: the chosen heads, their anchors, and low-rank updates (sections 3.2.2 to 3.4.1)."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..heads.targets import Target
from .profile import Profile
from .settings import RahConfig
from .weights import SLICES, Edit, HeadWeights, Slice, Update


class Anchor(NamedTuple):
    """An anchor of a head, with their similarity (eq. 9) and its two parts."""

    head: Target
    similarity: float
    functional: float
    parametric: float


class Plan(NamedTuple):
    """The updates that the trust region will try, and the reasons for them."""

    heads: list[Target]  # the chosen heads, highest CAF first
    anchors: dict[Target, list[Anchor]]  # of each chosen head, nearest first
    updates: list[Update]  # in the order of their first heads


def make_plan(profile: Profile, weights: HeadWeights, config: RahConfig) -> Plan:
    """Chooses heads and anchors, and computes the updates."""
    heads = choose_heads(profile.saliency, profile.influence(config.caf_lambda), config)
    if config.update == "prune":
        return Plan(heads, {head: [] for head in heads}, [removal(head, weights) for head in heads])
    anchors = {head: find_anchors(head, profile, weights, config) for head in heads}
    ready = [head for head in heads if anchors[head]]
    return Plan(heads, anchors, [make_update(unit, anchors, weights, config) for unit in units(ready, weights)])


def choose_heads(saliency: Tensor, influence: Tensor, config: RahConfig) -> list[Target]:
    """Chooses the heads to calibrate from I-SAL and CAF ``[L, H]`` (eq. 6 and 7), highest CAF first.

    ``paper`` takes the heads below a percentile of I-SAL and above a percentile of CAF in their layer. ``no_caf``
    omits the second condition, ``inverse`` mirrors the first one, and ``random`` draws as many heads of each layer as
    ``paper`` would take.
    """
    sought = -saliency if config.targets == "inverse" else saliency
    chosen = sought < torch.quantile(sought, config.p_isal / 100, dim=1, keepdim=True)
    if config.targets != "no_caf":
        chosen &= influence > torch.quantile(influence, config.p_caf / 100, dim=1, keepdim=True)
    generator = random.Random(config.seed)
    n_layers, n_heads = saliency.shape
    found: list[Target] = []
    for layer in config.layer_indices(n_layers):
        heads = chosen[layer].nonzero().flatten().tolist()
        if config.targets == "random":
            heads = generator.sample(range(n_heads), len(heads))
        found += [Target(layer, head) for head in heads]
    return sorted(found, key=lambda head: (-influence[head].item(), head))


def candidates(saliency: Tensor, head: Target, beta: float) -> list[Target]:
    """Lists the other heads with I-SAL above ``beta`` (eq. 8) in the layer of a head.

    If that layer has none, the two adjacent layers are searched, and then the layers at a distance of two.
    """
    above = [Target(*place) for place in (saliency > beta).nonzero().tolist()]
    for distance in (0, 1, 2):
        pool = [other for other in above if abs(other.layer - head.layer) == distance and other != head]
        if pool:
            return pool
    return []


def find_anchors(head: Target, profile: Profile, weights: HeadWeights, config: RahConfig) -> list[Anchor]:
    """Finds the ``k`` candidates that are most similar to a head, nearest first.

    The similarity is ``rho * s_func + (1 - rho) * s_param`` (eq. 9). ``s_func`` is the cosine of the text-to-image
    maps (eq. 10), and ``s_param`` the weighted sum of the cosines of the value and output slices (eq. 11).
    """

    def cosine(a: Tensor, b: Tensor) -> float:
        return cosine_similarity(a.flatten(), b.flatten(), dim=0).item()

    anchors = []
    for other in candidates(profile.saliency, head, config.beta):
        functional = cosine(profile.maps[head].double(), profile.maps[other].double())
        value, output = (
            cosine(weights.of_head(head, kind).float(), weights.of_head(other, kind).float()) for kind in SLICES
        )
        parametric = config.w_v * value + config.w_o * output
        similarity = config.rho * functional + (1 - config.rho) * parametric
        anchors.append(Anchor(other, similarity, functional, parametric))
    return sorted(anchors, key=lambda anchor: (-anchor.similarity, anchor.head))[: config.k]


def units(heads: Sequence[Target], weights: HeadWeights) -> list[tuple[Target, ...]]:
    """Groups the heads that are updated together.

    Heads that share a value block form a unit if the block serves no other head; every other head is a unit itself.
    """
    groups = {head: weights.group(head) for head in heads}
    together = (group if groups.keys() >= set(group) else (head,) for head, group in groups.items())
    return list(dict.fromkeys(together))


def make_update(
    heads: tuple[Target, ...], anchors: dict[Target, list[Anchor]], weights: HeadWeights, config: RahConfig
) -> Update:
    """Computes the update of a unit.

    The output slice of each head moves toward the trimmed mean of its anchors' slices (eq. 12). A value block moves
    only if it serves no other head, toward the mean of the trimmed means of its heads (ours).
    """

    def edit(served: Sequence[Target], kind: Slice) -> Edit:
        means = []
        for head in served:
            stack = torch.stack([weights.of_head(anchor.head, kind) for anchor in anchors[head]])
            means.append(trimmed_mean(stack, config.trim))
        difference = torch.stack(means).mean(dim=0) - weights.of_head(served[0], kind).float()
        factors = low_rank(difference, None if config.rank == "full" else config.rank)
        return Edit(served[0].layer, kind, weights.index(served[0], kind), *factors)

    edits = [edit([head], "output") for head in heads]
    if len(heads) == weights.group_size:
        edits.append(edit(heads, "value"))
    return Update(heads, tuple(edit for edit in edits if edit.left.shape[1] > 0))


def removal(head: Target, weights: HeadWeights) -> Update:
    """Returns the update that sets the output slice of a head to zero (head pruning, section 3.6).

    ``W + (-W @ I)`` is exact in any floating-point type.
    """
    output = weights.of_head(head, "output").float()
    identity = torch.eye(output.shape[1], device=output.device)
    return Update((head,), (Edit(head.layer, "output", weights.index(head, "output"), -output, identity),))


def trimmed_mean(stack: Tensor, trim: float) -> Tensor:
    """Averages ``[k, ...]`` element by element without the ``floor(trim * k)`` lowest and highest values."""
    cut = int(trim * len(stack))
    return stack.float().sort(dim=0).values[cut : len(stack) - cut].mean(dim=0)


def low_rank(difference: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Factors the nearest matrix of a rank (eq. 13).

    Args:
        difference: ``W_RAH - W``, ``[m, n]``.
        rank: The number of singular directions to keep; None keeps all. Those of singular value 0 are dropped.

    Returns:
        The factors ``[m, r]`` and ``[r, n]`` in fp32; ``r`` may be 0.
    """
    u, sigma, v = torch.linalg.svd(difference.float(), full_matrices=False)
    noise = torch.finfo(sigma.dtype).eps * max(difference.shape) * sigma[:1]
    kept = int((sigma > noise).sum())
    r = kept if rank is None else min(rank, kept)
    root = sigma[:r].sqrt()
    return u[:, :r] * root, root[:, None] * v[:r]
