"""``make real``: HeRA on a real language model, Gemma 3 270M, from its weights to a page (two CPU cores).

The way is the product's own: `build`, stage 1, `select`, stage 2 by LoRA with and without HeRA, `score`, `export`, the
host's chat, `report`. It works in ``hera_real/`` and goes on where it was stopped; docs/real_model.md has the results.
"""

import argparse
import sys
from pathlib import Path

import language_model
import page
import pictures
import vision
from llamafactory_hera.cli import main as hera
from pool import Pool, Unit, locked, terminated_like_interrupted

ROOT = page.ROOT
_SFT, _HERA = "recipes/real/sft.yaml", "recipes/real/hera.yaml"
GGUF, LANGUAGE_MODEL = Path(ROOT, "gemma.gguf"), Path(ROOT, "language_model")
DATA, TOWER, TEACHER = Path(ROOT, "data"), Path(ROOT, "tower"), Path(ROOT, "teacher")
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
    "before": ("emoji_heldout", "mllm", "teacher"),
    "half_a": ("half_a", "llm", "teacher"),
    "half_b": ("half_b", "llm", "teacher"),
    "tower": ("half_a", "llm", "tower"),
    "mllm": ("half_a", "mllm", "teacher"),
}
WORKS = {
    "language_model": lambda: language_model.make_language_model(GGUF, LANGUAGE_MODEL),
    "data": lambda: pictures.write_pictures(DATA),
    "tower": lambda: vision.train_tower(DATA, TOWER),
    "teacher": lambda: vision.train_teacher(DATA, TEACHER),
    "knowledge": lambda: vision.write_knowledge(DATA, (TOWER, TEACHER), Path(ROOT, "knowledge.json")),
    "chat": page.draw_chat,
}


def plan(seeds: tuple[int, ...], methods: tuple[str, ...]) -> list[Unit]:
    """Every unit of work, each behind those it needs; their processes are started beside ``recipes/``."""
    units: list[Unit] = []

    def add(name: str, after: tuple[str, ...], *commands: list[str], made: tuple[str, ...] = ()) -> None:
        given = commands or (["recipes/real", name],)
        processes = tuple(("env", "-C", str(Path.cwd()), sys.executable, *command) for command in given)
        units.append(Unit(name, name.partition("-")[0], processes, made or (name,), after))

    def host(*arguments: str) -> list[str]:
        return ["-c", "from llamafactory.cli import main; main()", *arguments]

    def own(*arguments: str) -> list[str]:
        return ["-m", "llamafactory_hera.cli", *arguments]

    def score(model: str, name: str, dataset: str, mode: str, teacher: str) -> list[str]:
        keys = (f"hera_select_dataset={dataset}", f"hera_select_mode={mode}", f"hera_teacher={ROOT}/{teacher}")
        return own("score", model, "--recipe", _HERA, "--output", f"{ROOT}/scores/{name}.json", *keys)

    add("language_model", ())
    add("data", ())
    add("tower", ("data",))
    add("teacher", ("data",))
    parts = ("--language-model", str(LANGUAGE_MODEL), "--vision-model", str(TOWER), "--output", f"{ROOT}/model")
    add("model", ("language_model", "tower"), own("build", *parts))
    add("stage1", ("model",), host("train", "recipes/real/stage1.yaml"))
    add("knowledge", ("tower", "teacher"), made=("knowledge.json",))
    chosen = [METHODS[method] for method in methods]
    strategies = sorted({_selection(how, seed) for seed in seeds for how in chosen if how})
    for name in strategies:
        strategy, _, seed = name.partition("-")
        keys = (f"hera_select={strategy}", f"hera_select_seed={seed or 0}", f"output_dir={ROOT}/selection/{name}")
        command = own("select", _HERA, f"model_name_or_path={ROOT}/model", "hera_heads=auto", *keys)
        add(f"selection/{name}", ("model", "teacher"), command)
    for name, scoring in SCORINGS.items():
        after = ("stage1", "selection/worst")
        add(name, after, score(f"{ROOT}/stage1", name, *scoring), made=(f"scores/{name}.json",))
    needed = (*SCORINGS, *(f"selection/{name}" for name in strategies))
    for seed in seeds:  # all methods of a seed before the next: one that is stopped is whole as far as it got
        for method, how in zip(methods, chosen, strict=True):
            name = f"{method}-s{seed}"
            output, recipe, keys = f"{ROOT}/runs/{name}", _SFT, [f"seed={seed}"]
            if how is not None:
                heads = f"{ROOT}/selection/{_selection(how, seed)}/hera/heads.json"
                recipe, keys = _HERA, [*keys, f"hera_heads={heads}", f"hera_weight={how[1]}"]
            train = host("train", recipe, f"output_dir={output}", *keys)
            # as many of either dataset; in float32: see Forward.run
            predict = (
                "do_train=false",
                "do_predict=true",
                "predict_with_generate=true",
                "bf16=false",
                "max_samples=300",
            )
            answers = host("train", _SFT, *predict, f"adapter_name_or_path={output}", f"output_dir={output}/answers")
            scored = score(output, name, *SCORINGS["before"])
            add(name, needed, train, answers, scored, made=(f"runs/{name}", f"scores/{name}.json"))
    export = host("export", *(f"{key}={value}" for key, value in page.EXPORT.items()))
    add("chat", ("worst5_1-s0",), export, ["recipes/real", "chat"], made=("exported", "chat.png"))
    return units


def _selection(how: tuple[str, float], seed: int) -> str:
    return f"random-{seed}" if how[0] == "random" else how[0]


def main() -> int:
    """The command; its exit status is 0, 2 for bad input or a failed unit, 130 when it was stopped."""
    parser = argparse.ArgumentParser(prog="recipes/real", description=__doc__)
    parser.add_argument("work", nargs="?", choices=(*SIZES, *WORKS), default="default", help="a size, or one unit")
    work = parser.parse_args().work
    try:
        if work in WORKS:
            WORKS[work]()
            return 0
        language_model.require_acceptance()
        Path(ROOT).mkdir(exist_ok=True)
        language_model.assemble(GGUF)
        with locked(Path(ROOT)) as lock, terminated_like_interrupted():
            pool = Pool(Path(ROOT).resolve(), 2, lock, lambda line: print(f"[hera real] {line}", flush=True))
            pool.run(plan(*SIZES[work]))
        names = ("before", "sft-s0", "worst5_1-s0")
        files = [f"{ROOT}/scores/{name}.json" for name in names]
        hera(["report", *files, "--names", "before", "SFT", "HeRA", "--output", f"{ROOT}/report"])
        print(page.write_page(*SIZES[work]).read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"real: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("real: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
