"""The study's world: the demo's scenes of one or two objects, split by what an object is and where it stands.

Every combination of shape, color and cell belongs to one split. For a shape in a cell one color is kept for the
test, another for validation, and four are for training; the two are never the shape's preferred color, so that the
language prior is the same in every cell. A training scene holds training combinations alone. A ``new`` scene of the
other splits holds at least one combination of that split and otherwise training combinations, and only objects of the
former kind, or the whole scene, are asked about: no training scene or caption answers that. A ``seen`` scene is drawn
as those of training are.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from llamafactory_hera.demo.models import TURN_END as END
from llamafactory_hera.demo.scenes import (
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
from settings import Settings

#: ``trap``: the color of a named shape that has not its preferred color, so that the answer that is most likely from
#: the text alone is wrong. ``color`` asks by place, where text alone has nothing to go by.
CATEGORIES = ("count", "color", "shape", "size", "where", "exist", "trap")
#: Where questions are asked: scenes as in training, and scenes with combinations that training never shows.
SETS = ("seen", "new")
MOST = 2  # objects a scene
_PER_SCENE = 2  # questions about a scene that is not trained on


@dataclass(frozen=True)
class Sample:
    """A picture and what is said about it: a question with its answer, or a caption (no question)."""

    image: Image.Image
    question: str
    answer: str
    category: str = ""
    scene: Scene | None = field(default=None, repr=False)


@dataclass(frozen=True)
class World:
    """Everything that a study shows: the same for every seed.

    Attributes:
        train: Training pictures with one question each, several samples a picture.
        captions: Training pictures with captions.
        texts: What the language model reads before it sees.
        validation: Questions that choose the weight, by set.
        test: Questions that are asked once, by set.
        scored: New ``seen`` pictures with captions, on which MKNN is measured.
    """

    train: list[Sample]
    captions: list[Sample]
    texts: list[str]
    validation: dict[str, list[Sample]]
    test: dict[str, list[Sample]]
    scored: list[Sample]


def make_world(settings: Settings) -> World:
    """Draws the scenes of all splits and what is said about them."""
    rng = random.Random("study train")
    train, captions, texts = [], [], []
    for _ in range(settings.scenes):
        scene = sample_scene(rng, "train", kept_colors, MOST)
        image, text = render(scene), caption(scene, rng)
        captions.append(Sample(image, "", text, scene=scene))
        picked = pick_questions(asked_of(scene), rng, settings.asked)
        train += [Sample(image, question.text, question.answer) for question in picked]
        texts += [text + END, text + "".join(asked(question.text) + question.answer + END for question in picked)]
    held_out = [
        {kind: list(_ask(f"{split} {kind}", split if kind == "new" else "train", settings.questions)) for kind in SETS}
        for split in ("validation", "test")
    ]
    rng = random.Random("study scored")
    scenes = [sample_scene(rng, "train", kept_colors, MOST) for _ in range(settings.scored)]
    scored = [Sample(render(scene), "", caption(scene, rng), scene=scene) for scene in scenes]
    return World(train, captions, texts, *held_out, scored)


def asked(question: str) -> str:
    """A question as the model reads it before its answer, without one where it is to describe the picture."""
    return f"{question} " if question else ""


def kept_colors(shape: str, row: int, column: int) -> dict[str, str]:
    """The colors that a shape in a cell has in ``test`` and in ``validation`` scenes and nowhere else."""
    # so many colors behind the preferred one, and one more for each cell in reading order
    start = SHAPES.index(shape) + row * GRID + column
    return {split: tuple(PALETTE)[(start + shift) % len(PALETTE)] for split, shift in (("test", 1), ("validation", 2))}


def split_of(item: SceneObject) -> str:
    """The split that an object's combination of shape, color and cell belongs to."""
    kept = kept_colors(item.shape, item.row, item.column)
    return next((split for split, color in kept.items() if color == item.color), "train")


def asked_of(scene: Scene) -> list[Question]:
    """The study's questions about a scene, by their category; of the demo's those that a small model can learn."""
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
    """A question's category in the test; None for the color of a named shape that has its preferred color."""
    if question.trap:
        return "trap"
    by_name = question.category == "color" and " at the " not in question.text
    return None if by_name else question.category


def shares(samples: Sequence[Sample], right: Sequence[bool]) -> dict[str, float]:
    """The share of right answers by category, and the ``mean`` of these shares."""
    found = {}
    for name in CATEGORIES:
        of_category = [is_right for sample, is_right in zip(samples, right, strict=True) if sample.category == name]
        found[name] = sum(of_category) / len(of_category)
    return found | {"mean": sum(found.values()) / len(found)}


def _ask(name: str, split: str, per_category: int) -> Iterator[Sample]:
    """Draws scenes of a split and asks until every category has its questions.

    A question is about an object that belongs to the split, or about the whole scene. A scene is asked one question
    each of some categories, drawn among those that it allows and that lack most. Among a category's questions the
    answer is drawn first, so that "yes" is as frequent as "no".
    """
    rng = random.Random(f"study {name}")
    missing = dict.fromkeys(CATEGORIES, per_category)
    while any(missing.values()):
        scene = sample_scene(rng, split, kept_colors, MOST)
        kept = {i for i, item in enumerate(scene.objects) if split_of(item) == split}
        pools: dict[str, list[Question]] = {}
        for question in asked_of(scene):
            category = category_of(question)
            if category and missing[category] and (not question.about or kept & set(question.about)):
                pools.setdefault(category, []).append(question)
        image = render(scene)
        for category in sorted(pools, key=lambda name: (-missing[name], rng.random()))[:_PER_SCENE]:
            answer = rng.choice(sorted({question.answer for question in pools[category]}))
            question = rng.choice([q for q in pools[category] if q.answer == answer])
            missing[category] -= 1
            yield Sample(image, question.text, answer, category, scene)
