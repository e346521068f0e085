import random
from collections import Counter

import pytest
from scene_reader import WORDS, answer, holds, read, read_caption

from llamafactory_hera.demo.scene_text import CATEGORIES, caption, pick_questions, questions
from llamafactory_hera.demo.scenes import PALETTE, SHAPES, World, render

WORLD = World()
SPLITS = ("train", "held_out")
HELD_OUT = {("green", "circle"), ("blue", "square"), ("yellow", "triangle"), ("red", "cross")}


def scenes(split: str, count: int) -> list:
    rng = random.Random(f"test {split}")
    return [WORLD.sample(rng, split) for _ in range(count)]


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_of_the_pixels(split):
    rng = random.Random(1)
    for scene in scenes(split, 300):
        seen = read(render(WORLD, scene))
        claimed, relations, count = read_caption(caption(WORLD, scene, rng))
        assert claimed == {(item.size, item.colour, item.shape, item.place) for item in seen}
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
        seen = read(render(WORLD, scene))
        for question in questions(WORLD, scene, split):
            assert question.answer == answer(seen, question.text), question
            asked[question.category] += 1
    assert set(asked) == set(CATEGORIES)


def test_traps_are_colour_questions_whose_usual_answer_is_wrong():
    usual = dict(zip(SHAPES, ("red", "green", "blue", "yellow"), strict=True))
    for scene in scenes("train", 100):
        for question in questions(WORLD, scene, "train"):
            named = [shape for shape in SHAPES if question.text == f"What colour is the {shape}?"]
            assert question.trap == bool(named and question.answer != usual[named[0]])


def test_no_training_scene_or_text_holds_a_held_out_pair():
    rng = random.Random(2)
    seen_pairs = set()
    for scene in scenes("train", 400):
        seen_pairs |= {item.pair for item in scene.objects}
        text = " ".join(q.text + " " + q.answer for q in questions(WORLD, scene, "train")) + caption(WORLD, scene, rng)
        assert not [pair for pair in HELD_OUT if " ".join(pair) in text]
    assert seen_pairs == {(colour, shape) for colour in PALETTE for shape in SHAPES} - HELD_OUT


def test_every_held_out_scene_and_question_is_about_something_held_out():
    rng = random.Random(3)
    for scene in scenes("held_out", 200):
        unseen = {i for i, item in enumerate(scene.objects) if item.pair in HELD_OUT}
        assert unseen
        for question in pick_questions(WORLD, scene, rng, 3, "held_out"):
            assert not question.about or unseen & set(question.about)


def test_colour_follows_shape_as_often_as_asked():
    for bias in (0.6, 0.2):
        world, rng = World(colour_bias=bias), random.Random(4)
        items = [item for _ in range(1500) for item in world.sample(rng).objects]
        usual = sum(item.colour == world.preferred_colour(item.shape) for item in items) / len(items)
        assert usual == pytest.approx(bias, abs=0.035)


def test_picked_yes_no_questions_are_as_often_yes_as_no():
    rng, answers = random.Random(5), Counter()
    for scene in scenes("train", 600):
        picked = pick_questions(WORLD, scene, rng, 3, "train")
        assert len(set(picked)) == 3
        answers.update(question.answer for question in picked if question.category == "exist")
    assert set(answers) == {"yes", "no"}
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_larger_grids_name_their_cells():
    world = World(grid=(3, 3), max_objects=9)
    scene = next(s for s in (world.sample(random.Random(i)) for i in range(500)) if len(s.objects) == 9)
    assert [world.position(item) for item in scene.objects] == [
        *("top left", "top centre", "top right"),
        *("middle left", "centre", "middle right"),
        *("bottom left", "bottom centre", "bottom right"),
    ]
    assert render(world, scene).size == (48, 48)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"grid": (2, 4)}, r"grid=\(2, 4\)"),
        ({"max_objects": 5}, "max_objects=5: choose 1 to 4"),
        ({"cell": 8}, "cell=8: choose at least 16"),
        ({"colour_bias": 1.5}, "colour_bias=1.5"),
    ],
)
def test_impossible_worlds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        World(**arguments)
