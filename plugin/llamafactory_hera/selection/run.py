"""A whole selection: samples, teacher, forward passes, scores, heads."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..alignment.gather import world_size
from ..alignment.mknn import chance_level, rank_neighbors, similarity
from ..alignment.scoring import score_features, score_heads
from ..heads.families import head_layout, model_config
from ..heads.head_set import HeadSet
from ..heads.pooled import projection_weights
from ..teachers.cache import FeatureCache
from ..teachers.encoder import VisionTeacher
from ..teachers.fill import encode_images, fill_cache
from .blocks import FeatureBlocks
from .fingerprint import is_own_vision_tower, model_fingerprint
from .forward import compute_features
from .material import Material
from .processes import barrier, from_first, rank
from .provenance import FEATURE_FACTS, describe, identity
from .samples import Sample, draw_samples
from .settings import SelectSettings
from .strategies import choose_heads

logger = logging.getLogger(__name__)

#: In the run's output folder; training keeps its own state there too.
FOLDER = "hera"
HEADS_FILE = "heads.json"
_SCRATCH_CACHE = "features-teacher"
# Rows of teacher similarities that are ranked at a time.
_NEIGHBOR_ROWS = 1024


@dataclass(frozen=True)
class Scores:
    """Alignment of a model with a teacher.

    Attributes:
        heads: MKNN of every head, ``[L, H]``; NaN where an output is not finite.
        layers: MKNN of each layer's own output, ``[L]``.
        n_samples: Samples scored on.
        chance: The MKNN of unrelated features.
    """

    heads: Tensor
    layers: Tensor
    n_samples: int
    chance: float


def select_heads(material: Material, settings: SelectSettings, target: Path | None = None) -> HeadSet:
    """Scores every head and writes the chosen ones with their provenance.

    All processes of a launch call it together. What a killed run had computed is used again.

    Args:
        material: Model, teacher and data.
        settings: Of the selection.
        target: The file to write; default ``output_dir/hera/heads.json``.

    Returns:
        The heads, the same on every process.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    folder = writable_folder(material.output_dir)
    target = target or folder / HEADS_FILE
    samples = draw_samples(material.source, settings)
    neighbors, teacher_fingerprint = _teacher_neighbors(samples, material, settings, folder)
    model = material.load_model()
    layout = head_layout(model_config(model))
    fingerprint = model_fingerprint(material.model_folder, layout, material.adapter_folders)
    facts = identity(fingerprint, teacher_fingerprint, samples, settings)
    key = str([facts[name] for name in FEATURE_FACTS])
    blocks = compute_features(model, material.collator(model), samples, material, settings, key)
    heads = None
    if rank() == 0:
        scores = score(model, blocks, neighbors, settings)
        _check_finite(scores.heads)
        rows = scores.heads.tolist()
        chosen = choose_heads(rows, settings.strategy, settings.m, settings.seed)
        compute_dtype = material.autocast or next(model.parameters()).dtype
        provenance = describe(facts, material, settings, scores, str(compute_dtype).removeprefix("torch."))
        heads = HeadSet(chosen, provenance)
        _save(heads, target, folder)
    return from_first(heads)


def score(model: nn.Module, blocks: FeatureBlocks, neighbors: Tensor, settings: SelectSettings) -> Scores:
    """Scores all heads and layers on the model's device, one layer at a time.

    Args:
        model: Its output projections are read.
        blocks: Pooled outputs of N samples.
        neighbors: The teacher's, ``[N, k]``.
        settings: Similarity and memory.
    """
    device = next(model.parameters()).device
    normalize, limit = settings.similarity == "cosine", settings.memory_bytes
    weights = (weight() for weight in projection_weights(model))
    heads = score_heads(blocks.heads(device), weights, neighbors, normalize, limit)
    layers = [score_features(outputs, neighbors, normalize, limit) for outputs in blocks.layers(device)]
    n, k = neighbors.shape
    return Scores(heads.cpu(), torch.stack(layers).cpu(), n, chance_level(n, k))


