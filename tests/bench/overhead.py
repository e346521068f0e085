"""Training steps with HeRA against the same steps without: seconds and peak memory.

    python recipes/demo
    python tests/bench/overhead.py recipes/demo/hera.yaml [key=value ...] [--rounds 24] [--accumulate 1] [--threads 1]
    python tests/bench/overhead.py recipes/transformers/sft_vlm_hera.py [--option=value ...]
    python tests/bench/overhead.py recipes/trl/sft_vlm_hera.py [--option=value ...]
    python tests/bench/overhead.py my_axolotl.yaml [key=value ...]    # with plugins: [….HeraPlugin]

On several processes:

    torchrun --nproc_per_node 2 tests/bench/overhead.py recipes/demo/hera.yaml ddp_backend=gloo

The host sets the recipe's own trainer up, which then takes three kinds of steps on the same batches, in turns and in
random order: SFT without any hook of HeRA, HeRA with cached teacher features, HeRA with the teacher on the fly. A step
is collating (in this process, not in a worker), forward, backward and optimizer. Seconds are medians over the rounds;
CPU seconds are this process's. Peak memory is that of tensors: on a GPU all that is allocated, on a CPU what the step
allocates on top of weights and optimizer, by the profiler.

With ``--row`` the output is the row of a Markdown table.
"""

import argparse
import contextlib
import os
import platform
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

from llamafactory_hera.integrations.transformers import HeraTrainerMixin
from llamafactory_hera.objectives import find
from llamafactory_hera.training import HeraCollator

SFT, CACHED, ON_THE_FLY = KINDS = ("SFT", "HeRA, cached teacher", "HeRA, teacher on the fly")
#: Different batches; a round takes one of them through all kinds of steps.
N_BATCHES = 4
MIB = 2**20


class Finished(Exception):
    """Leaves the host's workflow when everything is measured."""


