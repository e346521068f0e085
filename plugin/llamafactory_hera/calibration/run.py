"""A calibration from samples to files: profile, plan, trust region, adapter and report."""

import hashlib
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch
from torch import nn

from ..files import write_json
from ..selection.passes import Forward
from ..selection.samples import Sample
from .plan import make_plan
from .profile import Profile, check_tokens, profile_heads
from .report import REPORT_FILE, describe, draw_calibration
from .samples import CalibrationInputs, CalibrationSamples, draw_samples
from .settings import RahConfig
from .trust_region import HeldOut, Outcome, try_updates
from .weights import ADAPTER_CONFIG, ADAPTER_FILE, HeadWeights, save_adapter

logger = logging.getLogger(__name__)

PICTURE_FILE, PROFILE_FILE = "calibration.png", "calibration_profile.safetensors"


def calibrate_heads(
    inputs: CalibrationInputs, config: RahConfig, folder: Path, samples: CalibrationSamples | None = None
) -> dict[str, Any]:
    """Calibrates the heads of a model, and writes the adapter, the report and the picture.

    Args:
        inputs: The model and the dataset.
        config: The keys.
        folder: The output folder.
        samples: The samples to calibrate on; by default they are drawn from the dataset.

    Returns:
        The content of ``calibration.json``.

    Raises:
        ValueError: An input is bad. The files of an earlier calibration stay as they are.
    """
    _check_folder(folder)
    samples = samples or draw_samples(inputs.source, config)
    model = inputs.load_model()
    weights, forward, collate = HeadWeights(model), Forward(model, autocast=inputs.autocast), inputs.collator(model)
    config.layer_indices(weights.layout.n_layers)  # refuses a layer that the model lacks before profiling
    check_tokens(forward, [*samples.profiled, *samples.held_out])
    profiled, held_out = ([sample.features for sample in part] for part in samples)
    path, key = folder / PROFILE_FILE, _profile_key(forward.model, samples.profiled, inputs.autocast, config)
    profile = Profile.load(path, key)
    if profile is None:
        profile = profile_heads(forward, profiled, collate, config, inputs.num_workers)
        profile.save(path, key)
    else:
        logger.warning("%s: profiling is skipped, because this is the profile of the same model and samples.", path)
    plan, outcome = make_plan(profile, weights, config), Outcome()
    if plan.updates and (config.delta > 0 or config.update == "prune"):
        outcome = try_updates(plan.updates, HeldOut(forward, weights, held_out, collate, config).kl, config)
    provenance = {
        "model": inputs.model_name,
        "adapters": list(inputs.adapter_names),
        "dataset": inputs.dataset_name,
        "samples": {"profiled": len(profiled), "held_out": len(held_out)},
    }
    report = describe(profile, plan, outcome, config, provenance)
    files = [PICTURE_FILE, REPORT_FILE]
    with TemporaryDirectory(prefix=".calibration.", dir=folder) as name:
        work = Path(name)
        if outcome.accepted:
            save_adapter(work, weights, outcome.accepted, inputs.model_name)
            files = [ADAPTER_FILE, ADAPTER_CONFIG, *files]
        draw_calibration(report, work / PICTURE_FILE)
        write_json(work / REPORT_FILE, report)
        # the report goes first and comes last, so that a folder with a report is complete
        for old in (REPORT_FILE, ADAPTER_CONFIG, ADAPTER_FILE):
            (folder / old).unlink(missing_ok=True)
        for file in files:
            os.replace(work / file, folder / file)
    return report


def _profile_key(model: nn.Module, samples: list[Sample], autocast: torch.dtype | None, config: RahConfig) -> str:
    """Digests the inputs of a profile: the sums of all weights, the samples, the types and two keys."""
    parameters = list(model.parameters())
    sums = [parameter.sum(dtype=torch.float64).item() for parameter in parameters]
    seen = [(sample.key, sample.features["input_ids"]) for sample in samples]
    content = sums, seen, parameters[0].dtype, autocast, config.probes, config.positions
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _check_folder(folder: Path) -> None:
    """Makes the output folder, and checks that it can be written and holds no adapter of another origin."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):  # fails now instead of after profiling
        pass
    report = folder / REPORT_FILE
    written = report.stat().st_mtime_ns if report.exists() else 0
    # a calibration writes its report last, so that a newer adapter was trained or replaced since
    adapter = [path for name in (ADAPTER_CONFIG, ADAPTER_FILE) if (path := folder / name).exists()]
    if any(path.stat().st_mtime_ns > written for path in adapter):
        raise ValueError(
            f"output_dir: {folder} holds an adapter that no calibration wrote, or that was trained since; give "
            "another folder, or move the adapter away."
        )
