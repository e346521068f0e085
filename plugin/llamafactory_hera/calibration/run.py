"""A calibration from samples to files: profile, plan, trust region, adapter and report."""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import PICTURE, RUN_FOLDER, check_replaceable, write_json, write_safetensors
from ..hub import weight_files
from ..selection.passes import Forward
from ..selection.samples import Collate, ModelInputs, Sample, Source, draw
from .plan import Outcome, held_out_divergence, make_plan, try_updates
from .profile import Profile, profile_heads
from .report import REPORT_FILE, describe, draw_calibration
from .settings import RahConfig
from .weights import ADAPTER_CONFIG, ADAPTER_FILE, HeadWeights, save_adapter

logger = logging.getLogger("llamafactory_hera")

PICTURE_FILE, PROFILE_FILE = "calibration.png", "calibration_profile.safetensors"
# While this file exists, the adapter and the report in the folder may belong to different calibrations.
_UNFINISHED = ".calibration.unfinished"
# Files that only a training run writes.
_OF_RUNS = ("checkpoint-*", f"{RUN_FOLDER}/run.json", "trainer_state.json")
#: The samples to profile, starting with the probes, and the held-out samples of the trust region.
Samples = tuple[list[Sample], list[Sample]]


@dataclass(frozen=True, kw_only=True)
class CalibrationInputs(ModelInputs):
    """The base model and the data of a calibration."""

    adapter_names: Sequence[str] = ()  #: Adapters that ``load_model`` merges into the weights.


def calibrate_heads(
    inputs: CalibrationInputs, config: RahConfig, folder: Path, samples: Samples | None = None
) -> dict[str, Any]:
    """Calibrates the heads of a model, writes the adapter, the report and the picture, and returns the report.

    Bad input raises ``ValueError`` and leaves the files of an earlier calibration unchanged.
    """
    _check_folder(folder)
    profiled, held_out = samples or draw_samples(inputs.source, config)
    model = inputs.load_model()
    weights, forward, collate = HeadWeights(model), Forward(model, autocast=inputs.autocast), inputs.collator(model)
    config.layer_indices(weights.layout.n_layers)  # fails now if the model lacks one of the layers
    check_tokens(forward, [*profiled, *held_out])
    profile = _profile(forward, profiled, collate, inputs, config, folder / PROFILE_FILE)
    plan, outcome = make_plan(profile, weights, config), Outcome()
    if plan.updates and (config.delta > 0 or config.update == "prune"):
        features = [sample.features for sample in held_out]
        divergence = held_out_divergence(forward, weights, features, collate, config)
        outcome = try_updates(plan.updates, divergence, config)
    names = {"model": inputs.model_name, "adapters": list(inputs.adapter_names), "dataset": inputs.dataset_name}
    provenance = names | {"samples": {"profiled": len(profiled), "held_out": len(held_out)}}
    report = describe(profile, plan, outcome, config, provenance)
    (folder / _UNFINISHED).touch()
    if outcome.accepted:
        save_adapter(folder, weights, outcome.accepted, inputs.model_name)
    else:
        for old in (ADAPTER_FILE, ADAPTER_CONFIG):
            (folder / old).unlink(missing_ok=True)
    draw_calibration(report, folder / PICTURE_FILE)
    write_json(folder / REPORT_FILE, report)
    (folder / _UNFINISHED).unlink()
    return report


def draw_samples(source: Source, config: RahConfig) -> Samples:
    """Draws samples, each image once; raises ``ValueError`` if too few exist for rah_probes and rah_held_out."""
    samples, without_image, without_text = draw(source, config.samples, config.seed)
    drawn, needed = len(samples), config.probes + config.held_out
    skipped = f"{without_image} have no image, {without_text} have no text, and each image is used once"
    if drawn < needed:
        raise ValueError(
            f"dataset: only {drawn} of its {len(source)} samples can be used ({skipped}), but rah_probes and "
            f"rah_held_out need {needed}; use more data with an `images` column, or lower these keys."
        )
    if drawn < config.samples:
        logger.warning("rah_samples: only %d of %d samples can be drawn (%s).", drawn, config.samples, skipped)
    return samples[: drawn - config.held_out], samples[drawn - config.held_out :]


def check_tokens(forward: Forward, samples: Sequence[Sample]) -> None:
    """Refuses a sample that has no image token or no text token."""
    for sample in samples:
        if len({token in forward.media for token in sample.features["input_ids"]}) < 2:
            raise ValueError(
                f"dataset: sample {sample.row} (counted from 0) has no image token or no text token; check that its "
                "text contains <image>, and that the template fits the model."
            )


def _profile(
    forward: Forward, samples: list[Sample], collate: Collate, inputs: CalibrationInputs, config: RahConfig, path: Path
) -> Profile:
    """Reads the profile that an earlier run stored for the same inputs, or measures and stores it."""
    sums = [parameter.sum(dtype=torch.float64).item() for parameter in forward.model.parameters()]
    inputs_of_samples = [(sample.key, sample.features["input_ids"]) for sample in samples]
    content = sums, inputs_of_samples, forward.model.dtype, inputs.autocast, config.probes, config.positions
    key = hashlib.sha256(repr(content).encode()).hexdigest()
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("key") == key:
            logger.warning("%s: this profile is for the same model and samples, so it is reused.", path)
            return Profile(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    features = [sample.features for sample in samples]
    profile = profile_heads(forward, features, collate, config, inputs.num_workers)
    write_safetensors(path, vars(profile), {"key": key})
    return profile


def _check_folder(folder: Path) -> None:
    """Checks that the output folder is writable, and contains no model, run, or adapter of another program."""
    report = folder / REPORT_FILE
    check_replaceable({report: '"calibrated"', folder / PICTURE_FILE: PICTURE})
    written = report.stat().st_mtime_ns if report.exists() else 0
    # A calibration writes its report last. A newer adapter has been trained or replaced since then.
    killed = (folder / _UNFINISHED).exists()  # killed before it wrote the report
    foreign = [path for path in folder.glob("adapter_*") if path.stat().st_mtime_ns > written and not killed]
    foreign += [*weight_files(folder, required=False), *(path for name in _OF_RUNS for path in folder.glob(name))]
    if foreign:
        raise ValueError(f"output_dir: {folder} contains {foreign[0].name}, which no calibration wrote; move it.")
