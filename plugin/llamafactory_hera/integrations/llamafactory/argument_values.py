"""Reading and checking single values of the ``hera_*`` keys."""

import math
from collections.abc import Sequence
from typing import Any


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[str(value).lower()]


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def _read_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


# the host's parser hands over what YAML made of a value, whatever the field's type
READERS = {bool: (_read_bool, "true or false"), int: (_read_int, "a whole number"), float: (_read_float, "a number")}


def typed(key: str, value: Any, kind: type) -> Any:
    """The value as one of the types of :data:`READERS`.

    Raises:
        ValueError: It is none.
    """
    reader, expected = READERS[kind]
    if value is None:
        raise ValueError(f"{key}: it has no value; write {expected}, or remove the key.")
    try:
        return reader(value)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: {value!r} is not {expected}; write {expected}.") from error


def at_least(key: str, value: int, least: int) -> None:
    """Raises ``ValueError`` for a value below ``least``."""
    if value < least:
        raise ValueError(f"{key}: {value} is too small; choose {least} or more.")


def finite(key: str, value: float, in_range: bool, remedy: str) -> None:
    """Raises ``ValueError`` for a value that is not finite or not in range."""
    if not (math.isfinite(value) and in_range):
        raise ValueError(f"{key}: {value} is out of range; choose {remedy}.")


def one_of(key: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` for a value that is not among ``choices``."""
    if value not in choices:
        said = "it has no value" if value is None else f"{value!r} is unknown"
        raise ValueError(f"{key}: {said}; choose one of {', '.join(choices)}.")
