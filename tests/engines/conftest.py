"""Fixtures: the two processes that all tests share, and the errors that the tests measure."""

from collections.abc import Iterator

import pytest
import torch

from .tiny import CHECKPOINTING, DATA, TUNINGS
from .workers import WorkerPair

_ERRORS = pytest.StashKey[dict[tuple[str, str, str, str], float]]()


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPair]:
    """Two gloo processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pair = WorkerPair()
    yield pair
    pair.close()
    torch.set_num_threads(threads)


@pytest.fixture
def errors(request: pytest.FixtureRequest) -> dict[tuple[str, str, str, str], float]:
    """The largest error by engine, tuning, checkpointing and data; the session prints them as a table at its end."""
    return request.config.stash.setdefault(_ERRORS, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the table of docs/distributed.md."""
    found = config.stash.get(_ERRORS, {})
    if not found:
        return
    engines = list(dict.fromkeys(engine for engine, *_ in found))
    terminalreporter.section("largest relative gradient error: " + " / ".join(DATA))
    terminalreporter.line(f"| tuning | checkpointing | {' | '.join(engines)} |")
    terminalreporter.line(f"|---|---|{'---|' * len(engines)}")
    for tuning in TUNINGS:
        for checkpointing in CHECKPOINTING:
            cells = [
                " / ".join(_number(found.get((engine, tuning, checkpointing, data))) for data in DATA)
                for engine in engines
            ]
            terminalreporter.line(f"| {tuning} | {checkpointing} | {' | '.join(cells)} |")


def _number(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}".replace("e-0", "e-") if error else "0"
