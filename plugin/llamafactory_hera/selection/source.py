"""A dataset as plain objects: its images and what the model sees of a sample, without a framework."""

from collections.abc import Callable
from typing import Any, Protocol

from ..teachers.images import ImageLike

#: What the model sees of one sample: ``input_ids``, ``attention_mask``, mostly ``labels``, as lists, and what its
#: collator makes pixels of.
Features = dict[str, Any]
Collate = Callable[[list[Features]], dict[str, Any]]


class Source(Protocol):
    """A dataset of which single samples are encoded when asked for."""

    def __len__(self) -> int: ...

    def images(self, row: int) -> list[ImageLike]:
        """The images of a sample, not decoded; empty without any."""
        ...

    def encode(self, row: int) -> Features | None:
        """What the model sees of a sample; None for one that cannot be used."""
        ...
