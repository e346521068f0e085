"""Exact match by category."""

import pytest

from llamafactory_hera.study.scoring import accuracy


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"predict": predicted, "label": f"{label}\n"} for predicted, label in pairs]


KEY = [
    {"category": "colour", "answer": "red"},
    {"category": "colour", "answer": "red"},
    {"category": "colour", "answer": "red"},
    {"category": "size", "answer": "the red circle"},
]


def test_only_the_exact_answer_counts():
    given = rows((" red\n", "red"), ("red circle", "red"), ("Red", "red"), ("the red circle", "the red circle"))
    found = accuracy(given, KEY)
    assert found["colour"] == pytest.approx(1 / 3)
    assert found["size"] == 1
    assert found["mean"] == pytest.approx((1 / 3 + 1) / 2)  # each category counts the same


def test_predictions_of_another_dataset_are_refused():
    with pytest.raises(ValueError, match="row 3"):
        accuracy(rows(("red", "red"), ("red", "red"), ("red", "red"), ("red", "red")), KEY)
    with pytest.raises(ValueError, match="1 for 4 questions"):
        accuracy(rows(("red", "red")), KEY)
