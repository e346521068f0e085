"""Calibration on the real host: the demo recipe, its adapter in the host, bad input, data without answers."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from .runner import ROOT, HostServer, environment, run_command, write_recipe

pytestmark = pytest.mark.slow

_PATH = [path for path in [os.environ.get("PYTHONPATH")] if path]
OUTPUT = "saves/demo_calibrate"
FILES = {"adapter_config.json", "adapter_model.safetensors", "calibration.json", "calibration.png"}
UPON = {
    "model_name_or_path": "hera_demo/model",
    "adapter_name_or_path": OUTPUT,
    "finetuning_type": "lora",
    "template": "qwen3_nothink",  # one of the host's own: llava_qwen3 belongs to the plugin
    "trust_remote_code": False,
}


def calibrate_many(cwd: Path, jobs: list[tuple[Path, list[str], str | None]]) -> list[dict[str, Any]]:
    """Runs calibrations in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.calibrate_many"],
        input=json.dumps([[str(recipe), overrides, control] for recipe, overrides, control in jobs]),
        cwd=cwd,
        env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), *_PATH]), LLAMAFACTORY_VERBOSITY="WARNING"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def report(world: Path) -> dict[str, Any]:
    """The demo recipe, calibrated."""
    (answer,) = calibrate_many(world, [(ROOT / "recipes/demo/calibrate.yaml", [], None)])
    return answer["reports"][0]


