"""Saved settings that also open in a web UI without the plugin.

The host looks up every entry of such a file among the elements of its page, and fails if there is none. Therefore the
file holds the host's entries with the host's values, and a last line with what differs under the plugin. That line is
a comment in YAML, so the host ignores it and opens the settings as supervised fine-tuning.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamafactory_hera.backbones.table import TEMPLATES
from llamafactory_hera.files import whole_file

from .fields import FIELDS
from .names import MODELS, STAGE_TITLE

_MARK = "# read by llamafactory-hera: "


def save_args(host: Callable[[str, dict[str, Any]], None], config_path: str, config_dict: dict[str, Any]) -> None:
    """Writes settings; replaces the host's function of the same name."""
    instead = {STAGE_TITLE: "Supervised Fine-Tuning"} | dict.fromkeys(MODELS, "Custom")
    instead |= dict.fromkeys(TEMPLATES, "default")
    plain = {
        key: instead.get(value, value) if isinstance(value, str) else value
        for key, value in config_dict.items()
        if not key.startswith("train.hera_")
    }
    ours = {key: value for key, value in config_dict.items() if key not in plain or plain[key] != value}
    with whole_file(config_path) as temporary:
        host(str(temporary), plain)
        with temporary.open("a", encoding="utf-8") as file:
            file.write(f"{_MARK}{json.dumps(ours)}\n")


def load_args(host: Callable[[str], dict[str, Any] | None], config_path: str) -> dict[str, Any] | None:
    """Reads settings; replaces the host's function of the same name."""
    settings = host(config_path)
    if settings:
        last = Path(config_path).read_text(encoding="utf-8").splitlines()[-1]
        ours = json.loads(last.removeprefix(_MARK)) if last.startswith(_MARK) else {}
        # another version of the plugin may have had other fields
        known = {f"train.{key}" for key in FIELDS} | settings.keys()
        settings |= {key: value for key, value in ours.items() if key in known}
    return settings
