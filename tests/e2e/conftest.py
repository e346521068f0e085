"""The process that runs the host, and the demo's recipe."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from .runner import ROOT, HostServer


@pytest.fixture(scope="session")
def server() -> Iterator[HostServer]:
    """The host, imported once."""
    server = HostServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def recipe() -> dict[str, Any]:
    """The demo recipe with named heads and no memory, shortened to 6 steps that log each."""
    args = yaml.safe_load((ROOT / "recipes/demo/hera.yaml").read_text(encoding="utf-8"))
    short = {"max_steps": 6, "logging_steps": 1, "plot_loss": False, "report_to": "none"}
    short |= {"hera_weight": 0.1, "disable_gradient_checkpointing": False}  # as the host has it
    return args | short | {"hera_heads": "L1H0,L1H3,L2H5,L3H2,L3H7", "hera_memory": 0}