def fill_teacher_cache(material: Material, settings: SelectSettings) -> int:
    """Computes the teacher's features of the whole dataset into the run's cache, shared out over the processes.

    Returns:
        Number of different images in the cache afterwards.

    Raises:
        ValueError: The run names no cache, or an image is broken.
    """
    if material.teacher_cache is None:
        raise ValueError("hera_teacher_cache: it is not set, and --teacher-only fills it; name a folder.")
    images = []
    for row in range(len(material.source)):
        found = material.source.images(row)
        if found:
            images.append(found[max(-len(found), min(settings.image_index, len(found) - 1))])
    if not images:
        raise ValueError(f"dataset: {material.dataset_name} holds no image; use one with an `images` column.")
    teacher = material.load_teacher()
    cache = FeatureCache(material.teacher_cache, teacher.fingerprint, teacher.dim, teacher_name=material.teacher_name)
    _fill(teacher, cache, images, material, settings)
    return len(cache)


def writable_folder(output_dir: Path) -> Path:
    """Makes ``output_dir/hera`` and checks that it can be written, before anything is computed.

    Raises:
        ValueError: It cannot.
    """
    folder = output_dir / FOLDER
    probe = folder / f".writable-{rank()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output_dir: {folder} cannot be written ({error.strerror or error}); give a folder that this user can "
            "write to."
        ) from error
    return folder


def _teacher_neighbors(
    samples: Sequence[Sample], material: Material, settings: SelectSettings, folder: Path
) -> tuple[Tensor, str]:
    teacher = material.load_teacher()
    if is_own_vision_tower(material.model_folder, teacher.info.path):
        logger.warning(
            "hera_teacher: %s is the model's own vision tower; the paper finds such a teacher mostly ineffective. Its "
            "default is facebook/dinov2-large.",
            material.teacher_name,
        )
    # without a cache of the run's own the processes meet in one that goes with the features
    cache_folder = material.teacher_cache or folder / _SCRATCH_CACHE
    cache = FeatureCache(cache_folder, teacher.fingerprint, teacher.dim, teacher_name=material.teacher_name)
    images = [sample.image for sample in samples]
    _fill(teacher, cache, images, material, settings)
    features = encode_images(teacher, cache, images, settings.batch_size)
    fingerprint, device = teacher.fingerprint, teacher.device
    del teacher
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return teacher_neighbors(features.to(device), settings.k, settings.similarity == "cosine"), fingerprint


def _fill(
    teacher: VisionTeacher, cache: FeatureCache, images: Sequence, material: Material, settings: SelectSettings
) -> None:
    from tqdm import tqdm

    with tqdm(desc="HeRA | teacher", unit="image", disable=rank() != 0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        fill_cache(teacher, cache, images[rank() :: world_size()], settings.batch_size, progress, material.num_workers)
    barrier()
    cache.refresh()


def teacher_neighbors(features: Tensor, k: int, normalize: bool) -> Tensor:
    """As :func:`~llamafactory_hera.alignment.nearest_neighbors`, holding some rows of the similarities at a time.

    Args:
        features: ``[N, D]``.
        k: Neighbours per sample.
        normalize: Cosine similarity when true, dot product otherwise.

    Returns:
        ``[N, k]``.
    """
    index = torch.arange(features.shape[0], device=features.device)
    parts = []
    for rows in index.split(_NEIGHBOR_ROWS):
        similarities = similarity(features[rows], features, normalize)
        parts.append(rank_neighbors(similarities, k, excluded=rows[:, None] == index))
    return torch.cat(parts)


def _check_finite(scores: Tensor) -> None:
    if scores.isnan().all():
        raise ValueError(
            "model_name_or_path: the output of every head holds NaN or infinity. The checkpoint is damaged, or its "
            "activations do not fit fp16: use bf16 or fp32."
        )


def _save(heads: HeadSet, target: Path, folder: Path) -> None:
    try:
        heads.save(target)
    except OSError as error:
        raise ValueError(
            f"output_dir: {target} cannot be written ({error.strerror or error}); what was computed stays in {folder} "
            "and is used by the next run."
        ) from error
    FeatureBlocks.clear(folder)
