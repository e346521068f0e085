"""What is right without a look at the image: what an accuracy has to be compared with."""

from collections import Counter
from pathlib import Path

from ..files import read_json
from .dataset import TRAIN, questions_of
from .scoring import accuracy
from .world import StudySplit


def text_alone(data: Path, split: StudySplit) -> dict[str, float]:
    """Accuracy of a reader that answers a question as it was most often answered in training.

    Args:
        data: The study's data folder.
        split: Whose questions are asked.

    Returns:
        As :func:`~.scoring.accuracy`.
    """
    answers: dict[str, Counter[str]] = {}
    for row in read_json(data / f"{TRAIN}.json"):
        texts = [message["content"].removeprefix("<image>\n") for message in row["messages"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            answers.setdefault(question, Counter())[answer] += 1
    key = read_json(data / "key.json")[questions_of(split)]
    return accuracy([_answer(entry, answers.get(entry["question"])) for entry in key], key)


def one_answer(data: Path, split: StudySplit) -> dict[str, float]:
    """Accuracy of giving every question of a category the same answer, the one that is right most often."""
    key = read_json(data / "key.json")[questions_of(split)]
    answers: dict[str, Counter[str]] = {}
    for entry in key:
        answers.setdefault(entry["category"], Counter())[entry["answer"]] += 1
    return accuracy([_answer(entry, answers[entry["category"]]) for entry in key], key)


def _answer(entry: dict[str, str], answers: Counter[str] | None) -> dict[str, str]:
    return {"label": entry["answer"], "predict": answers.most_common(1)[0][0] if answers else ""}
