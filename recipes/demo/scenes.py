"""The demo's scenes with their pixels, captions and questions, and the combinations held out from training.

A scene contains one to four objects on a 2×2 grid. Each shape has a preferred color, which it takes with probability
``COLOR_BIAS``. The answers to many color questions can therefore be guessed from the text; the others require the
image. Each shape also has one held-out color, the preferred color of the next shape. No training scene or question
contains a shape in its held-out color. Every held-out scene contains at least one such object, a new combination of
known shapes and colors.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "held_out"]

PREFERRED_COLOR = {"circle": "red", "square": "green", "triangle": "blue", "cross": "yellow"}
HELD_OUT_COLOR = {"circle": "green", "square": "blue", "triangle": "yellow", "cross": "red"}
SHAPES = tuple(PREFERRED_COLOR)
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 215, 50),
    "purple": (165, 60, 200),
    "white": (245, 245, 245),
}
RADIUS = {"small": 3, "large": 6}
SIZES = tuple(RADIUS)
GRID, CELL = 2, 16
COLOR_BIAS = 0.6
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class SceneObject:
    """An object with its shape, color and size, its cell, and its center in pixels."""

    shape: str
    color: str
    size: str
    row: int
    column: int
    x: int
    y: int

    @property
    def pair(self) -> tuple[str, str]:
        """The color and the shape."""
        return self.color, self.shape

    @property
    def position(self) -> str:
        """The cell in words, for instance "top left"."""
        return f"{('top', 'bottom')[self.row]} {('left', 'right')[self.column]}"


@dataclass(frozen=True)
class Scene:
    """The objects in reading order, and the gray level of the background (0 to 255)."""

    objects: tuple[SceneObject, ...]
    background: int


@dataclass(frozen=True)
class Question:
    """A question about an image with its answer, which is a word or a short phrase."""

    category: str  # count, color, shape, where, relation, size or exist; for a real image, its kind
    text: str
    answer: str
    about: tuple[int, ...] = ()  # indices of the objects; empty if the question is about the entire image
    trap: bool = False  # True if the question asks for the color of a shape that lacks its preferred color


def all_pairs(split: Split = "held_out") -> list[tuple[str, str]]:
    """Lists the (color, shape) pairs that scenes and questions of a split may contain."""
    pairs = [(color, shape) for shape in SHAPES for color in PALETTE]
    return [(c, s) for c, s in pairs if c != HELD_OUT_COLOR[s]] if split == "train" else pairs


def sample_scene(
    rng: random.Random,
    split: str = "train",
    kept_colors: Callable[[str, int, int], dict[str, str]] = lambda shape, *_: {"held_out": HELD_OUT_COLOR[shape]},
    most: int = GRID**2,
) -> Scene:
    """Samples a scene of one to ``most`` objects.

    Args:
        rng: The source of randomness.
        split: ``train``, or a split whose scenes contain at least one object in a color reserved for that split.
        kept_colors: Maps a shape, row and column to the colors that splits other than ``train`` reserve for them.
        most: The largest number of objects.
    """
    cells = sorted(rng.sample(range(GRID**2), rng.randint(1, most)))
    kept = set() if split == "train" else set(rng.sample(cells, rng.randint(1, len(cells))))
    objects = []
    for cell in cells:
        row, column = divmod(cell, GRID)
        shape, size = rng.choice(SHAPES), rng.choice(SIZES)
        reserved, preferred = kept_colors(shape, row, column), PREFERRED_COLOR[shape]
        if cell in kept:
            color = reserved[split]
        elif rng.random() < COLOR_BIAS:
            color = preferred
        else:
            color = rng.choice([name for name in PALETTE if name not in {preferred, *reserved.values()}])
        objects.append(place(rng, shape, color, size, row, column))
    return Scene(tuple(objects), background=rng.randint(20, 70))


def place(rng: random.Random, shape: str, color: str, size: str, row: int, column: int) -> SceneObject:
    """Places an object at a random point of its cell, with at least one free pixel on every side."""
    slack = CELL // 2 - RADIUS[size] - 1
    x, y = (cell * CELL + CELL // 2 + rng.randint(-slack, slack) for cell in (column, row))
    return SceneObject(shape, color, size, row, column, x, y)


def render(scene: Scene) -> Image.Image:
    """Renders the scene as an RGB image without smoothing, so every object has an exact palette color."""
    side = GRID * CELL
    pixels = np.full((side, side, 3), scene.background, dtype=np.uint8)
    rows, columns = np.mgrid[:side, :side]
    for item in scene.objects:
        dx, dy, r = columns - item.x, rows - item.y, RADIUS[item.size]
        box = (abs(dx) <= r) & (abs(dy) <= r)
        covered = {
            "circle": dx**2 + dy**2 <= (r + 0.3) ** 2,
            "square": box,
            "triangle": box & (2 * abs(dx) <= dy + r),
            "cross": box & ((abs(dx) <= r // 3) | (abs(dy) <= r // 3)),
        }
        pixels[covered[item.shape]] = PALETTE[item.color]
    return Image.fromarray(pixels)


def caption(scene: Scene, rng: random.Random) -> str:
    """Describes every object by size, color, shape and place, and adds one relation if the scene has one."""
    items = list(scene.objects)
    rng.shuffle(items)
    if rng.random() < 0.5:
        head = "There is one object" if len(items) == 1 else f"There are {NUMBERS[len(items)]} objects"
        *most, last = [f"a {item.size} {item.color} {item.shape} at the {item.position}" for item in items]
        text = f"{head}: {' and '.join(filter(None, (', '.join(most), last)))}."
    else:
        text = " ".join(f"A {item.size} {item.color} {item.shape} is at the {item.position}." for item in items)
    if related := _related(scene):
        _, _, first, second, relation, _ = rng.choice(related)
        text += f" The {first} is {relation} the {second}."
    return text


def _name(scene: Scene, item: SceneObject) -> str | None:
    """Returns the shortest phrase that fits only this object, such as "circle" or "large red circle", or None."""
    phrase = ""
    for field in ("shape", "color", "size"):
        phrase = f"{getattr(item, field)} {phrase}".strip()
        if sum(f"{other.size} {other.color} {other.shape}".endswith(phrase) for other in scene.objects) == 1:
            return phrase
    return None


def _related(scene: Scene) -> list[tuple[int, int, str, str, str, str]]:
    """Lists the relations between named objects: i, j, name of i, name of j, relation, opposite relation."""
    found = []
    for (i, a), (j, b) in permutations(enumerate(scene.objects), 2):
        first, second = _name(scene, a), _name(scene, b)
        for low, high, difference in (("left of", "right of", a.column - b.column), ("above", "below", a.row - b.row)):
            if difference and first and second:
                found.append((i, j, first, second, *((low, high) if difference < 0 else (high, low))))
    return found


def questions(scene: Scene, pairs: Iterable[tuple[str, str]]) -> list[Question]:
    """Lists all questions with a unique answer about a scene, in a fixed order.

    Args:
        scene: The scene.
        pairs: The (color, shape) pairs to ask about; training questions never ask about a held-out pair.
    """
    objects = scene.objects
    found = [Question("count", "How many objects are there?", NUMBERS[len(objects)])]
    nouns = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
    for word, noun in (nouns | {color: f"{color} objects" for color in PALETTE}).items():
        number = sum(word in item.pair for item in objects)
        found.append(Question("count", f"How many {noun} are there?", NUMBERS[number]))
    for index, item in enumerate(objects):
        name = _name(scene, item)
        trap = item.color != PREFERRED_COLOR[item.shape]
        only_color = sum(other.color == item.color for other in objects) == 1
        about_one = (
            (True, "color", f"What color is the object at the {item.position}?", item.color, False),
            (True, "shape", f"What shape is the object at the {item.position}?", item.shape, False),
            (True, "size", f"Is the object at the {item.position} large or small?", item.size, False),
            (name == item.shape, "color", f"What color is the {name}?", item.color, trap),
            (only_color, "shape", f"What shape is the {item.color} object?", item.shape, False),
            (name, "where", f"Where is the {name}?", item.position, False),
            (name, "size", f"Is the {name} large or small?", item.size, False),
        )
        found += [
            Question(category, text, answer, (index,), is_trap)
            for allowed, category, text, answer, is_trap in about_one
            if allowed
        ]
    for i, j, first, second, relation, opposite in _related(scene):
        # "left of" or "above" always comes first, so that the order does not reveal the answer.
        one, other = sorted((relation, opposite), key=("left of", "above", "right of", "below").index)
        sizes = {objects[i].size: first, objects[j].size: second}
        about_two = [
            ("relation", f"Is the {first} {relation} the {second}?", "yes"),
            ("relation", f"Is the {first} {opposite} the {second}?", "no"),
            ("relation", f"Is the {first} {one} or {other} the {second}?", relation.removesuffix(" of")),
        ]
        if len(sizes) == 2:
            about_two.append(("size", f"Which is larger, the {first} or the {second}?", f"the {sizes['large']}"))
        found += [Question(*fields, (i, j)) for fields in about_two]
    for words in (*pairs, *((shape,) for shape in SHAPES)):
        about = tuple(i for i, item in enumerate(objects) if item.pair[-len(words) :] == words)
        found.append(Question("exist", f"Is there a {' '.join(words)}?", "yes" if about else "no", about))
    return found


def split_questions(scene: Scene, split: Split) -> list[Question]:
    """Lists the questions of a split; held-out questions are about a held-out object or the entire scene."""
    found = questions(scene, all_pairs(split))
    if split == "train":
        return found
    unseen = {i for i, item in enumerate(scene.objects) if item.color == HELD_OUT_COLOR[item.shape]}
    return [question for question in found if not question.about or unseen & set(question.about)]


def pick_questions(pool: Sequence[Question], rng: random.Random, count: int) -> list[Question]:
    """Samples different questions: first a category, then an answer, then a question.

    The answer is sampled before the question so that "yes" is as frequent as "no".
    """
    picked: list[Question] = []
    for _ in range(count):
        candidates = [question for question in pool if question not in picked]
        for field in ("category", "answer"):
            value = rng.choice(sorted({getattr(question, field) for question in candidates}))
            candidates = [question for question in candidates if getattr(question, field) == value]
        picked.append(rng.choice(candidates))
    return picked
