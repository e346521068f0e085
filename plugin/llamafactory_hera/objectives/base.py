"""What an alignment objective is, what it is given, and the registry that finds it by name."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch
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


@dataclass(frozen=True)
class PooledBatch:
    """The global batch: one vector a sample and target. Rows that are not valid hold zeros.

    Attributes:
        z: ``[n_targets, N, D]`` in fp32, with gradient.
        everything: ``[n_targets, M, D]``: ``z``, and remembered representations behind it.
        teacher: ``[N, D_teacher]`` in fp32.
        valid: Boolean ``[N]``: the sample has an image and pooled tokens.
        candidates: Whom each sample is compared with, and its neighbours in the teacher's space.
        normalize: Cosine similarity when true, dot product otherwise.
    """

    z: Tensor
    everything: Tensor
    teacher: Tensor
    valid: Tensor
    candidates: Candidates
    normalize: bool = True


@dataclass(frozen=True)
class PatchBatch:
    """The samples of one process: a vector for each visual token. Rows that are not valid hold zeros.

    Attributes:
        z: ``[n_targets, B, T, D]`` in fp32, with gradient; the T tokens of an image are a square grid, row by row.
        teacher: ``[B, h, w, D_teacher]`` in fp32.
        valid: Boolean ``[B]``: the sample has an image.
    """

    z: Tensor
    teacher: Tensor
    valid: Tensor


class Objective(nn.Module, ABC):
    """A loss between representations of the student and features of the teacher, and what it trains for that.

    Its parameters are kept apart from the model: they have an optimizer of their own, are saved for resuming, and are
    in no exported model.

    Args:
        options: What it is made for.
    """

    #: ``pooled``: the global batch (:class:`PooledBatch`), gathered over processes with gradient, the same on each.
    #: ``patches``: visual tokens of the samples of a process (:class:`PatchBatch`).
    view: ClassVar[Literal["pooled", "patches"]] = "pooled"
    #: What can be aligned with it: ``head``, ``layer``.
    granularities: ClassVar[tuple[str, ...]] = ("head", "layer")
    #: Samples are compared with candidates: ``hera_k`` and ``hera_memory`` have a meaning.
    uses_candidates: ClassVar[bool] = False
    #: Samples with an image below which the term is 0.
    least_samples: ClassVar[int] = 1
    #: Names of :meth:`values`.
    logged: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """The loss.

        Args:
            batch: :class:`PooledBatch` or :class:`PatchBatch`, by :attr:`view`.

        Returns:
            ``[n_targets]`` for a pooled batch; ``[n_targets, B]``, of each sample, for visual tokens.
        """

    def entering(self, batch: PooledBatch) -> Tensor:
        """Which samples of a pooled batch enter the loss, boolean ``[N]``."""
        return batch.valid & (batch.valid.sum() >= self.least_samples)

    def comparable(self, batch: PooledBatch) -> bool:
        """Whether every sample that enters must get a gradient."""
        return bool(self.entering(batch).any())

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
