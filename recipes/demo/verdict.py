"""``python recipes/demo --compare``: trains the demo's model with and without HeRA, and interprets the results.

The script runs the commands that a user would run: ``llamafactory-cli train``, and ``llamafactory-hera`` with
``score``, ``eval`` and ``report``. All run on the CPU and log to ``saves/demo_logs/``.
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
import torch

from llamafactory_hera import cli
from llamafactory_hera.alignment.neighbors import nearest_neighbors
from llamafactory_hera.alignment.scoring import nearest_samples
from llamafactory_hera.files import read_json
from llamafactory_hera.heads import Targets
from llamafactory_hera.heads.probe import projection_weights
from llamafactory_hera.selection.passes import pooled_outputs
from llamafactory_hera.selection.samples import draw_samples
from llamafactory_hera.selection.scores import ScoreFile
from llamafactory_hera.teachers.cache import FeatureCache

from .build import build_demo

#: The compared models: the initial model of both runs, and the models that the runs write.
MODELS = {"before": "hera_demo/model", "SFT": "saves/demo_sft", "HeRA": "saves/demo_hera"}
_RECIPES = {name: os.path.relpath(Path(__file__).with_name(f"{name.lower()}.yaml")) for name in ("SFT", "HeRA")}
#: The keys for scoring: the models see the held-out images, not only the captions.
_SCORING = ("dataset=hera_demo_heldout", "hera_select_samples=128", "hera_select_mode=mllm")
_HEADS = f"{MODELS['HeRA']}/hera/heads.json"
_LOGS, _EVALUATION, _PAGE = Path("saves/demo_logs"), Path("saves/demo_eval"), Path("saves/demo")
_RESAMPLES, _LAST_LINES = 1000, 12


class Difference(NamedTuple):
    """The difference between HeRA and plain fine-tuning, with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


class Measured(NamedTuple):
    """The results of the comparison: each model's values by name, and the differences between HeRA and SFT."""

    mknn: Mapping[str, float]  #: The mean over the aligned heads.
    mknn_difference: Difference
    chance: float  #: The MKNN of unrelated features.
    accuracy: Mapping[str, float]  #: In percent.
    accuracy_difference: Difference
    questions: int


def compare(seed: int = 0, size: str = "demo", force: bool = False) -> str:
    """Builds, trains, scores and evaluates in the working directory, and returns the table and the verdict.

    Args:
        seed: The seed of the demo and of both training runs.
        size: The size of the demo.
        force: True to replace an earlier demo in ``hera_demo/``.

    Raises:
        ValueError: A step failed; the message contains the path and the last lines of the step's log.
    """
    torch.set_num_threads(1)  # the models are so small that threads would mostly wait for each other
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    _LOGS.mkdir(parents=True, exist_ok=True)
    for log in _LOGS.glob("*.log"):
        log.unlink()
    print(f"This takes about 4 minutes on two idle CPU cores. Logs: {_LOGS}/", flush=True)
    with _step("build a tiny model, a teacher and data (hera_demo/)", "build"):
        build_demo(seed=seed, size=size, force=force)
    _train(seed)
    with _step("score all heads on held-out images", "score"):
        _run("score", *MODELS.values(), "--recipe", _RECIPES["HeRA"], *_SCORING)
        heads = Targets.load(_HEADS)
        agreements = {name: agreement(model, heads) for name, model in MODELS.items()}
    with _step("answer questions about held-out images", "eval"):
        names = ("SFT", "HeRA", "before")  # differences are relative to the first
        models = [MODELS[name] for name in names]
        output = ("--suite", "demo", "--data", "hera_demo/data", "--output", str(_EVALUATION))
        _run("eval", *models, "--names", *names, *output)
    with _step("write the page", "report"):
        options = ("--names", *MODELS, "--aligned", _HEADS, "--eval", str(_EVALUATION), "--output", str(_PAGE))
        _run("report", *MODELS.values(), *options)
    found = measure(agreements, _EVALUATION / "demo.json", ScoreFile.load(MODELS["HeRA"]).chance)
    return f"\n{table(found)}\n\n{verdict(found)}\n\nThe page: {_PAGE}.html"


# -- the steps -------------------------------------------------------------------------------------------------------


@contextmanager
def _step(title: str, name: str) -> Iterator[None]:
    """Prints a step's title, redirects the step's output to a log file, and finally prints the seconds."""
    log, start, failed = _LOGS / f"{name}.log", time.perf_counter(), False
    print(f"  {title:<66}", end=" ", flush=True)
    streams = {number: os.dup(number) for number in (1, 2)}
    try:
        with open(log, "ab") as file:
            for number in streams:
                os.dup2(file.fileno(), number)  # loggers keep references to sys.stderr, so replacing it is not enough
        yield
    except Exception:
        traceback.print_exc()
        failed = True
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, stream in streams.items():
            os.dup2(stream, number)
            os.close(stream)
    print("failed" if failed else f"{time.perf_counter() - start:4.0f} s", flush=True)
    if failed:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        raise ValueError("\n".join([f"cannot {title}. The last lines of {log}:", *last]))


