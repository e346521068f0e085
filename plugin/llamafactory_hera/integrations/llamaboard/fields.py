"""Which ``hera_*`` and ``rah_*`` keys have a field in the web UI, and the arguments that a run gets from the fields.

Type, default and choices of a field are those that the key declares. Keys without a field go into the host's "Extra
arguments".
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.targets import AUTO
from llamafactory_hera.keys import choices, typed
from llamafactory_hera.objectives import names

from .names import message, texts

#: Groups of the accordion by their titles, and the rows of each. The host drops what is false or empty from a command,
#: so a switch must be off by default.
GROUPS = {
    "hera_what": (["hera_heads"], ["hera_objective", "hera_granularity", "hera_layers", "hera_pooling"]),
    "hera_whom": (["hera_teacher", "hera_teacher_cache", "hera_similarity"],),
    "hera_strength": (
        ["hera_weight", "hera_k", "hera_temperature", "hera_fixed_temperature"],
        ["hera_memory", "hera_accumulate"],
    ),
    "hera_selecting": (
        ["hera_select", *(f"hera_select_{name}" for name in ("m", "mode", "samples", "k", "batch_size"))],
    ),
    "hera_calibration": (["rah_samples", "rah_layers", "rah_alpha_max", "rah_delta"],),
}
_KNOBS = HeraConfig.knobs() | RahConfig.knobs()

#: Key -> its declaration. The element of a key has the id ``train.<key>``.
FIELDS: dict[str, dataclasses.Field] = {key: _KNOBS[key] for rows in GROUPS.values() for row in rows for key in row}


def locales(languages: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Labels and hints, with defaults, in the form of the host's ``LOCALES``: element, language, property.

    A language that the host has gained since has the English ones.
    """
    spoken = {lang: texts().get(lang, texts()["en"])["elements"] for lang in languages}
    return {
        name: {lang: _shown(name, lang, spoken[lang][name]) for lang in spoken} for name in texts()["en"]["elements"]
    }


def _shown(name: str, lang: str, properties: dict[str, str]) -> dict[str, str]:
    if name not in FIELDS or default(name) == "" or default(name) is False:
        return properties
    return properties | {"info": f"{properties['info']} {message('default', lang, value=default(name))}"}


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


def with_fields(args: dict[str, Any], prefix: str, value_of: Callable[[str], Any]) -> dict[str, Any]:
    """The arguments of a run with the keys of a prefix; those that "Extra arguments" has put in already win.

    ``value_of`` gives the value of a field by its element id.
    """
    shown = {key: value_of(f"train.{key}") for key in FIELDS if key.startswith(prefix) and key not in args}
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
