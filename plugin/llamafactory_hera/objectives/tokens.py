"""Objectives that compare the visual tokens of an image with the teacher's features at the same places."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from numpy.random import SeedSequence
from torch import Tensor, nn

from .base import Objective


@dataclass(frozen=True)
class TokenBatch:
    """The visual tokens of the samples on one process; zeros for invalid samples."""

    #: ``[n_targets, B, t, X]`` in fp32, with gradients: all tokens of an image, row by row, or a plan's
    #: tokens. Each is an output of a layer (X = D), or of a head before the output projection (X = ``head_dim``).
    tokens: Tensor
    projections: Tensor | None  #: ``[n_targets, head_dim, D]``, the heads' output projections; None for layers
    teacher: Tensor  #: ``[B, T, D_teacher]`` in fp32, the teacher's features at the same places
    valid: Tensor  #: boolean ``[B]``, true if the sample enters the loss
    context: dict[str, Tensor] = field(default_factory=dict)  #: the tensors of the plan

    def linear(self, target: int, layer: nn.Linear) -> Tensor:
        """Applies ``layer`` to a target's representations, ``[B, t, out]``, without computing those of a head."""
        if self.projections is None:
            return layer(self.tokens[target])
        # a representation is o W (paper, eq. 7); with W folded into the layer, a token has head_dim values, not D
        folded = layer.weight @ self.projections[target].T  # [out, head_dim]
        return nn.functional.linear(self.tokens[target], folded, layer.bias)


@dataclass(frozen=True)
class Step:
    """A micro-batch before its forward pass, the input of ``TokenObjective.prepare``."""

    input_ids: Tensor  #: ``[B, L]``
    attention_mask: Tensor  #: boolean ``[B, L]``, false for padding
    positions: Tensor  #: ``[B, T]``, the token positions of each sample's image; arbitrary if the sample is not valid
    valid: Tensor  #: boolean ``[B]``, true if the sample has an image
    n_images: Tensor  #: ``[B]``, the number of images of the sample
    side: int  #: tokens along each side of an image's grid
    seed: int  #: the seed of the run
    rank: int  #: the rank of this process
    number: int  #: the number of the micro-batch since the start of the run; a resumed run continues the count

    def generator(self, shared: bool = False) -> torch.Generator:
        """Creates a CPU generator for this micro-batch; if ``shared``, it is the same on all processes."""
        entropy = (self.seed, self.number, 0 if shared else 1 + self.rank)
        return torch.Generator().manual_seed(int(SeedSequence(entropy).generate_state(1)[0]))


@dataclass(frozen=True)
class Plan:
    """The tokens and samples that an objective chooses for the next forward pass; None keeps the default."""

    positions: Tensor | None = None  #: ``[B, t]``, the token positions to read instead of all tokens of the image
    valid: Tensor | None = None  #: boolean ``[B]``, the samples that enter the loss
    context: dict[str, Tensor] = field(default_factory=dict)  #: tensors for ``TokenObjective.forward``


class TokenObjective(Objective):
    """An objective on visual tokens, computed on each process from its own samples."""

    reads: ClassVar[tuple[str, ...]] = ("hera_teacher_cache", "hera_objective_lr", "hera_objective_from")
    #: The class that loads and checks the teacher; None for a vision model (``teachers.encoder.VisionTeacher``).
    teacher_class: ClassVar[Any] = None

    @classmethod
    def check_model(cls, model_config: Any, attention: str | None) -> None:
        """Raises ``ValueError`` if a model with this configuration and attention (None if unknown) is unsuitable."""

    def attach(self, model: nn.Module) -> None:
        """Receives the model before an engine wraps it; override this to install hooks that change forward passes."""

    def detach(self) -> None:
        """Removes the hooks at the end of the run."""

    def prepare(self, step: Step) -> Plan | None:
        """Plans the next forward pass; every process calls this method before each forward pass."""
        return None