class Bench:
    """Takes single steps with a trainer of the host.

    Args:
        trainer: After its first step: model, optimizer and engine are as in a run.
        accumulate: Micro-batches of a step.
    """

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

    def prepare(self, kind: str) -> None:
        """What lasts as long as a run of this kind."""
        aligner = self.trainer.aligner
        aligner.teacher.flush()  # what is on its way into the cache of the last kind
        aligner.capture.remove()
        if kind != SFT:
            aligner.capture.install()
        aligner.teacher.cache = self.cache if kind == CACHED else None

    def step(self, kind: str, number: int) -> None:
        """Everything that happens between two optimizer steps."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        owner = super(HeraTrainerMixin, trainer) if kind == SFT else trainer  # the host's own step, or ours
        for micro in range(self.accumulate):
            rows = self.batches[(number * self.accumulate + micro) % N_BATCHES]
            owner.training_step(model, self.collators[kind]([dict(sample) for sample in rows]))
        trainer.optimizer.step()
        if kind != SFT:
            trainer.aligner.optimizer_step(trainer._get_learning_rate())
        model.zero_grad()
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, rounds: int) -> dict[str, dict[str, float]]:
        """Median wall and CPU seconds of a step by kind."""
        wall, cpu = defaultdict(list), defaultdict(list)
        order = random.Random(0)  # the same on every rank
        for number in range(rounds):
            for kind in order.sample(KINDS, len(KINDS)):
                self.prepare(kind)
                started, cpu_started = time.perf_counter(), time.process_time()
                self.step(kind, number)
                wall[kind].append(time.perf_counter() - started)
                cpu[kind].append(time.process_time() - cpu_started)
        return {kind: {"wall": statistics.median(wall[kind]), "cpu": statistics.median(cpu[kind])} for kind in KINDS}

    def peak_bytes(self, kind: str) -> int:
        """The largest number over the batches."""
        self.prepare(kind)
        return max(self._peak_bytes_of(kind, number) for number in range(N_BATCHES))

    def _peak_bytes_of(self, kind: str, number: int) -> int:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.step(kind, number)
            return torch.cuda.max_memory_allocated()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step(kind, number)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


def report(bench: Bench, options: argparse.Namespace) -> None:
    """Measures, and prints on the first rank."""
    for number in range(N_BATCHES):  # fills the cache, and whatever is allocated once
        for kind in (SFT, ON_THE_FLY, CACHED):
            bench.prepare(kind)
            bench.step(kind, number)
    bench.trainer.aligner.teacher.cache = bench.cache
    bench.trainer.aligner.teacher.flush()
    load = os.getloadavg()[0]
    seconds = bench.seconds(options.rounds)
    peaks = {kind: bench.peak_bytes(kind) for kind in KINDS}
    if bench.trainer.args.process_index:
        return
    ratios = {
        kind: (seconds[kind]["wall"] / seconds[SFT]["wall"], seconds[kind]["cpu"] / seconds[SFT]["cpu"],
               peaks[kind] / peaks[SFT])
        for kind in KINDS
    }  # fmt: skip
    parents = (parent.__name__ for parent in type(bench.trainer).__mro__)
    host = next(name for name in parents if "Hera" not in name and not name.startswith("_"))
    tuning = "PEFT" if hasattr(bench.trainer.model, "peft_config") else "full"
    model = bench.trainer.accelerator.unwrap_model(bench.trainer.model)
    checkpointing = "on" if getattr(model, "is_gradient_checkpointing", False) else "off"
    world_size = bench.trainer.args.world_size
    if options.row:
        cells = [f"{a:.3f} / {b:.3f} / {c:.3f}" for a, b, c in (ratios[CACHED], ratios[ON_THE_FLY])]
        sft = f"{1000 * seconds[SFT]['wall']:.0f} ms, {peaks[SFT] / MIB:.1f} MiB"
        print(f"| {host} | {tuning} | {checkpointing} | {world_size} | {sft} | {' | '.join(cells)} |")
        return
    device = torch.cuda.get_device_name() if bench.cuda else f"{platform.machine()} CPU, {options.threads} threads"
    print(
        f"{host}, {tuning}, checkpointing {checkpointing}, {world_size} processes; {device}, torch {torch.__version__}"
    )
    print(f"{options.rounds} rounds; load average before and after: {load:.1f}, {os.getloadavg()[0]:.1f}")
    print(f"\n{'ms':>8} {'x':>6} {'CPU ms':>8} {'x':>6} {'peak MiB':>9} {'x':>6}")
    for kind in KINDS:
        wall, cpu, memory = ratios[kind]
        print(
            f"{1000 * seconds[kind]['wall']:8.1f} {wall:6.3f} {1000 * seconds[kind]['cpu']:8.1f} {cpu:6.3f} "
            f"{peaks[kind] / MIB:9.1f} {memory:6.3f}  {kind}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", action="store_true")
    options, scripts = parser.parse_known_args()
    options.overrides += scripts
    torch.set_num_threads(options.threads)

    def measure(trainer: HeraTrainerMixin, **_: Any) -> None:
        super(HeraTrainerMixin, trainer).train()
        report(Bench(trainer, options.accumulate), options)
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
    """Trains a recipe of LLaMA-Factory, or a file of axolotl's, for a step."""
    with open(options.recipe, encoding="utf-8") as file:
        arguments = yaml.safe_load(file)
    for override in options.overrides:
        key, value = override.split("=", 1)
        arguments[key] = yaml.safe_load(value)
    arguments |= {"max_steps": 1, "save_strategy": "no", "gradient_accumulation_steps": 1}
    arguments |= {"output_dir": f"{folder}/run"}  # apart from the cache
    draws = find(arguments.get("hera_objective", "contrastive")).view == "latents"  # a sample in each step
    arguments |= {"hera_teacher_cache": None if draws else f"{folder}/cache"}
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
