"""The model card of a run through the real host."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from .runner import HostServer
from .test_training import LORA

pytestmark = pytest.mark.slow

TITLE = "## Alignment with a vision encoder"


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_card_and_json_say_what_the_run_did(server: HostServer, world: Path, recipe: dict, tuning: dict) -> None:
    auto = {"hera_heads": "auto", "hera_select_samples": 40, "max_steps": 3}
    output = f"saves/card_{tuning.get('finetuning_type', 'full')}"
    run = server.run(recipe | tuning | auto | {"output_dir": output}, world)
    assert run.ok, run.output
    facts = json.loads((run.folder / "hera/card.json").read_text())
    selected = json.loads((run.folder / "hera/heads.json").read_text())
    assert facts["heads"] == selected["heads"]
    first, *_, last = run.logs()
    for name in ("lm_loss", "hera_loss", "hera_mknn", "hera_temperature"):
        assert facts["curves"][name] == {"first": first[name], "last": last[name]}
    scores = selected["provenance"]["scores"]
    for name, score in facts["selection"]["mknn"].items():
        layer, head = map(int, name[1:].split("H"))
        assert score == scores[layer][head]
    assert (facts["objective"], facts["teacher"], facts["steps"]) == ("contrastive", recipe["hera_teacher"], 3)
    card = (run.folder / "README.md").read_text()
    metadata = ModelCard(card).data
    tuned = tuning.get("finetuning_type", "full")
    assert {"llama-factory", tuned, "hera", "llamafactory", "contrastive"} <= set(metadata.tags)
    assert metadata.base_model is None  # a folder here names no model of the hub
    (result,) = metadata.eval_results
    assert (result.dataset_type, result.metric_type) == (recipe["dataset"], "mknn_llm_before")
    assert result.metric_value == round(sum(facts["selection"]["mknn"].values()) / len(facts["heads"]), 4)
    assert card.count(TITLE) == 1
    assert "## Training procedure" in card  # the host's own text stays
    measured = f"{last['hera_mknn']:.4g}", "with those of its batch, in random batches"
    for told in (*facts["heads"], facts["teacher"], "arXiv:2606.23885", *measured):
        assert told in card
    again = server.run(recipe | tuning | auto | {"output_dir": output}, world)
    assert again.ok, again.output
    page = (again.folder / "README.md").read_text()
    assert page.count(TITLE) == 1
    assert len(ModelCard(page).data.eval_results) == 1


def test_layers_and_their_objective_are_named(server: HostServer, world: Path, recipe: dict) -> None:
    keys = {"hera_objective": "cka", "hera_granularity": "layer", "hera_layers": "penultimate", "hera_heads": None}
    run = server.run(recipe | keys | {"output_dir": "saves/card_layers", "max_steps": 2}, world)
    assert run.ok, run.output
    facts = json.loads((run.folder / "hera/card.json").read_text())
    assert (facts["layers"], facts["objective"]) == (["L3"], "cka")
    assert "selection" not in facts  # a layer written by name was not selected by anyone
    assert "the cka objective aligned layers L3" in (run.folder / "README.md").read_text()


def test_a_run_without_hera_has_the_hosts_card_alone(server: HostServer, world: Path, recipe: dict) -> None:
    plain = {key: value for key, value in recipe.items() if not key.startswith("hera_")}
    run = server.run(plain | {"stage": "sft", "output_dir": "saves/card_sft", "max_steps": 2}, world)
    assert run.ok, run.output
    assert TITLE not in (run.folder / "README.md").read_text()
    assert not (run.folder / "hera").exists()


def test_a_finished_run_is_evaluated_and_its_card_says_what_it_reached(
    server: HostServer, world: Path, recipe: dict
) -> None:
    halves = {"per_device_train_batch_size": 8, "ddp_backend": "gloo", "max_steps": 2}
    run = server.run(recipe | halves | {"hera_eval": "demo", "output_dir": "saves/evaluated"}, world, ranks=2)
    assert run.ok, run.output
    (file,) = run.folder.glob("hera/eval/*/hera_demo_questions/result.json")
    result = json.loads(file.read_text())
    assert result["n"] == len(json.loads((world / "hera_demo/data/demo_questions.json").read_text()))
    card = ModelCard.load(run.folder / "README.md")
    (entry,) = card.data.eval_results
    told = (entry.dataset_type, entry.metric_type, entry.metric_value)
    assert told == ("hera_demo_questions", "accuracy", round(result["scores"]["accuracy"], 2))
    assert "llama-factory" in card.data.tags  # what the host wrote stays
    assert card.text.count(TITLE) == 1
