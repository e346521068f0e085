"""Fixtures: the recipe of the demo, and runs of this recipe."""

import re
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from .runner import ROOT, HostServer, Run

Command = Callable[..., tuple[int, str]]
LORA = {"finetuning_type": "lora", "lora_target": "all", "additional_target": "multi_modal_projector", "lora_rank": 4}


@pytest.fixture(scope="session")
def command(server: HostServer, world: Path) -> Command:
    """Runs ``llamafactory-hera`` in the demo's folder, and returns its exit code and its output."""
    return partial(server.command, cwd=world)


@pytest.fixture(scope="session")
def recipe() -> dict[str, Any]:
    """The demo recipe with named heads and without memory, shortened to 4 steps that are all logged."""
    args = yaml.safe_load((ROOT / "recipes/demo/hera.yaml").read_text(encoding="utf-8"))
    short = {"max_steps": 4, "logging_steps": 1, "plot_loss": False, "report_to": "none"}
    short |= {"hera_weight": 0.1, "disable_gradient_checkpointing": False}  # the host's default
    return args | short | {"hera_heads": "L1H0,L1H3,L2H5,L3H2,L3H7", "hera_memory": 0}


@pytest.fixture
def train(
    server: HostServer, world: Path, recipe: dict[str, Any], request: pytest.FixtureRequest
) -> Callable[..., Run]:
    """Trains the demo in the host, each time in a new output folder."""
    name, numbers = re.sub(r"[^a-z0-9]+", "_", request.node.name.lower()), count()

    def train(*changes: dict[str, Any], ok: bool = True, ranks: int = 1, **options: Any) -> Run:
        """Trains with changes to the recipe (None removes a key), and checks whether the run succeeds."""
        args = recipe | {"output_dir": f"saves/{name}_{next(numbers)}"}
        args |= {"ddp_backend": "gloo"} if ranks > 1 else {}
        for change in changes:
            args |= change
        args = {key: value for key, value in args.items() if value is not None}
        run = server.run(args, **{"cwd": world, "ranks": ranks, **options})
        assert run.ok == ok, run.output
        return run

    return train
