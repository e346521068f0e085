"""Features of many images: looked up in the cache, or computed in batches and added to it."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial

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


def encode_images(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence[ImageLike], batch_size: int = 32
) -> Tensor:
    """Returns the features of images, and computes those that the cache lacks; see `fill_cache`.

    Returns:
        ``[N, D]`` in float32 on the CPU, rounded to the float16 of the cache even if they were just computed.
    """
    features = torch.empty(len(images), teacher.dim)
    for i, feature in enumerate(_look_up(cache, fill_cache(teacher, cache, images, batch_size))):
        assert feature is not None  # `fill_cache` has stored it
        features[i] = feature
    return features


def fill_cache(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence[ImageLike], batch_size: int, num_workers: int = 0
) -> list[bytes]:
    """Computes the features that a cache lacks; a killed run continues after its last shard.

    Args:
        teacher: The encoder.
        cache: The cache to fill.
        images: The images in any form that `load_image` accepts.
        batch_size: The number of images per batch; halved with a warning whenever memory runs out.
        num_workers: The number of processes that decode images.

    Returns:
        The key of each image.

    Raises:
        ValueError: An image is missing or corrupt. The features of the images before it are in the cache.
        OSError: The cache cannot be written.
    """
    cache.refresh()
    keys = [image_key(image) for image in images]
    positions = {key: i for i, key in enumerate(keys)}
    found = _look_up(cache, list(positions))
    missing = [i for i, feature in zip(positions.values(), found, strict=True) if feature is None]
    decode = partial(_decode, images, teacher.processor)
    loader: DataLoader = DataLoader(missing, batch_size, num_workers=num_workers, collate_fn=decode)  # type: ignore[arg-type]
    try:
        for chosen, pixels in tqdm(loader, "HeRA | teacher", unit="batch", delay=0.3, disable=rank() != 0):
            while True:
                try:
                    features = torch.cat([teacher.encode(part) for part in pixels.split(batch_size)])
                    break
                except RuntimeError as error:
                    if batch_size == 1 or not should_reduce_batch_size(error):
                        raise
                # Outside of the handler, because the exception holds the tensors of the failed pass.
                clear_device_cache()
                batch_size //= 2
                logger.warning(f"The teacher ran out of memory; continuing with batches of {batch_size} images.")
            cache.put([keys[i] for i in chosen], features)
    finally:
        cache.flush()
    return keys


def _look_up(cache: FeatureCache, keys: list[bytes], at_once: int = 1024) -> Iterator[Tensor | None]:
    for start in range(0, len(keys), at_once):  # the features of a dataset may not fit into memory
        yield from cache.get(keys[start : start + at_once])


def _decode(images: Sequence[ImageLike], processor: TeacherProcessor, chosen: list[int]) -> tuple[list[int], Tensor]:
    return chosen, processor.batch([load_image(images[i]) for i in chosen])
