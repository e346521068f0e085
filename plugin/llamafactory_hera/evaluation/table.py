"""The table of one or several evaluated models."""

from collections.abc import Mapping
from pathlib import Path


def write_table(output: Path, folders: Mapping[str, Path], suite: str, paper: str | None = None) -> list[Path]:
    """Writes ``<suite>.md``, ``.json`` and ``.png`` into ``output`` and returns their paths.

    Args:
        folders: Name of a model -> the folder with its ``<task>/result.json``; differences are to the first.
        suite: Whose tasks are the rows; one without a result, or with a limited one, stays empty.
        paper: The backbone of the paper's columns, for instance qwen3_8b; none by default.

    Raises:
        ValueError: The paper has no such backbone; names those that it has.
    """
    return []
