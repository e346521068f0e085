"""Which heads: the notation ``L3H4`` and the head set, with its JSON form and provenance."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .site_file import SiteFile

_HEAD = re.compile(r"[Ll](\d+)[Hh](\d+)")
_SYNTAX = "write heads as L<layer>H<head>, zero-based and separated by commas, for instance L13H12,L7H6"


class HeadId(NamedTuple):
    """One query head of one decoder layer, both zero-based; printed as ``L3H4``."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str, key: str = "hera_heads") -> "HeadId":
        """Reads ``L3H4``.

        Raises:
            ValueError: Another syntax; names ``key``, the value and the remedy.
        """
        match = _HEAD.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{key}: {text!r} is not a head; {_SYNTAX}.")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class HeadSet(SiteFile):
    """The heads of a run, in the order in which they were chosen, and where they come from.

    Attributes:
        heads: The heads, least aligned first where they were selected by score.
        provenance: Facts of their selection (model, teacher, data, settings, scores); empty when written by hand.
    """

    KEY: ClassVar[str] = "hera_heads"
    FILE: ClassVar[str] = "heads.json"
    WHAT: ClassVar[str] = "heads"
    EXAMPLE: ClassVar[str] = "L13H12,L7H6"

    heads: tuple[HeadId, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """``L3H4`` of each."""
        return tuple(map(str, self.heads))

    @property
    def layers(self) -> tuple[int, ...]:
        """Their decoder layers, each once, in order."""
        return tuple(sorted({head.layer for head in self.heads}))

    @classmethod
    def parse(cls, heads: str | Iterable[str], key: str | None = None) -> "HeadSet":
        """Reads ``L13H12,L7H6`` or a list of such names.

        Raises:
            ValueError: No head, an unknown syntax, or a head named twice.
        """
        key = key or cls.KEY
        names = re.split(r"[,\s]+", heads.strip()) if isinstance(heads, str) else [str(name) for name in heads]
        parsed = [HeadId.parse(name, key) for name in names if name]
        if not parsed:
            raise ValueError(f"{key}: no head is named; {_SYNTAX}.")
        twice = sorted({head for head in parsed if parsed.count(head) > 1})
        if twice:
            raise ValueError(f"{key}: {', '.join(map(str, twice))} is named more than once; name each head once.")
        return cls(tuple(parsed))

    def check(self, n_layers: int, n_heads: int, key: str = "hera_heads") -> None:
        """Checks that every head exists in a model of ``n_layers`` layers with ``n_heads`` query heads each.

        Raises:
            ValueError: A head lies outside.
        """
        outside = [str(head) for head in self.heads if head.layer >= n_layers or head.head >= n_heads]
        if outside:
            raise ValueError(
                f"{key}: {', '.join(outside)} does not exist: this model has layers L0 to L{n_layers - 1} with heads "
                f"H0 to H{n_heads - 1}; choose heads of this model (`llamafactory-hera select` finds them)."
            )
