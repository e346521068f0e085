"""Which samples calibrate: drawn by seed, one for each image, the last ones held out."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ..selection.draw import Draw, Sample, draw
from ..selection.source import Source
from .settings import RahSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """The samples of a calibration.

    Attributes:
        profiled: Those that heads are profiled on; the first of them are the probes.
        held_out: Those that the trust region measures on.
        without_image: Rows that were passed over because they have no image.
    """

    profiled: list[Sample]
    held_out: list[Sample]
    without_image: int

    def digest(self) -> str:
        """A digest of what the model sees of all samples, in order."""
        seen = [[sample.key.hex(), sample.features["input_ids"]] for sample in (*self.profiled, *self.held_out)]
        return hashlib.sha256(json.dumps([len(self.profiled), seen]).encode()).hexdigest()


def draw_samples(source: Source, settings: RahSettings) -> Drawn:
    """Draws samples in an order that depends on the seed alone; no image is in both parts.

    Rows without an image are passed over, and counted.

    Raises:
        ValueError: No image at all, fewer samples than probes and held-out ones need, or an image that cannot be read.
    """
    found = draw(source, settings.samples, settings.seed)
    _check_number(found, settings)
    n = len(found.samples) - settings.held_out
    return Drawn(found.samples[:n], found.samples[n:], found.without_image)


def check_tokens(samples: Sequence[Sample], image_tokens: Sequence[int]) -> None:
    """Checks that every sample has both kinds of tokens.

    Args:
        samples: What was drawn.
        image_tokens: How many of each sample's tokens stand for its images.

    Raises:
        ValueError: One lacks a kind; names its row.
    """
    for sample, count in zip(samples, image_tokens, strict=True):
        missing = "image" if count == 0 else "text" if count == len(sample.features["input_ids"]) else None
        if missing is not None:
            raise ValueError(
                f"dataset: sample {sample.row} (counted from 0) leaves no {missing} token; check that its text holds "
                "<image>, and that template is the model's."
            )


def _check_number(found: Draw, settings: RahSettings) -> None:
    drawn, without_image, without_text = len(found.samples), found.without_image, found.without_text
    if not drawn and without_image == found.rows:
        raise ValueError(
            "dataset: none of its samples has an image, and calibration looks at attention between text and image; "
            "use a dataset with an `images` column."
        )
    needed = settings.probes + settings.held_out
    if drawn < needed:
        raise ValueError(
            f"dataset: {drawn} of its {found.rows} samples can be used, fewer than rah_probes: {settings.probes} and "
            f"rah_held_out: {settings.held_out} need together ({without_image} have no image, {without_text} no text; "
            "each image counts once). Use more data, or lower rah_probes or rah_held_out."
        )
    if without_image or without_text:
        logger.warning(
            "dataset: %d samples without an image and %d without text were passed over.", without_image, without_text
        )
    if drawn < settings.samples:
        logger.warning(
            "rah_samples: %d are asked for, and the dataset has %d different images.", settings.samples, drawn
        )
