"""``make real``: HeRA on a real language model, Gemma 3 270M, from its weights to a page (two CPU cores).

The way is the product's own: `build`, stage 1, `select`, stage 2 by LoRA with and without HeRA, `score`, `export`, the
host's chat, `report`. It works in ``hera_real/`` and goes on where it was stopped; docs/real_model.md has the results.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import language_model

ROOT = Path("hera_real")
_HERA = "recipes/real/hera.yaml"
#: Method -> the strategy by which its five heads are selected, and the weight; None for plain fine-tuning.
METHODS = {
    "sft": None,
    "worst5_1": ("worst", 1.0),
    "worst5_0.1": ("worst", 0.1),
    "worst5_0.01": ("worst", 0.01),
    "top5_1": ("top", 1.0),
    "random5_1": ("random", 1.0),
}
SIZES = {"default": ((0,), ("sft", "worst5_1")), "full": ((0, 1, 2), tuple(METHODS))}  # seeds and methods
#: Scorings before stage 2: dataset, mode, teacher. The tower is another teacher, as it was trained otherwise.
SCORINGS = {
    "before": ("heldout", "mllm", "teacher"),
    "half_a": ("half_a", "llm", "teacher"),
    "half_b": ("half_b", "llm", "teacher"),
    "tower": ("half_a", "llm", "tower"),
    "mllm": ("half_a", "mllm", "teacher"),
}
#: Stands in a command for the folder that it fills.
OUT = "OUT"


def step(name: str, *commands: list[str]) -> Path:
    """Has commands fill ``hera_real/<name>``, which appears once all have succeeded; does nothing if it is there.

    Raises:
        ValueError: A command failed; says its last line, and where the others are.
    """
    folder, part, log = ROOT / name, ROOT / "unfinished", ROOT / "logs" / f"{name.replace('/', '_')}.log"
    if folder.exists():
        return folder
    shutil.rmtree(part, ignore_errors=True)
    for parent in (part, log.parent, folder.parent):
        parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": f"recipes/real{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    start, cpu = time.monotonic(), _cpu_seconds()
    with open(log, "w", encoding="utf-8") as output:
        for command in commands:
            filled = [sys.executable, *(word.replace(OUT, str(part)) for word in command)]
            done = subprocess.run(filled, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                said = log.read_text(encoding="utf-8", errors="replace").split("\n")
                last = next((line for line in reversed(said) if line.strip()), f"exit status {done.returncode}")
                raise ValueError(f"{name}: {last.strip()} ({log})")
    part.rename(folder)
    print(f"real: {name}: {time.monotonic() - start:.0f} s, {_cpu_seconds() - cpu:.0f} s of CPU", flush=True)
    return folder


def run(seeds: tuple[int, ...], methods: tuple[str, ...]) -> None:
    """Every step in order, each of a seed's methods before the next seed."""
    step("language_model", _call("language_model.make_language_model(Path('OUT'))"))
    data = step("data", _call("vision.write_data(Path('OUT'))"))
    tower = step("tower", _call(f"vision.train_tower(Path('{data}'), Path('OUT'))"))
    teacher = step("teacher", _call(f"vision.train_teacher(Path('{data}'), Path('OUT'))"))
    encoders = f"(Path('{tower}'), Path('{teacher}'))"
    step("knowledge", _call(f"vision.write_knowledge(Path('{data}'), {encoders}, Path('OUT'))"))
    parts = ("--language-model", f"{ROOT}/language_model", "--vision-model", str(tower), "--output", OUT)
    step("model", _own("build", *parts))
    stage1 = step("stage1", _host("train", "recipes/real/stage1.yaml", f"output_dir={OUT}"))
    for name, scoring in SCORINGS.items():
        _score(name, stage1, *scoring)
    _choices("before", None)
    for seed in seeds:
        for method in methods:
            name, recipe, keys = f"{method}-s{seed}", "recipes/real/sft.yaml", [f"seed={seed}", f"output_dir={OUT}"]
            if how := METHODS[method]:
                strategy = (f"hera_select={how[0]}", f"hera_select_seed={seed}", f"output_dir={OUT}")
                selection = f"selection/{how[0]}{f'-{seed}' * (how[0] == 'random')}"
                selected = step(selection, _own("select", _HERA, "hera_heads=auto", *strategy))
                recipe, keys = _HERA, [*keys, f"hera_heads={selected}/hera/heads.json", f"hera_weight={how[1]}"]
            trained = step(f"runs/{name}", _host("train", recipe, *keys))
            _score(name, trained, *SCORINGS["before"])
            _choices(name, trained)
    merge = (f"model_name_or_path={stage1}", f"adapter_name_or_path={ROOT}/runs/worst5_1-s0", "template=llava_plain")
    export = _host("export", *merge, "finetuning_type=lora", f"export_dir={OUT}", "export_device=cpu")
    step("exported", export, _call(f"page.draw_chat(Path('{ROOT}'), Path('OUT'))"))
    files = [f"{ROOT}/scores/{name}/heads.json" for name in ("before", "sft-s0", "worst5_1-s0")]
    aligned = ("--aligned", f"{ROOT}/selection/worst/hera/heads.json", "--output", f"{OUT}/report")
    step("report", _own("report", *files, "--names", "before", "SFT", "HeRA", *aligned))


def _score(name: str, model: Path, dataset: str, mode: str, teacher: str) -> None:
    keys = (f"hera_select_dataset={dataset}", f"hera_select_mode={mode}", f"hera_teacher={ROOT}/{teacher}")
    step(f"scores/{name}", _own("score", str(model), "--recipe", _HERA, "--output", f"{OUT}/heads.json", *keys))


def _choices(name: str, adapter: Path | None) -> None:
    path = f"Path('{adapter}')" if adapter else "None"
    step(f"choices/{name}", _call(f"page.write_choices(Path('{ROOT}'), {path}, Path('OUT'))"))


def _call(expression: str) -> list[str]:
    """A function of a module of this folder, in a process of its own."""
    return ["-c", f"from pathlib import Path; import {expression.partition('.')[0]}; {expression}"]


def _host(*arguments: str) -> list[str]:
    return ["-c", "from llamafactory.cli import main; main()", *arguments]


def _own(*arguments: str) -> list[str]:
    return ["-m", "llamafactory_hera.cli", *arguments]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """The command; its exit status is 0, 2 for bad input or a failed step, 130 when it was stopped."""
    parser = argparse.ArgumentParser(prog="recipes/real", description=__doc__)
    size = SIZES[parser.add_argument("size", nargs="?", choices=SIZES, default="default") and parser.parse_args().size]
    try:
        language_model.require_acceptance()
        run(*size)
    except ValueError as error:
        print(f"real: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("real: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    import page  # what it imports takes seconds

    print(page.write_page(ROOT, *size).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