def _run(*arguments: str) -> None:
    """Runs ``llamafactory-hera`` in this process, because a new process would import everything again."""
    print("$ llamafactory-hera", *arguments, flush=True)
    if status := cli.main(arguments):
        raise ValueError(f"llamafactory-hera {arguments[0]} ended with status {status}")


def _train(seed: int) -> None:
    """Trains both models at the same time, each in a process with one thread."""
    runs: dict[str, subprocess.Popen] = {}
    try:
        for name, recipe in _RECIPES.items():
            with open(_LOGS / f"{name}.log", "wb") as log:
                command = [sys.executable, "-m", "llamafactory.cli", "train", recipe, f"seed={seed}"]
                runs[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        for (name, run), title in zip(runs.items(), ("without HeRA", "with HeRA at the same time"), strict=True):
            with _step(f"train {title} ({_RECIPES[name]})", name):
                if status := run.wait():
                    raise ValueError(f"llamafactory-cli train {_RECIPES[name]} ended with status {status}")
    finally:
        for run in runs.values():
            run.kill()


# -- the numbers -----------------------------------------------------------------------------------------------------


def agreement(model: str, heads: Targets) -> np.ndarray:
    """Computes the MKNN of each sample, averaged over the heads, ``[N]``."""
    from llamafactory_hera.integrations.llamafactory.inputs import selection_inputs
    from llamafactory_hera.integrations.llamafactory.recipe import read_recipe

    read = read_recipe(_RECIPES["HeRA"], _SCORING, model_name_or_path=model)
    config, inputs = read.config, selection_inputs(read.config, read.host)
    samples, teacher, network = draw_samples(inputs.source, config), inputs.load_teacher(), inputs.load_model()
    cache = FeatureCache(str(config.teacher_cache), teacher.fingerprint, teacher.dim)  # filled while scoring
    features = torch.stack([feature for feature in cache.get([s.key for s in samples]) if feature is not None])
    expected = nearest_neighbors(features, config.select_k, config.normalize)
    outputs, _ = pooled_outputs(inputs, network, [sample.features for sample in samples], config)
    weights, shares = list(projection_weights(network)), []
    for layer, head in heads.items:
        of_head = outputs[layer][:, head or 0]
        columns = weights[layer].split(of_head.shape[-1], dim=1)[head or 0]
        found = nearest_samples(of_head, columns, torch.arange(len(samples)), config.select_k, config.normalize)
        shares.append((found[:, :, None] == expected[:, None]).any(-1).double().mean(-1))
    return torch.stack(shares).mean(0).numpy()


def measure(agreements: Mapping[str, np.ndarray], evaluation: Path, chance: float) -> Measured:
    """Combines the agreements of each model with an evaluation's table, whose first model is SFT."""
    row = read_json(evaluation)["rows"][0]
    mknn = {name: float(values.mean()) for name, values in agreements.items()}
    difference = interval(agreements["HeRA"] - agreements["SFT"])
    return Measured(mknn, difference, chance, row["values"], Difference(*row["differences"]["HeRA"]), row["n"])


def interval(differences: np.ndarray) -> Difference:
    """Computes the mean of paired differences, and its 95% interval by bootstrapping the samples."""
    draws = np.random.default_rng(0).integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(axis=1), [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))


# -- the words -------------------------------------------------------------------------------------------------------


def table(found: Measured) -> str:
    """Renders the results in at most 80 columns."""
    lines = [f"{'':26}{'before':>8}{'SFT':>8}{'HeRA':>8}   HeRA - SFT [95%]"]
    for title, values, change, form in (
        ("MKNN of the aligned heads", found.mknn, found.mknn_difference, ".3f"),
        (f"accuracy, {found.questions} questions, %", found.accuracy, found.accuracy_difference, ".1f"),
    ):
        cells = "".join(f"{values[name]:8{form}}" for name in MODELS)
        difference, low, high = (f"{value:+z{form}}" for value in change)
        lines.append(f"{title:<26}{cells}   {difference} [{low}, {high}]")
    return "\n".join(lines)


def verdict(found: Measured) -> str:
    """Interprets the differences in two sentences."""
    shares = (found.mknn["HeRA"], found.mknn["SFT"], found.chance)
    alignment = {1: "Alignment rose", 0: "Alignment did not clearly change", -1: "Alignment fell"}
    first = (
        "{}: after HeRA, the aligned heads share {:.0%} of their nearest images with the teacher, compared with "
        "{:.0%} after plain fine-tuning (SFT) and {:.0%} by chance."
    ).format(alignment[found.mknn_difference.sign], *shares)
    value, questions = f"{abs(found.accuracy_difference.value):.1f}", f"on the {found.questions} questions"
    second = {
        1: f"Accuracy rose: {questions}, HeRA scores {value} points more than SFT, and the interval excludes 0.",
        0: f"Accuracy did not clearly change: {found.questions} questions are too few to show whether HeRA helps "
        "or harms the answers of so small a model.",
        -1: f"Accuracy fell: {questions}, HeRA scores {value} points less than SFT, and the interval excludes 0.",
    }
    return fill(f"{first} {second[found.accuracy_difference.sign]}", 80)
