"""Chooses heads or layers: scores all of them on samples, measures how firm the choice is, and writes it to a file."""

import logging
import math
import shutil
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from ..alignment.neighbors import chance_level, nearest_neighbors
from ..alignment.scoring import head_neighbors, mean_shared, nearest_samples, shared_neighbors
from ..config import AUTO_SAMPLES, HeraConfig, selection_keys
from ..distributed import on_first, rank, world_size
from ..files import PICTURE, RUN_FOLDER, check_replaceable, locked
from ..heads.families import head_layout, model_config
from ..heads.fingerprint import model_fingerprint
from ..heads.probe import projection_weights
from ..heads.targets import AUTO, Granularity, Targets
from ..teachers.cache import FeatureCache
from ..teachers.images import chosen_image, image_key
from .firmness import Firmness, measure_firmness
from .gallery import write_neighbors
from .passes import fill_cache, pooled_outputs
from .samples import Sample, SelectionInputs, draw_samples, neighbor_count
from .scores import SCORE_FILES, SELECTIONS, choose_targets, package_versions

logger = logging.getLogger("llamafactory_hera")

_TEACHER_FEATURES = "features-teacher"  # the cache during a selection if hera_teacher_cache is not set


def select_targets(inputs: SelectionInputs, config: HeraConfig, path: Path) -> Targets:
    """Scores all heads and layers, chooses targets, and writes both to a file. All processes call it together."""
    with ExitStack() as stack:
        if path.parent.name == RUN_FOLDER:
            on_first(lambda: stack.enter_context(locked(path.parents[1])))
        on_first(lambda: check_replaceable({path: '"provenance"', path.with_suffix(".png"): PICTURE}))
        scored = _ScoredSamples(inputs, config)
        for count in _sample_counts(config, path):
            scored.extend(draw_samples(inputs.source, config, count), path.parent)
            chosen = on_first(scored.choose)
            warning = Firmness(**chosen.provenance["firmness"]).warning
            if not warning or len(scored.samples) < count:
                break
        if warning and path.name in SELECTIONS and rank() == 0:
            logger.warning(f"{chosen.key}: {warning}")
        on_first(lambda: scored.write(path, chosen))
        return chosen


def _sample_counts(config: HeraConfig, path: Path) -> list[int]:
    """Lists the sample counts to try in order; only ``auto`` tries several.

    With ``auto``, scoring a run uses as many samples as the earlier scores in its folder, so all can be compared.
    """
    if config.select_samples != AUTO:
        return [config.most_samples]
    for earlier in map(path.with_name, () if path.name in SELECTIONS else SCORE_FILES[::-1]):
        if earlier.is_file() and (n := Targets.load(earlier).provenance.get("samples")):
            return [n]
    return list(AUTO_SAMPLES)


