"""Features of many images: looked up where the cache has them, computed in batches where it has not."""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .cache import FeatureCache
from .encoder import VisionTeacher
from .images import ImageLike, image_key, load_image
from .processor import TeacherProcessor

logger = logging.getLogger(__name__)

# Called with (images done, images to do) after every batch.
Progress = Callable[[int, int], None]

# What a killed run loses at most, in images.
_FLUSH_EVERY = 4096
_LOOK_UP_AT_ONCE = 1024


def encode_images(
    teacher: VisionTeacher,
    cache: FeatureCache | None,
    images: Sequence[ImageLike],
    batch_size: int = 32,
    progress: Progress | None = None,
    num_workers: int = 0,
) -> Tensor:
    """The features of images, through the cache if there is one.

    Args:
        teacher: Computes what is missing.
        cache: Read and filled; None computes everything.
        images: N images as datasets hold them.
        batch_size: Images in one forward pass; halved, with a warning, as often as memory runs out.
        progress: Called with (done, to do); counts the images that are computed, not those found in the cache.
        num_workers: Processes that decode images.

    Returns:
        ``[N, D]`` in float32 on the CPU. With a cache they are rounded to its dtype, whether found or computed.

    Raises:
        ValueError: An image is missing or corrupt; names the file. What was computed before it is in the cache.
        OSError: The cache cannot be written.
    """
    features = torch.empty(len(images), teacher.dim)
    if cache is None:
        for indices, computed in _compute(teacher, images, range(len(images)), batch_size, progress, num_workers):
            features[indices] = computed.cpu()
        return features
    keys = fill_cache(teacher, cache, images, batch_size, progress, num_workers)
    for start in range(0, len(keys), batch_size):
        found = cache.get(keys[start : start + batch_size])
        if any(feature is None for feature in found):
            # A shard was found to be damaged only now: its features are missing again.
            return encode_images(teacher, cache, images, batch_size, progress, num_workers)
        features[start : start + len(found)] = torch.stack(found)
    return features


def fill_cache(
    teacher: VisionTeacher,
    cache: FeatureCache,
    images: Sequence[ImageLike],
    batch_size: int = 32,
    progress: Progress | None = None,
    num_workers: int = 0,
) -> list[bytes]:
    """Computes and stores the features that the cache does not hold; arguments and errors as `encode_images`.

    Every image is computed once, however often it occurs. Progress is written as it is made, so a killed run goes on
    where it was.

    Returns:
        The N image keys.
    """
    if cache.fingerprint != teacher.fingerprint:
        raise ValueError(f"The feature cache {cache.folder} is of another teacher than {teacher.info.name}.")
    cache.refresh()
    keys = [image_key(image) for image in images]
    missing = _missing(cache, keys)
    waiting = 0
    try:
        for indices, computed in _compute(teacher, images, missing, batch_size, progress, num_workers):
            cache.put([keys[i] for i in indices], computed)
            waiting += len(indices)
            if waiting >= _FLUSH_EVERY:
                cache.flush()
                waiting = 0
    finally:
        cache.flush()
    return keys


def _missing(cache: FeatureCache, keys: Sequence[bytes]) -> list[int]:
    """The first index of every key that the cache does not hold whole."""
    first_index: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        first_index.setdefault(key, i)
    different = list(first_index)
    missing = []
    for start in range(0, len(different), _LOOK_UP_AT_ONCE):
        chunk = different[start : start + _LOOK_UP_AT_ONCE]
        found = zip(chunk, cache.get(chunk), strict=True)
        missing += [first_index[key] for key, feature in found if feature is None]
    return missing


class _Pixels(Dataset):
    def __init__(self, images: Sequence[ImageLike], indices: Sequence[int], processor: TeacherProcessor) -> None:
        self.images, self.indices, self.processor = images, indices, processor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor]:
        index = self.indices[position]
        return index, self.processor(load_image(self.images[index]))


def _compute(
    teacher: VisionTeacher,
    images: Sequence[ImageLike],
    indices: Sequence[int],
    batch_size: int,
    progress: Progress | None,
    num_workers: int,
) -> Iterator[tuple[list[int], Tensor]]:
    pixels = _Pixels(images, indices, teacher.processor)
    done = 0
    limit = batch_size
    for batch_indices, batch in DataLoader(pixels, batch_size=batch_size, num_workers=num_workers):
        features, limit = _encode_within_memory(teacher, batch, limit)
        yield batch_indices.tolist(), features
        done += len(batch_indices)
        if progress is not None:
            progress(done, len(indices))


def _encode_within_memory(teacher: VisionTeacher, pixels: Tensor, limit: int) -> tuple[Tensor, int]:
    while True:
        try:
            return torch.cat([teacher.encode(part) for part in pixels.split(limit)]), limit
        except torch.OutOfMemoryError:
            if limit == 1:
                raise
            limit = max(1, limit // 2)
        # Outside of the handler, where the failed pass's tensors are let go of.
        torch.cuda.empty_cache()
        logger.warning("Out of memory in the teacher: going on with batches of %d images.", limit)
