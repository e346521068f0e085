# No `from __future__ import annotations` here: the annotations are read as types.
"""Settings classes that declare each key once: its type, range, default and help."""

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin


def knob(default: Any, help: str, *, at_least: float | None = None, at_most: float | None = None) -> Any:
    """Declares a key: its default, its help text, and its inclusive bounds."""
    return field(default=default, metadata={"help": help, "at_least": at_least, "at_most": at_most})


class KeyedConfig:
    """The base class of settings: frozen dataclasses of ``knob`` fields; a key is the prefix plus a field name."""

    PREFIX: ClassVar[str] = ""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        _refuse_unknown(values, [declared.name for declared in cls.knobs().values()], cls.PREFIX)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for key, declared in self.knobs().items():
            value = _in_range(key, typed(key, getattr(self, declared.name), declared.type), declared)
            object.__setattr__(self, declared.name, value)
        self.check()

    def check(self) -> None:
        """Checks that the values are compatible; a subclass raises ``ValueError`` with the key, value and remedy."""

    @classmethod
    def knobs(cls) -> dict[str, Field]:
        """Maps every key to the field that declares it."""
        return {f"{cls.PREFIX}{declared.name}": declared for declared in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def from_keys(cls, source: Mapping[str, Any] | object) -> Self:
        """Reads the keys from a mapping or an object's attributes; raises ``ValueError`` for a bad key or value."""
        known, values = cls.knobs(), source if isinstance(source, Mapping) else vars(source)
        if isinstance(source, Mapping):
            cls.check_names(source)
        return cls(**{declared.name: values[key] for key, declared in known.items() if key in values})

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raises ``ValueError`` for a name that has this class's prefix but is no key, and suggests a similar key."""
        _refuse_unknown([name for name in names if name.startswith(cls.PREFIX)], cls.knobs())

    def keys(self) -> dict[str, Any]:
        """Maps every key to its value."""
        return {key: getattr(self, declared.name) for key, declared in self.knobs().items()}


def _refuse_unknown(names: Iterable[str], known: Collection[str], prefix: str = "") -> None:
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.8) or [k for k in known if name == prefix + k]
            remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}."
            raise ValueError(f"{name}: no such key; {remedy}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Lists ``key was …, is …`` for each entry that differs between runs; skips entries missing from ``before``."""
    return [
        f"{name} was {before[name]}, is {now.get(name)}"
        for name in names
        if name in before and before[name] != now.get(name)
    ]


def choices(declared: Field) -> tuple[Any, ...]:
    """Returns the allowed values of a field with a ``Literal`` type, or nothing for another type."""
    return get_args(declared.type) if get_origin(declared.type) is Literal else ()


def typed(key: str, value: Any, kind: Any) -> Any:
    """Converts a value, which may be text, to the type of its key; a list of names becomes one string."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return None
    options = [option for option in kinds if option is not NoneType]
    for option in options:
        with suppress(KeyError, OverflowError, TypeError, ValueError):
            return _converted(value, option)
    expected = " or ".join(
        f"one of {', '.join(map(str, get_args(option)))}" if get_origin(option) is Literal else _WORDS[option]
        for option in options
    )
    raise ValueError(f"{key}: {value!r} is not {expected}; correct the value, or remove the key.")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _converted(value: Any, kind: Any) -> Any:
    if value is None or (kind is str and isinstance(value, bool | Mapping)):
        raise ValueError
    if get_origin(kind) is Literal:
        return {option: option for option in get_args(kind)}[value]
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    if kind is str:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    number = float(value)
    if isinstance(value, bool) or (kind is int and number != int(number)):
        raise ValueError
    return kind(number)


def _in_range(key: str, value: Any, declared: Field) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = declared.metadata["at_least"], declared.metadata["at_most"]
        least, most = -math.inf if low is None else low, math.inf if high is None else high
        if not (math.isfinite(value) and least <= value <= most):
            bounds = f"{least:g} or more" if high is None else f"{least:g} to {most:g}"
            raise ValueError(f"{key}: {value} is out of range; choose {bounds} (the default is {declared.default}).")
    return value
