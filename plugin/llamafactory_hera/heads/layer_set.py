"""Which decoder layers: the notation ``L14`` and the set of layers, with its JSON form and provenance."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..files import write_json

_LAYER = re.compile(r"[Ll](\d+)")
_SYNTAX = "write layers as L<layer>, zero-based and separated by commas, for instance L14,L15"


@dataclass(frozen=True)
class LayerSet:
    """The layers of a run, in the order in which they were chosen, and where they come from.

    Attributes:
        layers: Zero-based, least aligned first where they were selected by score.
        provenance: Facts of their selection; empty when written by hand.
    """

    #: The key that names them, and the name of their file.
    KEY: ClassVar[str] = "hera_layers"
    FILE: ClassVar[str] = "layers.json"

    layers: tuple[int, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """``L14`` of each."""
        return tuple(f"L{layer}" for layer in self.layers)

    @classmethod
    def parse(cls, layers: str | Iterable[str]) -> "LayerSet":
        """Reads ``L14,L15`` or a list of such names.

        Raises:
            ValueError: No layer, an unknown syntax, or a layer named twice.
        """
        names = re.split(r"[,\s]+", layers.strip()) if isinstance(layers, str) else [str(name) for name in layers]
        found = []
        for name in filter(None, names):
            match = _LAYER.fullmatch(name.strip())
            if match is None:
                raise ValueError(f"hera_layers: {name!r} is not a layer; {_SYNTAX}.")
            found.append(int(match[1]))
        if not found:
            raise ValueError(f"hera_layers: no layer is named; {_SYNTAX}.")
        twice = sorted({layer for layer in found if found.count(layer) > 1})
        if twice:
            raise ValueError(f"hera_layers: {cls(tuple(twice))} is named more than once; name each layer once.")
        return cls(tuple(found))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LayerSet":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: The file is missing or holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(cls.parse(content["layers"]).layers, content.get("provenance") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"hera_layers: the layers file {path} cannot be read ({error}); remove it, or give another output_dir."
            ) from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON form; the file appears complete or not at all."""
        write_json(path, {"layers": list(self.names), "provenance": self.provenance})

    def check(self, n_layers: int) -> None:
        """Checks that every layer exists in a model of ``n_layers`` layers.

        Raises:
            ValueError: A layer lies outside.
        """
        outside = [f"L{layer}" for layer in self.layers if not 0 <= layer < n_layers]
        if outside:
            raise ValueError(
                f"hera_layers: {', '.join(outside)} does not exist: this model has layers L0 to L{n_layers - 1}; "
                "choose layers of this model."
            )
