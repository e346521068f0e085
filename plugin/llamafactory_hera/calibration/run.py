"""A whole calibration: samples, profile, plan, trust region, adapter, report; all files of one run, or none."""

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..files import locked, read_json, write_json
from ..selection.passes import Forward
from ..selection.samples import Sample
from ..selection.scores import package_versions
from .plan import make_plan
from .profile import Profile, check_tokens, profile_heads, weights_digest
from .report import REPORT_FILE, compare, describe, draw_calibration
from .samples import CalibrationInputs, Control, Drawn, corrupt, draw_samples
from .settings import RahConfig
from .trust_region import HeldOut, Outcome, try_updates
from .weights import ADAPTER_CONFIG, ADAPTER_FILE, HeadWeights, Scaled, save_adapter

logger = logging.getLogger(__name__)

PICTURE_FILE, PROFILE_FILE = "calibration.png", "calibration_profile.safetensors"
_DIGEST = "adapter_sha256"


def calibrate_heads(
    inputs: CalibrationInputs, config: RahConfig, folder: Path, control: Control | None = None
) -> list[dict[str, Any]]:
    """Calibrates a model and writes adapter, report and picture.

    With a control it then calibrates on corrupted data, whose files go into ``folder/control_<name>`` and whose report
    says what the corruption did.

    Returns:
        The content of ``calibration.json``; with a control that of the corrupted calibration behind it.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy. No file of the result is written then.
    """
    control_folder = folder / f"control_{control}"
    _check_folder(folder)
    if control:
        _check_folder(control_folder)
    drawn = draw_samples(inputs.source, config)
    corrupted = corrupt(drawn, inputs.source, control, config.seed) if control else None
    calibration = _Calibration(inputs, config)
    reports = [calibration.run(drawn, folder)]
    if corrupted is not None:
        reports.append(calibration.run(corrupted, control_folder, reports[0]))
    return reports


class _Calibration:
    """The model, seen in several ways; the calibrations of one run share it."""

    def __init__(self, inputs: CalibrationInputs, config: RahConfig) -> None:
        self._inputs, self._config = inputs, config
        model = inputs.load_model()
        self._weights = HeadWeights(model)
        config.layer_indices(self._weights.layout.n_layers)  # refuses a layer that there is not
        self._forward = Forward(model, autocast=inputs.autocast)
        self._collate = inputs.collator(model)
        self._fingerprint = weights_digest(model)

    def run(self, drawn: Drawn, folder: Path, normal: dict[str, Any] | None = None) -> dict[str, Any]:
        """Calibrates on one draw and writes the files; a control's report compares itself with the ``normal`` one."""
        started = time.perf_counter()
        profile, reused = self._profile(drawn, folder / PROFILE_FILE)
        profiled = time.perf_counter()
        plan = make_plan(profile, self._weights, self._config)
        outcome = Outcome()
        if plan.updates and (self._config.delta > 0 or self._config.update == "prune"):
            outcome = try_updates(plan.updates, self._held_out(drawn.held_out).kl, self._config)
        trust_region = round(time.perf_counter() - profiled, 3)
        seconds = {"profiling": None if reused else round(profiled - started, 3), "trust_region": trust_region}
        facts = self._facts(drawn) | {"seconds": seconds}
        report = describe(profile, plan, outcome, self._weights, self._config, facts)
        if normal is not None:
            clean = {"kl_control_on_uncorrupted_samples": self._held_out(drawn.uncorrupted).kl(outcome.accepted)}
            report["compared_with_uncorrupted"] = compare(normal, report) | clean
        self._write(folder, report, outcome.accepted)
        return report

    def _held_out(self, samples: Sequence[Sample]) -> HeldOut:
        features = [sample.features for sample in samples]
        return HeldOut(self._forward, self._weights, features, self._collate, self._config)

    def _profile(self, drawn: Drawn, path: Path) -> tuple[Profile, bool]:
        """The profile, and whether an earlier run had made it."""
        config, inputs = self._config, self._inputs
        check_tokens(self._forward, [*drawn.profiled, *drawn.held_out])
        key = str([self._fingerprint, drawn.digest(), config.probes, config.positions, inputs.autocast])
        profile = Profile.load(path, key)
        if profile is not None:
            logger.warning("%s: the same heads were profiled on the same samples before; going on from there.", path)
            return profile, True
        features = [sample.features for sample in drawn.profiled]
        profile = profile_heads(self._forward, features, self._collate, config, inputs.num_workers)
        if True:
            profile.save(path, key)
        return profile, False

    def _facts(self, drawn: Drawn) -> dict[str, Any]:
        inputs, forward = self._inputs, self._forward
        compute = inputs.autocast or next(forward.model.parameters()).dtype
        samples = {"profiled": len(drawn.profiled), "probes": self._config.probes, "held_out": len(drawn.held_out)}
        return {
            "model": inputs.model_name,
            "adapters": list(inputs.adapter_names),
            "model_fingerprint": self._fingerprint,
            "dataset": inputs.dataset_name,
            "control": drawn.control,
            "samples": samples | {"without_image": drawn.without_image},
            "samples_digest": drawn.digest(),
            "compute_dtype": str(compute).removeprefix("torch."),
            "device": str(forward.device),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions(),
        }

    def _write(self, folder: Path, report: dict[str, Any], accepted: Sequence[Scaled]) -> None:
        """Replaces adapter, picture and report; the report comes last, so that a folder with a report is complete."""
        files = [PICTURE_FILE, REPORT_FILE]
        with TemporaryDirectory(prefix=".calibration.", dir=folder) as name:
            work = Path(name)
            if accepted:
                save_adapter(work, self._weights, accepted, self._inputs.model_name)
                files = [ADAPTER_FILE, ADAPTER_CONFIG, *files]
            report[_DIGEST] = _digest(work / ADAPTER_FILE) if accepted else None
            draw_calibration(report, work / PICTURE_FILE)
            write_json(work / REPORT_FILE, report)
            for old in (REPORT_FILE, ADAPTER_CONFIG, ADAPTER_FILE):
                (folder / old).unlink(missing_ok=True)
            for file in files:
                os.replace(work / file, folder / file)


def _check_folder(folder: Path) -> None:
    """Makes the folder and checks, before anything is computed, that it can be written and holds nobody's adapter."""
    with locked(folder):
        pass
    ours = not any((folder / name).exists() for name in (ADAPTER_CONFIG, ADAPTER_FILE))
    with suppress(OSError, ValueError, KeyError, TypeError):
        ours = ours or read_json(folder / REPORT_FILE)[_DIGEST] == _digest(folder / ADAPTER_FILE)
    if not ours:
        raise ValueError(
            f"output_dir: {folder} holds an adapter that no calibration wrote, or that was trained since; give "
            "another folder, or move the adapter away."
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
