"""The command ``calibrate``, and the overrides of all commands that read a recipe."""

import os
from pathlib import Path
from typing import Any

import pytest

from llamafactory_hera.cli import main
from llamafactory_hera.integrations.llamafactory import commands


def test_overrides_are_told_from_values_of_options_and_from_existing_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(commands, "score_checkpoint", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    Path("run_lr=1e-4").mkdir()
    Path("r.yaml").touch()
    main(["score", "hera_m=2", "run_lr=1e-4", "--recipe", "r.yaml", "hera_k=3", "--output", "scores_k=3.json"])
    assert calls == [("run_lr=1e-4", "r.yaml", "scores_k=3.json", ["hera_m=2", "hera_k=3"])]


@pytest.mark.parametrize("given, used", [("3,1", "3"), (None, "0"), ("", "")])
def test_a_calibration_uses_one_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None, used: str
) -> None:
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    monkeypatch.setattr(os, "environ", environment)
    (tmp_path / "empty.yaml").touch()
    assert main(["calibrate", str(tmp_path / "empty.yaml")]) == 2
    assert environment["CUDA_VISIBLE_DEVICES"] == used
