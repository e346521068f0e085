"""The command `recipes`: lists the shipped recipes, and copies them so that they run in another folder."""

import json
from pathlib import Path

import pytest
import yaml

from llamafactory_hera.backbones import shipped
from llamafactory_hera.backbones.shipped import copy_recipes, recipes_folder, shipped_recipes
from llamafactory_hera.cli import main


def run(*arguments: str) -> int:
    return main(["recipes", *arguments])


def test_the_list_contains_each_recipe_with_its_title(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert recipes_folder() == folder
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    found = (file for file in folder.rglob("*.yaml") if file.parent.name != "real")  # not in the wheel
    files = [file.relative_to(folder).with_suffix("").as_posix() for file in found]
    assert sorted(line.split()[0] for line in lines) == sorted(files)
    assert all(len(line.split()) > 4 for line in lines)
    run("qwen3_8b", "gemma")
    assert len(capsys.readouterr().out.splitlines()) == 15
    assert run("llama9") == 2
    assert "no name contains llama9" in capsys.readouterr().err


def test_a_copy_runs_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--copy-to", str(tmp_path / "mine")) == 0
    monkeypatch.chdir(tmp_path / "mine")
    keys = yaml.safe_load(Path("recipes/qwen3_8b_hera.yaml").read_text())
    assert Path(keys["deepspeed"]).is_file()
    assert keys["dataset"] in json.loads(Path(keys["dataset_dir"], "dataset_info.json").read_text())
    assert Path("recipes/data/prepare.py").is_file()
    copied = {file.relative_to("recipes").with_suffix("").as_posix() for file in Path("recipes").rglob("*.yaml")}
    assert copied == set(shipped_recipes())


def test_a_copy_does_not_contain_downloaded_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = copy_recipes(tmp_path / "source")
    (source / "data/llava_pretrain").mkdir()
    monkeypatch.setattr(shipped, "recipes_folder", lambda: source)
    assert not (copy_recipes(tmp_path / "copy") / "data/llava_pretrain").exists()


def test_recipes_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    with pytest.raises(ValueError, match=r"^--copy-to: .*recipes exists; give another folder"):
        copy_recipes(tmp_path)
