"""Objectives on the visual tokens of an image, which are compared with the teacher's features of the same places."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from numpy.random import SeedSequence
from torch import Tensor, nn

from .base import Objective


@dataclass(frozen=True)
class TokenBatch:
    """The visual tokens of the samples on one process. Rows that are not valid hold zeros.

    Attributes:
        tokens: ``[n_targets, B, t, X]`` in fp32, with gradient: the outputs of layers (X = D), or of heads before
            their output projection (X = ``head_dim``), at the tokens of an image, row by row, or at those of a plan.
        projections: ``[n_targets, head_dim, D]`` with gradient, each head's part of the output projection; None for
            layers, whose tokens are the representations themselves.
        teacher: ``[B, T, D_teacher]`` in fp32, the teacher's features of the same places of the same pixels.
        valid: Boolean ``[B]``: the sample enters the loss.
        context: The tensors of the plan.
    """

    tokens: Tensor
    projections: Tensor | None
    teacher: Tensor
    valid: Tensor
    context: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, target: int, layer: nn.Linear) -> Tensor:
        """Applies ``layer`` to a target's representations, ``[B, t, out]``, without forming them for a head.

        A head's representation is ``o W`` (paper, eq. 7), so the weight of the layer is folded into ``W``: a token
        costs the ``head_dim`` values of ``o`` instead of D.
        """
        if self.projections is None:
            return layer(self.tokens[target])
        folded = layer.weight @ self.projections[target].T  # [out, head_dim]
        return nn.functional.linear(self.tokens[target], folded, layer.bias)


@dataclass(frozen=True)
class Step:
    """A micro-batch before its forward pass, as :meth:`TokenObjective.prepare` sees it.

    Attributes:
        input_ids: ``[B, L]``.
        attention_mask: Boolean ``[B, L]``: not padding.
        positions: ``[B, T]``, the positions of the tokens of each sample's image; anything where not valid.
        valid: Boolean ``[B]``: the sample has an image.
        n_images: ``[B]``, how many images the sample has.
        side: Tokens along each side of an image's grid.
        seed: The seed of the run.
        rank: This process.
        number: The number of the micro-batch since the beginning of the run, resumed runs included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    valid: Tensor
    n_images: Tensor
    side: int
    seed: int
    rank: int
    number: int

    def generator(self, shared: bool = False) -> torch.Generator:
        """Makes a CPU generator for this micro-batch: of this process, or, if ``shared``, equal on all processes."""
        entropy = (self.seed, self.number, 0 if shared else 1 + self.rank)
        return torch.Generator().manual_seed(int(SeedSequence(entropy).generate_state(1)[0]))


@dataclass(frozen=True)
class Plan:
    """What an objective reads from the next forward pass; None keeps the default.

    Attributes:
        positions: ``[B, t]``, the tokens to read instead of the whole image.
        valid: Boolean ``[B]``, the samples that enter the loss.
        context: Tensors for :meth:`TokenObjective.forward`.
    """

    positions: Tensor | None = None
    valid: Tensor | None = None
    context: dict[str, Tensor] = field(default_factory=dict)


class TokenObjective(Objective):
    """An objective on visual tokens; its samples are those of one process and are not gathered."""

    reads: ClassVar[tuple[str, ...]] = ("hera_teacher_cache", "hera_objective_lr", "hera_objective_from")
    #: The class that loads and checks the teacher; None for a vision model (``teachers.encoder.VisionTeacher``).
    teacher_class: ClassVar[Any] = None

    @classmethod
    def check_model(cls, model_config: Any, attention: str | None) -> None:
        """Refuses a model on which the objective cannot run.

        Args:
            model_config: The configuration of the model.
            attention: Its attention implementation, as transformers names it; None if it is not known yet.

        Raises:
            ValueError: Names the problem and the remedy.
        """

    def attach(self, model: nn.Module) -> None:
        """Gets the model before any engine wraps it; an objective that changes forward passes hooks it here."""

    def detach(self) -> None:
        """Removes the hooks at the end of the run."""

    def prepare(self, step: Step) -> Plan | None:
        """Decides what to read from the next forward pass; called on every process before each of them."""
        return None
