"""Two gloo processes that start once and run one function after another."""

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ..e2e.runner import free_port
from .tiny import RANKS


def _serve(rank: int, port: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    import torch.distributed as dist

    from . import cells  # noqa: F401

    gc.freeze()  # saves time: DeepSpeed runs the garbage collector for every engine, over all imported objects
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    pipe.send((True, pickle.dumps("ready")))
    while True:
        function, arguments = pipe.recv()
        try:
            # The pipe would use a file descriptor for each tensor and run out of descriptors, so this pickles first.
            pipe.send((True, pickle.dumps(function(*arguments))))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class WorkerError(RuntimeError):
    """A function failed on a rank; the message contains the traceback."""


class WorkerPair:
    """Two processes that start on first use; if one of them fails or takes too long, both are killed."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
        """Calls a module-level function on every rank, and returns the results by rank."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._receive(timeout)

    def _start(self) -> None:
        port = free_port()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("spawn")
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._receive(timeout=300)

    def _receive(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer within {timeout} s; all ranks were killed")
            ok, answer = pipe.recv()
            if not ok:  # the other rank may wait for this rank in a collective
                self.close()
                raise WorkerError(f"rank {rank}: {answer}")
            answers.append(pickle.loads(answer))
        return answers

    def close(self) -> None:
        """Kills the processes; the next call starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
