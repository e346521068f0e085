"""The recipes: as the generator writes them, accepted by LLaMA-Factory, true to the paper, and listed and copied."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from llamafactory_hera.cli import main
from llamafactory_hera.config import HeraConfig
from recipes.generate import ablations, recipes, reference
from recipes.generate.sizes import SIZES
from tests.e2e.runner import ROOT, free_port


def test_recipes_and_keys_are_as_the_generator_writes_them_and_the_index_links_every_recipe(folder, values, tmp_path):
    written = recipes.write_recipes(tmp_path)
    assert {file.relative_to(tmp_path).with_suffix("").as_posix() for file in written} == set(values)
    for file in written:
        committed = (folder / file.relative_to(tmp_path)).read_text(encoding="utf-8")
        assert committed == file.read_text(encoding="utf-8"), f"{file.name} is not what the generator writes"
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{ablations.MARKS[0]}\n{ablations.index()}\n{ablations.MARKS[1]}" in index
    assert (ROOT / "docs/keys.md").read_text(encoding="utf-8") == reference.page()
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml") if file.parent.name != "real"}
    assert {link for link in re.findall(r"\]\(([^)]+)\)", index) if link.endswith(".yaml")} == files


def parse(files: list[str]) -> None:
    """Parses recipes with LLaMA-Factory's parser as one rank of a distributed run, in a separate process."""
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import get_train_args

    parsed = {}
    for file in files:
        # the only change: this machine has no GPU that supports bf16
        keys = yaml.safe_load(Path(file).read_text(encoding="utf-8")) | {"use_cpu": True}
        for key, name in (("hera_heads", "L0H0"), ("hera_layers", "L0")):
            if str(keys.get(key)).endswith(".json"):  # written by stage 1
                keys[key] = f"{key}.json"
                Path(keys[key]).write_text(json.dumps({key.removeprefix("hera_"): [name]}))
        _, data, training, finetuning, _ = get_train_args(keys)
        zero3 = training.deepspeed is not None and training.hf_deepspeed_config.is_zero3()
        ours = finetuning.own_stage is not None
        parsed[file] = [ours, data.template in TEMPLATES, training.get_warmup_steps(1000), zero3]
    Path("parsed.json").write_text(json.dumps(parsed))


@pytest.mark.slow
def test_llamafactory_parses_every_recipe(folder, values, server, tmp_path):
    shutil.copytree(folder, tmp_path / "recipes")  # recipes refer to DeepSpeed files in this folder
    files = {f"recipes/{name}.yaml": keys for name, keys in values.items()}
    files |= {f"recipes/harc/{file.name}": yaml.safe_load(file.read_text()) for file in folder.glob("harc/*.yaml")}
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    code, output = server.command(*files, cwd=tmp_path, call=f"{__name__}:parse", **rank)
    assert code == 0, output
    for file, parsed in json.loads((tmp_path / "parsed.json").read_text()).items():
        keys = files[file]
        warmup = keys.get("warmup_steps", 30)  # 3 % of 1,000 steps
        assert parsed == [keys["stage"] in ("hera", "harc"), True, warmup, "deepspeed" in keys], file


