"""What an alignment objective is, what it is given, and the registry that finds it by name."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch
from numpy.random import SeedSequence
from torch import Tensor, nn

from ..alignment.neighbors import Candidates


@dataclass(frozen=True)
class Options:
    """What an objective is made for."""

    n_targets: int  #: Heads or layers that are aligned.
    dim: int  #: Size of a representation.
    teacher_dim: int  #: Size of a teacher's feature.
    temperature: float = 0.07  #: The initial one of a softmax.
    learn_temperature: bool = True
    projector: Literal["shared", "separate"] = "shared"  #: `hera_projector`.
    side: int = 0  #: Tokens along a side of an image's grid, for views other than ``pooled``.
    initializer_range: float = 0.02  #: The language model's own.
    visual_attention: Literal["causal", "two_way"] = "causal"  #: `hera_visual_attention`.
    weight: float = 1.0  #: `hera_weight`; 0 in a run that only keeps what an objective does to the forward pass.


@dataclass(frozen=True)
class PooledBatch:
    """The global batch: one vector a sample and target. Rows that are not valid hold zeros.

    Attributes:
        z: ``[n_targets, N, D]`` in fp32, with gradient.
        everything: ``[n_targets, M, D]``: ``z``, and remembered representations behind it.
        teacher: ``[N, D_teacher]`` in fp32.
        valid: Boolean ``[N]``: the sample has an image and pooled tokens.
        candidates: Whom each sample is compared with, and its neighbors in the teacher's space.
        normalize: Cosine similarity when true, dot product otherwise.
    """

    z: Tensor
    everything: Tensor
    teacher: Tensor
    valid: Tensor
    candidates: Candidates
    normalize: bool = True


@dataclass(frozen=True)
class TokenBatch:
    """The samples of one process: vectors of visual tokens. Rows that are not valid hold zeros.

    Attributes:
        tokens: ``[n_targets, B, t, X]`` in fp32, with gradient: outputs of layers (X = D), or of heads before their
            output projection (X = ``head_dim``); the T tokens of an image, row by row, or those that a plan names.
        projections: ``[n_targets, head_dim, D]``, with gradient, the heads' part of the output projection; None for
            layers, whose tokens are the representations themselves.
        teacher: ``[B, T, D_teacher]`` in fp32: what the teacher makes of the same place of the same pixels.
        valid: Boolean ``[B]``: the sample enters.
        facts: Those of the plan.
    """

    tokens: Tensor
    projections: Tensor | None
    teacher: Tensor
    valid: Tensor
    facts: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, target: int, layer: nn.Linear) -> Tensor:
        """What ``layer`` makes of a target's representations ``[B, t, D]``, which are never formed for a head.

        A head's representation is ``o W`` (paper, eq. 7), so the layer's weight is folded into ``W``: of D values a
        token there are only the ``head_dim`` of ``o``.
        """
        if self.projections is None:
            return layer(self.tokens[target])
        folded = layer.weight @ self.projections[target].T  # [out, head_dim]
        return nn.functional.linear(self.tokens[target], folded, layer.bias)


@dataclass(frozen=True)
class Step:
    """What :meth:`Objective.prepare` is told of a micro-batch, before its forward pass.

    Attributes:
        input_ids: ``[B, L]``.
        attention_mask: Boolean ``[B, L]``: not padding.
        positions: ``[B, T]``, of the tokens of each sample's image; anything where not valid.
        valid: Boolean ``[B]``: the sample has an image.
        side: Tokens along a side of an image's grid.
        seed: The run's.
        rank: This process.
        number: Of the micro-batch, counted from the run's begin, over resuming.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    valid: Tensor
    side: int
    seed: int
    rank: int
    number: int

    def generator(self, shared: bool = False) -> torch.Generator:
        """A generator on the CPU for this micro-batch: of this process, or, ``shared``, the same on all."""
        entropy = (self.seed, self.number, 0 if shared else 1 + self.rank)
        return torch.Generator().manual_seed(int(SeedSequence(entropy).generate_state(1)[0]))


@dataclass(frozen=True)
class Plan:
    """How an objective wants the forward pass to run; None leaves a part as it is.

    Attributes:
        positions: ``[B, t]``, tokens to read instead of the whole image.
        attention: Boolean ``[B, L, L]``: which token (row) sees which, in all layers, instead of the causal mask.
        embeddings: Positions ``[B, p]`` and the vector ``[D]`` that stands there instead of the token's embedding; a
            position of -1 is none.
        valid: Boolean ``[B]``, which samples enter.
        facts: Tensors for :meth:`Objective.forward`.
        nobody: No sample enters, whatever ``valid`` says: the teacher need not look at any.
    """

    positions: Tensor | None = None
    attention: Tensor | None = None
    embeddings: tuple[Tensor, Tensor] | None = None
    valid: Tensor | None = None
    facts: dict[str, Tensor] = field(default_factory=dict)
    nobody: bool = False


