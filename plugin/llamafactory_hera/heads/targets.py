"""The targets of a run, attention heads (``L3H4``) or decoder layers (``L3``), and the file that lists them."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from ..files import read_json, reading, write_json
from ..hub import HUB, fetch_first
from .families import FINAL, HeadLayout, head_layout
from .paper import PAPER, paper_heads

Granularity = Literal["head", "layer"]
#: The tokens over which a representation is averaged.
Pooling = Literal["answer", "text", "mean", "last"]

#: The value of ``hera_heads`` or ``hera_layers`` that requests a selection before training.
AUTO = "auto"
#: Values of ``hera_layers`` that denote a layer by its place in any model.
NAMED_LAYERS = ("middle", "penultimate")

# The types of provenance entries.
_TYPES: dict[str, Any] = {"model": str, "teacher": str, "dataset": str, "keys": dict, "adapters": list, "scores": list}
_TYPES |= {"samples": int, "chance_level": (float, int)}
_NAME = re.compile(r"L(\d{1,6})(?:H(\d{1,6}))?", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SYNTAX = {
    "head": "write heads as L<layer>H<head>, zero-based and separated by commas, for instance L13H12,L7H6",
    "layer": "write layers as L<layer>, zero-based and separated by commas, for instance L14,L15, or final",
}


class Target(NamedTuple):
    """A query head of a decoder layer, or the layer itself if ``head`` is None; zero-based.

    The layer ``FINAL``, written ``final``, is the output of the norm after the last layer.
    """

    layer: int
    head: int | None = None

    def __str__(self) -> str:
        if self.layer == FINAL:
            return "final"
        return f"L{self.layer}" if self.head is None else f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str, granularity: Granularity = "head", key: str | None = None) -> Self:
        """Reads ``L3H4``, ``L3`` or ``final``; ``key`` is the setting that error messages name."""
        if granularity == "layer" and text.strip() == "final":
            return cls(FINAL)
        match = _NAME.fullmatch(text.strip())
        if match is None or (match[2] is None) == (granularity == "head"):
            key = key or f"hera_{granularity}s"
            raise ValueError(f"{key}: {text[:40]!r} is not a {granularity}; {_SYNTAX[granularity]}.")
        return cls(int(match[1]), None if match[2] is None else int(match[2]))


@dataclass(frozen=True)
class Targets:
    """The heads or layers of a run, in the order they were chosen, with the provenance of the choice.

    Attributes:
        items: Only heads or only layers, in the order in which they were chosen.
        provenance: Model, teacher, data, keys and scores of the selection; empty if the targets were written by hand.
    """

    items: tuple[Target, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def granularity(self) -> Granularity:
        """The kind of the targets: ``head`` or ``layer``."""
        return "layer" if self.items[0].head is None else "head"

    @property
    def key(self) -> str:
        """The setting that lists the targets: ``hera_heads`` or ``hera_layers``."""
        return f"hera_{self.plural}"

    @property
    def plural(self) -> str:
        """The plural ``heads`` or ``layers``, which is also the name of the list in the file."""
        return f"{self.granularity}s"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the targets, such as ``L3H4`` or ``L3``."""
        return tuple(map(str, self.items))

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers of the targets in ascending order, without repetition."""
        return tuple(sorted({item.layer for item in self.items}))

    def __str__(self) -> str:
        return ",".join(self.names)

    @classmethod
    def parse(
        cls,
        value: "Targets | str | Iterable[Any]",
        granularity: Granularity = "head",
        configuration: Any = None,
        key: str | None = None,
    ) -> "Targets":
        """Reads the value of a setting.

        Args:
            value: Names in one string (``L13H12,L7H6``) or in a list, the path of a file, a repository on the hub
                (``hf:owner/name``), ``PAPER``, or existing ``Targets``.
            granularity: The kind that the names denote.
            configuration: The configuration of the model in which every target must exist; ``PAPER`` and
                ``NAMED_LAYERS`` need it.
            key: The setting that error messages name; by default, the one for the granularity.

        Raises:
            ValueError: A name is missing, malformed, repeated, outside the model or of the other kind, or the file is
                invalid.
        """
        key = key or f"hera_{granularity}s"
        layout = None if configuration is None else head_layout(configuration)
        if isinstance(value, str):
            text = value.strip()
            if layout is not None and granularity == "layer" and text in NAMED_LAYERS:
                return cls((Target(layout.n_layers // 2 if text == "middle" else max(layout.n_layers - 2, 0)),))
            if configuration is not None and granularity == "head" and text == PAPER:
                text = paper_heads(configuration)
            if (repository := hub_id(text, key)) is not None:
                value = cls.load(fetch_first(repository, [file_name(granularity)], key), granularity, key)
                if "model_fingerprint" not in value.provenance:
                    raise ValueError(f"{key}: {text} does not name its model; if it fits yours, write {value}.")
            elif text.endswith(".json") or os.path.sep in text or os.path.isfile(text):
                value = cls.load(text, granularity, key)
            else:
                value = re.split(r"[,\s]+", text)
        if not isinstance(value, Targets):
            value = cls(_parse_names(value, granularity, key))
        if value.granularity != granularity:
            raise ValueError(f"{key}: {value} is not a {granularity}; {_SYNTAX[granularity]}.")
        if layout is not None:
            value.check(layout)
        return value

    @classmethod
    def load(
        cls, path: str | os.PathLike, granularity: Granularity | None = None, key: str | None = None
    ) -> "Targets":
        """Reads a file that ``save`` wrote; raises ``ValueError`` if the file is missing or invalid.

        The file must list targets of the given granularity; None allows both. Error messages contain ``key``.
        """
        kinds: tuple[Granularity, ...] = (granularity,) if granularity else ("head", "layer")
        key = key or f"hera_{kinds[0]}s"
        remedy = "give a file that a selection or `llamafactory-hera score` wrote"
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{key}: {error}; {remedy}.") from error
        for kind in kinds:
            if isinstance(content, dict) and isinstance(names := content.get(f"{kind}s"), list):
                with reading(f"{key}: {path}", "a file that a selection wrote"):
                    origin = {**(content.get("provenance") or {})}
                    for name in _TYPES.keys() & origin:
                        if not isinstance(origin[name], _TYPES[name]):
                            raise ValueError(f"{name}: {str(origin[name])[:40]}")
                return cls(_parse_names(names, kind, key), origin)
        raise ValueError(f'{key}: {path} has no "{kinds[0]}s" list; {remedy}.')

    def save(self, path: str | os.PathLike) -> None:
        """Writes the targets to a JSON file atomically."""
        write_json(path, {self.plural: list(self.names), "provenance": self.provenance})

    def check(self, layout: HeadLayout) -> None:
        """Raises ``ValueError`` if a head or layer is outside a model."""
        sizes = f"the model has layers L0 to L{layout.n_layers - 1}"
        for target in self.items:
            if target.layer < layout.n_layers:
                layer = layout.layers[target.layer]
                if target.head is None or target.head < layer.n_heads:
                    continue
                sizes = f"in this model, L{target.layer} is {layer}"
            elif target.layer == FINAL:
                continue
            raise ValueError(f"{self.key}: {target} does not exist: {sizes}. Choose other {self.plural}.")


def _parse_names(names: Iterable[Any], granularity: Granularity, key: str) -> tuple[Target, ...]:
    items = tuple(Target.parse(str(name), granularity, key) for name in names if str(name))
    if not items:
        raise ValueError(f"{key}: no {granularity} is given; {_SYNTAX[granularity]}, or give a file or auto.")
    if twice := sorted({item for item in items if items.count(item) > 1}):
        raise ValueError(f"{key}: {', '.join(map(str, twice))} is repeated; remove the repetition.")
    return items


def hub_id(value: str, key: str) -> str | None:
    """Returns the hub repository that a value names, or None for other values, such as files in existing folders."""
    text = value.strip()
    if not text.startswith(HUB) and os.path.isdir(text) and _HUB_ID.fullmatch(text):
        choice = f"write {HUB}{text} for the repository on the hub, or the path of the file in the folder"
        raise ValueError(f"{key}: {text} is a local folder, but could also be a hub id; {choice}.")
    is_id = _HUB_ID.fullmatch(text) and not text.endswith(".json") and not os.path.isdir(os.path.dirname(text))
    return text if text.startswith(HUB) or is_id else None


def file_name(granularity: Granularity) -> str:
    """Returns the name of the file that a selection writes: ``heads.json`` or ``layers.json``."""
    return f"{granularity}s.json"
