"""Adds the teacher's view of each sample to the batches that the host collates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.images import KEY_BYTES, image_key, load_image
from llamafactory_hera.teachers.encoder import TeacherProcessor

#: Where the teacher's feature of a sample comes from.
NO_IMAGE, CACHED, PIXELS = 0, 1, 2

#: Every key starts with this; the trainer takes them out before the model sees the batch.
PREFIX = "hera_"


class HeraCollator:
    """Wraps the host's collator; runs in the DataLoader's workers, so images are decoded there.

    Every tensor it adds has the batch as its first axis: ``hera_source [B]`` (one of the three above), and where
    needed ``hera_keys [B, 16]``, ``hera_features [B, D_teacher]``, ``hera_pixels [B, 3, h, w]`` and ``hera_image
    [B, 2]`` (which image of the sample the teacher sees, of how many).

    Args:
        collate: The host's collator.
        processor: The teacher's image processor.
        cache: Features computed before, or None.
        image_index: Which image of a sample with several; clamped to what there is.
        names_image: Whether ``hera_image`` is added, for objectives that read an image's own tokens.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        processor: TeacherProcessor,
        cache: FeatureCache | None = None,
        image_index: int = 0,
        names_image: bool = False,
    ) -> None:
        self.collate = collate
        self.processor = processor
        self.cache = cache
        self.image_index = image_index
        self.names_image = names_image

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collates ``features`` and adds the teacher's tensors."""
        # first: the host takes the images out of the features, and gives a batch without any a dummy image
        shown = [self._shown(feature) for feature in features]
        images = [
            feature["images"][index] if count else None
            for feature, (index, count) in zip(features, shown, strict=True)
        ]
        teacher = self._teacher_inputs(images)
        if self.names_image:
            teacher["hera_image"] = torch.tensor(shown)
        return {**self.collate(features), **teacher}

    def _shown(self, feature: dict[str, Any]) -> tuple[int, int]:
        """Which image of a sample the teacher sees, counted from the first, and how many there are."""
        count = len(feature.get("images") or [])
        index = self.image_index if self.image_index >= 0 else count + self.image_index
        return max(0, min(index, count - 1)), count

    def _teacher_inputs(self, images: list[Any | None]) -> dict[str, Tensor]:
        source = torch.full((len(images),), NO_IMAGE, dtype=torch.uint8)
        shown = [row for row, image in enumerate(images) if image is not None]
        source[shown] = PIXELS
        batch = {"hera_source": source}
        to_decode = shown
        if self.cache is not None and shown:
            keys = [image_key(images[row]) for row in shown]
            batch["hera_keys"] = torch.zeros(len(images), KEY_BYTES, dtype=torch.uint8)
            batch["hera_keys"][shown] = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
            known = {row: f for row, f in zip(shown, self.cache.get(keys), strict=True) if f is not None}
            if known:
                batch["hera_features"] = torch.zeros(len(images), self.cache.dim)
                for row, feature in known.items():
                    batch["hera_features"][row] = feature.float()
                source[list(known)] = CACHED
            to_decode = [row for row in shown if row not in known]
        if to_decode:
            batch["hera_pixels"] = torch.zeros(len(images), 3, *self.processor.pixel_size)
            for row in to_decode:
                batch["hera_pixels"][row] = self.processor(load_image(images[row]))
        return batch
