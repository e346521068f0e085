"""Whole calibrations of tiny models: the files, their content, what is done again and what is not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llamafactory_hera.calibration import run as running
from llamafactory_hera.calibration.profile import Profile
from llamafactory_hera.calibration.report import render_summary
from llamafactory_hera.calibration.run import calibrate_heads
from llamafactory_hera.calibration.samples import draw_samples
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.trust_region import HeldOut
from llamafactory_hera.calibration.weights import HeadWeights
from llamafactory_hera.heads.targets import Target
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import calibration_model, collate, inputs, noise_images

ROOT = Path(__file__).parents[2]
CONFIG = RahConfig(samples=24, held_out=8, probes=8, layers="all", p_isal=40, p_caf=50, beta=0.5, rank=4)
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "calibration.json",
    "calibration.png",
    "calibration_profile.safetensors",
}


@pytest.fixture(autouse=True)
def _quick_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture has its own tests, and drawing it takes longer than the rest."""
    monkeypatch.setattr(running, "draw_calibration", lambda report, target: target.write_bytes(b"picture"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def without_run(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what differs from run to run."""
    kept = {key: value for key, value in report["provenance"].items() if key not in ("date", "seconds")}
    return report | {"provenance": kept}


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2", "llava-qwen3"])
def test_a_calibration_writes_adapter_report_and_picture(tmp_path: Path, name: str) -> None:
    model = calibration_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = [[image] if row % 5 else [] for row, image in enumerate(noise_images(30))]
    (report,) = calibrate_heads(inputs(model, images=images), CONFIG, tmp_path)
    assert report["provenance"]["samples"] == {"profiled": 16, "probes": 8, "held_out": 8, "without_image": 6}
    assert report["settings"]["rah_rank"] == 4
    profile = Profile(**load_file(tmp_path / "calibration_profile.safetensors"))
    scores = {"isal": profile.flow, "isal_standardized": profile.saliency, "caf": profile.influence(1.0)}
    for key, values in scores.items():
        assert torch.allclose(torch.tensor(report[key]).double(), values, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert names(tmp_path) == FILES
    assert json.loads((tmp_path / "calibration.json").read_text()) == json.loads(json.dumps(report))
    assert report["calibrated"]
    caf, isal = torch.tensor(report["caf"]), torch.tensor(report["isal_standardized"])
    gaps = (caf - caf.mean(1, keepdim=True)) / caf.std(1, correction=0, keepdim=True) - isal
    changed = [Target.parse(head) for head in report["calibrated"]]
    assert report["gap"] == pytest.approx(sum(gaps[head].item() for head in changed) / len(changed), rel=1e-4)
    assert report["nothing_because"] is None
    assert 0 < report["kl"]["total"] <= report["kl"]["delta"] == 0.05
    states = {target["head"]: target for target in report["targets"]}
    for head in report["calibrated"]:
        target = states[head]
        assert 0 < target["alpha"] <= 0.15
        assert target["kl"] == target["tried"][-1]["kl"] <= 0.05
        assert target["anchors"]
    assert sum(report["adapter_rank"].values()) > 0
    # the adapter is what the report says, and its divergence is the reported one
    adapted = PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    changed = {key for key, value in adapted.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{module}.weight" for module in report["adapter_rank"]}
    assert report["heads"]["calibrated_share"] == pytest.approx(len(report["calibrated"]) / 32)
    assert all(head in render_summary(report) for head in report["calibrated"])


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    reports = []
    for name in ("one", "two"):
        reports += calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path / name)
    assert without_run(reports[0]) == without_run(reports[1])
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_run_that_was_stopped_after_profiling_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(running, "try_updates", _stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path / "stopped")
    assert names(tmp_path / "stopped") == {"calibration_profile.safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(running, "profile_heads", _stop)
        resumed = calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path / "stopped")
    assert without_run(resumed[0]) == without_run(whole[0])
    assert resumed[0]["provenance"]["seconds"]["profiling"] is None


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["another model", "other samples", "more probes"])
def test_a_profile_of_something_else_is_not_used(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path)
    model, config = calibration_model(), CONFIG
    if change == "another model":
        with torch.no_grad():
            model.model.multi_modal_projector.linear_1.weight.mul_(1.01)
    config = {"other samples": replace(CONFIG, seed=1), "more probes": replace(CONFIG, probes=9)}.get(change, CONFIG)
    monkeypatch.setattr(running, "profile_heads", _stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate_heads(inputs(model), config, tmp_path)
    calibrate_heads(inputs(calibration_model()), replace(CONFIG, k=1, delta=0.01), tmp_path)  # needs no new one


NOTHING = {
    "no change allowed": ({"delta": 0}, "rah_delta: 0"),
    "no target": ({"p_caf": 100}, "no head is a target"),
    "no anchor": ({"beta": 50}, "no target has an anchor"),
    "all rolled back": ({"delta": 1e-12, "halvings": 1}, "no update stays"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_do_gives_a_report_and_no_adapter(tmp_path: Path, name: str) -> None:
    change, words = NOTHING[name]
    calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path)  # an earlier adapter must not survive
    assert names(tmp_path) == FILES
    (report,) = calibrate_heads(inputs(calibration_model()), replace(CONFIG, **change), tmp_path)
    assert names(tmp_path) == {"calibration.json", "calibration.png", "calibration_profile.safetensors"}
    assert words in report["nothing_because"]
    assert (report["calibrated"], report["adapter_rank"], report["kl"]["total"]) == ([], {}, 0.0)
    assert f"No adapter: {report['nothing_because']}" in render_summary(report)
    if name == "no anchor":
        assert {target["state"] for target in report["targets"]} == {"no anchor"}


ABLATIONS: dict[str, dict[str, Any]] = {
    "random targets": {"targets": "random"},
    "inverse targets": {"targets": "inverse"},
    "no CAF": {"targets": "no_caf"},
    "no function similarity": {"rho": 0},
    "no weight similarity": {"rho": 1},
    "single anchor": {"k": 1},
    "full rank": {"rank": "full"},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_papers_ablations_run(tmp_path: Path, name: str) -> None:
    (report,) = calibrate_heads(inputs(calibration_model()), replace(CONFIG, **ABLATIONS[name]), tmp_path)
    assert report["calibrated"]
    if name == "full rank":
        assert max(report["adapter_rank"].values()) % 8 == 0  # heads of 8 values
    if name == "single anchor":
        assert {len(target["anchors"]) for target in report["targets"]} == {1}


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2"])
def test_pruning_takes_the_output_of_the_targets_away_and_of_no_other_head(tmp_path: Path, name: str) -> None:
    model = calibration_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = replace(CONFIG, update="prune", targets="no_caf", p_isal=10, delta=0)
    (report,) = calibrate_heads(inputs(model), config, tmp_path)
    scores = torch.tensor(report["isal_standardized"])
    lowest = {f"L{layer}H{row.argmin()}" for layer, row in enumerate(scores)}
    assert set(report["calibrated"]) == {target["head"] for target in report["targets"]} == lowest
    assert {target["state"] for target in report["targets"]} == {"pruned"}
    assert f"{len(lowest)} of 32 heads pruned" in render_summary(report)
    features = [sample.features for sample in draw_samples(inputs(model).source, config).held_out]
    held_out = HeldOut(Forward(model), HeadWeights(model), features, collate, config)
    adapted = PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    assert report["kl"]["total"] == pytest.approx(held_out.kl(), rel=1e-5)
    for layer, row in enumerate(scores):
        name = next(key for key in before if f"layers.{layer}.self_attn.o_proj" in key and "vision" not in key)
        before[name].unflatten(1, (8, 8))[:, row.argmin()] = 0
    assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())


@pytest.mark.parametrize("control", ["shuffled", "blank"])
def test_a_control_says_what_it_did(tmp_path: Path, control: str) -> None:
    model = calibration_model()
    normal, corrupted = calibrate_heads(inputs(model), CONFIG, tmp_path, control)
    (alone,) = calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path / "alone")
    assert without_run(normal) == without_run(alone)
    folder = tmp_path / f"control_{control}"
    assert names(folder) <= FILES
    assert json.loads((folder / "calibration.json").read_text())["provenance"]["control"] == control
    compared = corrupted["compared_with_uncorrupted"]
    assert compared["targets_normal"] == [target["head"] for target in normal["targets"]]
    both = set(compared["targets_normal"]) & {target["head"] for target in corrupted["targets"]}
    assert set(compared["targets_in_both"]) == both
    assert -1 <= compared["caf_rank_correlation"] < 1
    assert compared["kl_normal"] == normal["kl"]["total"]
    assert f"control {control}" in render_summary(corrupted)
    # the divergence on uncorrupted samples is that of the control's own adapter
    features = [sample.features for sample in draw_samples(inputs(model).source, CONFIG).held_out]
    held_out = HeldOut(Forward(model), HeadWeights(model), features, collate, CONFIG)
    PeftModel.from_pretrained(model, folder).merge_and_unload()
    assert compared["kl_control_on_uncorrupted_samples"] == pytest.approx(held_out.kl(), rel=1e-3)


@pytest.mark.parametrize("change", ["trained", "another file", "after a report without adapter", "alone"])
def test_an_adapter_of_somebody_else_or_trained_since_is_not_replaced(tmp_path: Path, change: str) -> None:
    file, without = tmp_path / "adapter_model.safetensors", replace(CONFIG, delta=0)
    if change != "alone":
        earlier = without if change == "after a report without adapter" else CONFIG
        calibrate_heads(inputs(calibration_model()), earlier, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    if file.exists():
        tensors = {name: value + 1e-3 for name, value in load_file(file).items()}
        file.unlink()
        if change == "trained":
            save_file(tensors, file)
        else:
            torch.save(tensors, tmp_path / "adapter_model.bin")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"output_dir.*adapter that no calibration wrote, or that was trained since"):
        calibrate_heads(inputs(calibration_model()), without, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 8000])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path, limit: int) -> None:
    """A limit on the size of a file stands for the disk: the profile is smaller than the adapter."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from tests.calibration.test_run import CONFIG, calibrate_heads, calibration_model, inputs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = calibration_model()
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    calibrate_heads(inputs(model), CONFIG, Path({str(tmp_path)!r}))
except ValueError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert f"output_dir: {tmp_path} cannot be written (" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) <= {"calibration_profile.safetensors"}


def test_a_broken_model_leaves_no_file(tmp_path: Path) -> None:
    model = calibration_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(ValueError, match="model_name_or_path"):
        calibrate_heads(inputs(model), CONFIG, tmp_path)
    assert names(tmp_path) == set()
