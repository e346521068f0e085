"""The command `recipes`: lists what is shipped, and copies it so that it runs from another folder."""

import argparse
import json
from pathlib import Path

import pytest
import yaml

from llamafactory_hera.backbones.cli import register
from llamafactory_hera.backbones.shipped import copy_recipes, recipes_folder, shipped_recipes


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    parsed = parser.parse_args(["recipes", *arguments])
    return parsed.run(parsed)


def test_the_list_names_every_recipe_with_what_it_does(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert recipes_folder() == folder
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    files = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]
    assert sorted(line.split()[0] for line in lines) == sorted(files)
    assert all(len(line.split()) > 4 for line in lines)
    run("qwen3_8b", "gemma")
    assert len(capsys.readouterr().out.splitlines()) == 6
    with pytest.raises(ValueError, match="no recipe's name contains llama9"):
        run("llama9")


def test_a_copy_runs_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--copy-to", "mine") == 0
    keys = yaml.safe_load(Path("mine/qwen3_8b_hera.yaml").read_text())
    assert Path(keys["deepspeed"]).is_file()
    assert keys["dataset"] in json.loads(Path(keys["dataset_dir"], "dataset_info.json").read_text())
    assert "recipes/" not in Path("mine/qwen3_8b_hera.yaml").read_text()
    copied = {file.relative_to("mine").with_suffix("").as_posix() for file in Path("mine").rglob("*.yaml")}
    assert copied == set(shipped_recipes())
    with pytest.raises(ValueError, match="--copy-to: mine is not empty"):
        copy_recipes("mine")


def test_data_that_a_user_has_fetched_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory_hera.backbones import shipped

    source = tmp_path / "source"
    copy_recipes(source)
    (source / "data/llava_pretrain/images").mkdir(parents=True)
    (source / "data/llava_pretrain/images/1.jpg").write_bytes(b"picture")
    monkeypatch.setattr(shipped, "recipes_folder", lambda: source)
    copy_recipes(tmp_path / "copy")
    assert not (tmp_path / "copy/data/llava_pretrain").exists()
