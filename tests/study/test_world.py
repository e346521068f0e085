"""Splits by what an object is and where it stands, and what is asked."""

from collections import Counter
from dataclasses import replace

import pytest

from llamafactory_hera.demo.scenes import PALETTE, SHAPES
from report import without_looking
from settings import SIZES
from world import CATEGORIES, MOST, Sample, World, make_world

USUAL = dict(zip(SHAPES, ("red", "green", "blue", "yellow"), strict=True))


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(replace(SIZES["smoke"], scenes=1500, questions=60, asked=4))


def combinations(samples: list[Sample]) -> list[set[tuple]]:
    return [{(o.shape, o.color, o.row, o.column) for o in sample.scene.objects} for sample in samples]


def test_every_new_scene_holds_a_combination_that_no_other_split_has(world):
    trained = set().union(*combinations(world.captions))
    assert len(trained) == 4 * 4 * 4  # of each shape and cell four colors
    kept = [combinations(held_out["new"]) for held_out in (world.validation, world.test)]
    unseen = [set().union(*scenes) - trained for scenes in kept]
    assert [len(found) for found in unseen] == [4 * 4, 4 * 4]
    assert not unseen[0] & unseen[1]
    for scenes, found in zip(kept, unseen, strict=True):
        assert all(scene & found for scene in scenes)
        assert any(scene - found for scene in scenes)  # beside others that training knows
    for samples in (world.scored, world.validation["seen"], world.test["seen"]):
        assert set().union(*combinations(samples)) <= trained


def test_training_shows_every_color_of_every_shape_and_mostly_the_usual_one(world):
    seen = [combination for scene in combinations(world.captions) for combination in scene]
    assert {combination[:2] for combination in seen} == {(shape, color) for shape in SHAPES for color in PALETTE}
    for cell in {combination[2:] for combination in seen}:
        here = [USUAL[shape] == color for shape, color, *place in seen if tuple(place) == cell]
        assert sum(here) / len(here) == pytest.approx(0.6, abs=0.06)
    assert {len(sample.scene.objects) for sample in world.captions} == set(range(1, MOST + 1))


def test_each_set_has_as_many_questions_of_each_category_and_new_ones_are_about_new_objects(world):
    trained = set().union(*combinations(world.captions))
    for held_out in (world.validation, world.test):
        for samples in held_out.values():
            assert Counter(sample.category for sample in samples) == dict.fromkeys(CATEGORIES, 60)
        asked = [sample for sample in held_out["new"] if " at the " in sample.question]
        assert len(asked) > 60
        for sample in asked:
            place = sample.question.split(" at the ")[1].split()
            (item,) = [o for o in sample.scene.objects if o.position.split() == [place[0], place[1].rstrip("?")]]
            assert (item.shape, item.color, item.row, item.column) not in trained


def test_text_alone_fails_on_traps_and_answers_are_balanced(world):
    for kind in world.test:
        floor = without_looking(world, kind)
        assert floor["text_alone"]["trap"] == 0
        assert floor["one_answer"]["exist"] < 0.65
        assert floor["one_answer"]["color"] < 0.4
    named = Counter(s.answer for s in world.train if s.question == "What color is the circle?")
    assert named.most_common(1)[0][0] == "red"  # a prior, not a rule
    assert 0.4 < named["red"] / named.total() < 0.8
