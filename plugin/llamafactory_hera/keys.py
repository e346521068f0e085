# No `from __future__ import annotations` here: the annotations are read as types.
"""Settings classes that declare each key once: its type, range, default and help.

A host's argument class, the web form, the reference page and the checks of a resumed run all read the keys from the
class, so that nothing repeats them.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin


def knob(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    hint: str = "",
    key: str = "",
) -> Any:
    """Declares a key.

    Args:
        default: The value of an absent key.
        help: The sentence that every host shows.
        at_least: Inclusive lower bound.
        above: Exclusive lower bound.
        at_most: Inclusive upper bound.
        below: Exclusive upper bound.
        hint: A remark that follows the range in an error message.
        key: The key's name if it is not the prefix plus the field's name.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(default=default, metadata={"help": help, "hint": hint, "key": key, **bounds})


class KeyedConfig:
    """Base class of the settings classes; it reads, checks and lists their keys.

    Subclasses are frozen dataclasses whose fields are declared with :func:`knob`. A field may hold another such class,
    whose keys then belong to the outer one.
    """

    PREFIX: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for declared in fields(self):  # type: ignore[arg-type]
            if _config_type(declared) is None:
                value = _checked(_key_of(self, declared), declared, getattr(self, declared.name))
                object.__setattr__(self, declared.name, value)
        self.check()

    def check(self) -> None:
        """Compares values with one another; a subclass raises ``ValueError`` with key, value and remedy."""

    @classmethod
    def knobs(cls) -> dict[str, Field]:
        """Maps every key to the field that declares it."""
        found: dict[str, Field] = {}
        for declared in fields(cls):  # type: ignore[arg-type]
            nested = _config_type(declared)
            found |= nested.knobs() if nested else {_key_of(cls, declared): declared}
        return found

    @classmethod
    def from_keys(cls, source: Mapping[str, Any] | object) -> Self:
        """Reads the keys from a mapping, or from the attributes of an object.

        Raises:
            ValueError: A value is bad, or a mapping holds an unknown key with the prefix of this class.
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
        """Maps every key to its value."""
        found: dict[str, Any] = {}
        for declared in fields(self):  # type: ignore[arg-type]
            value = getattr(self, declared.name)
            found |= value.keys() if _config_type(declared) else {_key_of(self, declared): value}
        return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Describes the entries in which two runs differ, as ``key was …, is …``; entries missing in ``before`` pass."""
    return [
        f"{name} was {before[name]}, is {now.get(name)}"
        for name in names
        if name in before and before[name] != now.get(name)
    ]


def choices(declared: Field) -> tuple[Any, ...]:
    """Lists the allowed values of a field, or nothing if its type does not list them."""
    return get_args(declared.type) if get_origin(declared.type) is Literal else ()


def _key_of(config: type[KeyedConfig] | KeyedConfig, declared: Field) -> str:
    return declared.metadata["key"] or f"{config.PREFIX}{declared.name}"


def _config_type(declared: Field) -> type[KeyedConfig] | None:
    kind = declared.type
    return kind if isinstance(kind, type) and issubclass(kind, KeyedConfig) else None


# -- one value -------------------------------------------------------------------------------------------------------


def typed(key: str, value: Any, kind: Any) -> Any:
    """Converts a value that came from YAML, a command line or Python to the type of its key.

    Numbers and booleans may be written as text, and a list of names becomes one comma-separated text.

    Args:
        key: The key to name in an error.
        value: What was given.
        kind: ``bool``, ``int``, ``float``, ``str``, a ``Literal``, or a union of these and ``None``.

    Raises:
        ValueError: The value has another type.
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
        # a bare number becomes text here, and is refused later like any other word
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
