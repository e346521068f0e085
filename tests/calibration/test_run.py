"""Calibrations of tiny models: the files, their content, the reuse of a profile, and the plot."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from peft import PeftModel
from safetensors.torch import load_file

from llamafactory_hera.calibration import report as reporting
from llamafactory_hera.calibration import run as running
from llamafactory_hera.calibration.plan import held_out_divergence
from llamafactory_hera.calibration.profile import Profile
from llamafactory_hera.calibration.report import draw_calibration, render_summary
from llamafactory_hera.calibration.run import calibrate_heads, draw_samples
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.weights import HeadWeights
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import calibration_model, collate, inputs
from tests.ranks import full_disk
from tests.tiny_models import same, snapshot

CONFIG = RahConfig(samples=24, held_out=8, probes=8, layers="all", p_isal=40, p_caf=50, beta=0.5, rank=4)
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
OTHERS = {"calibration.json", "calibration.png", "calibration_profile.safetensors"}


@pytest.fixture(autouse=True)
def _quick_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the plot, which takes longer than everything else; only the last test draws it."""
    monkeypatch.setattr(running, "draw_calibration", lambda report, path: path.write_bytes(b"llamafactory-hera"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def divergence_of(model: torch.nn.Module, config: RahConfig, folder: Path) -> float:
    """Merges an adapter into the model, and returns the KL divergence on the held-out samples."""
    samples = [sample.features for sample in draw_samples(inputs(model).source, config)[1]]
    divergence = held_out_divergence(Forward(model), HeadWeights(model), samples, collate, config)
    PeftModel.from_pretrained(model, folder).merge_and_unload()
    return divergence([])


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2"])
def test_a_calibration_writes_adapter_report_and_picture(tmp_path, name):
    model = calibration_model(name)
    before = snapshot(model)
    report = calibrate_heads(inputs(model), CONFIG, tmp_path)
    assert same(model.state_dict(), before)
    assert names(tmp_path) == ADAPTER | OTHERS
    assert json.loads((tmp_path / "calibration.json").read_text()) == json.loads(json.dumps(report))
    assert report["provenance"]["samples"] == {"profiled": 16, "held_out": 8}
    profile = Profile(**load_file(tmp_path / "calibration_profile.safetensors"))
    for key, values in {"isal": profile.saliency, "caf": profile.influence(1.0)}.items():
        assert torch.allclose(torch.tensor(report[key]).double(), values, rtol=1e-5, atol=1e-9)
    assert report["calibrated"]
    for head in (head for head in report["heads"] if head["head"] in report["calibrated"]):
        assert 0 < head["alpha"] <= 0.15
        assert head["kl"] == head["tried"][-1]["kl"] <= 0.05
        assert head["anchors"]
        assert head["head"] in render_summary(report)
    assert divergence_of(model, CONFIG, tmp_path) == pytest.approx(report["kl"]["total"], rel=1e-3)
    assert 0 < report["kl"]["total"] <= report["kl"]["delta"] == 0.05


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_was_stopped_after_profiling_continues_from_there(tmp_path, monkeypatch):
    complete = calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path / "complete")
    monkeypatch.setattr(running, "try_updates", _stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path / "stopped")
    monkeypatch.undo()
    assert names(tmp_path / "stopped") == {"calibration_profile.safetensors"}
    monkeypatch.setattr(running, "profile_heads", _stop)
    assert calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path / "stopped") == complete


