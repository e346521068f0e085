"""Saved settings: read back whole, and readable for a host without the plugin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLAIN = {
    "top.model_name": "Custom",
    "top.template": "qwen",
    "train.training_stage": "Supervised Fine-Tuning",
    "train.dataset": ["hera_demo"],
    "train.learning_rate": "1e-3",
}


@pytest.fixture
def host() -> tuple[Callable, Callable]:
    """The host's own two functions."""
    from llamafactory.webui import common

    return common.save_args.__wrapped__, common.load_args.__wrapped__


def settings(**changes: Any) -> dict[str, Any]:
    from llamafactory_hera.integrations.llamaboard.fields import FIELDS, default

    fields = {f"train.{key}": default(key) for key in FIELDS}
    return PLAIN | fields | {"train.hera_compare": True} | changes


HERA = {
    "top.model_name": "LLaVA-Qwen3-4B-HeRA",
    "top.template": "llava_qwen3",
    "train.training_stage": "HeRA",
    "train.hera_heads": "L1H2: «ж»\n# not a comment",
    "train.hera_weight": 0.5,
}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    from llamafactory.webui.common import load_args, save_args

    path = str(tmp_path / "saved.yaml")
    emptied = {"train.hera_compare": False, "train.hera_k": None}
    for saved in (settings(**HERA), settings(**emptied), settings(**HERA)):
        save_args(path, saved)
        assert load_args(path) == saved


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from llamafactory.webui.common import load_args, save_args

    path = str(tmp_path / "saved.yaml")
    save_args(path, settings(**HERA))

    def full(*_: Any, **__: Any) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(yaml, "safe_dump", full)
    with pytest.raises(OSError, match="No space left"):  # the host's part is written by then
        save_args(path, settings(**HERA | {"train.hera_weight": 0.1}))
    monkeypatch.undo()
    assert load_args(path) == settings(**HERA)
    assert [file.name for file in tmp_path.iterdir()] == ["saved.yaml"]


def test_the_host_reads_values_of_its_own_only(tmp_path: Path, host: tuple[Callable, Callable]) -> None:
    from llamafactory.webui.common import save_args

    save_args(str(tmp_path / "saved.yaml"), settings(**HERA))
    assert host[1](str(tmp_path / "saved.yaml")) == PLAIN | {"top.template": "default"}


def test_without_hera_the_file_is_the_host_s(tmp_path: Path, host: tuple[Callable, Callable]) -> None:
    from llamafactory.webui.common import load_args, save_args

    save_args(str(tmp_path / "ours.yaml"), settings())
    host[0](str(tmp_path / "theirs.yaml"), PLAIN)
    assert (tmp_path / "ours.yaml").read_bytes() == (tmp_path / "theirs.yaml").read_bytes()
    assert load_args(str(tmp_path / "theirs.yaml")) == PLAIN
    assert load_args(str(tmp_path / "missing.yaml")) is None


@pytest.mark.parametrize("damage", ["#HeRA train.hera_heads: [", "#HeRA just text"])
def test_damaged_lines_leave_the_rest_readable(damage: str, tmp_path: Path) -> None:
    from llamafactory.webui.common import load_args, save_args

    path = tmp_path / "saved.yaml"
    save_args(str(path), PLAIN)
    path.write_text(path.read_text() + damage + "\n")
    assert load_args(str(path)) == PLAIN


def test_a_key_that_is_shown_no_more_is_left_out(tmp_path: Path) -> None:
    from llamafactory.webui.common import load_args, save_args

    path = tmp_path / "saved.yaml"
    save_args(str(path), settings(**HERA))
    path.write_text(path.read_text() + "#HeRA train.hera_of_old: 1\n#HeRA train.seed: 1\n")
    assert load_args(str(path)) == settings(**HERA)


@pytest.mark.parametrize(
    "line",
    [
        "train.hera_unknown: 1",
        "train.hera_k: nine",
        "#HeRA train.hera_k: nine",
        "#HeRA train.hera_pooling: nonsense",
        "#HeRA train.training_stage: Hera",
        "#HeRA train.hera_fixed_temperature: 3",
    ],
)
def test_what_no_field_takes_is_left_out(line: str, tmp_path: Path) -> None:
    from llamafactory.webui.common import load_args, save_args

    path = tmp_path / "saved.yaml"
    save_args(str(path), PLAIN)
    path.write_text(path.read_text() + line + "\n#HeRA train.hera_weight: 0.5\n")
    assert load_args(str(path)) == PLAIN | {"train.hera_weight": 0.5}
