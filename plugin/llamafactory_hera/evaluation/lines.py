"""Files of JSON lines that are appended to."""

import json
import os
from pathlib import Path
from typing import Any


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """The lines of a file that is appended to; one that a killed process left half is left out."""
    found = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
