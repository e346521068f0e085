"""Files appear complete or not at all."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_hera.files import locked, read_json, whole_file, write_json, write_safetensors
from tests.ranks import holder


def test_json_round_trips_and_replaces_an_existing_file(tmp_path):
    path, content = tmp_path / "new/a.json", {"heads": ["L0H1"], "name": "頭", "score": 0.25, "none": None}
    for each in ({}, content):
        write_json(path, each)
        assert read_json(path) == each
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        with whole_file(path) as temporary:
            temporary.write_text("half of")
            assert path.read_text() == "old"
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_tensors_of_any_layout_are_written(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).t().requires_grad_()
    write_safetensors(tmp_path / "a.safetensors", {"a": tensor})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensor.detach())


def test_a_lock_excludes_other_processes_until_its_holder_ends(tmp_path):
    with holder(tmp_path):
        refused = pytest.raises(ValueError, match=f"^output_dir: {re.escape(str(tmp_path))} is in use by another")
        with refused, locked(tmp_path):
            pass
    with locked(tmp_path), locked(tmp_path):  # one process may lock twice
        pass
