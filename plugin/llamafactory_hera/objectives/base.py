"""The base class of alignment objectives, their inputs, and the registry that finds them by name."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..alignment.neighbors import Candidates

#: A package whose modules register further objectives. Only ``names`` imports it.
_RIVALS = "llamafactory_hera.rivals"


@dataclass(frozen=True)
class Options:
    """The sizes and settings from which an objective is created."""

    config: Any  #: the ``hera_*`` keys, a ``HeraConfig``
    n_targets: int  #: number of heads or layers to align
    dim: int  #: size D of a representation
    teacher_dim: int  #: size of a teacher feature
    side: int = 0  #: tokens along each side of an image's grid; 0 for an objective on pooled vectors
    initializer_range: float = 0.02  #: the language model's initializer_range


@dataclass(frozen=True)
class PooledBatch:
    """The global batch of N samples, with one vector per sample and target; zeros for invalid samples.

    All processes have the same batch; n consecutive samples belong to each process.
    """

    z: Tensor  #: ``[n_targets, N, D]`` in fp32; a backward pass sends its gradients to the samples' processes
    z_all: Tensor  #: ``[n_targets, M, D]``: ``z``, followed by remembered representations
    teacher: Tensor  #: ``[N, D_teacher]`` in fp32
    valid: Tensor  #: boolean ``[N]``, true if the sample has an image and pooled tokens
    rows: slice  #: the n samples of this process
    own: Tensor  #: ``[n_targets, n, D]``: ``z[:, rows]``, but with gradients that never leave this process
    candidates: Candidates  #: the candidates of each of the n samples, and its neighbors in the teacher's space
    normalize: bool  #: true for cosine similarity, false for the dot product


class Objective(nn.Module, ABC):
    """A loss between the student's representations and the teacher's features, with its own parameters."""

    #: The supported values of ``hera_granularity``.
    granularities: ClassVar[tuple[str, ...]] = ("head", "layer")
    #: The keys of ``config.OBJECTIVE_KEYS`` that the objective reads. A run that sets the others prints a warning.
    reads: ClassVar[tuple[str, ...]] = (
        "hera_k",
        "hera_pooling",
        "hera_similarity",
        "hera_teacher_cache",
        "hera_objective_lr",
        "hera_objective_from",
    )
    #: The smallest number of samples with an image; with fewer, the term is 0.
    least_samples: ClassVar[int] = 1
    #: The names that ``values`` returns.
    logged: ClassVar[tuple[str, ...]] = ()
    #: The number of optimizer steps with a learning rate above 0 before the student can receive a gradient.
    silent_steps: ClassVar[int] = 0

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """Computes losses from a ``PooledBatch`` or a ``TokenBatch``.

        Returns ``[n_targets, n]``, the losses of this process's samples, 0 for a sample outside ``entering``. The run
        averages them over all samples that enter. If the loss of a ``PooledBatch`` is not such a mean, returns
        ``[n_targets]``, the loss of the global batch, which every process must compute in the same way.
        """

    def entering(self, batch: PooledBatch) -> Tensor:
        """Returns which samples of this process enter the loss of a pooled batch, boolean ``[n]``."""
        return batch.valid[batch.rows] & (batch.valid.sum() >= self.least_samples)

    def gradient_expected(self, batch: PooledBatch) -> Tensor:
        """Returns a boolean scalar: whether the backward pass must reach this process's samples in the loss."""
        return self.entering(batch).any()

    def values(self) -> dict[str, float]:
        """Returns the values to log, by name."""
        return {}


_REGISTRY: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Registers a class under a name for ``hera_objective``; each name can be registered only once."""

    def add(objective: type[Objective]) -> type[Objective]:
        if name in _REGISTRY:
            raise ValueError(f"hera_objective: {name!r} is taken by {_REGISTRY[name].__name__}; choose another name.")
        _REGISTRY[name] = objective
        return objective

    return add


def names() -> tuple[str, ...]:
    """Lists the names of all registered objectives, including those of ``rivals``."""
    for module in iter_modules(import_module(_RIVALS).__path__):
        import_module(f"{_RIVALS}.{module.name}")
    return tuple(sorted(_REGISTRY))


def find(name: str) -> type[Objective]:
    """Finds the class of an objective by its name or by ``module:Class``, or raises ``ValueError``."""
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in _REGISTRY and name not in (known := names()):
            raise ValueError(
                f"hera_objective: {name!r} is unknown; choose one of {', '.join(known)}, or give your own class as "
                "my_package.my_module:MyObjective."
            )
        return _REGISTRY[name]
    try:
        found = getattr(_module(module), attribute)
        if not issubclass(found, Objective):
            raise TypeError("it is not a subclass of llamafactory_hera.objectives.Objective")
    except Exception as error:  # user code may raise anything
        raise ValueError(
            f"hera_objective: {name!r} cannot be used ({error}); give module:Class for a module that is "
            "installed, on PYTHONPATH, or below the working directory."
        ) from error
    return found


def _module(name: str) -> ModuleType:
    """Imports an installed module or one below the working directory, without changing sys.path."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        file = Path(*name.split(".")).with_suffix(".py")
        spec = spec_from_file_location(name, file) if file.is_file() else None
        if spec is None or spec.loader is None or error.name not in (name, name.partition(".")[0]):
            raise
        module = sys.modules[name] = module_from_spec(spec)  # the next call must find the same class
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


def create(name: str, options: Options, seed: int = 0) -> Objective:
    """Creates an objective; its initial values depend only on the seed, and the global random state is unchanged."""
    objective = find(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators, too
        return objective(options)
