"""The names by which the web UI knows the plugin's parts."""

#: The entry of the stage list, and the value of ``stage`` behind it.
STAGE_TITLE, STAGE = "HeRA", "hera"

#: Element ids start with it: ``train.hera_heads`` is the field of the key ``hera_heads``.
PREFIX = "train.hera_"


def elem_id(name: str) -> str:
    """The id under which the host's manager holds one of the plugin's elements of the train tab."""
    return f"train.{name}"
