"""What a calibration needs of the outside, as plain objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..teachers.images import ImageLike

#: ``input_ids``, ``attention_mask`` and what the collator makes pixels of.
Features = dict[str, Any]
Collate = Callable[[list[Features]], dict[str, Any]]


class Source(Protocol):
    """A dataset of which single samples are encoded when asked for."""

    def __len__(self) -> int: ...

    def images(self, row: int) -> list[ImageLike]:
        """The images of a sample, not decoded; empty without any."""
        ...

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

    source: Source
    load_model: Callable[[], nn.Module]
    collator: Callable[[nn.Module], Collate]
    model_name: str
    dataset_name: str
    adapter_names: Sequence[str] = ()
    autocast: torch.dtype | None = None
    num_workers: int = 0
