"""The steps of ``make real``, as commands that can be stopped and resumed.

A user would take the same steps: `build`, stage 1, `select`, LoRA stage 2 with and without HeRA, `score`, `export`,
LLaMA-Factory's chat, and `report`. All files are in ``hera_real/``.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import parts

ROOT, OUT = Path("hera_real"), "OUT"  # in a command, OUT is replaced with the folder to fill
_RECIPE, _PLUGIN = str(Path(__file__).with_name("hera.yaml")), "llamafactory_hera.cli"
_HOST = "from llamafactory.cli import main; main()"
_STAGE1 = "stage=sft finetuning_type=full freeze_language_model=true freeze_multi_modal_projector=false max_steps=60"
_LAYER = "hera_heads=null hera_granularity=layer"
#: Each method's stage 2 keys that differ from the recipe's.
METHODS = {
    "sft": "stage=sft",
    "worst5": "",
    **{f"worst5_{weight}": f"hera_weight={weight}" for weight in (0.03, 0.1, 1)},
    "top5": f"hera_heads={ROOT}/selection/top/hera/heads.json",
    "random5": f"hera_heads={ROOT}/selection/random/hera/heads.json",
    **{f"sft_few{n}": f"stage=sft dataset=few{n}" for n in (100, 300, 1000)},
    **{f"worst5_few{n}": f"dataset=few{n}" for n in (100, 300, 1000)},
    **{f"worst5_{teacher}": f"hera_teacher={ROOT}/{teacher} hera_heads_force=true" for teacher in ("lite2", "tower")},
    "middle": f"{_LAYER} hera_layers=middle",
    "cmar": f"{_LAYER} hera_layers=penultimate hera_objective=cka hera_weight=0.1 hera_memory=0",
}
#: Each size's number of seeds, methods, and further keys.
SIZES: dict[str, tuple[int, tuple[str, ...], str]] = {
    "smoke": (1, ("sft", "worst5"), "max_steps=2 hera_select_samples=64"),  # its numbers mean nothing
    "default": (1, ("sft", "worst5"), ""),
    "full": (5, tuple(METHODS), ""),
}
#: Scorings of the stage 1 model: dataset, mode and teacher.
SCORINGS = {
    "before": ("heldout", "mllm", "lite0"),
    "half_a": ("half_a", "llm", "lite0"),
    "half_b": ("half_b", "llm", "lite0"),
    "lite2": ("half_a", "llm", "lite2"),
    "tower": ("half_a", "llm", "tower"),
    "mllm": ("half_a", "mllm", "lite0"),
}


def step(name: str, *commands: tuple[str, ...]) -> Path:
    """Runs the commands that fill ``hera_real/<name>``, unless it exists; it appears once all have succeeded.

    Raises:
        ValueError: A command failed; the message contains the last line of the output.
    """
    folder, part, log = ROOT / name, ROOT / "unfinished" / name, ROOT / "logs" / f"{name.replace('/', '_')}.log"
    if folder.exists():
        return folder
    shutil.rmtree(part, ignore_errors=True)
    for parent in (part, log.parent, folder.parent):
        parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((sys.path[0], os.environ.get("PYTHONPATH", "")))}
    start = os.times()
    with open(log, "w", encoding="utf-8") as output:
        for command in commands:
            filled = [sys.executable, *(word.replace(OUT, str(part)) for word in command)]
            done = subprocess.run(filled, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                raise ValueError(f"{name}: {last or f'exit status {done.returncode}'} ({log})")
    part.rename(folder)
    *_, user, system, seconds = (end - begin for begin, end in zip(start, os.times(), strict=True))
    print(f"real: {name}: {seconds:.0f} s, {user + system:.0f} s of CPU", flush=True)
    return folder


def prepare(changes: Sequence[str]) -> None:
    """Makes the stage 1 model and everything else that all methods share, and scores the model's heads."""
    parts.fetch(downloads := ROOT / "downloads")
    language_model = step("language_model", _call("parts.make_language_model", downloads, OUT))
    data = step("data", _call("parts.write_data", downloads, OUT))
    teachers = [step(f"lite{n}", _call("parts.make_teacher", downloads, OUT, n)) for n in "02"]
    steps = parts.TOWER_STEPS if not changes else 2
    tower = step("tower", _call("parts.train_tower", data, OUT, teachers[1], str(steps)))
    step("knowledge", _call("parts.write_knowledge", data, OUT, *teachers, tower))
    of_model = ("--language-model", str(language_model), "--vision-model", str(tower), "--output", OUT)
    model = step("model", ("-m", _PLUGIN, "build", *of_model))
    keys = (f"model_name_or_path={model}", f"output_dir={OUT}", "learning_rate=1e-3")
    stage1 = step("stage1", ("-c", _HOST, "train", _RECIPE, *_STAGE1.split(), *keys, *changes))
    for name, scoring in SCORINGS.items():
        score(name, stage1, changes, *scoring)
    step("choices/before", _call("page.write_choices", ROOT, OUT))


