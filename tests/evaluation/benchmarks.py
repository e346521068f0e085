"""The cases of ``benchmarks.yaml``."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image


class Case(NamedTuple):
    """Rows, the answers of a model, and what follows from them."""

    rows: list[dict[str, Any]]
    answers: list[str]
    prompt: str
    scores: dict[str, float]


def _case(rows: list[dict], images: dict[str, bool] | None = None, **expected: Any) -> Case:
    picture = Image.new("RGB", (8, 8), (200, 30, 30))
    columns = {name: picture if filled else None for name, filled in (images or {"image": True}).items()}
    return Case([row | columns for row in rows], **expected)


_ENTRIES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_bytes())
CASES = {name: _case(**entry) for name, entry in _ENTRIES.items()}
