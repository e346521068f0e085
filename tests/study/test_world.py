"""Splits by what an object is and where it stands, checked on the files that the study writes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from llamafactory_hera.demo.scenes import PALETTE, SHAPES
from settings import SIZES
from world import CATEGORIES, write_study_data

USUAL = dict(zip(SHAPES, ("red", "green", "blue", "yellow"), strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "data"
    write_study_data(folder, replace(SIZES["smoke"], scenes=1500, questions=60, asked=4))
    return folder


@pytest.fixture(scope="module")
def factors(data: Path) -> dict[str, dict]:
    return json.loads((data / "factors.json").read_text())


@pytest.fixture(scope="module")
def key(data: Path) -> dict[str, list[dict]]:
    return json.loads((data / "key.json").read_text())


def combinations(factors: dict[str, dict], split: str) -> list[set[tuple]]:
    return [
        {(item["shape"], item["colour"], item["row"], item["column"]) for item in entry["scene"]["objects"]}
        for entry in factors.values()
        if entry["split"] == split
    ]


def test_every_held_out_scene_holds_a_combination_that_no_other_split_has(factors):
    seen = {split: set().union(*combinations(factors, split)) for split in ("train", "validation", "test")}
    assert len(seen["train"]) == 4 * 4 * 4  # of each shape and cell four colours
    for split, other in (("validation", "test"), ("test", "validation")):
        new = seen[split] - seen["train"]
        assert len(new) == 4 * 4
        assert not new & seen[other]
        assert all(scene & new for scene in combinations(factors, split))
        assert any(scene - new for scene in combinations(factors, split))  # beside others that training knows


def test_every_colour_of_every_shape_is_seen_in_training(factors):
    pairs = {combination[:2] for scene in combinations(factors, "train") for combination in scene}
    assert pairs == {(shape, colour) for shape in SHAPES for colour in PALETTE}


def test_three_of_five_objects_have_their_usual_colour_in_every_cell_of_training_scenes(factors):
    for row in (0, 1):
        for column in (0, 1):
            found = [c for scene in combinations(factors, "train") for c in scene if c[2:] == (row, column)]
            assert sum(USUAL[c[0]] == c[1] for c in found) / len(found) == pytest.approx(0.6, abs=0.06)


def test_questions_are_about_held_out_objects(factors, key):
    asked = [entry for entry in key["study_test"] if "object at the" in entry["question"]]
    assert len(asked) > 60
    trained = set().union(*combinations(factors, "train"))
    for entry in asked:
        place = entry["question"].split("object at the ")[1].rstrip("?").removesuffix(" large or small")
        row, column = ("top", "bottom").index(place.split()[0]), ("left", "right").index(place.split()[1])
        (item,) = [
            item
            for item in factors[entry["image"]]["scene"]["objects"]
            if (item["row"], item["column"]) == (row, column)
        ]
        assert (item["shape"], item["colour"], row, column) not in trained


def test_each_category_has_its_questions_and_rows_follow_the_key(data, key):
    for split in ("validation", "test"):
        entries = key[f"study_{split}"]
        assert Counter(entry["category"] for entry in entries) == dict.fromkeys(CATEGORIES, 60)
        rows = json.loads((data / f"study_{split}.json").read_text())
        assert [row["messages"][0]["content"] for row in rows] == [f"<image>\n{e['question']}" for e in entries]
        assert [row["messages"][1]["content"] for row in rows] == [entry["answer"] for entry in entries]
        assert [row["images"] for row in rows] == [[entry["image"]] for entry in entries]


def test_the_most_likely_answer_from_text_alone_fails_on_traps(data, key):
    """A reader of training text without images answers each question as it was most often answered there."""
    answers: dict[str, Counter] = {}
    for row in json.loads((data / "study_train.json").read_text()):
        texts = [message["content"].removeprefix("<image>\n") for message in row["messages"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            answers.setdefault(question, Counter())[answer] += 1
    right: dict[str, list[bool]] = {}
    for entry in key["study_test"]:
        best = answers[entry["question"]].most_common(1)[0][0] if entry["question"] in answers else ""
        right.setdefault(entry["category"], []).append(best == entry["answer"])
    assert sum(right["trap"]) == 0
    assert sum(right["exist"]) / len(right["exist"]) > 0.35  # where text says nothing, guessing is as good as any
    # in training scenes the same reader is right on most of these questions: it is a prior, not a rule
    for shape, colour in USUAL.items():
        named = answers[f"What colour is the {shape}?"]
        assert named.most_common(1)[0][0] == colour
        assert 0.4 < named[colour] / named.total() < 0.8
