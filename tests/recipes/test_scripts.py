"""The scripts and the notebook of the recipes, and the benchmarks, run as they are."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from transformers import AutoProcessor

from llamafactory_hera.backbones.build import build_backbone
from llamafactory_hera.selection.rows import chat_collator
from llamafactory_hera.teachers.images import sample_images
from tests.backbones.tiny import save_language_model, save_tower
from tests.e2e.runner import ROOT, HostServer

LOGGED = ("loss", "lm_loss", "hera_loss", "hera_mknn", "hera_temperature")
SCRIPT = str(ROOT / "recipes/transformers/sft_vlm_hera.py")


def run(server: HostServer, world: Path, output: str, *options: str, ranks: int = 1) -> dict[str, Any]:
    """Returns the last log line of a run of five steps, with its selected heads."""
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    arguments = ("--steps", "5", "--memory", "32", "--output", output, *options)
    code, printed = server.script(SCRIPT, *arguments, cwd=world, ranks=ranks, **cpu)
    assert code == 0, printed
    history = json.loads((world / output / "trainer_state.json").read_text())["log_history"]
    selected = json.loads((world / output / "hera/heads.json").read_text())
    return {**[line for line in history if "loss" in line][-1], "heads": selected["heads"]}


@pytest.mark.slow
def test_two_processes_give_the_results_of_one_process(server, world):
    one, two = run(server, world, "one"), run(server, world, "two", "--batch", "8", ranks=2)
    assert two["heads"] == one["heads"]
    for name in LOGGED:  # rounding decides between two neighbors that are equally near, so MKNN may differ by one
        assert two[name] == pytest.approx(one[name], abs=1e-3 if name == "hera_mknn" else 1e-5), name
    assert "## Alignment with a vision encoder" in (world / "one/README.md").read_text()


@pytest.mark.slow
def test_lora_resumes_from_its_last_checkpoint(server, world):
    straight = run(server, world, "lora", "--lora", "4")
    (world / "lora/checkpoint-5").rename(world / "lora_finished")  # as if the run had stopped after step 4
    resumed = run(server, world, "lora", "--lora", "4", "--resume")
    assert resumed["heads"] == straight["heads"]
    assert resumed["hera_temperature"] == straight["hera_temperature"]


def test_a_row_begins_with_one_bos_token(tmp_path):
    """The template, the tokenizer or both may write the token."""
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
        for collate in (runpy.run_path(SCRIPT)["Collator"](processor), chat_collator(processor, sample_images)):
            ids = collate([row])["input_ids"]
            assert (ids[0, 0], (ids == bos).sum()) == (bos, 1)


FOLDER = ROOT / "recipes/notebook"


@pytest.mark.slow
def test_the_notebook_selects_trains_and_shows(world):
    notebook = nbformat.read(FOLDER / "hera_in_ten_minutes.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += f"\nSTEPS, SIZE, FOLDER = 4, 'test', {str(world)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    changed = re.findall(r"^ +(L\dH\d)  ([\d.]+) -> ([\d.]+)$", text, re.MULTILINE)
    assert len(changed) == 5
    assert any(before != after for _, before, after in changed)
    # three samples, the scores, the curves, the gallery
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6


BENCHES = {
    "overhead": "overhead.py {root}/recipes/demo/hera.yaml hera_heads=L1H0,L0H2 --rounds 1",
    "cache": "cache.py --images 20000 --dim 8 --seconds 0.2 --readers 1",
    "mknn": "mknn.py --rounds 1 --layers 2 --heads 4 --samples 32 --dim 64 --head-dim 16",
    "selection": "selection.py --rounds 1 --samples 16 --dim 128 --threads 1",
    "start": "start.py --rounds 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES)
def test_each_benchmark_runs(server, world, bench):
    script, *options = BENCHES[bench].format(root=ROOT).split()
    code, output = server.script(ROOT / "benchmarks" / script, *options, cwd=world)
    assert code == 0, output
