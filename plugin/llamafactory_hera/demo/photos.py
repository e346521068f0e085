"""Real images with captions, from files that installed packages carry: digits (scikit-learn) and photographs.

Nothing is downloaded or shipped: the pictures are read from scikit-learn and scikit-image on the user's machine.

Held-out split: digits are different handwritten samples; photographs are regions that share no pixel with a training
region.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scene_text import NUMBERS
from .scenes import Split

DIGIT_SIDE = 32
PHOTO_SIDE = 64
_REMEDY = 'the demo data needs scikit-learn and scikit-image: pip install "llamafactory-hera[demo]"'


@dataclass(frozen=True)
class Region:
    """A part of a photograph: its file, its box as fractions (left, top, right, bottom), and what it shows."""

    source: str
    box: tuple[float, float, float, float]
    subject: str
    caption: str
    split: Split = "train"


@dataclass(frozen=True)
class CaptionedImage:
    """A real image with its caption, question-answer pairs, and the name of what it shows."""

    image: Image.Image
    caption: str
    questions: tuple[tuple[str, str], ...]
    subject: str


def _texture(source: str, subject: str, caption: str) -> tuple[Region, Region]:
    """The left part of an even picture for training, the rest of it held out."""
    return (
        Region(source, (0.0, 0.0, 0.6, 1.0), subject, caption),
        Region(source, (0.62, 0.0, 1.0, 1.0), subject, caption, "held_out"),
    )


REGIONS: tuple[Region, ...] = (
    Region("astronaut", (0.1, 0.0, 0.75, 0.65), "an astronaut", "a smiling astronaut in an orange suit"),
    Region("astronaut", (0.55, 0.62, 1.0, 1.0), "a helmet", "a white helmet with a dark visor"),
    Region("camera", (0.05, 0.05, 0.75, 0.95), "a photographer", "a man in a dark coat behind a camera on a tripod"),
    Region("chelsea", (0.15, 0.0, 0.85, 1.0), "a cat", "the face of a ginger cat that looks at you"),
    Region("coffee", (0.1, 0.0, 0.85, 1.0), "a cup of coffee", "a cup of coffee on a red saucer with a spoon"),
    Region("rocket", (0.2, 0.05, 0.8, 1.0), "a rocket", "a white rocket against a dark blue sky"),
    Region("china", (0.05, 0.05, 0.62, 0.95), "a tower", "a red and green tower above the trees"),
    Region("flower", (0.22, 0.15, 0.75, 0.9), "a flower", "a round orange flower with many petals"),
    *_texture("brick", "a brick wall", "grey bricks in even rows"),
    *_texture("grass", "grass", "long blades of grass seen from above"),
    *_texture("gravel", "gravel", "many small grey stones"),
    *_texture("coins", "coins", "old coins in rows on a dark table"),
    *_texture("hubble_deep_field", "galaxies", "bright galaxies in a black sky"),
    *_texture("moon", "the moon", "the grey ground of the moon"),
    *_texture("immunohistochemistry", "tissue", "brown and blue tissue under a microscope"),
)
_SKLEARN_PHOTOS = ("china", "flower")


def require_packages() -> None:
    """Check that scikit-learn and scikit-image are installed.

    Raises:
        ImportError: If one is missing; names the extra to install.
    """
    try:
        import skimage.data  # noqa: F401
        import sklearn.datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; {_REMEDY}") from error


def _load(source: str) -> Image.Image:
    require_packages()
    import skimage.data
    import sklearn.datasets

    if source in _SKLEARN_PHOTOS:
        pixels = sklearn.datasets.load_sample_image(f"{source}.jpg")
    else:
        pixels = getattr(skimage.data, source)()
    return Image.fromarray(np.asarray(pixels)).convert("RGB")


def photographs(count: int, rng: random.Random, split: Split) -> list[CaptionedImage]:
    """Square crops of photographs, every region in turn: ``count`` images of ``PHOTO_SIDE`` pixels.

    A crop is 80 to 100 % of the region's shorter side, at a random place in it.

    Raises:
        ImportError: If scikit-learn or scikit-image is missing.
    """
    regions = [region for region in REGIONS if region.split == split]
    sources = {region.source: _load(region.source) for region in regions}
    subjects = sorted({region.subject for region in REGIONS})
    return [
        _captioned_crop(sources[region.source], region, subjects, rng)
        for region in (regions[i % len(regions)] for i in range(count))
    ]


def _captioned_crop(photo: Image.Image, region: Region, subjects: list[str], rng: random.Random) -> CaptionedImage:
    left, top, right, bottom = (
        round(value * side) for value, side in zip(region.box, (photo.width, photo.height) * 2, strict=True)
    )
    side = round(min(right - left, bottom - top) * rng.uniform(0.8, 1.0))
    x, y = rng.randint(left, right - side), rng.randint(top, bottom - side)
    image = photo.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    other = rng.choice([subject for subject in subjects if subject != region.subject])
    asked, answer = rng.choice([(region.subject, "yes"), (other, "no")])
    questions = (
        ("What is in this picture?", region.subject),
        (f"Is this a picture of {asked}?", answer),
    )
    return CaptionedImage(image, f"A photograph of {region.caption}.", questions, region.subject)


def digits(train: int, held_out: int, rng: random.Random) -> dict[Split, list[CaptionedImage]]:
    """Handwritten digits of scikit-learn, scaled to ``DIGIT_SIDE`` pixels; no sample is in both splits.

    Raises:
        ImportError: If scikit-learn or scikit-image is missing.
    """
    require_packages()
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    chosen = rng.sample(range(len(bunch.target)), train + held_out)
    images = [_captioned_digit(bunch.images[i], int(bunch.target[i]), rng) for i in chosen]
    return {"train": images[:train], "held_out": images[train:]}


def _captioned_digit(pixels: np.ndarray, digit: int, rng: random.Random) -> CaptionedImage:
    grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
    image = grey.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC).convert("RGB")
    word = NUMBERS[digit]
    other = rng.choice([name for name in NUMBERS if name != word])
    asked, answer = rng.choice([(word, "yes"), (other, "no")])
    questions = (("Which digit is this?", word), (f"Is this the digit {asked}?", answer))
    return CaptionedImage(image, f"A handwritten digit {word} in white on black.", questions, f"digit {word}")
