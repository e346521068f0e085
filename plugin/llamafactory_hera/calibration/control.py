"""Corrupted calibration data, on which calibrating must not help (RAH-LoRA, section 3.10 and table 5b)."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from PIL import Image

from ..selection.draw import Sample
from ..teachers.images import ImageLike, image_key, load_image
from .material import CalibrationSource
from .samples import Drawn

Control = Literal["shuffled", "blank"]


def corrupt(drawn: Drawn, source: CalibrationSource, control: Control, seed: int) -> Drawn:
    """The same samples with other images, profiled and held-out ones each among themselves.

    ``shuffled`` gives every sample the images of another one; ``blank`` white images of the same sizes (ours: the
    paper does not say which blank).

    Raises:
        ValueError: No two samples have the same number of images, so that none can be exchanged.
    """
    profiled, held_out = (_corrupt(part, source, control, seed) for part in (drawn.profiled, drawn.held_out))
    return replace(drawn, profiled=profiled, held_out=held_out)


def _corrupt(samples: Sequence[Sample], source: CalibrationSource, control: Control, seed: int) -> list[Sample]:
    images = [_blank(sample.images) for sample in samples] if control == "blank" else _exchanged(samples, seed)
    return [
        Sample(sample.row, other, other[0], image_key(other[0]), source.encode(sample.row, other))
        for sample, other in zip(samples, images, strict=True)
    ]


def _blank(images: Sequence[ImageLike]) -> list[ImageLike]:
    return [Image.new("RGB", load_image(image).size, "white") for image in images]


def _exchanged(samples: Sequence[Sample], seed: int) -> list[list[ImageLike]]:
    # only samples with as many images have room for each other's
    alike: dict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        alike[len(sample.images)].append(index)
    exchanged = [list(sample.images) for sample in samples]
    for group in alike.values():
        random.Random(seed).shuffle(group)
        for index, giver in zip(group, [*group[1:], group[0]], strict=True):  # in a ring, so that nobody keeps its own
            exchanged[index] = list(samples[giver].images)
    if all(len(group) == 1 for group in alike.values()):
        raise ValueError(
            "--control: no two samples have the same number of images, so that none can be exchanged; use --control "
            "blank, or a dataset with one image a sample."
        )
    return exchanged
