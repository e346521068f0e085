"""The file that names what a run aligns, heads or layers, with its provenance."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from ..files import write_json


class SiteFile(ABC):
    """Reading and writing for a set of heads or of layers; the set itself is a frozen dataclass on top of it."""

    #: The key that names the set.
    KEY: ClassVar[str]
    #: The name of the set's file.
    FILE: ClassVar[str]
    #: What it names, also the key of the list in the file.
    WHAT: ClassVar[str]
    #: Such names, for messages.
    EXAMPLE: ClassVar[str]

    names: tuple[str, ...]
    provenance: dict[str, Any]

    @classmethod
    @abstractmethod
    def parse(cls, text: str | Iterable[str], key: str | None = None) -> Self:
        """Reads names, in one text or one by one; ``key`` is the setting to blame, by default the set's own."""

    @classmethod
    def resolve(cls, value: str, key: str | None = None) -> Self:
        """Reads the value of the set's key: names, or the path of a file."""
        is_path = value.strip().endswith(".json") or os.path.sep in value or os.path.isfile(value)
        return cls.load(value, key) if is_path else cls.parse(value, key)

    @classmethod
    def load(cls, path: str | os.PathLike, key: str | None = None) -> Self:
        """Reads the JSON that :meth:`save` and selection write.

        Args:
            path: The file.
            key: The setting to blame, by default the set's own.

        Raises:
            ValueError: The file is missing or holds something else.
        """
        path, key = Path(path), key or cls.KEY
        said = f"{key}: the {cls.WHAT} file {path}"
        remedy = f"give a {cls.FILE} that a selection wrote, or name the {cls.WHAT} ({cls.EXAMPLE})"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{said} cannot be read ({error.strerror}); {remedy}.") from error
        except ValueError as error:
            raise ValueError(f"{said} is not JSON ({error}); {remedy}.") from error
        if not isinstance(content, dict) or not isinstance(content.get(cls.WHAT), list):
            raise ValueError(f'{said} has no list "{cls.WHAT}"; {remedy}.')
        return replace(cls.parse(content[cls.WHAT], key), provenance=content.get("provenance") or {})

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON form; the file appears complete or not at all."""
        write_json(path, {self.WHAT: list(self.names), "provenance": self.provenance})

    def __str__(self) -> str:
        return ",".join(self.names)
