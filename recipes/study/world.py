"""The study's world: scenes of one or two objects, split by combinations of shape, color and cell.

Every combination of shape, color and cell belongs to one split. For each shape in each cell, one color is reserved for
the test, another for validation, and four are for training. The reserved colors are never the shape's preferred color,
so the language prior is the same in every cell. A training scene contains only training combinations. A ``new`` scene
of validation or test contains at least one combination of its split, and otherwise training combinations. Its
questions concern either the reserved objects or the entire scene, so no training scene or caption answers them. A
``seen`` scene is drawn like a training scene.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from recipes.demo.models import TURN_END as END
from recipes.demo.scenes import (
    GRID,
    PALETTE,
    SHAPES,
    Question,
    Scene,
    SceneObject,
    all_pairs,
    caption,
    pick_questions,
    questions,
    render,
    sample_scene,
)

from .settings import Settings

#: The categories of questions. ``trap`` asks for the color of a shape that does not have its preferred color, so the
#: answer that is most likely from the text alone is wrong. ``color`` asks for the color of the object at a place, so
#: the text gives no hint.
CATEGORIES = ("count", "color", "shape", "size", "where", "exist", "trap")
#: The sets of questions: on scenes like those of training, and on scenes with combinations that training never shows.
SETS = ("seen", "new")
MOST = 2  # objects per scene
_PER_SCENE = 2  # questions per validation or test scene


@dataclass(frozen=True)
class Sample:
    """A picture with a question and its answer, or with a caption and no question."""

    image: Image.Image
    question: str
    answer: str
    category: str = ""
    scene: Scene | None = field(default=None, repr=False)


@dataclass(frozen=True)
class World:
    """All samples of a study, which are the same for every seed.

    Attributes:
        train: Samples of a training picture with one question; each picture occurs in several samples.
        captions: Training pictures with captions.
        texts: The text that the language model reads before it sees pictures.
        validation: Questions for choosing the weight, by set.
        test: Questions that are asked once, by set.
        scored: New ``seen`` pictures with captions, for measuring MKNN.
    """

    train: list[Sample]
    captions: list[Sample]
    texts: list[str]
    validation: dict[str, list[Sample]]
    test: dict[str, list[Sample]]
    scored: list[Sample]


def make_world(settings: Settings) -> World:
    """Draws the scenes of all splits with their captions and questions."""
    rng = random.Random("study train")
    train, captions, texts = [], [], []
    for _ in range(settings.scenes):
        scene = sample_scene(rng, "train", kept_colors, MOST)
        image, text = render(scene), caption(scene, rng)
        captions.append(Sample(image, "", text, scene=scene))
        picked = pick_questions(study_questions(scene), rng, settings.asked)
        train += [Sample(image, question.text, question.answer) for question in picked]
        texts += [text + END, text + "".join(prompt(question.text) + question.answer + END for question in picked)]
    held_out = [
        {kind: list(_ask(f"{split} {kind}", split if kind == "new" else "train", settings.questions)) for kind in SETS}
        for split in ("validation", "test")
    ]
    rng = random.Random("study scored")
    scenes = [sample_scene(rng, "train", kept_colors, MOST) for _ in range(settings.scored)]
    scored = [Sample(render(scene), "", caption(scene, rng), scene=scene) for scene in scenes]
    return World(train, captions, texts, *held_out, scored)


def prompt(question: str) -> str:
    """Returns the text before the answer: the question and a space, or nothing for a caption."""
    return f"{question} " if question else ""


def kept_colors(shape: str, row: int, column: int) -> dict[str, str]:
    """Returns a shape's reserved colors in a cell: one for ``test`` and one for ``validation``."""
    # The offset from the preferred color grows by one with each cell in reading order.
    start = SHAPES.index(shape) + row * GRID + column
    return {split: tuple(PALETTE)[(start + shift) % len(PALETTE)] for split, shift in (("test", 1), ("validation", 2))}


def split_of(item: SceneObject) -> str:
    """Returns the split that an object's combination of shape, color and cell belongs to."""
    kept = kept_colors(item.shape, item.row, item.column)
    return next((split for split, color in kept.items() if color == item.color), "train")


def study_questions(scene: Scene) -> list[Question]:
    """Lists the study's questions about a scene: the demo's questions that a small model can learn, and new ones."""
    found = [
        question
        for question in questions(scene, all_pairs())
        if question.category != "relation"
        and question.text != "How many objects are there?"
        and (question.category not in ("shape", "size") or " at the " in question.text)
    ]
    for index, item in enumerate(scene.objects):
        if sum(other.color == item.color for other in scene.objects) == 1:
            found.append(Question("where", f"Where is the {item.color} object?", item.position, (index,)))
    return found


def category_of(question: Question) -> str | None:
    """Returns a question's test category, or None if the question asks for the preferred color of a named shape."""
    if question.trap:
        return "trap"
    by_name = question.category == "color" and " at the " not in question.text
    return None if by_name else question.category


def shares(samples: Sequence[Sample], right: Sequence[bool]) -> dict[str, float]:
    """Returns the share of right answers in each category, and the ``mean`` of these shares."""
    found = {}
    for name in CATEGORIES:
        in_category = [is_right for sample, is_right in zip(samples, right, strict=True) if sample.category == name]
        found[name] = sum(in_category) / len(in_category)
    return found | {"mean": sum(found.values()) / len(found)}


def _ask(name: str, split: str, per_category: int) -> Iterator[Sample]:
    """Draws scenes of a split and asks about them until every category has its questions.

    A question concerns an object that belongs to the split, or the entire scene. Each scene gets questions in a
    few of its possible categories: those that still need the most questions. Within a category, the answer is drawn
    before the question, so "yes" is as frequent as "no".
    """
    rng = random.Random(f"study {name}")
    missing = dict.fromkeys(CATEGORIES, per_category)
    while any(missing.values()):
        scene = sample_scene(rng, split, kept_colors, MOST)
        kept = {i for i, item in enumerate(scene.objects) if split_of(item) == split}
        pools: dict[str, list[Question]] = {}
        for question in study_questions(scene):
            category = category_of(question)
            if category and missing[category] and (not question.about or kept & set(question.about)):
                pools.setdefault(category, []).append(question)
        image = render(scene)
        for category in sorted(pools, key=lambda name: (-missing[name], rng.random()))[:_PER_SCENE]:
            answer = rng.choice(sorted({question.answer for question in pools[category]}))
            question = rng.choice([q for q in pools[category] if q.answer == answer])
            missing[category] -= 1
            yield Sample(image, question.text, answer, category, scene)
