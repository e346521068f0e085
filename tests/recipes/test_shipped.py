"""The command ``llamafactory-hera recipes``: it lists the recipes, and copies them so that they run elsewhere."""

import json
from pathlib import Path

import pytest
import yaml

from llamafactory_hera.cli import main


def test_the_list_has_every_recipe_with_its_title(values: dict, capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    calibrated = {f"llava_1_5_{size}_calibrate" for size in ("7b", "13b")}
    assert {line.split()[0] for line in lines} == set(values) | calibrated
    assert all(len(line.split()) > 4 for line in lines)
    main(["recipes", "qwen3_8b", "gemma"])
    assert len(capsys.readouterr().out.splitlines()) == 15
    assert main(["recipes", "llama9"]) == 2


def test_a_copy_holds_the_files_that_its_recipes_name(tmp_path: Path) -> None:
    assert main(["recipes", "--copy-to", str(tmp_path / "mine")]) == 0
    (recipe,) = (tmp_path / "mine").rglob("qwen3_8b_hera.yaml")
    keys = yaml.safe_load(recipe.read_text())
    assert (tmp_path / "mine" / keys["deepspeed"]).is_file()
    datasets = json.loads((tmp_path / "mine" / keys["dataset_dir"] / "dataset_info.json").read_text())
    assert keys["dataset"] in datasets
    assert main(["recipes", "--copy-to", str(tmp_path / "mine")]) == 2
