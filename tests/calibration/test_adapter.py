"""The adapter against weights that were edited directly, and what else is in it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from llamafactory_hera.calibration.adapter import save_adapter
from llamafactory_hera.calibration.plan import make_plan
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.weights import HeadWeights, Scaled, applied
from tests.calibration.tiny import Rows, calibration_model, collate, noise_images, random_profile

CONFIG = RahConfig(p_isal=80, p_caf=10, beta=0.2, k=3, rank=3, layers="0,2")


@pytest.fixture(params=["llava-llama", "llava-qwen2", "llava-qwen3"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, list[Scaled], Path]:
    model = calibration_model(request.param)
    weights = HeadWeights(model)
    plan = make_plan(random_profile(), weights, CONFIG)
    steps = [(update, 0.15 / 2 ** (index % 3)) for index, update in enumerate(plan.updates)]
    save_adapter(tmp_path, weights, steps, "tiny/model")
    return model, steps, tmp_path


def batch() -> dict:
    rows = Rows([[image] for image in noise_images(3)])
    return collate([rows.encode(row) for row in range(3)])


def test_base_with_adapter_is_the_directly_edited_model(made: tuple) -> None:
    model, steps, folder = made
    with torch.no_grad():
        base = model(**batch()).logits
        with applied(HeadWeights(model), steps):
            direct = model(**batch()).logits
            edited = {name: value.clone() for name, value in model.state_dict().items()}
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder)
        unmerged = adapted(**batch()).logits
        merged = adapted.merge_and_unload()
    assert (direct - base).abs().max() > 1e-3
    scale = direct.abs().max()
    assert (unmerged - direct).abs().max() <= 1e-6 * scale
    for name, value in merged.state_dict().items():
        assert (value - edited[name]).abs().max() <= 1e-6, name


def test_other_heads_are_bit_equal_after_merging(made: tuple) -> None:
    model, steps, folder = made
    changed = {(edit.layer, edit.kind, edit.index) for update, _ in steps for edit in update.edits}
    merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    before, after = HeadWeights(model), HeadWeights(merged)
    layout = before.layout
    for layer in range(layout.n_layers):
        for kind, n in (("value", layout.n_kv_heads), ("output", layout.n_heads)):
            for index in range(n):
                same = torch.equal(before.slice(layer, kind, index), after.slice(layer, kind, index))
                assert same == ((layer, kind, index) not in changed)
    touched = {before.names[layer, kind] + ".weight" for layer, kind, _ in changed}
    state = merged.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if name not in touched)


def test_the_adapter_is_peft_lora_whose_rank_is_what_each_layer_needs(made: tuple) -> None:
    model, steps, folder = made
    weights = HeadWeights(model)
    needed: dict[str, int] = {}
    for update, _ in steps:
        for edit in update.edits:
            name = weights.names[edit.layer, edit.kind]
            needed[name] = needed.get(name, 0) + 3
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert needed == config["rank_pattern"] == config["alpha_pattern"]
    assert config["target_modules"] == sorted(needed)
    assert len(set(needed.values())) > 1
    assert {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors} == set(needed)
    assert all(".layers.0." in name or ".layers.2." in name for name in tensors)
    assert all(tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank for name, rank in needed.items())
    assert (config["peft_type"], config["inference_mode"]) == ("LORA", True)
    assert config["base_model_name_or_path"] == "tiny/model"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
