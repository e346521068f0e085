"""The heads or layers of a run: named in its settings, read from a file, or selected before training (``auto``)."""

import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

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
from ..heads.targets import AUTO, Granularity, Targets, file_name
from ..teachers.cache import FeatureCache
from ..teachers.encoder import teacher_fingerprint, teacher_folder
from ..teachers.images import chosen_image, image_key
from .firmness import Firmness, measure_firmness
from .gallery import write_neighbors
from .passes import fill_cache, pooled_outputs
from .report import show
from .samples import Sample, SelectionInputs, draw_samples, neighbor_count
from .scores import SAME_RUN, SAME_SELECTION, SCORE_FILES, SELECTIONS, choose_targets, differences, package_versions

logger = logging.getLogger("llamafactory_hera")

_TEACHER_FEATURES = "features-teacher"  # replaces hera_teacher_cache during a selection


@dataclass(frozen=True)
class Run:
    """A training run that needs its heads or layers, as an integration describes it."""

    output_dir: Path
    configuration: Any  #: The configuration of the model.
    origin: Callable[[], dict[str, str]]  #: Returns ``model``, ``model_fingerprint`` and ``dataset``.
    inputs: Callable[[], SelectionInputs]
    checkpoint: str | None = None  #: The checkpoint that the run resumes.


def resolve_targets(config: HeraConfig, run: Run) -> Targets:
    """Returns the heads or layers that a run aligns. All processes call it, and the random state does not change."""
    folder = run.output_dir / RUN_FOLDER
    with untouched_random_state():
        if config.named_targets != AUTO:
            return on_first(lambda: _named(config, run, folder))
        chosen = on_first(lambda: _selected_before(config, run, folder))
        if chosen is None:
            path = folder / file_name(config.granularity)
            chosen = select_targets(run.inputs(), config, path)
            clear_device_cache(garbage_collection=True)
            if rank() == 0:
                show(path)
    return chosen


def _named(config: HeraConfig, run: Run, folder: Path) -> Targets:
    """Returns the targets in the key, with their scores if a selection for this run chose the same targets."""
    targets = Targets.parse(config.named_targets, config.granularity, run.configuration)
    if targets.provenance:
        _check(targets, differences(targets.provenance, _origin(config, run), SAME_RUN), config)
        return targets
    path = folder / file_name(config.granularity)  # training rewrites this file, and would lose the scores
    selected = Targets.load(path, config.granularity) if path.is_file() else targets
    same = selected.names == targets.names and selected.provenance
    return selected if same and not differences(selected.provenance, _origin(config, run), SAME_RUN) else targets


def _origin(config: HeraConfig, run: Run) -> dict[str, Any]:
    """Returns the entries of the provenance by which an earlier selection is compared with this run."""
    digest = teacher_fingerprint(teacher_folder(config.teacher))
    keys = {"keys": selection_keys(config), "teacher": config.teacher, "teacher_fingerprint": digest}
    return keys | run.origin()


def _selected_before(config: HeraConfig, run: Run, folder: Path) -> Targets | None:
    """Returns the choice of an earlier selection with the same settings; a resumed run uses its checkpoint's."""
    now, checkpoint = _origin(config, run), run.checkpoint
    for place in [folder] if checkpoint is None else [Path(checkpoint) / RUN_FOLDER, folder]:
        path = place / file_name(config.granularity)
        chosen = Targets.load(path, config.granularity) if path.is_file() else None
        if chosen is not None and chosen.provenance:
            differing = differences(chosen.provenance, now, SAME_SELECTION)
            if not differing:
                logger.info(f"HeRA | {chosen.key}: {chosen} from {path}, which was selected with the same settings")
            if checkpoint is not None or not differing:
                _check(chosen, differing, config)
                return chosen
    return None


