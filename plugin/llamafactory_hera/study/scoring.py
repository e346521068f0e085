"""Scores the host's predictions: exact match, by category."""

import json
from collections.abc import Sequence
from pathlib import Path

from .questions import CATEGORIES


def accuracy(predictions: Sequence[dict[str, str]], key: Sequence[dict[str, str]]) -> dict[str, float]:
    """The share of answers that are exactly right, apart from surrounding spaces.

    Args:
        predictions: Lines of the host's ``generated_predictions.jsonl``, in the dataset's order.
        key: The dataset's entries of ``key.json``, in the same order.

    Returns:
        Accuracy of each category, and ``mean``, in which every category counts the same.

    Raises:
        ValueError: The two do not belong together.
    """
    if len(predictions) != len(key):
        raise ValueError(f"predictions: {len(predictions)} for {len(key)} questions; predict on the whole dataset")
    right: dict[str, list[bool]] = {}
    for row, (predicted, entry) in enumerate(zip(predictions, key, strict=True)):
        if predicted["label"].strip() != entry["answer"]:
            raise ValueError(
                f"predictions: row {row} has the label {predicted['label'].strip()!r}, the key {entry['answer']!r}; "
                "predict in the dataset's order"
            )
        right.setdefault(entry["category"], []).append(predicted["predict"].strip() == entry["answer"])
    shares = {name: sum(right[name]) / len(right[name]) for name in CATEGORIES if name in right}
    return shares | {"mean": sum(shares.values()) / len(shares)}


def accuracy_of(predictions: Path, key: Path, dataset: str) -> dict[str, float]:
    """:func:`accuracy` of files; ``dataset`` names the part of the key."""
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    return accuracy(lines, json.loads(key.read_text(encoding="utf-8"))[dataset])
