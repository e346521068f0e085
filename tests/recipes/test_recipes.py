"""The shipped recipes: generated, parsed by the host, and right for their backbone."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS
from llamafactory_hera.config import HeraConfig

from ..backbones.full_size import SIZES, ablations, memory, recipes
from .conftest import ROOT

KINDS = ("pretrain", "hera", "hera_lora", "sft")


@pytest.fixture(scope="module")
def parsed(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    files = {str(folder / f"{name}.yaml"): name for name in values}
    run = subprocess.run(
        [sys.executable, "-m", "tests.recipes.parse_all", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {files[file]: facts for file, facts in json.loads(run.stdout).items()}


def test_every_backbone_has_its_recipes_as_the_generator_writes_them(
    folder: Path, values: dict, tmp_path: Path
) -> None:
    expected = {f"{key}_{kind}" for key in LANGUAGE_MODELS for kind in KINDS}
    expected |= {f"{key}_{kind}" for key in NATIVE_MODELS for kind in ("hera", "hera_lora")}
    expected |= {f"ablations/{key}_{row.name}" for key in ablations.MODELS for row in ablations.ROWS}
    rivals = "cmar jarvis jarvis_lora jarvis_pretrain ross ross_lora ross_pretrain viral viral_lora"
    expected |= {f"ablations/{ablations.RIVALRY}_{name}" for name in rivals.split()}
    expected |= {f"qwen3_vl_4b_finevision_{kind}" for kind in ("hera", "sft")}
    assert set(values) == expected | {"qwen2_5_vl_7b_hera_qlora"}
    written = recipes.write_recipes(tmp_path)
    assert {file.relative_to(tmp_path).with_suffix("").as_posix() for file in written} == set(values)
    for file in written:
        committed = (folder / file.relative_to(tmp_path)).read_text(encoding="utf-8")
        assert committed == file.read_text(encoding="utf-8"), f"{file.name} is not what the generator writes"


@pytest.mark.slow
def test_the_host_parses_every_recipe(parsed: dict, values: dict) -> None:
    assert set(parsed) == set(values)
    for name, facts in parsed.items():
        assert facts["template"], f"{name}: {values[name]['template']} is not registered"
        assert (
            facts["use_hera"] == (values[name]["stage"] == "hera") != name.endswith(("_sft", "jarvis", "jarvis_lora"))
        )
        assert facts["stage"] == values[name]["stage"]
        assert facts["bf16"]
        assert facts["warmup"] == 30  # 3 %
        whole = name.endswith(("_hera", "_sft")) or "/" in name
        assert facts["zero3"] == (whole and not name.endswith(("_lora", "_pretrain"))), name
    for key in LANGUAGE_MODELS:
        assert parsed[f"{key}_pretrain"]["learning_rate"] == 1e-3
        assert parsed[f"{key}_hera"]["learning_rate"] == 2e-5
    assert parsed["ablations/qwen3_8b_viral"]["aligned"] == ["viral", "layer", "L17"]
    assert parsed["qwen3_4b_hera"]["aligned"] == ["contrastive", "head", None]


def without_hera(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if not k.startswith("hera_") and k not in names}


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_both_stages_have_the_papers_settings_and_the_baseline_all_but_the_hera_keys(key: str, values: dict) -> None:
    hera, sft, pretrain = (values[f"{key}_{kind}"] for kind in ("hera", "sft", "pretrain"))
    changed = {"stage", "output_dir"}
    assert without_hera(hera, *changed) == {k: v for k, v in sft.items() if k not in changed}
    assert (hera["stage"], sft["stage"]) == ("hera", "sft")
    assert hera["output_dir"] != sft["output_dir"]
    for keys in (pretrain, hera, values[f"{key}_hera_lora"]):
        assert keys["hera_heads"] == LANGUAGE_MODELS[key].heads
        assert (keys["hera_k"], keys["hera_weight"], keys["hera_temperature"]) == (10, 0.01, 0.07)
        assert keys["hera_teacher"] == "facebook/dinov2-large"
    assert hera["model_name_or_path"] == pretrain["output_dir"]
    assert pretrain["template"] == "llava_plain"


def test_native_models_select_their_heads_by_what_they_see(values: dict) -> None:
    for key in NATIVE_MODELS:
        for kind in ("hera", "hera_lora"):
            keys = values[f"{key}_{kind}"]
            assert (keys["hera_heads"], keys["hera_select_mode"]) == ("auto", "mllm")
            assert keys["model_name_or_path"] == NATIVE_MODELS[key].checkpoint


def test_the_keys_are_declared_and_sequences_have_room_for_the_image(values: dict) -> None:
    for name, keys in values.items():
        assert {key for key in keys if key.startswith("hera_")} <= set(HeraConfig.knobs()), name
        key = next(key for key in SIZES if name.removeprefix("ablations/").startswith(f"{key}_"))
        assert keys["cutoff_len"] >= SIZES[key].image_tokens + 1024, name


@pytest.mark.parametrize("recipe", list(recipes.all_recipes()), ids=lambda recipe: recipe.name)
def test_every_row_makes_the_global_batch_and_the_header_shows_it(recipe: Any, folder: Path) -> None:
    text = (folder / f"{recipe.name}.yaml").read_text(encoding="utf-8")
    header = [line.split() for line in text.splitlines() if line.startswith("# ") and line.split()[1:2] != []]
    for plan in recipe.plans:
        assert plan.gpus * plan.per_device * plan.accumulation == recipe.work.global_batch
        candidates = plan.gpus * plan.per_device + plan.hera_memory
        assert candidates == max(recipe.work.global_batch, 128)
        row = [str(plan.gpus), str(plan.per_device), str(plan.accumulation)]
        assert any(words[1:4] == row for words in header), row
    gpus = 1 if "quantization_bit" in recipe.keys else recipes.DEFAULT_GPUS
    chosen = next(plan for plan in recipe.plans if plan.gpus == gpus)
    assert chosen.fits
    assert recipe.keys["per_device_train_batch_size"] == chosen.per_device
    assert recipe.keys["gradient_accumulation_steps"] == chosen.accumulation
    assert recipe.keys.get("hera_memory", chosen.hera_memory) == chosen.hera_memory
    assert [plan.gpus for plan in recipe.plans] in ([1], list(recipes.GPUS))


def test_memory_grows_with_the_batch_and_shrinks_with_gpus_under_zero3() -> None:
    work = next(recipe.work for recipe in recipes.all_recipes() if recipe.name == "qwen3_8b_hera")
    assert work.memory(8, 8) > work.memory(8, 4) > work.memory(32, 4)
    # 16 bytes for each of 8.2e9 parameters alone are more than a card
    assert not memory.spread(work, 1).fits
    assert work.memory(1, 1) > 16 * 8.19e9 / 2**30


def test_the_index_links_every_recipe_and_nothing_else(folder: Path) -> None:
    page = (folder / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert all((folder / link).exists() for link in links)
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml") if file.parent.name != "real"}
    assert {link for link in links if link.endswith(".yaml")} == files
    assert f"{ablations.MARKS[0]}\n{ablations.index()}\n{ablations.MARKS[1]}" in page


def test_the_reference_of_keys_is_what_the_generator_writes() -> None:
    from generate import reference

    assert (ROOT / "docs/keys.md").read_text(encoding="utf-8") == reference.page()


#: Of the paper's table 1: objective, granularity, heads or layers, strategy of stage 1, m.
ROWS_OF_THE_PAPER = {
    "feature_layer_middle": ("feature", "layer", "middle", None, None),
    "feature_head_worst5": ("feature", "head", 5, None, None),
    "contrastive_layer_middle": ("contrastive", "layer", "middle", None, None),
    "contrastive_layer_worst5": ("contrastive", "layer", "auto", "worst", 5),
    "head_random5": ("contrastive", "head", "auto", "random", 5),
    "head_top5": ("contrastive", "head", "auto", "top", 5),
    "head_worst1": ("contrastive", "head", 1, None, None),
    "head_worst3": ("contrastive", "head", 3, None, None),
    "head_worst10": ("contrastive", "head", "auto", "worst", 10),
}


@pytest.mark.parametrize("key", ablations.MODELS)
def test_every_row_of_the_ablation_is_a_recipe_and_a_command_for_its_stage_one(
    key: str, values: dict, folder: Path
) -> None:
    assert {row.name for row in ablations.ROWS} == set(ROWS_OF_THE_PAPER)
    twin = values[f"{key}_hera"]
    for name, (objective, granularity, targets, strategy, m) in ROWS_OF_THE_PAPER.items():
        keys = values[f"ablations/{key}_{name}"]
        stage_one = command_of(folder / f"ablations/{key}_{name}.yaml", values)
        if isinstance(targets, int):
            targets = ",".join(LANGUAGE_MODELS[key].heads.split(",")[:targets])
        found = (
            stage_one.get("hera_objective", "contrastive"),
            stage_one.get("hera_granularity", "head"),
            stage_one.get("hera_layers", stage_one.get("hera_heads")),
            stage_one.get("hera_select"),
            stage_one.get("hera_select_m"),
        )
        assert stage_one.get("hera_select_dataset") == ("grand_captions" if targets == "auto" else None)
        assert found == (objective, granularity, targets, strategy, m)
        HeraConfig.from_keys({k: v for k, v in stage_one.items() if k.startswith("hera_")})
        assert keys["hera_weight"] == stage_one["hera_weight"] == 0.01
        # stage 2 goes on with the same, and names what stage 1 selected
        aligned = f"hera_{granularity}s"
        expected = f"{stage_one['output_dir']}/hera/{granularity}s.json" if targets == "auto" else targets
        assert (keys[aligned], keys.get("hera_select_m", 5)) == (expected, m or 5)
        assert keys.get("hera_objective", "contrastive") == objective
        assert stage_one["output_dir"] == keys["model_name_or_path"]
        # nothing else differs from the HeRA recipe but the folders
        folders = ("model_name_or_path", "output_dir")
        assert without_hera(keys, *folders) == without_hera(twin, *folders)


def command_of(file: Path, values: dict) -> dict[str, Any]:
    """The keys of the command for stage 1 that a recipe's header gives."""
    text = " ".join(line.lstrip("# ") for line in file.read_text().splitlines())
    command = re.search(r"`llamafactory-cli train recipes/(\w+)\.yaml ([^`]+)`", text)
    return values[command[1]] | {k: yaml.safe_load(v) for k, v in (part.split("=", 1) for part in command[2].split())}