def deltas(world: Path, folder: str = OUTPUT, scaling: float = 1.0) -> dict[str, torch.Tensor]:
    """The update of each weight that an adapter changes."""
    tensors = load_file(world / folder / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    modules = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    a, b = ({m: tensors[f"base_model.model.{m}.lora_{side}.weight"] for m in modules} for side in "AB")
    return {f"{module}.weight": scaling * b[module] @ a[module] for module in modules}


def test_the_demo_recipe_makes_an_adapter(world: Path, report: dict[str, Any]) -> None:
    assert {path.name for path in (world / OUTPUT).iterdir()} >= FILES
    assert report["calibrated"]
    assert report["kl"]["total"] <= report["kl"]["delta"]
    assert json.loads((world / OUTPUT / "calibration.json").read_text()) == report


def test_export_merges_exactly_the_calibrated_heads(world: Path, server: HostServer, report: dict[str, Any]) -> None:
    run = server.run(UPON | {"export_dir": "saves/calibrated", "export_device": "cpu"}, world, call="export")
    assert run.ok, run.output
    base = load_file(world / "hera_demo/model/model.safetensors")
    merged = load_file(world / "saves/calibrated/model.safetensors")
    changes = deltas(world)
    # a checkpoint names its tensors otherwise than the model its modules: the tail tells the layer and the projection
    changes = {name.split("layers.", 1)[1]: delta for name, delta in changes.items()}
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
    assert changed == len(report["adapter_rank"])


def documented(file: str, command: str, **values: str) -> list[str]:
    """A command of the host as it stands in a page or header, with values for its names."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n#", " ")
    (line,) = re.findall(rf"^(?:#\s+)?(llamafactory-cli {command} .*)$", text, re.MULTILINE)
    return [values.get(word, word) for word in line.split()]


MODEL = {"MODEL": "hera_demo/model", "OUTPUT": OUTPUT, "TEMPLATE": UPON["template"]}
EXPORTS = {
    "page": ("docs/calibration.md", MODEL | {"MERGED": "saves/documented"}, {"HERA_DISABLE": "1"}),
    "recipe": (
        "recipes/llava_1_5_7b_calibrate.yaml",
        {
            "llava-hf/llava-1.5-7b-hf": "hera_demo/model",
            "saves/llava_1_5_7b/calibrate": OUTPUT,
            "saves/llava_1_5_7b/calibrated": "saves/documented_recipe",
        },
        {},
    ),
}


@pytest.mark.parametrize("where", EXPORTS)
def test_the_documented_export_merges(world: Path, report: dict[str, Any], where: str) -> None:
    file, values, env = EXPORTS[where]
    command = documented(file, "export", **values)
    status, output = run_command(command, world, **env)
    assert status == 0, output
    merged = load_file(world / command[-1] / "model.safetensors")
    base = load_file(world / "hera_demo/model/model.safetensors")
    assert sum(not torch.equal(merged[name], base[name]) for name in base) == len(report["adapter_rank"])


def test_the_documented_chat_starts_without_the_plugin(world: Path, report: dict[str, Any]) -> None:
    short = ["--max_new_tokens", "8"]  # an untrained model does not end its answer
    command = documented("docs/calibration.md", "chat", **MODEL) + short
    status, output = run_command(command, world, stdin="how many circles?\nexit\n", HERA_DISABLE="1")
    # the host leaves while its generating thread may still run, which now and then aborts behind the last word
    assert status in (0, -signal.SIGABRT), output
    assert "Assistant:" in output


@pytest.mark.parametrize("new", [True, False], ids=["new adapter", "same adapter"])
def test_hera_trains_on_top(world: Path, server: HostServer, recipe: dict, report: dict[str, Any], new: bool) -> None:
    lora = {"finetuning_type": "lora", "adapter_name_or_path": OUTPUT, "create_new_adapter": new, "max_steps": 3}
    lora |= {"lora_rank": 4, "lora_target": "all", "output_dir": f"saves/on_top_{new}"}
    run = server.run(recipe | lora | {"hera_heads": "L1H0,L3H2"}, world)
    assert run.ok, run.output
    assert all(line["hera_loss"] > 0 for line in run.logs())
    trained = load_file(run.folder / "adapter_model.safetensors")
    calibrated = load_file(world / OUTPUT / "adapter_model.safetensors")
    if new:
        assert {tensor.shape[0] for name, tensor in trained.items() if "lora_A" in name} == {4}
        both = UPON | {"adapter_name_or_path": f"{OUTPUT},{run.folder}", "export_dir": "saves/both"}
        assert server.run(both, world, call="export").ok
        config = json.loads((run.folder / "adapter_config.json").read_text())
        top = deltas(world, str(run.folder), config["lora_alpha"] / config["r"])
        merged, base = (load_file(world / f / "model.safetensors") for f in ("saves/both", "hera_demo/model"))
        tails = {name.split("layers.", 1)[1]: name for name in base if "language_model" in name and "layers." in name}
        for name, delta in deltas(world).items():
            stored = tails[name.split("layers.", 1)[1]]
            assert (merged[stored] - (base[stored] + delta + top[name])).abs().max() <= 1e-6
    else:
        assert trained.keys() == calibrated.keys()
        assert all(trained[name].shape == calibrated[name].shape for name in trained)
        assert not all(torch.equal(trained[name], calibrated[name]) for name in trained)


# change of the demo recipe -> what the message must hold
BAD: dict[str, tuple[list[str], list[str]]] = {
    "no image": (["dataset=hera_demo_text"], ["dataset", "have no image", "`images`"]),
    "too few": (["max_samples=50"], ["dataset: 50 of its 50", "rah_probes: 32", "rah_held_out: 32"]),
    "cutoff": (["cutoff_len=12"], ["cutoff_len", "12", "image tokens", "set cutoff_len to"]),
    "text-only model": (["model_name_or_path=hera_demo/language_model"], ["model_name_or_path", "text-only", "qwen3"]),
    "no model": (["model_name_or_path=./nowhere"], ["model_name_or_path", "./nowhere"]),
    "quantized": (["quantization_bit=4"], ["quantization_bit: 4", "Calibrate the base model", "dequantize"]),
    "unknown key": (["rah_anchors=3"], ["rah_anchors", "rah_k"]),
    "bad value": (["rah_delta=-1"], ["rah_delta", "-1", "0 or more"]),
    "no such layer": (["rah_layers=3-7"], ["rah_layers", "layer 7", "0 to 4"]),
    "no override": (["rah_delta"], ["rah_delta", "key=value", "output_dir=saves/run"]),
    "no output": (["output_dir="], ["output_dir: none is named", "output_dir=saves/calibration"]),
    "unnamed model": (["model_name_or_path="], ["model_name_or_path: none is named", "folder"]),
    "no config": (["model_name_or_path=hera_demo"], ["model_name_or_path", "hera_demo", "config.json"]),
    "no adapter": (["adapter_name_or_path=nope"], ["adapter_name_or_path", "folder nope does not exist", "Give"]),
    "unknown dataset": (
        ["dataset=hera_demo,nope"],
        ["dataset: hera_demo,", "Undefined dataset nope", "dataset_info.json"],
    ),
    "no data folder": (["dataset_dir=nope"], ["dataset_dir: nope", "No such file", "Name datasets"]),
    "unknown template": (["template=llava_qwen4"], ["template: llava_qwen4", "llava_qwen3"]),
    "no template": (["template="], ["template: none is named"]),
    "cutoff without value": (["cutoff_len="], ["cutoff_len", "no value"]),
    "samples in words": (["max_samples=many"], ["max_samples", "'many'", "a whole number"]),
    "no dataset": (["dataset=null"], ["dataset: none is named"]),
    "fused": (["model_name_or_path=fused_model"], ["model_name_or_path", "phi3", "fused"]),
    "broken": (["model_name_or_path=broken_model"], ["model_name_or_path", "NaN or infinity", "bf16 or fp32"]),
    "not writable": (
        ["output_dir=hera_demo/demo.json/x"],
        ["output_dir", "hera_demo/demo.json/x", "cannot be written"],
    ),
}


@pytest.fixture(scope="module")
def messages(world: Path) -> dict[str, str]:
    """What each bad input says, and that none writes a result."""
    model = world / "hera_demo/model"
    for name in ("broken_model", "fused_model"):
        (world / name).mkdir()
        for file in model.iterdir():
            (world / name / file.name).symlink_to(file)
    weights = load_file(model / "model.safetensors")
    weights[next(name for name in weights if "layers.2.self_attn.q_proj" in name)].fill_(torch.nan)
    (world / "broken_model/model.safetensors").unlink()
    save_file(weights, world / "broken_model/model.safetensors", {"format": "pt"})
    _fuse(world / "fused_model")
    recipe = ROOT / "recipes/demo/calibrate.yaml"
    jobs = [(recipe, ["output_dir=saves/bad_calibration", *change], None) for change, _ in BAD.values()]
    return {name: answer["error"] for name, answer in zip(BAD, calibrate_many(world, jobs), strict=True)}


def _fuse(folder: Path) -> None:
    """Turns the configuration into that of a model whose text decoder has fused projections, with random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText, Phi3Config

    config = AutoConfig.from_pretrained(folder)
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {key: getattr(config.text_config, key) for key in kept}
    config.text_config = Phi3Config(**sizes, intermediate_size=64, pad_token_id=0)
    for file in (folder / "config.json", folder / "model.safetensors"):
        file.unlink()
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing(world: Path, messages: dict[str, str], name: str) -> None:
    assert all(part in messages[name] for part in BAD[name][1]), messages[name]
    folder = world / "saves/bad_calibration"
    assert not folder.exists() or not {path.name for path in folder.iterdir()} & FILES


def test_answers_are_not_needed(world: Path) -> None:
    data = world / "unlabeled"
    data.mkdir()
    rows = json.loads((world / "hera_demo/data/demo_train.json").read_text())
    asked = [{"instruction": row["messages"][0]["content"], "images": row["images"]} for row in rows]
    (data / "rows.json").write_text(json.dumps(asked))
    columns = {"prompt": "instruction", "images": "images"}
    info = {"questions": {"file_name": "rows.json", "columns": columns}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    recipe = yaml.safe_load((ROOT / "recipes/demo/calibrate.yaml").read_text()) | {
        "dataset_dir": str(data),
        "dataset": "questions",
        "media_dir": str(world / "hera_demo/data"),
        "output_dir": "saves/unlabeled",
    }
    file = write_recipe(world / "unlabeled.yaml", recipe)
    whole, prompts = calibrate_many(world, [(file, [], None), (file, ["rah_text=prompt"], None)])
    # without an answer the conversation is the prompt
    assert whole["reports"][0]["calibrated"]
    assert whole["reports"][0]["isal"] == prompts["reports"][0]["isal"]


def test_prompts_alone_and_controls_of_the_demo(world: Path) -> None:
    demo = ROOT / "recipes/demo/calibrate.yaml"
    prompt, blank = calibrate_many(
        world,
        [
            (demo, ["rah_text=prompt", "rah_positions=last", "output_dir=saves/prompt"], None),
            (demo, ["output_dir=saves/control"], "blank"),
        ],
    )
    (report,) = prompt["reports"]
    normal, corrupted = blank["reports"]
    assert report["isal"] != normal["isal"]
    assert corrupted["isal"] != normal["isal"]
    assert corrupted["compared_with_uncorrupted"]["targets_normal"] == [t["head"] for t in normal["targets"]]
    assert (world / "saves/control/control_blank/calibration.png").is_file()
