"""Where `build` writes: what is there is left alone, and a model appears under its name whole or not at all."""

import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import transformers as tf

from llamafactory_hera.backbones import build as build_module
from tests.ranks import holder

from .conftest import Build
from .test_build import load


class Killed(BaseException):
    """The process is gone; nothing of ours runs after it."""


# The tokenizer's file is the first that is too large, and its library's error is not an OSError; then the weights.
@pytest.mark.parametrize("size", [10_000, 100_000])
def test_a_full_disk_leaves_nothing(size: int, build: Build, tmp_path: Path) -> None:
    tf.logging.set_verbosity_error()  # what is logged goes into a file, too
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # a real write error in the middle of a larger file
    try:
        with pytest.raises(ValueError, match=r"--output: .*built cannot be written .* Make"):
            build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    load(build().folder)


@pytest.mark.parametrize("function", ["mkdir", "save_torch_state_dict", "replace"])
def test_a_killed_build_leaves_nothing_that_looks_finished(
    function: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"mkdir": Path, "replace": build_module.os}.get(function, build_module)
    real = getattr(owner, function)

    def killed(*args, **kwargs) -> None:
        if any(str(arg).endswith(".partial") for arg in args):
            if function != "replace":
                real(*args, **kwargs)
            raise Killed
        real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, function, killed)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            build()
    assert [file.name for file in tmp_path.iterdir()] == ["built.partial"]
    if function != "replace":  # config.json comes last
        with pytest.raises(ValueError, match=r"config\.json"):
            tf.AutoConfig.from_pretrained(tmp_path / "built.partial")
    with pytest.raises(ValueError, match=r"--output: .*built\.partial is there, of a build that was killed; remove"):
        build()
    shutil.rmtree(tmp_path / "built.partial")
    load(build().folder)


def test_a_second_build_of_one_folder_names_the_first(build: Build, tmp_path: Path) -> None:
    with holder(tmp_path / "built.lock") as process, pytest.raises(ValueError, match=f"process {process.pid} on "):
        build()
    load(build().folder)


def test_too_little_room_is_refused_before_anything_is_written(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**10, 2**10))
    match = r"--output: 0\.000\d+ GiB are needed for .*, 9\.54e-07 GiB are free; make room"
    with pytest.raises(ValueError, match=match):
        build()
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_in_use_or_cannot_be_made_is_left_alone(build: Build, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for output in (*map(tmp_path.joinpath, ("full", "file/built", "file", "loop")), Path("/proc/built")):
        why = "is not empty; give another folder, or remove it yourself" if output.name == "full" else "another folder"
        with pytest.raises(ValueError, match=rf"--output: {output}.* {why}"):
            build(output=output)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "full", "loop", "thesis.txt"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_points_to_the_model_afterwards(there: bool, build: Build, tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    if there:  # an empty folder is taken
        target.mkdir(parents=True)
    link.symlink_to(target)
    build(output=link)
    assert link.is_symlink()
    load(link)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "link"]
    assert [file.name for file in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shard_size_that_is_none_is_refused(size: float, build: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--shard-gib: {size} is not the size of a file; give a number above 0"):
        build(shard_gib=size)
    assert not list(tmp_path.iterdir())
