"""Where selected heads or layers come from, as their file says it, and how a run differs from that."""

import math
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..config import HeraConfig
from ..knobs import Role
from .samples import SelectionInputs

_PACKAGES = ("llamafactory-hera", "llamafactory", "torch", "transformers", "peft")

# Facts that are no setting of ours, each with what decides it; the others are declared with their keys.
_MEASURED = {
    Role.TRAINS: {"model_fingerprint": "model_name_or_path"},
    Role.SELECTS: {"model_fingerprint": "model_name_or_path", "dataset": "dataset"},
    Role.SCORES: {"samples_digest": "dataset"},
}
# Fingerprints are digests: the name that goes with each says more.
_NAMES = {"model_fingerprint": "model", "teacher_fingerprint": "teacher"}


def compared_facts(role: Role) -> dict[str, str]:
    """The facts of a provenance that two selections, two score files, or a selection and a run must share.

    Returns:
        Each fact with the key that decides it.
    """
    return _MEASURED[role] | HeraConfig.fact_keys(role)


def describe(inputs: SelectionInputs, config: HeraConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a selection: names, settings, versions and what was measured."""
    return {
        "model": inputs.model_name,
        "adapters": [str(folder) for folder in inputs.adapter_folders],
        "teacher": config.teacher,
        "dataset": inputs.dataset_name,
        **config.facts(Role.SELECTS, Role.SCORES),
        "stored_dtype": config.select.dtype,
        "batch_size": config.select.batch_size,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        **measured,
    }


def rounded(scores: list[float]) -> list[float | None]:
    """Scores as they are written; one that could not be computed is null."""
    return [None if math.isnan(score) else round(score, 7) for score in scores]


def differences(provenance: dict[str, Any], now: dict[str, Any], role: Role) -> list[str]:
    """In which settings a run differs from the selection.

    Args:
        provenance: Of the selection; a fact that it lacks is not compared.
        now: The same facts of the run.
        role: Which facts are compared, see :func:`compared_facts`.

    Returns:
        For each difference ``key was …, is …``.
    """
    return [
        f"{key} was {_shown(provenance, fact)}, is {_shown(now, fact)}"
        for fact, key in compared_facts(role).items()
        if fact in provenance and provenance[fact] != now[fact]
    ]


def _shown(facts: dict[str, Any], fact: str) -> str:
    if fact in _NAMES:
        return f"{facts.get(_NAMES[fact])} (fingerprint {facts[fact][:8]})"
    return str(facts[fact])


def package_versions() -> dict[str, str]:
    """Versions of this project and of what it computes with, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
