"""Every objective through the real host: it trains, resumes, logs its values, and leaves a plain model."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import autoencoder_folder, same

from .conftest import LORA

pytestmark = pytest.mark.slow

LAYER = {"hera_heads": None, "hera_granularity": "layer"}
VIRAL = {"hera_objective": "viral", **LAYER, "hera_layers": "middle", "hera_weight": 0.5, "hera_teacher_cache": None}
JARVIS = {"hera_objective": "jarvis", **LAYER, "hera_layers": "L1", "hera_weight": 1.0}
ROSS = {**LAYER, "hera_objective": "tests.training.test_tokens:SmallRoss", "hera_layers": "final", "hera_weight": 1.0}
ROSS |= {"hera_teacher": autoencoder_folder(), "hera_teacher_cache": None, "hera_objective_lr": 1e-3}
FIVE = "L1H0,L1H3,L2H5,L3H2,L3H7"
AGREEMENT = {"hera_mknn", "hera_mknn_chance"}
#: Case -> a change to the recipe, the aligned heads or layers, the saved parameters, and the logged values.
CASES: dict[str, tuple[dict[str, Any], str, set[str], set[str]]] = {
    "feature": ({"hera_objective": "feature"}, FIVE, {"projectors"}, set()),
    "cka": (LORA | LAYER | {"hera_objective": "cka", "hera_layers": "penultimate"}, "L3", set(), AGREEMENT),
    "layers": (LAYER | {"hera_layers": "L4,L1"}, "L4,L1", {"log_temperature"}, AGREEMENT | {"hera_temperature"}),
    "viral, LoRA": (LORA | VIRAL, "L2", {"projectors"}, set()),
    "ross": (LORA | ROSS, "final", {"denoiser"}, set()),
    "jarvis": (JARVIS, "L1", {"z", "head"}, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_run_and_leaves_a_plain_model(train, world, case):
    change, targets, parameters, logged = CASES[case]
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 6}
    whole = train(change, saving, {"plot_loss": True})
    for value in ("hera_loss", "hera_temperature"):
        assert (whole.folder / f"training_{value}.png").exists() == (value in {"hera_loss", *logged})
    resumed = train(change, saving, {"resume_from_checkpoint": str(whole.folder / "checkpoint-2")})
    lora = "lora_target" in change
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    for file in (weights, "hera/state.safetensors"):
        assert same(load_file(resumed.folder / file), load_file(whole.folder / file)), file

    saved = set(load_file(whole.folder / weights))
    assert (
        all("lora_" in key or "multi_modal_projector" in key for key in saved)
        if lora
        else saved == set(load_file(world / "hera_demo/model/model.safetensors"))
    )
    first, last = (load_file(whole.folder / f"{f}hera/state.safetensors") for f in ("checkpoint-2/", ""))
    trained = {key for key in last if key.startswith("objective.")}
    assert {key.split(".")[1] for key in trained} == parameters
    assert not any(torch.equal(first[key], last[key]) for key in trained)

    run = json.loads((whole.folder / "hera/run.json").read_text())
    key = "hera_layers" if "hera_layers" in change else "hera_heads"
    assert (run["hera_objective"], run[key]) == (change.get("hera_objective", "contrastive"), targets)
    for line in whole.logs():
        if "hera_loss" not in line:  # jarvis skips some steps
            continue
        found = {key for key in line if key.startswith("hera_") or key == "lm_loss"}
        assert found == {"lm_loss", "hera_loss", *logged}
        weight = change.get("hera_weight", 0.1)
        assert line["loss"] == pytest.approx(line["lm_loss"] + weight * line["hera_loss"], rel=1e-5)
