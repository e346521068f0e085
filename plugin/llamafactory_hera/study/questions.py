"""Which questions are asked about a scene, and their categories."""

import random
from collections.abc import Iterator

from ..demo.scene_text import Question, pick_questions
from ..demo.scene_text import questions as all_questions
from ..demo.scenes import Scene
from .world import StudySplit, StudyWorld

#: ``trap``: the colour of a named shape that has not its preferred colour, so that the answer that is most likely from
#: the text alone is wrong. ``colour`` asks by place, where text alone has nothing to go by.
CATEGORIES = ("count", "colour", "shape", "where", "relation", "size", "exist", "trap")

QUESTIONS_PER_SCENE = 2  # of a held-out scene


def category_of(question: Question) -> str | None:
    """A question's category; None for the colour of a named shape that has its preferred colour."""
    if question.trap:
        return "trap"
    by_name = question.category == "colour" and " at the " not in question.text
    return None if by_name else question.category


def training_questions(world: StudyWorld, scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Different questions of all kinds, drawn as the demo draws them."""
    return pick_questions(world, scene, rng, count, "train")


def evaluation_questions(
    world: StudyWorld, split: StudySplit, rng: random.Random, per_category: int
) -> Iterator[tuple[int, Scene, str, Question]]:
    """Draws held-out scenes and asks until every category has its questions.

    A question is about an object that belongs to the split, or about the whole scene. A scene is asked one question
    each of some categories, drawn among those that it allows and that lack most. Among a category's questions the
    answer is drawn first, so that "yes" is as frequent as "no".

    Args:
        world: The world.
        split: ``validation`` or ``test``.
        rng: Source of chance.
        per_category: Questions in each category.

    Yields:
        Number of the scene, scene, category, question.
    """
    missing = dict.fromkeys(CATEGORIES, per_category)
    number = 0
    while any(missing.values()):
        scene = world.draw(rng, split)
        kept = {i for i, item in enumerate(scene.objects) if world.split_of(item) == split}
        pools: dict[str, list[Question]] = {}
        for question in all_questions(world, scene):
            if missing.get(category_of(question)) and (not question.about or kept & set(question.about)):
                pools.setdefault(category_of(question), []).append(question)
        chosen = sorted(pools, key=lambda category: (-missing[category], rng.random()))[:QUESTIONS_PER_SCENE]
        for category in chosen:
            answer = rng.choice(sorted({question.answer for question in pools[category]}))
            missing[category] -= 1
            yield number, scene, category, rng.choice([q for q in pools[category] if q.answer == answer])
        number += bool(chosen)
