"""`hera_batches: neighbors` through the real host."""

from pathlib import Path

import pytest

from .runner import HostServer

pytestmark = pytest.mark.slow


def test_two_processes_under_accumulation_compare_what_one_compares(
    server: HostServer, world: Path, recipe: dict
) -> None:
    # without a step a batch's term tells who is in it
    args = recipe | {"hera_batches": "neighbors", "hera_teacher_cache": "cache", "learning_rate": 0.0}
    args |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    one = server.run(args | {"output_dir": "saves/one"}, world)
    two = server.run(
        args | {"output_dir": "saves/two", "per_device_train_batch_size": 4, "ddp_backend": "gloo"}, world, ranks=2
    )
    random = server.run(args | {"output_dir": "saves/random", "hera_batches": "random"}, world)
    for run in (one, two, random):
        assert run.ok, run.output
    assert one.output.count("HeRA | batches: reading the images of") == 1
    terms, same, other = ([line["hera_loss"] for line in run.logs()] for run in (one, two, random))
    assert same == pytest.approx(terms, rel=1e-5)
    assert len(terms) == 6
    assert other != pytest.approx(terms, rel=1e-2)
