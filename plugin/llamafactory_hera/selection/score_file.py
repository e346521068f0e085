"""A file of head scores, as selection and scoring write it, read back for tables and pictures."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..heads.head_set import HeadId, HeadSet
from .strategies import ranking


@dataclass(frozen=True)
class ScoreFile:
    """The scores in a ``heads.json``.

    Attributes:
        path: The file.
        heads: The heads that were chosen.
        provenance: All that is said of the selection.
        scores: MKNN ``[L][H]``, NaN where a head could not be scored.
        layer_scores: MKNN of each layer's own output, ``[L]``.
    """

    path: Path
    heads: tuple[HeadId, ...]
    provenance: dict[str, Any]
    scores: list[list[float]]
    layer_scores: list[float]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ScoreFile":
        """Reads a file.

        Raises:
            ValueError: It is missing, or holds no scores.
        """
        heads = HeadSet.load(path, key="scores")
        provenance = heads.provenance
        if not provenance.get("scores"):
            raise ValueError(
                f"scores: {path} names heads and holds no scores; make one with `llamafactory-hera score`."
            )
        return cls(
            Path(path),
            heads.heads,
            provenance,
            [[math.nan if score is None else score for score in row] for row in provenance["scores"]],
            [math.nan if score is None else score for score in provenance["layer_scores"]],
        )

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
        """How the heads were chosen."""
        return self.provenance["strategy"]

    @property
    def broken(self) -> list[HeadId]:
        """Heads without a score."""
        return [
            HeadId(layer, head)
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
