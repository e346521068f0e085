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
    """An anchor of one target, with its similarity and what that is made of."""

    head: Target
    similarity: float
    functional: float
    parametric: float


class Plan(NamedTuple):
    """What a calibration is going to try."""

    #: Heads to calibrate, highest CAF first.
    targets: list[Target]
    #: Of each target, nearest first; none where no layer within two has any.
    anchors: dict[Target, list[Anchor]]
    #: In the order of their first targets.
    updates: list[Update]


def make_plan(profile: Profile, weights: HeadWeights, config: RahConfig) -> Plan:
    """Chooses targets and anchors and computes the low-rank updates."""
    targets = choose_targets(profile.saliency, profile.influence(config.caf_lambda), config)
    anchors = {target: find_anchors(target, profile, weights, config) for target in targets}
    ready = [target for target in targets if anchors[target]]
    return Plan(targets, anchors, [make_update(heads, anchors, weights, config) for heads in units(ready, weights)])


# -- targets, eq. 6 and 7 --------------------------------------------------------------------------------------------


def choose_targets(saliency: Tensor, influence: Tensor, config: RahConfig) -> list[Target]:
    """The targets, highest CAF first, from standardised I-SAL and CAF ``[L, H]``.

    I-SAL lies below a percentile of its layer, CAF above another; both are linear between heads. ``rah_targets:
    no_caf`` leaves the second condition out, ``inverse`` takes heads above the mirrored percentile of I-SAL, and
    ``random`` draws, in each layer, as many heads as ``paper`` would take.
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


# -- anchors, eq. 8 to 11 --------------------------------------------------------------------------------------------


def candidates(saliency: Tensor, target: Target, beta: float) -> list[Target]:
    """Heads that a target could learn from: of its own layer, else of the layers beside it, else of those two away.

    They are those whose I-SAL lies ``beta`` deviations above their layer's mean (eq. 8), the target itself left out;
    in standardised I-SAL ``[L, H]`` each layer's mean is 0 and its deviation 1. Other targets are not left out: random
    and inverse ones can lie there, and eq. 8 asks for nothing else.
    """
    above = [Target(*place) for place in (saliency > beta).nonzero().tolist()]
    for distance in (0, 1, 2):
        pool = [head for head in above if abs(head.layer - target.layer) == distance and head != target]
        if pool:
            return pool
    return []


def find_anchors(target: Target, profile: Profile, weights: HeadWeights, config: RahConfig) -> list[Anchor]:
    """The ``k`` candidates most similar to a target by ``rho s_func + (1 - rho) s_param`` (eq. 9), nearest first.

    ``s_func`` is the cosine of the average text-to-image maps (eq. 10), ``s_param`` the weighted cosines of the value
    and output slices (eq. 11). Equal similarities are ordered by (layer, head).
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


# -- updates, eq. 12 and 13 ------------------------------------------------------------------------------------------


def units(targets: Sequence[Target], weights: HeadWeights) -> list[tuple[Target, ...]]:
    """Targets that are changed together: a whole group that shares a value block, else each for itself."""
    groups = {target: weights.group(target) for target in targets}
    together = (group if groups.keys() >= set(group) else (target,) for target, group in groups.items())
    return list(dict.fromkeys(together))


def make_update(
    heads: tuple[Target, ...], anchors: dict[Target, list[Anchor]], weights: HeadWeights, config: RahConfig
) -> Update:
    """The update of one unit: each head's output slice moves towards the trimmed mean of its anchors'.

    A value block moves if the unit is all that it serves, towards the mean of what the heads of the unit aim at.
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


def trimmed_mean(stack: Tensor, trim: float) -> Tensor:
    """Element-wise mean of ``[k, ...]`` without the ``floor(trim * k)`` lowest and as many highest values (eq. 12).

    With the paper's three anchors and 0.1 nothing is cut off, and this is the mean.
    """
    k = len(stack)
    cut = int(trim * k)
    return stack.float().sort(dim=0).values[cut : k - cut].mean(dim=0)


def low_rank(difference: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest singular directions, None for all, of ``W_RAH - W`` ``[m, n]`` (eq. 13).

    Returns:
        Left ``[m, r]`` and right ``[r, n]`` in fp32, whose product it is; they share the singular values. Directions
        without weight are dropped, so ``r`` may be 0.
    """
    u, sigma, v = torch.linalg.svd(difference.float(), full_matrices=False)
    noise = torch.finfo(sigma.dtype).eps * max(difference.shape) * sigma[:1]
    kept = int((sigma > noise).sum())
    r = kept if rank is None else min(rank, kept)
    root = sigma[:r].sqrt()
    return u[:, :r] * root, root[:, None] * v[:r]
