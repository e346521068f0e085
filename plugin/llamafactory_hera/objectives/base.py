"""The base class of alignment objectives, their input, and the registry that finds them by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..alignment.neighbors import Candidates

if TYPE_CHECKING:
    from ..config import HeraConfig

#: A package whose modules register further objectives. Only :func:`find` imports it, by name.
_SHELF = "llamafactory_hera.rivals"


@dataclass(frozen=True)
class Options:
    """The sizes and settings that an objective is made from."""

    config: "HeraConfig"
    n_targets: int  #: number of heads or layers that are aligned
    dim: int  #: size D of a representation
    teacher_dim: int  #: size of a teacher feature
    side: int = 0  #: tokens along each side of an image's grid; 0 for an objective on pooled vectors
    initializer_range: float = 0.02  #: of the language model


@dataclass(frozen=True)
class PooledBatch:
    """The global batch of N samples, with one vector per sample and target. Rows that are not valid hold zeros."""

    z: Tensor  #: ``[n_targets, N, D]`` in fp32, with gradient
    z_all: Tensor  #: ``[n_targets, M, D]``: ``z``, followed by remembered representations
    teacher: Tensor  #: ``[N, D_teacher]`` in fp32
    valid: Tensor  #: boolean ``[N]``: the sample has an image and pooled tokens
    candidates: Candidates  #: the candidates of each sample, and its neighbors among them in the teacher's space
    normalize: bool = True  #: cosine similarity when true, dot product otherwise


class Objective(nn.Module, ABC):
    """A loss between the student's representations and the teacher's features, with the parameters it trains.

    The parameters are not part of the model: they have an optimizer of their own, and are saved for resuming alone.
    """

    #: The values of ``hera_granularity`` that it supports.
    granularities: ClassVar[tuple[str, ...]] = ("head", "layer")
    #: The keys of ``config.OBJECTIVE_KEYS`` that it reads. A run warns if it sets others.
    reads: ClassVar[tuple[str, ...]] = (
        "hera_k",
        "hera_pooling",
        "hera_similarity",
        "hera_teacher_cache",
        "hera_objective_lr",
        "hera_objective_from",
    )
    #: The term is 0 if fewer samples with an image are compared.
    least_samples: ClassVar[int] = 1
    #: The names of :meth:`values`.
    logged: ClassVar[tuple[str, ...]] = ()
    #: Optimizer steps, at a learning rate above 0, that may pass before the student receives its first gradient.
    silent_steps: ClassVar[int] = 0

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """Computes the loss of each target, ``[n_targets]``, from a :class:`PooledBatch`.

        A :class:`~.tokens.TokenObjective` receives a :class:`~.tokens.TokenBatch` and returns ``[n_targets, B]``.
        """

    def entering(self, batch: PooledBatch) -> Tensor:
        """Tells which samples of a pooled batch enter the loss, boolean ``[N]``."""
        return batch.valid & (batch.valid.sum() >= self.least_samples)

    def comparable(self, batch: PooledBatch) -> Tensor:
        """Tells whether every sample that enters must receive a gradient, a boolean scalar."""
        return self.entering(batch).any()

    def values(self) -> dict[str, float]:
        """Returns numbers worth logging, by their names in the log."""
        return {}


_REGISTRY: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Registers a class under a name that ``hera_objective`` accepts; a name can be given once."""

    def add(objective: type[Objective]) -> type[Objective]:
        if name in _REGISTRY:
            raise ValueError(f"hera_objective: {name!r} is {_REGISTRY[name].__name__} already; choose another name.")
        _REGISTRY[name] = objective
        return objective

    return add


def names() -> tuple[str, ...]:
    """Lists the names of all registered objectives, including those of the shelf."""
    for module in iter_modules(import_module(_SHELF).__path__):
        import_module(f"{_SHELF}.{module.name}")
    return tuple(sorted(_REGISTRY))


def find(name: str) -> type[Objective]:
    """Finds the class of an objective, or raises ``ValueError``.

    Args:
        name: A registered name, or ``my_package.my_module:MyObjective``. That module must be installed, on
            ``PYTHONPATH``, or below the working directory.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in _REGISTRY and name not in (known := names()):
            raise ValueError(
                f"hera_objective: {name!r} is unknown; choose one of {', '.join(known)}, or name your own class as "
                "my_package.my_module:MyObjective."
            )
        return _REGISTRY[name]
    try:
        found = getattr(_module(module), attribute)
        if not issubclass(found, Objective):
            raise TypeError("no subclass of llamafactory_hera.objectives.Objective")
    except Exception as error:  # user code may raise anything
        raise ValueError(
            f"hera_objective: {name!r} cannot be used ({error}); write module:Class for a module that is "
            "installed, on PYTHONPATH, or below the working directory."
        ) from error
    return found


def _module(name: str) -> ModuleType:
    """Imports a module; sys.path stays as it is, also for a file below the working directory."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        file = Path(*name.split(".")).with_suffix(".py")
        spec = spec_from_file_location(name, file) if file.is_file() else None
        if spec is None or spec.loader is None or error.name not in (name, name.partition(".")[0]):
            raise
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def create(name: str, options: Options, seed: int = 0) -> Objective:
    """Makes an objective; its initial values depend on the seed alone, and the global random state stays as it is."""
    objective = find(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators, too
        return objective(options)
