"""The adapter for LLaMA-Factory (the host), without the patches: those are a distribution of their own."""

from importlib.util import find_spec
from typing import Any, NamedTuple

#: The distribution that adds ``stage: hera`` to the host. It has the version of this package.
PATCHES = "llamafactory-hera-patches"
#: The release of LLaMA-Factory that all tests use.
TESTED_HOST = "0.9.5"
#: The remedy for a host that is missing, or for versions that do not work together.
PINNED_INSTALL = '`pip install ".[pinned]" ./patches` in a clone of llamafactory-hera'
#: The remedy for missing patches.
PATCHES_INSTALL = "`pip install . ./patches` in a clone of llamafactory-hera"


def refuse_data_uri(image: Any, where: str) -> None:
    """Raises ``ValueError`` for a data URI: HeRA reads it, but the host takes it for a path and fails in training."""
    if isinstance(image, str) and image.startswith("data:"):
        problem = "has an image as a data URI, which LLaMA-Factory does not read"
        raise ValueError(f"{where} {problem}; write it to a file, and give its path.")


class Stage(NamedTuple):
    """A stage that the patches add to the host. Functions and classes are written as text, and imported on use."""

    config: str  #: The class of its keys.
    run: str  #: The function that replaces the host's ``run_sft``.
    command: tuple[str, str, str] | None = None  #: A subcommand that reads a recipe: its name, function and help.


STAGES = {
    "hera": Stage(
        "llamafactory_hera.config:HeraConfig", "llamafactory_hera.integrations.llamafactory.workflow:run_hera"
    ),
    "harc": Stage(
        "llamafactory_harc.config:HarcConfig",
        "llamafactory_harc.llamafactory:run_harc",
        (
            "harc-directions",
            "llamafactory_harc.llamafactory:write_directions",
            "extract the directions of stage: harc and write a recipe with them",
        ),
    ),
}


def require_host(patches: bool = True) -> None:
    """Raises ``ValueError`` if LLaMA-Factory or, unless ``patches`` is false, its patches are not installed."""
    if find_spec("llamafactory") is None:
        raise ValueError(f"llamafactory is not installed; run {PINNED_INSTALL}.")
    if patches and find_spec("hera_patches") is None:
        raise ValueError(f"stage: hera needs {PATCHES}, which is not installed; run {PATCHES_INSTALL}.")
