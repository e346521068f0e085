"""Compares training steps with and without HeRA: seconds, CPU seconds and peak memory.

    python recipes/demo
    python benchmarks/overhead.py recipes/demo/hera.yaml [key=value ...] [--rounds 24] [--accumulate 1] [--threads 1]
    python benchmarks/overhead.py recipes/transformers/sft_vlm_hera.py [--option=value ...]
    python benchmarks/overhead.py my_axolotl.yaml [key=value ...]    # the file must list HeraPlugin in its plugins

The host prepares the recipe's trainer, which then takes three kinds of steps on the same batches in random order:
SFT without hooks, HeRA with cached teacher features, and HeRA that runs the teacher. The times include collation and
the optimizer, and are medians over the rounds; CPU seconds count only this process. On a GPU, peak memory counts all
tensors; on a CPU, it counts the tensors that the step allocates. The output is the last part of a Markdown table row.
"""

import argparse
import contextlib
import random
import runpy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from llamafactory_hera.integrations.method_trainer import MethodTrainerMixin
from llamafactory_hera.integrations.transformers import HeraTrainerMixin
from llamafactory_hera.objectives import find
from llamafactory_hera.training import HeraCollator

SFT, CACHED, ON_THE_FLY = KINDS = ("SFT", "cached", "on the fly")
#: Each round runs one of these batches through all kinds of steps.
N_BATCHES = 4


class Finished(Exception): ...


class Bench:
    """Takes single steps of ``accumulate`` micro-batches with a trainer that has already taken its first step."""

    def __init__(self, trainer: HeraTrainerMixin, accumulate: int) -> None:
        self.trainer, self.accumulate = trainer, accumulate
        self.cuda = trainer.args.device.type == "cuda"
        self.cache = trainer.aligner.teacher.cache
        loader = trainer.get_train_dataloader()
        collate: HeraCollator = loader.collate_fn
        self.collators = {
            SFT: lambda rows: collate.collate([collate.decode(row) for row in rows] if collate.decode else rows),
            CACHED: replace(collate, cache=self.cache),
            ON_THE_FLY: replace(collate, cache=None),
        }
        size, first = trainer.args.per_device_train_batch_size, trainer.args.process_index * N_BATCHES
        self.batches = [
            [loader.dataset[(batch * size + row) % len(loader.dataset)] for row in range(size)]
            for batch in range(first, first + N_BATCHES)
        ]
        for number in range(N_BATCHES):  # fills the cache
            for kind in (SFT, ON_THE_FLY, CACHED):
                self.step(kind, number)

    def step(self, kind: str, number: int) -> tuple[float, float]:
        """Takes an optimizer step, and returns its seconds and CPU seconds."""
        trainer, aligner, model = self.trainer, self.trainer.aligner, self.trainer.model_wrapped
        aligner.teacher.flush()
        aligner.capture.remove()
        if kind != SFT:
            aligner.capture.install()
        aligner.teacher.cache = self.cache if kind == CACHED else None
        started, cpu_started = time.perf_counter(), time.process_time()
        owner = super(MethodTrainerMixin, trainer) if kind == SFT else trainer  # the host's step or HeRA's
        for micro in range(self.accumulate):
            rows = self.batches[(number * self.accumulate + micro) % N_BATCHES]
            owner.training_step(model, self.collators[kind]([dict(sample) for sample in rows]))
        trainer.optimizer.step()
        if kind != SFT:
            aligner.optimizer_step(trainer._get_learning_rate())
        model.zero_grad()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, time.process_time() - cpu_started

    def seconds(self, rounds: int) -> dict[str, tuple[float, float]]:
        """Returns the median seconds and CPU seconds of each kind of step."""
        times, order = defaultdict(list), random.Random(0)  # the order is the same on every rank
        for number in range(rounds):
            for kind in order.sample(KINDS, len(KINDS)):
                times[kind].append(self.step(kind, number))
        return {kind: tuple(map(statistics.median, zip(*times[kind], strict=True))) for kind in KINDS}

    def peak_bytes(self, kind: str) -> int:
        """Returns the largest peak of a kind of step over the batches."""
        peaks = []
        for number in range(N_BATCHES):
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                self.step(kind, number)
                peaks.append(torch.cuda.max_memory_allocated())
                continue
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                self.step(kind, number)
            events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
            held = 0
            for event in sorted(events, key=lambda event: event.start_ns()):
                held += event.nbytes()
                peaks.append(held)
        return max(peaks)


def print_row(bench: Bench, rounds: int) -> None:
    """Measures on all ranks, and prints the row on the first rank."""
    trainer, seconds = bench.trainer, bench.seconds(rounds)
    values = {kind: (*seconds[kind], bench.peak_bytes(kind)) for kind in KINDS}
    sft = f"{1000 * values[SFT][0]:.0f} ms, {values[SFT][2] / 2**20:.1f} MiB"
    ratios = [
        " / ".join(f"{value / base:.3f}" for value, base in zip(values[kind], values[SFT], strict=True))
        for kind in (CACHED, ON_THE_FLY)
    ]
    if trainer.args.process_index == 0:
        print(f"| {sft} | {' | '.join(ratios)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--threads", type=int, default=1)
    options, scripts = parser.parse_known_args()
    options.overrides += scripts
    torch.set_num_threads(options.threads)

    def measure(trainer: HeraTrainerMixin, **_: Any) -> None:
        super(MethodTrainerMixin, trainer).train()
        print_row(Bench(trainer, options.accumulate), options.rounds)
        raise Finished

    HeraTrainerMixin.train = measure
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Finished):
        if options.recipe.endswith(".py"):
            fixed = [f"--output={folder}/run", f"--teacher-cache={folder}/cache", "--steps=1"]
            sys.argv = [options.recipe, *fixed, *options.overrides]
            runpy.run_path(options.recipe, run_name="__main__")
        else:
            train_recipe(options, folder)


def train_recipe(options: argparse.Namespace, folder: str) -> None:
    """Trains a recipe of LLaMA-Factory or axolotl for one step."""
    with open(options.recipe, encoding="utf-8") as file:
        arguments = yaml.safe_load(file)
    for override in options.overrides:
        key, value = override.split("=", 1)
        arguments[key] = yaml.safe_load(value)
    arguments |= {"max_steps": 1, "save_strategy": "no", "gradient_accumulation_steps": 1}
    cached = "hera_teacher_cache" in find(arguments.get("hera_objective", "contrastive")).reads
    arguments |= {"output_dir": f"{folder}/run", "hera_teacher_cache": f"{folder}/cache" if cached else None}
    if "plugins" in arguments:
        from axolotl.cli.train import do_cli

        path = f"{folder}/axolotl.yaml"
        with open(path, "w", encoding="utf-8") as file:
            yaml.safe_dump(arguments, file)
        do_cli(path)
    else:
        from llamafactory.train.tuner import run_exp

        run_exp(arguments | {"report_to": "none", "overwrite_output_dir": True})


if __name__ == "__main__":
    main()
