# No `from __future__ import annotations` here: the annotations are read as types.
"""Settings classes that declare each key once: type, range, default, help, and what it is part of.

A host's argument class, a command line, a form, the provenance of a file and the checks of a resumed run read the keys
from the class; nothing repeats them.
"""

import math
import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin


class Role(Enum):
    """What a key is part of, beside the run that it sets up."""

    SELECTS = "selects"  #: Two selections that share all of these are the same (``auto`` uses an earlier one again).
    SCORES = "scores"  #: Two files of scores must share these to be compared.
    TRAINS = "trains"  #: A run must share these with the selection whose heads it trains.
    FIXED = "fixed"  #: A resumed run must share these with its checkpoint.
    RESUMABLE = "resumable"  #: A resumed run may change these; it warns that curves do not go on.


def knob(
    default: Any,
    help: str,
    *roles: Role,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    hint: str = "",
    key: str = "",
    fact: str = "",
) -> Any:
    """Declares a key: its default, a help that every host shows, its roles and bounds.

    ``hint`` follows the range in an error message. ``key`` is its name where that is not the prefix and the field's
    name, ``fact`` its name in a file's provenance where that is not the field's.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "roles": roles, "hint": hint, "key": key, "fact": fact, **bounds}
    return field(default=default, metadata=metadata)


class KeyedConfig:
    """Base of the settings classes: reads, checks and lists their keys. Subclasses are dataclasses of :func:`knob` s.

    A field may be another such class; its keys then belong to the whole.
    """

    PREFIX: ClassVar[str]

    def __post_init__(self) -> None:
        for declared in fields(self):  # type: ignore[arg-type]
            if _config_type(declared) is None:
                value = _checked(_key_of(self, declared), declared, getattr(self, declared.name))
                object.__setattr__(self, declared.name, value)
        self.check()

    def check(self) -> None:
        """Checks values with one another; a subclass raises ``ValueError`` with key, value and remedy."""

    @classmethod
    def knobs(cls) -> dict[str, Field]:
        """Every key with the field that declares it."""
        found: dict[str, Field] = {}
        for declared in fields(cls):  # type: ignore[arg-type]
            nested = _config_type(declared)
            found |= nested.knobs() if nested else {_key_of(cls, declared): declared}
        return found

    @classmethod
    def from_keys(cls, source: Mapping[str, Any] | object) -> Self:
        """Reads keys from a mapping or from an object's attributes; a key that is absent has its default.

        A bad value, and in a mapping an unknown key of the prefix, is a ``ValueError`` with key and remedy.
        """
        if isinstance(source, Mapping):
            known = cls.knobs()
            unknown = next((key for key in source if key.startswith(cls.PREFIX) and key not in known), None)
            if unknown is not None:
                raise ValueError(f"{unknown}: there is no such key; known are {', '.join(known)}.")
        values: dict[str, Any] = {}
        for declared in fields(cls):  # type: ignore[arg-type]
            nested = _config_type(declared)
            if nested:
                values[declared.name] = nested.from_keys(source)
                continue
            key = _key_of(cls, declared)
            value = source.get(key, MISSING) if isinstance(source, Mapping) else getattr(source, key, MISSING)
            if value is not MISSING:
                values[declared.name] = value
        return cls(**values)

    def keys(self) -> dict[str, Any]:
        """Every key with its value."""
        found: dict[str, Any] = {}
        for declared in fields(self):  # type: ignore[arg-type]
            value = getattr(self, declared.name)
            found |= value.keys() if _config_type(declared) else {_key_of(self, declared): value}
        return found

    def with_role(self, *roles: Role) -> dict[str, Any]:
        """The keys of these roles with their values."""
        knobs = self.knobs()
        return {key: value for key, value in self.keys().items() if {*roles} & {*knobs[key].metadata["roles"]}}

    def facts(self, *roles: Role) -> dict[str, Any]:
        """The values of these roles by their names in provenance."""
        knobs = self.knobs()
        return {fact_of(knobs[key]): value for key, value in self.with_role(*roles).items()}

    @classmethod
    def fact_keys(cls, role: Role) -> dict[str, str]:
        """Names in provenance of the facts of a role, each with the key that decides it."""
        return {fact_of(d): key for key, d in cls.knobs().items() if role in d.metadata["roles"]}


def _key_of(config: type[KeyedConfig] | KeyedConfig, declared: Field) -> str:
    return declared.metadata["key"] or f"{config.PREFIX}{declared.name}"


def fact_of(declared: Field) -> str:
    """A field's name in the provenance of a file."""
    return declared.metadata["fact"] or declared.name


def choices(declared: Field) -> tuple[Any, ...]:
    """The values that a field may have where they are listed, else nothing."""
    return get_args(declared.type) if get_origin(declared.type) is Literal else ()


def _config_type(declared: Field) -> type[KeyedConfig] | None:
    kind = declared.type
    return kind if isinstance(kind, type) and issubclass(kind, KeyedConfig) else None


# -- one value -------------------------------------------------------------------------------------------------------


def typed(key: str, value: Any, kind: Any) -> Any:
    """A value, as YAML, a command line or Python gives it, in the type of its key, or ``ValueError``.

    ``kind`` is ``bool``, ``int``, ``float``, ``str``, a ``Literal``, or a union of these and ``None``. Numbers and
    truth values may be written as text; a list of names becomes one text.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    options = [option for option in kinds if option is not NoneType]
    expected = " or ".join(map(_words, options))
    if value is None:
        if NoneType in kinds:
            return None
        raise ValueError(f"{key}: it has no value; write {expected}, or remove the key.")
    for option in options:
        with suppress(KeyError, OverflowError, TypeError, ValueError):
            return _read(option, value)
    if all(get_origin(option) is Literal for option in kinds):
        raise ValueError(f"{key}: {value!r} is unknown; choose {expected}.")
    raise ValueError(f"{key}: {value!r} is not {expected}; write {expected}.")


def _words(kind: Any) -> str:
    if get_origin(kind) is not Literal:
        return _WORDS[kind]
    options = get_args(kind)
    return f"one of {', '.join(map(str, options))}" if len(options) > 1 else str(options[0])


def _read(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        return {option: option for option in get_args(kind)}[value]
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    if kind is str:
        # a YAML list of names; a bare number becomes a text, which is then refused as any other word is
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    number = float(value)
    if isinstance(value, bool) or (kind is int and number != int(number)):
        raise ValueError
    return kind(number)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "at_least": (operator.ge, "{:g} or more"),
    "above": (operator.gt, "more than {:g}"),
    "at_most": (operator.le, "up to {:g}"),
    "below": (operator.lt, "less than {:g}"),
}


def _checked(key: str, declared: Field, value: Any) -> Any:
    value = typed(key, value, declared.type)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds = [(*_BOUNDS[name], b) for name in _BOUNDS if (b := declared.metadata[name]) is not None]
        if not (math.isfinite(value) and all(fits(value, bound) for fits, _, bound in bounds)):
            remedy = ", ".join(words.format(bound) for _, words, bound in bounds) or "a finite number"
            hint = f" ({declared.metadata['hint']})" if declared.metadata["hint"] else ""
            raise ValueError(f"{key}: {value} is out of range; choose {remedy}{hint}.")
    return value
