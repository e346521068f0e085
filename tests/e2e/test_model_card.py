"""The model card of a run through the real host."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel

from .conftest import LORA

pytestmark = pytest.mark.slow

TITLE = "## Alignment with a vision encoder"


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_card_and_json_describe_the_run_and_how_to_load_it(train, recipe, tuning, world, monkeypatch):
    keys = tuning | {"hera_heads": "auto", "hera_select_samples": 40, "max_steps": 2}
    run = train(keys)
    content = json.loads((run.folder / "hera/card.json").read_text())
    selected = json.loads((run.folder / "hera/heads.json").read_text())
    assert content["heads"] == selected["heads"]
    assert content["k"] == 7  # of 15 candidates, although hera_k is 10
    assert list(content["scores"]["mknn"]) == [*selected["heads"], "mean", "others"]
    assert (content["objective"], content["teacher"], content["steps"]) == ("contrastive", recipe["hera_teacher"], 2)
    page = (run.folder / "README.md").read_text()
    metadata = ModelCard(page).data
    tuned = tuning.get("finetuning_type", "full")
    assert {"llama-factory", tuned, "hera"} <= set(metadata.tags)
    assert "llamafactory" not in metadata.tags
    assert page.count(TITLE) == 1
    assert "## Training procedure" in page  # the host's text stays
    for part in (*content["heads"], content["teacher"], "arXiv:2606.23885", f"{run.logs()[-1]['hera_mknn']:.4g}"):
        assert part in page
    assert metadata.pipeline_tag == "image-text-to-text"
    monkeypatch.chdir(world)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, names := {})
    assert isinstance(names["model"], PeftModel) == bool(tuning)


def test_the_card_of_a_layer_run_names_layers_and_objective(train):
    keys = {"hera_objective": "cka", "hera_granularity": "layer", "hera_layers": "penultimate", "hera_heads": None}
    run = train(keys, {"max_steps": 1})
    content = json.loads((run.folder / "hera/card.json").read_text())
    assert (content["layers"], content["objective"]) == (["L3"], "cka")
    assert "scores" not in content
    assert "HeRA aligned layers L3" in (run.folder / "README.md").read_text()
