"""Runs jobs in forked processes and stores their results in files, so that a study can be stopped and resumed."""

import fcntl
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from llamafactory_hera.files import read_json, write_json

Job = Callable[[], dict[str, Any]]


def result_file(root: Path, name: str) -> Path:
    """Returns the file with the result of a finished job."""
    return root / "done" / f"{name}.json"


def result(root: Path, name: str) -> dict[str, Any]:
    """Reads the result of a finished job."""
    return read_json(result_file(root, name))


def work_through(root: Path, jobs: Mapping[str, Job], workers: int) -> None:
    """Runs jobs in forked processes, several at a time, and skips jobs that have a result.

    The output of a job goes to ``logs/NAME.log``, and its result to ``done/NAME.json``.

    Raises:
        ValueError: A job failed. The error is raised after all jobs have run, and lists the logs.
    """
    waiting = [name for name in jobs if not result_file(root, name).exists()]
    running: dict[Any, tuple[str, Any, float]] = {}
    failed, took = [], []
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            process = context.Process(target=_run_job, args=(root, name, jobs[name]), daemon=True)
            # A signal must not arrive before multiprocessing has added the new process to its list of children.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            running[process.sentinel] = name, process, time.time()
        for sentinel in wait(list(running)):
            name, process, started = running.pop(sentinel)
            process.join()
            took.append(time.time() - started)
            left = sum(took) / len(took) * (len(waiting) + len(running)) / workers / 60
            state = "failed" if process.exitcode else f"{took[-1]:.0f} s"
            print(f"[hera study] {name} {state}; {len(waiting) + len(running)} more, about {left:.0f} min", flush=True)
            if process.exitcode:
                failed.append(f"{name} failed; see {root / 'logs' / name}.log")
    if failed:
        raise ValueError("\n".join(failed) + "\nRun the same command to retry them.")


def _run_job(root: Path, name: str, job: Job) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # One thread per process is fastest, and makes the numbers independent of the number of cores.
    torch.set_num_threads(1)
    log = root / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 - stays open until the process ends
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    started = time.time()
    try:
        found = job()
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    write_json(result_file(root, name), found | {"started": started, "wall_s": time.time() - started})


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Locks the study's folder, and makes SIGTERM stop the processes of the study.

    Raises:
        ValueError: Another process holds the lock.
    """

    def stop(number: int, frame: Any) -> None:
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        os._exit(128 + number)  # an exception would be ignored if the signal arrived during a fork's hook

    before = signal.signal(signal.SIGTERM, stop)
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"--output: {root} is in use by another study; wait until that study ends, or choose another folder."
            ) from error
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
