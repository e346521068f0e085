"""Which ``hera_*`` keys the web UI shows, and as which kind of widget; defaults and choices are the dataclass's."""

import types
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llamafactory_hera.integrations.llamafactory.arguments import HeraArguments
from llamafactory_hera.objectives import names

#: Rows of the accordion. Keys that are not here go into the host's "Extra arguments".
HEADS_ROW = ("hera_heads",)
OBJECTIVE_ROW = ("hera_objective", "hera_granularity", "hera_layers")
TEACHER_ROW = ("hera_teacher", "hera_teacher_cache")
LOSS_ROW = (
    "hera_weight",
    "hera_k",
    "hera_temperature",
    "hera_fixed_temperature",
)
BATCH_ROW = ("hera_pooling", "hera_similarity", "hera_memory", "hera_accumulate")
SELECT_ROW = (
    "hera_select",
    "hera_select_m",
    "hera_select_mode",
    "hera_select_samples",
    "hera_select_k",
    "hera_select_batch_size",
)
ROWS = (HEADS_ROW, OBJECTIVE_ROW, TEACHER_ROW, LOSS_ROW, BATCH_ROW, SELECT_ROW)


@dataclass(frozen=True)
class Field:
    """One key as the web UI shows it.

    Attributes:
        key: Name of the argument.
        kind: ``text``, ``integer``, ``number``, ``switch`` or ``choice``.
        default: The dataclass's, an empty text in the place of None.
        choices: Of a ``choice``.
    """

    key: str
    kind: str
    default: Any
    choices: tuple[str, ...] = ()


def _field(key: str) -> Field:
    declared = HeraArguments.__dataclass_fields__[key]
    if key == "hera_objective":  # any that is registered
        return Field(key, "choice", declared.default, tuple(names()))
    hint = get_type_hints(HeraArguments)[key]
    if isinstance(hint, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
    if get_origin(hint) is Literal:
        return Field(key, "choice", declared.default, get_args(hint))
    kind = {str: "text", int: "integer", float: "number", bool: "switch"}[hint]
    if kind == "switch" and declared.default is not False:
        raise TypeError(f"{key}: the web UI cannot send false, so a switch must be off by default.")
    return Field(key, kind, "" if declared.default is None else declared.default)


FIELDS: dict[str, Field] = {key: _field(key) for row in ROWS for key in row}
