"""The command line of calibrate."""

import argparse
import os
from typing import Any

import pytest

from llamafactory_hera.calibration import report
from llamafactory_hera.integrations.llamafactory import calibration
from llamafactory_hera.integrations.llamafactory.calibration import register


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    return parser.parse_args(["calibrate", *arguments])


def test_overrides_may_stand_before_and_behind_the_control(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    def calibrate(*arguments: Any) -> list[str]:
        calls.append(arguments)
        return ["one", "two"]

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    monkeypatch.setattr(report, "render_summary", "report {}".format)
    monkeypatch.setattr(os, "environ", {})
    arguments = parse("r.yaml", "rah_k=1", "--control", "blank", "output_dir=saves/x")
    assert arguments.run(arguments) == 0
    assert calls == [("r.yaml", ["rah_k=1", "output_dir=saves/x"], "blank")]
    assert capsys.readouterr().out == "report one\nreport two\n"


@pytest.mark.parametrize("given, used", [("3,1", "3"), (None, "0"), ("", "")])
def test_one_device_is_used(monkeypatch: pytest.MonkeyPatch, given: str | None, used: str) -> None:
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(calibration, "calibrate", lambda *_: [])
    arguments = parse("r.yaml")
    arguments.run(arguments)
    assert environment["CUDA_VISIBLE_DEVICES"] == used


def test_an_unknown_control_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("r.yaml", "--control", "noise")
    assert "shuffled" in capsys.readouterr().err
