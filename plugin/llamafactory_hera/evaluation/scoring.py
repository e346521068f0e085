"""Prompts and scoring that the definitions in ``suites/`` name by ``!function``."""

from collections.abc import Mapping, Sequence
from typing import Any

from .suites import aggregate


def demo_results(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Exact match but for case and a full stop; the questions of an image are a group."""
    given = answers[0].strip().rstrip(".").lower()
    right = int(given == row["answer"].lower())
    return {"hera": {"id": row["id"], "group": row["source"], "category": row["category"], "right": right}}


def demo_score(records: Sequence[Mapping[str, Any]]) -> float:
    """The headline score, for lmms-eval's own table."""
    return next(iter(aggregate("hera_demo_questions", records).values()))
