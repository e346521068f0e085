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

    They are those of an image, row by row, or of a :class:`Plan`: outputs of layers (X = D), or of heads before their
    output projection (X = ``head_dim``).
    """

    tokens: Tensor  #: ``[n_targets, B, t, X]`` in fp32, with gradient
    projections: Tensor | None  #: ``[n_targets, head_dim, D]``, each head's part of the output projection, for heads
    teacher: Tensor  #: ``[B, T, D_teacher]`` in fp32, the teacher's features of the same places of the same pixels
    valid: Tensor  #: boolean ``[B]``: the sample enters the loss
    context: dict[str, Tensor] = field(default_factory=dict)  #: the tensors of the plan

    def linear(self, target: int, layer: nn.Linear) -> Tensor:
        """Applies ``layer`` to a target's representations, ``[B, t, out]``, without forming them for a head."""
        if self.projections is None:
            return layer(self.tokens[target])
        # a representation is o W (paper, eq. 7); folding W into the layer leaves head_dim values a token instead of D
        folded = layer.weight @ self.projections[target].T  # [out, head_dim]
        return nn.functional.linear(self.tokens[target], folded, layer.bias)


@dataclass(frozen=True)
class Step:
    """A micro-batch before its forward pass, which :meth:`TokenObjective.prepare` receives."""

    input_ids: Tensor  #: ``[B, L]``
    attention_mask: Tensor  #: boolean ``[B, L]``: not padding
    positions: Tensor  #: ``[B, T]``, the tokens of each sample's image; arbitrary for a sample that is not valid
    valid: Tensor  #: boolean ``[B]``: the sample has an image
    n_images: Tensor  #: ``[B]``, the number of images of the sample
    side: int  #: tokens along each side of an image's grid
    seed: int  #: the seed of the run
    rank: int  #: the number of this process
    number: int  #: the number of the micro-batch since the beginning of the run, which resuming continues

    def generator(self, shared: bool = False) -> torch.Generator:
        """Makes a CPU generator for this micro-batch; if ``shared``, all processes make the same one."""
        entropy = (self.seed, self.number, 0 if shared else 1 + self.rank)
        return torch.Generator().manual_seed(int(SeedSequence(entropy).generate_state(1)[0]))


@dataclass(frozen=True)
class Plan:
    """The part of the next forward pass that an objective reads; None keeps the default."""

    positions: Tensor | None = None  #: ``[B, t]``, the tokens to read instead of all tokens of the image
    valid: Tensor | None = None  #: boolean ``[B]``, the samples that enter the loss
    context: dict[str, Tensor] = field(default_factory=dict)  #: tensors for :meth:`TokenObjective.forward`


class TokenObjective(Objective):
    """An objective on visual tokens; its samples are those of one process and are not gathered."""

    reads: ClassVar[tuple[str, ...]] = ("hera_teacher_cache", "hera_objective_lr", "hera_objective_from")
    #: The class that loads and checks the teacher; None for a vision model (``teachers.encoder.VisionTeacher``).
    teacher_class: ClassVar[Any] = None

    @classmethod
    def check_model(cls, model_config: Any, attention: str | None) -> None:
        """Raises ``ValueError`` if the objective cannot run on a model of this configuration.

        ``attention`` is the attention implementation, as transformers names it; None if it is not known yet.
        """

    def attach(self, model: nn.Module) -> None:
        """Receives the model before an engine wraps it; an objective that changes forward passes hooks it here."""

    def detach(self) -> None:
        """Removes the hooks at the end of the run."""

    def prepare(self, step: Step) -> Plan | None:
        """Plans the next forward pass; every process calls it before each of them."""
        return None