@pytest.mark.parametrize("recipe", list(recipes.all_recipes()), ids=lambda recipe: recipe.name)
def test_every_split_of_the_batch_gives_the_global_batch_and_the_recipe_has_a_split_that_fits(recipe):
    keys = recipe.keys
    for plan in recipe.plans:
        assert plan.gpus * plan.per_device * plan.accumulation == recipe.work.global_batch
        assert plan.gpus * plan.per_device + plan.hera_memory == max(recipe.work.global_batch, 128)
    gpus = 1 if "quantization_bit" in keys else 8
    chosen = next(plan for plan in recipe.plans if plan.gpus == gpus)
    assert chosen.fits
    batch = (keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"])
    assert batch == (chosen.per_device, chosen.accumulation)
    assert keys.get("hera_memory", chosen.hera_memory) == chosen.hera_memory
    key = next(key for key in SIZES if recipe.name.removeprefix("ablations/").startswith(f"{key}_"))
    assert keys["cutoff_len"] >= SIZES[key].image_tokens + 1024


def without_hera(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if not k.startswith("hera_") and k not in names}


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_both_stages_have_the_papers_settings_and_the_baseline_differs_in_the_hera_keys_only(key, values):
    hera, sft, pretrain = (values[f"{key}_{kind}"] for kind in ("hera", "sft", "pretrain"))
    assert without_hera(hera, "stage", "output_dir") == without_hera(sft, "stage", "output_dir")
    assert not [name for name in sft if name.startswith("hera_")]
    for keys in (pretrain, hera, values[f"{key}_hera_lora"]):
        assert keys["hera_heads"] == LANGUAGE_MODELS[key].heads
        assert (keys["hera_k"], keys["hera_weight"], keys["hera_temperature"]) == (10, 0.01, 0.07)
        assert keys["hera_teacher"] == "facebook/dinov2-large"
    assert hera["model_name_or_path"] == pretrain["output_dir"]
    assert (float(pretrain["learning_rate"]), float(hera["learning_rate"])) == (1e-3, 2e-5)


def stage_one(name: str, values: dict, folder: Path) -> dict[str, Any]:
    """Returns the keys of a stage 1, from its recipe or from the command in the header of the stage 2 recipe."""
    if f"{name}_pretrain" in values:
        return values[f"{name}_pretrain"]
    header = " ".join(line.lstrip("# ") for line in (folder / f"{name}.yaml").read_text().splitlines())
    recipe, overrides = re.search(r"`llamafactory-cli train recipes/(\w+)\.yaml ([^`]+)`", header).groups()
    return values[recipe] | {k: yaml.safe_load(v) for k, v in (part.split("=", 1) for part in overrides.split())}


def alignment(keys: dict[str, Any]) -> tuple[Any, ...]:
    config = HeraConfig.from_keys({k: v for k, v in keys.items() if k.startswith("hera_")})
    return config.objective, config.granularity, config.named_targets, config.weight


#: Table 1 of the paper: objective, granularity, heads or layers (n: the first n of the paper's heads), strategy, m.
TABLE_1 = {
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


@pytest.mark.filterwarnings("ignore:hera_select_m. 10 heads", "ignore:hera_memory")
@pytest.mark.parametrize("key", ablations.MODELS)
@pytest.mark.parametrize("row", TABLE_1)
def test_a_row_of_table_1_is_a_recipe_with_a_command_for_its_stage_1(row, key, values, folder, tmp_path, monkeypatch):
    objective, granularity, targets, strategy, m = TABLE_1[row]
    second = dict(values[f"ablations/{key}_{row}"])
    first = stage_one(f"ablations/{key}_{row}", values, folder)
    if isinstance(targets, int):
        targets = ",".join(LANGUAGE_MODELS[key].heads.split(",")[:targets])
    assert alignment(first) == (objective, granularity, targets, 0.01)
    assert (first.get("hera_select"), first.get("hera_select_m")) == (strategy, m)
    assert first["output_dir"] == second["model_name_or_path"]
    if targets == "auto":  # stage 2 continues with the selection of stage 1
        assert first["hera_select_dataset"] == "grand_captions"
        assert second[f"hera_{granularity}s"] == f"{first['output_dir']}/hera/{granularity}s.json"
    else:
        assert alignment(second) == alignment(first)
    folders = ("model_name_or_path", "output_dir")
    assert without_hera(second, *folders) == without_hera(values[f"{key}_hera"], *folders)


#: Table 4 of the paper: objective, granularity, layer and weight, and the stages that use them.
TABLE_4 = {
    "viral": (("viral", "layer", "L17", 0.5), (2,)),
    "cmar": (("cka", "layer", "penultimate", 0.1), (1, 2)),
    "ross": (("ross", "layer", "final", 1.0), (1, 2)),
    "jarvis": (("jarvis", "layer", "L8", 1.0), (1,)),
    # not in the paper
    "gram": (("gram", "layer", "final", 1.0), (2,)),
}


@pytest.mark.parametrize("name", TABLE_4)
def test_a_row_of_table_4_is_trained_as_in_its_source(name, values, folder):
    aligned, used_in = TABLE_4[name]
    second = values[f"ablations/qwen3_8b_{name}"]
    first = stage_one(f"ablations/qwen3_8b_{name}", values, folder)
    assert first["output_dir"] == second["model_name_or_path"]
    assert (first["freeze_language_model"], second["freeze_language_model"]) == (True, False)
    assert tuple(n for n, keys in enumerate((first, second), start=1) if keys["stage"] == "hera") == used_in
    assert all(alignment(keys) == aligned for keys in (first, second) if keys["stage"] == "hera")
    if name not in ("cmar", "gram"):
        lora = values[f"ablations/qwen3_8b_{name}_lora"]
        assert (lora["lora_rank"], lora["lora_alpha"], float(lora["learning_rate"])) == (128, 256, 2e-4)
        hera = [{k: v for k, v in keys.items() if k.startswith("hera_")} for keys in (second, lora)]
        assert hera[0] == hera[1]


def test_the_middle_third_of_the_layers_is_trained_by_lora_alone(values, folder):
    keys, lora = values["ablations/qwen3_8b_sft_middle_lora"], values["qwen3_8b_hera_lora"]
    changed = ("stage", "model_name_or_path", "lora_target", "output_dir")
    assert without_hera(keys, *changed) == without_hera(lora, *changed)
    assert stage_one("ablations/qwen3_8b_sft_middle_lora", values, folder)["output_dir"] == keys["model_name_or_path"]


# -- the command ``llamafactory-hera recipes`` ------------------------------------------------------------------------


def test_the_list_has_every_recipe_with_its_title(values, capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    calibrated = {f"llava_1_5_{size}_calibrate" for size in ("7b", "13b")}
    harc = {f"harc/{name}_harc" for name in ("llama3_1_8b", "qwen2_5_7b")} | {"harc/llama3_1_8b_harc_qlora"}
    assert {line.split()[0] for line in lines} == set(values) | calibrated | harc
    assert all(len(line.split()) > 4 for line in lines)
    main(["recipes", "qwen3_8b", "gemma"])
    assert len(capsys.readouterr().out.splitlines()) == 19
    assert main(["recipes", "llama9"]) == 2


def test_a_copy_contains_the_files_that_its_recipes_name(tmp_path):
    assert main(["recipes", "--copy-to", str(tmp_path / "mine")]) == 0
    (recipe,) = (tmp_path / "mine").rglob("qwen3_8b_hera.yaml")
    keys = yaml.safe_load(recipe.read_text())
    assert (tmp_path / "mine" / keys["deepspeed"]).is_file()
    datasets = json.loads((tmp_path / "mine" / keys["dataset_dir"] / "dataset_info.json").read_text())
    assert keys["dataset"] in datasets
    assert (tmp_path / "mine/recipes/trl/sft_vlm_hera.py").is_file()
    assert main(["recipes", "--copy-to", str(tmp_path / "mine")]) == 2
