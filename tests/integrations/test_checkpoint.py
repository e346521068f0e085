"""Which checkpoint is resumed, and whether it was saved to its end."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamafactory_hera.heads import HeadSet
from llamafactory_hera.integrations.llamafactory.arguments import HeraArguments
from llamafactory_hera.integrations.llamafactory.state import check_checkpoint, checkpoint_of


def arguments(asked: object, folder: Path) -> SimpleNamespace:
    return SimpleNamespace(resume_from_checkpoint=asked, output_dir=str(folder))


def test_the_last_one_or_the_named_one_is_resumed(tmp_path: Path) -> None:
    for step in (8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert checkpoint_of(arguments(None, tmp_path)) is None
    assert checkpoint_of(arguments(True, tmp_path)) == str(tmp_path / "checkpoint-12")
    named = str(tmp_path / "checkpoint-8")
    assert checkpoint_of(arguments(named, tmp_path)) == named


@pytest.mark.parametrize("folder", ["", "missing"])
def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path, folder: str) -> None:
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: true, and output_dir: .* holds no checkpoint; give"
    ):
        checkpoint_of(arguments(True, tmp_path / folder))
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*checkpoint-9 is no folder; give the path"):
        checkpoint_of(arguments(str(tmp_path / "checkpoint-9"), tmp_path))


@pytest.mark.parametrize("others", [(), (3, 10, 6)])
def test_one_that_was_not_saved_to_its_end_is_refused_with_the_one_before(tmp_path: Path, others: tuple) -> None:
    for step in others:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").touch()
    last = tmp_path / "checkpoint-12"
    (last / "hera").mkdir(parents=True)  # HeRA's own part is written first
    (last / "hera/state.safetensors").write_bytes(b"half")
    remedy = f"resume {tmp_path / 'checkpoint-10'}" if others else "start anew"
    with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: {re.escape(str(last))} has no .*and {remedy}\.$"):
        check_checkpoint(last, HeadSet.parse("L0H1"), "fingerprint", HeraArguments())
