"""What the web UI says of HeRA, in the host's five languages."""

from types import ModuleType
from typing import Any

from . import en, ja, ko, ru, zh

LANGUAGES: dict[str, ModuleType] = {"en": en, "ru": ru, "zh": zh, "ko": ko, "ja": ja}


def message(name: str, lang: str, **values: Any) -> str:
    """A message in a language of the host; English for one that the host has gained since."""
    return LANGUAGES.get(lang, en).MESSAGES[name].format(**values)


def locales() -> dict[str, dict[str, dict[str, str]]]:
    """Labels and hints in the form of the host's ``LOCALES``: element, language, property."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for lang, texts in LANGUAGES.items():
        for key, (label, info) in texts.FIELDS.items():
            found.setdefault(key, {})[lang] = {"label": label, "info": info}
        for name, properties in texts.WIDGETS.items():
            found.setdefault(name, {})[lang] = dict(properties)
    return found
