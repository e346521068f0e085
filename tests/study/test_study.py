"""The whole study at its smallest, through the real command."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from llamafactory_hera.evaluation.vlm import HeraVLM
from llamafactory_hera.files import read_json
from parts import load_llava
from settings import METHODS, SIZES
from world import CATEGORIES, make_world, shares

from ..e2e.runner import environment, run_command
from ..evaluation.test_vlm import ask
from .conftest import STUDY, main_module

pytestmark = pytest.mark.slow
#: A picture, and the question behind it, as the study's models read them.
CHAT_TEMPLATE = (
    "{% for part in messages[0]['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}"
)
COMMAND = [sys.executable, str(STUDY), "--size", "smoke", "--output", "smoke"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    code, output = run_command(COMMAND, folder, timeout=600)
    assert code == 0, output
    return folder / "smoke"


def test_the_report_holds_what_was_measured(study):
    record, page = read_json(study / "report.json"), (study / "report.md").read_text()
    measured = record["measured"]
    for kind in ("seen", "new"):
        for category in (*CATEGORIES, "mean"):
            assert measured[f"accuracy/{kind}/{category}"].keys() == {"sft", "worst5"}
    for mode in ("llm", "mllm"):
        assert measured[f"mknn/{mode}/worst5"].keys() == {"base", "sft", "worst5"}
    assert measured["cost/stage2_cpu_s"]["worst5"]["1"] > 0
    assert record["chosen"] == 0.1
    assert "HeRA worst-5 − SFT" in page
    assert "Not finished" not in page
    assert (study / "study.png").stat().st_size > 5000


def test_a_rerun_does_nothing_more_seeds_are_added_and_other_settings_refused(study):
    main = main_module()
    before = {path: path.stat().st_mtime_ns for path in (study / "done").rglob("*.json")}
    main.run_study(study, "smoke")
    assert {path: path.stat().st_mtime_ns for path in (study / "done").rglob("*.json")} == before
    page = main.run_study(study, "smoke", seeds=2).read_text()
    assert read_json(study / "report.json")["measured"]["cost/stage2_cpu_s"]["sft"].keys() == {"1", "2"}
    assert "`python recipes/study --size smoke --seeds 2`" in page
    with pytest.raises(ValueError, match=r"other settings .*scenes.*choose another folder"):
        main.run_study(study, "default")
    with pytest.raises(ValueError, match="holds no study"):
        main.run_study(study / "logs", "smoke")
    with pytest.raises(ValueError, match="choose one of smoke, default"):
        main.run_study(study, "large")


def test_a_killed_study_ends_its_processes_and_goes_on(tmp_path):
    process = subprocess.Popen(COMMAND, cwd=tmp_path, env=environment(), start_new_session=True)
    while not (tmp_path / "smoke/done/parts.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    code, output = run_command(COMMAND, tmp_path, timeout=600)
    assert code == 0, output
    assert "parts" not in output.split("seeds/1")[0]


def test_every_method_trains(study):
    """All methods that the smoke study leaves out, for two steps each, from its seed."""
    main, settings = main_module(), SIZES["smoke"]
    world, heads = make_world(settings), main.done(study, "seeds/1")["heads"]
    rest = [name for name in METHODS if name not in settings.methods]
    run = partial(train.run, study, world, settings, seed=1, chosen=0.1, heads=heads, questions=world.test)
    main.work_through(study, {f"rest/{name}": partial(run, name=name) for name in rest}, 2)
    for name in rest:
        assert 0 <= main.done(study, f"rest/{name}")["accuracy"]["seen"]["mean"] <= 1


def test_one_forward_pass_counts_what_the_evaluation_answers(study):
    """A model that has just begun to answer: the same questions are right by `llamafactory-hera eval`'s class."""
    world = make_world(replace(SIZES["smoke"], questions=20))
    model, processor = load_llava(study, 1)
    encoder = train.Encoder(processor)
    rows = encoder.encode(world.train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        model(**encoder(rows[16 * step % 128 :][:16])).loss.backward()
        optimizer.step()
    processor.chat_template = CHAT_TEMPLATE
    for part in (model, processor):
        part.save_pretrained(study / "asked")
    samples = world.test["seen"]
    documents = [
        [{"type": "image", "url": sample.image}, {"type": "text", "text": sample.question}] for sample in samples
    ]
    answers = ask(HeraVLM(str(study / "asked"), batch_size=32), documents)
    right = shares(samples, [answer == sample.answer for answer, sample in zip(answers, samples, strict=True)])
    assert train.answer_all(model, encoder, samples) == right
    assert 0 < right["mean"] < 1
