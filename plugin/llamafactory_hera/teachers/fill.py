"""Features of many images: looked up where the cache has them, computed in batches where it has not."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.utils.data import DataLoader

from .cache import FeatureCache
from .encoder import TeacherProcessor, VisionTeacher
from .images import ImageLike, image_key, load_image

logger = logging.getLogger(__name__)

# Called with (images done, images to do) after every batch.
Progress = Callable[[int, int], None]

_LOOK_UP_AT_ONCE = 1024


def encode_images(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence[ImageLike], batch_size: int = 32
) -> Tensor:
    """The features of images through the cache; arguments and errors as `fill_cache`.

    Returns:
        ``[N, D]`` in float32 on the CPU, rounded as the cache stores them, whether found or computed.
    """
    features = torch.empty(len(images), teacher.dim)
    keys = fill_cache(teacher, cache, images, batch_size)
    for start in range(0, len(keys), _LOOK_UP_AT_ONCE):
        for i, feature in enumerate(cache.get(keys[start : start + _LOOK_UP_AT_ONCE]), start):
            if feature is None:  # a shard was found to be damaged only now
                return encode_images(teacher, cache, images, batch_size)
            features[i] = feature
    return features


def fill_cache(
    teacher: VisionTeacher,
    cache: FeatureCache,
    images: Sequence[ImageLike],
    batch_size: int = 32,
    progress: Progress | None = None,
    num_workers: int = 0,
) -> list[bytes]:
    """Computes and stores the features that the cache does not hold.

    Every image is computed once, however often it occurs. Features are written as they are computed, so a killed run
    goes on where it was.

    Args:
        teacher: Computes what is missing.
        cache: Read and filled.
        images: N images as datasets hold them.
        batch_size: Images in one forward pass; halved, with a warning, as often as memory runs out.
        progress: Called with (done, to do); counts the images that are computed, not those found in the cache.
        num_workers: Processes that decode images.

    Returns:
        The N image keys.

    Raises:
        ValueError: An image is missing or corrupt; names the file. What was computed before it is in the cache.
        OSError: The cache cannot be written.
    """
    if cache.fingerprint != teacher.fingerprint:
        raise ValueError(f"The feature cache {cache.folder} is of another teacher than {teacher.info.name}.")
    cache.refresh()
    keys = [image_key(image) for image in images]
    different = sorted({key: i for i, key in reversed(list(enumerate(keys)))}.values())
    missing = []
    for start in range(0, len(different), _LOOK_UP_AT_ONCE):
        chunk = different[start : start + _LOOK_UP_AT_ONCE]
        missing += [i for i, held in zip(chunk, cache.get([keys[i] for i in chunk]), strict=True) if held is None]
    done, limit = 0, batch_size
    decoded = partial(_decoded, images, teacher.processor)
    loader: DataLoader = DataLoader(missing, batch_size, num_workers=num_workers, collate_fn=decoded)  # type: ignore[arg-type]
    try:
        for chosen, pixels in loader:
            features, limit = _encode_within_memory(teacher, pixels, limit)
            cache.put([keys[i] for i in chosen], features)
            done += len(chosen)
            if progress is not None:
                progress(done, len(missing))
    finally:
        cache.flush()
    return keys


def _decoded(images: Sequence[ImageLike], processor: TeacherProcessor, chosen: list[int]) -> tuple[list[int], Tensor]:
    return chosen, processor.batch([load_image(images[i]) for i in chosen])


def _encode_within_memory(teacher: VisionTeacher, pixels: Tensor, limit: int) -> tuple[Tensor, int]:
    while True:
        try:
            return torch.cat([teacher.encode(part) for part in pixels.split(limit)]), limit
        except RuntimeError as error:
            if limit == 1 or not should_reduce_batch_size(error):
                raise
            limit = max(1, limit // 2)
        # Outside of the handler, where the failed pass's tensors are let go of.
        clear_device_cache()
        logger.warning("Out of memory in the teacher: going on with batches of %d images.", limit)
