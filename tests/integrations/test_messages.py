"""Messages are printed once in every host, in the words of the host."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamafactory_hera.heads import Targets
from llamafactory_hera.integrations import messages
from llamafactory_hera.integrations.llamafactory import recipe
from llamafactory_hera.integrations.llamafactory.recipe import host_words
from llamafactory_hera.integrations.messages import show_messages
from llamafactory_hera.teachers.images import load_image
from llamafactory_hera.training.checks import idle_message

OURS = logging.getLogger("llamafactory_hera")


@pytest.fixture(autouse=True)
def handlers_of_the_program() -> Iterator[None]:
    """Leaves the handlers of the root logger as they were; tests/conftest.py does so for the package's logger."""
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = before


@pytest.mark.parametrize("of_root", [0, 1], ids=["no handler", "a handler of the program"])
def test_messages_are_printed_once(of_root: int, capsys: pytest.CaptureFixture) -> None:
    logging.getLogger().handlers[:] = [logging.StreamHandler(sys.stdout)] * of_root
    for _ in range(2):
        show_messages()
    OURS.info("an info")
    OURS.debug("a detail")
    printed = "".join(capsys.readouterr())
    assert (printed.count("an info"), printed.count("a detail")) == (1, 0)


def test_only_the_first_process_prints_messages_and_every_one_prints_warnings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    logging.getLogger().handlers.clear()
    show_messages()
    monkeypatch.setattr(messages, "rank", lambda: 1)
    OURS.info("an info")
    OURS.warning("a warning")
    assert "an info" not in (printed := capsys.readouterr().err)
    assert "a warning" in printed


def test_messages_share_handlers_and_level_of_a_host(capsys: pytest.CaptureFixture) -> None:
    host = logging.Logger("host", logging.WARNING)
    host.addHandler(logging.StreamHandler(sys.stdout))
    show_messages(host)
    OURS.info("an info")
    OURS.warning("a warning")
    out, err = capsys.readouterr()
    assert (out, err) == ("a warning\n", "")


def test_the_level_of_the_user_stays(capsys: pytest.CaptureFixture) -> None:
    logging.getLogger().handlers.clear()
    OURS.setLevel(logging.ERROR)
    show_messages()
    OURS.warning("a warning")
    assert "".join(capsys.readouterr()) == ""


def test_errors_of_the_core_name_the_keys_of_the_host() -> None:
    keys = "freeze_multi_modal_projector: false, freeze_language_model: false, lora_target: all."
    for message, translated in {
        "model: m is quantized": "^model_name_or_path: m is quantized$",
        "hera_k: 0 is out of range": "^hera_k: 0 is out of range$",
        idle_message(Targets.parse("L0H0"), "nothing is trained"): f" In LLaMA-Factory: {keys}$",
    }.items():
        with pytest.raises(ValueError, match=translated), host_words():
            raise ValueError(message)
    with pytest.raises(ValueError, match=r'nowhere\.png.* In LLaMA-Factory: media_dir .*{"media_dir": '), host_words():
        load_image("nowhere.png")
    with pytest.raises(UnicodeDecodeError), host_words():  # whose arguments are no message
        b"\xff".decode()


def test_every_hint_belongs_to_a_message() -> None:
    package = Path(recipe.__file__).parents[2]
    sources = [path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path != Path(recipe.__file__)]
    assert [part for part in recipe._HINTS if not any(part in source for source in sources)] == []
