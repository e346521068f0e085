"""Models by hub id: found in the cache without a network, and refused in one line if they are missing."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from llamafactory_hera.hub import is_adapter, local_folder, weight_files

COMMIT, REPO = "c" * 40, "some-org/tiny-model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Goes offline, and returns the folder of the model in the hub's cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"


def find(name: str) -> Path:
    return local_folder(name, "hera_teacher", "a vision model")


def test_a_folder_is_accepted_if_it_contains_a_configuration(model):
    assert find(str(model)) == model
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^hera_teacher: .*model contains no config\.json\. Give a vision model\.$"):
        find(str(model))


def test_a_cached_model_is_found_without_a_network(model, offline):
    snapshot = offline / "snapshots" / COMMIT
    shutil.copytree(model, snapshot)
    (offline / "refs").mkdir()
    (offline / "refs/main").write_text(COMMIT)
    assert find(REPO) == snapshot


@pytest.mark.parametrize("name", [REPO, "models/missing folder", "dinov2"])
def test_a_missing_model_is_refused_in_one_line(name, offline):
    with pytest.raises(
        ValueError, match=rf"^hera_teacher: {name} is not a folder and cannot be fetched .*Give"
    ) as error:
        find(name)
    assert "\n" not in str(error.value)


def test_weight_files_are_chosen_in_the_order_of_transformers_and_refused_next_to_an_adapter(model):
    (model / "pytorch_model.bin").touch()
    (model / "adapter_model.safetensors").touch()
    (model / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="model contains both an adapter and full weights"):
        is_adapter(model)
    assert weight_files(model) == [model / "model.safetensors"]
    (model / "model.safetensors").unlink()
    assert weight_files(model) == [model / "pytorch_model.bin"]
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"model contains no weights \(looked for model\*\.safetensors"):
        weight_files(model)
