"""From scores to updates: targets, their anchors, and what each learns from them (RAH-LoRA, eq. 6 to 13)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads.targets import Target
from .anchors import Anchor, candidates, functional_similarity, nearest_anchors, parametric_similarity
from .edits import Edit, Update
from .profile import Profile
from .settings import RahSettings
from .targets import choose_targets
from .transfer import low_rank, trimmed_mean
from .weights import HeadWeights, Part


@dataclass(frozen=True)
class Plan:
    """What a calibration is going to try.

    Attributes:
        targets: Heads to calibrate, highest CAF first.
        anchors: Anchors of each target, nearest first; none where no layer within two has any.
        updates: What is changed together, in the order of its first target.
    """

    targets: list[Target]
    anchors: dict[Target, list[Anchor]]
    updates: list[Update]


def make_plan(profile: Profile, weights: HeadWeights, settings: RahSettings) -> Plan:
    """Chooses targets and anchors and computes the low-rank updates.

    Args:
        profile: Of the model.
        weights: Of the model.
        settings: Of the calibration.

    Raises:
        ValueError: ``rah_layers`` names a layer that the model does not have.
    """
    saliency = profile.saliency
    targets = choose_targets(
        saliency,
        profile.influence(settings.caf_lambda),
        settings.layer_indices(saliency.shape[0]),
        settings.p_isal,
        settings.p_caf,
        settings.targets,
        settings.seed,
    )
    anchors = {target: find_anchors(target, profile, saliency, weights, settings) for target in targets}
    ready = [target for target in targets if anchors[target]]
    return Plan(targets, anchors, [make_update(heads, anchors, weights, settings) for heads in units(ready, weights)])


def find_anchors(
    target: Target, profile: Profile, saliency: Tensor, weights: HeadWeights, settings: RahSettings
) -> list[Anchor]:
    """A target's anchors (eq. 8 to 11), nearest first."""
    return nearest_anchors(
        candidates(saliency, target, settings.beta),
        lambda anchor: functional_similarity(profile.maps[target], profile.maps[anchor]),
        lambda anchor: parametric_similarity(
            weights.of_head(target), weights.of_head(anchor), (settings.w_v, settings.w_o)
        ),
        settings.rho,
        settings.k,
    )


def units(targets: list[Target], weights: HeadWeights) -> list[tuple[Target, ...]]:
    """Targets that are changed together: a whole group that shares a value block, else each for itself.

    Args:
        targets: Targets with anchors, in order.
        weights: Says which heads share a block.
    """
    found: list[tuple[Target, ...]] = []
    for target in targets:
        group = weights.group(target)
        together = tuple(group) if set(group) <= set(targets) else (target,)
        if together not in found:
            found.append(together)
    return found


def make_update(
    heads: tuple[Target, ...], anchors: dict[Target, list[Anchor]], weights: HeadWeights, settings: RahSettings
) -> Update:
    """The update of one unit (eq. 12 and 13).

    Each head's output slice moves towards the trimmed mean of its anchors'. A value block moves if the unit is all
    that it serves, towards the mean of what the heads of the unit aim at.
    """
    edits = [
        _edit(weights, head.layer, "output", head.head, [_aim(head, 1, anchors, weights, settings)], settings)
        for head in heads
    ]
    if len(heads) == weights.group_size:
        aims = [_aim(head, 0, anchors, weights, settings) for head in heads]
        edits.append(_edit(weights, heads[0].layer, "value", weights.kv_head(heads[0]), aims, settings))
    return Update(heads, tuple(edit for edit in edits if edit.left.shape[1] > 0))


def _aim(
    head: Target, part: int, anchors: dict[Target, list[Anchor]], weights: HeadWeights, settings: RahSettings
) -> Tensor:
    stack = torch.stack([weights.of_head(anchor.head)[part] for anchor in anchors[head]])
    return trimmed_mean(stack, settings.trim)


def _edit(weights: HeadWeights, layer: int, part: Part, index: int, aims: list[Tensor], settings: RahSettings) -> Edit:
    difference = torch.stack(aims).mean(dim=0) - weights.slice(layer, part, index).float()
    return Edit(layer, part, index, *low_rank(difference, settings.max_rank))
