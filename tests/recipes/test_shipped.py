"""The command `recipes`: lists what is shipped, and copies it so that it runs from another folder."""

import json
import re
from pathlib import Path

import pytest
import yaml

from llamafactory_hera.backbones import shipped
from llamafactory_hera.backbones.shipped import copy_recipes, recipes_folder, shipped_recipes
from llamafactory_hera.cli import main


def run(*arguments: str) -> int:
    return main(["recipes", *arguments])


def test_the_list_names_every_recipe_with_what_it_does(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert recipes_folder() == folder
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    found = (file for file in folder.rglob("*.yaml") if file.parent.name != "real")  # the repository's alone
    files = [file.relative_to(folder).with_suffix("").as_posix() for file in found]
    assert sorted(line.split()[0] for line in lines) == sorted(files)
    assert all(len(line.split()) > 4 for line in lines)
    run("qwen3_8b", "gemma")
    assert len(capsys.readouterr().out.splitlines()) == 15
    assert run("llama9") == 2
    assert "no recipe's name contains llama9" in capsys.readouterr().err


def test_a_copy_runs_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--copy-to", "mine") == 0
    keys = yaml.safe_load(Path("mine/qwen3_8b_hera.yaml").read_text())
    assert Path(keys["deepspeed"]).is_file()
    assert keys["dataset"] in json.loads(Path(keys["dataset_dir"], "dataset_info.json").read_text())
    for page in ("qwen3_8b_hera.yaml", "README.md", "data/README.md", "data/prepare.py"):
        stayed = re.findall(r"(?<![\w/])recipes/(\w*)", Path("mine", page).read_text())  # the repository's alone
        assert not any(Path("mine", name).exists() for name in stayed)
    assert "python recipes/generate" in Path("mine/README.md").read_text()
    assert "python mine/data/prepare.py instruct mine/data/llava_instruct/" in Path("mine/data/README.md").read_text()
    copied = {file.relative_to("mine").with_suffix("").as_posix() for file in Path("mine").rglob("*.yaml")}
    assert copied == set(shipped_recipes())
    with pytest.raises(ValueError, match=r"--copy-to: /proc/mine cannot be written \(.*\); give another folder"):
        copy_recipes("/proc/mine")
    with pytest.raises(ValueError, match="--copy-to: mine is not empty"):
        copy_recipes("mine")
    with pytest.raises(ValueError, match=r"--copy-to: mine/README.md is a file"):
        copy_recipes("mine/README.md")


def test_a_copy_without_the_data_that_a_user_has_fetched_quotes_a_folder_with_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_recipes("source")
    Path("source/data/llava_pretrain/images").mkdir(parents=True)
    Path("source/data/llava_pretrain/images/1.jpg").write_bytes(b"picture")
    repository = recipes_folder()
    monkeypatch.setattr(shipped, "recipes_folder", lambda: Path("source"))
    copy_recipes("copy")
    assert not Path("copy/data/llava_pretrain").exists()
    monkeypatch.setattr(shipped, "recipes_folder", lambda: repository)
    copy_recipes("my own")
    text = Path("my own/qwen3_8b_hera.yaml").read_text()
    assert "llamafactory-cli train 'my own/qwen3_8b_hera.yaml'" in text
    assert yaml.safe_load(text)["dataset_dir"] == "my own/data"
