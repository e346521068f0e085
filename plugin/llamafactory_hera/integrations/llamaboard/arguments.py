"""From the fields of the web UI to the arguments of a run."""

from collections.abc import Callable
from typing import Any

from llamafactory_hera.integrations.llamafactory.argument_checks import AUTO
from llamafactory_hera.integrations.llamafactory.arguments import HeraArguments

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


def lacking(args: dict[str, Any], lang: str, selecting: bool = False) -> str:
    """What keeps a HeRA run from being started, in words for the user; empty if nothing is seen without a model.

    Args:
        args: Of the run; empty ones are not sent.
        lang: Of the page.
        selecting: Heads are about to be selected, so that none need be named.
    """
    values = {key: args[key] for key in HeraArguments.__dataclass_fields__ if args.get(key) not in (None, "")}
    if values.get("hera_granularity") == "layer":
        if selecting:
            return message("select_layers", lang)
    elif selecting:
        values["hera_heads"] = AUTO
    elif "hera_heads" not in values:
        return message("no_heads", lang)
    try:
        HeraArguments(**values).check_hera()
    except ValueError as error:
        return str(error)
    return ""
