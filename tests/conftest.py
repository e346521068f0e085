"""What every test shares: one thread, no hub, a seed, and one demo of the small size."""

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
def own_messages() -> Iterator[None]:
    """Undoes what a host, run in this process, changed at the logger of the package."""
    ours = logging.getLogger("llamafactory_hera")
    yield
    ours.parent, ours.handlers[:] = logging.getLogger(), []
    ours.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Every test draws the same numbers, alone or after others, and leaves the environment as it was."""
    torch.manual_seed(0)
    with patch.dict(os.environ):  # the command sets the host's level of messages, which a fork server would keep
        yield


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """A ``Trainer`` collects garbage after every run; walking all that is imported takes it a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def server() -> Iterator[HostServer]:
    """The host, imported once."""
    server = HostServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def copy_demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Puts ``hera_demo`` of the small size into a folder; the command builds it once for all workers."""
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
    """A folder that holds ``hera_demo`` of the small size; runs write beside it."""
    return copy_demo(tmp_path_factory.mktemp("world"))
