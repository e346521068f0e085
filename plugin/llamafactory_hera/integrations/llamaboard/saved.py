"""Saved settings of the web UI that also open where the plugin is not installed.

The host looks up every entry of such a file among the elements of its page and fails on one that it does not have. So
HeRA's entries are written as comments, which only the plugin reads, and a value that only the plugin offers is
replaced by one of the host's: such a file opens there as supervised fine-tuning.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml
from llamafactory.extras import logging

from llamafactory_hera.backbones.table import TEMPLATES
from llamafactory_hera.files import whole_file

from .fields import FIELDS, default, takes
from .names import MODELS, STAGE_TITLE

logger = logging.get_logger("llamafactory.hera")

_MARK = "#HeRA "
_HEADER = (
    f"# The lines that start with {_MARK.strip()} are read by llamafactory-hera; without it this file opens as "
    "supervised fine-tuning.\n"
)
#: Element -> values that only the plugin offers, and what stands for them without it.
_INSTEAD: dict[str, tuple[Collection[str], str]] = {
    "train.training_stage": ((STAGE_TITLE,), "Supervised Fine-Tuning"),
    "top.model_name": (MODELS, "Custom"),
    "top.template": (TEMPLATES, "default"),
}
_PREFIXES = ("train.hera_", "train.rah_")
_COMPARE = "train.hera_compare"  # a tick that is no key of a run
_DEFAULTS = {f"train.{key}": default(key) for key in FIELDS} | {_COMPARE: True}


def save_args(host: Callable[[str, dict[str, Any]], None], config_path: str, config_dict: dict[str, Any]) -> None:
    """The host's function of the same name, with HeRA's settings as comments behind its own."""
    ours = {key: value for key, value in config_dict.items() if key.startswith(_PREFIXES)}
    plain = {key: value for key, value in config_dict.items() if key not in ours}
    for key, (values, instead) in _INSTEAD.items():
        if plain.get(key) in values:
            ours[key], plain[key] = plain[key], instead
    with whole_file(config_path) as temporary:
        host(str(temporary), plain)
        if any(value != _DEFAULTS.get(key) for key, value in ours.items()):
            text = yaml.safe_dump(ours, allow_unicode=True, sort_keys=True)
            with temporary.open("a", encoding="utf-8") as file:
                file.write(_HEADER + "".join(f"{_MARK}{line}\n" for line in text.splitlines()))


def load_args(host: Callable[[str], dict[str, Any] | None], config_path: str) -> dict[str, Any] | None:
    """The host's function of the same name, with the settings that it cannot read."""
    settings = host(config_path)
    if not isinstance(settings, dict):
        return settings
    plain = {key: value for key, value in settings.items() if not key.startswith(_PREFIXES)}
    ours = {key: value for key, value in settings.items() if key not in plain}
    lines = Path(config_path).read_text(encoding="utf-8").splitlines()
    try:
        ours |= yaml.safe_load("\n".join(line[len(_MARK) :] for line in lines if line.startswith(_MARK))) or {}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        logger.warning_rank0(
            f"HeRA | {config_path}: its lines with {_MARK.strip()} cannot be read and are left out: {error}"
        )
    wrong = [key for key, value in ours.items() if not _fits(key, value)]
    if wrong:
        logger.warning_rank0(f"HeRA | {config_path}: no field takes {', '.join(wrong)} as the file has it; left out.")
    return plain | {key: value for key, value in ours.items() if key not in wrong}


def _fits(key: str, value: Any) -> bool:
    """Whether an entry of HeRA's has an element, and the element takes the value."""
    if key in _INSTEAD:
        return value in _INSTEAD[key][0]
    if key == _COMPARE:
        return isinstance(value, bool)
    return key in _DEFAULTS and takes(key.removeprefix("train."), value)
