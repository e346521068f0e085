"""A whole selection: samples, the teacher's neighbors, forward passes, scores, heads or layers."""

import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from ..alignment.neighbors import chance_level, nearest_neighbors
from ..alignment.scoring import score_features, score_heads
from ..config import HeraConfig, selection_keys
from ..distributed import barrier, on_first, rank, world_size
from ..files import locked
from ..heads.families import head_layout, model_config
from ..heads.probe import projection_weights
from ..heads.targets import Targets
from ..teachers.cache import FeatureCache
from ..teachers.encoder import VisionTeacher
from ..teachers.fill import encode_images, fill_cache
from ..teachers.images import ImageLike, chosen_image, load_image
from .features import PREFIX, FeatureBlocks, compute_features
from .fingerprint import is_own_vision_tower, model_fingerprint
from .gallery import neighbors_file, write_neighbors
from .samples import Sample, SelectionInputs, draw_samples, of_sample, samples_digest
from .scores import choose_targets, package_versions

logger = logging.getLogger(__name__)

_SCRATCH = f"{PREFIX}teacher"


def select_targets(inputs: SelectionInputs, config: HeraConfig, path: Path, fingerprint: str | None = None) -> Targets:
    """Scores every head and layer and writes the chosen ones with their provenance.

    All processes of a launch call it together. Pooled outputs lie beside ``path`` until it is written; what
    a killed run had computed is used again. ``fingerprint`` is the model's, where it was read before.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked(path.parent.parent)))
        folder = path.parent
        samples = draw_samples(inputs.source, config)
        neighbors, teacher_fingerprint = _find_neighbors(samples, inputs, config, folder)
        model = inputs.load_model()
        layout = head_layout(model_config(model))
        by_head = config.granularity == "head"
        rule = config.select.strategy, config.select.m, config.select.seed
        # too few heads or layers are refused before the passes
        choose_targets(np.zeros([layout.n_layers, layout.n_heads] if by_head else layout.n_layers), *rule)
        if fingerprint is None:
            fingerprint = on_first(lambda: model_fingerprint(inputs.weights, layout, inputs.adapter_folders))
        digest = samples_digest(samples)
        key = str([fingerprint, digest, config.select.mode, config.pooling])
        blocks = compute_features(inputs, model, samples, config, folder, key)

        def choose() -> Targets:
            heads, layers = _score(model, blocks, neighbors, config)
            if heads.isnan().all():
                raise ValueError(
                    "model_name_or_path: the output of every head holds NaN or infinity. The checkpoint is damaged, "
                    "or its activations do not fit fp16: use bf16 or fp32."
                )
            items = choose_targets((heads if by_head else layers).tolist(), *rule)
            provenance = {
                "model": inputs.model_name,
                "adapters": [str(folder) for folder in inputs.adapter_folders],
                "teacher": config.teacher,
                "keys": selection_keys(config),
                "dataset": inputs.dataset_name,
                "batch_size": config.select.batch_size,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": package_versions(),
                "model_fingerprint": fingerprint,
                "teacher_fingerprint": teacher_fingerprint,
                "samples_digest": digest,
                "samples": len(samples),
                "compute_dtype": str(inputs.autocast or next(model.parameters()).dtype).removeprefix("torch."),
                "chance_level": chance_level(*neighbors.shape),
                "layer_scores": _written(layers),
                "scores": [_written(row) for row in heads],
            }
            chosen = Targets(items, provenance)
            device = next(model.parameters()).device
            features = zip(
                blocks.read("heads", device), blocks.read("layer", device), projection_weights(model), strict=True
            )
            write_neighbors(neighbors_file(path), samples, neighbors, features, config.normalize, inputs.tokenizer)
            chosen.save(path)
            blocks.clear()
            shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
            return chosen

        return on_first(choose)


def _score(model: nn.Module, blocks: FeatureBlocks, neighbors: Tensor, config: HeraConfig) -> tuple[Tensor, Tensor]:
    """MKNN of every head ``[L, H]`` and of each layer's own output ``[L]``; NaN where an output is not finite."""
    device = next(model.parameters()).device
    weights = (weight() for weight in projection_weights(model))
    heads = score_heads(blocks.read("heads", device), weights, neighbors, config.normalize)
    layers = [score_features(output, neighbors, config.normalize) for output in blocks.read("layer", device)]
    return heads.cpu(), torch.stack(layers).cpu()


def _written(scores: Tensor) -> list[float | None]:
    """Scores as they are written; one that could not be computed is null."""
    return [None if math.isnan(score) else round(score, 7) for score in scores.tolist()]


def _find_neighbors(
    samples: Sequence[Sample], inputs: SelectionInputs, config: HeraConfig, folder: Path
) -> tuple[Tensor, str]:
    """The teacher's neighbors ``[N, k]`` of N samples, and its fingerprint; afterwards it is gone from memory."""
    teacher = inputs.load_teacher()
    if rank() == 0 and is_own_vision_tower(inputs.weights, teacher.info.path):
        logger.warning(
            f"hera_teacher: {config.teacher} is the model's own vision tower; the paper finds such a teacher mostly "
            "ineffective. Its default is facebook/dinov2-large."
        )
    images = [sample.image for sample in samples]
    try:
        cache = _filled_cache(config.teacher_cache or folder / _SCRATCH, teacher, images, inputs, config)
    except ValueError:
        for sample in samples:
            with of_sample(sample.row):
                load_image(sample.image)
        raise
    features = encode_images(teacher, cache, images, config.select.batch_size).to(teacher.device)
    fingerprint = teacher.fingerprint
    del teacher
    clear_device_cache(garbage_collection=True)
    return nearest_neighbors(features, config.select.k, config.normalize), fingerprint


def fill_teacher_cache(inputs: SelectionInputs, config: HeraConfig) -> int:
    """Fills the run's cache with the teacher's features of the whole dataset; returns how many images it holds."""
    if config.teacher_cache is None:
        raise ValueError("hera_teacher_cache: it is not set, and --teacher-only fills it; name a folder.")
    found = (inputs.source.images(row) for row in range(len(inputs.source)))
    images = [images[chosen_image(len(images), config.image_index)] for images in found if images]
    if not images:
        raise ValueError(f"dataset: {inputs.dataset_name} holds no image; use one with an `images` column.")
    return len(_filled_cache(config.teacher_cache, inputs.load_teacher(), images, inputs, config))


def _filled_cache(
    folder: str | Path,
    teacher: VisionTeacher,
    images: Sequence[ImageLike],
    inputs: SelectionInputs,
    config: HeraConfig,
) -> FeatureCache:
    cache = FeatureCache(folder, teacher.fingerprint, teacher.dim, teacher_name=config.teacher)
    mine = images[rank() :: world_size()]
    fill_cache(teacher, cache, mine, config.select.batch_size, inputs.num_workers)
    barrier()
    cache.refresh()
    return cache
