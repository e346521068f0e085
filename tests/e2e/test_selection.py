"""Head selection with the real host: selecting heads for a recipe, training them, and scoring the result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamafactory_hera.heads import Targets
from llamafactory_hera.integrations.llamafactory.commands import fill_teacher, score_checkpoint, select

from .conftest import LORA
from .runner import write_recipe

pytestmark = pytest.mark.slow

AUTO = {"hera_heads": "auto", "hera_select_samples": 64, "hera_select_k": 8}


@pytest.fixture
def path(here: Path, recipe: dict[str, Any], request: pytest.FixtureRequest) -> Path:
    """Writes a recipe that selects its heads (``auto``), and returns its path."""
    name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
    return write_recipe(here / f"{name}.yaml", recipe | AUTO | {"output_dir": f"saves/{name}"})


def test_the_command_writes_heads_recipe_and_picture_and_the_recipe_trains(train, here, path, command):
    keys = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "hera_heads"}
    write_recipe(path, keys)
    code, output = command("select", path, "--in-place", "hera_select_mode=mllm", "hera_select_m=3")
    assert code == 0, output
    assert "40 heads on 64 samples" in output
    folder = here / keys["output_dir"] / "hera"
    heads = Targets.load(folder / "heads.json")
    assert len(heads.items) == 3
    assert f"selected (worst): {heads}" in output
    assert heads.provenance["keys"]["hera_select_mode"] == "mllm"
    assert (folder / "heads.png").is_file()
    assert yaml.safe_load(path.read_text()) == keys | {"hera_heads": str(heads)}

    run = train(dict.fromkeys(keys), yaml.safe_load((folder / "run.yaml").read_text()))
    assert f"HeRA | heads: {heads}" in run.output
    assert Targets.load(run.folder / "hera/heads.json") == heads  # with their scores
    other = train({"hera_heads": str(folder / "heads.json"), "model_name_or_path": str(run.folder)}, ok=False)
    assert "model was hera_demo/model (fingerprint" in other.error
    with pytest.raises(ValueError, match=r"^output_dir: .* contains a run that trained .*, or replace .* --force"):
        select(path, ["hera_select=top"])
    with pytest.raises(ValueError, match=r"^--output: .* contains a run that trained .*; give another"):
        score_checkpoint(None, path, folder / "heads.json")
    with pytest.raises(ValueError, match=r"yaml exists and is not a file that this command writes"):
        score_checkpoint(None, path, path)
    assert select(path, ["hera_select=top"], force=True) == Targets.load(folder / "heads.json") != heads


def test_a_llava_has_the_selection_of_its_language_model(here, path):
    llava = select(path)
    llm = select(path, ["output_dir=saves/llm", "model_name_or_path=hera_demo/language_model"])
    assert llava.items == llm.items
    assert llava.provenance["scores"] == llm.provenance["scores"]
    mllm = select(path, ["output_dir=saves/mllm", "hera_select_mode=mllm"])
    assert mllm.provenance["scores"] != llava.provenance["scores"]
    assert mllm.provenance["samples_digest"] == llava.provenance["samples_digest"] == llm.provenance["samples_digest"]


def test_auto_trains_like_heads_given_by_name_and_is_kept_on_resume(train, here):
    args = AUTO | LORA | {"save_steps": 1, "save_strategy": "steps", "max_steps": 2}
    run = train(args)
    heads = Targets.load(run.folder / "hera/heads.json")
    assert f"selected (worst): {heads}" in run.output
    assert (run.folder / "hera/heads.png").stat().st_size > 10_000
    written = train(args, {"hera_heads": str(heads)})
    assert [line["loss"] for line in written.logs()] == [line["loss"] for line in run.logs()]

    again = {"output_dir": str(run.folder), "resume_from_checkpoint": str(run.folder / "checkpoint-1")}
    resumed = train(args, again)
    assert "selected with the same settings" in resumed.output
    assert resumed.logs()[-1]["loss"] == run.logs()[-1]["loss"]
    assert "hera_select_seed was 0, is 9" in train(args, again, {"hera_select_seed": 9}, ok=False).error


def test_heads_can_be_selected_on_another_dataset(train, here, path):
    data = here / "two_datasets"
    shutil.copytree(here / "hera_demo/data", data)
    (data / "other").mkdir()
    shutil.copytree(data / "images", data / "other/images")
    info = json.loads((data / "dataset_info.json").read_text())
    rows = json.loads((data / info["hera_demo_captions"]["file_name"]).read_text())
    for row in rows:
        row["images"] = [image.removeprefix("images/") for image in row["images"]]
    (data / "other/rows.json").write_text(json.dumps(rows))
    info["other"] = info["hera_demo_captions"] | {"file_name": "other/rows.json"}
    (data / "dataset_info.json").write_text(json.dumps(info))

    run = train(AUTO, {"dataset_dir": str(data), "max_steps": 1, "hera_select_dataset": "other"})
    of_other = Targets.load(run.folder / "hera/heads.json").provenance
    overrides = [f"dataset_dir={data}", "dataset=other", f"media_dir={data}/other/images"]
    separate = select(path, overrides).provenance
    for entry in ("scores", "samples_digest", "dataset"):
        assert of_other[entry] == separate[entry]
    assert of_other["dataset"] == "other"
    # Training reads the cache, so it is filled from the training data.
    assert fill_teacher(path, ["hera_select_dataset=other", "hera_teacher_cache=filled_for_training"]) == 96


def test_checkpoints_and_adapters_are_scored(train, here, path, command):
    moved = {"learning_rate": 5e-3, "max_steps": 3, "hera_heads": "L1H0"}
    full, lora = train(moved), train(moved, LORA)
    before = score_checkpoint(None, path, "saves/before.json")
    scoring = ["score", full.folder, lora.folder, "--recipe", path]
    code, output = command(*scoring)
    assert code == 0, output
    assert output.count("aligned heads: L1H0 ") == 2
    assert "selected" not in output
    files = [before, *(run.folder / "hera/scores.json" for run in (full, lora))]
    scores = [json.loads(file.read_text())["provenance"] for file in files]
    assert len({json.dumps(each["scores"]) for each in scores}) == 3
    assert len({each["model_fingerprint"] for each in scores}) == 3
    assert scores[2]["adapters"] == [str(lora.folder)]
    code, output = command(*scoring, "--output", "saves/both.json")
    assert (code, "--output: one file" in output) == (2, True)
    code, output = command("report", *files)
    assert code == 0, output
    assert (here / "hera_report.html").is_file()


def test_teacher_only_fills_the_cache_of_training(train, here, path, command):
    code, output = command("select", path, "--teacher-only", "hera_teacher_cache=filled")
    assert code == 0, output
    assert "filled: features of 96 images" in output
    files = sorted((here / "filled").rglob("*.safetensors"))
    train({"hera_teacher_cache": "filled", "max_steps": 2})
    assert sorted((here / "filled").rglob("*.safetensors")) == files  # nothing was left to compute


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output_dir=@x"], "is not a YAML recipe"),
        (["output_dir=1e3"], "A value of the recipe has the wrong type"),
        (["dataset=null"], "dataset: the value is empty"),
        (["output_dir="], "output_dir: the value is empty"),
        (["hera_granularity=layer", "hera_layers=auto", "hera_heads=null"], "hera_granularity: "),
    ],
)
def test_bad_settings_are_refused(path, overrides, message):
    with pytest.raises((ValueError, OSError)) as error:
        select(path, overrides)
    assert message in str(error.value)
