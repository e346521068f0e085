"""Real processes that form a gloo group or hold a lock, and a simulated full disk."""

import multiprocessing
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def holder(output_dir: Path) -> Iterator[subprocess.Popen]:
    """Starts a process that holds the lock of a run, and kills it at the end."""
    code = "import sys; from llamafactory_hera.files import locked\nwith locked(sys.argv[1]): print(); input()"
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-uc", code, str(output_dir)], **pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Makes writes to any file, logs included, fail beyond this size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _run(function: Callable[[int], Any], rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = function(rank)
        dist.destroy_process_group()
    except Exception:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/rank{rank}.pt")


def run_ranks(function: Callable[[int], Any], world_size: int, folder: Path, timeout: float = 180) -> list[Any]:
    """Runs a module-level function on each rank of a gloo group; returns results (``weights_only`` types) by rank."""
    context = multiprocessing.get_context("spawn")
    arguments = [(function, rank, world_size, str(folder)) for rank in range(world_size)]
    processes = [context.Process(target=_run, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
        process.join()
    assert not alive, f"{len(alive)} of {world_size} ranks did not finish within {timeout} s"
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"the ranks' exit codes are {codes}"
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
    failures = [f"rank {rank}: {result}" for rank, result in enumerate(results) if isinstance(result, str)]
    assert not failures, "\n".join(failures)
    return results
