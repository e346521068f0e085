"""Gradient accumulation through the real host: averaged micro-batches, and the large batch by gradient caching."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .runner import HostServer

pytestmark = pytest.mark.slow

CACHED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "hera_accumulate": "gradcache"}


@pytest.fixture(scope="module")
def even(world: Path) -> dict[str, str]:
    """Data whose answers are equally long, so that the LM loss of a batch is the mean of those of its parts."""
    data = world / "hera_demo/data"
    rows = json.loads((data / "demo_train.json").read_text())
    for row in rows:
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "a circle"}]
    (data / "even.json").write_text(json.dumps(rows))
    info = json.loads((data / "dataset_info.json").read_text())
    entry = info["hera_demo"] | {"file_name": "even.json"}
    (data / "dataset_info.json").write_text(json.dumps(info | {"even": entry}))
    return {"dataset": "even", "hera_pooling": "text"}  # equal answers would give equal representations


def test_gradient_caching_is_the_large_batch(server: HostServer, world: Path, recipe: dict, even: dict) -> None:
    args = recipe | even | {"max_steps": 3, "hera_weight": 1.0, "per_device_train_batch_size": 16}
    large = server.run(args | {"output_dir": "saves/large"}, world)
    assert large.ok, large.output
    for ranks in (1, 2):
        parts = CACHED | ({"gradient_accumulation_steps": 2, "ddp_backend": "gloo"} if ranks > 1 else {})
        cached = server.run(args | parts | {"output_dir": f"saves/cached_{ranks}"}, world, ranks=ranks)
        assert cached.ok, cached.output
        assert "candidates per sample: 15 " in cached.output
        for ours, theirs in zip(cached.logs(), large.logs(), strict=True):
            for key in ("loss", "lm_loss", "hera_loss", "hera_mknn", "hera_temperature"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        weights, expected = (load_file(run.folder / "model.safetensors") for run in (cached, large))
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)


def test_without_it_the_term_is_the_mean_of_the_micro_batches(server: HostServer, world: Path, recipe: dict) -> None:
    # the first optimizer step: two micro-batches seen apart, then together as one step
    args = recipe | {"per_device_train_batch_size": 8, "learning_rate": 0.0}
    apart = server.run(args | {"output_dir": "saves/apart", "max_steps": 2}, world)
    together = {"gradient_accumulation_steps": 2, "max_steps": 1, "output_dir": "saves/together"}
    mean = server.run(args | together, world)
    assert apart.ok, apart.output
    assert mean.ok, mean.output
    for key in ("loss", "hera_loss", "hera_mknn"):
        expected = sum(line[key] for line in apart.logs()) / 2
        assert mean.logs()[0][key] == pytest.approx(expected, rel=1e-6), key


def test_dropout_is_repeated(server: HostServer, world: Path, recipe: dict) -> None:
    # the term itself checks that both passes give the same head outputs; fast steps, for a new adapter is zero
    lora = {"finetuning_type": "lora", "lora_target": "all", "lora_dropout": 0.5}
    run = server.run(
        recipe | CACHED | lora | {"output_dir": "saves/dropout", "max_steps": 4, "learning_rate": 0.1}, world
    )
    assert run.ok, run.output
    assert all(line["hera_loss"] > 0 for line in run.logs())
