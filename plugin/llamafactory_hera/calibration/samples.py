"""What a calibration reads: model and data, samples drawn by seed, the last ones held out, and corrupted ones."""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from PIL import Image
from torch import nn

from ..selection.samples import Collate, Features, Sample, Source, draw
from ..teachers.images import ImageLike, image_key, load_image
from .settings import RahConfig

logger = logging.getLogger(__name__)

#: How the data of a control are corrupted (section 3.10 and table 5b).
Control = Literal["shuffled", "blank"]


class CalibrationSource(Source, Protocol):
    """A dataset whose samples can be seen with other images."""

    def encode(self, row: int, images: Sequence[ImageLike] | None = None) -> Features | None:
        """What the model sees of a sample, with other images in place of its own if given; None if it has no text."""


@dataclass(frozen=True)
class CalibrationInputs:
    """Model and data of a calibration, as a host gives them."""

    source: CalibrationSource
    load_model: Callable[[], nn.Module]  # frozen, in evaluation mode, on one device
    collator: Callable[[nn.Module], Collate]
    model_name: str  # as the recipe names it; the adapter's base model
    dataset_name: str
    adapter_names: Sequence[str] = ()  # merged into the model in memory
    autocast: torch.dtype | None = None  # in which the run computes, where it is not the weights' own
    num_workers: int = 0


@dataclass(frozen=True)
class Drawn:
    """The samples of a calibration: for profiling, the probes first, and for the trust region."""

    profiled: list[Sample]
    held_out: list[Sample]
    without_image: int  # rows that were passed over
    control: Control | None = None  # how their images were corrupted
    uncorrupted: Sequence[Sample] = ()  # the held-out samples before that

    def digest(self) -> str:
        """A digest of what the model sees of all samples, in order."""
        seen = [[sample.key.hex(), sample.features["input_ids"]] for sample in (*self.profiled, *self.held_out)]
        return hashlib.sha256(json.dumps([len(self.profiled), seen]).encode()).hexdigest()


def draw_samples(source: Source, config: RahConfig) -> Drawn:
    """Draws samples with an image, one for each image, in an order that depends on the seed alone."""
    samples, without_image, without_text = draw(source, config.samples, config.seed)
    drawn = len(samples)
    passed_over = f"{without_image} have no image, {without_text} no text; each image counts once"
    if drawn < config.probes + config.held_out:
        raise ValueError(
            f"dataset: {drawn} of its {len(source)} samples can be used, fewer than rah_probes: {config.probes} and "
            f"rah_held_out: {config.held_out} need together ({passed_over}). Use more "
            "data with an `images` column, or lower rah_probes or rah_held_out."
        )
    if drawn < config.samples:
        logger.warning("rah_samples: %d are asked for, and %d are there (%s).", config.samples, drawn, passed_over)
    n = drawn - config.held_out
    return Drawn(samples[:n], samples[n:], without_image)


def corrupt(drawn: Drawn, source: CalibrationSource, control: Control, seed: int) -> Drawn:
    """The same samples with images of another one of the same half, or with white ones of the same sizes (ours)."""

    def corrupted(samples: Sequence[Sample]) -> list[Sample]:
        if control == "shuffled":
            images = _exchanged(samples, seed)
        else:
            images = [[Image.new("RGB", load_image(i).size, "white") for i in sample.images] for sample in samples]
        changed = []
        for sample, other in zip(samples, images, strict=True):
            features = source.encode(sample.row, other)
            assert features is not None  # it was encoded with its own images
            changed.append(Sample(sample.row, other, other[0], image_key(other[0]), features))
        return changed

    profiled, held_out = corrupted(drawn.profiled), corrupted(drawn.held_out)
    return Drawn(profiled, held_out, drawn.without_image, control, drawn.held_out)


def _exchanged(samples: Sequence[Sample], seed: int) -> list[list[ImageLike]]:
    """The images of each sample's successor in a shuffled ring of those with as many; one without its like is told."""
    rings: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        rings.setdefault(len(sample.images), []).append(index)
    if all(len(ring) == 1 for ring in rings.values()):
        raise ValueError(
            "--control: no two samples have as many images, so that none can be exchanged; use --control blank, or "
            "a dataset with one image a sample."
        )
    if alone := sum(len(ring) == 1 for ring in rings.values()):
        logger.warning(f"--control: {alone} of {len(samples)} samples keep their images, as no other has as many.")
    givers: dict[int, int] = {}
    for ring in rings.values():
        random.Random(seed).shuffle(ring)
        givers.update(zip(ring, [*ring[1:], ring[0]], strict=True))
    return [list(samples[givers[index]].images) for index in range(len(samples))]
