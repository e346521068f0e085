"""Which decoder layers: the notation ``L14`` and the set of layers, with its JSON form and provenance."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .site_file import SiteFile

_LAYER = re.compile(r"[Ll](\d+)")
_SYNTAX = (
    "write layers as L<layer>, zero-based and separated by commas, for instance L14,L15, or middle, penultimate, auto"
)


@dataclass(frozen=True)
class LayerSet(SiteFile):
    """The layers of a run, in the order in which they were chosen, and where they come from.

    Attributes:
        layers: Zero-based, least aligned first where they were selected by score.
        provenance: Facts of their selection; empty when written by hand.
    """

    KEY: ClassVar[str] = "hera_layers"
    FILE: ClassVar[str] = "layers.json"
    WHAT: ClassVar[str] = "layers"
    EXAMPLE: ClassVar[str] = "L14,L15"

    layers: tuple[int, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """``L14`` of each."""
        return tuple(f"L{layer}" for layer in self.layers)

    @classmethod
    def parse(cls, layers: str | Iterable[str], key: str | None = None) -> "LayerSet":
        """Reads ``L14,L15`` or a list of such names.

        Raises:
            ValueError: No layer, an unknown syntax, or a layer named twice.
        """
        key = key or cls.KEY
        names = re.split(r"[,\s]+", layers.strip()) if isinstance(layers, str) else [str(name) for name in layers]
        found = []
        for name in filter(None, names):
            match = _LAYER.fullmatch(name.strip())
            if match is None:
                raise ValueError(f"{key}: {name!r} is not a layer; {_SYNTAX}.")
            found.append(int(match[1]))
        if not found:
            raise ValueError(f"{key}: no layer is named; {_SYNTAX}.")
        twice = sorted({layer for layer in found if found.count(layer) > 1})
        if twice:
            raise ValueError(f"{key}: {cls(tuple(twice))} is named more than once; name each layer once.")
        return cls(tuple(found))

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
