"""Updates of weight slices in factored form, and trying them out in place (RAH-LoRA, eq. 14)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..heads.targets import Target
from .weights import HeadWeights, Part


@dataclass(frozen=True)
class Edit:
    """The update of one slice, ``left @ right``, without its step size.

    Attributes:
        layer: Decoder layer.
        part: Which projection.
        index: Key-value head of a value slice, query head of an output slice.
        left: ``[m, r]`` in fp32.
        right: ``[r, n]`` in fp32.
    """

    layer: int
    part: Part
    index: int
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Update:
    """What is changed together, under one step size.

    With multi-head attention that is a head's value and output slice. A value block that several query heads share
    is changed only if all of them are targets, and then they are one update; else a head's output slice is.

    Attributes:
        heads: The targets.
        edits: Their slices; empty where target and anchors are equal.
    """

    heads: tuple[Target, ...]
    edits: tuple[Edit, ...]


@contextmanager
def applied(weights: HeadWeights, steps: Sequence[tuple[Update, float]]) -> Iterator[None]:
    """Changes the weights in place, ``W + alpha * left @ right``, and gives them back bit by bit.

    Args:
        weights: Of the model.
        steps: Updates with their step sizes.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for update, alpha in steps:
            for edit in update.edits:
                view = weights.slice(edit.layer, edit.part, edit.index)
                saved.append((view, view.clone()))
                view.copy_(view.float() + alpha * (edit.left @ edit.right))
        yield
    finally:
        for view, original in reversed(saved):
            view.copy_(original)
