"""A whole calibration: samples, profile, plan, trust region, adapter, report."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..selection.source import Collate
from ..selection.provenance import package_versions
from .adapter import save_adapter
from .control import Control, corrupt
from .edits import applied
from .figure import draw_calibration
from .fingerprint import model_fingerprint
from .forward import Forward
from .held_out import HeldOut
from .material import Material
from .outputs import PROFILE_FILE, cannot_be_written, check_folder, write_outputs
from .plan import make_plan
from .profile import Profile, profile_heads
from .result import Result, compare, describe, reason_for_nothing
from .samples import Drawn, check_tokens, draw_samples
from .settings import RahSettings
from .trials import Outcome, try_updates
from .weights import HeadWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """What the calibrations of one run share."""

    material: Material
    settings: RahSettings
    weights: HeadWeights
    forward: Forward
    collate: Collate
    fingerprint: str


def calibrate_heads(
    material: Material, settings: RahSettings, folder: Path, control: Control | None = None
) -> list[dict[str, Any]]:
    """Calibrates a model and writes adapter, report and picture.

    With a control it calibrates first on the data as they are, then on corrupted ones, whose files go into
    ``folder/control_<name>`` and whose report says what the corruption did.

    Args:
        material: Model and data.
        settings: Of the calibration.
        folder: Where the files go.
        control: How to corrupt the data.

    Returns:
        The content of ``calibration.json``; with a control that of the corrupted calibration behind it.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy. No file of the result is written then.
    """
    folders = [folder] if control is None else [folder, folder / f"control_{control}"]
    for each in folders:
        check_folder(each)
    drawn = draw_samples(material.source, settings)
    corrupted = corrupt(drawn, material.source, control, settings.seed) if control is not None else None
    model = material.load_model()
    weights = HeadWeights(model)
    settings.layer_indices(weights.layout.n_layers)
    forward = Forward(model, settings.positions, material.autocast)
    loaded = _Loaded(material, settings, weights, forward, material.collator(model), model_fingerprint(model))
    report, _ = _calibrate(loaded, drawn, folder, None)
    if corrupted is None:
        return [report]

    def compared(control_report: dict[str, Any], outcome: Outcome | None) -> dict[str, Any]:
        clean = HeldOut(forward, [s.features for s in drawn.held_out], loaded.collate, settings.batch_size)
        with applied(weights, outcome.accepted if outcome else []):
            return compare(report, control_report) | {"kl_control_on_uncorrupted_samples": clean.kl()}

    return [report, _calibrate(loaded, corrupted, folders[1], control, compared)[0]]


def _calibrate(
    loaded: _Loaded,
    drawn: Drawn,
    folder: Path,
    control: Control | None,
    compared: Callable[[dict[str, Any], Outcome | None], dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], Outcome | None]:
    settings, weights = loaded.settings, loaded.weights
    started = time.perf_counter()
    profile, reused = _profile(loaded, drawn, folder / PROFILE_FILE)
    profiled = time.perf_counter()
    plan = make_plan(profile, weights, settings)
    outcome = None
    if plan.updates and settings.delta > 0:
        held_out = HeldOut(loaded.forward, [s.features for s in drawn.held_out], loaded.collate, settings.batch_size)
        outcome = try_updates(plan.updates, weights, held_out, settings)
    result = Result(profile, plan, outcome, reason_for_nothing(plan, outcome, settings))
    seconds = {
        "profiling": None if reused else round(profiled - started, 3),
        "trust_region": round(time.perf_counter() - profiled, 3),
    }
    report = describe(result, weights, settings, _facts(loaded, drawn, control) | {"seconds": seconds})
    if compared is not None:
        report["compared_with_uncorrupted"] = compared(report, outcome)

    def adapter(work: Path) -> None:
        save_adapter(work, weights, outcome.accepted, loaded.material.model_name)

    def draw(picture: Path) -> None:
        draw_calibration(report, picture)

    write_outputs(folder, report, adapter if result.reason is None else None, draw)
    return report, outcome


def _profile(loaded: _Loaded, drawn: Drawn, path: Path) -> tuple[Profile, bool]:
    """The profile, and whether an earlier run had made it."""
    settings = loaded.settings
    features = [sample.features for sample in drawn.profiled]
    every = [*drawn.profiled, *drawn.held_out]
    check_tokens(every, [loaded.forward.count_image_tokens(sample.features["input_ids"]) for sample in every])
    key = str([loaded.fingerprint, drawn.digest(), settings.probes, settings.positions, loaded.material.autocast])
    profile = Profile.load(path, key)
    if profile is not None:
        logger.warning("%s: the same heads were profiled on the same samples before; going on from there.", path)
        return profile, True
    profile = profile_heads(
        loaded.forward, features, loaded.collate, settings.probes, settings.batch_size, loaded.material.num_workers
    )
    try:
        profile.save(path, key)
    except OSError as error:
        raise cannot_be_written(path.parent, error) from error
    return profile, False


def _facts(loaded: _Loaded, drawn: Drawn, control: Control | None) -> dict[str, Any]:
    material = loaded.material
    compute = material.autocast or next(loaded.forward.model.parameters()).dtype
    return {
        "model": material.model_name,
        "adapters": list(material.adapter_names),
        "model_fingerprint": loaded.fingerprint,
        "dataset": material.dataset_name,
        "control": control,
        "samples": {
            "profiled": len(drawn.profiled),
            "probes": loaded.settings.probes,
            "held_out": len(drawn.held_out),
            "without_image": drawn.without_image,
        },
        "samples_digest": drawn.digest(),
        "compute_dtype": str(compute).removeprefix("torch."),
        "device": str(loaded.forward.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
    }
