"""The methods that are compared: each is a row of keys for the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..selection.score_file import ScoreFile
from ..selection.settings import Strategy
from ..selection.strategies import choose_heads

Weight = Literal["paper", "chosen", "own"]

PAPER_WEIGHT = 0.01


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        label: Its name in tables.
        heads: How heads are selected and how many; None where the method has no heads.
        weight: The weight of the loss: the paper's, the one chosen on the validation split, or the method's own
            (among ``keys``).
        keys: Further ``hera_*`` keys; None for plain fine-tuning.
        stages: Stages that use the method; the others are plain.
    """

    label: str
    heads: tuple[Strategy, int] | None = None
    weight: Weight = "chosen"
    keys: dict[str, Any] | None = field(default_factory=dict)
    stages: tuple[int, ...] = (1, 2)

    @property
    def plain(self) -> bool:
        """Whether no alignment loss is used at all."""
        return self.keys is None

    def hera_keys(
        self, weight: Callable[[], float], select: Callable[[Strategy, int], Sequence[str]]
    ) -> dict[str, Any]:
        """The ``hera_*`` keys of a run.

        Args:
            weight: Gives the weight that was chosen on the validation split; asked only by methods that take it.
            select: From a strategy and a number to the names of heads.
        """
        found: dict[str, Any] = dict(self.keys or {})
        if self.weight != "own":
            found["hera_weight"] = PAPER_WEIGHT if self.weight == "paper" else weight()
        if self.heads is not None:
            found["hera_heads"] = ",".join(select(*self.heads))
        return found


#: The first is what the others are compared with.
METHODS: dict[str, Method] = {
    "sft": Method("SFT", weight="own", keys=None),
    "worst5_paper": Method("HeRA worst-5, paper's weight", ("worst", 5), "paper"),
    "worst5": Method("HeRA worst-5", ("worst", 5)),
    "top5": Method("HeRA top-5", ("top", 5)),
    "random5": Method("HeRA random-5", ("random", 5)),
    "worst1": Method("HeRA worst-1", ("worst", 1)),
    "worst10": Method("HeRA worst-10", ("worst", 10)),
    "layer": Method("contrastive, middle layer", keys={"hera_granularity": "layer", "hera_layers": "middle"}),
    "viral": Method(
        "VIRAL",
        weight="own",
        keys={
            "hera_objective": "viral",
            "hera_granularity": "layer",
            "hera_layers": "middle",
            "hera_weight": 0.5,
            "hera_teacher_cache": None,  # it keeps one vector an image, and VIRAL needs those of the patches
        },
        stages=(2,),
    ),
    "cmar": Method("CMAR", keys={"hera_objective": "cka", "hera_granularity": "layer", "hera_layers": "penultimate"}),
}
BASELINE = "sft"
#: The method whose weight is chosen on the validation split.
TUNED = "worst5"


def ranked_heads(scores: Path, seed: int, strategy: Strategy, m: int) -> list[str]:
    """The heads that a strategy takes by the scores of a selection."""
    return [str(head) for head in choose_heads(ScoreFile.load(scores).scores, strategy, m, seed)]
