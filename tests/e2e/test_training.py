"""Training through the real host: logs, output files, the model card, and no side effects."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file

from llamafactory_hera.heads import Targets
from llamafactory_hera.integrations.llamafactory.commands import score_checkpoint

from .conftest import LORA
from .runner import HostServer, Run, run_command, write_recipe

pytestmark = pytest.mark.slow

HERA_KEYS = {"lm_loss", "hera_loss", "hera_mknn", "hera_mknn_chance", "hera_temperature"}


def test_curves_and_messages_reach_every_log(train, recipe, world):
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
    assert run.output.count(heads) == 1  # once, in the host's format
    assert (world / "board/running_log.txt").read_text().count(heads) == 1


@pytest.fixture(scope="module")
def plain(server: HostServer, world: Path, recipe: dict) -> Path:
    """The output of plain fine-tuning with the plugin; the host's own template lets it also run without the plugin."""
    keys = {key: value for key, value in recipe.items() if not key.startswith("hera_")}
    keys |= {"stage": "sft", "template": "llava", "max_steps": 3, "output_dir": "saves/plain"}
    write_recipe(world / "sft.yaml", keys | {"output_dir": "saves/sft_without"})
    run = server.run(keys, world)
    assert run.ok, run.output
    return run.folder


def test_hera_changes_the_weights_and_a_weight_of_0_does_not(train, plain):
    runs = (train({"template": "llava", "max_steps": 3, "hera_weight": weight}) for weight in (0.0, 0.1))
    trained, idle, aligned = (load_file(f / "model.safetensors") for f in (plain, *(run.folder for run in runs)))
    # The appended rows may change the rounding of a matrix product.
    assert all(torch.allclose(idle[name], trained[name], atol=1e-5) for name in trained)
    assert not all(torch.allclose(aligned[name], trained[name], atol=1e-5) for name in trained)


def test_hera_aligns_its_heads_and_plain_training_does_not(train, here, recipe):
    long = {"num_train_epochs": 6.0, "max_steps": -1, "hera_weight": 1.0, "hera_memory": 64, "hera_heads": "auto"}
    sft = dict.fromkeys(key for key in recipe if key.startswith("hera_")) | {"stage": "sft"}
    plain, aligned = train(long, sft), train(long, {"hera_select_samples": 96})
    file = write_recipe(here / "scored.yaml", recipe | {"hera_select_samples": 96, "hera_select_mode": "mllm"})
    heads = Targets.load(aligned.folder / "hera/heads.json").items
    scores = [Targets.load(score_checkpoint(run.folder, file)).provenance["scores"] for run in (plain, aligned)]
    means = [sum(table[item.layer][item.head] for item in heads) / len(heads) for table in scores]
    assert means[1] > means[0] + 0.04, means  # 0.105 is chance


