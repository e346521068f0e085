"""The command line of calibrate."""

import os
from pathlib import Path
from typing import Any

import pytest

from llamafactory_hera.calibration import report
from llamafactory_hera.cli import main
from llamafactory_hera.integrations.llamafactory import commands


def test_overrides_may_stand_before_and_behind_the_control(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    def calibrate(*arguments: Any) -> list[str]:
        calls.append(arguments)
        return ["one", "two"]

    monkeypatch.setattr(commands, "calibrate", calibrate)
    monkeypatch.setattr(report, "render_summary", "report {}".format)
    monkeypatch.setattr(os, "environ", {})
    assert main(["calibrate", "r.yaml", "rah_k=1", "--control", "blank", "output_dir=saves/x"]) == 0
    assert calls == [("r.yaml", ["rah_k=1", "output_dir=saves/x"], "blank")]
    assert capsys.readouterr().out == "report one\nreport two\n"


def test_what_an_option_takes_and_what_lies_there_is_no_override(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(commands, "score_checkpoint", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    Path("run_lr=1e-4").mkdir()
    main(["score", "run_lr=1e-4", "--recipe", "r.yaml", "hera_k=3", "--output", "scores_k=3.json"])
    assert calls == [("run_lr=1e-4", "r.yaml", "scores_k=3.json", ["hera_k=3"])]
    assert main(["score", "run_lr=1e-4", "nope", "--recipe", "r.yaml"]) == 2  # before the first one is scored
    assert len(calls) == 1


@pytest.mark.parametrize("given, used", [("3,1", "3"), (None, "0"), ("", "")])
def test_one_device_is_used(monkeypatch: pytest.MonkeyPatch, given: str | None, used: str) -> None:
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(commands, "calibrate", lambda *_: [])
    main(["calibrate", "r.yaml"])
    assert environment["CUDA_VISIBLE_DEVICES"] == used


def test_an_unknown_control_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "r.yaml", "--control", "noise"])
    assert "shuffled" in capsys.readouterr().err