def score(name: str, model: Path, changes: Sequence[str], dataset: str, mode: str, teacher: str) -> None:
    """Scores all heads of a model."""
    keys = (f"hera_select_dataset={dataset}", f"hera_select_mode={mode}", f"hera_teacher={ROOT}/{teacher}", *changes)
    checkpoint = (str(model), "--recipe", _RECIPE, "--output", f"{OUT}/heads.json")
    step(f"scores/{name}", ("-m", _PLUGIN, "score", *checkpoint, *keys))


def run(seeds: int, methods: Sequence[str], changes: Sequence[str]) -> None:
    """Runs every step in order, with all methods of a seed before the next seed."""
    prepare(changes)
    for seed in range(seeds):
        for method in methods:
            if (strategy := method.partition("5")[0]) in ("worst", "top", "random"):
                how = ("hera_heads=auto", f"hera_select={strategy}", f"output_dir={OUT}", *changes)
                step(f"selection/{strategy}", ("-m", _PLUGIN, "select", _RECIPE, *how))
            keys = (*METHODS[method].split(), f"seed={seed}", f"output_dir={OUT}", *changes)
            trained = step(f"runs/{method}-s{seed}", ("-c", _HOST, "train", _RECIPE, *keys))
            score(f"{method}-s{seed}", trained, changes, *SCORINGS["before"])
            step(f"choices/{method}-s{seed}", _call("page.write_choices", ROOT, OUT, trained))
    if {"sft", "worst5"} <= set(methods):
        adapter = ("--adapter_name_or_path", f"{ROOT}/runs/worst5-s0", "--finetuning_type", "lora")
        merge = ("--model_name_or_path", f"{ROOT}/stage1", *adapter, "--template", "llava_plain", "--export_dir", OUT)
        export = ("-c", _HOST, "export", *merge, "--export_device", "cpu")
        step("exported", export, _call("page.draw_chat", ROOT, OUT))
        files = [f"{ROOT}/scores/{name}/heads.json" for name in ("before", "sft-s0", "worst5-s0")]
        aligned = ("--aligned", f"{ROOT}/selection/worst/hera/heads.json", "--output", f"{OUT}/report")
        step("report", ("-m", _PLUGIN, "report", *files, "--names", "before", "SFT", "HeRA", *aligned))
        models = {"before": ROOT / "stage1", "SFT": ROOT / "runs/sft-s0", "HeRA": ROOT / "runs/worst5-s0"}
        for name, model in models.items():
            score(f"drawn/{name}", model, changes, "drawn", "mllm", "lite0")
        files = [f"{ROOT}/scores/drawn/{name}/heads.json" for name in models]
        options = ("--names", *models, "--heads", aligned[1], "--small", "--output", f"{OUT}/gallery")
        step("gallery", ("-m", _PLUGIN, "gallery", *files, *options))


def _call(function: str, *paths: Path | str) -> tuple[str, ...]:
    """Returns a command that calls a function from a module in this folder in a new process."""
    module, name = function.split(".")
    code = f"import pathlib, sys; from recipes.real import {module}; {module}.{name}(*map(pathlib.Path, sys.argv[1:]))"
    return ("-c", code, *map(str, paths))


def main() -> int:
    """Runs the command; the exit status is 0, 2 for bad input or a failed step, or 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="python recipes/real", description=__doc__)
    parser.add_argument("size", nargs="?", choices=SIZES, default="default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="methods to run instead of the size's")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of the size's")
    options = parser.parse_args()
    seeds, methods, changes = SIZES[options.size]
    try:
        run(options.seeds or seeds, options.methods or methods, changes.split())
    except ValueError as error:
        print(f"real: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("real: interrupted; run the same command to resume", file=sys.stderr)
        return 130
    from . import page  # its imports take seconds

    print(page.write_page(ROOT).read_text(encoding="utf-8"))
    return 0
