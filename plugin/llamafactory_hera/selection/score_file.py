"""A file of scores, as selection and scoring write it, read back for tables and pictures."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..heads import Sites
from ..heads.head_set import HeadId, HeadSet
from ..heads.layer_set import LayerSet
from .strategies import ranking


@dataclass(frozen=True)
class ScoreFile:
    """The scores in a ``heads.json`` or a ``layers.json``; both hold those of all heads and layers.

    Attributes:
        path: The file.
        chosen: The heads or layers that were chosen.
        scores: MKNN ``[L][H]``, NaN where a head could not be scored.
        layer_scores: MKNN of each layer's own output, ``[L]``.
    """

    path: Path
    chosen: Sites
    scores: list[list[float]]
    layer_scores: list[float]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ScoreFile":
        """Reads a file.

        Raises:
            ValueError: It is missing, or holds no scores.
        """
        chosen = (LayerSet if _names_layers(path) else HeadSet).load(path, key="scores")
        provenance = chosen.provenance
        if not provenance.get("scores"):
            raise ValueError(
                f"scores: {path} names {chosen.WHAT} and holds no scores; make one with `llamafactory-hera score`."
            )
        return cls(
            Path(path),
            chosen,
            [[math.nan if score is None else score for score in row] for row in provenance["scores"]],
            [math.nan if score is None else score for score in provenance["layer_scores"]],
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """All that is said of the selection."""
        return self.chosen.provenance

    @property
    def n_samples(self) -> int:
        """Samples scored on."""
        return self.provenance["samples"]

    @property
    def k(self) -> int:
        """Neighbours per sample."""
        return self.provenance["k"]

    @property
    def chance(self) -> float:
        """The MKNN of unrelated features."""
        return self.provenance["chance_level"]

    @property
    def strategy(self) -> str:
        """How they were chosen."""
        return self.provenance["strategy"]

    @property
    def broken(self) -> list[str]:
        """Names of heads, or of layers where those were chosen, without a score."""
        if isinstance(self.chosen, LayerSet):
            return [f"L{layer}" for layer, score in enumerate(self.layer_scores) if math.isnan(score)]
        return [
            str(HeadId(layer, head))
            for layer, row in enumerate(self.scores)
            for head, score in enumerate(row)
            if math.isnan(score)
        ]

    def score(self, head: HeadId) -> float:
        """MKNN of a head."""
        return self.scores[head.layer][head.head]

    def ranking(self) -> list[HeadId]:
        """All heads with a score, least aligned first."""
        return ranking(self.scores)

    def by_name(self, what: str) -> dict[str, float]:
        """MKNN of all heads (``heads``) or layers' own outputs (``layers``) with a score, least aligned first."""
        if what == LayerSet.WHAT:
            layers = [head.layer for head in ranking([[score] for score in self.layer_scores])]
            return {f"L{layer}": self.layer_scores[layer] for layer in layers}
        return {str(head): self.score(head) for head in self.ranking()}


def _names_layers(path: str | os.PathLike) -> bool:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # what is wrong with the file is said where it is read
    return isinstance(content, dict) and LayerSet.WHAT in content
