"""Features of many images: looked up where the cache has them, computed in batches where it has not."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..distributed import rank
from .cache import FeatureCache
from .encoder import TeacherProcessor, VisionTeacher
from .images import ImageLike, image_key, load_image

logger = logging.getLogger(__name__)

#: Environment variable with the file to which progress is appended, for a program that shows it.
PROGRESS = "HERA_PROGRESS"
_LOOK_UP_AT_ONCE = 1024


class Progress(tqdm):
    """The first process's bar; what it shows also goes as a line of JSON, (phase, done, total), to `PROGRESS`."""

    def __init__(self, phase: str, total: int, **options: Any) -> None:
        self._phase = phase
        super().__init__(total=total, desc=f"HeRA | {phase}", disable=rank() != 0, **options)

    def display(self, *args: Any, **kwargs: Any) -> Any:
        if file := os.environ.get(PROGRESS):
            with Path(file).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps([self._phase, self.n, self.total]) + "\n")
        return super().display(*args, **kwargs)


def encode_images(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence[ImageLike], batch_size: int = 32
) -> Tensor:
    """The features of images through the cache; arguments and errors as `fill_cache`.

    Returns:
        ``[N, D]`` in float32 on the CPU, rounded as the cache stores them, whether found or computed.
    """
    features = torch.empty(len(images), teacher.dim)
    keys = fill_cache(teacher, cache, images, batch_size)
    for i, feature in enumerate(_look_up(cache, keys)):
        if feature is None:  # a shard was found to be damaged only now
            return encode_images(teacher, cache, images, batch_size)
        features[i] = feature
    return features


def fill_cache(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence[ImageLike], batch_size: int, num_workers: int = 0
) -> list[bytes]:
    """Computes and stores the features that the cache does not hold.

    Every image is computed once, however often it occurs; a killed run goes on where it was. ``batch_size`` is halved,
    with a warning, as often as memory runs out; ``num_workers`` processes decode images.

    Returns:
        The image keys.

    Raises:
        ValueError: An image is missing or corrupt; names the file. What was computed before it is in the cache.
        OSError: The cache cannot be written.
    """
    cache.refresh()
    keys = [image_key(image) for image in images]
    different = {key: i for i, key in enumerate(keys)}
    found = _look_up(cache, list(different))
    missing = [i for i, feature in zip(different.values(), found, strict=True) if feature is None]
    decoded = partial(_decoded, images, teacher.processor)
    loader: DataLoader = DataLoader(missing, batch_size, num_workers=num_workers, collate_fn=decoded)  # type: ignore[arg-type]
    bar = Progress("teacher", len(missing), unit="image", delay=0.3)
    try:
        for chosen, pixels in loader:
            while True:
                try:
                    features = torch.cat([teacher.encode(part) for part in pixels.split(batch_size)])
                    break
                except RuntimeError as error:
                    if batch_size == 1 or not should_reduce_batch_size(error):
                        raise
                # Outside of the handler, where the failed pass's tensors are let go of.
                clear_device_cache()
                batch_size //= 2
                logger.warning("Out of memory in the teacher: going on with batches of %d images.", batch_size)
            cache.put([keys[i] for i in chosen], features)
            bar.update(len(chosen))
    finally:
        bar.close()
        cache.flush()
    return keys


def _look_up(cache: FeatureCache, keys: list[bytes]) -> Iterator[Tensor | None]:
    # a dataset's features at once would be too many for memory
    for start in range(0, len(keys), _LOOK_UP_AT_ONCE):
        yield from cache.get(keys[start : start + _LOOK_UP_AT_ONCE])


def _decoded(images: Sequence[ImageLike], processor: TeacherProcessor, chosen: list[int]) -> tuple[list[int], Tensor]:
    return chosen, processor.batch([load_image(images[i]) for i in chosen])
