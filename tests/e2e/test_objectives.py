"""Every objective through the real host: it trains, resumes, logs what it has, and leaves a plain model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tiny_models import autoencoder_folder

from .runner import HostServer, run_command

pytestmark = pytest.mark.slow

LORA = {"finetuning_type": "lora", "lora_target": "all", "additional_target": "multi_modal_projector", "lora_rank": 4}
LAYER = {"hera_heads": None, "hera_granularity": "layer"}
VIRAL = {"hera_objective": "viral", **LAYER, "hera_layers": "middle", "hera_weight": 0.5, "hera_teacher_cache": None}

ROSS = {**LAYER, "hera_objective": "small_ross:SmallRoss", "hera_layers": "final", "hera_weight": 1.0}
ROSS |= {"hera_teacher": autoencoder_folder(), "hera_teacher_cache": None, "hera_objective_lr": 1e-3}
_SMALL_ROSS = """from llamafactory_hera.rivals.ross import Ross

class SmallRoss(Ross):
    width, depth, heads = 32, 1, 2
"""

#: Change of the recipe -> what is aligned, and the parameters that are kept beside the model.
CASES: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "feature": ({"hera_objective": "feature"}, "L1H0,L1H3,L2H5,L3H2,L3H7", {"projectors"}),
    "feature pooled": ({"hera_objective": "feature_pooled"}, "L1H0,L1H3,L2H5,L3H2,L3H7", {"projectors"}),
    "cka": ({"hera_objective": "cka"}, "L1H0,L1H3,L2H5,L3H2,L3H7", set()),
    "cmar": ({"hera_objective": "cka", **LAYER, "hera_layers": "penultimate"}, "L3", set()),
    "contrastive layers": ({**LAYER, "hera_layers": "L4,L1"}, "L4,L1", {"log_temperature"}),
    "viral": (VIRAL, "L2", {"projectors"}),
    "ross": (ROSS, "final", {"denoiser"}),
    "jarvis": ({"hera_objective": "jarvis", **LAYER, "hera_layers": "L1", "hera_weight": 1.0}, "L1", {"z", "head"}),
}


def _args(recipe: dict, *changes: dict) -> dict:
    merged = dict(recipe)
    for change in changes:
        merged |= change
    return {key: value for key, value in merged.items() if value is not None}


def _names(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_and_its_model_is_plain(
    server: HostServer, world: Path, recipe: dict, case: str, tuning: dict
) -> None:
    change, sites, own = CASES[case]
    (world / "small_ross.py").write_text(_SMALL_ROSS)
    name = f"{case.replace(' ', '_')}{'_lora' if tuning else ''}"
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": False}
    settings = _args(recipe, change, tuning, saving, {"per_device_train_batch_size": 6})
    whole = server.run(settings | {"output_dir": f"saves/{name}_whole"}, world)
    assert whole.ok, whole.output
    checkpoint = f"saves/{name}_whole/checkpoint-2"
    resumed = server.run(settings | {"output_dir": f"saves/{name}", "resume_from_checkpoint": checkpoint}, world)
    assert resumed.ok, resumed.output
    weights = "adapter_model.safetensors" if tuning else "model.safetensors"
    for file in (weights, "hera/state.safetensors"):
        ours, theirs = load_file(resumed.folder / file), load_file(whole.folder / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file

    plain = _names(world / "hera_demo/model/model.safetensors")
    saved = _names(whole.folder / weights)
    assert all("lora_" in key or "multi_modal_projector" in key for key in saved) if tuning else saved == plain
    state = _names(whole.folder / "hera/state.safetensors")
    assert {key.split(".")[1] for key in state if key.startswith("objective.")} == own
    first, last = (load_file(whole.folder / f"{f}hera/state.safetensors") for f in ("checkpoint-2/", ""))
    assert all(not torch.equal(first[key], last[key]) for key in state if key.startswith("objective."))  # trained

    said = json.loads((whole.folder / "hera/run.json").read_text())
    key = "hera_layers" if "hera_layers" in change else "hera_heads"
    assert (said["hera_objective"], said[key]) == (change.get("hera_objective", "contrastive"), sites)
    assert (whole.folder / f"hera/{key.removeprefix('hera_')}.json").is_file()
    measured = {"lm_loss", "hera_loss"} | (
        set() if case in ("feature", "viral", "ross", "jarvis") else {"hera_mknn", "hera_mknn_chance"}
    )
    measured |= {"hera_temperature"} if "contrastive" in case else set()
    for line in whole.logs():
        if "hera_loss" not in line:  # jarvis leaves some out
            continue
        assert {key for key in line if key.startswith("hera_") or key == "lm_loss"} == measured
        assert line["loss"] == pytest.approx(line["lm_loss"] + settings["hera_weight"] * line["hera_loss"], rel=1e-5)


@pytest.mark.parametrize("case", ["cmar", "viral"])  # text and patches; the rest in tests/engines
def test_the_term_reaches_the_weights_under_every_kind_of_checkpointing(
    server: HostServer, world: Path, recipe: dict, case: str
) -> None:
    change = CASES[case][0]
    short = {"max_steps": 3, "plot_loss": True, "hera_weight": 5.0}
    kinds = [{}, {"use_reentrant_gc": False}, {"disable_gradient_checkpointing": True}]
    runs = [
        server.run(_args(recipe, change, short, kind, {"output_dir": f"saves/{case}_kind_{index}"}), world)
        for index, kind in enumerate(kinds)
    ]
    idle = server.run(_args(recipe, change, short, {"hera_weight": 0.0, "output_dir": f"saves/{case}_idle"}), world)
    assert all(run.ok for run in (*runs, idle)), [run.output[-2000:] for run in runs]
    for other in runs[1:]:
        for ours, theirs in zip(runs[0].logs(), other.logs(), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert runs[0].logs()[0]["grad_norm"] != pytest.approx(idle.logs()[0]["grad_norm"], rel=1e-2)
    assert (runs[0].folder / "training_hera_loss.png").is_file()
    assert not (runs[0].folder / "training_hera_temperature.png").exists()


@pytest.mark.parametrize("case", ["feature", "viral"])
def test_two_processes_compute_the_term_of_one(server: HostServer, world: Path, recipe: dict, case: str) -> None:
    short = {"max_steps": 2, "per_device_train_batch_size": 8}
    one = server.run(_args(recipe, CASES[case][0], short, {"output_dir": "saves/one_objective"}), world)
    halves = {"per_device_train_batch_size": 4, "ddp_backend": "gloo", "output_dir": "saves/two_objective"}
    two = server.run(_args(recipe, CASES[case][0], short, halves), world, ranks=2)
    assert one.ok, one.output
    assert two.ok, two.output
    for alone, together in zip(one.logs(), two.logs(), strict=True):
        assert together["hera_loss"] == pytest.approx(alone["hera_loss"], rel=1e-4)


def test_two_way_attention_trains_in_both_stages_and_is_refused_at_export(
    server: HostServer, world: Path, recipe: dict
) -> None:
    two_way = {**CASES["jarvis"][0], "hera_visual_attention": "two_way", "max_steps": 2}
    first = server.run(_args(recipe, two_way, {"output_dir": "saves/two_way"}), world)
    assert first.ok, first.output
    second = {"model_name_or_path": "saves/two_way", "hera_weight": 0.0, "output_dir": "saves/two_way_2"}
    run = server.run(_args(recipe, two_way, second), world)
    assert run.ok, run.output
    assert all("hera_loss" not in line for line in run.logs())
    export = {"model_name_or_path": "saves/two_way_2", "template": recipe["template"], "export_dir": "saves/no"}
    refused = server.run(export, world, call="export")
    assert not refused.ok
    assert "hera_visual_attention: saves/two_way_2 was trained with two_way" in refused.output
    plain = {"model_name_or_path": "saves/two_way", "stage": "sft", "output_dir": "saves/no"}
    hera = {key: None for key in {**recipe, **two_way} if key.startswith("hera_")}
    dropped = server.run(_args(recipe, two_way, hera, plain), world)
    assert "hera_visual_attention: saves/two_way was trained with two_way" in dropped.output
    assert not (world / "saves/no").exists()


def test_batches_of_text_alone(server: HostServer, world: Path, recipe: dict) -> None:
    mixed = {"dataset": "hera_demo,hera_demo_text", "per_device_train_batch_size": 4, "max_steps": 8}
    run = server.run(_args(recipe, VIRAL, mixed, {"output_dir": "saves/viral_mixed"}), world)
    assert run.ok, run.output
    assert any(line["hera_loss"] > 0 for line in run.logs())


def test_layers_are_selected_once(server: HostServer, world: Path, recipe: dict) -> None:
    auto = {**LAYER, "hera_layers": "auto", "hera_select_samples": 48, "hera_select_m": 2, "max_steps": 2}
    args = _args(recipe, auto, {"output_dir": "saves/layers_auto"})
    run = server.run(args, world)
    assert run.ok, run.output
    chosen = json.loads((run.folder / "hera/layers.json").read_text())
    scores = chosen["provenance"]["layer_scores"]
    ranked = sorted(range(len(scores)), key=lambda layer: (scores[layer], layer))
    assert chosen["layers"] == [f"L{layer}" for layer in ranked[:2]]
    assert f"HeRA | layers: {','.join(chosen['layers'])}" in run.output
    assert "5 layers on 48 samples" in run.output
    assert (run.folder / "hera/layers.png").is_file()
    again = server.run(args, world)
    assert again.ok, again.output
    assert "which was selected with the same settings" in again.output

    of_file = {"hera_layers": "saves/layers_auto/hera/layers.json", "output_dir": "saves/layers_file"}
    other = server.run(_args(args, of_file), world)
    assert other.ok, other.output
    assert f"HeRA | layers: {','.join(chosen['layers'])}" in other.output
    assert json.loads((other.folder / "hera/layers.json").read_text()) == chosen  # the scores are not lost
    refused = server.run(_args(args, of_file, {"hera_select_m": 3}), world)
    assert not refused.ok
    assert "hera_layers: the layers" in refused.output
    assert "hera_select_m was 2, is 3" in refused.output


def test_a_checkpoint_of_another_objective_is_refused(server: HostServer, world: Path, recipe: dict) -> None:
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "output_dir": "saves/identity"}
    assert server.run(_args(recipe, {"hera_objective": "cka"}, saving), world).ok
    resume = {"resume_from_checkpoint": "saves/identity/checkpoint-1", "max_steps": 2}
    for change, said in (
        ({"hera_objective": "feature"}, "hera_objective was cka, is feature"),
        ({"hera_objective": "cka", **LAYER, "hera_layers": "L1"}, "hera_granularity was head, is layer"),
        ({"hera_objective": "cka", "hera_heads": "L1H1"}, "hera_heads was L1H0,L1H3,L2H5,L3H2,L3H7, is L1H1"),
    ):
        run = server.run(_args(recipe, change, saving, resume), world)
        assert not run.ok
        assert said in run.output


def test_layers_are_scored_for_a_recipe_of_layers_and_not_selected(world: Path, recipe: dict) -> None:
    import yaml

    short = {"hera_select_samples": 32, "output_dir": "saves/scored"}
    (world / "layers.yaml").write_text(yaml.safe_dump(_args(recipe, VIRAL, short)))
    code, output = run_command(["llamafactory-hera", "score", "layers.yaml"], world)
    assert code == 0, output
    assert "5 layers on 32 samples" in output
    assert (world / "saves/scored/hera/scores.png").is_file()
    assert len(json.loads((world / "saves/scored/hera/scores.json").read_text())["layers"]) == 5
    code, output = run_command(["llamafactory-hera", "select", "layers.yaml"], world)
    assert code == 2
    assert "hera_granularity: layers.yaml aligns layers" in output
