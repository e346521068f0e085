"""A selection from start to end: samples, neighbors of the teacher, forward passes, scores, and the choice."""

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from ..alignment.neighbors import chance_level, nearest_neighbors
from ..alignment.scoring import score_features, score_heads
from ..config import HeraConfig, selection_keys
from ..distributed import barrier, on_first, rank, world_size
from ..files import RUN_FOLDER, locked
from ..heads.families import head_layout, model_config
from ..heads.probe import projection_weights
from ..heads.targets import Targets
from ..teachers.cache import FeatureCache
from ..teachers.encoder import VisionTeacher
from ..teachers.fill import encode_images, fill_cache
from ..teachers.images import ImageLike, chosen_image, load_image
from .fingerprint import is_own_vision_tower, model_fingerprint
from .gallery import neighbors_file, write_neighbors
from .passes import pooled_outputs
from .samples import Sample, SelectionInputs, draw_samples, of_sample, samples_digest
from .scores import choose_targets, package_versions

logger = logging.getLogger(__name__)

_TEACHER_FEATURES = "features-teacher"  # replaces hera_teacher_cache during a selection


def select_targets(inputs: SelectionInputs, config: HeraConfig, path: Path, fingerprint: str | None = None) -> Targets:
    """Scores every head and layer, chooses some, and writes them with their scores and origin.

    All processes of a launch call it together. ``fingerprint`` is that of the model, if it is known.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    with ExitStack() as stack:
        if path.parent.name == RUN_FOLDER:
            on_first(lambda: stack.enter_context(locked(path.parents[1])))
        samples = draw_samples(inputs.source, config)
        neighbors, teacher_fingerprint = _teacher_neighbors(samples, inputs, config, path.parent)
        model = inputs.load_model()
        layout = head_layout(model_config(model))
        by_head, rule = config.granularity == "head", (config.select, config.select_m, config.select_seed)
        # too few heads or layers are refused here, before the passes
        choose_targets(np.zeros([layout.n_layers, layout.n_heads] if by_head else layout.n_layers), *rule)
        if fingerprint is None:
            fingerprint = on_first(lambda: model_fingerprint(inputs.weights, layout, inputs.adapter_folders))
        heads, layers = pooled_outputs(inputs, model, [sample.features for sample in samples], config)

        def of_each_layer(outputs: Tensor) -> Iterator[Tensor]:
            return (output.to(next(model.parameters()).device) for output in outputs.unbind(1))

        def choose() -> Targets:
            scores = score_heads(of_each_layer(heads), projection_weights(model), neighbors, config.normalize)
            of_layers = (score_features(output, neighbors, config.normalize) for output in of_each_layer(layers))
            layer_scores = torch.stack(list(of_layers))
            if scores.isnan().all():
                raise ValueError(
                    "model: the output of every head holds NaN or infinity. The checkpoint is damaged, or its "
                    "activations do not fit into fp16: use bf16 or fp32."
                )
            provenance = {
                "model": inputs.model_name,
                "adapters": [str(folder) for folder in inputs.adapter_folders],
                "teacher": config.teacher,
                "keys": selection_keys(config),
                "dataset": inputs.dataset_name,
                "batch_size": config.select_batch_size,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": package_versions(),
                "model_fingerprint": fingerprint,
                "teacher_fingerprint": teacher_fingerprint,
                "samples_digest": samples_digest(samples),
                "samples": len(samples),
                "compute_dtype": str(inputs.autocast or next(model.parameters()).dtype).removeprefix("torch."),
                "chance_level": chance_level(*neighbors.shape),
                "layer_scores": _as_json(layer_scores),
                "scores": [_as_json(row) for row in scores],
            }
            chosen = Targets(choose_targets((scores if by_head else layer_scores).tolist(), *rule), provenance)
            outputs = zip(of_each_layer(heads), of_each_layer(layers), projection_weights(model), strict=True)
            write_neighbors(neighbors_file(path), samples, neighbors, outputs, config.normalize, inputs.tokenizer)
            chosen.save(path)
            shutil.rmtree(path.parent / _TEACHER_FEATURES, ignore_errors=True)
            return chosen

        return on_first(choose)


def _as_json(scores: Tensor) -> list[float | None]:
    return [None if math.isnan(score) else round(score, 7) for score in scores.tolist()]


def _teacher_neighbors(
    samples: Sequence[Sample], inputs: SelectionInputs, config: HeraConfig, folder: Path
) -> tuple[Tensor, str]:
    """Finds the neighbors ``[N, k]`` of N samples, and the fingerprint of the teacher, and frees its memory."""
    teacher, images = inputs.load_teacher(), [sample.image for sample in samples]
    if rank() == 0 and is_own_vision_tower(inputs.weights, teacher.info.path):
        logger.warning(
            f"hera_teacher: {config.teacher} is the vision tower of the model itself; the paper found such a teacher "
            "mostly ineffective. The default is facebook/dinov2-large."
        )
    try:
        cache = _filled_cache(config.teacher_cache or folder / _TEACHER_FEATURES, teacher, images, inputs, config)
    except ValueError:
        for sample in samples:  # names the sample with the broken image
            with of_sample(sample.row):
                load_image(sample.image)
        raise
    features = encode_images(teacher, cache, images, config.select_batch_size).to(teacher.device)
    fingerprint = teacher.fingerprint
    del teacher
    clear_device_cache(garbage_collection=True)
    return nearest_neighbors(features, config.select_k, config.normalize), fingerprint


def fill_teacher_cache(inputs: SelectionInputs, config: HeraConfig) -> int:
    """Fills the teacher cache with the features of the complete dataset; returns how many images it holds."""
    if config.teacher_cache is None:
        raise ValueError("hera_teacher_cache: it is not set, so --teacher-only has nothing to fill; name a folder.")
    found = (inputs.source.images(row) for row in range(len(inputs.source)))
    images = [images[chosen_image(len(images), config.image_index)] for images in found if images]
    if not images:
        raise ValueError(f"dataset: {inputs.dataset_name} holds no image; use a dataset with images.")
    return len(_filled_cache(config.teacher_cache, inputs.load_teacher(), images, inputs, config))


def _filled_cache(
    folder: str | Path,
    teacher: VisionTeacher,
    images: Sequence[ImageLike],
    inputs: SelectionInputs,
    config: HeraConfig,
) -> FeatureCache:
    cache = FeatureCache(folder, teacher.fingerprint, teacher.dim, teacher_name=config.teacher)
    fill_cache(teacher, cache, images[rank() :: world_size()], config.select_batch_size, inputs.num_workers)
    barrier()
    cache.refresh()
    return cache
