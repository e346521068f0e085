"""What is said about a scene: captions, and questions with their answers by category."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from .scenes import PALETTE, SHAPES, Scene, SceneObject, Split, World

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CATEGORIES = ("count", "colour", "shape", "where", "relation", "size", "exist")


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        category: One of ``CATEGORIES``.
        text: The question.
        answer: Its answer, a word or a short phrase.
        about: Indices of the objects that it is about; empty when it is about the whole scene.
        trap: The answer that the language prior suggests is wrong: the colour of a shape that has not its usual
            colour.
    """

    category: str
    text: str
    answer: str
    about: tuple[int, ...] = ()
    trap: bool = False


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def reference(scene: Scene, index: int) -> str | None:
    """The shortest phrase that names this object alone, "circle" to "large red circle", or None if there is none."""
    item = scene.objects[index]
    others = [other for i, other in enumerate(scene.objects) if i != index]
    if all(other.shape != item.shape for other in others):
        return item.shape
    if all(other.pair != item.pair for other in others):
        return f"{item.colour} {item.shape}"
    if all((other.pair, other.size) != (item.pair, item.size) for other in others):
        return f"{item.size} {item.colour} {item.shape}"
    return None


def relations(first: SceneObject, second: SceneObject) -> list[tuple[str, str]]:
    """True relations of two objects, each with its opposite: ("left of", "right of"), ("above", "below"), …"""
    found = []
    if first.column != second.column:
        pair = ("left of", "right of")
        found.append(pair if first.column < second.column else pair[::-1])
    if first.row != second.row:
        pair = ("above", "below")
        found.append(pair if first.row < second.row else pair[::-1])
    return found


def _related(scene: Scene) -> list[tuple[int, int, str, str, str, str]]:
    """(i, j, name of i, name of j, relation, opposite) for every relation of two objects that both have a name."""
    names = [reference(scene, i) for i in range(len(scene.objects))]
    return [
        (i, j, names[i], names[j], relation, opposite)
        for i, j in permutations(range(len(scene.objects)), 2)
        if names[i] and names[j]
        for relation, opposite in relations(scene.objects[i], scene.objects[j])
    ]


def caption(world: World, scene: Scene, rng: random.Random) -> str:
    """A full description: every object with size, colour, shape and place, then one relation if one can be said."""
    items = list(scene.objects)
    rng.shuffle(items)
    phrases = [f"a {item.size} {item.colour} {item.shape}" for item in items]
    places = [world.position(item) for item in items]
    if rng.random() < 0.5:
        count = NUMBERS[len(items)]
        head = "There is one object" if len(items) == 1 else f"There are {count} objects"
        listed = [f"{phrase} at the {place}" for phrase, place in zip(phrases, places, strict=True)]
        text = f"{head}: {_join(listed)}."
    else:
        sentences = (
            f"{phrase.capitalize()} is at the {place}." for phrase, place in zip(phrases, places, strict=True)
        )
        text = " ".join(sentences)
    related = _related(scene)
    if related:
        _, _, first, second, relation, _ = rng.choice(related)
        text += f" The {first} is {relation} the {second}."
    return text


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def questions(world: World, scene: Scene, split: Split = "train") -> list[Question]:
    """Every question that the scene allows, in a fixed order, each with its one true answer.

    Questions that are answered "no" name only pairs that the split may name (``World.pairs``), so training text never
    mentions a held-out pair.
    """
    objects = scene.objects
    found = [Question("count", "How many objects are there?", NUMBERS[len(objects)])]
    for shape in SHAPES:
        number = sum(item.shape == shape for item in objects)
        found.append(Question("count", f"How many {plural(shape)} are there?", NUMBERS[number]))
    for colour in PALETTE:
        number = sum(item.colour == colour for item in objects)
        found.append(Question("count", f"How many {colour} objects are there?", NUMBERS[number]))
    for index in range(len(objects)):
        found += _questions_about_one(world, scene, index)
    found += _questions_about_two(scene)
    return found + _existence_questions(world, scene, split)


def _questions_about_one(world: World, scene: Scene, index: int) -> list[Question]:
    item, about = scene.objects[index], (index,)
    place, name = world.position(item), reference(scene, index)
    found = [
        Question("colour", f"What colour is the object at the {place}?", item.colour, about),
        Question("shape", f"What shape is the object at the {place}?", item.shape, about),
        Question("size", f"Is the object at the {place} large or small?", item.size, about),
    ]
    if name == item.shape:
        trap = item.colour != world.preferred_colour(item.shape)
        found.append(Question("colour", f"What colour is the {name}?", item.colour, about, trap))
    if sum(other.colour == item.colour for other in scene.objects) == 1:
        found.append(Question("shape", f"What shape is the {item.colour} object?", item.shape, about))
    if name:
        found.append(Question("where", f"Where is the {name}?", place, about))
        found.append(Question("size", f"Is the {name} large or small?", item.size, about))
    return found


def _questions_about_two(scene: Scene) -> list[Question]:
    found = []
    for i, j, first, second, relation, opposite in _related(scene):
        about = (i, j)
        found.append(Question("relation", f"Is the {first} {relation} the {second}?", "yes", about))
        found.append(Question("relation", f"Is the {first} {opposite} the {second}?", "no", about))
        # "left of" or "above" comes first whichever is true, so the order gives nothing away.
        one, other = sorted((relation, opposite), key=("left of", "above", "right of", "below").index)
        answer = relation.removesuffix(" of")
        found.append(Question("relation", f"Is the {first} {one} or {other} the {second}?", answer, about))
        if scene.objects[i].size != scene.objects[j].size:
            larger = first if scene.objects[i].size == "large" else second
            found.append(Question("size", f"Which is larger, the {first} or the {second}?", f"the {larger}", about))
    return found


def _existence_questions(world: World, scene: Scene, split: Split) -> list[Question]:
    found = []
    for colour, shape in world.pairs(split):
        about = tuple(i for i, item in enumerate(scene.objects) if item.pair == (colour, shape))
        found.append(Question("exist", f"Is there a {colour} {shape}?", "yes" if about else "no", about))
    for shape in SHAPES:
        about = tuple(i for i, item in enumerate(scene.objects) if item.shape == shape)
        found.append(Question("exist", f"Is there a {shape}?", "yes" if about else "no", about))
    return found


def pick_questions(world: World, scene: Scene, rng: random.Random, count: int, split: Split) -> list[Question]:
    """Draw different questions: category uniform, then answer uniform (so that "yes" is as frequent as "no"), then
    question.

    In held-out scenes only questions about a held-out object or about the whole scene are asked.
    """
    pool = questions(world, scene, split)
    if split == "held_out":
        unseen = {i for i, item in enumerate(scene.objects) if world.is_held_out(item)}
        pool = [question for question in pool if not question.about or unseen & set(question.about)]
    picked: list[Question] = []
    for _ in range(count):
        candidates = [question for question in pool if question not in picked]
        for field in ("category", "answer"):
            value = rng.choice(sorted({getattr(question, field) for question in candidates}))
            candidates = [question for question in candidates if getattr(question, field) == value]
        picked.append(rng.choice(candidates))
    return picked