#: Of the paper's table 4: objective, layer and weight, stage 1's rates (the model's, the objective's own).
RIVALS = {
    "viral": ("viral", "L17", 0.5, (1e-3, None)),
    "cmar": ("cka", "penultimate", 0.1, (1e-3, None)),
    "ross": ("ross", "final", 1.0, (1e-3, 1e-4)),
    "jarvis": ("jarvis", "L8", 1.0, (1e-3, None)),
}


@pytest.mark.parametrize("name", RIVALS)
def test_the_rivals_are_trained_as_their_sources_train_them(name: str, values: dict, folder: Path) -> None:
    objective, layer, weight, rates = RIVALS[name]
    second = values[f"ablations/qwen3_8b_{name}"]
    first = values.get(f"ablations/qwen3_8b_{name}_pretrain")
    first = first or command_of(folder / f"ablations/qwen3_8b_{name}.yaml", values)
    assert first["output_dir"] == second["model_name_or_path"]
    assert (first["freeze_language_model"], second["freeze_language_model"]) == (True, False)
    aligned = [keys for keys in (first, second) if keys["stage"] == "hera"]
    assert [keys is first for keys in aligned] == {"viral": [False], "jarvis": [True]}.get(name, [True, False])
    for keys in aligned:
        HeraConfig.from_keys({k: v for k, v in keys.items() if k.startswith("hera_")})
        found = (keys["hera_objective"], keys["hera_granularity"], keys["hera_layers"], keys["hera_weight"])
        assert found == (objective, "layer", layer, weight)
    assert (float(first["learning_rate"]), first.get("hera_objective_lr")) == rates
    assert float(second["learning_rate"]) == 2e-5
    if name != "cmar":
        lora = values[f"ablations/qwen3_8b_{name}_lora"]
        assert (lora["lora_rank"], lora["lora_alpha"], float(lora["learning_rate"])) == (128, 256, 2e-4)
        assert lora["additional_target"] == "multi_modal_projector"
        own = {k: v for k, v in lora.items() if k.startswith("hera_")}
        assert own == {k: v for k, v in second.items() if k.startswith("hera_")}
