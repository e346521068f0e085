"""A study from start to finish: the shared parts, the seeds, the choice of the weight, the runs, and the report."""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.selection.scores import choose_targets

from . import parts, train
from .jobs import locked, result, result_file, work_through
from .report import write_report
from .settings import BASELINE, SIZES, TUNED, Settings
from .world import World, make_world

STUDY = "study.json"
STRATEGIES = ("worst", "top", "random")


def run_study(output: str | os.PathLike, size: str = "default", workers: int = 2, seeds: int = 0) -> Path:
    """Runs the missing jobs of a study, and writes ``report.md``, ``report.json`` and the figure.

    Args:
        output: The study's folder.
        size: One of ``SIZES``.
        workers: The number of processes; it affects only times.
        seeds: The number of seeds for the primary methods; 0 means the size's number. You can add seeds to a finished
            study.

    Returns:
        The report's path.

    Raises:
        ValueError: The folder contains a study with other settings, or other files; or another process uses it; or a
            run failed.
    """
    root, settings = Path(output).absolute(), SIZES[size]
    if seeds:
        settings = replace(settings, seeds=tuple(range(1, seeds + 1)))
    _claim(root, settings)
    with locked(root):
        work = partial(work_through, root, workers=workers)
        world = make_world(settings)  # the forked processes inherit it
        work({"parts": partial(parts.make_parts, root, world, settings)})
        numbers = dict.fromkeys((settings.tuning_seed, *settings.seeds))
        work({f"seeds/{seed}": partial(_seed, root, world, settings, seed) for seed in numbers})
        run = partial(train.run, root, world, settings)
        heads = {seed: result(root, f"seeds/{seed}")["heads"] for seed in numbers}
        tuned = settings.tuning_seed
        tries = {f"tuning/{weight:g}": weight for weight in settings.weights}
        work({n: partial(run, TUNED, tuned, weight, heads[tuned], world.validation) for n, weight in tries.items()})
        chosen = choose_weight({weight: result(root, name) for name, weight in tries.items()})
        runs = {
            f"runs/{name}-{seed}": partial(run, name, seed, chosen, heads[seed], world.test)
            for name, seed in settings.runs()
        }
        try:
            work(runs)
        finally:
            first = settings.seeds[0]
            if all(result_file(root, f"runs/{method}-{first}").exists() for method in (BASELINE, TUNED)):
                report = write_report(root, settings, chosen, world, size)
    return report


def choose_weight(tried: Mapping[float, dict[str, Any]]) -> float:
    """Returns the weight with the best mean accuracy over both sets of questions, or the smallest of tied weights."""
    return max(tried, key=lambda weight: (sum(row["mean"] for row in tried[weight]["accuracy"].values()), -weight))


def _seed(root: Path, world: World, settings: Settings, seed: int) -> dict[str, Any]:
    """Makes the LLaVA of a seed, selects its heads on training captions, and measures it before training."""
    parts.make_llava(root, world, settings, seed)
    model, processor = parts.load_llava(root, seed)
    encoder = train.Encoder(processor)
    halves = world.captions[: settings.scored], world.captions[settings.scored : 2 * settings.scored]
    scores, again = (train.measure(root, model, encoder, half, ("llm",))["llm"] for half in halves)
    heads = {name: [str(head) for head in choose_targets(scores, name, 5, seed)] for name in STRATEGIES}
    mknn = train.measure(root, model, encoder, world.scored)
    return {"heads": heads, "scores": scores, "again": again, "mknn": mknn}


def _claim(root: Path, settings: Settings) -> None:
    """Writes the settings into a new folder; refuses a folder with a different study or other files."""
    file, wanted = root / STUDY, settings.to_dict()
    if file.exists():
        found = read_json(file)["settings"]
        other = sorted(key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key))
        if other and other != ["seeds"]:
            raise ValueError(
                f"--output: {root} contains a study with other settings ({', '.join(other)}); choose another folder."
            )
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"--output: {root} exists and contains no study; choose another folder.")
    else:
        write_json(file, {"settings": wanted})


def main() -> int:
    """Runs the command; the exit status is 0, 2 for bad input or a failed run, or 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="python recipes/study", description=__doc__)
    parser.add_argument("--size", default="default", choices=SIZES)
    parser.add_argument("--output", help="folder (default: hera_study/SIZE)")
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=0, help="number of seeds for the primary methods")
    options = parser.parse_args()
    if options.workers < 1 or options.seeds < 0:
        parser.error(f"--workers {options.workers} --seeds {options.seeds}: choose 1 or more")
    try:
        report = run_study(
            options.output or f"hera_study/{options.size}", options.size, options.workers, options.seeds
        )
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: interrupted; run the same command to resume", file=sys.stderr)
        return 130
    print(report.read_text(encoding="utf-8"))
    return 0
