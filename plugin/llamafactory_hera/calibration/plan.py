"""What is going to be tried: targets, the anchors that they learn from, and low-rank updates (section 3.3)."""

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
    """An anchor of one target, with its similarity (eq. 9) and what that is made of."""

    head: Target
    similarity: float
    functional: float
    parametric: float


class Plan(NamedTuple):
    """What a calibration is going to try."""

    targets: list[Target]  # highest CAF first
    anchors: dict[Target, list[Anchor]]  # nearest first; none where no layer within two has any
    updates: list[Update]  # in the order of their first targets


def make_plan(profile: Profile, weights: HeadWeights, config: RahConfig) -> Plan:
    """Chooses targets and anchors and computes the low-rank updates."""
    targets = choose_targets(profile.saliency, profile.influence(config.caf_lambda), config)
    if config.update == "prune":
        return Plan(targets, {target: [] for target in targets}, [removal(target, weights) for target in targets])
    anchors = {target: find_anchors(target, profile, weights, config) for target in targets}
    ready = [target for target in targets if anchors[target]]
    return Plan(targets, anchors, [make_update(heads, anchors, weights, config) for heads in units(ready, weights)])


def choose_targets(saliency: Tensor, influence: Tensor, config: RahConfig) -> list[Target]:
    """The targets, highest CAF first, from standardized I-SAL and CAF ``[L, H]`` (eq. 6 and 7).

    I-SAL lies below a percentile of its layer, CAF above another. ``no_caf`` leaves the second condition out,
    ``inverse`` mirrors the first, ``random`` draws, in each layer, as many heads as ``paper`` would take.
    """
    sought = -saliency if config.targets == "inverse" else saliency
    chosen = sought < torch.quantile(sought, config.p_isal / 100, dim=1, keepdim=True)
    if config.targets != "no_caf":
        chosen &= influence > torch.quantile(influence, config.p_caf / 100, dim=1, keepdim=True)
    draw = random.Random(config.seed)
    n_layers, n_heads = saliency.shape
    targets: list[Target] = []
    for layer in config.layer_indices(n_layers):
        heads = chosen[layer].nonzero().flatten().tolist()
        if config.targets == "random":
            heads = draw.sample(range(n_heads), len(heads))
        targets += [Target(layer, head) for head in heads]
    return sorted(targets, key=lambda target: (-influence[target].item(), target))


def candidates(saliency: Tensor, target: Target, beta: float) -> list[Target]:
    """Other heads with I-SAL above ``beta`` (eq. 8): of the target's layer, else of those beside it, else two away."""
    above = [Target(*place) for place in (saliency > beta).nonzero().tolist()]
    for distance in (0, 1, 2):
        pool = [head for head in above if abs(head.layer - target.layer) == distance and head != target]
        if pool:
            return pool
    return []


def find_anchors(target: Target, profile: Profile, weights: HeadWeights, config: RahConfig) -> list[Anchor]:
    """The ``k`` candidates most similar to a target by ``rho s_func + (1 - rho) s_param`` (eq. 9), nearest first.

    ``s_func`` compares text-to-image maps (eq. 10), ``s_param`` value and output slices (eq. 11), by their cosines.
    """

    def cosine(ours: Tensor, theirs: Tensor) -> float:
        return cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item()

    anchors = []
    for head in candidates(profile.saliency, target, config.beta):
        functional = cosine(profile.maps[target].double(), profile.maps[head].double())
        value, output = (
            cosine(weights.of_head(target, kind).float(), weights.of_head(head, kind).float()) for kind in SLICES
        )
        parametric = config.w_v * value + config.w_o * output
        similarity = config.rho * functional + (1 - config.rho) * parametric
        anchors.append(Anchor(head, similarity, functional, parametric))
    return sorted(anchors, key=lambda anchor: (-anchor.similarity, anchor.head))[: config.k]


def units(targets: Sequence[Target], weights: HeadWeights) -> list[tuple[Target, ...]]:
    """Targets that are changed together: a whole group that shares a value block, else each for itself."""
    groups = {target: weights.group(target) for target in targets}
    together = (group if groups.keys() >= set(group) else (target,) for target, group in groups.items())
    return list(dict.fromkeys(together))


def make_update(
    heads: tuple[Target, ...], anchors: dict[Target, list[Anchor]], weights: HeadWeights, config: RahConfig
) -> Update:
    """The update of one unit: each head's output slice moves towards the trimmed mean of its anchors' (eq. 12).

    A value block moves if the unit is all that it serves, towards the mean of what its heads aim at.
    """

    def edit(served: Sequence[Target], kind: Slice) -> Edit:
        aims = []
        for head in served:
            stack = torch.stack([weights.of_head(anchor.head, kind) for anchor in anchors[head]])
            aims.append(trimmed_mean(stack, config.trim))
        difference = torch.stack(aims).mean(dim=0) - weights.of_head(served[0], kind).float()
        factors = low_rank(difference, None if config.rank == "full" else config.rank)
        return Edit(served[0].layer, kind, weights.index(served[0], kind), *factors)

    edits = [edit([head], "output") for head in heads]
    if len(heads) == weights.group_size:
        edits.append(edit(heads, "value"))
    return Update(heads, tuple(edit for edit in edits if edit.left.shape[1] > 0))


def removal(head: Target, weights: HeadWeights) -> Update:
    """The update that takes a head's output slice away (head pruning, section 3.6): ``W - W``, exact in any type."""
    output = weights.of_head(head, "output").float()
    unit = torch.eye(output.shape[1], device=output.device)
    return Update((head,), (Edit(head.layer, "output", weights.index(head, "output"), -output, unit),))


def trimmed_mean(stack: Tensor, trim: float) -> Tensor:
    """Element-wise mean of ``[k, ...]`` without the ``floor(trim * k)`` lowest and as many highest values."""
    cut = int(trim * len(stack))
    return stack.float().sort(dim=0).values[cut : len(stack) - cut].mean(dim=0)


def low_rank(difference: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Left ``[m, r]`` and right ``[r, n]`` factors in fp32 of the ``rank`` largest singular directions (eq. 13).

    Of ``W_RAH - W`` ``[m, n]``; None is all. Directions without weight are dropped, so ``r`` may be 0.
    """
    u, sigma, v = torch.linalg.svd(difference.float(), full_matrices=False)
    noise = torch.finfo(sigma.dtype).eps * max(difference.shape) * sigma[:1]
    kept = int((sigma > noise).sum())
    r = kept if rank is None else min(rank, kept)
    root = sigma[:r].sqrt()
    return u[:, :r] * root, root[:, None] * v[:r]
