"""Gradient caching through the real host gives the large batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Train

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
