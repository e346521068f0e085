"""The study's world: the demo's scenes, split three ways by what an object is and where it stands.

Every combination of shape, colour and cell belongs to one split. For a shape in a cell one colour is kept for the
test, another for validation, and four are for training; the two are never the shape's preferred colour, so that the
language prior is the same in every cell. A training scene holds training combinations alone. A scene of another split
holds at least one combination of that split and otherwise training combinations, and only objects of the former kind,
or the whole scene, are asked about. Every colour of a shape is seen in training, in other cells: what is asked for is
a new combination, and no training scene or caption answers it.
"""

import random
from dataclasses import dataclass
from typing import Literal

from ..demo.scenes import PALETTE, SHAPES, SIZES, Scene, SceneObject, Split, World

StudySplit = Literal["train", "validation", "test"]
SPLITS: tuple[StudySplit, ...] = ("train", "validation", "test")

# The kept colour is so many colours behind the preferred one, and one more for each cell in reading order.
_SHIFT: dict[StudySplit, int] = {"test": 1, "validation": 2}


@dataclass(frozen=True)
class StudyWorld(World):
    """Up to four objects in 2×2 cells of 16×16 pixels; a shape has its preferred colour with probability 0.6."""

    def kept_colour(self, split: StudySplit, shape: str, row: int, column: int) -> str:
        """The colour that a shape in a cell has in ``validation`` or ``test`` scenes and nowhere else."""
        shift = _SHIFT[split] + row * self.grid[1] + column
        return tuple(PALETTE)[(SHAPES.index(shape) + shift) % len(PALETTE)]

    def split_of(self, item: SceneObject) -> StudySplit:
        """The split that an object's combination of shape, colour and cell belongs to."""
        for split in _SHIFT:
            if item.colour == self.kept_colour(split, item.shape, item.row, item.column):
                return split
        return "train"

    def pairs(self, split: Split) -> tuple[tuple[str, str], ...]:
        """Every (colour, shape): all are seen in training, each in some cells."""
        return tuple((colour, shape) for shape in SHAPES for colour in PALETTE)

    def draw(self, rng: random.Random, split: StudySplit) -> Scene:
        """Draw one scene of the split."""
        rows, columns = self.grid
        cells = sorted(rng.sample(range(rows * columns), rng.randint(1, self.max_objects)))
        kept = set() if split == "train" else set(rng.sample(cells, rng.randint(1, len(cells))))
        objects = tuple(
            self._draw_object(rng, split if cell in kept else "train", *divmod(cell, columns)) for cell in cells
        )
        return Scene(objects, background=rng.randint(20, 70))

    def _draw_object(self, rng: random.Random, split: StudySplit, row: int, column: int) -> SceneObject:
        shape, size = rng.choice(SHAPES), rng.choice(SIZES)
        preferred = self.preferred_colour(shape)
        if split != "train":
            colour = self.kept_colour(split, shape, row, column)
        elif rng.random() < self.colour_bias:
            colour = preferred
        else:
            others = {preferred, *(self.kept_colour(kept, shape, row, column) for kept in _SHIFT)}
            colour = rng.choice([name for name in PALETTE if name not in others])
        return self.place(rng, shape, colour, size, row, column)
