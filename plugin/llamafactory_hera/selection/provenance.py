"""Where selected heads come from, as written to ``heads.json``, and how a run differs from that."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .draw import Sample
from .material import Material
from .samples import samples_digest
from .settings import SelectSettings

if TYPE_CHECKING:
    from .run import Scores

_PACKAGES = ("llamafactory-hera", "llamafactory", "torch", "transformers", "peft")

#: What two score files must share to be compared, with the words for it.
COMPARABLE = {
    "teacher_fingerprint": "teacher",
    "samples_digest": "images",
    "mode": "mode",
    "k": "k",
    "pooling": "pooling",
    "similarity": "similarity",
}

#: What a run must share with the selection whose heads it trains: facts of a provenance and the keys that decide them.
TRAINED_ON = {"model_fingerprint": "model_name_or_path", "teacher_fingerprint": "hera_teacher", "m": "hera_select_m"}

#: What a selection must share with another to be the same selection.
SELECTED_BY = {
    **TRAINED_ON,
    "dataset": "dataset",
    "samples_asked": "hera_select_samples",
    "mode": "hera_select_mode",
    "k": "hera_select_k",
    "pooling": "hera_pooling",
    "similarity": "hera_similarity",
    "strategy": "hera_select",
    "seed": "hera_select_seed",
}
# Fingerprints are digests: the name that goes with each says more.
_NAMES = {"model_fingerprint": "model", "teacher_fingerprint": "teacher"}

#: What pooled outputs depend on, beside the samples' tokens.
FEATURE_FACTS = ("model_fingerprint", "samples_digest", "mode", "pooling", "stored_dtype")


def identity(model: str, teacher: str, samples: Sequence[Sample], settings: SelectSettings) -> dict[str, Any]:
    """What the scores depend on.

    Args:
        model: Fingerprint of the language model.
        teacher: Fingerprint of the teacher.
        samples: As drawn.
        settings: Of the selection.
    """
    return {
        "model_fingerprint": model,
        "teacher_fingerprint": teacher,
        "samples_digest": samples_digest(samples),
        "samples": len(samples),
        "mode": settings.mode,
        "k": settings.k,
        "pooling": settings.pooling,
        "similarity": settings.similarity,
        "stored_dtype": settings.stored_dtype,
    }


def describe(
    facts: dict[str, Any], material: Material, settings: SelectSettings, scores: "Scores", compute_dtype: str
) -> dict[str, Any]:
    """The provenance of a selection; scores that could not be computed are null.

    Args:
        facts: From :func:`identity`.
        material: For names.
        settings: Of the selection.
        scores: Of all heads and layers.
        compute_dtype: In which the model ran.
    """
    return {
        "model": material.model_name,
        "adapters": [str(folder) for folder in material.adapter_folders],
        "teacher": material.teacher_name,
        "dataset": material.dataset_name,
        **facts,
        "samples_asked": settings.samples,
        "strategy": settings.strategy,
        "m": settings.m,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "compute_dtype": compute_dtype,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "chance_level": scores.chance,
        "layer_scores": _rounded(scores.layers.tolist()),
        "scores": [_rounded(row) for row in scores.heads.tolist()],
    }


def differences(provenance: dict[str, Any], now: dict[str, Any], keys: dict[str, str]) -> list[str]:
    """In which settings a run differs from the selection.

    Args:
        provenance: Of the selection; a fact that it lacks is not compared.
        now: The same facts of the run.
        keys: Facts to compare, with the config keys that decide them.

    Returns:
        For each difference ``key was …, is …``.
    """
    return [
        f"{key} was {_shown(provenance, fact)}, is {_shown(now, fact)}"
        for fact, key in keys.items()
        if fact in provenance and provenance[fact] != now[fact]
    ]


def _shown(facts: dict[str, Any], fact: str) -> str:
    if fact in _NAMES:
        return f"{facts.get(_NAMES[fact])} (fingerprint {facts[fact][:8]})"
    return str(facts[fact])


def _rounded(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 7) for value in values]


def package_versions() -> dict[str, str]:
    """Versions of this project and of what it computes with, as far as they are installed."""
    return {name: found for name in _PACKAGES if (found := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
