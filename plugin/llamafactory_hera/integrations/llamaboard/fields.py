"""Which ``hera_*`` keys have a field in the web UI, and the arguments that a run gets from the fields.

Type, default and choices of a field are those that the key declares. Keys without a field go into the host's "Extra
arguments".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.targets import AUTO
from llamafactory_hera.knobs import choices, typed
from llamafactory_hera.objectives import names

from .names import message

#: Rows of the accordion. The host drops what is false or empty from a command, so a switch must be off by default.
ROWS = (
    ["hera_heads"],
    ["hera_objective", "hera_granularity", "hera_layers"],
    ["hera_teacher", "hera_teacher_cache"],
    ["hera_weight", "hera_k", "hera_temperature", "hera_fixed_temperature"],
    ["hera_pooling", "hera_similarity", "hera_memory", "hera_accumulate", "hera_batches", "hera_eval"],
    ["hera_select", *(f"hera_select_{name}" for name in ("m", "mode", "samples", "k", "batch_size"))],
)

#: Key -> its declaration. The element of a key has the id ``train.<key>``.
FIELDS: dict[str, dataclasses.Field] = {key: HeraConfig.knobs()[key] for row in ROWS for key in row}


def options(key: str) -> list[str]:
    """The values to choose from; none for a field that is typed into or ticked."""
    return list(names() if key == "hera_objective" else choices(FIELDS[key]))


def default(key: str) -> Any:
    """What the field shows at first: the key's default, an empty text instead of None."""
    value = FIELDS[key].default
    return "" if value is None else value


def takes(key: str, value: Any) -> bool:
    """Whether the field can show a value as it is."""
    if options(key):
        return value in options(key)
    try:
        return value is None or typed(key, value, FIELDS[key].type) == value
    except ValueError:
        return False


def with_hera(args: dict[str, Any], value_of: Callable[[str], Any]) -> dict[str, Any]:
    """The arguments of a run with the ``hera_*`` keys; those that "Extra arguments" has put in already win.

    ``value_of`` gives the value of a field by its element id.
    """
    shown = {key: value_of(f"train.{key}") for key in FIELDS if key not in args}
    return args | {key: value.strip() if isinstance(value, str) else value for key, value in shown.items()}


def problem_with(args: dict[str, Any], lang: str, selecting: bool = False) -> str:
    """What keeps a HeRA run from being started, for the user to read; empty if nothing is seen without a model.

    With ``selecting`` heads are about to be selected, so that none need be named.
    """
    values = {key: args[key] for key in HeraConfig.knobs() if args.get(key) not in (None, "")}
    if values.get("hera_granularity") == "layer":
        if selecting:
            return message("select_layers", lang)
    elif selecting:
        values["hera_heads"] = AUTO
    elif "hera_heads" not in values:
        return message("no_heads", lang)
    try:
        HeraConfig.from_keys(values)
    except ValueError as error:
        return str(error)
    return ""
