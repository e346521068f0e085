"""Gradient accumulation through the real host: averaged micro-batches, and the large batch by gradient caching."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import LORA, Train

pytestmark = pytest.mark.slow

CACHED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "hera_accumulate": "gradcache"}


@pytest.fixture(scope="module")
def even(world: Path) -> dict[str, Any]:
    """Data with answers of one length, so that the LM loss of a batch is the mean of those of its parts."""
    demo, data = world / "hera_demo/data", world / "even"
    rows = json.loads((demo / "demo_train.json").read_text())
    for row in rows:
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "a circle"}]
    data.mkdir()
    (data / "even.json").write_text(json.dumps(rows))
    entry = json.loads((demo / "dataset_info.json").read_text())["hera_demo"] | {"file_name": "even.json"}
    (data / "dataset_info.json").write_text(json.dumps({"even": entry}))
    # Equal answers would give equal representations.
    return {"dataset": "even", "dataset_dir": str(data), "media_dir": str(demo), "hera_pooling": "text"}


def test_gradient_caching_is_the_large_batch(train: Train, even: dict[str, Any]) -> None:
    args = even | {"max_steps": 3, "hera_weight": 1.0}
    large = train(args)
    for ranks in (1, 2):
        cached = train(args, CACHED, {"gradient_accumulation_steps": 4 // ranks}, ranks=ranks)
        assert "candidates per sample: 15 " in cached.output
        for ours, theirs in zip(cached.logs(), large.logs(), strict=True):
            for key in ("loss", "lm_loss", "hera_loss", "hera_mknn", "hera_temperature"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        weights, expected = (load_file(run.folder / "model.safetensors") for run in (cached, large))
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)


def test_without_it_the_term_is_the_mean_of_the_micro_batches(train: Train) -> None:
    # Two steps that change nothing, then the same two micro-batches as one step.
    args = {"per_device_train_batch_size": 8, "learning_rate": 0.0}
    apart = train(args, {"max_steps": 2})
    mean = train(args, {"gradient_accumulation_steps": 2, "max_steps": 1})
    for key in ("loss", "hera_loss", "hera_mknn"):
        expected = sum(line[key] for line in apart.logs()) / 2
        assert mean.logs()[0][key] == pytest.approx(expected, rel=1e-6), key


def test_both_passes_draw_the_same_dropout(train: Train) -> None:
    # The run stops if their outputs differ. The steps are large because a new adapter is zero.
    run = train(CACHED, LORA, {"lora_dropout": 0.5, "max_steps": 4, "learning_rate": 0.1})
    assert all(line["hera_loss"] > 0 for line in run.logs())
