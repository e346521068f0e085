import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamafactory_hera.demo import build, build_demo
from llamafactory_hera.demo.dataset import Amounts

FEW = build.Size(Amounts(6, 2, 2), Amounts(2, 1, 1), language_steps=3, vision_steps=3, teacher_steps=3)


@pytest.fixture
def few(monkeypatch):
    """Make size "test" so small that a build takes a moment."""
    monkeypatch.setitem(build.SIZES, "test", FEW)


def contents(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_in_another_process(tmp_path, few):
    code = (
        "from llamafactory_hera.demo.build import SIZES, Amounts, Size, build_demo; "
        f"SIZES['test'] = {FEW!r}; build_demo({str(tmp_path / 'b')!r}, size='test')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    torch.rand(3)  # neither the caller's random state nor its threads count
    assert contents(build_demo(tmp_path / "a", size="test")["root"]) == contents(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_another_seed_gives_other_data_and_weights(tmp_path, few):
    first = contents(build_demo(tmp_path / "a", seed=0, size="test")["root"])
    second = contents(build_demo(tmp_path / "b", seed=1, size="test")["root"])
    for file in ("data/demo_train.json", "model/model.safetensors", "teacher/model.safetensors"):
        assert first[file] != second[file]


def test_a_finished_folder_is_reused_and_force_replaces_it(tmp_path, few):
    root = tmp_path / "hera_demo"
    paths = build_demo(root, size="test")
    assert sorted(path.name for path in root.iterdir()) == ["data", "demo.json", "language_model", "model", "teacher"]
    marker = root / "note.txt"
    marker.write_text("mine")
    assert build_demo(root, size="test") == paths
    assert marker.exists()
    assert build_demo(root, size="test", force=True) == paths
    assert not marker.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hera_demo"]


def test_a_demo_of_another_request_is_kept_unless_forced(tmp_path, few):
    root = build_demo(tmp_path / "hera_demo", size="test")["root"]
    before = contents(root)
    with pytest.raises(ValueError, match=r"'seed': 0.*asked for.*'seed': 5.*force=True"):
        build_demo(root, seed=5, size="test")
    assert contents(root) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path, few, force):
    root = tmp_path / "work"
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"work' exists and was not built by the demo .*choose another output_dir"):
        build_demo(root, size="test", force=force)
    assert [path.name for path in root.iterdir()] == ["thesis.txt"]


def test_a_failed_build_leaves_nothing(tmp_path, few, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(build.models, "train_teacher", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        build_demo(tmp_path / "hera_demo", size="test")
    assert not list(tmp_path.iterdir())


def test_an_unknown_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="size='big': choose one of demo, test"):
        build_demo(tmp_path / "hera_demo", size="big")