@pytest.mark.parametrize("change", ["another weight", "another type", "other samples", "more probes"])
def test_a_profile_of_other_inputs_is_not_used(tmp_path, change, monkeypatch):
    calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path)
    given = inputs(calibration_model())
    if change == "another weight":
        given.load_model().model.multi_modal_projector.linear_1.weight.data[3, 5] += 1e-6
    if change == "another type":
        given = replace(given, autocast=torch.bfloat16)
    config = {"other samples": replace(CONFIG, seed=1), "more probes": replace(CONFIG, probes=9)}.get(change, CONFIG)
    monkeypatch.setattr(running, "profile_heads", _stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate_heads(given, config, tmp_path)
    calibrate_heads(inputs(calibration_model()), replace(CONFIG, k=1, delta=0.01), tmp_path)  # reuses the profile


NOTHING = {
    "rah_delta: 0": {"delta": 0},
    "no head in the calibrated layers": {"p_caf": 100},
    "no chosen head has an anchor": {"beta": 50},
    "no update remains": {"delta": 1e-12, "halvings": 1},
}


@pytest.mark.parametrize("words", NOTHING)
def test_a_calibration_without_changes_gives_a_report_and_removes_the_old_adapter(tmp_path, words):
    calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path)
    report = calibrate_heads(inputs(calibration_model()), replace(CONFIG, **NOTHING[words]), tmp_path)
    assert names(tmp_path) == OTHERS
    assert (report["calibrated"], report["kl"]["total"]) == ([], 0.0)
    assert f"No adapter: {words}" in render_summary(report)


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2"])
def test_pruning_removes_only_the_output_of_the_chosen_heads(tmp_path, name):
    model = calibration_model(name)
    before = snapshot(model)
    config = replace(CONFIG, update="prune", targets="no_caf", p_isal=10, delta=0)
    report = calibrate_heads(inputs(model), config, tmp_path)
    lowest = torch.tensor(report["isal"]).argmin(dim=1).tolist()
    assert set(report["calibrated"]) == {f"L{layer}H{head}" for layer, head in enumerate(lowest)}
    assert f"{len(lowest)} pruned" in render_summary(report)
    assert divergence_of(model, config, tmp_path) == pytest.approx(report["kl"]["total"], rel=1e-5)
    for layer, head in enumerate(lowest):
        key = next(key for key in before if f"layers.{layer}.self_attn.o_proj" in key and "vision" not in key)
        before[key].unflatten(1, (8, 8))[:, head] = 0
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("change", ["trained", "without a report", "after a report without adapter"])
def test_an_adapter_that_no_calibration_wrote_is_not_replaced(tmp_path, change):
    nothing = replace(CONFIG, delta=0)
    if change != "without a report":
        calibrate_heads(inputs(calibration_model()), CONFIG if change == "trained" else nothing, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"trained")
    later = file.stat().st_mtime_ns + 10**7  # file timestamps may be coarse
    os.utime(file, ns=(later, later))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"output_dir: .* contains adapter_model\.safetensors, which no calib"):
        calibrate_heads(inputs(calibration_model()), nothing, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "hera/run.json", "checkpoint-5"])
def test_a_calibration_into_the_folder_of_a_model_or_a_run_is_refused(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"output_dir: .* contains {Path(name).name}, which no calibration wrote"):
        calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path)


def test_a_calibration_that_was_killed_while_it_wrote_its_files_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "write_json", _stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) >= ADAPTER
    calibrate_heads(inputs(calibration_model()), replace(CONFIG, batch_size=8), tmp_path)
    assert names(tmp_path) == ADAPTER | OTHERS


def test_a_full_disk_leaves_the_adapter_and_the_report_of_an_earlier_calibration(tmp_path):
    calibrate_heads(inputs(calibration_model()), replace(CONFIG, rank=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(8000), pytest.raises(OSError):  # the report fits, but the adapter does not
        calibrate_heads(inputs(calibration_model()), CONFIG, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


HEADS = [
    {"head": "L0H31", "anchors": [{"head": "L0H2"}, {"head": "L1H7"}]},
    {"head": "L2H5", "anchors": [{"head": "L0H2"}]},
]


def test_maps_show_the_scores_and_every_mark_is_on_its_head(tmp_path, monkeypatch):
    noise = np.random.default_rng(0)
    content = {
        "caf": noise.normal(size=(3, 40)).tolist(),
        "isal": noise.normal(size=(3, 40)).tolist(),
        "heads": HEADS,
        "calibrated": ["L0H31"],
        "nothing_because": None,
        "kl": {"total": 0.01, "delta": 0.05},
        "provenance": {"model": "m", "dataset": "d", "samples": {"profiled": 68}},
    }
    figures: list[Figure] = []
    save = reporting.save_figure
    monkeypatch.setattr(reporting, "save_figure", lambda made, path: (figures.append(made), save(made, path)))
    draw_calibration(content, tmp_path / "calibration.png")
    assert matplotlib.image.imread(tmp_path / "calibration.png")[..., :3].std() > 0.05
    (made,) = figures
    for axes, name in zip(made.axes, ("caf", "isal"), strict=False):
        assert np.array_equal(axes.images[0].get_array(), content[name])
        marks = [{tuple(place) for place in group.get_offsets()} for group in axes.collections]
        assert marks == [{(31, 0)}, {(5, 2)}, {(2, 0), (7, 1)}]  # x is the head, and y is the layer
    labels = [text.get_text() for text in made.legends[0].get_texts()]
    assert labels == ["chosen, calibrated (1)", "chosen, not changed (1)", "anchor (2)"]
    low, high = made.axes[1].images[0].get_clim()
    assert low == -high
