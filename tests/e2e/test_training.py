"""Training through the real host: logs, output files, and that nothing else changes."""

import hashlib
import json
from pathlib import Path

import llamafactory
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llamafactory_hera.heads import Targets
from llamafactory_hera.integrations.llamafactory.commands import score_checkpoint

from .conftest import LORA, Train
from .runner import run_command, write_recipe

pytestmark = pytest.mark.slow

HERA_KEYS = {"lm_loss", "hera_loss", "hera_mknn", "hera_mknn_chance", "hera_temperature"}


def _names(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def _sft(recipe: dict) -> dict:
    """Returns the changes that make the recipe plain supervised fine-tuning."""
    return dict.fromkeys(key for key in recipe if key.startswith("hera_")) | {"stage": "sft"}


# -- logs ------------------------------------------------------------------------------------------------------------


def test_curves_and_messages_reach_every_log(train: Train, recipe: dict, world: Path) -> None:
    board = {"LLAMABOARD_ENABLED": "1", "LLAMABOARD_WORKDIR": str(world / "board")}  # as the host's web UI sets them
    run = train({"plot_loss": True, "report_to": "tensorboard", "max_steps": 3}, env=board)
    assert all(line.keys() >= HERA_KEYS for line in run.logs())
    lines = [json.loads(line) for line in (run.folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["hera_loss"] for line in lines if "loss" in line] == [line["hera_loss"] for line in run.logs()]
    for curve in ("lm_loss", "hera_loss", "hera_mknn", "hera_temperature"):
        assert (run.folder / f"training_{curve}.png").stat().st_size > 5000
    events = b"".join(path.read_bytes() for path in run.folder.rglob("events.out.*"))
    assert all(f"train/{key}".encode() in events for key in HERA_KEYS)
    first = run.logs()[0]
    assert first["loss"] == pytest.approx(first["lm_loss"] + recipe["hera_weight"] * first["hera_loss"], rel=1e-6)
    heads = "HeRA | heads: L1H0,L1H3,L2H5,L3H2,L3H7"
    assert run.output.count(heads) == 1  # in the format of the host, once
    assert (world / "board/running_log.txt").read_text().count(heads) == 1


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(train: Train, tuning: dict) -> None:
    kinds = ({}, {"use_reentrant_gc": False}, {"disable_gradient_checkpointing": True})
    default, *others = (train(tuning, kind, {"max_steps": 3}) for kind in kinds)
    for other in others:
        for ours, theirs in zip(default.logs(), other.logs(), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_hera_changes_the_weights_and_a_weight_of_0_does_not(train: Train, recipe: dict) -> None:
    kinds = (_sft(recipe), {"hera_weight": 0.0}, {"hera_weight": 0.1})
    folders = (train(kind, {"max_steps": 3}).folder for kind in kinds)
    plain, idle, aligned = (load_file(folder / "model.safetensors") for folder in folders)
    # The appended rows may change the rounding of a matrix product.
    assert all(torch.allclose(idle[name], plain[name], atol=1e-5) for name in plain)
    assert not all(torch.allclose(aligned[name], plain[name], atol=1e-5) for name in plain)


def test_two_processes_compute_the_term_of_one(train: Train) -> None:
    # The host averages the LM loss per process, so only the term is comparable, and only in the first steps.
    one = train({"max_steps": 2})
    two = train({"max_steps": 2, "per_device_train_batch_size": 8}, ranks=2)
    for alone, together in zip(one.logs(), two.logs(), strict=True):
        for key in ("hera_loss", "hera_mknn", "hera_temperature"):
            assert together[key] == pytest.approx(alone[key], rel=1e-5)


def test_sft_is_bit_identical_with_the_plugin_switched_off(train: Train, world: Path, recipe: dict) -> None:
    # The template is one of the host's: llava_qwen3 comes with the plugin.
    sft = _sft(recipe) | {"template": "llava", "max_steps": 3}
    with_plugin = train(sft)
    keys = {key: value for key, value in (recipe | sft).items() if value is not None}
    file = write_recipe(world / "sft.yaml", keys | {"output_dir": "saves/sft_without"})
    code, output = run_command(["llamafactory-cli", "train", str(file)], world, HERA_DISABLE="1")
    assert code == 0, output
    digests = {
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (with_plugin.folder, world / "saves/sft_without")
    }
    assert len(digests) == 1


def test_hera_aligns_its_heads_and_plain_training_does_not(
    train: Train, world: Path, recipe: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    long = {"num_train_epochs": 6.0, "max_steps": -1, "hera_weight": 1.0, "hera_memory": 64, "hera_heads": "auto"}
    plain, aligned = train(long, _sft(recipe)), train(long, {"hera_select_samples": 96})
    file = write_recipe(world / "scored.yaml", recipe | {"hera_select_samples": 96, "hera_select_mode": "mllm"})
    heads = Targets.load(aligned.folder / "hera/heads.json").items
    scores = [Targets.load(score_checkpoint(run.folder, file)).provenance["scores"] for run in (plain, aligned)]
    means = [sum(table[item.layer][item.head] for item in heads) / len(heads) for table in scores]
    assert means[1] > means[0] + 0.04, means  # 0.105 is chance


# -- launchers -------------------------------------------------------------------------------------------------------


def test_two_processes_under_torchrun(world: Path, recipe: dict) -> None:
    halves = {"output_dir": "saves/torchrun", "per_device_train_batch_size": 8, "ddp_backend": "gloo", "max_steps": 2}
    file = write_recipe(world / "torchrun.yaml", recipe | halves)
    command = ["llamafactory-cli", "train", str(file)]
    code, output = run_command(command, world, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert code == 0, output
    assert output.count("global batch: 16 (2 processes x 8 x 1 accumulation steps)") == 1
    state = json.loads((world / "saves/torchrun/trainer_state.json").read_text())
    assert all(line["hera_loss"] > 0 for line in state["log_history"] if "loss" in line)


def test_accelerate_launch_finds_the_stage(world: Path, recipe: dict) -> None:
    # accelerate starts several CPU processes with MPI only, so this is one process.
    file = write_recipe(world / "accelerate.yaml", recipe | {"output_dir": "saves/accelerate", "max_steps": 2})
    entry = Path(llamafactory.__file__).with_name("launcher.py")
    command = ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(entry), str(file)]
    code, output = run_command(command, world)
    assert code == 0, output
    assert "HeRA | heads" in output


# -- output files ----------------------------------------------------------------------------------------------------


def test_the_output_is_a_plain_model(train: Train, world: Path) -> None:
    run = train({"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    base = _names(world / "hera_demo/model/model.safetensors")
    state = {"heads.json", "run.json", "state.safetensors"}
    for folder, expected in ((run.folder, state | {"card.json"}), (run.folder / "checkpoint-1", state)):
        assert _names(folder / "model.safetensors") == base
        assert {path.name for path in (folder / "hera").iterdir()} - {".lock"} == expected
    code = (
        "import sys; from transformers import AutoModelForImageTextToText, AutoProcessor; "
        f"AutoModelForImageTextToText.from_pretrained({str(run.folder)!r}); "
        f"AutoProcessor.from_pretrained({str(run.folder)!r}); "
        "assert not any(name.startswith(('llamafactory_hera', 'llamafactory')) for name in sys.modules)"
    )
    status, output = run_command(["python", "-c", code], world, HERA_DISABLE="1")
    assert status == 0, output


def test_an_adapter_exports_and_chats_without_the_plugin(train: Train, world: Path) -> None:
    adapter = train(LORA, {"max_steps": 1}).folder
    assert all(
        "lora_" in name or "multi_modal_projector" in name for name in _names(adapter / "adapter_model.safetensors")
    )
    settings = {
        "model_name_or_path": "hera_demo/model",
        "adapter_name_or_path": str(adapter),
        "template": "qwen3_nothink",  # one of the host's
        "finetuning_type": "lora",
        "trust_remote_code": False,
    }
    code = (
        "from llamafactory.chat import ChatModel; from llamafactory.train.tuner import export_model; "
        f"export_model({settings | {'export_dir': 'saves/exported', 'export_device': 'cpu'}!r}); "
        f"model = ChatModel({settings | {'infer_dtype': 'float32'}!r}); "
        "print('ANSWER', model.chat([{'role': 'user', 'content': 'how many circles?'}], max_new_tokens=4)[0])"
    )
    status, output = run_command(["python", "-c", code], world, HERA_DISABLE="1")
    assert status == 0, output
    assert "ANSWER" in output
    assert _names(world / "saves/exported/model.safetensors") == _names(world / "hera_demo/model/model.safetensors")
