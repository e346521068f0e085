"""The core's errors in LLaMA-Factory's words: the core knows no key of a host."""

from collections.abc import Iterator
from contextlib import contextmanager

_KEYS = {"model:": "model_name_or_path:", "adapter:": "adapter_name_or_path:"}
#: Part of an error -> the host's keys that help.
_HINTS = {
    "Train something before them": "freeze_multi_modal_projector: false, freeze_language_model: false, "
    "lora_target: all",
    "allow longer texts": "cutoff_len",
    "Check the path in the dataset": "media_dir",
}


def in_host_words(message: str) -> str:
    """Replaces the name of a setting at the start of a message by the host's key, and adds keys that help."""
    setting, space, rest = message.partition(" ")
    message = f"{_KEYS.get(setting, setting)}{space}{rest}"
    hints = [keys for part, keys in _HINTS.items() if part in message]
    return f"{message} In LLaMA-Factory: {', '.join(hints)}." if hints else message


@contextmanager
def host_words() -> Iterator[None]:
    """Translates the errors that pass through."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if error.args == (str(error),):
            error.args = (in_host_words(str(error)),)
        raise
