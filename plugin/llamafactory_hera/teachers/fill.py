"""Fills the cache with the features of many images, in batches and shared among processes."""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..distributed import barrier, rank, world_size
from .cache import FeatureCache
from .encoder import TeacherProcessor, VisionTeacher
from .images import ImageLike, image_key, load_image

logger = logging.getLogger("llamafactory_hera")


def fill_cache(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence[ImageLike], batch_size: int, num_workers: int = 0
) -> None:
    """Computes the features that a cache lacks; a killed run continues after its last shard.

    All processes of a launch call it together with the same images, and each computes its share. ``ValueError`` if an
    image cannot be read. ``batch_size`` is halved with a warning whenever memory runs out.
    """
    images = images[rank() :: world_size()]
    cache.refresh()
    keys = [image_key(image) for image in images]
    positions = {key: i for i, key in enumerate(keys)}
    missing = [i for key, i in positions.items() if key not in cache]
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
                # outside of the handler, because the exception holds the tensors of the failed pass
                clear_device_cache()
                batch_size //= 2
                logger.warning(f"The teacher ran out of memory; continuing with batches of {batch_size} images.")
            cache.put([keys[i] for i in chosen], features)
    finally:
        cache.flush()
    barrier()
    cache.refresh()  # the shards of the other processes


def _decode(images: Sequence[ImageLike], processor: TeacherProcessor, chosen: list[int]) -> tuple[list[int], Tensor]:
    return chosen, processor.batch([load_image(images[i]) for i in chosen])
