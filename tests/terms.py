"""HeRA's term at a temperature that is given with each batch, as a tensor of any origin."""

from torch import Tensor

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.objectives import Options
from llamafactory_hera.objectives.contrastive import Contrastive
from llamafactory_hera.training.memory import CrossBatchMemory
from llamafactory_hera.training.term import HeraTerm, TermOutput


class _AtTemperature(Contrastive):
    given: Tensor

    def temperature(self) -> Tensor:
        return self.given


class ContrastiveTerm(HeraTerm):
    """The term of the contrastive objective."""

    def __init__(self, k: int, normalize: bool = True, memory: CrossBatchMemory | None = None) -> None:
        memory = CrossBatchMemory(0) if memory is None else memory
        super().__init__(
            _AtTemperature(Options(HeraConfig(heads="L0H0"), n_targets=1, dim=1, teacher_dim=1)), k, normalize, memory
        )

    def __call__(
        self, representations: Tensor, teacher: Tensor, valid: Tensor, temperature: Tensor, n_rows: int | None = None
    ) -> TermOutput:
        self.objective.given = temperature
        return super().__call__(representations, teacher, valid, n_rows)