class _ScoredSamples:
    """The outputs of a model and a teacher for the same samples, and the choice of heads or layers based on them."""

    def __init__(self, inputs: SelectionInputs, config: HeraConfig) -> None:
        self.samples: list[Sample] = []
        self._heads: list[Tensor] = []
        self._layers = torch.empty(0)
        self._inputs, self._config = inputs, config
        self._rule = partial(choose_targets, strategy=config.select, m=config.select_m, seed=config.select_seed)

    def extend(self, samples: list[Sample], folder: Path) -> None:
        """Runs the model and the teacher on the new samples; ``samples`` starts with the earlier samples."""
        config, known = self._config, len(self.samples)
        self._teacher, self._teacher_fingerprint = _teacher_features(samples, self._inputs, config, folder)
        if not known:
            self._model = self._inputs.load_model()
            layout = self._layout = head_layout(model_config(self._model))
            # heads that may be chosen; a layer without heads contributes none
            counts = [[n] if config.select_mixers in ("all", mixer) else [0] for mixer, n, *_ in layout.layers]
            head_mask = np.where(np.arange(layout.n_heads) < counts, 1.0, np.nan)
            self._choosable = head_mask if config.granularity == "head" else np.ones(layout.n_layers)
            self._rule(self._choosable)  # raises before the passes if there are too few heads or layers
        features = [sample.features for sample in samples[known:]]
        heads, layers = pooled_outputs(self._inputs, self._model, features, config)
        self._heads = [torch.cat(parts) for parts in zip(self._heads, heads, strict=True)] if known else heads
        self._layers = torch.cat([self._layers, layers]) if known else layers
        self.samples = samples

    def _neighbors(self, granularity: Granularity, samples: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Finds neighbors for all heads ``[L, H, N, k]`` or layers ``[L, N, k]``, and for the teacher ``[N, k]``."""
        teacher, normalize = self._teacher[samples], self._config.normalize
        k, device = neighbor_count(self._config, len(teacher)), next(self._model.parameters()).device
        if granularity == "head":
            heads = (layer[samples].to(device) for layer in self._heads)
            found = head_neighbors(heads, projection_weights(self._model), k, normalize)
        else:
            layers, queries = self._layers[samples].unbind(1), torch.arange(len(teacher))
            found = torch.stack([nearest_samples(layer.to(device), None, queries, k, normalize) for layer in layers])
        return found.cpu(), nearest_neighbors(teacher, k, normalize).cpu()

    def choose(self) -> Targets:
        """Chooses heads or layers, and measures how firm the choice is."""
        inputs, config, granularity = self._inputs, self._config, self._config.granularity
        self._head_neighbors, self._teacher_neighbors = self._neighbors("head")
        neighbors = {"head": self._head_neighbors, "layer": self._neighbors("layer")[0]}
        counts = {name: shared_neighbors(found, self._teacher_neighbors) for name, found in neighbors.items()}
        n, k = self._teacher_neighbors.shape
        scores, layer_scores = (mean_shared(of_all, k) for of_all in counts.values())
        if scores.isnan().all():
            problem = "the output of every head contains NaN or infinity; the checkpoint is damaged or exceeds"
            raise ValueError(f"model: {problem} the range of fp16; use bf16 or fp32.")

        def rescore(samples: slice) -> tuple[np.ndarray, float]:
            found, of_teacher = self._neighbors(granularity, samples)
            of_some = mean_shared(shared_neighbors(found, of_teacher), of_teacher.shape[1])
            return of_some.numpy() * self._choosable, chance_level(*of_teacher.shape)

        choosable = counts[granularity].numpy() * self._choosable[..., None]
        chosen = self._rule(choosable.mean(-1))
        arrays = choosable, neighbors[granularity].numpy(), self._teacher_neighbors.numpy()
        firmness = measure_firmness(chosen, self._rule, *arrays, rescore, config.select_seed)
        return Targets(
            chosen,
            {
                "model": inputs.model_name,
                "adapters": [str(folder) for folder in inputs.adapter_folders],
                "teacher": config.teacher,
                "keys": selection_keys(config),
                "dataset": inputs.dataset_name,
                "batch_size": config.select_batch_size,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": package_versions(),
                "model_fingerprint": model_fingerprint(inputs.weights, self._layout, inputs.adapter_folders),
                "teacher_fingerprint": self._teacher_fingerprint,
                "samples_digest": sha256(b"".join(sample.key for sample in self.samples)).hexdigest(),
                "samples": n,
                "compute_dtype": str(inputs.autocast or next(self._model.parameters()).dtype).removeprefix("torch."),
                "chance_level": chance_level(n, k),
                "firmness": firmness._asdict(),
                "layer_scores": _as_json(layer_scores),
                "scores": [_as_json(row) for row in scores],
            },
        )

    def write(self, path: Path, chosen: Targets) -> None:
        """Writes the chosen targets to their file and, for the gallery, the neighbors of some samples."""
        write_neighbors(path, self.samples, self._teacher_neighbors, self._head_neighbors, self._inputs.tokenizer)
        chosen.save(path)
        shutil.rmtree(path.parent / _TEACHER_FEATURES, ignore_errors=True)


def _as_json(scores: Tensor) -> list[float | None]:
    return [None if math.isnan(score) else round(score, 7) for score in scores.tolist()]


def _teacher_features(
    samples: list[Sample], inputs: SelectionInputs, config: HeraConfig, folder: Path
) -> tuple[Tensor, str]:
    """Returns the teacher's features ``[N, D]`` of N images and its fingerprint, and frees the teacher's memory."""
    teacher = inputs.load_teacher()
    cache = FeatureCache(config.teacher_cache or folder / _TEACHER_FEATURES, teacher.fingerprint, teacher.dim)
    share = {sample.key: sample.image for sample in samples[rank() :: world_size()]}
    fill_cache(teacher, cache, share, config.select_batch_size, inputs.num_workers)
    found = cache.get([sample.key for sample in samples])
    features = torch.stack([feature for feature in found if feature is not None]).float().to(teacher.device)
    digest = teacher.fingerprint
    del teacher
    clear_device_cache(garbage_collection=True)
    return features, digest


def fill_teacher_cache(inputs: SelectionInputs, config: HeraConfig) -> int:
    """Fills the teacher cache with the features of the complete dataset; returns the number of images in the cache."""
    if config.teacher_cache is None:
        raise ValueError("hera_teacher_cache: it is not set, but --teacher-only fills this cache; set it to a folder.")
    found = (inputs.source.images(row) for row in range(len(inputs.source)))
    images = [images[chosen_image(len(images), config.image_index)] for images in found if images]
    if not images:
        raise ValueError(f"dataset: {inputs.dataset_name} contains no image; use a dataset with images.")
    teacher = inputs.load_teacher()
    cache = FeatureCache(config.teacher_cache, teacher.fingerprint, teacher.dim)
    share = {image_key(image): image for image in images[rank() :: world_size()]}
    fill_cache(teacher, cache, share, config.select_batch_size, inputs.num_workers)
    return len(cache)