def _check(chosen: Targets, differing: list[str], config: HeraConfig) -> None:
    problem = f"{chosen.key}: the {chosen.what} {chosen} were selected for another run: {'; '.join(differing)}"
    if differing and not config.heads_force:
        raise ValueError(f"{problem}. Select again in a new output folder, or set hera_heads_force: true.")
    if differing:
        logger.warning(f"{problem}. Continuing, because hera_heads_force is set.")


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Restores the random state, so training draws the same random numbers as with heads named in the settings."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # forks only the state of the current device, because PyTorch warns about forking the states of several devices
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def select_targets(inputs: SelectionInputs, config: HeraConfig, path: Path) -> Targets:
    """Scores all heads and layers, chooses targets, and writes both to a file. All processes call it together."""
    with ExitStack() as stack:
        if path.parent.name == RUN_FOLDER:
            on_first(lambda: stack.enter_context(locked(path.parents[1])))
        on_first(lambda: check_replaceable({path: '"provenance"', path.with_suffix(".png"): PICTURE}))
        scoring = _Scoring(inputs, config)
        for count in _sample_counts(config, path):
            scoring.extend(draw_samples(inputs.source, config, count), path.parent)
            chosen = on_first(scoring.choose)
            warning = Firmness(**chosen.provenance["firmness"]).warning
            if not warning or len(scoring.samples) < count:
                break
        if warning and path.name in SELECTIONS and rank() == 0:
            logger.warning(f"{chosen.key}: {warning}")
        on_first(lambda: scoring.write(path, chosen))
        return chosen


def _sample_counts(config: HeraConfig, path: Path) -> list[int]:
    """Lists the numbers of samples to try one after the other: one number, or doubling numbers for ``auto``.

    Scores that are not a selection use as many samples as the other scores in their folder, to be comparable.
    """
    if config.select_samples != AUTO:
        return [config.most_samples]
    for other in map(path.with_name, () if path.name in SELECTIONS else SCORE_FILES[::-1]):
        if other.is_file() and "samples" in (origin := Targets.load(other).provenance):
            return [origin["samples"]]
    return list(AUTO_SAMPLES)


