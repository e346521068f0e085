"""Files appear complete or not at all."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_hera.files import locked, read_json, whole_file, write_json, write_safetensors, write_text
from tests.ranks import full_disk, holder


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


def test_a_file_that_is_replaced_keeps_its_mode_and_the_links_to_it(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to("a.txt")
    write_text(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_lock_excludes_other_processes_until_its_holder_ends(tmp_path):
    with holder(tmp_path):
        refused = pytest.raises(ValueError, match=f"^output_dir: {re.escape(str(tmp_path))} is in use by another")
        with refused, locked(tmp_path):
            pass
    with locked(tmp_path), locked(tmp_path):  # one process may lock twice
        pass


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(4)})
    with full_disk(256), pytest.raises(OSError):
        write_safetensors(path, {"a": torch.ones(4096)})
    assert torch.equal(load_file(path)["a"], torch.zeros(4))
    assert os.listdir(tmp_path) == ["a.safetensors"]
