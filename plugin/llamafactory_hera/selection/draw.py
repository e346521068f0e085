"""Drawing samples by seed, one for each image."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..teachers.images import ImageLike, image_key
from .source import Features, Source


@dataclass(frozen=True)
class Sample:
    """An image with its text.

    Attributes:
        row: Its row in the dataset.
        images: All images of the sample, not decoded.
        image: The one that stands for it.
        key: That image's content digest.
        features: What the model sees.
    """

    row: int
    images: list[ImageLike]
    image: ImageLike
    key: bytes
    features: Features


@dataclass(frozen=True)
class Draw:
    """What was drawn, and what was passed over on the way.

    Attributes:
        samples: In the order of the draw.
        rows: Of the dataset.
        without_image: Rows that have no image.
        without_text: Rows that leave the model nothing to be looked at.
    """

    samples: list[Sample]
    rows: int
    without_image: int
    without_text: int


def draw(
    source: Source,
    count: int,
    seed: int,
    image_index: int = 0,
    usable: Callable[[Features], bool] = lambda features: True,
) -> Draw:
    """Draws up to ``count`` samples in an order that depends on the seed alone.

    A further sample of an image that was drawn already is passed over.

    Args:
        source: The dataset.
        count: How many to draw.
        seed: Of the order.
        image_index: Which image stands for a sample of several, as for :func:`sample_image`.
        usable: Whether a sample can be used, by what the model sees of it.

    Raises:
        ValueError: An image cannot be read.
    """
    order = list(range(len(source)))
    random.Random(seed).shuffle(order)
    drawn: list[Sample] = []
    seen: set[bytes] = set()
    without_image = without_text = 0
    for row in order:
        if len(drawn) == count:
            break
        images = source.images(row)
        if not images:
            without_image += 1
            continue
        image = sample_image(images, image_index)
        key = image_key(image)
        if key in seen:
            continue
        features = source.encode(row)
        if features is None or not usable(features):
            without_text += 1
            continue
        seen.add(key)
        drawn.append(Sample(row, list(images), image, key, features))
    return Draw(drawn, len(order), without_image, without_text)


def sample_image(images: Sequence[ImageLike], index: int) -> ImageLike:
    """The image that stands for a sample: the one of that index, negative from the end, clamped to what there is."""
    return images[max(-len(images), min(index, len(images) - 1))]
