"""Options for objectives, and a HeRA term that receives its temperature with each batch."""

from typing import Any

from torch import Tensor

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.objectives import Options
from llamafactory_hera.objectives.contrastive import Contrastive
from llamafactory_hera.training.memory import CrossBatchMemory
from llamafactory_hera.training.term import HeraTerm, TermOutput


def options(
    n_targets: int = 1, dim: int = 1, teacher_dim: int = 1, side: int = 0, initializer_range: float = 0.02, **keys: Any
) -> Options:
    """Makes options with the given sizes and ``hera_*`` keys."""
    return Options(HeraConfig(heads="L0H0", **keys), n_targets, dim, teacher_dim, side, initializer_range)


class ContrastiveTerm(HeraTerm):
    """The contrastive HeRA term; each call sets the temperature."""

    def __init__(self, k: int, normalize: bool = True, memory: CrossBatchMemory | None = None) -> None:
        memory = CrossBatchMemory(0) if memory is None else memory
        objective = Contrastive(options())
        del objective.log_temperature  # each call sets it to a tensor, which a parameter would not allow
        super().__init__(objective, k, normalize, memory)

    def __call__(
        self, representations: Tensor, teacher: Tensor, valid: Tensor, temperature: Tensor, n_rows: int | None = None
    ) -> TermOutput:
        self.objective.log_temperature = temperature.log()
        return super().__call__(representations, teacher, valid, n_rows)
