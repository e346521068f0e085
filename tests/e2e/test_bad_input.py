"""Each bad input stops the run with an error that names key, value and remedy, before any weight is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from .runner import HostServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weightless(world: Path) -> Path:
    """The demo model without its weights: whoever gets as far as loading them fails in another way."""
    folder = world / "weightless"
    shutil.copytree(world / "hera_demo/model", folder)
    (folder / "model.safetensors").unlink()
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    tf.ViTModel(tf.ViTConfig(**size)).save_pretrained(world / "vit")
    tf.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(world / "vit")
    return folder


LAYER = {"hera_heads": None, "hera_granularity": "layer"}
JARVIS = {**LAYER, "hera_layers": "L0", "hera_objective": "jarvis", "hera_weight": 1.0}

# change of the recipe -> what the message must hold
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no heads": ({"hera_heads": None}, ["hera_heads", "L13H12"]),
    "syntax": ({"hera_heads": "3.4"}, ["hera_heads", "'3.4'", "L13H12,L7H6"]),
    "outside": ({"hera_heads": "L0H1,L9H8"}, ["hera_heads", "L9H8", "L0 to L4", "H0 to H7"]),
    "twice": ({"hera_heads": "L1H2,L1H2"}, ["hera_heads", "L1H2", "more than once"]),
    "heads file": ({"hera_heads": "nowhere/heads.json"}, ["hera_heads", "nowhere/heads.json", "cannot be read"]),
    "k": ({"hera_k": 0}, ["hera_k", "0", "1 or more"]),
    "temperature": ({"hera_temperature": 0.0}, ["hera_temperature", "0.0", "more than 0"]),
    "weight": ({"hera_weight": -0.1}, ["hera_weight", "-0.1", "0 or more"]),
    "memory": ({"hera_memory": -1}, ["hera_memory", "-1", "0 or more"]),
    "pooling": ({"hera_pooling": "max"}, ["hera_pooling", "'max'", "answer, text, mean, last"]),
    "similarity": ({"hera_similarity": "l2"}, ["hera_similarity", "'l2'", "cosine, dot"]),
    "teacher missing": ({"hera_teacher": "./no_teacher"}, ["hera_teacher", "./no_teacher"]),
    "teacher not vision": (
        {"hera_teacher": "hera_demo/language_model"},
        ["hera_teacher", "not a vision model", "qwen3"],
    ),
    "text-only data": ({"dataset": "hera_demo_text"}, ["dataset", "hera_demo_text", "no image"]),
    "text-only model": ({"model_name_or_path": "hera_demo/language_model"}, ["model_name_or_path", "text-only"]),
    "cutoff": ({"cutoff_len": 12}, ["cutoff_len", "12", "image tokens"]),
    "packing": ({"packing": True}, ["packing", "False".lower()]),
    "neat_packing": ({"neat_packing": True}, ["neat_packing", "several samples"]),
    "one image": ({"max_samples": 1}, ["dataset", "one sample with an image"]),
    "k in words": ({"hera_k": "ten"}, ["hera_k", "'ten'", "a whole number"]),
    "half a k": ({"hera_k": 2.5}, ["hera_k", "2.5", "a whole number"]),
    "weight in words": ({"hera_weight": "much"}, ["hera_weight", "'much'", "a number"]),
    "not a truth value": ({"hera_fixed_temperature": "perhaps"}, ["hera_fixed_temperature", "true or false"]),
    "weight without end": ({"hera_weight": "inf"}, ["hera_weight", "inf", "0 or more"]),
    "unsloth checkpointing": ({"use_unsloth_gc": True}, ["use_unsloth_gc", "remove"]),
    "unknown objective": ({"hera_objective": "cosine"}, ["hera_objective", "'cosine'", "contrastive", "viral"]),
    "viral heads": ({"hera_objective": "viral"}, ["hera_granularity", "head", "viral", "layer"]),
    "layer outside": ({**LAYER, "hera_layers": "L9"}, ["hera_layers", "L9", "L0 to L4"]),
    "heads and layers": ({"hera_layers": "L1"}, ["hera_layers", "hera_granularity: layer"]),
    "cka of two": (
        {"hera_objective": "cka", "per_device_train_batch_size": 2},
        ["per_device_train_batch_size", "hera_objective: cka", "3 samples"],
    ),
    "ross and a cache": (
        {**LAYER, "hera_layers": "final", "hera_objective": "ross", "hera_teacher_cache": "cache"},
        ["hera_teacher_cache", "ross", "remove it"],
    ),
    "ross without an autoencoder": (
        {**LAYER, "hera_layers": "final", "hera_objective": "ross", "hera_teacher_cache": None},
        ["hera_teacher", "is not an AutoencoderKL"],
    ),
    "jarvis and gradcache": ({**JARVIS, "hera_accumulate": "gradcache"}, ["hera_accumulate: gradcache", "jarvis"]),
    "jarvis and fa2": ({**JARVIS, "flash_attn": "fa2"}, ["flash_attn: fa2", "jarvis", "flash_attn: sdpa"]),
    "a teacher of another grid": ({**JARVIS, "hera_teacher": "vit"}, ["hera_teacher: vit", "3 x 3", "tokens"]),
    "no benchmark": ({"hera_eval": "paper"}, ["hera_eval: no task of the suite paper is ready", "--data"]),
    "no earlier run": (
        {"hera_objective_from": "saves/nope"},
        ["hera_objective_from: saves/nope", "output_dir of a run"],
    ),
    "no such checkpoint": (
        {"resume_from_checkpoint": "saves/nope/checkpoint-2"},
        ["resume_from_checkpoint", "saves/nope/checkpoint-2 is not a folder"],
    ),
    "no checkpoint": ({"resume_from_checkpoint": True}, ["resume_from_checkpoint: true", "output_dir: saves/bad"]),
    "output is the teacher": ({"output_dir": "hera_demo/teacher"}, ["output_dir: hera_demo/teacher is hera_teacher"]),
    "output around the data": ({"output_dir": "hera_demo"}, ["output_dir: hera_demo is around", "folder of its own"]),
    "output in the cache": (
        {"output_dir": "cache/run", "hera_teacher_cache": "cache"},
        ["cache/run lies in hera_teacher_cache: cache"],
    ),
    "output is the data": ({"output_dir": "hera_demo/data"}, ["hera_demo/data is dataset_dir: hera_demo/data"]),
    "one sample": ({"per_device_train_batch_size": 1}, ["per_device_train_batch_size", "hera_memory"]),
    "two images": ({"max_samples": 2}, ["dataset", "2 samples with an image", "compares 3 or more", "max_samples"]),
    "a stream without workers": (
        {"streaming": True, "dataloader_num_workers": 0},
        ["dataloader_num_workers: 0", "set it to 1 or more"],
    ),
    "neighbors in a given order": (
        {"hera_batches": "neighbors", "hera_teacher_cache": "cache", "disable_shuffling": True},
        ["disable_shuffling: True", "hera_batches: neighbors", "set disable_shuffling: false"],
    ),
    "two samples": ({"per_device_train_batch_size": 2}, ["per_device_train_batch_size: 2", "needs 3 samples"]),
}


@pytest.mark.parametrize("name", CASES)
def test_message(server: HostServer, world: Path, weightless: Path, recipe: dict, name: str) -> None:
    change, expected = CASES[name]
    args = {**recipe, "model_name_or_path": str(weightless), "output_dir": "saves/bad", **change}
    run = server.run({key: value for key, value in args.items() if value is not None}, world)
    assert not run.ok
    error = run.output[run.output.rindex("ValueError: ") :]
    assert all(part in error for part in expected), error


def test_several_images_where_a_method_takes_one(
    server: HostServer, world: Path, weightless: Path, recipe: dict
) -> None:
    data = world / "data_two_images"
    shutil.copytree(world / "hera_demo/data", data)
    file = data / json.loads((data / "dataset_info.json").read_text())["hera_demo"]["file_name"]
    samples = json.loads(file.read_text())
    samples[7]["images"] *= 2
    samples[7]["messages"][0]["content"] = "<image>" + samples[7]["messages"][0]["content"]
    file.write_text(json.dumps(samples))
    args = {**recipe, **JARVIS, "model_name_or_path": str(weightless), "dataset_dir": str(data)}
    args = {key: value for key, value in args.items() if value is not None} | {"output_dir": "saves/bad"}
    run = server.run(args, world)
    assert not run.ok
    assert "dataset: a sample has 2 images" in run.output[run.output.rindex("ValueError: ") :]


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_broken_image_names_the_sample(
    server: HostServer, world: Path, weightless: Path, recipe: dict, damage: str
) -> None:
    data = world / f"data_{damage}"
    shutil.copytree(world / "hera_demo/data", data)
    info = json.loads((data / "dataset_info.json").read_text())
    samples = json.loads((data / info["hera_demo"]["file_name"]).read_text())
    image = data / samples[7]["images"][0]
    image.unlink()
    if damage == "corrupt":
        image.write_bytes(b"not an image")
    args = {"model_name_or_path": str(weightless), "dataset_dir": str(data), "output_dir": "saves/bad"}
    run = server.run(recipe | args, world)
    assert not run.ok
    error = run.output[run.output.rindex("ValueError: ") :]
    first = next(i for i, sample in enumerate(samples) if sample["images"][0] == samples[7]["images"][0])
    assert f"sample {first} of hera_demo" in error
    assert image.name in error


def test_many_heads_warn_and_train(server: HostServer, world: Path, recipe: dict) -> None:
    heads = ",".join(f"L1H{head}" for head in range(6))
    run = server.run(recipe | {"hera_heads": heads, "output_dir": "saves/many", "max_steps": 1}, world)
    assert run.ok, run.output
    assert "hera_heads: 6 heads are more than the 5" in run.output


def test_a_run_that_cannot_change_its_heads_stops(server: HostServer, world: Path, recipe: dict) -> None:
    frozen = {"finetuning_type": "lora", "lora_target": "lm_head", "output_dir": "saves/idle"}
    run = server.run({**recipe, **frozen}, world)
    assert not run.ok
    assert "cannot change L1H0" in run.output
    assert "nothing that feeds them is trained" in run.output
