"""From the fields of the web UI to the arguments of a run."""

from collections.abc import Callable
from typing import Any

from llamafactory_hera.heads.head_set import HeadSet

from .fields import FIELDS
from .names import elem_id
from .texts import message


def with_hera(args: dict[str, Any], value_of: Callable[[str], Any]) -> dict[str, Any]:
    """Adds the ``hera_*`` keys to the arguments of a run.

    Args:
        args: From the host; keys given in "Extra arguments" are among them and win.
        value_of: The value of a field by its element id.
    """
    shown = {key: value_of(elem_id(key)) for key in FIELDS if key not in args}
    return args | {key: value.strip() if isinstance(value, str) else value for key, value in shown.items()}


def lacking(args: dict[str, Any], lang: str) -> str:
    """What keeps a HeRA run from being started, in words for the user; empty if nothing is seen without a model."""
    heads = args.get("hera_heads") or ""
    if args.get("hera_layers"):  # given in "Extra arguments"; the run's own checks say more
        return ""
    if not heads:
        return message("no_heads", lang)
    try:
        if heads != "auto":
            HeadSet.resolve(heads)
    except ValueError as error:
        return str(error)
    return ""
