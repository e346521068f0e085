"""Files appear complete or not at all."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_hera.files import check_replaceable, locked, whole_file, write_safetensors
from tests.ranks import full_disk, holder


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


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(4)})
    with full_disk(256), pytest.raises(OSError):
        write_safetensors(path, {"a": torch.ones(4096)})
    assert torch.equal(load_file(path)["a"], torch.zeros(4))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_only_a_file_with_the_mark_may_be_replaced(tmp_path):
    for name, content in {"own": "a mark of this kind", "other": "notes"}.items():
        (tmp_path / name).write_text(content)
    check_replaceable({tmp_path / "own": "mark", tmp_path / "new/file": "mark"})
    for path in (tmp_path / "other", tmp_path):
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(path))} exists and is not a file that this command writes"
        ):
            check_replaceable({path: "mark"})
    with pytest.raises(ValueError, match=r"^/proc/nothing/file cannot be written \(.*; give another path"):
        check_replaceable({"/proc/nothing/file": "mark"})
