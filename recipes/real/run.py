"""The steps of ``make real``, as commands that can be stopped and resumed.

The steps are those of a user: `build`, stage 1, `select`, stage 2 by LoRA with and without HeRA, `score`, `export`,
LLaMA-Factory's chat, `report`. All files are in ``hera_real/``.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import language_model

ROOT, OUT = Path("hera_real"), "OUT"  # OUT is replaced in a command by the folder that it fills
_HERA, _HOST, _PLUGIN = "recipes/real/hera.yaml", "from llamafactory.cli import main; main()", "llamafactory_hera.cli"
#: Plain fine-tuning, and HeRA, named by the strategy that selects its five heads and by its weight.
METHODS = ("sft", "worst5_1", "top5_1", "random5_1", "worst5_0.1", "worst5_0.01")
#: Seeds and methods of each size.
SIZES = {"default": ((0,), METHODS[:2]), "full": ((0, 1, 2), METHODS)}
#: Scorings before stage 2: dataset, mode, teacher. The tower is a second teacher, because its training differs.
SCORINGS = {
    "before": ("heldout", "mllm", "teacher"),
    "half_a": ("half_a", "llm", "teacher"),
    "half_b": ("half_b", "llm", "teacher"),
    "tower": ("half_a", "llm", "tower"),
    "mllm": ("half_a", "mllm", "teacher"),
}


def step(name: str, *commands: tuple[str, ...]) -> Path:
    """Runs the commands that fill ``hera_real/<name>``, unless that folder exists; it appears once all have succeeded.

    Raises:
        ValueError: A command failed; the message contains the last line of its output.
    """
    folder, part, log = ROOT / name, ROOT / "unfinished", ROOT / "logs" / f"{name.replace('/', '_')}.log"
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


def run(seeds: tuple[int, ...], methods: tuple[str, ...]) -> None:
    """Runs every step in order, with all methods of a seed before the next seed."""

    def score(name: str, model: Path, dataset: str, mode: str, teacher: str) -> None:
        keys = (f"hera_select_dataset={dataset}", f"hera_select_mode={mode}", f"hera_teacher={ROOT}/{teacher}")
        checkpoint = (str(model), "--recipe", _HERA, "--output", f"{OUT}/heads.json")
        step(f"scores/{name}", ("-m", _PLUGIN, "score", *checkpoint, *keys))

    step("language_model", _call("language_model.make_language_model", OUT))
    data = step("data", _call("vision.write_data", OUT))
    encoders = [step(name, _call("vision.train", data, OUT, name)) for name in ("tower", "teacher")]
    step("knowledge", _call("vision.write_knowledge", data, OUT, *encoders))
    parts = ("--language-model", f"{ROOT}/language_model", "--vision-model", f"{ROOT}/tower", "--output", OUT)
    step("model", ("-m", _PLUGIN, "build", *parts))
    stage1 = step("stage1", ("-c", _HOST, "train", "recipes/real/stage1.yaml", f"output_dir={OUT}"))
    for name, scoring in SCORINGS.items():
        score(name, stage1, *scoring)
    step("choices/before", _call("page.write_choices", ROOT, OUT))
    for seed in seeds:
        for method in methods:
            name, recipe, keys = f"{method}-s{seed}", "recipes/real/sft.yaml", [f"seed={seed}", f"output_dir={OUT}"]
            strategy, _, weight = method.partition("5_")
            if weight:
                how = ("hera_heads=auto", f"hera_select={strategy}", f"hera_select_seed={seed}", f"output_dir={OUT}")
                selection = f"selection/{strategy}{f'-{seed}' * (strategy == 'random')}"
                selected = step(selection, ("-m", _PLUGIN, "select", _HERA, *how))
                recipe, keys = _HERA, [*keys, f"hera_heads={selected}/hera/heads.json", f"hera_weight={weight}"]
            trained = step(f"runs/{name}", ("-c", _HOST, "train", recipe, *keys))
            score(name, trained, *SCORINGS["before"])
            step(f"choices/{name}", _call("page.write_choices", ROOT, OUT, trained))
    adapter = ("--adapter_name_or_path", f"{ROOT}/runs/worst5_1-s0", "--finetuning_type", "lora")
    merge = ("--model_name_or_path", str(stage1), *adapter, "--template", "llava_plain", "--export_dir", OUT)
    export = ("-c", _HOST, "export", *merge, "--export_device", "cpu")
    step("exported", export, _call("page.draw_chat", ROOT, OUT))
    files = [f"{ROOT}/scores/{name}/heads.json" for name in ("before", "sft-s0", "worst5_1-s0")]
    aligned = ("--aligned", f"{ROOT}/selection/worst/hera/heads.json", "--output", f"{OUT}/report")
    step("report", ("-m", _PLUGIN, "report", *files, "--names", "before", "SFT", "HeRA", *aligned))


def _call(function: str, *paths: Path | str) -> tuple[str, ...]:
    """Returns the command that calls a function of a module of this folder in a new process."""
    module, name = function.split(".")
    code = f"import pathlib, sys; from recipes.real import {module}; {module}.{name}(*map(pathlib.Path, sys.argv[1:]))"
    return ("-c", code, *map(str, paths))


def main() -> int:
    """Runs the command; the exit status is 0, 2 for bad input or a failed step, or 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="python recipes/real", description=__doc__)
    parser.add_argument("size", nargs="?", choices=SIZES, default="default")
    size = SIZES[parser.parse_args().size]
    try:
        language_model.require_acceptance()
        run(*size)
    except ValueError as error:
        print(f"real: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("real: interrupted; the same command resumes it", file=sys.stderr)
        return 130
    from . import page  # its imports take seconds

    print(page.write_page(ROOT, *size).read_text(encoding="utf-8"))
    return 0