def test_two_processes_under_torchrun_compute_the_term_of_one(train, world, recipe):
    halves = {"output_dir": "saves/torchrun", "per_device_train_batch_size": 8, "ddp_backend": "gloo", "max_steps": 2}
    file = write_recipe(world / "torchrun.yaml", recipe | halves)
    command = ["llamafactory-cli", "train", str(file)]
    code, output = run_command(command, world, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert code == 0, output
    assert output.count("global batch: 16 (2 processes x 8 x 1 accumulation steps)") == 1
    # The host averages the LM loss per process, so only the term is comparable, and only in the first steps.
    two = Run([code], output, world / "saves/torchrun")
    for one, together in zip(train({"max_steps": 2}).logs(), two.logs(), strict=True):
        for key in ("hera_loss", "hera_mknn", "hera_temperature"):
            assert together[key] == pytest.approx(one[key], rel=1e-5)


def test_without_the_plugin_sft_is_bit_identical_and_hera_models_load(train, plain, world):
    full = train({"save_strategy": "steps", "save_steps": 1, "max_steps": 1}).folder
    base = set(load_file(world / "hera_demo/model/model.safetensors"))
    state = {"heads.json", "run.json", "state.safetensors"}
    for folder, expected in ((full, state | {"card.json"}), (full / "checkpoint-1", state)):
        assert set(load_file(folder / "model.safetensors")) == base
        assert {path.name for path in (folder / "hera").iterdir()} - {".lock"} == expected
    adapter = train(LORA, {"max_steps": 1}).folder
    settings = {
        "model_name_or_path": "hera_demo/model",
        "adapter_name_or_path": str(adapter),
        "template": "qwen3_nothink",  # one of the host's templates
        "finetuning_type": "lora",
        "trust_remote_code": False,
    }
    code = f"""
import sys
from llamafactory.chat import ChatModel
from llamafactory.train.tuner import export_model, run_exp
from transformers import AutoModelForImageTextToText, AutoProcessor

run_exp()
AutoModelForImageTextToText.from_pretrained({str(full)!r})
AutoProcessor.from_pretrained({str(full)!r})
export_model({settings | {"export_dir": "saves/exported", "export_device": "cpu"}!r})
model = ChatModel({settings | {"infer_dtype": "float32"}!r})
print("ANSWER", model.chat([{{"role": "user", "content": "how many circles?"}}], max_new_tokens=4)[0])
assert "llamafactory_hera" not in sys.modules
"""
    status, output = run_command(["python", "-c", code, "sft.yaml"], world, HERA_DISABLE="1")
    assert status == 0, output
    assert "ANSWER" in output
    one, two = ((folder / "model.safetensors").read_bytes() for folder in (plain, world / "saves/sft_without"))
    assert one == two
    assert set(load_file(world / "saves/exported/model.safetensors")) == base


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_card_and_json_describe_the_run_and_how_to_load_it(train, recipe, tuning, here):
    keys = tuning | {"hera_heads": "auto", "hera_select_samples": 40, "max_steps": 2}
    run = train(keys)
    content = json.loads((run.folder / "hera/card.json").read_text())
    selected = json.loads((run.folder / "hera/heads.json").read_text())
    assert content["heads"] == selected["heads"]
    assert content["k"] == 7  # of 15 candidates, although hera_k is 10
    assert list(content["scores"]["mknn"]) == [*selected["heads"], "mean", "others"]
    assert (content["objective"], content["teacher"], content["steps"]) == ("contrastive", recipe["hera_teacher"], 2)
    page = (run.folder / "README.md").read_text()
    metadata = ModelCard(page).data
    tuned = tuning.get("finetuning_type", "full")
    assert {"llama-factory", tuned, "hera"} <= set(metadata.tags)
    assert "llamafactory" not in metadata.tags
    assert page.count("## Alignment with a vision encoder") == 1
    assert "## Training procedure" in page  # the host's text stays
    for part in (*content["heads"], content["teacher"], "arXiv:2606.23885", f"{run.logs()[-1]['hera_mknn']:.4g}"):
        assert part in page
    assert metadata.pipeline_tag == "image-text-to-text"
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, names := {})
    assert isinstance(names["model"], PeftModel) == bool(tuning)


def test_the_card_of_a_layer_run_names_layers_and_objective(train):
    keys = {"hera_objective": "cka", "hera_granularity": "layer", "hera_layers": "penultimate", "hera_heads": None}
    run = train(keys, {"max_steps": 1})
    content = json.loads((run.folder / "hera/card.json").read_text())
    assert (content["layers"], content["objective"]) == (["L3"], "cka")
    assert "scores" not in content
    assert "HeRA aligned layers L3" in (run.folder / "README.md").read_text()


def test_a_run_reads_a_stream(train):
    args = {"max_steps": 3, "per_device_train_batch_size": 4}
    args |= {"dataloader_num_workers": 1, "streaming": True, "buffer_size": 32}
    # With dispatch_batches, the first process reads all batches, and they must have equal lengths, in any stage.
    run = train(args, {"accelerator_config": {"dispatch_batches": False}}, ranks=2)
    assert len(run.logs()) == 3
    assert all(math.isfinite(line["loss"]) and line["hera_loss"] > 0 for line in run.logs())
