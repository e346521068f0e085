"""Calibration with the host: the demo recipe, its adapter in the host, bad input, and recipes/rah_lora."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from .conftest import Command
from .runner import ROOT, write_dataset, write_recipe

pytestmark = pytest.mark.slow

RECIPE = ROOT / "recipes/demo/calibrate.yaml"
SCRIPT = str(ROOT / "recipes/rah_lora")
OUTPUT = "saves/demo_calibrate"
FILES = {"adapter_config.json", "adapter_model.safetensors", "calibration.json", "calibration.png"}
UPON = {"model_name_or_path": "hera_demo/model", "adapter_name_or_path": OUTPUT, "template": "qwen3_nothink"}


@pytest.fixture(scope="module")
def report(world: Path, command: Command) -> dict[str, Any]:
    """The report of the command on the demo recipe."""
    status, output = command("calibrate", RECIPE)
    assert status == 0, output
    assert f"adapter_name_or_path: {OUTPUT}" in output
    return json.loads((world / OUTPUT / "calibration.json").read_text())


def documented(file: str) -> set[str]:
    """Reads the arguments of the export command in a page or in the header of a recipe."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n#", " ")
    (keys,) = re.findall(r"^(?:#\s+)?llamafactory-cli export (.*)$", text, re.MULTILINE)
    return set(re.findall(r"--(\w+)", keys))


def test_the_documented_export_merges_only_the_calibrated_heads(world, server, report):
    keys = UPON | {"export_dir": "saves/calibrated"}
    assert documented("docs/calibration.md") == documented("recipes/llava_1_5_7b_calibrate.yaml") == set(keys)
    run = server.run(keys, world, call="export_model")
    assert run.ok, run.output
    base = load_file(world / "hera_demo/model/model.safetensors")
    merged = load_file(world / "saves/calibrated/model.safetensors")
    tensors = load_file(world / OUTPUT / "adapter_model.safetensors")
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name}
    a, b = ({m: tensors[f"{m}.lora_{side}.weight"] for m in modules} for side in "AB")
    # a checkpoint and the model name their tensors differently, except for the layer and the projection
    changes = {f"{m.split('layers.', 1)[1]}.weight": b[m] @ a[m] for m in modules}
    assert merged.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        delta = changes.get(name.split("layers.", 1)[-1]) if "language_model" in name else None
        if delta is None:
            assert torch.equal(merged[name], weight), name
            continue
        changed += 1
        assert (merged[name] - (weight + delta)).abs().max() <= 1e-6
        assert torch.equal(merged[name][delta == 0], weight[delta == 0])
        assert 0 < (delta != 0).float().mean() < 1
    assert changed == len(changes)


@pytest.mark.parametrize("new", [True, False], ids=["new adapter", "same adapter"])
def test_hera_trains_on_top_of_a_calibration(world, server, recipe, report, new):
    lora = {"finetuning_type": "lora", "adapter_name_or_path": OUTPUT, "create_new_adapter": new, "max_steps": 3}
    lora |= {"lora_rank": 4, "lora_target": "all", "output_dir": f"saves/on_top_{new}"}
    run = server.run(recipe | lora | {"hera_heads": "L1H0,L3H2"}, world)
    assert run.ok, run.output
    assert all(line["hera_loss"] > 0 for line in run.logs())
    trained = load_file(run.folder / "adapter_model.safetensors")
    calibrated = load_file(world / OUTPUT / "adapter_model.safetensors")
    if new:
        assert {tensor.shape[0] for name, tensor in trained.items() if "lora_A" in name} == {4}
    else:
        assert trained.keys() == calibrated.keys()
        assert all(trained[name].shape == calibrated[name].shape for name in trained)
        assert not all(torch.equal(trained[name], calibrated[name]) for name in trained)


def test_truncated_image_tokens_are_refused_and_leave_no_files(world, command):
    folder = world / "saves/bad_calibration"
    status, output = command("calibrate", RECIPE, f"output_dir={folder}", "cutoff_len=12")
    assert (status, "cutoff_len: 12 cuts" in output) == (2, True), output
    assert not folder.exists() or not {path.name for path in folder.iterdir()} & FILES


def test_answers_are_not_needed_and_may_be_ignored(world, command, report):
    data = world / "unlabeled"
    data.mkdir()
    rows = json.loads((world / "hera_demo/data/demo_train.json").read_text())
    questions = [{"instruction": row["messages"][0]["content"], "images": row["images"]} for row in rows]
    write_dataset(data, questions, columns={"prompt": "instruction", "images": "images"})
    keys = {"dataset_dir": str(data), "dataset": "rows", "media_dir": str(world / "hera_demo/data")}
    file = write_recipe(world / "unlabeled.yaml", yaml.safe_load(RECIPE.read_text()) | keys)
    prompt, saliency = "rah_text=prompt", []
    for n, keys in enumerate(((file,), (file, prompt), (RECIPE, prompt))):
        status, output = command("calibrate", *keys, f"output_dir=saves/answers_{n}")
        assert status == 0, output
        saliency.append(json.loads((world / f"saves/answers_{n}/calibration.json").read_text())["isal"])
    assert saliency[0] == saliency[1]  # without an answer, the conversation is the prompt
    assert saliency[2] != report["isal"]


# -- recipes/rah_lora ------------------------------------------------------------------------------------------------


def test_the_control_script_calibrates_on_corrupted_images(world, server, report):
    arguments = ("control", RECIPE, "--control", "shuffled", "output_dir=saves/control")
    status, output = server.script(SCRIPT, *arguments, cwd=world)
    assert status == 0, output
    folder = world / "saves/control"
    normal, corrupted = (
        json.loads((path / "calibration.json").read_text()) for path in (folder, folder / "control_shuffled")
    )
    compared = json.loads((folder / "control_shuffled/control.json").read_text())
    assert normal == report
    assert compared["kl_control"] == corrupted["kl"]["total"]
    assert compared["kl_control_on_uncorrupted_samples"] > 0
    assert -1 <= compared["caf_rank_correlation"] < 1


def test_the_gap_script_correlates_gaps_with_gains(tmp_path, monkeypatch, capsys):
    caf = [[1.0, 2.0, 3.0, 6.0]]
    for name, isal in (("one", 0.5), ("two", -0.5), ("three", -1.5)):
        content = {"calibrated": ["L0H3"], "caf": caf, "isal": [[0.0, 0.0, 0.0, isal]]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "calibration.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "gap", "one=0.1", "two=0.2", "three=0.3", "--output", "gap.png"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(SCRIPT, run_name="__main__")
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines()[-4:-1]] == ["1.104", "2.104", "3.104"]
    assert "r = 1.000 over 3 calibrations" in output
    assert (tmp_path / "gap.png").is_file()
