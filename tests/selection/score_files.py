"""Score files of a made-up model."""

import json
import math
from pathlib import Path

from llamafactory_hera.selection.scores import choose_targets


def write_scores(path: Path, scores: list[list[float]], layers: list[str] | None = None, **provenance) -> Path:
    """A file as selection writes it, of the worst two heads or of given layers; NaN becomes null."""
    shown = {
        "model": "some/model",
        "teacher": "facebook/dinov2-large",
        "dataset": "captions",
        "model_fingerprint": "a" * 64,
        "teacher_fingerprint": "b" * 64,
        "samples_digest": "c" * 64,
        "samples": 1000,
        "mode": "llm",
        "k": 10,
        "pooling": "answer",
        "similarity": "cosine",
        "strategy": "worst",
        "m": 2,
        "chance_level": 0.01,
        "layer_scores": [0.2] * len(scores),
        "scores": [[None if math.isnan(score) else score for score in row] for row in scores],
    }
    chosen = (
        {"heads": [str(head) for head in choose_targets(scores, "worst", 2)]} if layers is None else {"layers": layers}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**chosen, "provenance": shown | provenance}))
    return path
