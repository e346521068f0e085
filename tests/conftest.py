"""Shared fixtures: one thread, no model hub, a fixed seed, and one small demo."""

import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock

from tests.e2e.runner import ROOT, HostServer, run_command

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    """Restores the package's logger, which a host in this process may have changed."""
    ours = logging.getLogger("llamafactory_hera")
    yield
    ours.parent, ours.handlers[:] = logging.getLogger(), []
    ours.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Seeds the random numbers of every test, and restores the environment after it."""
    torch.manual_seed(0)
    with patch.dict(os.environ):  # for example, llamafactory-hera sets the log level of the host
        yield


@pytest.fixture(autouse=True, scope="module")
def freeze_imports() -> None:
    """Hides imported objects from the garbage collector, because each collection in a ``Trainer`` would take 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def server() -> Iterator[HostServer]:
    """The fork server, which imports the host once."""
    server = HostServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def copy_demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Copies a small ``hera_demo`` into a folder; the demo is built once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "hera_demo.lock"):
        if not (shared / "hera_demo/demo.json").is_file():
            code, output = run_command(
                [sys.executable, str(ROOT / "recipes/demo"), "--size", "test"], shared, timeout=300
            )
            assert code == 0, output

    def copy(folder: Path) -> Path:
        shutil.copytree(shared / "hera_demo", folder / "hera_demo")
        return folder

    return copy


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, copy_demo: Callable[[Path], Path]) -> Path:
    """A folder with a small ``hera_demo``; runs write their output next to it."""
    return copy_demo(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the ``world`` folder the working directory."""
    monkeypatch.chdir(world)
    return world
