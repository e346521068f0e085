"""Reads a scene from its pixels, independently of the renderer's code, and answers questions about the scene."""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 215, 50),
    "purple": (165, 60, 200),
    "white": (245, 245, 245),
}
WORDS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Seen:
    """An object that was found in the pixels."""

    size: str
    color: str
    shape: str
    place: str
    x: float
    y: float

    def fits(self, phrase: str) -> bool:
        """Returns whether a phrase such as "object at the top left" or "red circle" describes this object."""
        if phrase.startswith("object at the "):
            return phrase.removeprefix("object at the ") == self.place
        return set(phrase.split()) <= {self.size, self.color, self.shape, "object"}


def read(image: Image.Image) -> list[Seen]:
    """Finds the connected regions of one color in a 2×2 scene."""
    pixels = np.asarray(image).astype(int)
    found = []
    for color, value in COLORS.items():
        labels, _ = ndimage.label((pixels == value).all(-1), structure=np.ones((3, 3)))
        for rows, columns in ndimage.find_objects(labels):
            mask = labels[rows, columns] > 0
            y, x = (rows.start + rows.stop - 1) / 2, (columns.start + columns.stop - 1) / 2
            place = ("top" if y < 16 else "bottom") + (" left" if x < 16 else " right")
            size = "large" if mask.shape[0] > 10 else "small"
            found.append(Seen(size, color, _shape(mask), place, x, y))
    return found


def _shape(mask: np.ndarray) -> str:
    if mask.all():
        return "square"
    if mask[-1].all() and mask[0].sum() == 1:
        return "triangle"
    quarter = mask.shape[0] // 4
    return "circle" if mask[quarter, quarter] and mask[-1 - quarter, -1 - quarter] else "cross"


def answer(objects: list[Seen], question: str) -> str:
    """Returns the true answer to a question of the demo."""

    def the(phrase: str) -> Seen:
        (only,) = [item for item in objects if item.fits(phrase)]  # a reference must name exactly one object
        return only

    relation = "left of|right of|above|below"
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        noun = {"objects": "object", "crosses": "cross"}.get(match[1], match[1].removesuffix("s"))
        return WORDS[sum(item.fits(noun) for item in objects)]
    if match := re.fullmatch(r"What (color|shape) is the (.+)\?", question):
        return getattr(the(match[2]), match[1])
    if match := re.fullmatch(r"Where is the (.+)\?", question):
        return the(match[1]).place
    if match := re.fullmatch(r"Is the (.+) large or small\?", question):
        return the(match[1]).size
    if match := re.fullmatch(r"Which is larger, the (.+) or the (.+)\?", question):
        (larger,) = [phrase for phrase in match.groups() if the(phrase).size == "large"]
        return f"the {larger}"
    if match := re.fullmatch(r"Is there a (.+)\?", question):
        return "yes" if any(item.fits(match[1]) for item in objects) else "no"
    if match := re.fullmatch(rf"Is the (.+) ({relation}) or ({relation}) the (.+)\?", question):
        (true,) = [r for r in match.groups()[1:3] if holds(the(match[1]), r, the(match[4]))]
        return true.removesuffix(" of")
    if match := re.fullmatch(rf"Is the (.+) ({relation}) the (.+)\?", question):
        return "yes" if holds(the(match[1]), match[2], the(match[3])) else "no"
    raise AssertionError(f"unknown question: {question}")


def holds(first: Seen, relation: str, second: Seen) -> bool:
    """Returns whether a relation holds between two objects in different rows or columns of the grid."""
    (row, column), (other_row, other_column) = first.place.split(), second.place.split()
    return {
        "left of": first.x < second.x and column != other_column,
        "right of": first.x > second.x and column != other_column,
        "above": first.y < second.y and row != other_row,
        "below": first.y > second.y and row != other_row,
    }[relation]


def read_caption(text: str) -> tuple[set[tuple[str, str, str, str]], list[tuple[str, str, str]], str | None]:
    """Returns the claims of a caption: objects as (size, color, shape, place), relations, and the count word."""
    pattern = r"[Aa] (small|large) (\w+) (\w+)(?: is)? at the (top left|top right|bottom left|bottom right)"
    relation = r"The ([a-z ]+) is (left of|right of|above|below) the ([a-z ]+)\."
    count = re.search(r"There (?:is|are) (\w+) objects?", text)
    return set(re.findall(pattern, text)), re.findall(relation, text), count and count[1]
