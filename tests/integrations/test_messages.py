"""Messages are printed once in every host, and they name the host's keys."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads import Targets
from llamafactory_hera.integrations import messages
from llamafactory_hera.integrations.llamafactory import recipe
from llamafactory_hera.integrations.llamafactory.recipe import host_words
from llamafactory_hera.integrations.messages import (
    in_python,
    log_outcome,
    log_setup,
    log_share,
    show_messages,
    translated,
)
from llamafactory_hera.teachers.images import load_image
from llamafactory_hera.training.checks import idle_message
from llamafactory_hera.training.memory import CrossBatchMemory

OURS = logging.getLogger("llamafactory_hera")


@pytest.fixture(autouse=True)
def handlers_of_the_program() -> Iterator[None]:
    """Restores the handlers of the root logger; tests/conftest.py restores the package's logger."""
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = before


@pytest.mark.parametrize("of_root", [0, 1], ids=["no handler", "a handler of the program"])
def test_messages_are_printed_once(of_root, capsys):
    logging.getLogger().handlers[:] = [logging.StreamHandler(sys.stdout)] * of_root
    for _ in range(2):
        show_messages()
    OURS.info("an info")
    OURS.debug("a detail")
    printed = "".join(capsys.readouterr())
    assert (printed.count("an info"), printed.count("a detail")) == (1, 0)


def test_only_the_first_process_prints_messages_and_every_one_prints_warnings(monkeypatch, capsys):
    logging.getLogger().handlers.clear()
    show_messages()
    monkeypatch.setattr(messages, "rank", lambda: 1)
    OURS.info("an info")
    OURS.warning("a warning")
    assert "an info" not in (printed := capsys.readouterr().err)
    assert "a warning" in printed


def test_the_users_log_level_is_kept(capsys):
    logging.getLogger().handlers.clear()
    OURS.setLevel(logging.ERROR)
    show_messages()
    OURS.warning("a warning")
    assert "".join(capsys.readouterr()) == ""


OF_4 = "(means of the first and the last 2 of 4 log lines; noise"
TRY = "by more than the noise. Train longer, or try hera_weight: 0.1 (docs/method.md#which-weight)."
RAISE = (
    "It did not rise by more than the noise. Train longer, or raise the learning rate (the term is 50% of the loss, "
    "so hera_weight matters less) (docs/method.md#which-weight)."
)
FEW = "fewer than two log lines have hera_mknn, so its change is unknown. Train longer, or lower logging_steps."
UNFILLED = (
    "the memory of 128 samples did not fill up in 9 steps (3 entered), so hera_loss and hera_mknn were not logged. "
    "Train longer, use a larger batch, or lower hera_memory."
)


@pytest.mark.parametrize(
    ("key", "values", "keys", "expected"),
    [  # the noise is 2 sqrt(mean squared difference / 2)
        ("mknn", [0.2, 0.22, 0.2, 0.22], {}, f"0.210 to 0.210 {OF_4} 0.028, chance 0.050). It did not rise {TRY}"),
        ("mknn", [0.2, 0.25, 0.3, 0.35], {}, f"0.225 to 0.325 {OF_4} 0.071, chance 0.050)."),
        ("mknn", [0.4, 0.3, 0.2, 0.1], {}, f"0.350 to 0.150 {OF_4} 0.141, chance 0.050). It did not rise {TRY}"),
        ("mknn", [0.4, 0.3, 0.2, 0.1], {"weight": 0.0}, f"0.350 to 0.150 {OF_4} 0.141, chance 0.050)."),
        ("loss", [0.4, 0.3, 0.2, 0.1], {}, f"0.350 to 0.150 {OF_4} 0.141)."),
        ("loss", [0.1, 0.2, 0.3, 0.4], {}, f"0.150 to 0.350 {OF_4} 0.141). It did not fall {TRY}"),
        ("mknn", [0.4, 0.3, 0.2, 0.1], {"weight": 1.0}, f"0.350 to 0.150 {OF_4} 0.141, chance 0.050). {RAISE}"),
        ("mknn", [], {"memory": 128}, UNFILLED),
        ("mknn", [0.2], {"memory": 3}, FEW),
    ],
)
def test_the_end_of_a_run_says_whether_anything_changed(key, values, keys, expected, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    memory = CrossBatchMemory(keys.get("memory", 0))
    memory.append(torch.ones(1, 3, 2), torch.ones(3, 2), torch.ones(3, dtype=torch.bool))
    aligner = SimpleNamespace(config=HeraConfig(heads="L0H0", **keys), targets=Targets.parse("L0H0"), memory=memory)
    names = {"mknn": "MKNN of the aligned heads went from ", "loss": "the alignment loss went from "}
    chance = {"hera_mknn_chance": 0.05} if key == "mknn" else {}
    history = [
        {"loss": 3.0},
        *({"hera_loss": 2.0, "lm_loss": 2.0, **chance, f"hera_{key}": value} for value in values),
    ]
    log_outcome(aligner, history, 9)
    monkeypatch.setattr(messages, "rank", lambda: 1)
    log_outcome(aligner, history, 9)  # logs nothing
    log_share({"lm_loss": 1.0, "hera_loss": 1.0}, 1.0)  # also logs nothing
    assert caplog.messages == [f"HeRA | {names[key] * (len(values) > 1)}{expected}"]


def test_errors_of_the_core_name_the_keys_of_the_host():
    keys = "freeze_multi_modal_projector: false, freeze_language_model: false, lora_target: all."
    for message, in_host_words in {
        "model: m is quantized": "^model_name_or_path: m is quantized$",
        "hera_k: 0 is out of range": "^hera_k: 0 is out of range$",
        idle_message(Targets.parse("L0H0"), "nothing is trained"): f" In LLaMA-Factory: {keys}$",
    }.items():
        with pytest.raises(ValueError, match=in_host_words), host_words():
            raise ValueError(message)
    with pytest.raises(ValueError, match=r'nowhere\.png.* In LLaMA-Factory: media_dir .*{"media_dir": '), host_words():
        load_image("nowhere.png")
    with pytest.raises(UnicodeDecodeError), host_words():  # its arguments are not a message
        b"\xff".decode()


def test_log_messages_name_the_keys_of_the_host(caplog):
    caplog.set_level(logging.INFO)
    with translated(in_python):
        OURS.info("hera_k: %d needs %s", 10, "a larger hera_memory")
    OURS.info("hera_k: 10 again")
    assert caplog.messages == ["k=10 needs a larger memory", "hera_k: 10 again"]


def test_a_run_without_steps_left_says_so(caplog):
    caplog.set_level(logging.INFO)
    log_setup(None, None, None, SimpleNamespace(max_steps=4, global_step=4))
    (line,) = caplog.messages
    assert "has all 4 steps of the run, so nothing is trained" in line


def test_every_hint_belongs_to_a_message():
    package = Path(recipe.__file__).parents[2]
    sources = [path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path != Path(recipe.__file__)]
    assert [part for part in recipe._HINTS if not any(part in source for source in sources)] == []
