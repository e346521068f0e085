"""The rendered world: which scenes exist, how one is drawn, and which scenes are held out.

A scene is one to a few objects on a grid of cells; an object has a shape, a colour and a size. Drawing a scene is a
pure function of the scene, so that text made from it (``scene_text``) is true of the pixels.

Language prior
    Every shape has a preferred colour (``World.preferred_colour``), drawn with probability ``colour_bias``; otherwise
    the colour is uniform over the shape's other colours. Text alone therefore answers many colour questions, and only
    the image can answer the rest.

Held-out split
    Every shape has one held-out colour (``World.held_out_colour``), which is the preferred colour of the next shape.
    No training scene holds such a pair and no training question names one; every held-out scene holds at least one.
    All shapes and all colours are seen in training, so a held-out scene asks for a new combination of known factors: a
    training caption never fits it, and its colour is never the one that the language prior suggests.
"""

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "held_out"]

SHAPES = ("circle", "square", "triangle", "cross")
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 215, 50),
    "purple": (165, 60, 200),
    "white": (245, 245, 245),
}
SIZES = ("small", "large")
_ROW_NAMES = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMN_NAMES = {1: ("",), 2: ("left", "right"), 3: ("left", "centre", "right")}


@dataclass(frozen=True)
class SceneObject:
    """One object: its factors, its cell, and where it is drawn (centre and radius in pixels)."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    x: int
    y: int
    radius: int

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape), the combination that decides the split."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a uniform grey background (0 to 255)."""

    objects: tuple[SceneObject, ...]
    background: int


@dataclass(frozen=True)
class World:
    """The distribution of scenes.

    Args:
        grid: Rows and columns, 1 to 3 each.
        cell: Side of a grid cell in pixels; an image is ``grid * cell`` pixels.
        max_objects: Most objects in a scene; the number is uniform from 1.
        colour_bias: Probability that an object has its shape's preferred colour (training scenes).

    Raises:
        ValueError: If the grid has no names for its cells, cannot hold the objects, or cells are too small to tell
            shapes.
    """

    grid: tuple[int, int] = (2, 2)
    cell: int = 16
    max_objects: int = 4
    colour_bias: float = 0.6

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows not in _ROW_NAMES or columns not in _COLUMN_NAMES:
            raise ValueError(f"grid={self.grid}: rows and columns must be 1, 2 or 3, the positions that have names")
        if not 1 <= self.max_objects <= rows * columns:
            raise ValueError(f"max_objects={self.max_objects}: choose 1 to {rows * columns}, one object a cell")
        if self.cell < 16:
            raise ValueError(f"cell={self.cell}: choose at least 16 pixels, or small shapes look alike")
        if not 0.0 <= self.colour_bias <= 1.0:
            raise ValueError(f"colour_bias={self.colour_bias}: choose a probability from 0 to 1")

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        return self.grid[1] * self.cell, self.grid[0] * self.cell

    @staticmethod
    def preferred_colour(shape: str) -> str:
        return tuple(PALETTE)[SHAPES.index(shape)]

    @staticmethod
    def held_out_colour(shape: str) -> str:
        return tuple(PALETTE)[(SHAPES.index(shape) + 1) % len(SHAPES)]

    def is_held_out(self, item: SceneObject) -> bool:
        return item.colour == self.held_out_colour(item.shape)

    def pairs(self, split: Split) -> tuple[tuple[str, str], ...]:
        """The (colour, shape) pairs that scenes and questions of a split may name."""
        return tuple(
            (colour, shape)
            for shape in SHAPES
            for colour in PALETTE
            if split == "held_out" or colour != self.held_out_colour(shape)
        )

    def sample(self, rng: random.Random, split: Split = "train") -> Scene:
        """Draw one scene of the split."""
        rows, columns = self.grid
        cells = sorted(rng.sample(range(rows * columns), rng.randint(1, self.max_objects)))
        unseen = set(rng.sample(cells, rng.randint(1, len(cells)))) if split == "held_out" else set()
        objects = tuple(self._sample_object(rng, *divmod(cell, columns), cell in unseen) for cell in cells)
        return Scene(objects, background=rng.randint(20, 70))

    def _sample_object(self, rng: random.Random, row: int, column: int, unseen: bool) -> SceneObject:
        shape, size = rng.choice(SHAPES), rng.choice(SIZES)
        if unseen:
            colour = self.held_out_colour(shape)
        elif rng.random() < self.colour_bias:
            colour = self.preferred_colour(shape)
        else:
            usual = {self.preferred_colour(shape), self.held_out_colour(shape)}
            colour = rng.choice([name for name in PALETTE if name not in usual])
        return self.place(rng, shape, colour, size, row, column)

    def place(self, rng: random.Random, shape: str, colour: str, size: str, row: int, column: int) -> SceneObject:
        """An object with these factors somewhere in its cell."""
        radius = self.cell * 3 // 8 if size == "large" else self.cell * 3 // 16
        # One free pixel on every side of the cell keeps objects of neighbouring cells apart.
        slack = self.cell // 2 - radius - 1
        x = column * self.cell + self.cell // 2 + rng.randint(-slack, slack)
        y = row * self.cell + self.cell // 2 + rng.randint(-slack, slack)
        return SceneObject(shape, colour, size, row, column, x, y, radius)

    def position(self, item: SceneObject) -> str:
        """The cell in words: "top left", "centre", …"""
        names = _ROW_NAMES[self.grid[0]][item.row], _COLUMN_NAMES[self.grid[1]][item.column]
        words = [name for name in names if name]
        if words == ["middle", "centre"]:
            return "centre"
        return " ".join(words) or "centre"


def shape_mask(item: SceneObject, width: int, height: int) -> np.ndarray:
    """Pixels that the object covers: bool [height, width]."""
    dx = np.arange(width)[None, :] - item.x
    dy = np.arange(height)[:, None] - item.y
    r = item.radius
    box = (abs(dx) <= r) & (abs(dy) <= r)
    if item.shape == "circle":
        return dx**2 + dy**2 <= (r + 0.3) ** 2
    if item.shape == "square":
        return box
    if item.shape == "triangle":
        return box & (2 * abs(dx) <= dy + r)
    if item.shape == "cross":
        return box & ((abs(dx) <= r // 3) | (abs(dy) <= r // 3))
    raise ValueError(f"shape={item.shape!r}: choose one of {', '.join(SHAPES)}")


def render(world: World, scene: Scene) -> Image.Image:
    """Draw the scene: an RGB image without smoothing, every object in its exact palette colour."""
    width, height = world.image_size
    pixels = np.full((height, width, 3), scene.background, dtype=np.uint8)
    for item in scene.objects:
        pixels[shape_mask(item, width, height)] = PALETTE[item.colour]
    return Image.fromarray(pixels)
