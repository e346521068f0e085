"""The scripts of recipes/ train the demo model as they stand there."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from llamafactory_hera.backbones.build import build_backbone
from tests.backbones.tiny import save_language_model, save_tower
from tests.e2e.runner import ROOT, run_command

SCRIPT = str(ROOT / "recipes/transformers/sft_vlm_hera.py")
SHORT = ["--steps", "5", "--memory", "32"]


def run(world: Path, output: str, *options: str, launcher: tuple[str, ...] = ("python",)) -> list[dict[str, Any]]:
    """The log of a run, or of its latest part."""
    command = [*launcher, SCRIPT, *SHORT, "--output", output, *options]
    code, printed = run_command(command, world, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    assert code == 0, printed
    history = json.loads((world / output / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]


@pytest.fixture(scope="module")
def one(world: Path) -> dict[str, Any]:
    """The log line of a run with the script's own settings, and what it selected."""
    (line,) = run(world, "one")
    return {**line, "selected": json.loads((world / "one/hera/heads.json").read_text())}


@pytest.mark.slow
def test_the_script_selects_what_llamafactory_does(world: Path, one: dict[str, Any]) -> None:
    command = ["llamafactory-hera", "select", str(ROOT / "recipes/demo_hera.yaml"), "output_dir=host"]
    code, printed = run_command(command, world)
    assert code == 0, printed
    host = json.loads((world / "host/hera/heads.json").read_text())
    assert one["selected"]["heads"] == host["heads"]
    for fact in ("scores", "samples_digest", "model_fingerprint", "teacher_fingerprint"):
        assert one["selected"]["provenance"][fact] == host["provenance"][fact]


@pytest.mark.slow
def test_the_script_does_over_two_processes_what_it_does_in_one(world: Path, one: dict[str, Any]) -> None:
    selected = one["selected"]
    assert "## Alignment with a vision encoder" in (world / "one/README.md").read_text()
    (two,) = run(world, "two", "--batch", "8", launcher=("torchrun", "--standalone", "--nproc-per-node", "2"))
    again = json.loads((world / "two/hera/heads.json").read_text())
    assert again["heads"] == selected["heads"]
    assert again["provenance"]["model_fingerprint"] == selected["provenance"]["model_fingerprint"]
    for name in ("loss", "lm_loss", "hera_loss", "hera_mknn", "hera_temperature"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)


@pytest.mark.slow
def test_the_script_trains_lora_and_resumes_with_what_it_selected(world: Path) -> None:
    (straight,) = run(world, "lora", "--lora", "4")
    date = json.loads((world / "lora/hera/heads.json").read_text())["provenance"]["date"]
    for name in ("checkpoint-5", "hera"):  # as if it had been stopped at step 4, and its output folder tidied
        (world / "lora" / name).rename(world / f"lora_{name}")
    (world / "lora/hera").mkdir()
    (world / "lora_hera/heads.json").rename(world / "lora/hera/heads.json")
    (resumed,) = run(world, "lora", "--lora", "4", "--resume")
    assert resumed["hera_temperature"] == straight["hera_temperature"]
    assert json.loads((world / "lora/hera/heads.json").read_text())["provenance"]["date"] == date


def test_a_row_begins_with_one_bos_whether_the_template_the_tokenizer_or_both_write_it(tmp_path: Path) -> None:
    parts = save_language_model("llama3", tmp_path / "llm"), save_tower("siglip", tmp_path / "tower")
    processor = AutoProcessor.from_pretrained(build_backbone(*map(str, parts), tmp_path / "built").folder)
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    content = [{"type": "image"}, {"type": "text", "text": "A dog?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A red car."}]
    row = {"messages": messages, "images": [Image.new("RGB", (40, 30))]}
    template, bos = processor.chat_template, processor.tokenizer.bos_token_id
    silent = template.replace("bos_token +", "'' +")
    for adds, processor.chat_template in ((False, template), (True, template), (True, silent)):
        processor.tokenizer.add_bos_token = adds
        batch = runpy.run_path(SCRIPT)["Collator"](processor)([row])
        assert batch["input_ids"][0, 0] == bos
        assert (batch["input_ids"] == bos).sum() == 1
