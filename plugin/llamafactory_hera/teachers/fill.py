"""Features of many images: looked up in the cache, or computed in batches and added to it."""

import logging
from collections.abc import Sequence
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

logger = logging.getLogger("llamafactory_hera")


def encode_images(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence[ImageLike], batch_size: int = 32
) -> Tensor:
    """Returns the features ``[N, D]`` of N images in float32 on the CPU, and computes those that the cache lacks.

    They are rounded to the float16 of the cache even if they were just computed.
    """
    found = cache.get(fill_cache(teacher, cache, images, batch_size))
    return torch.stack([feature for feature in found if feature is not None]).float()


def fill_cache(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence[ImageLike], batch_size: int, num_workers: int = 0
) -> list[bytes]:
    """Computes the features that a cache lacks; a killed run continues after its last shard.

    Args:
        teacher: The encoder.
        cache: The cache to fill.
        images: The images in any form that `load_image` accepts; ``ValueError`` if one of them cannot be read.
        batch_size: The number of images per batch; halved with a warning whenever memory runs out.
        num_workers: The number of processes that decode images.

    Returns:
        The key of each image.
    """
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
    return keys


def _decode(images: Sequence[ImageLike], processor: TeacherProcessor, chosen: list[int]) -> tuple[list[int], Tensor]:
    return chosen, processor.batch([load_image(images[i]) for i in chosen])
