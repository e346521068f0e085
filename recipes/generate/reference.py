"""Generates the page of all keys, docs/keys.md, from the classes that declare them."""

from collections.abc import Iterable, Mapping
from dataclasses import Field
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from llamafactory_harc.config import HarcConfig
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.config import FIXED_KEYS, RESUMABLE_KEYS, SELECTION_KEYS, HeraConfig

#: The keys that most runs set, and the keys that some runs set. All others are rare.
USUAL = ("hera_heads", "hera_teacher", "hera_teacher_cache", "hera_weight", "hera_memory", "hera_select_mode")
SOMETIMES = (
    "hera_k",
    "hera_accumulate",
    "hera_pooling",
    "hera_image_index",
    "hera_select",
    "hera_select_m",
    "hera_select_dataset",
    "hera_select_samples",
    "hera_select_batch_size",
    "hera_objective",
    "hera_granularity",
    "hera_layers",
)

_PAGE = """\
# All keys

<!-- Written by `python recipes/generate`. Change the classes that declare the keys, not this page. -->

Most runs set only `hera_teacher`, and `hera_weight` if they are short ([Which weight?](method.md#which-weight)). Set
these keys along with your trainer's: in a recipe, on a command line, or in the web UI. An invalid value stops a run
before it loads a model. [Batch size and candidates](distributed.md#batch-size-and-candidates) explains `hera_memory`.

In Python, the keys have no prefix: `HeraConfig(heads="auto", select_mode="mllm")`.

## Usual keys

{usual}

## Sometimes needed

{sometimes}

## Rarely needed

{rare}

## Changing keys between runs

- A resumed run must keep its checkpoint's values for {fixed}.
- A resumed run may change {resumable}. It then warns that its curves do not continue the checkpoint's.
- `auto` reuses an earlier selection in the same output folder if the model, the teacher, the dataset and these keys
  are unchanged: {selection}. Otherwise it selects again.

## Calibration

Only `llamafactory-hera calibrate` reads these keys; see [calibrating heads without training](calibration.md).

{calibration}

## HARC

Runs with `stage: harc` read these keys; see [HARC](harc.md). Steps are optimizer steps. In Python, the keys have no
prefix: `HarcConfig(margin=0.3)`.

{harc}
"""
_KINDS = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
_BOUNDS = {"at_least": "≥", "at_most": "≤"}


def page() -> str:
    """Returns the page as Markdown."""
    declared = HeraConfig.knobs()
    rare = [key for key in declared if key not in (*USUAL, *SOMETIMES)]
    tables = {"usual": USUAL, "sometimes": SOMETIMES, "rare": rare}
    lists = {"fixed": FIXED_KEYS, "resumable": RESUMABLE_KEYS, "selection": SELECTION_KEYS}
    return _PAGE.format(
        **{name: _table(declared, keys) for name, keys in tables.items()},
        **{name: _list(keys) for name, keys in lists.items()},
        calibration=_table(RahConfig.knobs(), RahConfig.knobs()),
        harc=_table(HarcConfig.knobs(), HarcConfig.knobs()),
    )


def _list(keys: Iterable[str]) -> str:
    *most, last = (f"`{key}`" for key in keys)
    return f"{', '.join(most)} and {last}"


def _table(declared: Mapping[str, Field], keys: Iterable[str]) -> str:
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key in keys:
        field = declared[key]
        default = "" if field.default is None else f"`{_text(field.default)}`"
        lines.append(f"| `{key}` | {default} | {_values(field)} | {field.metadata['help']} |")
    return "\n".join(lines)


def _values(field: Field) -> str:
    """Describes the allowed values: a type with its bounds, or a list."""
    kinds = [kind for kind in get_args(field.type) or (field.type,) if kind is not NoneType]
    if get_origin(field.type) is Literal:
        kinds = [field.type]
    words = [
        ", ".join(f"`{each}`" for each in get_args(kind)) if get_origin(kind) is Literal else _KINDS[kind]
        for kind in kinds
    ]
    bounds = [f" {sign} {b:g}" for name, sign in _BOUNDS.items() if (b := field.metadata[name]) is not None]
    return words[0] + ",".join(bounds) + "".join(f" or {word}" for word in words[1:])


def _text(default: Any) -> str:
    if isinstance(default, float):
        return f"{default:g}"
    return str(default).lower() if isinstance(default, bool) else str(default)
