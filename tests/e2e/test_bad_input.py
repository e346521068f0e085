"""Bad input that only the adapter for LLaMA-Factory can detect stops a run before it loads weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import LORA

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weightless(world: Path) -> str:
    """The demo model without weights: a run that tries to load them fails with a different error."""
    folder = world / "weightless"
    shutil.copytree(world / "hera_demo/model", folder)
    (folder / "model.safetensors").unlink()
    return str(folder)


#: Case -> a change of the recipe, and parts of the message.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no teacher": ({"hera_teacher": "./no_teacher"}, ["hera_teacher: ./no_teacher"]),
    "a text-only model": ({"model_name_or_path": "hera_demo/language_model"}, ["model_name_or_path", "text-only"]),
    "text-only data": ({"dataset": "hera_demo_text"}, ["dataset: no image was found", "an `images` column"]),
    "image tokens cut off": ({"cutoff_len": 12}, ["cutoff_len: 12 cuts", "image tokens"]),
    "packing": ({"packing": True}, ["packing: True", "attend to each other; set neat_packing: true"]),
    "tokens of packed rows": (
        {"neat_packing": True, "hera_objective": "feature"},
        ["hera_objective: feature", "one sample per row", "contrastive"],
    ),
    "fp8": ({"fp8": True}, ["fp8: True", "multiples of 16", "remove"]),
    "output over the model": ({"output_dir": "weightless"}, ["output_dir: weightless", "model_name_or_path"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(train, weightless, name):
    change, parts = CASES[name]
    run = train({"model_name_or_path": weightless}, change, ok=False)
    assert all(part in run.error for part in parts), run.error


def test_a_run_that_cannot_change_its_heads_names_the_keys_of_the_host(train):
    run = train(LORA, {"lora_target": "lm_head", "additional_target": None}, ok=False)
    assert "hera_heads: the HeRA term cannot change L1H0" in run.error
    assert "freeze_multi_modal_projector: false" in run.error
