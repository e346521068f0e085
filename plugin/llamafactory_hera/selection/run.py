"""A whole selection: samples, teacher, forward passes, scores, heads or layers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..alignment.gather import from_first, rank
from ..alignment.neighbors import chance_level
from ..alignment.scoring import score_features, score_heads
from ..heads.families import HeadLayout, head_layout, model_config
from ..heads.head_set import HeadSet
from ..heads.layer_set import LayerSet
from ..heads.pooled import projection_weights
from .blocks import FeatureBlocks
from .fingerprint import model_fingerprint
from .forward import compute_features
from .material import Material
from .provenance import FEATURE_FACTS, describe, identity
from .samples import draw_samples
from .settings import SelectSettings
from .strategies import choose_heads, choose_layers
from .teacher import find_neighbors

#: In the run's output folder; training keeps its own state there too.
FOLDER = "hera"
HEADS_FILE = HeadSet.FILE

Chosen = TypeVar("Chosen", HeadSet, LayerSet)


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


def select_heads(material: Material, settings: SelectSettings, target: Path) -> HeadSet:
    """Scores every head and writes the chosen ones with their provenance.

    All processes of a launch call it together. What a killed run had computed is used again.

    Args:
        material: Model, teacher and data.
        settings: Of the selection.
        target: The JSON file to write; pooled outputs lie beside it until then.

    Returns:
        The heads, the same on every process.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """

    def choose(scores: Scores, provenance: dict[str, Any]) -> HeadSet:
        return HeadSet(choose_heads(scores.heads.tolist(), settings.strategy, settings.m, settings.seed), provenance)

    def available(layout: HeadLayout) -> int:
        return layout.n_heads if settings.strategy == "middle" else layout.n_layers * layout.n_heads

    return _select(material, settings, target, choose, available, "heads")


def select_layers(material: Material, settings: SelectSettings, target: Path) -> LayerSet:
    """As :func:`select_heads`, for whole layers: scored by the averages of their own outputs."""

    def choose(scores: Scores, provenance: dict[str, Any]) -> LayerSet:
        return LayerSet(
            choose_layers(scores.layers.tolist(), settings.strategy, settings.m, settings.seed), provenance
        )

    return _select(material, settings, target, choose, lambda layout: layout.n_layers, "layers")


def _select(
    material: Material,
    settings: SelectSettings,
    target: Path,
    choose: Callable[[Scores, dict[str, Any]], Chosen],
    available: Callable[[HeadLayout], int],
    what: str,
) -> Chosen:
    folder = target.parent
    check_writable(folder)
    samples = draw_samples(material.source, settings)
    neighbors, teacher_fingerprint = find_neighbors(samples, material, settings, folder)
    model = material.load_model()
    layout = head_layout(model_config(model))
    _check_number(available(layout), settings, what)
    fingerprint = model_fingerprint(material.model_folder, layout, material.adapter_folders)
    facts = identity(fingerprint, teacher_fingerprint, samples, settings)
    key = str([facts[name] for name in FEATURE_FACTS])
    blocks = compute_features(model, samples, material, settings, folder, key)
    chosen = None
    if rank() == 0:
        scores = score(model, blocks, neighbors, settings)
        if scores.heads.isnan().all():
            raise ValueError(
                "model_name_or_path: the output of every head holds NaN or infinity. The checkpoint is damaged, or "
                "its activations do not fit fp16: use bf16 or fp32."
            )
        compute_dtype = material.autocast or next(model.parameters()).dtype
        provenance = describe(facts, material, settings, scores, str(compute_dtype).removeprefix("torch."))
        chosen = choose(scores, provenance)
        _save(chosen, target)
    return from_first(chosen)


def score(model: nn.Module, blocks: FeatureBlocks, neighbors: Tensor, settings: SelectSettings) -> Scores:
    """Scores all heads and layers on the model's device, one layer at a time.

    Args:
        model: Its output projections are read.
        blocks: Pooled outputs of N samples.
        neighbors: The teacher's, ``[N, k]``.
        settings: Similarity and memory.

    Raises:
        ValueError: The memory that is allowed is too little for one layer.
    """
    device = next(model.parameters()).device
    normalize, limit = settings.similarity == "cosine", settings.memory_bytes
    weights = (weight() for weight in projection_weights(model))
    try:
        heads = score_heads(blocks.heads(device), weights, neighbors, normalize, limit)
        layers = [score_features(outputs, neighbors, normalize, limit) for outputs in blocks.layers(device)]
    except ValueError as error:
        raise ValueError(f"hera_select_memory_gb: {settings.memory_gb} does not suffice ({error})") from error
    n, k = neighbors.shape
    return Scores(heads.cpu(), torch.stack(layers).cpu(), n, chance_level(n, k))


def check_writable(folder: Path) -> None:
    """Makes the folder and checks that it can be written, before anything is computed.

    Raises:
        ValueError: It cannot.
    """
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


def _check_number(number: int, settings: SelectSettings, what: str) -> None:
    if settings.m > number:
        raise ValueError(
            f"hera_select_m: {settings.m} {what} are asked for, and hera_select: {settings.strategy} has {number} to "
            "choose from in this model; lower it."
        )


def _save(chosen: HeadSet | LayerSet, target: Path) -> None:
    try:
        chosen.save(target)
    except OSError as error:
        raise ValueError(
            f"output_dir: {target} cannot be written ({error.strerror or error}); what was computed stays beside it "
            "and is used by the next run."
        ) from error
    FeatureBlocks.clear(target.parent)
