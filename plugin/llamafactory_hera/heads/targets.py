"""What a run aligns: attention heads (``L3H4``) or decoder layers (``L3``), and the file that names them."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

from ..files import read_json, write_json
from .families import FINAL, HeadLayout

Granularity = Literal["head", "layer"]
#: Which tokens a representation is averaged over.
Pooling = Literal["answer", "text", "mean", "last"]

#: The value of ``hera_heads`` or ``hera_layers`` that asks for a selection before training.
AUTO = "auto"
#: Values of ``hera_layers`` that mean a layer of any model.
NAMED_LAYERS = ("middle", "penultimate")

_NAME = re.compile(r"[Ll](\d{1,6})(?:[Hh](\d{1,6}))?")
_SYNTAX = {
    "head": "write heads as L<layer>H<head>, zero-based and separated by commas, for instance L13H12,L7H6",
    "layer": "write layers as L<layer>, zero-based and separated by commas, for instance L14,L15, or final",
}
_ELSE = {
    "head": "give a heads.json, or write auto",
    "layer": "give a layers.json, or write middle, penultimate or auto",
}


class Target(NamedTuple):
    """One query head of a decoder layer, or, without a head, the layer itself; zero-based.

    The layer :data:`FINAL` is the output of the norm behind the last layer, written ``final``.
    """

    layer: int
    head: int | None = None

    def __str__(self) -> str:
        if self.layer == FINAL:
            return "final"
        return f"L{self.layer}" if self.head is None else f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str, granularity: Granularity = "head", key: str | None = None) -> Self:
        """Reads ``L3H4``, or ``L3`` or ``final``; another syntax is refused with ``key``, value and remedy."""
        if granularity == "layer" and text.strip() == "final":
            return cls(FINAL)
        match, key = _NAME.fullmatch(text.strip()), key or _key(granularity)
        if match is None or (match[2] is None) == (granularity == "head"):
            raise ValueError(f"{key}: {text[:40]!r} is not a {granularity}; {_SYNTAX[granularity]}.")
        return cls(int(match[1]), None if match[2] is None else int(match[2]))


@dataclass(frozen=True)
class Targets:
    """The heads or layers of a run, in the order in which they were chosen, and where they come from.

    Attributes:
        items: Heads or layers, all of one kind; least aligned first where they were selected by score.
        provenance: Facts of their selection (model, teacher, data, settings, scores); empty when written by hand.
    """

    items: tuple[Target, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def granularity(self) -> Granularity:
        """``head`` or ``layer``."""
        return "layer" if self.items[0].head is None else "head"

    @property
    def key(self) -> str:
        """The setting that names them: ``hera_heads`` or ``hera_layers``."""
        return _key(self.granularity)

    @property
    def what(self) -> str:
        """``heads`` or ``layers``, also the name of the list in the file."""
        return f"{self.granularity}s"

    @property
    def file_name(self) -> str:
        """``heads.json`` or ``layers.json``."""
        return file_name(self.granularity)

    @property
    def names(self) -> tuple[str, ...]:
        """``L3H4`` or ``L3`` of each."""
        return tuple(map(str, self.items))

    @property
    def layers(self) -> tuple[int, ...]:
        """Their decoder layers, each once, in order."""
        return tuple(sorted({item.layer for item in self.items}))

    def __str__(self) -> str:
        return ",".join(self.names)

    @classmethod
    def parse(
        cls,
        value: "Targets | str | Iterable[Any]",
        granularity: Granularity = "head",
        layout: HeadLayout | None = None,
        key: str | None = None,
    ) -> "Targets":
        """Reads the value of a setting.

        Args:
            value: Names in one text (``L13H12,L7H6``) or in a list, the path of a file, or targets as they are.
            granularity: What the names denote.
            layout: Sizes of the model; all targets must exist in it, and :data:`NAMED_LAYERS` are known.
            key: The setting to name in errors; the default is that of the granularity.

        Raises:
            ValueError: No name, an unknown syntax, something named twice, a bad file, or a target outside the model.
        """
        if not isinstance(value, Targets):
            value = cls._parsed(value, granularity, layout, key or _key(granularity))
        if layout is not None:
            value.check(layout)
        return value

    @classmethod
    def _parsed(
        cls, value: str | Iterable[Any], granularity: Granularity, layout: HeadLayout | None, key: str
    ) -> "Targets":
        if isinstance(value, str):
            text = value.strip()
            if layout is not None and granularity == "layer" and text in NAMED_LAYERS:
                places = {"middle": layout.n_layers // 2, "penultimate": max(layout.n_layers - 2, 0)}
                return cls((Target(places[text]),))
            if text.endswith(".json") or os.path.sep in text or os.path.isfile(text):
                return cls.load(text, granularity, key)
            value = re.split(r"[,\s]+", text)
        items = [Target.parse(str(name), granularity, key) for name in value if str(name)]
        if not items:
            raise ValueError(f"{key}: no {granularity} is named; {_SYNTAX[granularity]}, or {_ELSE[granularity]}.")
        twice = sorted({item for item in items if items.count(item) > 1})
        if twice:
            repeated = ", ".join(map(str, twice))
            raise ValueError(f"{key}: {repeated} is named more than once; name each {granularity} once.")
        return cls(tuple(items))

    @classmethod
    def load(
        cls, path: str | os.PathLike, granularity: Granularity | None = None, key: str | None = None
    ) -> "Targets":
        """Reads the JSON that :meth:`save` and selection write.

        Args:
            path: The file.
            granularity: What it must name; None takes either.
            key: The setting to name in errors, by default that of the granularity.

        Raises:
            ValueError: The file is missing or holds something else.
        """
        expected = granularity or "head"
        key = key or _key(expected)
        example = "L13H12,L7H6" if expected == "head" else "L14,L15"
        remedy = f"give a {file_name(expected)} that a selection wrote, or name the {expected}s ({example})"
        if key not in ("hera_heads", "hera_layers"):
            remedy = "give a file that `llamafactory-hera score` or a selection wrote"
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{key}: {error}; {remedy}.") from error
        listed = content if isinstance(content, dict) else {}
        kinds: tuple[Granularity, ...] = (granularity,) if granularity else ("head", "layer")
        named = next((kind for kind in kinds if isinstance(listed.get(f"{kind}s"), list)), None)
        if named is None:
            raise ValueError(f'{key}: {path} has no list "{expected}s"; {remedy}.')
        provenance = content.get("provenance") or {}
        if not isinstance(provenance, dict):
            raise ValueError(f'{key}: the "provenance" of {path} is not an object; {remedy}.')
        wrong = _wrong(provenance)
        if wrong:
            raise ValueError(f'{key}: "{wrong}" in the provenance of {path} is not what a selection writes; {remedy}.')
        return replace(cls.parse(content[f"{named}s"], named, key=key), provenance=provenance)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON form; the file appears complete or not at all."""
        write_json(path, {self.what: list(self.names), "provenance": self.provenance})

    def check(self, layout: HeadLayout) -> None:
        """Checks that everything that is named exists in a model.

        Raises:
            ValueError: A head or layer lies outside.
        """
        n_layers, n_heads = layout.n_layers, layout.n_heads
        inside = {FINAL, *range(n_layers)}
        outside = [str(t) for t in self.items if t.layer not in inside or (t.head or 0) >= n_heads]
        if outside:
            heads = found_by = ""
            if self.granularity == "head":
                heads, found_by = f" with heads H0 to H{n_heads - 1}", " (`llamafactory-hera select` finds them)"
            raise ValueError(
                f"{self.key}: {', '.join(outside)} does not exist: this model has layers L0 to L{n_layers - 1}"
                f"{heads}; choose {self.what} of this model{found_by}."
            )


def _wrong(provenance: dict[str, Any]) -> str | None:
    """The name of what is not of its type in the provenance: it is read after training, too, for the model card."""

    def numbers(values: Any) -> bool:
        return isinstance(values, list) and all(value is None or type(value) in (int, float) for value in values)

    heads, layers = provenance.get("scores"), provenance.get("layer_scores")
    if heads and not (isinstance(heads, list) and all(map(numbers, heads)) and len(set(map(len, heads))) == 1):
        return "scores"
    if layers and not (numbers(layers) and len(layers) == len(heads or layers)):
        return "layer_scores"
    return None if numbers([provenance.get("chance_level")]) else "chance_level"


def file_name(granularity: Granularity) -> str:
    """The name of the file that a selection writes: ``heads.json`` or ``layers.json``."""
    return f"{granularity}s.json"


def _key(granularity: Granularity) -> str:
    return f"hera_{granularity}s"
