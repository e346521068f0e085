"""The reference of all keys, ``docs/keys.md``, from the classes that declare them."""

from dataclasses import Field
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.config import FIXED_KEYS, RESUMABLE_KEYS, SELECTION_KEYS, HeraConfig, SelectConfig

_HEAD = """# All keys

Written by `python recipes/generate` from the classes that declare the keys; change those, not this page. A bad value
stops a run before a model is loaded, with its key and a remedy. A resumed run must have keys marked † as its
checkpoint has them, and may change those marked ‡, with a warning. `auto` uses an earlier selection again if those
marked * are the same.
"""
_HERA = """## A run

Beside the host's own keys, in a recipe, on a command line or in the web UI; from Python `HeraConfig` takes them
without the prefix.
"""
_SELECT = """## Selecting heads or layers

For `hera_heads: auto`, `hera_layers: auto`, and `llamafactory-hera select` and `score`; from Python `SelectConfig`.
[Choosing heads](selection.md) explains them.
"""
_RAH = """## Calibration

Of `llamafactory-hera calibrate` alone: [calibrating heads without training](calibration.md).
"""
_MARKS = {" †": FIXED_KEYS, " ‡": RESUMABLE_KEYS, " *": SELECTION_KEYS}
_KINDS = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
_BOUNDS = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}


def page() -> str:
    """The page as Markdown."""
    chosen = SelectConfig.knobs()
    run = {key: declared for key, declared in HeraConfig.knobs().items() if key not in chosen}
    return "\n".join(
        [_HEAD, _HERA, *_table(run), "", _SELECT, *_table(chosen), "", _RAH, *_table(RahConfig.knobs()), ""]
    )


def _table(knobs: dict[str, Field]) -> list[str]:
    lines = ["| key | default | values | |", "|---|---|---|---|"]
    for key, declared in knobs.items():
        mark = "".join(sign for sign, keys in _MARKS.items() if key in keys)
        shown = "" if declared.default is None else f"`{_text(declared.default)}`"
        lines.append(f"| `{key}`{mark} | {shown} | {_values(declared)} | {declared.metadata['help']} |")
    return lines


def _values(declared: Field) -> str:
    """What a key may be: its type or its listed values, and its bounds."""
    kinds = [kind for kind in get_args(declared.type) or (declared.type,) if kind is not NoneType]
    if get_origin(declared.type) is Literal:
        kinds = [declared.type]
    words = [
        ", ".join(f"`{each}`" for each in get_args(kind)) if get_origin(kind) is Literal else _KINDS[kind]
        for kind in kinds
    ]
    bounds = [f" {sign} {b:g}" for name, sign in _BOUNDS.items() if (b := declared.metadata[name]) is not None]
    return words[0] + ",".join(bounds) + "".join(f" or {word}" for word in words[1:])


def _text(default: Any) -> str:
    if isinstance(default, float):
        return f"{default:g}"
    return str(default).lower() if isinstance(default, bool) else str(default)
