"""Recipes of every model family, with only paths and sizes changed, train tiny models in the real host."""

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llamafactory_hera.backbones.build import build_backbone
from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS
from recipes.generate.sizes import SIZES

from ..backbones.standins import save_native, save_paper_llm
from ..backbones.tiny import save_tower
from .runner import ROOT, HostServer, Run

pytestmark = pytest.mark.slow

N_IMAGES = 14
#: A language model of each family, and the tiny model that replaces it.
LLMS = {"qwen2_5_3b": "qwen2_5", "qwen3_8b": "qwen3_hybrid", "vicuna_7b": "vicuna", "llama3_8b": "llama3"}
#: Every existing VLM, alternately with full fine-tuning and LoRA.
NATIVE = [f"{key}_{('hera', 'hera_lora')[i % 2]}" for i, key in enumerate(NATIVE_MODELS)]
SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "plot_loss": False,
    "overwrite_cache": True,
    "hera_select_samples": N_IMAGES,
    "use_cpu": True,
    "deepspeed": None,
}


#: The settings of LLaMA-Factory's examples/train_lora/qwen2_5vl_lora_sft.yaml and qwen3vl_lora_sft.yaml.
EXAMPLE = {
    **{"image_max_pixels": 262144, "video_max_pixels": 16384, "trust_remote_code": True, "do_train": True},
    **{"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "cutoff_len": 2048, "max_samples": 1000},
    **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "bf16": True},
    **{"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "ddp_timeout": 180000000, "report_to": "none"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run recipes in: captions, instructions, a text-only conversation, a teacher, and a tower."""
    root, draw = tmp_path_factory.mktemp("root"), random.Random(0)
    save_tower("dinov2", root / "teacher")
    save_tower("siglip", root / "tower")
    info, folder = ROOT / "recipes/data/dataset_info.json", root / "recipes/data"
    folder.mkdir(parents=True)
    shutil.copy(info, folder)
    rows: dict[str, list[dict[str, Any]]] = {"llava_pretrain": [], "llava_instruct": []}
    for number in range(N_IMAGES):
        color, side = [draw.randrange(256) for _ in range(3)], draw.randrange(20, 60)
        image = Image.new("RGB", (64, 48), tuple(color))
        image.paste(tuple(255 - c for c in color), (5, 5, side, side // 2 + 10))
        for name in rows:
            (folder / name / "images").mkdir(parents=True, exist_ok=True)
            image.save(folder / name / "images" / f"{number}.png")
        caption = f"A box of {side} pixels on a ground of color {color[0]}."
        exchanges = [("<image>\nWhat is shown in this image?", caption), ("How wide is it?", f"{side} pixels.")]
        for name, turns in (("llava_pretrain", exchanges[:1]), ("llava_instruct", exchanges)):
            messages = [{"from": r, "value": v} for turn in turns for r, v in zip(("human", "gpt"), turn, strict=True)]
            rows[name].append({"id": str(number), "image": f"{number}.png", "conversations": messages})
    text = [{"from": "human", "value": "How many wheels does it have?"}, {"from": "gpt", "value": "Four."}]
    rows["llava_instruct"].insert(1, {"id": "text", "conversations": text})
    files = json.loads(info.read_text())
    (folder / files["llava_pretrain"]["file_name"]).write_text(json.dumps(rows["llava_pretrain"]))
    lines = "".join(json.dumps(row) + "\n" for row in rows["llava_instruct"])
    (folder / files["llava_instruct"]["file_name"]).write_text(lines)
    return root


@pytest.fixture(scope="module")
def stage_one(root: Path, server: HostServer) -> dict[str, Run]:
    """Maps each key to its stage 1 run, which trains a model that `build` made."""
    runs = {}
    for key, family in LLMS.items():
        llm = save_paper_llm(family, SIZES[key], root / f"llm_{key}")
        build_backbone(str(llm), str(root / "tower"), root / f"models/{key}", image_aspect_ratio="pad")
        runs[key] = train(f"{key}_pretrain", root, server)
    return runs


def train(name: str, root: Path, server: HostServer, **paths: str) -> Run:
    keys = yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8"))
    overrides = SHORT | paths | ({"hera_teacher": "teacher", "hera_memory": 0} if keys["stage"] == "hera" else {})
    return server.run(keys | overrides, root)


def save_once(key: str, root: Path) -> None:
    if not (root / f"native_{key}").is_dir():
        save_native(key, root / f"native_{key}")


def check(run: Run, hera: bool = True) -> None:
    assert run.ok, run.output[-4000:]
    logs = run.logs()
    assert len(logs) == 2
    for line in logs:
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert ("hera_loss" in line) == hera
        if hera:
            assert line["hera_loss"] > 0  # with so few candidates, the neighbor may stand out by chance
            assert 0 <= line["hera_mknn"] <= 1


def trained(before: Path, after: Path) -> set[str]:
    """Returns the names of the tensors that a run has changed, or of the tensors in its adapter."""
    if (after / "adapter_model.safetensors").exists():
        return set(load_file(after / "adapter_model.safetensors"))
    # Compares loaded models, because the names in the files depend on the version of transformers.
    old, new = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (before, after))
    # The run saves the vision tower in the dtype of the model.
    return {name for name, tensor in new.items() if not torch.equal(old[name].to(tensor.dtype), tensor)}


def check_trained(names: set[str], projector: str, lora: bool = False) -> None:
    """Checks that the language model and the projector were trained, and the vision encoder was not."""
    parts = (projector, "language_model", "lora_", "vision_tower", "visual.blocks")
    assert {part for part in parts if any(part in name for name in names)} == {*parts[: 2 + lora]}


@pytest.mark.parametrize("key", LLMS)
def test_stage_one_trains_only_the_projector(key, root, stage_one):
    check(stage_one[key])
    projector = {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    moved = trained(root / f"models/{key}", root / f"saves/{key}/pretrain")
    assert {name.removeprefix("model.") for name in moved} == projector
    assert f"HeRA | heads: {LANGUAGE_MODELS[key].heads}" in stage_one[key].output


@pytest.mark.parametrize("key", LLMS)
def test_stage_two_starts_from_stage_one(key, root, stage_one, server):
    assert stage_one[key].ok
    run = train(f"{key}_hera", root, server)
    check(run)
    check_trained(trained(root / f"saves/{key}/pretrain", run.folder), SIZES[key].projector)
    assert AutoProcessor.from_pretrained(run.folder).image_processor.do_pad


def test_the_baseline_and_lora_run_too(root, stage_one, server):
    assert stage_one["qwen3_8b"].ok
    check(train("qwen3_8b_sft", root, server), hera=False)
    lora = train("qwen3_8b_hera_lora", root, server)
    check(lora)
    check_trained(trained(root, lora.folder), SIZES["qwen3_8b"].projector, lora=True)


def test_the_recipes_of_baselines_outside_the_paper_run_too(root, stage_one, server):
    assert stage_one["qwen3_8b"].ok
    start = {"model_name_or_path": "saves/qwen3_8b/pretrain"}
    middle = train("ablations/qwen3_8b_sft_middle_lora", root, server, **start)
    check(middle, hera=False)
    names = trained(root, middle.folder)
    check_trained(names, SIZES["qwen3_8b"].projector, lora=True)
    assert {int(number) for name in names for number in re.findall(r"layers\.(\d+)\.", name)} == {*range(12, 24)}
    assert sum("lora_A" in name for name in names) == 84
    gram = train("ablations/qwen3_8b_gram", root, server, **start)
    assert gram.ok, gram.output[-4000:]
    assert all(line["hera_loss"] > 0 for line in gram.logs())


@pytest.mark.parametrize("name", NATIVE)
def test_existing_vlms_select_their_heads_and_train(name, root, server):
    key = name.split("_hera")[0]
    save_once(key, root)
    run = train(name, root, server, model_name_or_path=f"native_{key}")
    check(run)
    assert len(json.loads((run.folder / "hera/heads.json").read_text())["heads"]) == 5
    check_trained(trained(root / f"native_{key}", run.folder), SIZES[key].projector, lora="lora" in name)


@pytest.mark.parametrize(("key", "template"), [("qwen2_5_vl_7b", "qwen2_vl"), ("qwen3_vl_4b", "qwen3_vl_nothink")])
def test_the_examples_of_llama_factory_need_two_keys(key, template, root, server):
    save_once(key, root)
    data = {"dataset_dir": "recipes/data", "dataset": "llava_instruct", "template": template}
    data |= {"media_dir": "recipes/data/llava_instruct/images", "model_name_or_path": f"native_{key}"}
    short = {"max_steps": 7, "logging_steps": 1, "use_cpu": True, "output_dir": f"saves/example_{key}"}
    run = server.run(EXAMPLE | data | short | {"stage": "hera", "hera_teacher": "teacher"}, root)
    assert run.ok, run.output[-4000:]
    assert "neighbors: 10 of 40 candidates (0 of the batch, 40 remembered)" in run.output
    assert "hera_select_mode: mllm" in run.output
    first, *_, last = run.logs()
    assert "hera_loss" not in first
    assert last["loss"] == pytest.approx(last["lm_loss"] + 0.01 * last["hera_loss"], rel=1e-3)
    weights = load_file(run.folder / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_the_qlora_recipe_trains_only_an_adapter(root, server):
    save_once("qwen2_5_vl_7b", root)
    run = train("qwen2_5_vl_7b_hera_qlora", root, server, model_name_or_path="native_qwen2_5_vl_7b")
    check(run)
    assert all("lora_" in name for name in trained(root, run.folder))