class Objective(nn.Module, ABC):
    """A loss between representations of the student and features of the teacher, and what it trains for that.

    Its parameters are kept apart from the model: they have an optimizer of their own, are saved for resuming, and are
    in no exported model.

    Args:
        options: What it is made for.
    """

    #: ``pooled``: the global batch (:class:`PooledBatch`), gathered over processes with gradient, the same on each.
    #: ``patches``, ``latents``: visual tokens of the samples of a process (:class:`TokenBatch`), against the patch
    #: features of a vision model, or the latents of a diffusers autoencoder, of the pixels that the student sees.
    view: ClassVar[Literal["pooled", "patches", "latents"]] = "pooled"
    #: What can be aligned with it: ``head``, ``layer``.
    granularities: ClassVar[tuple[str, ...]] = ("head", "layer")
    #: Samples are compared with candidates: ``hera_k`` and ``hera_memory`` have a meaning.
    uses_candidates: ClassVar[bool] = False
    #: Samples with an image below which the term is 0.
    least_samples: ClassVar[int] = 1
    #: Names of :meth:`values`.
    logged: ClassVar[tuple[str, ...]] = ()
    #: Optimizer steps at a rate above 0 in which the student gets no gradient at the start, and that is no fault.
    silent_steps: ClassVar[int] = 0
    #: Its plan changes the attention: with eager attention and sdpa alone, and no sliding windows.
    plans_attention: ClassVar[bool] = False
    #: A sample with several images is refused.
    one_image: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """The loss.

        Args:
            batch: :class:`PooledBatch` or :class:`TokenBatch`, by :attr:`view`.

        Returns:
            ``[n_targets]`` for a pooled batch; ``[n_targets, B]``, of each sample, for visual tokens.
        """

    def prepare(self, step: Step) -> Plan | None:
        """Changes the next forward pass, if the objective must; on visual tokens alone.

        Called in the training process, on every rank, before each forward pass. What the plan holds may carry
        gradient.
        """
        return None

    def entering(self, batch: PooledBatch) -> Tensor:
        """Which samples of a pooled batch enter the loss, boolean ``[N]``."""
        return batch.valid & (batch.valid.sum() >= self.least_samples)

    def comparable(self, batch: PooledBatch) -> Tensor:
        """Whether every sample that enters must get a gradient, a boolean scalar."""
        return self.entering(batch).any()

    def values(self) -> dict[str, float]:
        """Numbers worth logging, by their names in the log."""
        return {}


_REGISTRY: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Makes an objective known by the name that ``hera_objective`` gives; each name is given once."""

    def add(objective: type[Objective]) -> type[Objective]:
        if name in _REGISTRY:
            raise ValueError(f"hera_objective: {name!r} is {_REGISTRY[name].__name__} already; choose another name.")
        _REGISTRY[name] = objective
        return objective

    return add


def names() -> tuple[str, ...]:
    """The names of all objectives that come with the package."""
    return tuple(_REGISTRY)


def find(name: str) -> type[Objective]:
    """The class of an objective: one of the registered names, or ``my_package.my_module:MyObjective``."""
    if ":" in name:
        return _imported(name)
    if name not in _REGISTRY:
        raise ValueError(
            f"hera_objective: {name!r} is unknown; choose one of {', '.join(names())}, or name a class of your own as "
            "my_package.my_module:MyObjective."
        )
    return _REGISTRY[name]


def _imported(name: str) -> type[Objective]:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` does: a module beside the recipe needs no installing
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # the module is the user's: it may raise anything
        raise ValueError(
            f"hera_objective: {name!r} cannot be imported ({error}); write module:Class of a module that is "
            "installed, in the working directory, or on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(
            f"hera_objective: {name!r} is not an objective; make it a subclass of "
            "llamafactory_hera.objectives.Objective."
        )
    return found


def create(name: str, options: Options, seed: int = 0) -> Objective:
    """Makes an objective; its initial values depend on the seed alone, and no other random number is touched."""
    objective = find(name)
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which seeds the accelerators too
        torch.default_generator.manual_seed(seed)
        return objective(options)
