"""``python recipes/study``: a whole study, from nothing or from where it was stopped, to its page (docs/study.md)."""

import argparse
import fcntl
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

import parts
import train
from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.selection.scores import choose_targets
from report import write_report
from settings import BASELINE, SIZES, TUNED, Settings
from world import World, make_world

STUDY = "study.json"
STRATEGIES = ("worst", "top", "random")
Job = Callable[[], dict[str, Any]]


class JobFailed(ValueError):
    """Processes ended with an error; what does not need them is done."""


def run_study(output: str | os.PathLike, size: str = "default", workers: int = 2, seeds: int = 0) -> Path:
    """Does what of a study is not done yet, and writes ``report.md``, ``report.json`` and the figures.

    Args:
        output: The study's folder.
        size: One of ``SIZES``.
        workers: Processes side by side; numbers do not depend on it, times do.
        seeds: How many the primary methods have, where not the size's; a finished study can be given more.

    Returns:
        The page.

    Raises:
        ValueError: The size is unknown, the folder holds a study of other settings or something else, another process
            works in it, or a run failed.
    """
    if size not in SIZES:
        raise ValueError(f"STUDY={size!r}: choose one of {', '.join(SIZES)}")
    if workers < 1 or seeds < 0:
        raise ValueError(f"workers={workers}, seeds={seeds}: choose 1 or more")
    root, settings = Path(output).absolute(), SIZES[size]
    if seeds:
        settings = replace(settings, seeds=tuple(range(1, seeds + 1)))
    _claim(root, settings, output)
    with _locked(root):
        work = partial(work_through, root, workers=workers)
        world = make_world(settings)  # the processes are forked from this one and have it, too
        work({"parts": partial(parts.make_parts, root, world, settings)})
        numbers = dict.fromkeys((settings.tuning_seed, *settings.seeds))
        work({f"seeds/{seed}": partial(_seed, root, world, settings, seed) for seed in numbers})
        run = partial(train.run, root, world, settings)
        heads = {seed: done(root, f"seeds/{seed}")["heads"] for seed in numbers}
        tuned = settings.tuning_seed
        tries = {f"tuning/{weight:g}": weight for weight in settings.weights}
        work({n: partial(run, TUNED, tuned, weight, heads[tuned], world.validation) for n, weight in tries.items()})
        chosen = choose_weight({weight: done(root, name) for name, weight in tries.items()})
        runs = {
            f"runs/{name}-{seed}": partial(run, name, seed, chosen, heads[seed], world.test)
            for name, seed in settings.runs()
        }
        try:
            work(runs)
        finally:
            if all(_mark(root, f"runs/{method}-{settings.seeds[0]}").exists() for method in (BASELINE, TUNED)):
                page = write_report(root, settings, chosen, world, size)
    return page


def choose_weight(tried: Mapping[float, dict[str, Any]]) -> float:
    """The weight with the best mean accuracy over both sets of validation questions, the smaller one of equals."""
    return max(tried, key=lambda weight: (sum(row["mean"] for row in tried[weight]["accuracy"].values()), -weight))


def _seed(root: Path, world: World, settings: Settings, seed: int) -> dict[str, Any]:
    """A seed's LLaVA, the heads that scores on training captions select, and all scores before training."""
    parts.make_llava(root, world, settings, seed)
    model, processor = parts.load_llava(root, seed)
    encoder = train.Encoder(processor)
    halves = world.captions[: settings.scored], world.captions[settings.scored : 2 * settings.scored]
    scores, again = (train.measure(root, model, encoder, half, ("llm",))["llm"] for half in halves)
    heads = {name: [str(head) for head in choose_targets(scores, name, 5, seed)] for name in STRATEGIES}
    return {
        "heads": heads,
        "scores": scores,
        "again": again,
        "mknn": train.measure(root, model, encoder, world.scored),
    }


def done(root: Path, name: str) -> dict[str, Any]:
    """What a finished job found."""
    return read_json(_mark(root, name))


def _mark(root: Path, name: str) -> Path:
    return root / "done" / f"{name}.json"


def work_through(root: Path, jobs: Mapping[str, Job], workers: int) -> None:
    """Runs jobs in forked processes, some side by side; one whose result is there is not run again.

    A job's output is ``logs/NAME.log``, its result ``done/NAME.json``.

    Raises:
        JobFailed: At the end, if one failed; names their logs.
    """
    waiting = [name for name in jobs if not _mark(root, name).exists()]
    running: dict[Any, tuple[str, Any, float]] = {}
    failed, took = [], []
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            process = context.Process(target=_run_job, args=(root, name, jobs[name]), daemon=True)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a process that is known is stopped, too
            process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            running[process.sentinel] = name, process, time.time()
        for sentinel in wait(list(running)):
            name, process, started = running.pop(sentinel)
            process.join()
            took.append(time.time() - started)
            left = sum(took) / len(took) * (len(waiting) + len(running)) / workers / 60
            state = "failed" if process.exitcode else f"{took[-1]:.0f} s"
            print(f"[hera study] {name} {state}; {len(waiting) + len(running)} more, {left:.0f} min", flush=True)
            if process.exitcode:
                failed.append(f"{name} failed; see {root / 'logs' / name}.log")
    if failed:
        raise JobFailed("\n".join(failed) + "\nThe same command tries them again.")


def _run_job(root: Path, name: str, job: Job) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # as many runs as cores side by side is the fastest way, and numbers do not depend on cores
    torch.set_num_threads(1)
    log = root / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 - for as long as the process lives
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    started = time.time()
    try:
        found = job()
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    write_json(_mark(root, name), found | {"started": started, "wall_s": time.time() - started})


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Holds the study's folder, and lets SIGTERM stop its processes as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:  # no exception: one that is raised in a fork's own hooks is ignored
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        os._exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"output={str(root)!r}: a study runs in it already; wait for it, or choose another folder"
            ) from error
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _claim(root: Path, settings: Settings, output: str | os.PathLike) -> None:
    """Writes the settings into an empty folder; refuses one that belongs to something else."""
    file, asked = root / STUDY, settings.to_dict()
    if file.exists():
        found = read_json(file)["settings"]
        other = sorted(key for key in asked.keys() | found.keys() if found.get(key) != asked.get(key))
        if other and other != ["seeds"]:
            raise ValueError(
                f"output={str(output)!r} holds a study with other settings ({', '.join(other)}): choose another "
                "folder, or remove it yourself"
            )
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"output={str(output)!r} exists and holds no study: choose another folder")
    else:
        try:
            write_json(file, {"settings": asked})
        except OSError as error:
            raise ValueError(
                f"output={str(output)!r} cannot be made ({error.strerror}): choose another folder"
            ) from error


def main() -> int:
    """The command; its exit status is 0, 2 for bad input or a failed run, 130 when it was stopped."""
    parser = argparse.ArgumentParser(prog="recipes/study", description=__doc__)
    parser.add_argument("--size", default="default", choices=SIZES)
    parser.add_argument("--output", help="folder (default hera_study/SIZE)")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--seeds", type=int, default=0, help="of the primary methods, where not the size's")
    options = parser.parse_args()
    try:
        page = run_study(options.output or f"hera_study/{options.size}", options.size, options.workers, options.seeds)
    except ValueError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(page.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
