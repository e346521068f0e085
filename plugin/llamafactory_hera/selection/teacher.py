"""What the teacher says: which samples are neighbours, through the feature cache that training reads."""

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..alignment.gather import barrier, rank, world_size
from ..alignment.neighbors import nearest_neighbors
from ..teachers.cache import FeatureCache
from ..teachers.encoder import VisionTeacher
from ..teachers.fill import encode_images, fill_cache
from ..teachers.images import ImageLike
from .blocks import PREFIX
from .draw import Sample, sample_image
from .fingerprint import is_own_vision_tower
from .material import Material
from .settings import SelectSettings

logger = logging.getLogger(__name__)

_SCRATCH = f"{PREFIX}teacher"


def find_neighbors(
    samples: Sequence[Sample], material: Material, settings: SelectSettings, folder: Path
) -> tuple[Tensor, str]:
    """The teacher's neighbours of N samples; the teacher is gone from memory afterwards.

    Args:
        samples: The same on every process.
        material: For the teacher and its cache.
        settings: Of the selection.
        folder: Where features wait when the run keeps no cache: all processes meet in it.

    Returns:
        ``[N, k]`` on the teacher's device, and the teacher's fingerprint.
    """
    teacher = material.load_teacher()
    if rank() == 0 and is_own_vision_tower(material.model_folder, teacher.info.path):
        logger.warning(
            "hera_teacher: %s is the model's own vision tower; the paper finds such a teacher mostly ineffective. Its "
            "default is facebook/dinov2-large.",
            material.teacher_name,
        )
    cache = _open_cache(material.teacher_cache or folder / _SCRATCH, teacher, material)
    images = [sample.image for sample in samples]
    _fill(teacher, cache, images, material, settings)
    features = encode_images(teacher, cache, images, settings.batch_size).to(teacher.device)
    fingerprint = teacher.fingerprint
    del teacher
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return nearest_neighbors(features, settings.k, settings.similarity == "cosine"), fingerprint


def fill_teacher_cache(material: Material, settings: SelectSettings) -> int:
    """Computes the teacher's features of the whole dataset into the run's cache, shared out over the processes.

    Returns:
        Number of different images in the cache afterwards.

    Raises:
        ValueError: The run names no cache, or an image is broken.
    """
    if material.teacher_cache is None:
        raise ValueError("hera_teacher_cache: it is not set, and --teacher-only fills it; name a folder.")
    found = (material.source.images(row) for row in range(len(material.source)))
    images = [sample_image(images, settings.image_index) for images in found if images]
    if not images:
        raise ValueError(f"dataset: {material.dataset_name} holds no image; use one with an `images` column.")
    teacher = material.load_teacher()
    cache = _open_cache(material.teacher_cache, teacher, material)
    _fill(teacher, cache, images, material, settings)
    return len(cache)


def _open_cache(folder: str | Path, teacher: VisionTeacher, material: Material) -> FeatureCache:
    return FeatureCache(folder, teacher.fingerprint, teacher.dim, teacher_name=material.teacher_name)


def _fill(
    teacher: VisionTeacher,
    cache: FeatureCache,
    images: Sequence[ImageLike],
    material: Material,
    settings: SelectSettings,
) -> None:
    with tqdm(desc="HeRA | teacher", unit="image", delay=0.3, disable=rank() != 0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        mine = images[rank() :: world_size()]
        fill_cache(teacher, cache, mine, settings.batch_size, progress, material.num_workers)
    barrier()
    cache.refresh()
