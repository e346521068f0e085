"""The inputs of a calibration: the model, the dataset, and the samples that are drawn from it by seed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..selection.samples import Collate, Sample, Source, draw
from .settings import RahConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationInputs:
    """The model and the dataset of a calibration, as a host provides them."""

    source: Source
    load_model: Callable[[], nn.Module]  # frozen, in evaluation mode, on one device
    collator: Callable[[nn.Module], Collate]
    model_name: str  # as the recipe names it; the base model of the adapter
    dataset_name: str
    adapter_names: Sequence[str] = ()  # adapters that load_model merges into the weights
    autocast: torch.dtype | None = None  # the type of the computation if it is not that of the weights
    num_workers: int = 0  # processes that decode images


class CalibrationSamples(NamedTuple):
    """The samples of a calibration, by their use."""

    profiled: list[Sample]  # the first ones are the probes
    held_out: list[Sample]  # for the trust region


def draw_samples(source: Source, config: RahConfig) -> CalibrationSamples:
    """Draws samples with an image, each image once, in an order that depends on the seed alone.

    Raises:
        ValueError: The dataset has fewer usable samples than ``rah_probes`` and ``rah_held_out`` together.
    """
    samples, without_image, without_text = draw(source, config.samples, config.seed)
    drawn, needed = len(samples), config.probes + config.held_out
    skipped = f"{without_image} have no image, {without_text} have no text, and each image is used once"
    if drawn < needed:
        raise ValueError(
            f"dataset: only {drawn} of its {len(source)} samples can be used ({skipped}), but rah_probes: "
            f"{config.probes} and rah_held_out: {config.held_out} need {needed}; use more data with an `images` "
            "column, or lower these keys."
        )
    if drawn < config.samples:
        logger.warning("rah_samples: only %d of %d samples can be drawn (%s).", drawn, config.samples, skipped)
    n_profiled = drawn - config.held_out
    return CalibrationSamples(samples[:n_profiled], samples[n_profiled:])
