"""The adapter for LLaMA-Factory (the host); the patches are a separate distribution."""

from importlib.util import find_spec
from typing import Any, NamedTuple

#: The distribution that adds ``stage: hera`` to the host. It has the same version as this package.
PATCHES = "llamafactory-hera-patches"
#: The release of LLaMA-Factory that all tests use.
TESTED_HOST = "0.9.5"
#: The remedy for a missing host, or for versions that do not work together.
PINNED_INSTALL = '`pip install ".[pinned]" ./patches` in a clone of llamafactory-hera'
#: The remedy for missing patches.
PATCHES_INSTALL = "`pip install . ./patches` in a clone of llamafactory-hera"


def refuse_data_uri(image: Any, where: str) -> None:
    """Raises ``ValueError`` for a data URI: HeRA reads it, but the host treats it as a path and fails in training."""
    if isinstance(image, str) and image.startswith("data:"):
        problem = "has an image as a data URI, which LLaMA-Factory does not read"
        raise ValueError(f"{where} {problem}; write the image to a file, and give the file's path.")


class Stage(NamedTuple):
    """A stage that the patches add to the host. Functions and classes are import paths, resolved on use."""

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
    """Raises ``ValueError`` unless LLaMA-Factory and, if ``patches`` is true, its patches are installed."""
    if find_spec("llamafactory") is None:
        raise ValueError(f"llamafactory is not installed; run {PINNED_INSTALL}.")
    if patches and find_spec("hera_patches") is None:
        raise ValueError(f"stage: hera needs {PATCHES}, which is not installed; run {PATCHES_INSTALL}.")
