"""What a calibration needs of the outside, as plain objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..selection.source import Collate, Features, Source
from ..teachers.images import ImageLike


class CalibrationSource(Source, Protocol):
    """A dataset whose samples can be seen with other images."""

    def encode(self, row: int, images: Sequence[ImageLike] | None = None) -> Features | None:
        """What the model sees of a sample, with other images in place of its own if given; None if it has no text."""
        ...


@dataclass(frozen=True)
class Material:
    """Model and data of a calibration.

    Attributes:
        source: The dataset.
        load_model: Loads the model, frozen, in evaluation mode, on one device.
        collator: From the model to what makes batches of features.
        model_name: As the recipe names it; the adapter's base model.
        dataset_name: As the recipe names it.
        adapter_names: Adapters that were merged into the model in memory.
        autocast: The type in which the run computes, where it is not the weights' own.
        num_workers: Processes that decode images.
    """

    source: CalibrationSource
    load_model: Callable[[], nn.Module]
    collator: Callable[[nn.Module], Collate]
    model_name: str
    dataset_name: str
    adapter_names: Sequence[str] = ()
    autocast: torch.dtype | None = None
    num_workers: int = 0