class _Scoring:
    """The outputs of a model and of the teacher for the same samples, and the choice by them."""

    def __init__(self, inputs: SelectionInputs, config: HeraConfig) -> None:
        self.samples: list[Sample] = []
        self._inputs, self._config, self._by_head = inputs, config, config.granularity == "head"
        self._rule = partial(choose_targets, strategy=config.select, m=config.select_m, seed=config.select_seed)

    def extend(self, samples: list[Sample], folder: Path) -> None:
        """Runs the model and the teacher on the samples that follow the earlier ones."""
        inputs, config, new = self._inputs, self._config, [sample.features for sample in samples[len(self.samples) :]]
        self._teacher, self._digest_of_teacher = _teacher_features(samples, inputs, config, folder)
        if not self.samples:
            self._model = inputs.load_model()
            self._layout = head_layout(model_config(self._model))
            # where a head may be chosen; a layer without such heads has no score for the choice
            taken = [
                n if config.select_mixers == "all" or mixer == "attention" else 0
                for mixer, n, *_ in self._layout.layers
            ]
            allowed = np.arange(self._layout.n_heads) < np.array(taken)[:, None]
            self._allowed = np.where(allowed, 1, np.nan) if self._by_head else np.ones(self._layout.n_layers)
            self._rule(self._allowed)  # raises before the passes if there are too few heads or layers
        heads, layers = pooled_outputs(inputs, self._model, new, config)
        if self.samples:
            heads = [torch.cat(pair) for pair in zip(self._heads, heads, strict=True)]
            layers = torch.cat([self._layers, layers])
        self._heads, self._layers, self.samples = heads, layers, samples

    def _neighbors(self, granularity: Granularity, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Finds the neighbors for all heads ``[L, H, N, k]`` or layers ``[L, N, k]``, and for the teacher ``[N, k]``."""
        teacher, normalize = self._teacher[rows], self._config.normalize
        k, device = neighbor_count(self._config, len(teacher)), next(self._model.parameters()).device
        if granularity == "head":
            outputs = (layer[rows].to(device) for layer in self._heads)
            found = head_neighbors(outputs, projection_weights(self._model), k, normalize)
        else:
            every = torch.arange(len(teacher))
            outputs = (layer.to(device) for layer in self._layers[rows].unbind(1))
            found = torch.stack([nearest_samples(layer, None, every, k, normalize) for layer in outputs])
        return found.cpu(), nearest_neighbors(teacher, k, normalize).cpu()

    def choose(self) -> Targets:
        """Chooses heads or layers, with the provenance that the file stores."""
        inputs, config, kind = self._inputs, self._config, self._config.granularity
        self.neighbors, self.teacher = self._neighbors("head")
        found = {"head": self.neighbors, "layer": self._neighbors("layer")[0]}
        counts = {name: shared_neighbors(each, self.teacher) for name, each in found.items()}
        n, k = self.teacher.shape
        scores, layer_scores = (mean_shared(each, k) for each in counts.values())
        if scores.isnan().all():
            problem = "the output of every head contains NaN or infinity; the checkpoint is damaged, or needs"
            raise ValueError(f"model: {problem} more than the range of fp16: use bf16 or fp32.")

        def rescore(rows: slice) -> tuple[np.ndarray, float]:
            some, of_teacher = self._neighbors(kind, rows)
            scores = mean_shared(shared_neighbors(some, of_teacher), of_teacher.shape[1])
            return scores.numpy() * self._allowed, chance_level(*of_teacher.shape)

        chosen = self._rule((scores if self._by_head else layer_scores).numpy() * self._allowed)
        firmness = measure_firmness(
            chosen,
            self._rule,
            counts[kind].numpy() * self._allowed[..., None].astype(np.float32),
            torch.stack(
                [found[kind][tuple(place for place in target if place is not None)] for target in chosen]
            ).numpy(),
            self.teacher.numpy(),
            rescore,
            config.select_seed,
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
            "model_fingerprint": model_fingerprint(inputs.weights, self._layout, inputs.adapter_folders),
            "teacher_fingerprint": self._digest_of_teacher,
            "samples_digest": sha256(b"".join(sample.key for sample in self.samples)).hexdigest(),
            "samples": n,
            "compute_dtype": str(inputs.autocast or next(self._model.parameters()).dtype).removeprefix("torch."),
            "chance_level": chance_level(n, k),
            "firmness": firmness._asdict(),
            "layer_scores": _as_json(layer_scores),
            "scores": [_as_json(row) for row in scores],
        }
        return Targets(chosen, provenance)

    def write(self, path: Path, chosen: Targets) -> None:
        """Writes the file of the choice and, for the gallery, the neighbors of some samples."""
        write_neighbors(path, self.samples, self.teacher, self.neighbors, self._inputs.tokenizer)
        chosen.save(path)
        shutil.rmtree(path.parent / _TEACHER_FEATURES, ignore_errors=True)


def _as_json(scores: Tensor) -> list[float | None]:
    return [None if math.isnan(score) else round(score, 7) for score in scores.tolist()]


def _teacher_features(
    samples: list[Sample], inputs: SelectionInputs, config: HeraConfig, folder: Path
) -> tuple[Tensor, str]:
    """Returns the teacher's features ``[N, D]`` of N images and its fingerprint, and frees its memory."""
    teacher = inputs.load_teacher()
    place = config.teacher_cache or folder / _TEACHER_FEATURES
    cache = FeatureCache(place, teacher.fingerprint, teacher.dim)
    share = {sample.key: sample.image for sample in samples[rank() :: world_size()]}
    fill_cache(teacher, cache, share, config.select_batch_size, inputs.num_workers)
    found = cache.get([sample.key for sample in samples])
    features = torch.stack([feature for feature in found if feature is not None]).float().to(teacher.device)
    digest = teacher.fingerprint
    del teacher
    clear_device_cache(garbage_collection=True)
    return features, digest


def fill_teacher_cache(inputs: SelectionInputs, config: HeraConfig) -> int:
    """Fills the teacher cache with the features of the complete dataset; returns the number of images in it."""
    if config.teacher_cache is None:
        raise ValueError("hera_teacher_cache: it is not set, so --teacher-only has no cache to fill; give a folder.")
    found = (inputs.source.images(row) for row in range(len(inputs.source)))
    images = [images[chosen_image(len(images), config.image_index)] for images in found if images]
    if not images:
        raise ValueError(f"dataset: {inputs.dataset_name} contains no image; use a dataset with images.")
    teacher = inputs.load_teacher()
    cache = FeatureCache(config.teacher_cache, teacher.fingerprint, teacher.dim)
    share = {image_key(image): image for image in images[rank() :: world_size()]}
    fill_cache(teacher, cache, share, config.select_batch_size, inputs.num_workers)
    return len(cache)
