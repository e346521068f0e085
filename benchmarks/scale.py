"""Measures the term of one micro-batch on one process of many: seconds, peak memory, and bytes sent.

    python benchmarks/scale.py 512 1024 2048 4096 --processes 4 --dim 1024   # real processes, connected by gloo
    python benchmarks/scale.py 4096 16384 65536 --own 32                     # simulates one of N / 32 processes

Random representations of five heads and random teacher features replace a model and a teacher. In a simulation, the
process receives random rows instead of the rows of other processes; the time to create them is not counted. Seconds
are medians over the rounds. Memory counts the tensors that the term and its backward pass allocate. The output is a
Markdown table.
"""

import argparse
import importlib
import multiprocessing
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.objectives import Options, create
from llamafactory_hera.training.memory import CrossBatchMemory
from llamafactory_hera.training.term import HeraTerm

HEADS, DIM_TEACHER, K = 5, 1024, 10


class Traffic:
    """Computes the bytes that this process sends in the term's collectives, by the formulas of ring algorithms.

    If ``simulated``, the collectives send nothing, and ``seconds`` is the time for creating the other processes' rows.
    """

    def __init__(self, simulated: bool) -> None:
        self.bytes, self.seconds, self.simulated = 0.0, 0.0, simulated
        for name, share in (("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1), ("all_reduce", 2)):
            setattr(dist, name, self.counted(name, getattr(dist, name), share))

    def counted(self, name: str, collective: Any, share: int) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            largest = max([tensor, *args], key=torch.numel)
            self.bytes += share * largest.nbytes * (1 - 1 / dist.get_world_size())
            started = time.perf_counter()
            if not self.simulated:
                collective(tensor, *args, **kwargs)
            elif name == "all_gather_into_tensor":
                tensor.uniform_()
            self.seconds += (time.perf_counter() - started) * self.simulated

        return call


def peak_bytes(step: Any) -> int:
    """Returns the peak memory that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(rank: int, n_processes: int, args: argparse.Namespace, results: Any, store: str) -> None:
    """Measures all sizes on one process; the first process sends the rows of the table."""
    torch.set_num_threads(1)
    if args.own:
        importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
        dist.init_process_group("fake", rank=rank, world_size=n_processes, store=dist.HashStore())
    else:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n_processes)
    traffic = Traffic(simulated=bool(args.own))
    options = Options(HeraConfig(heads="L0H0"), HEADS, args.dim, DIM_TEACHER)
    for n_samples in [args.own * n_processes] if args.own else args.samples:
        n_own = n_samples // n_processes
        torch.manual_seed(rank)
        z = torch.randn(HEADS, n_own, args.dim, requires_grad=True)
        teacher, valid = torch.randn(n_own, DIM_TEACHER), torch.ones(n_own, dtype=torch.bool)
        term = HeraTerm(create("contrastive", options), K, True, CrossBatchMemory(0))

        def step() -> None:
            term(z, teacher, valid, n_own).loss.backward()  # noqa: B023 (called in this round of the loop only)

        seconds = []
        for _ in range(args.rounds):
            traffic.bytes = traffic.seconds = 0.0
            if not args.own:
                dist.barrier()
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started - traffic.seconds)
        sent, peak = traffic.bytes, peak_bytes(step)
        gathered = 4 * n_samples * (HEADS * args.dim + DIM_TEACHER + 3)
        mib = [f"{value / 2**20:,.1f}" for value in (gathered, peak - gathered, sent)]
        if rank == 0 or args.own:
            results.put(f"| {n_processes} | {n_samples:,} | {statistics.median(seconds):.3f} | {' | '.join(mib)} |")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=int, nargs="+", help="samples of the global batch")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--own", type=int, help="simulate one process with this number of samples")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    print("| processes | samples | seconds | gathered rows, MiB | memory beyond, MiB | sent, MiB |")
    print("|--:|--:|--:|--:|--:|--:|")
    launches = [[(n // args.own // 2, n // args.own)] for n in args.samples] if args.own else []
    for launch in launches or [[(rank, args.processes) for rank in range(args.processes)]]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [(*place, args, results, f"{folder}/store") for place in launch]
            processes = [context.Process(target=measure, args=each) for each in arguments]
            for process in processes:
                process.start()
            for _ in range(1 if args.own else len(args.samples)):
                print(results.get(), flush=True)
            for process in processes:
                process.join()


if __name__ == "__main__":
    main()
