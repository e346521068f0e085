"""Which samples are scored: drawn by seed, one for each image, each with text to average over."""

import hashlib
import logging
from collections.abc import Sequence

from ..alignment.neighbors import chance_level
from ..heads.pooling import IGNORE_INDEX
from .draw import Draw, Sample, draw
from .settings import SelectSettings
from .source import Features, Source

logger = logging.getLogger(__name__)

# Above this MKNN of unrelated features little room is left for heads to differ.
_HIGH_CHANCE = 0.2


def draw_samples(source: Source, settings: SelectSettings) -> list[Sample]:
    """Draws ``settings.samples`` samples in an order that depends on the seed alone.

    Two samples of one image would be each other's nearest neighbour for the teacher, whatever the head, so the second
    is passed over. The paper does not say how it treats them.

    Raises:
        ValueError: Fewer than ``k + 2`` usable samples, saying what the others lack; or an image that cannot be read.
    """
    found = draw(
        source,
        settings.samples,
        settings.seed,
        settings.image_index,
        usable=lambda features: _has_tokens(features, settings.pooling),
    )
    _check_number(found, settings)
    return found.samples


def samples_digest(samples: Sequence[Sample]) -> str:
    """A digest of the images and their order: two score files of equal digest were scored on the same images."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.key)
    return digest.hexdigest()


def _has_tokens(features: Features, pooling: str) -> bool:
    if pooling == "answer":
        return any(label != IGNORE_INDEX for label in features["labels"])
    return len(features["input_ids"]) > 0


def _check_number(found: Draw, settings: SelectSettings) -> None:
    drawn, without_text = found.samples, found.without_text
    least = settings.k + 2
    if len(drawn) < least:
        if without_text and not drawn:
            raise ValueError(
                f"dataset: none of its {without_text} samples with an image has a caption: the assistant's text is "
                "missing or leaves no token. Use a dataset whose assistant turns describe the image."
            )
        raise ValueError(
            f"dataset: {len(drawn)} of its {found.rows} samples can be scored, and hera_select_k: {settings.k} needs "
            f"{least} or more ({found.without_image} have no image, {without_text} no text that leaves a token; each "
            "image counts once). Use more data, or lower hera_select_k."
        )
    if without_text:
        logger.warning("dataset: %d samples leave no token to average over and were passed over.", without_text)
    if len(drawn) < settings.samples:
        logger.warning(
            "hera_select_samples: %d are asked for, and the dataset has %d different images with text.",
            settings.samples,
            len(drawn),
        )
    chance = chance_level(len(drawn), settings.k)
    if chance > _HIGH_CHANCE:
        logger.warning(
            "hera_select_samples: on %d samples even unrelated features reach an MKNN of %.2f with hera_select_k: %d, "
            "so that the ranking of heads is mostly noise. Score on more samples; the paper takes 1,000.",
            len(drawn),
            chance,
            settings.k,
        )
