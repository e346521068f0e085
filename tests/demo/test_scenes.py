import random
from collections import Counter

import pytest

from llamafactory_hera.demo.scenes import (
    PALETTE,
    PREFERRED_COLOR,
    SHAPES,
    caption,
    pick_questions,
    render,
    sample_scene,
    split_questions,
)

from .scene_reader import WORDS, answer, holds, read, read_caption

CATEGORIES = {"count", "color", "shape", "where", "relation", "size", "exist"}
SPLITS = ("train", "held_out")
HELD_OUT = {("green", "circle"), ("blue", "square"), ("yellow", "triangle"), ("red", "cross")}


def scenes(split: str, count: int) -> list:
    rng = random.Random(f"test {split}")
    return [sample_scene(rng, split) for _ in range(count)]


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_of_the_pixels(split):
    rng = random.Random(1)
    for scene in scenes(split, 300):
        seen = read(render(scene))
        claimed, relations, count = read_caption(caption(scene, rng))
        assert claimed == {(item.size, item.color, item.shape, item.place) for item in seen}
        assert len(seen) == len(scene.objects)
        assert count in (None, WORDS[len(seen)])
        for first, relation, second in relations:
            (a,) = [item for item in seen if item.fits(first)]
            (b,) = [item for item in seen if item.fits(second)]
            assert holds(a, relation, b)


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_true_of_the_pixels(split):
    asked = Counter()
    for scene in scenes(split, 100):
        seen = read(render(scene))
        for question in split_questions(scene, split):
            assert question.answer == answer(seen, question.text), question
            asked[question.category] += 1
    assert set(asked) == CATEGORIES


def test_traps_are_color_questions_whose_usual_answer_is_wrong():
    usual = dict(zip(SHAPES, ("red", "green", "blue", "yellow"), strict=True))
    for scene in scenes("train", 100):
        for question in split_questions(scene, "train"):
            named = [shape for shape in SHAPES if question.text == f"What color is the {shape}?"]
            assert question.trap == bool(named and question.answer != usual[named[0]])


def test_no_training_scene_or_text_holds_a_held_out_pair():
    rng = random.Random(2)
    seen_pairs = set()
    for scene in scenes("train", 400):
        seen_pairs |= {item.pair for item in scene.objects}
        text = " ".join(q.text + " " + q.answer for q in split_questions(scene, "train")) + caption(scene, rng)
        assert not [pair for pair in HELD_OUT if " ".join(pair) in text]
    assert seen_pairs == {(color, shape) for color in PALETTE for shape in SHAPES} - HELD_OUT


def test_every_held_out_scene_and_question_is_about_something_held_out():
    rng = random.Random(3)
    for scene in scenes("held_out", 200):
        unseen = {i for i, item in enumerate(scene.objects) if item.pair in HELD_OUT}
        assert unseen
        for question in pick_questions(split_questions(scene, "held_out"), rng, 3):
            assert not question.about or unseen & set(question.about)


def test_color_follows_shape_in_three_of_five_objects():
    items = [item for scene in scenes("train", 1500) for item in scene.objects]
    usual = sum(item.color == PREFERRED_COLOR[item.shape] for item in items) / len(items)
    assert usual == pytest.approx(0.6, abs=0.035)


def test_picked_yes_no_questions_are_as_often_yes_as_no():
    rng, answers = random.Random(5), Counter()
    for scene in scenes("train", 600):
        picked = pick_questions(split_questions(scene, "train"), rng, 3)
        assert len(set(picked)) == 3
        answers.update(question.answer for question in picked if question.category == "exist")
    assert set(answers) == {"yes", "no"}
    assert 0.4 < answers["yes"] / answers.total() < 0.6
