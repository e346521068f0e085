"""Where `build` writes: what is refused before anything is made, and builds that were killed at an awkward moment."""

import json
from pathlib import Path

import pytest
import torch

from llamafactory_hera.backbones import work_folder
from llamafactory_hera.backbones.work_folder import REQUEST, size_text
from llamafactory_hera.backbones.writer import write_json
from llamafactory_hera.cli import main

from .test_assemble import load, stored
from .test_build_faults import SMALL_SHARD, build, files_no_larger_than


class Killed(BaseException):
    """The process is gone; nothing of ours runs after it."""


def kill(monkeypatch: pytest.MonkeyPatch, function: str, ending: str) -> None:
    """Ends the build where ``os.replace`` or ``os.unlink`` is about to be called on a file of this ending."""
    owner = {"replace": work_folder.os, "unlink": Path}[function]
    real = getattr(owner, function)

    def call(path: Path, *args, **kwargs):
        if str(path).endswith(ending):
            raise Killed
        return real(path, *args, **kwargs)

    monkeypatch.setattr(owner, function, call)


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shard_size_that_is_none_is_refused(
    size: float, checkpoints: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--language-model", str(checkpoints["qwen3"]), "--vision-model", str(checkpoints["siglip"])]
    assert main(["build", *arguments, "--output", str(tmp_path / "built"), f"--shard-gib={size}"]) == 2
    assert f"--shard-gib: {size} is no size of a file; give a number above 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "function, ending, second",
    [
        ("replace", f"{REQUEST}.tmp", ["shard 1 of 1"]),  # while the first file is written
        ("replace", "built.partial", ["shard 1 of 1 is there already"]),  # before the folder gets its name
        ("unlink", REQUEST, []),  # after that
    ],
)
def test_a_killed_build_is_continued(
    function: str, ending: str, second: list[str], checkpoints: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(checkpoints, tmp_path / "whole")
    with monkeypatch.context() as patched:
        kill(patched, function, ending)
        with pytest.raises(Killed):
            build(checkpoints, tmp_path / "built")
    assert (tmp_path / "built").exists() == (function == "unlink")
    lines: list[str] = []
    built = build(checkpoints, tmp_path / "built", report=lines.append)
    assert lines == second
    assert not (tmp_path / "built.partial").exists()
    assert {file.name for file in built.folder.iterdir()} == {file.name for file in whole.folder.iterdir()}
    expected = stored(whole.folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(built.folder).items())


def test_a_model_under_the_final_name_is_only_taken_for_the_same_request(checkpoints: dict, tmp_path: Path) -> None:
    built = build(checkpoints, tmp_path / "built")
    (built.folder / REQUEST).write_text(json.dumps({"request": "another"}))
    with pytest.raises(ValueError, match=r"--output: .* is not empty"):
        build(checkpoints, tmp_path / "built")
    load(built.folder)


def test_a_damaged_request_is_told(checkpoints: dict, tmp_path: Path) -> None:
    partial = tmp_path / "built.partial"
    partial.mkdir()
    (partial / REQUEST).write_text('{"requ')
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"some")
    with pytest.raises(ValueError, match=r"--output: .*partial holds files, and no build.json that .*; remove it"):
        build(checkpoints, tmp_path / "built")
    (partial / "model-00001-of-00002.safetensors").unlink()
    load(build(checkpoints, tmp_path / "built").folder)  # nothing but the request was there: nothing is lost


@pytest.mark.parametrize("there", [True, False])
def test_a_link_points_to_the_model_afterwards(there: bool, checkpoints: dict, tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    if there:
        target.mkdir(parents=True)
    link.symlink_to(target)
    build(checkpoints, link)
    assert link.is_symlink()
    load(link)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "link"]
    assert [file.name for file in target.parent.iterdir()] == ["target"]


def test_an_output_that_cannot_be_made_is_told_without_promises(checkpoints: dict, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    outputs = [tmp_path / "file" / "built", tmp_path / "file", tmp_path / "loop", Path("/proc/built")]
    for output in outputs:
        with pytest.raises(ValueError, match=r"--output: .* give (another folder|a folder on another disk)") as caught:
            build(checkpoints, output)
        assert "is kept" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "loop"]


# The tokenizer's file is the first that is too large, and its library's error is no OSError.
def test_a_failure_before_the_first_shard_leaves_nothing(checkpoints: dict, tmp_path: Path) -> None:
    with files_no_larger_than(1000), pytest.raises(ValueError, match="cannot be written") as caught:
        build(checkpoints, tmp_path / "built", shard_gib=SMALL_SHARD)
    assert "is kept" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_json_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with files_no_larger_than(100), pytest.raises(OSError):
        write_json(file, {"a": "b" * 1000})
    assert json.loads(file.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    "n_bytes, text",
    [(1000, "1000 bytes"), (1536, "1.50 KiB"), (52 * 2**20, "52.0 MiB"), (15 * 2**30, "15.0 GiB")],
)
def test_sizes_are_told_in_a_unit_that_shows_them(n_bytes: int, text: str) -> None:
    assert size_text(n_bytes) == text
